"""The fast simulation against gym-aloha itself, and its independence of workers."""

import sys

import gym_aloha  # noqa: F401  registers the environments
import gymnasium
import numpy as np
import pytest

from envs.aloha import HORIZON, START_ACTION, TASK, Simulator, build, draw_start, evaluation_poses
from envs.aloha import sample_box_poses
from envs.episodes import TrainingEnvs
from envs.workers import Workers
from helpers import ROOT

sys.path.insert(0, str(ROOT / "tools"))


@pytest.fixture(scope="module")
def simulator():
    return Simulator()


@pytest.fixture(scope="module")
def workers():
    with Workers(build, [TASK], 2) as pool:
        yield pool


@pytest.fixture(scope="module")
def gym_env():
    """gym-aloha's own environment; its cameras are switched off until `render` is given back."""
    env = gymnasium.make("gym_aloha/AlohaTransferCube-v0", obs_type="pixels_agent_pos").unwrapped
    env.render_pictures = env._env.physics.render
    env._env.physics.render = lambda **_: np.zeros((1, 1, 3), np.uint8)
    env.reset()
    return env


def gym_reset(env, pose):
    from gym_aloha.tasks import sim

    sim.BOX_POSE[0] = pose
    env._env.reset()


def gym_rollout(env, pose, actions):
    """States, rewards and success of gym-aloha, and its last observation."""
    gym_reset(env, pose)
    qpos, rewards, success = [env._env.physics.data.qpos.copy()], [], False
    for action in actions:
        observation, reward, terminated, _, _ = env.step(np.asarray(action, dtype=np.float64))
        qpos.append(env._env.physics.data.qpos.copy())
        rewards.append(reward)
        success |= terminated
    return np.array(qpos), np.array(rewards), success, observation


def our_rollout(simulator, pose, actions):
    """The same of ours, step by step: the reward is that of the present contacts."""
    state, _ = simulator.reset(pose)
    qpos, rewards, success = [], [], []
    for action in actions:
        chunk = simulator.run(state, action[None], record=True)
        state = chunk.state
        qpos.extend(chunk.frames[len(qpos) > 0 :])
        rewards.append(simulator.reward())
        success.extend(chunk.success)
    return np.array(qpos), np.array(rewards), np.array(success)


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


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_same_states_rewards_and_observation_as_gym_on_random_commands(simulator, gym_env, seed):
    pose = sample_box_poses(np.random.default_rng(seed), 1)[0]
    actions = random_commands(seed)
    qpos, rewards, _, observation = gym_rollout(gym_env, pose, actions)
    ours = our_rollout(simulator, pose, actions)
    np.testing.assert_allclose(ours[0], qpos, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(ours[1], rewards)
    chunk = simulator.run(simulator.reset(pose)[0], actions)
    np.testing.assert_allclose(chunk.observation[:14], observation["agent_pos"], atol=1e-12)
    np.testing.assert_allclose(chunk.observation[14:], qpos[-1, 16:], atol=1e-12)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_same_states_rewards_and_success_as_gym_on_demonstrations(simulator, gym_env, seed):
    """All of them succeed. An episode in one piece is, bit for bit, that of single steps, and that of chunks
    with other episodes in between: a state is all there is."""
    pose, actions = demonstration(simulator, seed)
    qpos, rewards, success, _ = gym_rollout(gym_env, pose, actions)
    ours = our_rollout(simulator, pose, actions)
    np.testing.assert_allclose(ours[0], qpos, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(ours[1], rewards)
    np.testing.assert_array_equal(ours[2], rewards == 4)
    assert success and ours[2].any()
    assert len(set(rewards)) >= 3  # the cube was really grasped: the comparison saw several stages

    whole = simulator.run(simulator.reset(pose)[0], actions, record=True)
    np.testing.assert_array_equal(whole.frames, ours[0])
    np.testing.assert_array_equal(whole.success, ours[2])
    state, pieces = simulator.reset(pose)[0], []
    for k in range(0, HORIZON, 40):
        chunk = simulator.run(state, actions[k : k + 40], record=True)
        state = chunk.state
        pieces.append(chunk.frames[1:])
        other = simulator.reset(pose + np.array([0.01, 0, 0, 0, 0, 0, 0]))[0]
        simulator.run(other, random_commands(k, 20))
    np.testing.assert_array_equal(np.concatenate(pieces), whole.frames[1:])
    np.testing.assert_array_equal(state, whole.state)

    first = simulator.run(simulator.reset(pose)[0], actions, stop_at_success=True)
    assert len(first.success) == whole.success.argmax() + 1 and first.success[-1]


def training_envs(workers, num_envs, seed):
    return TrainingEnvs(workers, [TASK], num_envs, draw_start, HORIZON, seed)


def test_same_trajectories_whatever_the_number_of_workers(workers):
    def trajectory(pool):
        envs = training_envs(pool, 5, seed=4)
        rng = np.random.default_rng(0)
        for _ in range(3):
            envs.step(START_ACTION + rng.normal(0, 0.05, (5, 40, 14)))
        return envs.states

    with Workers(build, [TASK], 1) as one:
        np.testing.assert_array_equal(trajectory(one), trajectory(workers))


def test_training_and_evaluation_states_are_disjoint(workers):
    """Where training episodes really start, the first ones and those after a time limit, and where evaluation
    episodes do."""
    starts = [evaluation_poses(200)[:, :2]]
    for seed in range(3):
        envs = training_envs(workers, 32, seed)
        for _ in range(3):
            starts.append(envs.observations[:, 14:16].copy())  # x and y of the cube
            envs.steps[:] = HORIZON - 1
            assert envs.step(np.tile(START_ACTION, (32, 1, 1)))["truncated"].all()
    starts = np.concatenate(starts)
    apart = np.abs(starts[:, None] - starts[None]).max(2)
    assert apart[~np.eye(len(starts), dtype=bool)].min() > 1e-9  # metres


def test_episode_ends(workers):
    """Horizon truncates, the cube moves to a new place, and the last observation is from before the reset."""
    envs = training_envs(workers, 2, seed=0)
    first = envs.observations[:, 14:16].copy()
    for k in range(HORIZON // 40):
        step = envs.step(np.tile(START_ACTION, (2, 40, 1)))
        assert step["truncated"].all() == (k == HORIZON // 40 - 1)
    np.testing.assert_allclose(step["last_observation"][:, 14:16], first, atol=1e-3)
    assert (np.abs(envs.observations[:, 14:16] - first).max(1) > 1e-3).all()
    assert (envs.steps == 0).all() and not step["success"].any() and not step["terminated"].any()


def test_diverging_physics_fails_the_episode_and_not_the_run(workers):
    envs = training_envs(workers, 3, seed=0)
    actions = np.tile(START_ACTION, (3, 40, 1))
    actions[1] = np.nan
    envs.states[2][24:46] = 1e11  # joint velocities beyond what MuJoCo accepts (it clips commands by itself)
    step = envs.step(actions)
    assert list(step["terminated"]) == [False, True, True] and not step["success"].any()
    assert np.isfinite(step["last_observation"]).all() and np.isfinite(envs.states).all()


def red(image):
    """Where a picture's red pixels are, on average: row, column."""
    image = image.astype(int)
    return np.argwhere((image[..., 0] > 120) & (image[..., 1] < 60) & (image[..., 2] < 60)).mean(0)


def test_rendering_shows_the_cube_where_it_is(workers):
    poses = np.array([[0.0, 0.5, 0.05, 1, 0, 0, 0], [0.2, 0.5, 0.05, 1, 0, 0, 0]])
    states, _ = workers.reset([TASK] * 2, poses)
    chunks = workers.run([TASK] * 2, states, np.tile(START_ACTION, (2, 2, 1)), record=True)
    frames = [chunk.frames[-1:] for chunk in chunks]
    left, right = workers.render([TASK] * 2, frames, camera="top", height=120, width=160)
    assert left.shape == (1, 120, 160, 3)
    assert abs(red(left[0])[1] - red(right[0])[1]) > 15  # 20 cm are many pixels


def test_pictures_and_pose_are_what_gym_shows(simulator, gym_env, monkeypatch):
    """`look`, at the end of a chunk, against gym-aloha's own observation after the same commands, camera and
    all."""
    pose, actions = sample_box_poses(np.random.default_rng(4), 1)[0], random_commands(4, 6)

    def render(height, width, camera_id):
        return gym_env.render_pictures(height=48, width=64, camera_id=camera_id)

    *_, observation = gym_rollout(gym_env, pose, actions[:-1])
    monkeypatch.setattr(gym_env._env.physics, "render", render)
    observation, *_ = gym_env.step(actions[-1])
    chunk = simulator.run(simulator.reset(pose)[0], actions)
    seen = simulator.look(chunk.state, dict(top=(48, 64)))
    np.testing.assert_allclose(seen["agent_pos"], observation["agent_pos"], atol=1e-12)
    ours, theirs = seen["pixels"]["top"].astype(int), observation["pixels"]["top"].astype(int)
    assert theirs.std() > 10 and (np.abs(ours - theirs).max(-1) > 2).mean() < 0.02
