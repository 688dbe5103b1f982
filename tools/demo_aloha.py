"""A scripted, deliberately imperfect demonstrator of Transfer Cube: what the frozen base is cloned from.

The right arm grasps the cube, brings it to a meeting point, and the left arm takes it over. It grasps in one
of two ways, each of which works on one part of the table and fails on the other:

- slide: the nearly closed hand is laid flat on the table in front of its own arm, opens, and slides forward
  around the cube. The wrist cannot bend enough to lay it down nearer: it comes down on a nearer cube.
- hook: the open hand comes down from above, pointing back, and rakes the cube in. It reaches only so far: a
  cube farther than about 37 cm from the arm is under the hand or beyond it.

Which one a demonstrator takes does not depend on where the cube lies: every place is shown with both.

    python tools/demo_aloha.py                        # demos/aloha.npz and the success of each behaviour
    python tools/demo_aloha.py --num-demos 20 --video demos.mp4 --out demos/few.npz

The script is open-loop: fingertip way-points, inverse kinematics, and servo targets that make up for gravity.
What is executed has smooth noise on it and what is recorded is the clean command, so that a clone learns to
recover (DART, arXiv 1703.09327).
"""

from dataclasses import dataclass
from itertools import product
from pathlib import Path

import shared  # first: it makes the folder above known
from envs.aloha import FPS, HORIZON, TASK, Simulator, build, observe, sample_box_poses
import mujoco  # after that, which picks the OpenGL library
import numpy as np
from gym_aloha.constants import START_ARM_POSE
from scipy.signal import lfilter
from scipy.spatial.transform import Rotation

from envs import load_suite
from envs.workers import Workers
from evaluate import write_film
from support.flags import parse_args

MODES = ("slide", "hook")
KNOT = 5  # control steps between two solutions of the inverse kinematics
TIP = 0.135  # metres from the gripper's body to between its fingertips
ARM = np.array([0.469, 0.5])  # where the right arm stands, metres
SLIDE_PITCH, SLIDE_START = -8, 0.332  # degrees, 0 is level; metres from the arm where the flat hand lands
HOOK_PITCH, HOOK_BEYOND = -150, 0.030  # degrees, -90 is straight down; metres behind the cube it comes down
HOOK_REACH = 0.260  # and never closes farther from the arm than this, metres
MEET_PITCH = -15  # degrees of the right gripper at the hand-over
REACH = 0.015  # metres that the left fingertips go beyond the meeting point
CUBE_HEIGHT = 0.02  # of its centre on the table, metres
MOMENTS = (0, 20, 40, 60, 90, 132, 160, 205, 300)  # control steps of the strip of pictures


@dataclass
class Args:
    num_demos: int = 1000  # number of demonstrations, two of each cube pose
    seed: int = 0  # of cube poses and noise
    noise: float = 0.001  # standard deviation of grasp and meeting points, m; of the pitch, 500 degrees a m
    command_noise: float = 0.015  # largest amplitude of the smooth noise on executed joint commands, rad
    workers: int = 2  # simulator processes
    out: Path = Path("demos/aloha.npz")  # where the demonstrations go
    overwrite: bool = False  # replace an existing file
    video: Path | None = None  # also an mp4, or a png of nine moments: each behaviour right and wrong (EGL)


class Demonstrator:
    """Way-points, inverse kinematics on gym-aloha's joint model, servo targets that hold against gravity."""

    def __init__(self, simulator):
        self.model, self.data = simulator.model, mujoco.MjData(simulator.model)
        self.dofs = {"left": np.arange(6), "right": np.arange(8, 14)}
        self.bodies = {side: self.model.body(f"vx300s_{side}/gripper_link").id for side in self.dofs}
        self.forward = dict(left=np.array([1.0, 0, 0]), right=np.array([-1.0, 0, 0]))  # they face each other
        self._start()
        self.start_tip, self.start_rotation = {}, {}
        for side, body in self.bodies.items():
            self.start_tip[side] = self.data.xpos[body] + TIP * self.forward[side]
            self.start_rotation[side] = self.data.xmat[body].reshape(3, 3).copy()

    def _start(self):
        self.data.qpos[:16] = START_ARM_POSE
        mujoco.mj_forward(self.model, self.data)

    def plan(self, mode, box_pose, noise, rng):
        """Joint targets of one episode. mode: index into MODES, box_pose: (7,) -> (HORIZON, 14)."""
        slide = mode == MODES.index("slide")
        pitch = (SLIDE_PITCH if slide else HOOK_PITCH) + rng.normal(0, 500 * noise)  # degrees
        grasp = np.array([*box_pose[:2], CUBE_HEIGHT + (0 if slide else 0.01)])
        grasp += np.r_[rng.normal(0, noise, 2), abs(rng.normal(0, 0.6 * noise))]
        away = np.r_[grasp[:2] - ARM, 0] / np.linalg.norm(grasp[:2] - ARM)  # from the arm to the cube
        # the way to the ready pose is the same wherever the cube lies; after a second each hand has come down
        if slide:
            ready, ready_pitch, lift_pitch = [ARM[0] - SLIDE_START, ARM[1], 0.08], SLIDE_PITCH, SLIDE_PITCH
            down = np.r_[ARM, CUBE_HEIGHT] + SLIDE_START * away
            above, steps, opening, soon = down, (36, 36, 52), 0.25, 16
        else:
            ready, ready_pitch, lift_pitch = [0.12, ARM[1], 0.22], -90, -120
            grasp[:2] = ARM + min(np.linalg.norm(grasp[:2] - ARM), HOOK_REACH) * away[:2]
            down = grasp + HOOK_BEYOND * away
            above, steps, opening, soon = down + [0, 0, 0.06], (42, 58, 76), 1, 22
        meet = np.array([0.0, 0.5, 0.28]) + rng.normal(0, noise, 3)
        left = meet + rng.normal(0, noise, 3)
        # fingertip way-points: control step, x, y, z (m), pitch or roll (degrees), gripper (1 open, 0 closed)
        points = {}
        points["right"] = [
            (0, *self.start_tip["right"], 0, 0),
            (soon, *ready, ready_pitch, opening),
            (steps[0], *above, pitch, opening),
            (steps[1], *down, pitch, opening),
            (steps[2], *down, pitch, 1),
            (132, *grasp, pitch, 1),
            (154, *grasp, pitch, 0),
            (172, *grasp, pitch, 0),
            (205, *(grasp + [0, 0, 0.1]), lift_pitch, 0),
            (250, *meet, MEET_PITCH, 0),
            (322, *meet, MEET_PITCH, 0),
            (342, *meet, MEET_PITCH, 1),
            (385, *(meet + [0.1, 0, 0]), MEET_PITCH, 1),
        ]
        points["left"] = [
            (0, *self.start_tip["left"], 0, 1),
            (120, *(left - [0.12, 0, 0]), 90, 1),
            (240, *(left - [0.12, 0, 0]), 90, 1),
            (288, *(left + [REACH, 0, 0]), 90, 1),
            (316, *(left + [REACH, 0, 0]), 90, 0),
            (346, *(left + [REACH, 0, 0]), 90, 0),
            (385, *(left - [0.1, 0, 0]), 90, 0),
        ]
        times, arms = np.arange(0, HORIZON + KNOT, KNOT), (("left", 0), ("right", 7))
        self._start()
        actions = np.zeros((len(times), 14))
        for k in range(len(times)):
            for side, offset in arms:
                time, *columns = np.array(points[side], dtype=float).T
                x, y, z, angle, gripper = (np.interp(times[k], time, column) for column in columns)
                tilt = Rotation.from_euler("y" if side == "right" else "x", angle, degrees=True)
                rotation = tilt.as_matrix()
                if side == "right":  # it points away from the arm's foot: the arm stays in one plane
                    turn = Rotation.from_euler("z", np.arctan2(ARM[1] - y, ARM[0] - x))
                    rotation = turn.as_matrix() @ rotation
                self._solve(side, np.array([x, y, z]) - TIP * rotation @ self.forward[side], rotation)
                actions[k, offset : offset + 6] = self.data.qpos[self.dofs[side]]
                actions[k, offset + 6] = gripper
            self.data.qvel[:] = 0
            mujoco.mj_forward(self.model, self.data)
            for side, offset in arms:
                # a position servo settles where kp (target - q) = gravity: the target leads q by gravity / kp
                lead = self.data.qfrc_bias[self.dofs[side]] / self.model.actuator_gainprm[self.dofs[side], 0]
                actions[k, offset : offset + 6] += lead
        steps = np.arange(HORIZON)
        return np.stack([np.interp(steps, times, column) for column in actions.T], -1)

    def _solve(self, side, position, rotation, iterations=8):
        """Damped least squares from the last solution. position: the gripper's, rotation: from its start."""
        model, data, body, dofs = self.model, self.data, self.bodies[side], self.dofs[side]
        target = rotation @ self.start_rotation[side]
        # Where the wrist is straight, forearm and wrist roll turn about one axis and may drift to the flipped
        # solution at their limits: a weak pull keeps both near 0.
        pull = 0.02 * np.eye(6)[[3, 5]]
        jac_p, jac_r = np.zeros((3, model.nv)), np.zeros((3, model.nv))
        for _ in range(iterations):
            mujoco.mj_kinematics(model, data)
            mujoco.mj_comPos(model, data)
            error_p = position - data.xpos[body]
            columns = data.xmat[body].reshape(3, 3).T
            error_r = 0.5 * np.cross(columns, target.T).sum(0)  # of small angles
            mujoco.mj_jacBody(model, data, jac_p, jac_r, body)
            jacobian = np.concatenate([jac_p[:, dofs], 0.3 * jac_r[:, dofs], pull])  # 0.3 m for a radian
            error = np.concatenate([error_p, 0.3 * error_r, -pull @ data.qpos[dofs]])
            step = np.linalg.solve(jacobian.T @ jacobian + 1e-5 * np.eye(6), jacobian.T @ error)
            data.qpos[dofs] += step.clip(-0.2, 0.2)
        data.qpos[dofs] = data.qpos[dofs].clip(*model.jnt_range[dofs].T)  # as far as the joints go


def smooth_noise(rng, amplitude):
    """Noise of the executed commands, correlated over 20 steps; none on the grippers. -> (HORIZON, 14)"""
    pushes = amplitude * np.sqrt(1 - 0.95**2) * rng.normal(size=(HORIZON, 14))
    noise = lfilter([1], [1, -0.95], pushes, axis=0)
    noise[:, [6, 13]] = 0
    return noise


def demonstrate(simulators, mode, box_pose, noise, command_noise, seed):
    """One demonstration, T = HORIZON. -> observations (T, 21), commands (T, 14), success, frames (T + 1, 23);
    None if the physics diverged."""
    simulator, rng = simulators[TASK], np.random.default_rng(seed)
    actions = Demonstrator(simulator).plan(mode, box_pose, noise, rng)
    executed = actions + smooth_noise(rng, rng.uniform(0, command_noise))
    chunk = simulator.run(simulator.reset(box_pose)[0], executed, record=True)
    if chunk.diverged:
        return None
    observations = observe(chunk.frames[:-1]).astype(np.float32)
    return observations, actions.astype(np.float32), chunk.success.any(), chunk.frames


def make_demos(args):
    """Demonstrations as a dict of arrays: observations (n, T, 21), actions (n, T, 14), success, mode (n,),
    frames (n, T + 1, 23), box (n, 7)."""
    n, rng = args.num_demos, np.random.default_rng([2, args.seed])  # 2: not evaluation (0) or training (1)
    # each place twice, once a behaviour: no chance correlation of the two that a clone could learn
    poses = sample_box_poses(rng, -(-n // len(MODES))).repeat(len(MODES), 0)
    modes = np.arange(n) % len(MODES)
    seeds, same = [[2, args.seed, i + 1] for i in range(n)], ([args.noise] * n, [args.command_noise] * n)
    with Workers(build, [TASK], args.workers, timeout=3600) as workers:
        results = workers.map(demonstrate, modes, poses, *same, seeds, description="demonstrations")
    kept = [i for i, result in enumerate(results) if result is not None]
    names = ("observations", "actions", "success", "frames")
    demos = {name: np.array([results[i][c] for i in kept]) for c, name in enumerate(names)}
    return dict(demos, mode=modes[kept], box=poses[kept])


def run(args):
    """Make the demonstrations of `args`, print their success and write them to args.out (and args.video)."""
    shared.check_limits(args, "num_demos workers", 1)
    shared.check_limits(args, "seed", 0)
    shared.check_limits(args, "noise command_noise", 0, 0.5)
    shared.check_files(args, ".mp4", ".png")
    load_suite("aloha", pictures=args.video is not None)  # stops if they cannot be drawn
    demos = make_demos(args)
    frames, mode, good = demos.pop("frames"), demos["mode"], demos["success"]
    parts = {name: good[mode == k] for k, name in enumerate(MODES)}
    shared.write_demos(args, "demo_aloha", demos, parts | {"all": good})
    if args.video is None:
        return
    first = []
    for kind in product(range(len(MODES)), (True, False)):
        first.extend(np.flatnonzero((mode == kind[0]) & (good == kind[1]))[:1])
    png = args.video.suffix == ".png"
    episodes = [Simulator().render(frames[i][list(MOMENTS) if png else slice(None, None, 2)]) for i in first]
    if png:
        rows = [np.concatenate(list(pictures[:, 60:195]), 1) for pictures in episodes]  # the table only
        import imageio.v2 as imageio

        args.video.parent.mkdir(parents=True, exist_ok=True)
        imageio.imwrite(args.video, np.concatenate(rows)[::2, ::2])
    else:
        write_film(args.video, [np.concatenate(episodes)], FPS // 2)
    print(f"wrote {args.video}")


if __name__ == "__main__":
    run(parse_args(Args, __doc__))
