"""The sliding-window trajectory buffer of FPO (Algorithm 1, lines 10-11; Sec. III-B d).

Keeps the last W iterations whole and in order: targets over n decisions and GAE need trajectories. An actor
that learns from executed latents needs, for Eq. 2, each one's CFM loss under the actor that collected it, and
the draws of that loss. Needs torch only.

    import torch; from fpo_buffer import TrajectoryBuffer
    buffer = TrajectoryBuffer(window=2)              # of iterations, dicts of (T, E, …)
    for iteration in range(3):
        buffer.push(dict(s=torch.randn(10, 4, 21), x=torch.randn(10, 4, 24), r=torch.zeros(10, 4)))
    print(len(buffer), buffer.flat("s").shape)       # 2, (80, 21)
"""

import torch


class TrajectoryBuffer:
    """Whole iterations of rollout, newest last. Each is a dict of tensors (T, E, …): T decisions in E
    environments.

    Stored: s, s_next (T, E, S) states; x (T, E, D) executed latents; r, discount, and 1 or 0 for
    terminated and ended (T, E). Where the actor learns from the executed latents also cfm_init (T, E) with
    its draws u (T, E, N) and eps (T, E, N, D). Raises ValueError for a window below 1.
    """

    def __init__(self, window):
        if window < 1:
            raise ValueError(f"window is {window}; it must hold at least one iteration")
        self.window = window
        self.iterations = []

    def push(self, iteration):
        """Append one iteration and evict those older than the window. Raises ValueError if its fields
        differ in (T, E)."""
        shapes = {tuple(tensor.shape[:2]) for tensor in iteration.values()}
        if len(shapes) != 1:
            raise ValueError(f"all tensors of an iteration must share (T, E); got {sorted(shapes)}")
        self.iterations = [*self.iterations, iteration][-self.window :]

    def flat(self, name):
        """One field, oldest first, (W T E, …): E rows on is an environment's next decision."""
        return torch.cat([iteration[name].flatten(0, 1) for iteration in self.iterations])

    def __len__(self):
        return len(self.iterations)
