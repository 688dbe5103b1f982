"""Worker processes that die, hang or raise, and whole episodes in them, with a simulator of one number."""

import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import envs.workers
from envs.episodes import TrainingEnvs, play_episodes
from envs.workers import Chunk, Workers


class Line:
    """A point on a line, which actions (T, 1) move; from 1 on there is success, beyond 9 physics diverge."""

    def reset(self, start):
        return np.array([float(start), 0.0]), np.array([float(start)])

    def run(self, state, actions, stop_at_success=False, record=False):
        path = state[0] + np.cumsum(np.asarray(actions)[:, 0])
        if not np.isfinite(path).all() or (abs(path) > 9).any():
            return Chunk(state, state[:1], np.zeros(0, bool), True, state[None, :1] if record else None)
        success = path >= 1
        if stop_at_success and success.any():
            path = path[: success.argmax() + 1]
        frames = np.concatenate([state[:1], path])[:, None] if record else None
        state = np.array([path[-1], state[1] + len(path)])
        return Chunk(state, state[:1], success[: len(path)], False, frames)


def build(tasks):
    return {k: Line() for k in tasks}


@pytest.fixture(scope="module")
def workers():
    with Workers(build, [0], 2) as pool:
        yield pool


def test_a_killed_worker_costs_nothing_that_can_be_done_again(workers):
    states, _ = workers.reset([0] * 4, [0.0, 0.1, 0.2, 0.3])
    actions = np.full((4, 3, 1), 0.25)
    expected = workers.run([0] * 4, states, actions)
    os.kill(next(iter(workers.executor._processes)), signal.SIGKILL)
    for before, after in zip(expected, workers.run([0] * 4, states, actions)):
        np.testing.assert_array_equal(before.state, after.state)
        assert not after.diverged


def hang_once(_, flag):
    """A job whose process stops dead, the first time."""
    if not Path(flag).exists():
        Path(flag).touch()
        os.kill(os.getpid(), signal.SIGSTOP)
    return "done"


@pytest.mark.slow
def test_a_worker_that_hangs_is_replaced(tmp_path):
    with Workers(build, [0], 1, timeout=5) as pool:
        pool.reset([0], [0.0])  # it has started
        assert pool.map(hang_once, [tmp_path / "flag"]) == ["done"]


def die_at_three(_, number):
    """A job whose process ends at number 3."""
    if number == 3:
        os._exit(1)
    return number


@pytest.mark.slow
def test_a_lost_job_is_lost_alone_or_is_an_error(workers):
    assert workers.map(die_at_three, [1, 2, 3, 4, 5], may_lose=True) == [1, 2, None, 4, 5]
    assert workers.map(die_at_three, [3], may_lose=True) == [None]  # the last episode that is still played
    for numbers, lossy in (([1, 2, 3], False), ([3, 3], True)):
        with pytest.raises(ChildProcessError, match="killed"):
            workers.map(die_at_three, numbers, may_lose=lossy)
    assert workers.map(die_at_three, [4, 5]) == [4, 5]


def broken_build(tasks):
    with open(tasks[0], "a") as file:
        file.write("built ")
    raise RuntimeError("the arm is\nmissing")


def raise_at_three(_, number):
    if number == 3:
        raise ValueError("three is too much")
    return number


def test_an_exception_in_a_worker_comes_back_with_its_own_words(tmp_path):
    with Workers(broken_build, [str(tmp_path / "log")], 1) as pool:
        text = r"RuntimeError: the arm is missing \(.*test_workers.py:\d+\)"
        with pytest.raises(ChildProcessError, match=text):
            pool.map(raise_at_three, range(8))
    assert (tmp_path / "log").read_text() == "built "  # once: it would fail the same way again
    with Workers(build, [0], 2) as pool:
        assert pool.map(raise_at_three, [1, 2]) == [1, 2]
        processes = set(pool.executor._processes)
        with pytest.raises(ChildProcessError, match="ValueError: three is too much"):
            pool.map(raise_at_three, range(8))
        assert pool.map(raise_at_three, [1, 2]) == [1, 2]
        assert set(pool.executor._processes) == processes  # none has died


def test_no_shared_memory(monkeypatch):
    def refuse(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(envs.workers, "ProcessPoolExecutor", refuse)
    with pytest.raises(ChildProcessError, match="No space left.*/dev/shm"):
        with Workers(build, [0], 1):
            pass


def test_simulators_start_under_the_debugger(monkeypatch):
    monkeypatch.delattr(sys.modules["__main__"], "__spec__")
    with Workers(build, [0], 1) as pool:
        assert pool.map(raise_at_three, [1, 2]) == [1, 2]


# ---- whole episodes ----


class Deadly:
    """Actions that end the process which unpickles those of episode 1."""

    def __getitem__(self, key):
        return self if key[0] == 1 else np.zeros((7, 1))

    def __reduce__(self):
        return os._exit, (1,)


def test_recorded_episodes_start_with_their_first_state_and_survive_a_lost_chunk(workers):
    starts = [0.0, 0.5, -3.0]
    actions = np.full((3, 5, 1), 0.125)
    actions[2, 2] = np.nan
    result = play_episodes(workers, [0] * 3, starts, lambda _: actions, limit=7, record=True)
    # 0 + 7 / 8 fails at the limit, 0.5 + 4 / 8 succeeds after four steps, and NaN diverges at once
    assert list(result["success"]) == [False, True, False] and list(result["length"]) == [7, 4, 7]
    assert list(result["diverged"]) == [False, False, True] and list(result["decisions"]) == [2, 1, 1]
    assert [len(f) for f in result["frames"]] == [8, 5, 1]
    np.testing.assert_array_equal([f[0, 0] for f in result["frames"]], starts)
    np.testing.assert_array_equal(result["frames"][0][:, 0], np.arange(8) / 8)
    result = play_episodes(workers, [0] * 3, [0.0] * 3, lambda _: Deadly(), limit=7, record=True)
    assert [len(f) for f in result["frames"]] == [8, 0, 8]
    assert list(result["diverged"]) == [False, True, False] and not result["success"].any()
    assert list(result["length"]) == [7, 7, 7]


def test_every_decision_asks_for_all_episodes(workers):
    """So that the draws of one do not depend on how another goes."""
    seen = []

    def act(observations):
        seen.append(observations[:, 0].copy())
        return np.full((2, 2, 1), 0.25)

    play_episodes(workers, [0, 0], [0.0, 0.5], act, limit=100)
    np.testing.assert_array_equal(seen, [[0, 0.5], [0.5, 1]])  # the second has ended


def test_an_evaluation_episode_has_its_own_noise_whatever_is_played_beside_it(workers):
    import torch  # not above: every worker imports this file

    from evaluate import evaluate

    def decode(context, x, free):
        return 0.01 * torch.stack([x[:, :1], free], 1)  # (n, 2, 1)

    sizes = dict(latent_dim=2, free_dim=1, chunk_steps=2, device=torch.device("cpu"))
    base = SimpleNamespace(encode=lambda observations: (observations, None), decode=decode, **sizes)
    alone, among = (
        evaluate("base", lambda s, noise: noise, base, workers, [0], starts, limit=6)
        for starts in ([0.5], [0.5, 0.0, 0.25])
    )
    np.testing.assert_array_equal(alone["drawn"][0], among["drawn"][0])
    assert len(alone["drawn"][0]) == 3 and (among["drawn"][1] != among["drawn"][0]).all()


def test_the_rollout_by_hand(workers):
    """Three environments: one succeeds within its chunk, one runs into the limit, one diverges."""
    starts = iter([0.5, 0.0, 8.0, 0.25, 0.75, -2.0])
    envs = TrainingEnvs(workers, [0], 3, lambda rng: next(starts), limit=6, seed=0)
    step = envs.step(np.array([[[0.25]] * 4, [[0.0]] * 4, [[0.5]] * 4]))
    assert list(step["success"]) == [True, False, False] and list(step["num_steps"]) == [2, 4, 0]
    assert list(step["terminated"]) == [True, False, True] and not step["truncated"].any()
    np.testing.assert_array_equal(step["last_observation"][:, 0], [1, 0, 8])
    np.testing.assert_array_equal(envs.observations[:, 0], [0.25, 0, 0.75])
    assert list(step["episode_steps"]) == [2, 4, 0] and list(envs.steps) == [0, 4, 0]
    saved = {k: (v.copy() if hasattr(v, "copy") else v) for k, v in envs.state_dict().items()}
    step = envs.step(np.zeros((3, 4, 1)))
    assert list(step["num_steps"]) == [4, 2, 4] and list(step["truncated"]) == [False, True, False]
    assert list(step["episode_steps"]) == [4, 6, 4] and list(envs.steps) == [4, 0, 4]
    np.testing.assert_array_equal(envs.observations[:, 0], [0.25, -2, 0.75])
    envs.load_state_dict(saved)
    assert list(envs.steps) == [0, 4, 0]
    np.testing.assert_array_equal(envs.observations[:, 0], [0.25, 0, 0.75])
