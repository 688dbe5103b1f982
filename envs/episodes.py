"""Whole episodes in the simulator processes, for evaluation, and the environments of the rollout phase."""

import numpy as np

from envs.workers import progress, stack


def play_episodes(workers, tasks, starts, act, limit, record=False):
    """Play one whole episode from every start, for evaluation. tasks, starts: n each.

    act(observations (n, S)) -> actions (n, T, A) is asked for all n episodes at every decision, ended or not,
    so that the random draws of one episode do not depend on how another goes. An episode ends at its first
    success. Returns a dict of arrays (n,): success, length (control steps to the success, or limit),
    diverged, decisions; and frames, a list of (steps + 1, F) with record=True.
    """
    n, tasks = len(tasks), np.asarray(tasks)
    states, observations = workers.reset(tasks, starts)
    success, diverged = np.zeros(n, bool), np.zeros(n, bool)
    length, decisions = np.zeros(n, int), np.zeros(n, int)
    frames = [[] for _ in range(n)]
    alive = np.arange(n)
    while len(alive):
        actions = act(observations)
        now = [states[i] for i in alive], [actions[i, : limit - length[i]] for i in alive]
        chunks = workers.run(tasks[alive], *now, stop_at_success=True, record=record)
        for i, chunk in zip(alive, chunks):
            success[i], diverged[i] = chunk.success.any(), chunk.diverged
            states[i], observations[i] = chunk.state, chunk.observation
            length[i] += len(chunk.success)
            decisions[i] += 1
            if chunk.frames is not None:  # their first row is where the chunk before ended
                frames[i].extend(chunk.frames[len(frames[i]) > 0 :])
        alive = np.flatnonzero((length < limit) & ~diverged & ~success)
        if workers.pictures:
            observations[np.setdiff1d(range(n), alive)] = None  # nothing to look at, and nothing to decode
    length[~success] = limit  # of one that diverged too
    frames = [np.array(f) for f in frames] if record else None
    return dict(success=success, length=length, diverged=diverged, decisions=decisions, frames=frames)


class TrainingEnvs:
    """Environments that start a new episode where one ends, for the rollout phase of Algorithm 1.

    Environment i plays tasks[i mod len]. Each has its own generator, seeded by (seed, i), from which
    draw_start(rng) makes its starts: the sequence of its episodes depends neither on the other environments
    nor on the number of workers.
    """

    def __init__(self, workers, tasks, num_envs, draw_start, limit, seed, own=slice(None)):
        self.workers, self.draw_start, self.limit = workers, draw_start, limit
        self.indices = range(num_envs)[own]  # those of them that are played here
        self.tasks = np.array([tasks[i % len(tasks)] for i in self.indices])
        # the leading 1 keeps training apart from evaluation (0) and demonstrations (2), whatever the seed
        numbers = progress(self.indices, "seed environments")
        self.rngs = [np.random.default_rng([1, seed, i]) for i in numbers]
        starts = [draw_start(rng) for rng in self.rngs]
        self.states, self.observations = workers.reset(self.tasks, starts, "start environments")
        self.steps = np.zeros(len(self.indices), dtype=np.int64)  # control steps of the running episodes

    def step(self, actions):
        """Execute one chunk in every environment. actions: (m, T, A).

        Returns a dict of arrays (m,): success reached in this chunk, num_steps really executed, terminated by
        success or by diverged physics, truncated at the limit, last_observation (m, S) before any reset,
        episode_steps so far. `self.observations` is where the next decision starts.
        """
        within_limit = [a[: self.limit - t] for a, t in zip(actions, self.steps)]
        chunks = self.workers.run(self.tasks, self.states, within_limit, stop_at_success=True)
        num_steps = np.array([len(c.success) for c in chunks])
        success = np.array([bool(c.success.any()) for c in chunks])
        self.steps += num_steps
        terminated = success | np.array([c.diverged for c in chunks])
        truncated = ~terminated & (self.steps >= self.limit)
        seen = stack([c.observation for c in chunks], self.workers.pictures)
        result = dict(success=success, num_steps=num_steps, terminated=terminated, truncated=truncated)
        result |= dict(last_observation=seen, episode_steps=self.steps.copy())
        self.states, self.observations = [c.state for c in chunks], seen.copy()
        ended = np.flatnonzero(terminated | truncated)
        if len(ended):
            starts = [self.draw_start(self.rngs[i]) for i in ended]
            states, self.observations[ended] = self.workers.reset(self.tasks[ended], starts)
            for i, state in zip(ended, states):
                self.states[i] = state
            self.steps[ended] = 0
        return result

    def state_dict(self):
        """Everything that decides how the environments go on, as plain values and arrays. Pictures are not
        kept: states tell them."""
        return dict(
            states=np.concatenate(self.states),
            sizes=np.array([len(s) for s in self.states]),
            observations=None if self.workers.pictures else self.observations,
            steps=self.steps,
            rngs=[rng.bit_generator.state for rng in self.rngs],
        )

    def load_state_dict(self, state):
        """Go on where `state_dict` was taken, of all environments from 0 on."""
        self.steps = np.array(state["steps"])[self.indices]
        states = np.split(np.array(state["states"]), np.cumsum(state["sizes"])[:-1])
        self.states = [states[i] for i in self.indices]
        if self.workers.pictures:
            self.observations = self.workers.look(self.tasks, self.states)
        else:
            self.observations = np.array(state["observations"])[self.indices]
        for i, rng in zip(self.indices, self.rngs):
            rng.bit_generator.state = state["rngs"][i]
