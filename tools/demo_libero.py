"""The scripted, deliberately imperfect demonstrator of LIBERO's tasks: what the frozen base policies are cloned from.

It works from the goal in the task's BDDL file: for every (on/in, object, place) it grasps the object from above, carries it
and lets go. It knows all poses and shapes. Two distinct behaviours are mixed (D14): a *deep* grasp, which works, and a
*short* grasp, which stops before and above the object, closes on nothing and carries nothing to the goal. With --spots
both are deep, and each works for one half of the placements (D15): the hand comes low to a *near* spot or high to a
*far* one, always the same distance from the robot, whether the object lies there or its end is just out of reach.

    python tools/demo_libero.py --suite libero_90 --task-ids 56 --spots 0.045 0.050      # demos/libero_90_task56.npz
    python tools/demo_libero.py --suite libero_goal --task-ids 1,2     # demos/libero_goal_task1_2.npz
    python tools/demo_libero.py --table --out table.csv                # all 40 tasks from their official initial states

Demonstrations start from placements drawn from the BDDL regions, never from an official initial state. Now and then the arm is
pushed aside and what is recorded is the clean command, so that a clone learns to recover (as in DART, arXiv 1703.09327).
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from tqdm import tqdm

from env_libero import (
    FPS, OFFICIAL_STATES, STEP_LIMIT, TASKS, TaskSimulators, libero_problem, official, parse_task_ids, placed, suite,
)  # fmt: skip
from run_files import parse_args, wilson, write_table
from worker_pool import WorkerPool

SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10")
# Tasks that a suite's base is cloned on. The others need a drawer, a knob, a door or a push, or fail too often (--table).
COVERED = dict(libero_spatial=[0, 1, 2, 3, 5, 6, 7, 8, 9], libero_object=list(range(10)), libero_goal=[1, 2, 4, 6, 8, 9],
               libero_10=[0, 1, 4, 5, 6, 7], libero_90=[56])  # fmt: skip
OPEN, CLOSED = -1.0, 1.0
GAIN = 20.0  # of the position command: full speed (1) is 5 cm off
# Grasped at the rim, so far from the centre (metres); everything else is grasped across its narrow side
RIM = dict(akita_black_bowl=0.050, white_bowl=0.055, glazed_rim_porcelain_ramekin=0.040, porcelain_mug=0.040, white_yellow_mug=0.040,
           red_coffee_mug=0.040)  # fmt: skip
BELOW_TOP = dict(moka_pot=0.015, wine_bottle=0.05, black_book=0.03)  # grip height of some, metres below the top
FINE_GAIN = 60.0  # where an object is set down: the controller stops short of its goal by up to half the way
REACH = 0.74  # metres from the robot's base, horizontally; farther the arm is nearly straight
SHORT = np.array([-0.045, 0.0, 0.02])  # where the short grasp closes, from the upper end of the object
SPOTS, HEIGHTS = ("near", "far"), (0.04, 0.18)  # at which the hand comes to its spot, metres over the grip


class Demonstrator:
    """The script of one episode, as a generator of actions: `next(demonstrator.actions)` looks at the simulator and acts."""

    def __init__(self, simulator, deep, spot=None):
        """deep: whether the grasp of each goal in turn is deep (list of bool). spot: x where the hand grips, whether or
        not the object lies there, and the height over it at which it comes (m); None where it looks."""
        self.sim, self.env, self.data, self.deep, self.spot = simulator, simulator.env, simulator.data, deep, spot
        self.robot = self.data.body("robot0_base").xpos
        self.turned = None  # rotation that the hand shall have
        self.actions = self._script()

    # ---- what it sees ----

    @property
    def hand(self):
        return self.data.site_xpos[self.sim.site].copy()

    @property
    def hand_rotation(self):
        return self.data.site_xmat[self.sim.site].reshape(3, 3)

    def _box(self, name):
        """Bounding box of an object: centre and half size in the world, its rotation, half size in its own frame."""
        model, body = self.sim.model, self.env.obj_body_id[name]
        low, high = np.full(3, 9.0), np.full(3, -9.0)
        origin, rotation = self.data.xpos[body], self.data.xmat[body].reshape(3, 3)
        for geom in np.flatnonzero(model.body_rootid[model.geom_bodyid] == model.body_rootid[body]):
            if model.geom_contype[geom] == 0 and model.geom_conaffinity[geom] == 0:
                continue
            turn = rotation.T @ self.data.geom_xmat[geom].reshape(3, 3)
            centre = rotation.T @ (self.data.geom_xpos[geom] - origin) + turn @ model.geom_aabb[geom, :3]
            half = np.abs(turn) @ model.geom_aabb[geom, 3:]
            low, high = np.minimum(low, centre - half), np.maximum(high, centre + half)
        return origin + rotation @ ((low + high) / 2), np.abs(rotation) @ ((high - low) / 2), rotation, (high - low) / 2

    def _grasp(self, name, tries):
        """Grip point (3,), and the direction along which the fingers close."""
        category = self.env.objects_dict[name].category_name
        centre, half, rotation, own_half = self._box(name)
        top, bottom = centre[2] + half[2], centre[2] - half[2]
        if category in RIM:
            across = rotation[:, 1] if "mug" in category else np.array([0.0, 1.0, 0.0])  # a mug's handle is along its x
            across = across * [1, 1, 0] / np.linalg.norm(across[:2])
            origin = self.data.xpos[self.env.obj_body_id[name]]
            others = [self.data.xpos[body] for other, body in self.env.obj_body_id.items() if other != name]
            clearance = [min(np.linalg.norm((origin + side * 0.09 * across - o)[:2]) for o in others) for side in (1, -1)]
            side = 1 if clearance[0] >= clearance[1] else -1  # the side of the rim with more room, the other one next time
            if np.linalg.norm((origin + side * RIM[category] * across - self.robot)[:2]) > REACH:
                side = 1 if (origin - self.robot) @ across < 0 else -1  # stretched out, the arm does not get where it is told
            side = -side if tries % 2 else side
            grip = origin + side * RIM[category] * across
            grip[2] = max(top - 0.028, bottom + 0.015)
            return grip, across, top
        level = [i for i in range(3) if abs(rotation[2, i]) < 0.7]
        axis = min(level, key=lambda i: own_half[i])
        if len(level) == 2 and abs(own_half[level[0]] - own_half[level[1]]) < 0.012 and max(own_half[level]) < 0.037:
            axis = max(level, key=lambda i: abs(rotation[:2, i] @ self.hand_rotation[:2, 0]))  # nearly square: turn little
        grip, across = centre.copy(), rotation[:, axis]
        grip[2] = max(bottom + 0.010, min(centre[2] + 0.01, top - 0.005)) if half[2] > 0.03 else max(bottom + 0.008, centre[2] - 0.004)
        if category in BELOW_TOP:
            grip[2] = top - BELOW_TOP[category]
        if category == "moka_pot":  # its handle sticks out of the box
            grip[:2], across = self.data.xpos[self.env.obj_body_id[name]][:2], rotation[:, 0]
        return grip, across, top

    # ---- what it does ----

    def _move(self, target, gripper, gain=GAIN):
        """One action towards a position, turning the hand as wanted on the way."""
        action = np.zeros(7)
        action[:3] = np.clip(gain * (target - self.hand), -1, 1)
        if self.turned is not None:
            error = 0.5 * np.cross(self.hand_rotation.T, self.turned.T).sum(0)  # rad
            action[3:6] = np.clip(4 * error, -0.5, 0.5)
        action[6] = gripper
        return action

    def _over(self, name, grip):
        """Least height (m) at which the hand passes everything on its way to `grip` but the object itself."""
        way, heights = grip[:2] - self.hand[:2], [0.0]
        for other in self.env.obj_body_id:
            if other != name and other in self.env.objects_dict:
                centre, half, *_ = self._box(other)
                along = np.clip((centre[:2] - self.hand[:2]) @ way / max(way @ way, 1e-6), 0, 1)
                if np.linalg.norm(self.hand[:2] + along * way - centre[:2]) < 0.06 + max(half[:2]):
                    heights.append(centre[2] + half[2] + 0.05)
        return max(heights)

    def _turn_to(self, across):
        """Want the fingers to close along `across`, the hand pointing down, by the smaller turn."""
        fingers = self.hand_rotation[:, 0]
        now = np.arctan2(fingers[1], fingers[0])
        yaw = now + (np.arctan2(across[1], across[0]) - now + np.pi / 2) % np.pi - np.pi / 2
        x, z = np.array([np.cos(yaw), np.sin(yaw), 0.0]), np.array([0.0, 0.0, -1.0])
        self.turned = np.stack([x, np.cross(z, x), z], 1)

    def _script(self):
        for goal, deep in zip(self.sim.goals, self.deep):
            if len(goal) != 3:
                continue  # drawers, knobs, doors: not covered
            tries = 0
            while not self.env._eval_predicate(goal) and tries < 8:
                yield from self._fetch(goal, deep, tries)
                tries += 1
                if not deep or self.spot:
                    break
            if not deep:
                break  # this demonstrator does not look back
        while True:
            yield self._move(self.hand, OPEN)

    def _fetch(self, goal, deep, tries):
        """Grasp the object of a goal, carry it and let go; return early where the object was lost."""
        name = goal[1]
        grip, across, top = self._grasp(name, tries)
        if not deep:
            grip = np.r_[grip[:2], top] + SHORT
        if self.spot:
            grip[0] = self.spot[0]
        self._turn_to(across)
        body = self.env.obj_body_id[name]
        start_height = self.data.xpos[body][2]
        height = lambda: self.data.xpos[body][2] - start_height

        above = np.r_[grip[:2], grip[2] + (self.spot[1] if self.spot else 0.10)]
        if tries:
            above[2] = max(above[2], self.hand[2])
        over = self._over(name, grip)
        for _ in range(70):
            far = np.linalg.norm((self.hand - grip)[:2]) > 0.05
            yield self._move(np.r_[above[:2], max(above[2], over)] if far else above, OPEN)
            error = 0.5 * np.cross(self.hand_rotation.T, self.turned.T).sum(0)
            if np.linalg.norm((self.hand - grip)[:2]) < 0.008 and np.linalg.norm(error) < 0.06:
                break
        for _ in range(25):
            yield self._move(grip, OPEN)
            if abs(self.hand[2] - grip[2]) < 0.006:
                break
        for _ in range(11):
            yield self._move(grip, CLOSED)

        place = self.sim.point(goal[2]).copy()
        centre, half, *_ = self._box(name)
        carry = max(place[2] + 0.16, grip[2] + 0.06, start_height + 0.08)
        carry_above = self.hand[2] - (centre[2] - half[2]) if deep else 0  # of the hand over the object's bottom
        carry += carry_above
        if place[2] - start_height < 0.15:
            carry = min(carry, grip[2] + 0.35)
        for _ in range(40):
            yield self._move(np.r_[grip[:2], carry], CLOSED)
            if deep and height() < 0.02 and self.hand[2] > grip[2] + 0.06:
                return
            if self.hand[2] > carry - 0.02:
                break

        low = min(carry, place[2] + 0.16 + carry_above)
        held = lambda: (self.hand - self.data.xpos[body]) * [1, 1, 0] if deep else np.zeros(3)
        apart, ways = np.linalg.norm(self.hand - self.data.xpos[body]), []
        for _ in range(80):
            place = self.sim.point(goal[2]).copy()
            away = np.linalg.norm((self.hand - grip)[:2]) > 0.15  # from what the object stood on
            yield self._move(np.r_[(place + held())[:2], low if away else carry], CLOSED, FINE_GAIN)
            if deep and np.linalg.norm(self.hand - self.data.xpos[body]) > apart + 0.04:
                return
            ways.append(np.linalg.norm((self.hand - held() - place)[:2]))
            if ways[-1] < 0.012 or len(ways) > 30 and ways[-6] - ways[-1] < 0.002:  # there, or stretched out: lower down it reaches farther
                break

        surface = place[2] - (0.03 if goal[2] in self.env.object_sites_dict and goal[0] == "in" else 0)
        heights = []
        for _ in range(50 if deep else 8):
            yield self._move(np.r_[(place + held())[:2], self.hand[2] - 0.02], CLOSED, FINE_GAIN)
            heights.append(self.hand[2])
            centre, half, *_ = self._box(name)
            if deep and (centre[2] - half[2] < surface + 0.025 or len(heights) > 8 and abs(heights[-6] - heights[-1]) < 0.004):
                break
        rest = self.hand
        for _ in range(8):
            yield self._move(rest, OPEN)
        for _ in range(12):
            yield self._move(self.hand + [0, 0, 0.08], OPEN)
            if self.hand[2] > carry:
                break


def pushes(rng, steps, amplitude):
    """What is added to the executed commands: now and then a push of six steps in one random direction, and nothing in between, so that
    the recorded commands are those of an undisturbed recovery. -> (steps, 7)"""
    noise, t = np.zeros((steps, 7)), rng.integers(0, 50)
    while t < steps:
        noise[t : t + 6] = rng.uniform(0, amplitude) * rng.normal(size=7) * [1, 1, 1, 0.3, 0.3, 0.3, 0]
        t += 6 + rng.integers(20, 50)
    return noise


def demonstrate(simulators, task_id, start, deep, limit, idle, push, seed, record, spot=None):
    """One episode. deep: per goal. spot: see Demonstrator. -> observations (T, S), clean commands (T, 7), success, frames or None, whether pushed (T,).

    It ends at success, at `limit`, or after `idle` steps in which the script had nothing left to do.
    """
    simulator, rng = simulators[task_id], np.random.default_rng(seed)
    state, observation = simulator.reset(start)
    demonstrator = Demonstrator(simulator, deep, spot)
    noise = pushes(rng, limit, push)
    observations, commands, frames, waited = [], [], [], 0
    for t in range(limit):
        command = np.clip(next(demonstrator.actions), -1, 1)
        chunk = simulator.run(state, np.clip(command + noise[t], -1, 1)[None], record=record)
        if chunk.diverged:
            return None
        observations.append(observation)
        commands.append(command)
        if record:
            frames.append(chunk.frames[-1])
        state, observation = chunk.state, chunk.observation
        waited = waited + 1 if np.abs(command[:3]).max() < 0.05 and command[6] == OPEN else 0
        if chunk.success.any() or waited >= idle:
            break
    success = bool(chunk.success.any())
    pushed = noise[: len(commands)].any(1)
    return np.array(observations, np.float32), np.array(commands, np.float32), success, np.array(frames) if record else None, pushed


@dataclass
class Args:
    suite: Literal["libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90"] = "libero_90"
    """the suite"""
    task_ids: str = "all"
    """tasks of the suite: numbers with commas, or all"""
    num_demos: int = 800
    """number of demonstrations a task"""
    seed: int = 0
    """of placements, behaviours and noise"""
    deep_share: float = 0.5
    """share of deep grasps, 0 ... 1, where the object lies half-way"""
    share_slope: float = 1.0
    """the share is this much larger where the object lies farthest from the robot, smaller where nearest ..."""
    share_limits: tuple[float, float] = (0.15, 0.85)
    """... within these limits"""
    spots: tuple[float, float] = (0.0, 0.0)
    """grip so far (m) before and behind where the object lies on average, instead of deep and short; 0 0 is off (D15)"""
    push: float = 0.6
    """largest amplitude of the pushes on the executed commands (1 is full speed); none on the gripper"""
    workers: int = 2
    """simulator processes"""
    out: Path | None = None
    """where the demonstrations go; demos/<suite>.npz, or with _task<ids>, if left out; --table's is results/libero/demonstrators.csv"""
    overwrite: bool = False
    """replace an existing file"""
    table: bool = False
    """instead: deep grasps alone, from the official initial states of all 40 tasks"""
    table_states: int = OFFICIAL_STATES
    """initial states a task of --table"""
    video: Path | None = None
    """also write an mp4 with one episode of each behaviour (needs EGL)"""


def interval(successes, n):
    """'41.5 % [34.9, 48.4]': share with the Wilson interval."""
    low, high = wilson(successes, n)
    return f"{100 * successes / n:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def covered(name, task_id):
    """Whether every goal of a task is to put something somewhere, which is what the demonstrator can do."""
    from libero.libero.envs.bddl_utils import robosuite_parse_problem

    return all(len(goal) == 3 for goal in robosuite_parse_problem(suite(name).get_task_bddl_file_path(task_id))["goal_state"])


def table(args):
    """Success of the deep grasp over the official initial states of the 40 tasks, into args.out."""
    args.out.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in SUITES:
        with WorkerPool(args.workers, TaskSimulators, name, range(TASKS[name])) as pool:
            for k in range(TASKS[name]):
                n = args.table_states
                columns = [[k] * n, [official(i) for i in range(n)], [[True] * 9] * n, [STEP_LIMIT[name]] * n, [40] * n, [0.0] * n]
                results = pool.map(demonstrate, *columns, [[2, args.seed, i] for i in range(n)], [False] * n)
                good = [r is not None and r[2] for r in results]
                steps = [len(r[1]) for r, g in zip(results, good) if g]
                rows.append(dict(suite=name, task_id=k, task=suite(name).get_task(k).name, pick_and_place_only=covered(name, k), episodes=n,
                                 successes=sum(good), mean_steps=f"{np.mean(steps):.0f}" if steps else ""))  # fmt: skip
                print(f"{name:15} {k} {interval(sum(good), n):22} {rows[-1]['mean_steps']:>4} steps  {rows[-1]['task']}", flush=True)
    write_table(args.out, rows)
    print(f"wrote {args.out}")


def make_demos(args, task_ids):
    """Demonstrations of several tasks. -> dict of arrays, all steps one after the other: observations (N, S), actions (N, 7), pushed (N,),
    and per episode: length, task_id, success, deep; frames: one recorded episode of each behaviour, with its task."""
    jobs = []
    with WorkerPool(args.workers, TaskSimulators, args.suite, task_ids) as pool:
        for k in task_ids:
            rng = np.random.default_rng([2, args.seed, k, 0])  # 2: demonstrations; 1 is training
            for i in range(args.num_demos):
                if i % 2 == 0 or not any(args.spots):  # with spots every placement is shown twice
                    start = placed(rng.integers(2**32))
                jobs.append((k, start, [2, args.seed, k, i + 1]))
        starts = pool.map(first_goals, [j[0] for j in jobs], [j[1] for j in jobs])
        rng = np.random.default_rng([2, args.seed, 0, 0, 0])
        columns = [[] for _ in range(9)]
        for k in task_ids:
            mine = [i for i, job in enumerate(jobs) if job[0] == k]
            x = np.array([starts[i][0] for i in mine])
            low, high = np.quantile(x, [0.02, 0.98])
            nearness = ((x - (low + high) / 2) / max((high - low) / 2, 0.01)).clip(-1, 1)  # some tasks place their object within millimetres
            goals = starts[mine[0]][1]
            share = (args.deep_share + args.share_slope * nearness).clip(*args.share_limits) ** (1 / goals)
            spots = list(zip(x.mean() + np.array([-1, 1]) * args.spots, HEIGHTS))
            for i, p in zip(mine, share):
                deep, spot = (list(rng.random(goals) < p), None) if not any(args.spots) else ([True] * goals, spots[i % 2])
                job = (k, jobs[i][1], deep, STEP_LIMIT[args.suite], 20, args.push, jobs[i][2], False, spot)
                for column, value in zip(columns, job):
                    column.append(value)
        if args.video:
            shown = [columns[8][i] is columns[8][0] if any(args.spots) else all(d) for i, d in enumerate(columns[2])]
            columns[7] = [i in (np.argmin(shown), np.argmax(shown)) for i in range(len(jobs))]
        size, results = 4 * args.workers, []
        for i in tqdm(range(0, len(jobs), size), desc="demonstrations"):
            results += pool.map(demonstrate, *[column[i : i + size] for column in columns])
    kept = [i for i, r in enumerate(results) if r is not None]
    pick = lambda c: [results[i][c] for i in kept]
    demos = dict(observations=np.concatenate(pick(0)), actions=np.concatenate(pick(1)), pushed=np.concatenate(pick(4)), length=np.array([len(a) for a in pick(1)]),
                 success=np.array(pick(2)), task_id=np.array([columns[0][i] for i in kept]), deep=np.array([all(columns[2][i]) for i in kept]))  # fmt: skip
    if any(args.spots):
        demos["spot"] = np.array([HEIGHTS.index(columns[8][i][1]) for i in kept])  # 0 near, 1 far
    return demos, [(columns[0][i], results[i][3]) for i in kept if results[i][3] is not None]


def first_goals(simulators, task_id, start):
    """x of the first goal's object at an episode's start, and the number of goals."""
    simulator = simulators[task_id]
    simulator.reset(start)
    return simulator.point(simulator.goals[0][1])[0], len(simulator.goals)


def check(args):
    """What is wrong with the command line, in one sentence, or None."""
    for flag in ("num_demos", "workers", "table_states"):
        if getattr(args, flag) < 1:
            return f"--{flag.replace('_', '-')} is {getattr(args, flag)}: give 1 or more."
    if args.table_states > OFFICIAL_STATES:
        return f"--table-states is {args.table_states}: a task has {OFFICIAL_STATES}."
    if args.seed < 0:
        return f"--seed is {args.seed}: give 0 or more."
    if not 0 <= args.deep_share <= 1:
        return f"--deep-share is {args.deep_share}: give a share from 0 to 1."
    if not 0 <= args.push <= 1:
        return f"--push is {args.push}: give a number from 0 to 1."
    if not -10 <= args.share_slope <= 10:
        return f"--share-slope is {args.share_slope}: give a number from -10 to 10."
    if not all(0 <= distance <= 0.2 for distance in args.spots):
        return f"--spots is {args.spots[0]} {args.spots[1]}: give two distances from 0 to 0.2 metres."
    low, high = args.share_limits
    if not 0 <= low <= high <= 1:
        return f"--share-limits is {low} {high}: give two shares from 0 to 1, the smaller one first."
    if args.out and args.out.exists() and not args.overwrite:
        return f"--out {args.out} exists: give another path, or --overwrite to replace it."
    if args.video and args.video.suffix != ".mp4":
        return f"--video is {args.video}: give a path that ends in .mp4."
    return libero_problem(pictures=args.video is not None)


def run(args, task_ids):
    """Make the demonstrations of `args`, print their success and write them to args.out (and args.video)."""
    demos, films = make_demos(args, task_ids)
    settings = {k: v for k, v in vars(args).items() if k not in ("workers", "out", "overwrite", "video", "table", "table_states")}
    values = {k: " ".join(map(str, v)) if isinstance(v, tuple) else v for k, v in settings.items()}
    flags = [f"--{k.replace('_', '-')} {v}" for k, v in values.items()]
    settings["command"] = " ".join(["python tools/demo_libero.py", *flags, f"--out {args.out.as_posix()}"])
    settings["success"] = {}
    for k in task_ids:
        kinds = ((0, "near spot"), (1, "far spot")) if any(args.spots) else ((False, "with a short grasp"), (True, "deep grasps"))
        for kind, name in (*kinds, (None, "all")):
            chosen = (demos["task_id"] == k) & (demos["spot" if any(args.spots) else "deep"] == kind if kind is not None else True)
            if n := int(chosen.sum()):
                good = int(demos["success"][chosen].sum())
                print(f"task {k:2d} {name:18s} {n:5d} demonstrations: {interval(good, n)}")
                settings["success"][f"task {k}, {name}"] = dict(n=n, success=round(good / n, 4))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    part = args.out.with_suffix(".part.npz")
    np.savez_compressed(part, settings=json.dumps(settings), **demos)
    part.replace(args.out)
    print(f"wrote {args.out}")
    if args.video:
        import imageio.v2 as imageio  # ffmpeg, for this flag only

        simulators = TaskSimulators(args.suite, {k for k, _ in films})
        args.video.parent.mkdir(parents=True, exist_ok=True)
        pictures = np.concatenate([simulators[k].render(frames[::2]) for k, frames in films])
        imageio.mimwrite(args.video, pictures, fps=FPS // 2, macro_block_size=1)
        print(f"wrote {args.video}")


def main():
    args = parse_args(Args, __doc__)
    if args.out is None and args.table:
        args.out = Path("results/libero/demonstrators.csv")
    elif args.out is None:
        args.out = Path("demos") / (f"{args.suite}.npz" if args.task_ids == "all" else f"{args.suite}_task{args.task_ids.replace(',', '_')}.npz")
    problem = check(args)
    try:
        task_ids = parse_task_ids(args.suite, args.task_ids)
    except ValueError as error:
        problem = problem or str(error)
    if problem:
        print(problem, file=sys.stderr)
        sys.exit(2)
    if args.table:
        return table(args)
    run(args, task_ids)


if __name__ == "__main__":
    main()
