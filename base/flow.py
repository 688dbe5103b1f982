"""The embedded frozen base policy π_0: a small flow-matching policy in a whitened PCA space of the action
chunk.

It turns Gaussian noise w into a chunk of actions, given the state: w is the start of a flow u = 0 … 1 (noise
to data) whose end are the chunk's principal components. Whoever chooses w steers the policy: FPO's actor, or
N(0, I), which is the base as it was cloned. Nothing here is trained; `tools/clone_base.py` makes the weights.

    base = FlowBase.load("weights/aloha.safetensors", task="aloha")     # the sizes below are ALOHA's
    s, context = base.encode(observation)                # observation: (B, 21) -> s: (B, 21), twice
    x = torch.randn(len(s), base.latent_dim)             # or an actor's latent chunk
    actions = base.decode(context, x)                    # (B, 40, 14) joint targets, one per control step

The latent has 24 dimensions and not the chunk's 126, because the noise of a policy gradient grows with the
dimension. Flow matching: Lipman et al., arXiv 2210.02747. This file stands alone: torch and safetensors only.
"""

import hashlib
import json
import os
from pathlib import Path

import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

STATE_CLIP = 5.0  # in standard deviations: a cube that lies on its edge must not drown the other inputs
SIZES = ("state_dim", "action_dim", "latent_dim", "chunk_steps", "knots", "flow_steps", "hidden", "blocks")


class FlowBase(nn.Module):
    """The velocity field v(w, u | s), the normalisation around it and the PCA basis of the action chunk.

    header: dict of the SIZES, `task`, for LIBERO `task_ids`, and anything that should travel with the weights
    (how they were made, what they measured). Units of observations and actions are the environment's own.
    """

    pictures = None  # it sees the state and no camera
    free_dim = 0  # numbers of noise beside the latent
    num_envs = 32  # parallel environments that suit it

    def __init__(self, header):
        super().__init__()
        self.header = header
        observation_dim, self.action_dim, self.latent_dim = (header[k] for k in SIZES[:3])
        # all see the normalised observation, and sin k and cos k times its first numbers, for each k
        self.sines, self.sines_of = header.get("sines", []), header.get("sines_of", 0)
        self.state_dim = observation_dim + 2 * len(self.sines) * self.sines_of
        self.chunk_steps, knots, self.flow_steps, hidden, blocks = (header[k] for k in SIZES[3:])

        self.register_buffer("state_mean", torch.zeros(observation_dim))
        self.register_buffer("state_std", torch.ones(observation_dim))
        # chunk = mean + Σ_i z_i basis_i at the knots, in the units of the actions; z has unit variance over
        # the data
        self.register_buffer("chunk_mean", torch.zeros(knots, self.action_dim))
        self.register_buffer("chunk_basis", torch.zeros(self.latent_dim, knots, self.action_dim))
        self.register_buffer("knot_weights", knot_weights(self.chunk_steps, knots), persistent=False)
        # of the flow time's features
        self.register_buffer("frequencies", 2.0 ** torch.arange(8), persistent=False)

        self.input = nn.Linear(self.latent_dim + self.state_dim + 2 * len(self.frequencies), hidden)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(hidden), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, hidden)
            )
            for _ in range(blocks)
        )
        self.output = nn.Linear(hidden, self.latent_dim)

    def velocity(self, w, u, s):
        """The flow's velocity. w: (B, D) the point, u: (B,) flow time, s: (B, S) the state -> (B, D)."""
        angles = u[:, None] * self.frequencies  # (B, 8)
        h = self.input(torch.cat([w, s, angles.sin(), angles.cos()], -1))
        for block in self.blocks:
            h = h + block(h)
        return self.output(nn.functional.silu(h))

    @torch.no_grad()
    def encode(self, observation):
        """The state s that actor and critics see, (B, S), and the context that `decode` needs, here s again.
        observation: (B, O) raw, normalised here. Sines show small differences, as in Fourier features (Tancik
        et al., arXiv 2006.10739)."""
        observation = torch.as_tensor(observation, dtype=torch.float32, device=self.state_mean.device)
        s = ((observation - self.state_mean) / self.state_std).clamp(-STATE_CLIP, STATE_CLIP)
        angles = [k * s[:, : self.sines_of] for k in self.sines]
        s = torch.cat([s, *(wave(a) for a in angles for wave in (torch.sin, torch.cos))], -1)
        return s, s

    @torch.no_grad()
    def decode(self, context, x, free=None):
        """The action chunk that the latent x stands for. context: (B, S), x: (B, D) -> (B, chunk_steps,
        action_dim). free: noise that the latent leaves free, none here."""
        w = x
        for k in range(self.flow_steps):  # Euler: w ← w + v(w, u | s) / flow_steps
            u = torch.full((len(w),), k / self.flow_steps, device=w.device, dtype=w.dtype)
            w = w + self.velocity(w, u, context) / self.flow_steps
        return self.actions(w)

    def actions(self, w):
        """The action chunk of principal components w. (B, D) -> (B, chunk_steps, action_dim)."""
        knots = self.chunk_mean + torch.einsum("bd,dka->bka", w, self.chunk_basis)
        return torch.einsum("tk,bka->bta", self.knot_weights, knots)

    def save(self, path):
        """Write weights and header to `path`, in one piece: a reader sees the old file or the new one."""
        tensors = {k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}
        data = save(tensors, metadata={"header": json.dumps(self.header)})
        part = f"{path}.part"
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)

    @classmethod
    def load(cls, path, device="cpu", task=None):
        """The frozen base in `path`. ValueError, in one sentence, if the file is not a sound base (for
        `task`)."""
        shipped = Path(path).resolve().parent == Path(__file__).resolve().parents[1] / "weights"
        fix = "give the path of a sound one (`python tools/clone_base.py --help` says how one is made)"
        if shipped:
            make = f"python tools/clone_base.py --task {Path(path).stem} --overwrite"
            fix = f"restore it with `git checkout {path}`, or make it with `{make}`"
        if not Path(path).is_file():
            raise ValueError(f"there is no base policy at {path}: {fix}.")
        try:
            with safe_open(str(path), framework="pt", device="cpu") as file:
                header = json.loads((file.metadata() or {})["header"])
                tensors = {k: file.get_tensor(k) for k in file.keys()}
            header["task"], [header[k] for k in SIZES]
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is truncated or no base policy ({one_line(error)}): {fix}.") from None
        if task is not None and header["task"] != task:
            raise ValueError(f"{path} is a base for {header['task']!r}: give a path of one for {task!r}.")
        if not all(isinstance(header[k], int) and 0 < header[k] <= 4096 for k in SIZES):
            raise ValueError(f"{path} has absurd sizes in its header: {fix}.")
        with torch.device("meta"):  # shapes only: a wrong header must not allocate anything
            expected = {k: v.shape for k, v in cls(header).state_dict().items()}
        for name in sorted(expected.keys() | tensors.keys()):
            if name not in expected or name not in tensors or tensors[name].shape != expected[name]:
                raise ValueError(f"the tensor {name} of {path} does not fit its header: {fix}.")
            if not tensors[name].isfinite().all():
                raise ValueError(f"the tensor {name} of {path} has values that are not finite: {fix}.")
        base = cls(header)
        base.load_state_dict(tensors)
        base.sha256 = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        base.device = torch.device(device)
        return base.to(device).eval().requires_grad_(False)


def knot_weights(chunk_steps, knots):
    """Linear interpolation as a matrix (chunk_steps, knots): the action at control step j is that of time j,
    where the knots are at 0, chunk_steps / (knots - 1), …, chunk_steps. Each row has at most two entries and
    sums to 1."""
    time = torch.arange(chunk_steps) * (knots - 1) / chunk_steps
    return (1 - (time[:, None] - torch.arange(knots)).abs()).clamp(min=0)


def one_line(error):
    return " ".join(str(error).split())[:300] or type(error).__name__
