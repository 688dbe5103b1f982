"""The fast simulation against gym-aloha itself, and its independence of workers."""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import gym_aloha  # noqa: F401  registers the environments
import gymnasium
import numpy as np
import pytest

from env_aloha import (
    HORIZON, START_ACTION, Simulator, TrainingEnvs, Workers, evaluation_poses, play_episodes, sample_box_poses, strict_success,
)  # fmt: skip
from worker_pool import WorkerPool


@pytest.fixture(scope="module")
def simulator():
    return Simulator()


@pytest.fixture(scope="module")
def workers():
    with Workers(2) as pool:
        yield pool


def demonstration(simulator, seed):
    """A cube pose and the commands of one scripted transfer that suits it, with command noise."""
    from demo_aloha import ARM, MODES, Demonstrator, smooth_noise

    rng = np.random.default_rng([9, seed])
    pose = sample_box_poses(rng, 1)[0]
    mode = MODES.index("hook" if np.linalg.norm(pose[:2] - ARM) < 0.371 else "slide")
    return pose, Demonstrator(simulator).plan(mode, pose, 0.002, rng) + smooth_noise(rng, 0.01)


def random_commands(seed, n=60):
    """Smooth commands that hit the table and the cube."""
    rng = np.random.default_rng(seed)
    drift = np.cumsum(rng.normal(0, 0.05, (n, 14)), 0)
    drift[:, [6, 13]] *= 0.3
    return START_ACTION + drift


def gym_rollout(pose, actions):
    """States, rewards and success of gym-aloha's own environment; only its three cameras are switched off."""
    env = gymnasium.make("gym_aloha/AlohaTransferCube-v0", obs_type="pixels_agent_pos").unwrapped
    env._env.physics.render = lambda **_: np.zeros((1, 1, 3), np.uint8)
    env.reset()
    from gym_aloha.tasks import sim

    sim.BOX_POSE[0] = pose
    env._env.reset()
    qpos, rewards, success = [env._env.physics.data.qpos.copy()], [], False
    for action in actions:
        _, reward, terminated, _, _ = env.step(np.asarray(action, dtype=np.float64))
        qpos.append(env._env.physics.data.qpos.copy())
        rewards.append(reward)
        success |= terminated
    return np.array(qpos), np.array(rewards), success


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_same_states_and_rewards_as_gym_on_random_commands(simulator, seed):
    pose = sample_box_poses(np.random.default_rng(seed), 1)[0]
    actions = random_commands(seed)
    qpos, rewards, _ = gym_rollout(pose, actions)
    chunk = simulator.run(simulator.reset(pose)[0], actions, record=True)
    np.testing.assert_allclose(chunk.qpos, qpos, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(chunk.rewards, rewards)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_same_states_rewards_and_success_as_gym_on_demonstrations(simulator, seed):
    pose, actions = demonstration(simulator, seed)
    qpos, rewards, success = gym_rollout(pose, actions)
    chunk = simulator.run(simulator.reset(pose)[0], actions, record=True)
    np.testing.assert_allclose(chunk.qpos, qpos, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(chunk.rewards, rewards)
    assert (chunk.rewards == 4).any() == success
    assert len(set(rewards)) >= 3  # the cube was really grasped: the comparison saw several stages


def test_some_demonstration_succeeds_officially_and_strictly(simulator):
    chunks = [simulator.run(simulator.reset(p)[0], a) for p, a in (demonstration(simulator, k) for k in range(3))]
    assert any((c.rewards == 4).any() and strict_success(c.held) for c in chunks)


def test_observation_is_what_gym_reports(simulator):
    pose = sample_box_poses(np.random.default_rng(3), 1)[0]
    env = gymnasium.make("gym_aloha/AlohaTransferCube-v0", obs_type="pixels_agent_pos").unwrapped
    env._env.physics.render = lambda **_: np.zeros((1, 1, 3), np.uint8)
    env.reset()
    from gym_aloha.tasks import sim

    sim.BOX_POSE[0] = pose
    env._env.reset()
    for action in random_commands(3, 10):
        observation, *_ = env.step(action)
    chunk = simulator.run(simulator.reset(pose)[0], random_commands(3, 10))
    np.testing.assert_allclose(chunk.observation[:14], observation["agent_pos"], atol=1e-12)
    np.testing.assert_allclose(chunk.observation[14:], env._env.physics.data.qpos[16:], atol=1e-12)


def test_a_state_is_all_there_is(simulator):
    """An episode cut into chunks, with other episodes in between, equals the uncut one bit for bit."""
    pose, actions = demonstration(simulator, 0)
    whole = simulator.run(simulator.reset(pose)[0], actions, record=True)
    state, pieces = simulator.reset(pose)[0], []
    for k in range(0, HORIZON, 40):
        chunk = simulator.run(state, actions[k : k + 40], record=True)
        state = chunk.state
        pieces.append(chunk.qpos[1:])
        simulator.run(simulator.reset(pose + np.array([0.01, 0, 0, 0, 0, 0, 0]))[0], random_commands(k, 20))
    np.testing.assert_array_equal(np.concatenate(pieces), whole.qpos[1:])


def test_same_trajectories_whatever_the_number_of_workers(workers):
    def trajectory(pool):
        envs = TrainingEnvs(pool, 5, seed=4)
        rng = np.random.default_rng(0)
        for _ in range(3):
            envs.step(START_ACTION + rng.normal(0, 0.05, (5, 40, 14)))
        return envs.states

    with Workers(1) as one:
        np.testing.assert_array_equal(trajectory(one), trajectory(workers))


def test_training_and_evaluation_states_are_disjoint(workers):
    """Where training episodes really start, the first ones and those after a time limit, and where evaluation episodes do."""
    starts = [evaluation_poses(200)[:, :2]]
    for seed in range(3):
        envs = TrainingEnvs(workers, 32, seed)
        for _ in range(3):
            starts.append(envs.observations[:, 14:16].copy())  # x and y of the cube
            envs.steps[:] = HORIZON - 1
            assert envs.step(np.tile(START_ACTION, (32, 1, 1)))["truncated"].all()
    starts = np.concatenate(starts)
    apart = np.abs(starts[:, None] - starts[None]).max(2)
    assert apart[~np.eye(len(starts), dtype=bool)].min() > 1e-9  # metres


def test_episode_ends(workers):
    """Horizon truncates, the cube moves to a new place, and the last observation is from before the reset."""
    envs = TrainingEnvs(workers, 2, seed=0)
    first = envs.observations[:, 14:16].copy()
    for k in range(HORIZON // 40):
        step = envs.step(np.tile(START_ACTION, (2, 40, 1)))
        assert step["truncated"].all() == (k == HORIZON // 40 - 1)
    np.testing.assert_allclose(step["last_observation"][:, 14:16], first, atol=1e-3)
    assert (np.abs(envs.observations[:, 14:16] - first).max(1) > 1e-3).all()
    assert (envs.steps == 0).all() and not step["success"].any() and not step["terminated"].any()


def test_diverging_physics_fails_the_episode_and_not_the_run(workers):
    envs = TrainingEnvs(workers, 3, seed=0)
    actions = np.tile(START_ACTION, (3, 40, 1))
    actions[1] = np.nan
    envs.states[2, 24:46] = 1e11  # joint velocities beyond what MuJoCo accepts (it clips commands by itself)
    step = envs.step(actions)
    assert list(step["terminated"]) == [False, True, True] and not step["success"].any()
    assert np.isfinite(step["last_observation"]).all() and np.isfinite(envs.states).all()


def test_a_killed_worker_costs_nothing_that_can_be_done_again():
    with Workers(2) as pool:
        states, _ = pool.reset(sample_box_poses(np.random.default_rng(0), 4))
        actions = np.tile(START_ACTION, (4, 40, 1))
        expected = pool.run(states, actions)
        os.kill(next(iter(pool.pool.executor._processes)), signal.SIGKILL)
        for before, after in zip(expected, pool.run(states, actions)):
            np.testing.assert_array_equal(before.state, after.state)
            assert not after.diverged


def die_at_three(simulator, number):
    """A job for test_a_lost_job_…: its process ends at number 3."""
    if number == 3:
        os._exit(1)
    return number


def test_a_lost_job_is_lost_alone_or_is_an_error():
    with WorkerPool(2, dict) as pool:
        assert pool.map(die_at_three, [1, 2, 3, 4, 5], may_lose=True) == [1, 2, None, 4, 5]
        assert pool.map(die_at_three, [3], may_lose=True) == [None]  # the last episode that is still played
        for numbers, lossy in (([1, 2, 3], False), ([3, 3], True)):
            with pytest.raises(ChildProcessError, match="killed"):
                pool.map(die_at_three, numbers, may_lose=lossy)
        assert pool.map(die_at_three, [4, 5]) == [4, 5]


class Deadly:
    """Actions that end the process which unpickles those of episode 1."""

    def __getitem__(self, key):
        return self if key[0] == 1 else np.tile(START_ACTION, (HORIZON, 1))

    def __reduce__(self):
        return os._exit, (1,)


def test_recorded_episodes_start_with_their_first_state_and_survive_a_lost_chunk():
    poses = evaluation_poses(3)
    with Workers(2) as workers:
        actions = np.tile(START_ACTION, (3, HORIZON, 1))
        actions[2, 5] = np.nan
        result = play_episodes(workers, poses, lambda _: actions, record=True)
        assert [len(q) for q in result["qpos"]] == [HORIZON + 1, HORIZON + 1, 1] and list(result["diverged"]) == [False, False, True]
        np.testing.assert_array_equal([q[0, 16:] for q in result["qpos"]], poses)
        result = play_episodes(workers, poses, lambda _: Deadly(), record=True)
        assert [len(q) for q in result["qpos"]] == [HORIZON + 1, 0, HORIZON + 1] and list(result["diverged"]) == [False, True, False]


def test_strict_success_needs_ten_steps_in_a_row():
    assert not strict_success([True] * 9 + [False] + [True] * 9)
    assert strict_success([False] + [True] * 10)


def test_rendering_shows_the_cube_where_it_is(workers):
    poses = np.array([[0.0, 0.5, 0.05, 1, 0, 0, 0], [0.2, 0.5, 0.05, 1, 0, 0, 0]])
    states, _ = workers.reset(poses)
    chunks = workers.run(states, np.tile(START_ACTION, (2, 2, 1)), record=True)
    left, right = (f[-1].astype(int) for f in workers.render([c.qpos for c in chunks], camera="top", height=120, width=160))
    red = lambda image: np.argwhere((image[..., 0] > 120) & (image[..., 1] < 60) & (image[..., 2] < 60)).mean(0)
    assert abs(red(left)[1] - red(right)[1]) > 15  # 20 cm are many pixels


def test_pictures_and_pose_are_what_gym_shows(simulator):
    """`look`, at the end of a chunk, against gym-aloha's own observation after the same commands, camera and all."""
    pose, actions = sample_box_poses(np.random.default_rng(4), 1)[0], random_commands(4, 6)
    env = gymnasium.make("gym_aloha/AlohaTransferCube-v0", obs_type="pixels_agent_pos").unwrapped
    render = env._env.physics.render
    env._env.physics.render = lambda height, width, camera_id: render(height=48, width=64, camera_id=camera_id)
    env.reset()
    from gym_aloha.tasks import sim

    sim.BOX_POSE[0] = pose
    env._env.reset()
    for action in actions:
        observation, *_ = env.step(action)
    chunk = simulator.run(simulator.reset(pose)[0], actions)
    seen = simulator.look(chunk.state, dict(top=(48, 64)))
    np.testing.assert_allclose(seen["agent_pos"], observation["agent_pos"], atol=1e-12)
    ours, theirs = seen["pixels"]["top"].astype(int), observation["pixels"]["top"].astype(int)
    assert theirs.std() > 10 and (np.abs(ours - theirs).max(-1) > 2).mean() < 0.02
