"""ALOHA Transfer Cube: gym-aloha's physics, task and reward, without rendering, in worker processes.

gym-aloha renders three cameras at every step. Here the same MuJoCo model is stepped alone, which is several
hundred times faster; `tests/test_env_aloha.py` compares states and rewards with `gym.make` step by step.

An environment *is* its state vector: `Simulator.run(state, actions)` is a pure function, and the workers keep
nothing between calls. So results do not depend on the number of workers, a checkpoint is a copy of the state
vectors, and a worker that dies is replaced and its work done again.

    if __name__ == "__main__":      # the workers import the script that starts them
        with Workers(num_workers=2) as workers:
            states, observations = workers.reset(sample_box_poses(np.random.default_rng(0), 8))
            chunks = workers.run(states, np.repeat(START_ACTION[None, None], 8, 0).repeat(40, 1))
            print(chunks[0].rewards, chunks[0].observation)

Observation (21): joint positions as gym-aloha reports them (14: six angles in rad and the gripper in 0 … 1, left
arm first), the cube's position (3, metres) and quaternion (4). Action (14): the joint targets in the same order.
"""

from dataclasses import dataclass

import numpy as np

from mujoco_state import diverged as has_diverged, get_state, opengl_problem, set_state, silence, stack  # before mujoco
import mujoco
from gym_aloha.constants import (
    ASSETS_DIR,
    DT,
    PUPPET_GRIPPER_POSITION_CLOSE,
    PUPPET_GRIPPER_POSITION_OPEN,
    START_ARM_POSE,
)

from worker_pool import WORKER_TIMEOUT, WorkerPool, progress

HORIZON = 400  # control steps an episode, 8 s; the usual horizon of this task (ACT, lerobot)
HOLD_STEPS = 10  # strict success: the left gripper alone holds the cube for so many consecutive steps
OBSERVATION_DIM, ACTION_DIM = 21, 14
FPS = round(1 / DT)  # 50 control steps a second
INSTRUCTION = "Transfer cube"  # openpi's prompt for this task; gym-aloha has none

GRIPPER_RANGE = PUPPET_GRIPPER_POSITION_OPEN - PUPPET_GRIPPER_POSITION_CLOSE
ARM_QPOS = np.r_[0:7, 8:15]  # qpos has two finger joints an arm; the second mirrors the first


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


def evaluation_poses(n):
    """The first n cube poses of evaluation, always the same. -> (n, 7). Training draws from [1, seed, env], demonstrations from [2, …]."""
    return sample_box_poses(np.random.default_rng([0, 0]), n)


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

    state: np.ndarray  # (S,) simulator state after the last step; before the first if diverged
    observation: np.ndarray  # (21,) in that state
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
        geom = {name: self.model.geom(name).id for name in ("red_box", "table")}
        fingers = {side: self.model.geom(f"vx300s_{side}/10_{side}_gripper_finger").id for side in ("left", "right")}
        self.box, self.table, self.left, self.right = geom["red_box"], geom["table"], fingers["left"], fingers["right"]
        self.renderers = {}

    def reset(self, box_pose):
        """State and observation of an episode's start, as dm_control's reset leaves them. box_pose: (7,)."""
        model, data = self.model, self.data
        # dm_control's order, in which the solver's warm start is what gym-aloha's is, to the last bit: a forward in the model's own
        # pose, then one by the task's reset and one by the environment's around it
        flags = model.opt.disableflags
        model.opt.disableflags |= int(mujoco.mjtDisableBit.mjDSBL_ACTUATION)
        mujoco.mj_resetData(model, data)
        mujoco.mj_forward(model, data)
        data.qpos[:16] = data.ctrl[:] = START_ARM_POSE
        data.qpos[16:] = box_pose
        mujoco.mj_forward(model, data)
        mujoco.mj_forward(model, data)
        model.opt.disableflags = flags
        return get_state(self.model, self.data), observe(data.qpos)

    @staticmethod
    def controls(actions):
        """MuJoCo's commands of actions: each arm's six joints, then its two fingers. (T, 14) -> (T, 16)."""
        actions = np.asarray(actions, dtype=np.float64)
        grippers = PUPPET_GRIPPER_POSITION_CLOSE + GRIPPER_RANGE * actions[:, [6, 13]]
        return np.concatenate(
            [actions[:, :6], grippers[:, :1], -grippers[:, :1], actions[:, 7:13], grippers[:, 1:], -grippers[:, 1:]], 1
        )

    def run(self, state, actions, stop_at_success=False, record=False):
        """Execute `actions` (T, 14) from `state`; stop early at reward 4 if asked, or where the physics diverges."""
        model, data = self.model, self.data
        set_state(model, data, state)
        mujoco.mj_step1(model, data)
        rewards, held, qpos = [], [], [data.qpos.copy()]
        diverged = not np.isfinite(actions).all()
        for u in self.controls(actions) if not diverged else ():
            data.ctrl[:] = u
            # dm_control's order: the second half of a step, whole steps, and the first half of the next one, so
            # that contacts belong to the new positions.
            mujoco.mj_step2(model, data)
            mujoco.mj_step(model, data, self.substeps - 1)
            mujoco.mj_step1(model, data)
            if has_diverged(data):
                diverged = True
                break
            reward, hold = self._reward()
            rewards.append(reward)
            held.append(hold)
            if record:
                qpos.append(data.qpos.copy())
            if stop_at_success and reward == 4:
                break
        if diverged:  # the state before the chunk stands in; the caller ends the episode
            set_state(model, data, state)
        return Chunk(
            state=get_state(self.model, self.data),
            observation=observe(data.qpos),
            rewards=np.array(rewards, dtype=np.int64),
            held=np.array(held, dtype=bool),
            diverged=diverged,
            qpos=np.array(qpos) if record else None,
        )

    def render(self, qpos, camera="angle", height=240, width=320):
        """Frames of recorded positions. qpos: (T, 23) -> (T, height, width, 3) uint8. Needs EGL (or another GL)."""
        frames = []
        for q in qpos:
            self.data.qpos[:] = q
            mujoco.mj_forward(self.model, self.data)
            frames.append(self._picture(camera, height, width))
        return np.array(frames)

    def look(self, state, sizes):
        """What a vision-language-action model sees in a state: the dict that gym-aloha returns, a pure function of `state`.

        sizes: {camera: (height, width)} with gym-aloha's cameras, "top" above all. -> pixels {camera: (height, width, 3) uint8},
        agent_pos (14,) and the task's instruction.
        """
        set_state(self.model, self.data, state)
        mujoco.mj_forward(self.model, self.data)
        pixels = {name: self._picture(name, *size) for name, size in sizes.items()}
        return dict(pixels=pixels, agent_pos=observe(self.data.qpos)[:ACTION_DIM], task=INSTRUCTION)

    def _picture(self, camera, height, width):
        if (height, width) not in self.renderers:
            self.renderers[height, width] = mujoco.Renderer(self.model, height, width)
        self.renderers[height, width].update_scene(self.data, camera=camera)
        return self.renderers[height, width].render()

    def _reward(self):
        # gym_aloha/tasks/sim.py, TransferCubeTask.get_reward, on geom numbers instead of names
        pairs = self.data.contact.geom
        touched = pairs[pairs[:, 0] == self.box, 1]
        left, right, table = (touched == self.left).any(), (touched == self.right).any(), (touched == self.table).any()
        if left:
            return (3 if table else 4), not (table or right)
        return (0 if not right else 1 if table else 2), False


# ---- worker processes -------------------------------------------------------------------------------------------


def _quiet_simulator():
    silence()
    return Simulator()


def _reset(simulator, box_pose, sizes):
    state, observation = simulator.reset(box_pose)
    return state, simulator.look(state, sizes) if sizes else observation


def _run(simulator, state, actions, stop_at_success, record, sizes):
    chunk = simulator.run(state, actions, stop_at_success, record)
    if sizes:
        chunk.observation = simulator.look(chunk.state, sizes)
    return chunk


class Workers:
    """Simulator processes (worker_pool.py): a chunk that cannot be executed comes back as a diverged one.

    With `pictures`, {camera: (height, width)}, observations are what `Simulator.look` sees at the end of a chunk, an object array
    of dicts, instead of state vectors. There None stands for an episode that is over or was lost.
    """

    def __init__(self, num_workers, pictures=None, timeout=WORKER_TIMEOUT):
        self.pictures = pictures
        self.pool = WorkerPool(num_workers, _quiet_simulator, timeout=timeout)

    def reset(self, box_poses, description=None):
        """Start episodes. box_poses: (n, 7); description: of a progress bar -> states (n, S), n observations."""
        columns = list(box_poses), [self.pictures] * len(box_poses)
        states, observations = zip(*self.pool.map(_reset, *columns, description=description))
        return np.stack(states), stack(observations, self.pictures)

    def run(self, states, actions, stop_at_success=False, record=False):
        """`Simulator.run` for every row. states: (n, S), actions: n arrays (T, 14) -> list of n `Chunk`."""
        n = len(states)
        same = [[stop_at_success] * n, [record] * n, [self.pictures] * n]
        chunks = self.pool.map(_run, list(states), list(actions), *same, may_lose=True)
        return [self._lost(state) if c is None else c for state, c in zip(states, chunks)]

    def look(self, states):
        """The observations in n states, with pictures."""
        return stack(self.pool.map(Simulator.look, list(states), [self.pictures] * len(states)), self.pictures)

    def _lost(self, state):
        """What stands for a chunk whose simulator died: no step, and the episode has failed."""
        return Chunk(
            state=state,
            observation=None if self.pictures else np.zeros(OBSERVATION_DIM),
            rewards=np.zeros(0, dtype=np.int64),
            held=np.zeros(0, dtype=bool),
            diverged=True,
            qpos=None,
        )

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
    length (control steps to the first success, or HORIZON), diverged, decisions; and qpos, a list of (steps + 1, 23) with record=True.
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
            if chunk.qpos is not None:
                qpos[i].extend(chunk.qpos[len(qpos[i]) > 0 :])  # its first row is where the chunk before ended
        # D9: an episode plays its full length; but once it has held the cube, nothing can change its result any more
        alive = np.array([i for i in alive if steps[i] < HORIZON and not diverged[i] and not strict_success(held[i])], int)
        if workers.pictures:
            observations[np.setdiff1d(range(n), alive)] = None  # nothing to look at, and nothing to decode
    strict = np.array([strict_success(h) for h in held])
    qpos = [np.array(q) for q in qpos] if record else None
    return dict(success=success, strict=strict, length=length, diverged=diverged, decisions=decisions, qpos=qpos)


class TrainingEnvs:
    """Environments that start a new episode where one ends, for the rollout phase of Algorithm 1.

    Each has its own generator of cube poses, seeded by (seed, index): the sequence of its episodes depends neither
    on the other environments nor on the number of workers.
    """

    def __init__(self, workers, num_envs, seed, own=slice(None)):
        self.workers, self.indices = workers, range(num_envs)[own]  # own: those of them that are played here
        # the leading 1 keeps training apart from evaluation (0) and demonstrations (2), whatever the seed
        bar = progress(self.indices, description="seed environments")
        self.rngs = [np.random.default_rng([1, seed, i]) for i in bar]
        n = len(self.indices)
        poses = np.concatenate([sample_box_poses(r, 1) for r in self.rngs])
        self.states, self.observations = workers.reset(poses, "start environments")
        self.steps = np.zeros(n, dtype=np.int64)  # control steps of the running episode

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
        terminated = success | diverged
        truncated = ~terminated & (self.steps >= HORIZON)
        result = dict(
            success=success,
            num_steps=num_steps,
            terminated=terminated,
            truncated=truncated,
            last_observation=stack([c.observation for c in chunks], self.workers.pictures),
            episode_steps=self.steps.copy(),
        )
        self.states = np.stack([c.state for c in chunks])
        self.observations = result["last_observation"].copy()
        ended = np.flatnonzero(terminated | truncated)
        if len(ended):
            poses = np.concatenate([sample_box_poses(self.rngs[i], 1) for i in ended])
            self.states[ended], self.observations[ended] = self.workers.reset(poses)
            self.steps[ended] = 0
        return result

    def state_dict(self):
        """Everything that decides how the environments go on, as plain values and arrays. Pictures are not kept: states tell them."""
        return dict(
            states=self.states, observations=None if self.workers.pictures else self.observations, steps=self.steps,
            rngs=[rng.bit_generator.state for rng in self.rngs],
        )  # fmt: skip

    def load_state_dict(self, state):
        """Go on where `state_dict` was taken, of all environments from 0 on."""
        for name in ("states", "steps"):
            setattr(self, name, np.array(state[name])[self.indices])
        pictures = self.workers.pictures
        self.observations = self.workers.look(self.states) if pictures else np.array(state["observations"])[self.indices]
        for i, rng in zip(self.indices, self.rngs):
            rng.bit_generator.state = state["rngs"][i]


if __name__ == "__main__":  # a quick look: does the simulator run here, and how fast?
    import time

    simulator = Simulator()
    state, observation = simulator.reset(sample_box_poses(np.random.default_rng(0), 1)[0])
    start = time.perf_counter()
    chunk = simulator.run(state, np.tile(START_ACTION, (HORIZON, 1)))
    print(f"one process: {HORIZON / (time.perf_counter() - start):.0f} control steps/s, cube at {chunk.observation[14:17].round(3)}")
    print("pictures:", opengl_problem() or "available")
