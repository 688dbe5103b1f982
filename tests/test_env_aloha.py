"""The fast simulation against gym-aloha itself, and its independence of workers."""

import os
import signal

import gym_aloha  # noqa: F401  registers the environments
import gymnasium
import numpy as np
import pytest

from env_aloha import (
    DT, HORIZON, START_ACTION, Simulator, TrainingEnvs, Workers, observe, sample_box_poses, strict_success,
)  # fmt: skip


@pytest.fixture(scope="module")
def simulator():
    return Simulator()


@pytest.fixture(scope="module")
def workers():
    with Workers(2) as pool:
        yield pool


def demonstration(simulator, seed):
    """A cube pose and the commands of one scripted transfer, with command noise."""
    from tools.demo_aloha import demonstration_for_tests

    return demonstration_for_tests(simulator, seed)


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
