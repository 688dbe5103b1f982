"""ALOHA Transfer Cube: gym-aloha's physics, task and reward, without rendering, in worker processes.

gym-aloha renders three cameras at every step. Here the same MuJoCo model is stepped alone, which is several
hundred times faster; `tests/test_env_aloha.py` compares states and rewards with `gym.make` step by step.

An environment *is* its state vector: `Simulator.run(state, actions)` is a pure function, and the workers keep
nothing between calls. So results do not depend on the number of workers, a checkpoint is a copy of the state
vectors, and a worker that dies is replaced and its work done again.

    with Workers(num_workers=2) as workers:
        states, observations = workers.reset(sample_box_poses(np.random.default_rng(0), 8))
        chunks = workers.run(states, np.repeat(START_ACTION[None, None], 8, 0).repeat(40, 1))
        print(chunks[0].rewards, chunks[0].observation)

Observation (21): joint positions as gym-aloha reports them (14: six angles in rad and the gripper in 0 … 1, left
arm first), the cube's position (3, metres) and quaternion (4). Action (14): the joint targets in the same order.
"""

import ctypes.util
import os
import platform
from dataclasses import dataclass

import numpy as np

# MuJoCo picks its OpenGL library on import. Physics needs none, so a machine without EGL trains all the same.
if platform.system() == "Linux" and "MUJOCO_GL" not in os.environ:
    os.environ["MUJOCO_GL"] = "egl" if ctypes.util.find_library("EGL") else "disable"

import mujoco
from gym_aloha.constants import (
    ASSETS_DIR,
    DT,
    PUPPET_GRIPPER_POSITION_CLOSE,
    PUPPET_GRIPPER_POSITION_OPEN,
    START_ARM_POSE,
)

from worker_pool import WorkerPool

HORIZON = 400  # control steps an episode, 8 s; the usual horizon of this task (ACT, lerobot)
HOLD_STEPS = 10  # strict success: the left gripper alone holds the cube for so many consecutive steps
OBSERVATION_DIM, ACTION_DIM = 21, 14
FPS = round(1 / DT)  # 50 control steps a second

GRIPPER_RANGE = PUPPET_GRIPPER_POSITION_OPEN - PUPPET_GRIPPER_POSITION_CLOSE
ARM_QPOS = np.r_[0:7, 8:15]  # qpos has two finger joints an arm; the second mirrors the first
STATE_SPEC = int(
    mujoco.mjtState.mjSTATE_TIME
    | mujoco.mjtState.mjSTATE_QPOS
    | mujoco.mjtState.mjSTATE_QVEL
    | mujoco.mjtState.mjSTATE_WARMSTART  # without the solver's warm start a resumed run drifts in the last bits
)
DIVERGED = [int(w) for w in (mujoco.mjtWarning.mjWARN_BADQPOS, mujoco.mjtWarning.mjWARN_BADQVEL, mujoco.mjtWarning.mjWARN_BADQACC)]


def observe(qpos):
    """Observation of raw MuJoCo positions. qpos: (..., 23) -> (..., 21)."""
    joints = qpos[..., ARM_QPOS].copy()
    joints[..., [6, 13]] = (joints[..., [6, 13]] - PUPPET_GRIPPER_POSITION_CLOSE) / GRIPPER_RANGE
    return np.concatenate([joints, qpos[..., 16:]], -1)


START_ACTION = observe(np.concatenate([START_ARM_POSE, np.zeros(7)]))[:ACTION_DIM]  # holds the start pose


def sample_box_poses(rng, n):
    """n cube poses from gym-aloha's own distribution, out of a seeded generator. -> (n, 7): position, quaternion."""
    position = rng.uniform([0.0, 0.4, 0.05], [0.2, 0.6, 0.05], size=(n, 3))
    return np.concatenate([position, np.tile([1.0, 0.0, 0.0, 0.0], (n, 1))], -1)


def strict_success(held):
    """Whether `held` (T,) has HOLD_STEPS consecutive true entries."""
    run = 0
    for h in held:
        run = run + 1 if h else 0
        if run >= HOLD_STEPS:
            return True
    return False


@dataclass
class Chunk:
    """What one call of `Simulator.run` did. T is the number of control steps really executed."""

    state: np.ndarray  # (S,) simulator state after the last step
    observation: np.ndarray  # (21,) after the last step
    rewards: np.ndarray  # (T,) gym-aloha's stages 0-4 after each step; 4 is success
    held: np.ndarray  # (T,) the left finger touches the cube; the right one and the table do not
    diverged: bool  # MuJoCo found a non-finite or absurd state: the episode has failed
    qpos: np.ndarray | None  # (T + 1, 23) with record=True: before the first and after every step


class Simulator:
    """gym-aloha's Transfer Cube model and one MuJoCo data structure, through which any number of states pass."""

    def __init__(self):
        self.model = mujoco.MjModel.from_xml_path(str(ASSETS_DIR / "bimanual_viperx_transfer_cube.xml"))
        self.data = mujoco.MjData(self.model)
        self.substeps = round(DT / self.model.opt.timestep)
        self.state_dim = mujoco.mj_stateSize(self.model, STATE_SPEC)
        geom = {name: self.model.geom(name).id for name in ("red_box", "table")}
        fingers = {side: self.model.geom(f"vx300s_{side}/10_{side}_gripper_finger").id for side in ("left", "right")}
        self.box, self.table, self.left, self.right = geom["red_box"], geom["table"], fingers["left"], fingers["right"]
        self.renderers = {}

    def reset(self, box_pose):
        """State and observation of an episode's start, as dm_control's reset leaves them. box_pose: (7,)."""
        model, data = self.model, self.data
        mujoco.mj_resetData(model, data)
        data.qpos[:16] = data.ctrl[:] = START_ARM_POSE
        data.qpos[16:] = box_pose
        enabled = model.opt.disableflags
        model.opt.disableflags |= int(mujoco.mjtDisableBit.mjDSBL_ACTUATION)
        mujoco.mj_forward(model, data)
        model.opt.disableflags = enabled
        return self._get_state(), observe(data.qpos)

    def run(self, state, actions, stop_at_success=False, record=False):
        """Execute `actions` (T, 14) from `state`; stop early at reward 4 if asked, or where the physics diverges."""
        model, data = self.model, self.data
        mujoco.mj_resetData(model, data)  # clears the warnings too
        mujoco.mj_setState(model, data, state, STATE_SPEC)
        mujoco.mj_step1(model, data)
        actions = np.asarray(actions, dtype=np.float64)
        grippers = PUPPET_GRIPPER_POSITION_CLOSE + GRIPPER_RANGE * actions[:, [6, 13]]
        ctrl = np.concatenate(
            [actions[:, :6], grippers[:, :1], -grippers[:, :1], actions[:, 7:13], grippers[:, 1:], -grippers[:, 1:]], 1
        )
        rewards, held, qpos = [], [], [data.qpos.copy()]
        diverged = not np.isfinite(actions).all()
        for u in ctrl if not diverged else ():
            data.ctrl[:] = u
            # dm_control's order: the second half of a step, whole steps, and the first half of the next one, so
            # that contacts belong to the new positions.
            mujoco.mj_step2(model, data)
            mujoco.mj_step(model, data, self.substeps - 1)
            mujoco.mj_step1(model, data)
            if any(data.warning[w].number for w in DIVERGED):
                diverged = True
                break
            reward, hold = self._reward()
            rewards.append(reward)
            held.append(hold)
            if record:
                qpos.append(data.qpos.copy())
            if stop_at_success and reward == 4:
                break
        if diverged:  # the last finite state stands in; the caller ends the episode
            mujoco.mj_resetData(model, data)
            mujoco.mj_setState(model, data, state, STATE_SPEC)
        return Chunk(
            state=self._get_state(),
            observation=observe(data.qpos),
            rewards=np.array(rewards, dtype=np.int64),
            held=np.array(held, dtype=bool),
            diverged=diverged,
            qpos=np.array(qpos) if record else None,
        )

    def render(self, qpos, camera="angle", height=240, width=320):
        """Frames of recorded positions. qpos: (T, 23) -> (T, height, width, 3) uint8. Needs EGL (or another GL)."""
        if (height, width) not in self.renderers:
            self.renderers[height, width] = mujoco.Renderer(self.model, height, width)
        renderer, frames = self.renderers[height, width], []
        for q in qpos:
            self.data.qpos[:] = q
            mujoco.mj_forward(self.model, self.data)
            renderer.update_scene(self.data, camera=camera)
            frames.append(renderer.render())
        return np.array(frames)

    def _get_state(self):
        state = np.empty(self.state_dim)
        mujoco.mj_getState(self.model, self.data, state, STATE_SPEC)
        return state

    def _reward(self):
        # gym_aloha/tasks/sim.py, TransferCubeTask.get_reward, on geom numbers instead of names
        pairs = self.data.contact.geom
        touched = pairs[pairs[:, 0] == self.box, 1]
        left, right, table = (touched == self.left).any(), (touched == self.right).any(), (touched == self.table).any()
        if left:
            return (3 if table else 4), not (table or right)
        return (0 if not right else 1 if table else 2), False


def rendering_available():
    """Whether MuJoCo was imported with an OpenGL library."""
    return hasattr(mujoco, "Renderer") and os.environ.get("MUJOCO_GL") != "disable"


# ---- worker processes -------------------------------------------------------------------------------------------


def _quiet_simulator():
    mujoco.set_mju_user_warning(lambda text: None)  # `diverged` says it; MuJoCo would write MUJOCO_LOG.TXT where it stands
    return Simulator()


def lost_chunk(state, record):
    """What stands for a chunk whose simulator died: no step, and the episode has failed."""
    return Chunk(
        state=state,
        observation=np.zeros(OBSERVATION_DIM),
        rewards=np.zeros(0, dtype=np.int64),
        held=np.zeros(0, dtype=bool),
        diverged=True,
        qpos=np.zeros((1, 23)) if record else None,
    )


class Workers:
    """Simulator processes (worker_pool.py): a job that cannot be done comes back as a diverged chunk."""

    def __init__(self, num_workers):
        self.pool = WorkerPool(num_workers, _quiet_simulator)

    def reset(self, box_poses):
        """Start episodes. box_poses: (n, 7) -> states (n, S), observations (n, 21)."""
        states, observations = zip(*self.pool.map(Simulator.reset, list(box_poses)))
        return np.stack(states), np.stack(observations)

    def run(self, states, actions, stop_at_success=False, record=False):
        """`Simulator.run` for every row. states: (n, S), actions: (n, T, 14) -> list of n `Chunk`."""
        n = len(states)
        chunks = self.pool.map(Simulator.run, list(states), list(actions), [stop_at_success] * n, [record] * n)
        return [lost_chunk(state, record) if c is None else c for state, c in zip(states, chunks)]

    def render(self, qpos, camera="angle", height=240, width=320):
        """Frames for a list of recorded episodes, in parallel."""
        n = len(qpos)
        return self.pool.map(Simulator.render, qpos, [camera] * n, [height] * n, [width] * n)

    def close(self):
        """Stop the processes at once."""
        self.pool.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def play_episodes(workers, box_poses, act, record=False):
    """Play one whole episode from every cube pose, for evaluation. box_poses: (n, 7).

    act(observations (n, 21)) -> actions (n, T, 14) is asked for all n episodes at every decision, ended or not, so that the
    random draws of one episode do not depend on how another goes. Returns a dict of arrays (n,): success (official), strict,
    length (control steps to the first success, or HORIZON), diverged, decisions; and qpos, a list of (steps, 23) with record=True.
    """
    n = len(box_poses)
    states, observations = workers.reset(box_poses)
    success, diverged = np.zeros(n, bool), np.zeros(n, bool)
    length, steps, decisions = np.full(n, HORIZON), np.zeros(n, int), np.zeros(n, int)
    held, qpos = [[] for _ in range(n)], [[] for _ in range(n)]
    alive = np.arange(n)
    while len(alive):
        actions = act(observations)
        chunks = workers.run(states[alive], [actions[i, : HORIZON - steps[i]] for i in alive], record=record)
        for i, chunk in zip(alive, chunks):
            reached = np.flatnonzero(chunk.rewards == 4)
            if len(reached) and not success[i]:
                success[i], length[i] = True, steps[i] + reached[0] + 1
            held[i].extend(chunk.held)
            diverged[i] = chunk.diverged
            states[i], observations[i] = chunk.state, chunk.observation
            steps[i] += len(chunk.rewards)
            decisions[i] += 1
            if record:
                qpos[i].append(chunk.qpos[1:])
        # D9: an episode plays its full length; but once it has held the cube, nothing can change its result any more
        alive = np.array([i for i in alive if steps[i] < HORIZON and not diverged[i] and not strict_success(held[i])], int)
    strict = np.array([strict_success(h) for h in held])
    qpos = [np.concatenate(q) for q in qpos] if record else None
    return dict(success=success, strict=strict, length=length, diverged=diverged, decisions=decisions, qpos=qpos)


class TrainingEnvs:
    """Environments that start a new episode where one ends, for the rollout phase of Algorithm 1.

    Each has its own generator of cube poses, seeded by (seed, index): the sequence of its episodes depends neither
    on the other environments nor on the number of workers.
    """

    def __init__(self, workers, num_envs, seed):
        self.workers = workers
        # the leading 1 keeps training apart from evaluation (0) and demonstrations (2), whatever the seed
        self.rngs = [np.random.default_rng([1, seed, i]) for i in range(num_envs)]
        self.states, self.observations = workers.reset(np.concatenate([sample_box_poses(r, 1) for r in self.rngs]))
        self.steps = np.zeros(num_envs, dtype=np.int64)  # control steps of the running episode
        self.decisions = np.zeros(num_envs, dtype=np.int64)  # chunks of the running episode
        self.episodes = np.zeros(num_envs, dtype=np.int64)  # episodes ended so far

    def step(self, actions):
        """Execute one chunk in every environment. actions: (n, T, 14), joint targets.

        Returns a dict of arrays: success (n,) reached in this chunk, num_steps (n,) really executed, terminated (n,)
        by success or by diverged physics, truncated (n,) at HORIZON, last_observation (n, 21) before any reset,
        episode_steps (n,) so far. `self.observations` is where the next decision starts.
        """
        within_horizon = [a[: HORIZON - t] for a, t in zip(actions, self.steps)]
        chunks = self.workers.run(self.states, within_horizon, stop_at_success=True)
        num_steps = np.array([len(c.rewards) for c in chunks])
        success = np.array([bool((c.rewards == 4).any()) for c in chunks])
        diverged = np.array([c.diverged for c in chunks])
        self.steps += num_steps
        self.decisions += 1
        terminated = success | diverged
        truncated = ~terminated & (self.steps >= HORIZON)
        result = dict(
            success=success,
            num_steps=num_steps,
            terminated=terminated,
            truncated=truncated,
            last_observation=np.stack([c.observation for c in chunks]),
            episode_steps=self.steps.copy(),
        )
        self.states = np.stack([c.state for c in chunks])
        self.observations = result["last_observation"].copy()
        ended = np.flatnonzero(terminated | truncated)
        if len(ended):
            poses = np.concatenate([sample_box_poses(self.rngs[i], 1) for i in ended])
            self.states[ended], self.observations[ended] = self.workers.reset(poses)
            self.steps[ended] = self.decisions[ended] = 0
            self.episodes[ended] += 1
        return result

    def state_dict(self):
        """Everything that decides how the environments go on, as plain values and arrays."""
        return dict(
            states=self.states, observations=self.observations, steps=self.steps, decisions=self.decisions,
            episodes=self.episodes, rngs=[rng.bit_generator.state for rng in self.rngs],
        )  # fmt: skip

    def load_state_dict(self, state):
        """Go on where `state_dict` was taken."""
        for name in ("states", "observations", "steps", "decisions", "episodes"):
            setattr(self, name, np.array(state[name]))
        for rng, rng_state in zip(self.rngs, state["rngs"]):
            rng.bit_generator.state = rng_state


if __name__ == "__main__":  # a quick look: does the simulator run here, and how fast?
    import time

    simulator = Simulator()
    state, observation = simulator.reset(sample_box_poses(np.random.default_rng(0), 1)[0])
    start = time.perf_counter()
    chunk = simulator.run(state, np.tile(START_ACTION, (HORIZON, 1)))
    print(f"one process: {HORIZON / (time.perf_counter() - start):.0f} control steps/s, cube at {chunk.observation[14:17].round(3)}")
    print("rendering:", "available" if rendering_available() else "not available (no EGL)")
