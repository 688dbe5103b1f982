"""A scripted, deliberately imperfect demonstrator of Transfer Cube: what the frozen base policy is cloned from.

The right arm grasps the cube, brings it to a meeting point, and the left arm takes it over. It grasps in one of two
ways, each of which works on one part of the table and fails on the other (D15):

- slide: the nearly closed hand is laid flat on the table in front of its own arm, opens, and slides forward around
  the cube. The wrist cannot bend enough to lay it down nearer than that: it comes down on a nearer cube.
- hook: the open hand comes down from above, pointing back, and rakes the cube in. It reaches only so far: a cube
  farther than about 37 cm from the arm is under the hand or beyond it.

Which one a demonstrator takes does not depend on where the cube lies: every place is shown with both.

    python tools/demo_aloha.py                              # demos/aloha.npz and the success of each behaviour
    python tools/demo_aloha.py --num-demos 20 --video demos.mp4 --out demos/few.npz

The script is open-loop: fingertip way-points, inverse kinematics, and servo targets that make up for gravity. What is
executed has smooth noise on it and what is recorded is the clean command, so that a clone learns to recover (DART,
arXiv 1703.09327).
"""

import json
import multiprocessing
import os
import sys
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from gym_aloha.constants import START_ARM_POSE
from statsmodels.stats.proportion import proportion_confint
from tqdm import tqdm

from mujoco_state import opengl_problem  # before mujoco: it picks the OpenGL library
import mujoco
from env_aloha import FPS, HORIZON, Simulator, observe, sample_box_poses, strict_success
from run_files import parse_args

MODES = ("slide", "hook")
KNOT = 5  # control steps between two solutions of the inverse kinematics
TIP = 0.135  # metres from the gripper's body to between its fingertips
ARM = np.array([0.469, 0.5])  # where the right arm stands, metres
SLIDE_PITCH, SLIDE_START = -8, 0.332  # degrees, 0 is level; metres from the arm at which the flat hand comes down
HOOK_PITCH, HOOK_BEYOND = -150, 0.030  # degrees, -90 is straight down; metres behind the cube it comes down
HOOK_REACH = 0.260  # and never closes farther from the arm than this, metres
MEET_PITCH = -15  # degrees of the right gripper at the hand-over
REACH = 0.015  # metres that the left fingertips go beyond the meeting point
CUBE_HEIGHT = 0.02  # of its centre on the table, metres
MOMENTS = (0, 20, 40, 60, 90, 132, 160, 205, 300)  # control steps of the strip of pictures


@dataclass
class Args:
    num_demos: int = 1000
    """number of demonstrations, two of each cube pose"""
    seed: int = 0
    """of cube poses and noise"""
    noise: float = 0.001
    """standard deviation of grasp and meeting points, metres; the grasp's pitch has 500 degrees for each metre"""
    command_noise: float = 0.015
    """largest amplitude of the smooth noise on the executed joint commands, rad; none on the grippers"""
    workers: int = 2
    """simulator processes"""
    out: Path = Path("demos/aloha.npz")
    """where the demonstrations go"""
    overwrite: bool = False
    """replace an existing file"""
    video: Path | None = None
    """also write an mp4, or a png of nine moments, with a success and a failure of each behaviour (needs EGL)"""


class Demonstrator:
    """Way-points, inverse kinematics on gym-aloha's joint model, and the servo targets that hold against gravity."""

    def __init__(self, simulator):
        self.model, self.data = simulator.model, mujoco.MjData(simulator.model)
        self.dofs = {"left": np.arange(6), "right": np.arange(8, 14)}
        self.bodies = {side: self.model.body(f"vx300s_{side}/gripper_link").id for side in self.dofs}
        self._start()
        self.start_tip = {}
        for side, body in self.bodies.items():
            self.start_tip[side] = self.data.xpos[body] + TIP * self._forward(side)
        self.start_rotation = {side: self.data.xmat[body].reshape(3, 3).copy() for side, body in self.bodies.items()}

    def _start(self):
        self.data.qpos[:16] = START_ARM_POSE
        mujoco.mj_forward(self.model, self.data)

    def _forward(self, side):  # where the gripper points to at the start: the arms face each other
        return np.array([1.0, 0, 0]) if side == "left" else np.array([-1.0, 0, 0])

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
        right_points = [
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
        left_points = [
            (0, *self.start_tip["left"], 0, 1),
            (120, *(left - [0.12, 0, 0]), 90, 1),
            (240, *(left - [0.12, 0, 0]), 90, 1),
            (288, *(left + [REACH, 0, 0]), 90, 1),
            (316, *(left + [REACH, 0, 0]), 90, 0),
            (346, *(left + [REACH, 0, 0]), 90, 0),
            (385, *(left - [0.1, 0, 0]), 90, 0),
        ]
        times = np.arange(0, HORIZON + KNOT, KNOT)
        paths = {}
        for side, points in (("left", left_points), ("right", right_points)):
            time, *columns = np.array(points, dtype=float).T
            paths[side] = np.stack([np.interp(times, time, c) for c in columns], -1)  # (knots, 5)
        self._start()
        actions = np.zeros((len(times), 14))
        for k in range(len(times)):
            for side, offset in (("left", 0), ("right", 7)):
                x, y, z, angle, gripper = paths[side][k]
                axis = np.array([1.0, 0, 0]) if side == "left" else np.array([0, 1.0, 0])
                rotation = rotation_about(axis, np.deg2rad(angle))
                if side == "right":  # the hand points away from the arm's foot, so that the arm stays in one plane
                    rotation = rotation_about(np.array([0, 0, 1.0]), np.arctan2(ARM[1] - y, ARM[0] - x)) @ rotation
                self._solve(side, np.array([x, y, z]) - TIP * rotation @ self._forward(side), rotation)
                actions[k, offset : offset + 6] = self.data.qpos[self.dofs[side]]
                actions[k, offset + 6] = gripper
            self.data.qvel[:] = 0
            mujoco.mj_forward(self.model, self.data)
            for side, offset in (("left", 0), ("right", 7)):
                # a position servo settles where kp (target - q) = gravity, so the target leads q by gravity / kp
                lead = self.data.qfrc_bias[self.dofs[side]] / self.model.actuator_gainprm[self.dofs[side], 0]
                actions[k, offset : offset + 6] += lead
        steps = np.arange(HORIZON)
        return np.stack([np.interp(steps, times, column) for column in actions.T], -1)

    def _solve(self, side, position, rotation, iterations=8):
        """Damped least squares from the last solution: gripper at `position`, turned by `rotation` from the start."""
        model, data, body, dofs = self.model, self.data, self.bodies[side], self.dofs[side]
        target = rotation @ self.start_rotation[side]
        # Where the wrist is straight, forearm and wrist roll turn about one axis and may drift to the flipped solution
        # at their limits: a weak pull keeps both near 0.
        pull = 0.02 * np.eye(6)[[3, 5]]
        jac_p, jac_r = np.zeros((3, model.nv)), np.zeros((3, model.nv))
        for _ in range(iterations):
            mujoco.mj_kinematics(model, data)
            mujoco.mj_comPos(model, data)
            error_p = position - data.xpos[body]
            error_r = 0.5 * np.cross(data.xmat[body].reshape(3, 3).T, target.T).sum(0)  # columns, small angles
            mujoco.mj_jacBody(model, data, jac_p, jac_r, body)
            jacobian = np.concatenate([jac_p[:, dofs], 0.3 * jac_r[:, dofs], pull])  # 0.3 m for a radian
            error = np.concatenate([error_p, 0.3 * error_r, -pull @ data.qpos[dofs]])
            step = np.linalg.solve(jacobian.T @ jacobian + 1e-5 * np.eye(6), jacobian.T @ error)
            data.qpos[dofs] += step.clip(-0.2, 0.2)
        data.qpos[dofs] = data.qpos[dofs].clip(*model.jnt_range[dofs].T)  # as far as the joints go


def rotation_about(axis, angle):
    quaternion, matrix = np.zeros(4), np.zeros(9)
    mujoco.mju_axisAngle2Quat(quaternion, axis, angle)
    mujoco.mju_quat2Mat(matrix, quaternion)
    return matrix.reshape(3, 3)


def smooth_noise(rng, amplitude):
    """Noise of the executed commands, correlated over 20 steps; none on the grippers. -> (HORIZON, 14)"""
    noise, value = np.zeros((HORIZON, 14)), np.zeros(14)
    for t in range(HORIZON):
        value = 0.95 * value + amplitude * np.sqrt(1 - 0.95**2) * rng.normal(size=14)
        noise[t] = value
    noise[:, [6, 13]] = 0
    return noise


def demonstrate(job):
    """One demonstration. -> observations (HORIZON, 21), commands (HORIZON, 14), official, strict, qpos (T + 1, 23)"""
    global simulator, demonstrator
    if "simulator" not in globals():  # once a process
        simulator = Simulator()
        demonstrator = Demonstrator(simulator)
    mode, box_pose, noise, command_noise, seed = job
    rng = np.random.default_rng(seed)
    actions = demonstrator.plan(mode, box_pose, noise, rng)
    executed = actions + smooth_noise(rng, rng.uniform(0, command_noise))
    chunk = simulator.run(simulator.reset(box_pose)[0], executed, record=True)
    if chunk.diverged:  # left out of the data
        return None
    observations = observe(chunk.qpos[:-1]).astype(np.float32)
    return observations, actions.astype(np.float32), (chunk.rewards == 4).any(), strict_success(chunk.held), chunk.qpos


def make_demos(args):
    """Demonstrations as a dict of arrays: observations (n, T, 21), actions (n, T, 14), official, strict, mode (n,),
    qpos (n, T + 1, 23), box (n, 7)."""
    rng = np.random.default_rng([2, args.seed])  # 2: demonstrations; 0 and 1 are evaluation and training
    # each place twice, once a behaviour: no chance correlation of the two that a clone could learn
    poses = sample_box_poses(rng, -(-args.num_demos // len(MODES))).repeat(len(MODES), 0)
    modes = np.arange(args.num_demos) % len(MODES)
    jobs = [(modes[i], poses[i], args.noise, args.command_noise, [2, args.seed, i + 1]) for i in range(args.num_demos)]
    with multiprocessing.get_context("spawn").Pool(min(args.workers, args.num_demos)) as pool:
        results = list(tqdm(pool.imap(demonstrate, jobs, chunksize=2), total=len(jobs), desc="demonstrations"))
    kept = [i for i, r in enumerate(results) if r is not None]
    names = ("observations", "actions", "official", "strict", "qpos")
    columns = {name: np.array([results[i][c] for i in kept]) for c, name in enumerate(names)}
    return dict(columns, mode=modes[kept], box=poses[kept])


def interval(successes, n):
    """'41.5 % [34.9, 48.4]': share with the Wilson interval."""
    low, high = proportion_confint(successes, n, method="wilson")
    return f"{100 * successes / n:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def check(args):
    """What is wrong with the command line, in one sentence, or None."""
    for flag in ("num_demos", "workers"):
        if getattr(args, flag) < 1:
            return f"--{flag.replace('_', '-')} is {getattr(args, flag)}: give 1 or more."
    if args.seed < 0:
        return f"--seed is {args.seed}: give 0 or more."
    for flag in ("noise", "command_noise"):
        if not 0 <= getattr(args, flag) <= 0.5:
            return f"--{flag.replace('_', '-')} is {getattr(args, flag)}: give a number from 0 to 0.5."
    if args.out.exists() and not args.overwrite:
        return f"--out {args.out} exists: give another path, or --overwrite to replace it."
    if args.video and args.video.suffix not in (".mp4", ".png"):
        return f"--video is {args.video}: give a path that ends in .mp4, or in .png for a strip of pictures."
    if args.video and (problem := opengl_problem()):
        return f"--video {args.video} needs OpenGL: {problem}, or leave the flag out."


def run(args):
    """Make the demonstrations of `args`, print their success and write them to args.out (and args.video)."""
    demos = make_demos(args)
    settings = {k: v for k, v in vars(args).items() if k not in ("workers", "out", "overwrite", "video")}
    values = {k: " ".join(map(str, v)) if isinstance(v, tuple) else v for k, v in settings.items()}
    flags = [f"--{k.replace('_', '-')} {v}" for k, v in values.items()]
    settings["command"] = " ".join(["python tools/demo_aloha.py", *flags, f"--out {args.out.as_posix()}"])
    settings["success"] = {}
    for mode, name in [*enumerate(MODES), (None, "all")]:
        chosen = demos["mode"] == mode if mode is not None else np.ones(len(demos["mode"]), dtype=bool)
        if n := int(chosen.sum()):
            official, strict = demos["official"][chosen].sum(), demos["strict"][chosen].sum()
            print(f"{name:15s} {n:5d} demonstrations: official {interval(official, n)}, strict {interval(strict, n)}")
            settings["success"][name] = dict(n=n, official=round(official / n, 4), strict=round(strict / n, 4))
    qpos = demos.pop("qpos")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    part = args.out.with_suffix(".part.npz")
    np.savez_compressed(part, settings=json.dumps(settings), **demos)
    part.replace(args.out)
    print(f"wrote {args.out}")
    if args.video:
        import imageio.v2 as imageio  # ffmpeg, for this flag only

        first = []
        for mode in range(len(MODES)):
            for good in (True, False):
                first.extend(np.flatnonzero((demos["mode"] == mode) & (demos["official"] == good))[:1])
        args.video.parent.mkdir(parents=True, exist_ok=True)
        moments = list(MOMENTS) if args.video.suffix == ".png" else slice(None, None, 2)
        episodes = [Simulator().render(qpos[i][moments]) for i in first]  # (frames, height, width, 3) each
        if args.video.suffix == ".png":
            rows = [np.concatenate(list(frames[:, 60:195]), 1) for frames in episodes]  # the table only
            imageio.imwrite(args.video, np.concatenate(rows)[::2, ::2])
        else:
            imageio.mimwrite(args.video, np.concatenate(episodes), fps=FPS // 2, macro_block_size=1)
        print(f"wrote {args.video}")


def main():
    args = parse_args(Args, __doc__)
    if problem := check(args):
        print(problem, file=sys.stderr)
        sys.exit(2)
    run(args)


if __name__ == "__main__":
    main()
