"""ALOHA Transfer Cube: gym-aloha's physics, task and reward, without rendering.

gym-aloha renders three cameras at every step. Here the same MuJoCo model is stepped alone, which is several
hundred times faster; `tests/test_env_aloha.py` compares states and rewards with `gym.make` step by step. An
environment *is* its state vector: `Simulator.run(state, actions)` is a pure function.

    if __name__ == "__main__":                             # the workers import the script that starts them
        with Workers(build, [TASK], num_workers=2) as workers:     # envs/workers.py
            starts = sample_box_poses(np.random.default_rng(0), 8)
            states, observations = workers.reset([TASK] * 8, starts)
            chunks = workers.run([TASK] * 8, states, START_ACTION[None, None].repeat(8, 0).repeat(40, 1))
            print(chunks[0].success, chunks[0].observation)

Observation (21): joint positions as gym-aloha reports them (14: six angles in rad and the gripper in 0 … 1,
left arm first), the cube's position (3, metres) and quaternion (4). Action (14): the joint targets in the
same order.
"""

import numpy as np

from envs.physics import get_state, has_diverged, opengl_problem, picture, set_state, silence  # before mujoco
from envs.workers import Chunk
import mujoco
from gym_aloha.constants import ASSETS_DIR, DT, START_ARM_POSE
from gym_aloha.constants import PUPPET_GRIPPER_POSITION_CLOSE, PUPPET_GRIPPER_POSITION_OPEN

TASK = 0  # the only one
HORIZON = 400  # control steps an episode, 8 s; the usual horizon of this task (ACT, lerobot)
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
    """n cube poses from gym-aloha's own distribution, out of a seeded generator. -> (n, 7): position,
    quaternion."""
    position = rng.uniform([0.0, 0.4, 0.05], [0.2, 0.6, 0.05], size=(n, 3))
    return np.concatenate([position, np.tile([1.0, 0.0, 0.0, 0.0], (n, 1))], -1)


def evaluation_poses(n):
    """The first n cube poses of evaluation, always the same. -> (n, 7). Training draws from [1, seed, env],
    demonstrations from [2, …]."""
    return sample_box_poses(np.random.default_rng([0, 0]), n)


class Simulator:
    """gym-aloha's Transfer Cube model and one MuJoCo data structure, through which all states pass."""

    def __init__(self):
        self.model = mujoco.MjModel.from_xml_path(str(ASSETS_DIR / "bimanual_viperx_transfer_cube.xml"))
        self.data = mujoco.MjData(self.model)
        self.substeps = round(DT / self.model.opt.timestep)
        fingers = [f"vx300s_{side}/10_{side}_gripper_finger" for side in ("left", "right")]
        geoms = (self.model.geom(name).id for name in ("red_box", "table", *fingers))
        self.box, self.table, self.left, self.right = geoms
        self.renderers = {}

    def reset(self, box_pose):
        """State and observation of an episode's start, as dm_control's reset leaves them. box_pose: (7,)."""
        model, data = self.model, self.data
        # dm_control's order, in which the solver's warm start is what gym-aloha's is, to the last bit: a
        # forward in the model's own pose, then one by the task's reset and one by the environment's around it
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
        joints = np.array(actions, dtype=np.float64)
        joints[:, [6, 13]] = PUPPET_GRIPPER_POSITION_CLOSE + GRIPPER_RANGE * joints[:, [6, 13]]
        controls = np.empty((len(joints), 16))
        controls[:, ARM_QPOS] = joints
        controls[:, [7, 15]] = -joints[:, [6, 13]]
        return controls

    def run(self, state, actions, stop_at_success=False, record=False):
        """Execute `actions` (T, 14) from `state`; stop early at success (reward 4) if asked, or where the
        physics diverges. -> Chunk, whose frames are positions (T + 1, 23)."""
        model, data = self.model, self.data
        set_state(model, data, state)
        mujoco.mj_step1(model, data)
        success, frames = [], [data.qpos.copy()]
        diverged = not np.isfinite(actions).all()
        for u in self.controls(actions) if not diverged else ():
            data.ctrl[:] = u
            # dm_control's order: the second half of a step, whole steps, and the first half of the next one,
            # so that contacts belong to the new positions.
            mujoco.mj_step2(model, data)
            mujoco.mj_step(model, data, self.substeps - 1)
            mujoco.mj_step1(model, data)
            if has_diverged(data):
                diverged = True
                break
            success.append(self.reward() == 4)
            if record:
                frames.append(data.qpos.copy())
            if stop_at_success and success[-1]:
                break
        if diverged:  # the state before the chunk stands in; the caller ends the episode
            set_state(model, data, state)
        frames, success = np.array(frames) if record else None, np.array(success, dtype=bool)
        return Chunk(get_state(model, data), observe(data.qpos), success, diverged, frames)

    def render(self, frames, camera="angle", height=240, width=320):
        """Pictures of recorded positions. (T, 23) -> (T, height, width, 3) uint8. Needs OpenGL."""
        pictures = []
        for qpos in frames:
            self.data.qpos[:] = qpos
            mujoco.mj_forward(self.model, self.data)
            pictures.append(picture(self, camera, height, width))
        return np.array(pictures)

    def look(self, state, sizes):
        """What a vision-language-action model sees in a state: the dict that gym-aloha returns, a pure
        function of `state`.

        sizes: {camera: (height, width)} with gym-aloha's cameras, "top" above all. -> pixels {camera:
        (height, width, 3) uint8}, agent_pos (14,) and the task's instruction.
        """
        set_state(self.model, self.data, state)
        mujoco.mj_forward(self.model, self.data)
        pixels = {name: picture(self, name, *size) for name, size in sizes.items()}
        return dict(pixels=pixels, agent_pos=observe(self.data.qpos)[:ACTION_DIM], task=INSTRUCTION)

    def reward(self):
        """gym-aloha's stage 0 … 4, of the present contacts; 4 is success: the left finger has the cube, off
        the table."""
        # gym_aloha/tasks/sim.py, TransferCubeTask.get_reward, on geom numbers instead of names
        pairs = self.data.contact.geom
        touched = pairs[pairs[:, 0] == self.box, 1]
        left, right, table = (geom in touched for geom in (self.left, self.right, self.table))
        if left:
            return 3 if table else 4
        return 0 if not right else 1 if table else 2


def build(tasks):
    """{task: Simulator} of one worker process (envs/workers.py)."""
    silence()
    return {k: Simulator() for k in tasks}


def draw_start(rng):
    """The start of a training episode: a cube pose (7,)."""
    return sample_box_poses(rng, 1)[0]


if __name__ == "__main__":  # a quick look: does the simulator run here, and how fast?
    import time

    simulator = Simulator()
    state, observation = simulator.reset(sample_box_poses(np.random.default_rng(0), 1)[0])
    start = time.perf_counter()
    chunk = simulator.run(state, np.tile(START_ACTION, (HORIZON, 1)))
    speed = HORIZON / (time.perf_counter() - start)
    print(f"one process: {speed:.0f} control steps/s, cube at {chunk.observation[14:17].round(3)}")
    print("pictures:", opengl_problem() or "available")
