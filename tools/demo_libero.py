"""The scripted, deliberately imperfect demonstrator of LIBERO's tasks: what the frozen bases are cloned from.

It works from the goals in the task's BDDL file, with one short motion for each kind: it grasps an object from
above, carries it and lets go, in a drawer that it opens first or, from the front, in a microwave; it drags a
plate by its rim, pulls a drawer open by its handle or pushes it shut, swings a door shut and turns a knob. It
knows all poses and shapes. Two distinct behaviours are mixed: a *deep* grasp, which works, and a *short* one,
which stops before and above the object, closes on nothing and carries nothing to the goal. With --spots both
are deep, and each works for one half of the placements: the hand comes low to a *near* spot or high to a
*far* one, always the same distance from the robot, whether the object lies there or its end is just out of
reach.

    python tools/demo_libero.py --task-ids 56 --spots 0.045 0.050      # demos/libero_90_task56.npz
    python tools/demo_libero.py --suite libero_goal --task-ids 1,2     # demos/libero_goal_task1_2.npz
    python tools/demo_libero.py --table --out table.csv                # all 40 tasks, official states

Demonstrations start from placements drawn from the BDDL regions, never from an official initial state. Now
and then the arm is pushed aside and what is recorded is the clean command, so that a clone learns to recover
(as in DART, arXiv 1703.09327).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import shared  # first: it makes the folder above known
import numpy as np

from envs import libero, load_suite
from envs.workers import Workers
from support.flags import parse_args, stop
from support.run_files import rate, write_table

SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10")
# What the shipped bases are cloned on, which is less than the demonstrator can do (--table): all forty
COVERED = dict(libero_spatial=[0, 1, 2, 3, 5, 6, 7, 8, 9], libero_object=list(range(10)), libero_90=[56])
COVERED |= dict(libero_goal=[1, 2, 4, 6, 8, 9], libero_10=[0, 1, 4, 5, 6, 7])
OPEN, CLOSED = -1.0, 1.0
GAIN = 20.0  # of the position command: full speed (1) is 5 cm off
# Grasped at the rim, so far from the centre (metres); everything else is grasped across its narrow side
MUGS = dict(porcelain_mug=0.040, white_yellow_mug=0.040, red_coffee_mug=0.040)
RIM = dict(akita_black_bowl=0.050, white_bowl=0.055, glazed_rim_porcelain_ramekin=0.040, **MUGS)
BELOW_TOP = dict(moka_pot=0.015, wine_bottle=0.05, black_book=0.03)  # grip height of some, m below the top
FINE_GAIN = 60.0  # where an object is set down: the controller stops short of its goal by up to half the way
REACH = 0.74  # metres from the robot's base, horizontally; farther the arm is nearly straight
SHORT = np.array([-0.045, 0.0, 0.02])  # where the short grasp closes, from the upper end of the object
HEIGHTS = 0.04, 0.18  # at which the hand comes to its near or far spot, metres over the grip
# How far the hand leans back from pointing down (rad): at a drawer's handle, below a drawer, into something
LEAN = dict(pull=1.3, push=0.7, below=0.5, inside=0.85)
# Where a knob is gripped and a door pushed, metres in the frame of the part that turns. A knob has no lever
LEVER = dict(flat_stove=(0.0, 0.0, 0.032), microwave=(0.21, 0.0, 0.03))
# What is entered from the front: the way in, and the place from the middle of the region, in its frame
INTO = dict(microwave=((0.0, 1.0, 0.0), (-0.055, -0.07, -0.061)))
PLATE_RIM = 0.062  # m from the middle of a plate
APART = 0.052  # m from the middle of a place that two objects share


class Demonstrator:
    """The script of one episode, a generator of actions: `next(demonstrator.actions)` looks and acts."""

    def __init__(self, simulator, deep, spot=None):
        """deep: whether the grasp of each goal in turn is deep (list of bool). spot: x where the hand grips,
        whether or not the object lies there, and the height over it at which it comes (m); None: it looks."""
        self.sim, self.env, self.data = simulator, simulator.env, simulator.data
        self.deep, self.spot = deep, spot
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
        """Bounding box of an object: centre and half size (m) in the world, rotation, own half size."""
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
        middle, half = (low + high) / 2, (high - low) / 2
        return origin + rotation @ middle, np.abs(rotation) @ half, rotation, half

    def _grasp(self, name, narrow, tries):
        """Grip point (3,), the direction along which the fingers close, and the height of the top. narrow: of
        `_narrow`."""
        category = self.env.objects_dict[name].category_name
        centre, half, rotation, own_half = self._box(name)
        top, bottom = centre[2] + half[2], centre[2] - half[2]
        if category in RIM:
            # a mug's handle is along its x
            across = rotation[:, 1] if "mug" in category else np.array([0.0, 1.0, 0.0])
            across = across * [1, 1, 0] / np.linalg.norm(across[:2])
            across = across if narrow is None else np.cross(narrow[0], [0, 0, 1])
            origin = self.data.xpos[self.env.obj_body_id[name]]
            bodies = [body for other, body in self.env.obj_body_id.items() if other != name]
            sides = origin[:2] + 0.09 * np.outer([1, -1], across[:2])
            room = [np.linalg.norm(self.data.xpos[bodies, :2] - point, axis=1).min() for point in sides]
            side = 1 if room[0] >= room[1] else -1  # of the rim; the other one next time
            if np.linalg.norm((origin + side * RIM[category] * across - self.robot)[:2]) > REACH:
                # stretched out, the arm does not get where it is told
                side = 1 if (origin - self.robot) @ across < 0 else -1
            side = -side if tries % 2 else side
            if narrow is not None and narrow[2] is not None:
                side = np.sign(across @ narrow[2])
            wall = 0.008 if narrow is not None and not narrow[1] else 0.0  # beside the outer finger
            grip = origin + side * (RIM[category] - wall) * across
            grip[2] = max(top - 0.028, bottom + 0.015)
            return grip, across, top
        level = [i for i in range(3) if abs(rotation[2, i]) < 0.7]
        axis = min(level, key=lambda i: own_half[i])
        sides = own_half[level]
        # nearly square: turn little
        if len(level) == 2 and abs(sides[0] - sides[1]) < 0.012 and max(sides) < 0.037:
            axis = max(level, key=lambda i: abs(rotation[:2, i] @ self.hand_rotation[:2, 0]))
        grip, across = centre.copy(), rotation[:, axis]
        if half[2] > 0.03:
            grip[2] = max(bottom + 0.010, min(centre[2] + 0.01, top - 0.005))
        else:
            grip[2] = max(bottom + 0.008, centre[2] - 0.004)
        if category in BELOW_TOP:
            grip[2] = top - BELOW_TOP[category]
        if category == "moka_pot":  # its handle sticks out of the box
            grip[:2], across = self.data.xpos[self.env.obj_body_id[name]][:2], rotation[:, 0]
        return grip, across, top

    def _joint(self, name):
        """The joint that moves a fixture or, a drawer, one of its regions (id); None if it is fixed."""
        thing = self.env.object_sites_dict.get(name) or self.env.fixtures_dict.get(name)
        return self.sim.model.joint(thing.joints[0]).id if thing is not None and thing.joints else None

    def _out(self, joint):
        """The direction in which a drawer opens. -> (3,)"""
        low, high = self.sim.model.jnt_range[joint]
        return self.data.xaxis[joint] * (1 if high > -low else -1)

    def _handle(self, joint):
        """The middle of a drawer's handle, the part that is farthest out. -> (3,)"""
        model, out = self.sim.model, self._out(joint)
        geoms = np.flatnonzero((model.geom_bodyid == model.jnt_bodyid[joint]) & (model.geom_contype > 0))
        return self.data.geom_xpos[max(geoms, key=lambda geom: self.data.geom_xpos[geom] @ out)].copy()

    def _into(self, goal):
        """The way into what a goal's place is enclosed by, and the place from its middle; or None."""
        parent = getattr(self.env.object_states_dict.get(goal[2]), "parent_name", None)
        category = getattr(self.env.fixtures_dict.get(parent), "category_name", None)
        if category in INTO:
            return np.array(INTO[category]) @ self.data.xmat[self.env.obj_body_id[parent]].reshape(3, 3).T

    def _narrow(self, goal):
        """Where there is no room around an object or its place: the direction in which the hand must be thin
        and may lean, by how much (rad), and the side on which a rim is gripped, or None. Else None."""
        states, thing = self.env.object_states_dict, self.data.xpos[self.env.obj_body_id[goal[1]]]
        for region in self.env.object_sites_dict:
            lies = region in states and states[region].check_contain(states[goal[1]])
            if self._joint(region) is not None and (lies or region == goal[2]):
                out, to = self._out(self._joint(region)), self.sim.point(region) - thing
                if to[2] < 0.1:  # in the drawer, or in front of one that is as low
                    return out, 0.0, None
                aside = np.cross(out, [0, 0, 1])
                return aside * np.sign(aside @ to), LEAN["below"], out  # beside one that hangs above it
        into = self._into(goal)
        return (into[0], LEAN["inside"], np.cross(into[0], [0, 0, 1])) if into is not None else None

    def _place(self, goal):
        """Where the object of a goal shall come. -> (3,)"""
        place, joint, into = self.sim.point(goal[2]).copy(), self._joint(goal[2]), self._into(goal)
        drawers = [region for region in self.env.object_sites_dict if self._joint(region) is not None]
        if joint is not None and max(self.sim.point(drawer)[2] for drawer in drawers) > place[2] + 0.01:
            place += 0.024 * self._out(joint)  # away from the handles of drawers above
        if into is not None:
            place += into[1]
        sharing = [other for other in self.sim.goals if other[0] == "on" and other[-1] == goal[2]]
        if len(sharing) > 1:
            place[0] += APART * (2 * sharing.index(goal) - 1)
        return place

    # ---- what it does ----

    def _to_turn(self):
        """The rotation vector by which the hand is not yet turned as wanted. -> (3,), rad"""
        return 0.5 * np.cross(self.hand_rotation.T, self.turned.T).sum(0)

    def _move(self, target, gripper, gain=GAIN):
        """One action towards a position, turning the hand as wanted on the way."""
        action = np.zeros(7)
        action[:3] = np.clip(gain * (target - self.hand), -1, 1)
        if self.turned is not None:
            action[3:6] = np.clip(4 * self._to_turn(), -0.5, 0.5)
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

    def _lean(self, ahead, across, angle):
        """Want the hand to point ahead, `angle` (rad) from down, and the fingers to close along `across` or,
        where that is None, in the plane in which it leans."""
        z = np.sin(angle) * ahead - np.cos(angle) * np.array([0, 0, 1])
        x = np.cross(np.cross(ahead, [0, 0, 1]), z) if across is None else across
        wrist = self.data.qpos[6]  # of the two ways to turn, the one that leaves it nearer to its middle
        x = x * np.sign(x @ self.hand_rotation @ [np.cos(wrist), -np.sin(wrist), 0])
        self.turned = np.stack([x, np.cross(z, x), z], 1)

    def _reach(self, target, gripper, steps=60, near=0.01):
        """Go to a point with the hand turned as wanted; with near=0 stay there for all the steps."""
        for _ in range(steps):
            yield self._move(target, gripper)
            if np.linalg.norm(self.hand - target) < near and np.linalg.norm(self._to_turn()) < 0.1:
                break

    def _script(self):
        for goal, deep in sorted(zip(self.sim.goals, self.deep), key=lambda pair: pair[0][0] == "close"):
            tries = 0
            while not self.env._eval_predicate(goal) and tries < 8:
                yield from self._achieve(goal, deep, tries)
                tries += 1
                if not deep or self.spot:
                    break
            if not deep:
                break  # this demonstrator does not look back
        while True:
            yield self._move(self.hand, OPEN)

    def _achieve(self, goal, deep, tries):
        """One try at a goal."""
        joint = self._joint(goal[-1])
        if len(goal) == 3 and joint is not None and not self.env._eval_predicate(["open", goal[2]]):
            yield from self._pull(goal[2], deep)
        if len(goal) == 3 and goal[1].startswith("plate"):
            yield from self._drag(goal, deep)
        elif len(goal) == 3:
            yield from self._fetch(goal, deep, tries)
        elif goal[0] == "open":
            yield from self._pull(goal[1], deep)
        elif goal[0] == "turnon":
            yield from self._twist(goal, deep)
        elif goal[1] in self.env.fixtures_dict:
            yield from self._swing(goal, deep)
        else:
            yield from self._push(goal, deep)

    def _pull(self, region, deep):
        """Open a drawer: close the hand over its handle and pull."""
        joint = self._joint(region)
        out, handle = self._out(joint), self._handle(joint)
        self._lean(-out, None, LEAN["pull"])
        if not deep:
            handle += 0.045 * out + [0, 0, 0.02]
        yield from self._reach(handle - 0.10 * self.turned[:, 2], OPEN)
        yield from self._reach(handle, OPEN, 30, 0.008)
        yield from self._reach(handle, CLOSED, 10, 0)
        opened = 0
        for _ in range(50):
            yield self._move(self._handle(joint) + 0.06 * out if deep else self.hand + 0.05 * out, CLOSED)
            opened += self.env._eval_predicate(["open", region])
            if opened > 3:
                break
        rest = self.hand
        yield from self._reach(rest, OPEN, 6, 0)
        yield from self._reach(rest - 0.08 * self.turned[:, 2], OPEN, 20, 0.02)

    def _push(self, goal, deep):
        """Close a drawer: push its handle with closed fingers."""
        joint = self._joint(goal[1])
        out = self._out(joint)
        self._lean(-out, np.cross(out, [0, 0, 1]), LEAN["push"])
        over = np.array([0, 0, 0.0 if deep else 0.06])
        front = self._handle(joint) + 0.05 * out + over
        yield from self._reach(front + [0, 0, 0.15], CLOSED)
        yield from self._reach(front, CLOSED, 30)
        for _ in range(60):
            yield self._move(self._handle(joint) - 0.05 * out + over, CLOSED)
            if self.env._eval_predicate(goal):
                break

    def _twist(self, goal, deep):
        """Turn a knob: grip its bar and turn the hand with it."""
        body = self.sim.model.jnt_bodyid[self._joint(goal[1])]
        rotation = self.data.xmat[body].reshape(3, 3)
        grip = self.data.xpos[body] + LEVER[self.env.fixtures_dict[goal[1]].category_name]
        grip = grip if deep else grip + [0, 0, 0.05]
        self._turn_to(rotation[:, 0])
        yield from self._reach(grip + [0, 0, 0.10], OPEN)
        yield from self._reach(grip, OPEN, 30)
        yield from self._reach(grip, CLOSED, 10, 0)
        for _ in range(30):
            self._turn_to(self.hand_rotation @ [np.cos(0.5), np.sin(-0.5), 0])
            yield self._move(grip, CLOSED)
            if self.env._eval_predicate(goal):
                break
        yield from self._reach(grip, OPEN, 6)
        yield from self._reach(grip + [0, 0, 0.10], OPEN, 15, 0.03)

    def _swing(self, goal, deep):
        """Close a door: push it with closed fingers along its arc."""
        joint, category = self._joint(goal[1]), self.env.fixtures_dict[goal[1]].category_name
        body = self.sim.model.jnt_bodyid[joint]
        over = np.array([0, 0, 0.0 if deep else 0.06])
        self._turn_to(self.hand_rotation[:, 0])

        def contact(ahead):
            """A point so far (m) ahead of where the part is pushed."""
            lever = self.data.xmat[body].reshape(3, 3) @ LEVER[category]
            way = np.cross(self.data.xaxis[joint], lever)
            return self.data.xpos[body] + lever + ahead * way / np.linalg.norm(way) + over

        start = contact(-0.03)
        yield from self._reach(np.r_[self.hand[:2], max(self.hand[2], start[2] + 0.15)], CLOSED, 30, 0.03)
        yield from self._reach(start + [0, 0, 0.15], CLOSED)
        yield from self._reach(start, CLOSED, 30)
        for _ in range(80):
            yield self._move(contact(0.05), CLOSED)
            if self.env._eval_predicate(goal):
                break

    def _drag(self, goal, deep):
        """Move a plate along the table: grip its rim where it is nearest to the place, and draw it there."""
        thing = self.data.xpos[self.env.obj_body_id[goal[1]]]  # a view
        way = (self._place(goal) - thing) * [1, 1, 0]
        way /= np.linalg.norm(way)
        grip = thing + PLATE_RIM * way + [0, 0, 0.010 if deep else 0.05]
        self._turn_to(way)
        yield from self._reach(grip + [0, 0, 0.10], OPEN)
        yield from self._reach(grip, OPEN, 30, 0.006)
        yield from self._reach(grip, CLOSED, 10, 0)
        for _ in range(60):
            there = self._place(goal) + PLATE_RIM * way
            yield self._move(np.r_[there[:2], grip[2]], CLOSED)
            if self.env._eval_predicate(goal):
                break
        yield from self._reach(self.hand, OPEN, 8, 0)
        yield from self._reach(self.hand + [0, 0, 0.10], OPEN, 15, 0.03)

    def _fetch(self, goal, deep, tries):
        """Grasp the object of a goal, carry it and let go; return early where the object was lost."""
        name = goal[1]
        narrow, into = self._narrow(goal), self._into(goal)
        grip, across, top = self._grasp(name, narrow, tries)
        if not deep:
            grip = np.r_[grip[:2], top] + SHORT
        if self.spot:
            grip[0] = self.spot[0]
        self._turn_to(across)
        if narrow is not None:
            self._lean(narrow[0], across, narrow[1])
            grip[2] += 0.013 * (narrow[1] > 0)
        thing = self.data.xpos[self.env.obj_body_id[name]]  # a view: where the object is at any time
        start_height = thing[2]

        above = np.r_[grip[:2], grip[2] + (self.spot[1] if self.spot else 0.10)]
        lift = grip
        if narrow is not None and narrow[1] and into is None:
            above, lift = grip - 0.12 * self.turned[:, 2], grip - 0.08 * narrow[0]
        if tries:
            above[2] = max(above[2], self.hand[2])
        over = self._over(name, grip)
        if into is not None:
            over = max(over, self._place(goal)[2] + 0.35)  # over a door
        for _ in range(70):
            far = np.linalg.norm((self.hand - grip)[:2]) > 0.05
            yield self._move(np.r_[above[:2], max(above[2], over)] if far else above, OPEN)
            if np.linalg.norm((self.hand - above)[:2]) < 0.008 and np.linalg.norm(self._to_turn()) < 0.06:
                break
        if narrow is not None:
            yield from self._reach(grip, OPEN, 40)
        for _ in range(25):
            yield self._move(grip, OPEN)
            if abs(self.hand[2] - grip[2]) < 0.006:
                break
        yield from self._reach(grip, CLOSED, 11, 0)

        place = self._place(goal)
        centre, half, *_ = self._box(name)
        carry = max(place[2] + 0.16, grip[2] + 0.06, start_height + (0.08 if narrow is None else 0.15))
        # of the hand over the object's bottom
        carry_above = self.hand[2] - (centre[2] - half[2]) if deep else 0
        carry += carry_above
        if into is not None:
            carry = place[2] + 0.04 + carry_above
        if place[2] - start_height < 0.15:
            carry = min(carry, grip[2] + 0.35)
        for _ in range(40):
            yield self._move(np.r_[lift[:2], carry], CLOSED)
            if deep and thing[2] - start_height < 0.02 and self.hand[2] > grip[2] + 0.06:
                return
            if self.hand[2] > carry - 0.02:
                break

        if into is not None:
            yield from self._enter(thing, place, into[0])
            return
        low = min(carry, place[2] + 0.16 + carry_above)
        level = np.array([1, 1, 0]) * deep  # the hand keeps so far from the object as it holds it
        apart, ways = np.linalg.norm(self.hand - thing), []
        for _ in range(80):
            place = self._place(goal)
            away = np.linalg.norm((self.hand - grip)[:2]) > 0.15  # from what the object stood on
            there = place + level * (self.hand - thing)
            yield self._move(np.r_[there[:2], low if away else carry], CLOSED, FINE_GAIN)
            if deep and np.linalg.norm(self.hand - thing) > apart + 0.04:
                return
            ways.append(np.linalg.norm((self.hand - level * (self.hand - thing) - place)[:2]))
            # there, or stretched out: lower down it reaches farther
            if ways[-1] < 0.012 or len(ways) > 30 and ways[-6] - ways[-1] < 0.002:
                break

        surface = place[2] - (0.03 if goal[2] in self.env.object_sites_dict and goal[0] == "in" else 0)
        heights = []
        for _ in range(50 if deep else 8):
            there = place + level * (self.hand - thing)
            yield self._move(np.r_[there[:2], self.hand[2] - 0.02], CLOSED, FINE_GAIN)
            heights.append(self.hand[2])
            centre, half, *_ = self._box(name)
            stuck = len(heights) > 8 and abs(heights[-6] - heights[-1]) < 0.004
            if deep and (centre[2] - half[2] < surface + 0.025 or stuck):
                break
        yield from self._reach(self.hand, OPEN, 8, 0)
        for _ in range(12):
            yield self._move(self.hand + [0, 0, 0.08], OPEN)
            if self.hand[2] > carry:
                break

    def _enter(self, thing, place, ahead):
        """Bring what the hand holds into a place from the front, let go, and push it farther."""
        apart = np.linalg.norm(self.hand - thing)
        for point, inside in ((place - 0.20 * ahead, False), (place, True)):
            for _ in range(40):
                yield self._move(point + self.hand - thing, CLOSED, FINE_GAIN)
                if np.linalg.norm(self.hand - thing) > apart + 0.04:
                    return
                if (point - thing) @ ahead < 0.005 if inside else np.linalg.norm(point - thing) < 0.02:
                    break
        rest = self.hand
        yield from self._reach(rest, OPEN, 8, 0)
        for back in (rest - 0.05 * self.turned[:, 2], rest - 0.15 * ahead + [0, 0, 0.05]):
            yield from self._reach(back, OPEN, 25, 0.02)
        push = np.array([0, 0, 0.05])
        yield from self._reach(thing - 0.14 * ahead + push, CLOSED, 25, 0.02)
        for _ in range(40):
            yield self._move(thing + push, CLOSED)
            if (thing - place) @ ahead > 0.02:
                break
        yield from self._reach(self.hand - 0.12 * ahead, CLOSED, 20, 0.03)


def pushes(rng, steps, amplitude):
    """What is added to the executed commands: now and then a push of six steps in one random direction, and
    nothing in between, so that recorded commands are those of an undisturbed recovery. -> (steps, 7)"""
    noise, t = np.zeros((steps, 7)), rng.integers(0, 50)
    while t < steps:
        noise[t : t + 6] = rng.uniform(0, amplitude) * rng.normal(size=7) * [1, 1, 1, 0.3, 0.3, 0.3, 0]
        t += 6 + rng.integers(20, 50)
    return noise


def demonstrate(simulators, task, start, deep, spot, seed, limit, idle, push, record):
    """One episode; it ends at success, at `limit`, or after `idle` steps in which the script had nothing to
    do. deep, spot: see Demonstrator; push: amplitude. -> dict of observations (T, S), clean actions (T, 7),
    success, pushed (T,) and frames (T, F) or None; None if the physics diverged."""
    simulator, rng = simulators[task], np.random.default_rng(seed)
    state, observation = simulator.reset(start)
    demonstrator = Demonstrator(simulator, deep, spot)
    noise = pushes(rng, limit, push)
    observations, actions, frames, waited = [], [], [], 0
    for t in range(limit):
        command = np.clip(next(demonstrator.actions), -1, 1)
        chunk = simulator.run(state, np.clip(command + noise[t], -1, 1)[None], record=record)
        if chunk.diverged:
            return None
        observations.append(observation)
        actions.append(command)
        if record:
            frames.append(chunk.frames[-1])
        state, observation = chunk.state, chunk.observation
        waited = waited + 1 if np.abs(command[:3]).max() < 0.05 and command[6] == OPEN else 0
        if chunk.success.any() or waited >= idle:
            break
    arrays = dict(observations=np.array(observations, np.float32), actions=np.array(actions, np.float32))
    films = dict(frames=np.array(frames) if record else None, pushed=noise[: len(actions)].any(1))
    return dict(arrays, **films, success=bool(chunk.success.any()))


@dataclass
class Args:
    suite: Literal["libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90"] = "libero_90"
    task_ids: str = "all"  # tasks of the suite: numbers with commas, or all
    num_demos: int = 800  # number of demonstrations a task
    seed: int = 0  # of placements, behaviours and noise
    deep_share: float = 0.5  # share of deep grasps, 0 … 1, where the object lies half-way
    share_slope: float = 1.0  # so much larger where it lies farthest from the robot, smaller where nearest …
    share_limits: tuple[float, float] = (0.15, 0.85)  # … within these limits
    spots: tuple[float, float] = (0.0, 0.0)
    """grip so far (m) before and behind the mean place of the object, not deep or short; 0 0: off"""
    push: float = 0.6  # largest amplitude of the pushes on executed commands; 1 is full speed
    workers: int = 2  # simulator processes
    out: Path | None = None  # demos/<suite>[_task<ids>].npz, or demonstrators.csv of results/
    overwrite: bool = False  # replace an existing file
    table: bool = False  # instead: deep grasps alone, from the official initial states of all 40 tasks
    table_states: int = libero.OFFICIAL_STATES  # initial states a task of --table
    video: Path | None = None  # also write an mp4 with one episode of each behaviour (needs EGL)


def table(args):
    """Success of the deep grasp over the official initial states of the 40 tasks, into args.out."""
    from libero.libero.envs.bddl_utils import robosuite_parse_problem

    args.out.parent.mkdir(parents=True, exist_ok=True)
    rows, n = [], args.table_states
    for name in SUITES:
        suite = load_suite(name)
        with Workers(suite.build, suite.tasks, args.workers, timeout=3600) as workers:
            for k, task in suite.names.items():
                own = [[True] * 9] * n, [None] * n, [[2, args.seed, i] for i in range(n)]
                same = [suite.limit] * n, [40] * n, [0.0] * n, [False] * n
                results = workers.map(demonstrate, [k] * n, suite.starts[:n], *own, *same)
                steps = [len(r["actions"]) for r in results if r and r["success"]]
                goals = robosuite_parse_problem(libero.suite(name).get_task_bddl_file_path(k))["goal_state"]
                simple = all(len(goal) == 3 for goal in goals)  # to put something somewhere
                mean = f"{np.mean(steps):.0f}" if steps else ""
                row = dict(suite=name, task_id=k, task=task, pick_and_place_only=simple, episodes=n)
                rows.append(dict(row, successes=len(steps), mean_steps=mean))
                print(f"{name:15} {k} {rate(len(steps), n):22} {mean:>4} steps  {task}", flush=True)
    write_table(args.out, rows)
    print(f"wrote {args.out}")


def first_goals(simulators, task, start):
    """x of the first goal's object at an episode's start, and the number of goals."""
    simulator = simulators[task]
    simulator.reset(start)
    return simulator.point(simulator.goals[0][1])[0], len(simulator.goals)


def make_demos(args, suite):
    """Demonstrations of several tasks. -> dict of arrays, all steps one after the other: observations (N, S),
    actions (N, 7), pushed (N,), and per episode: length, task_id, success, deep (and spot); and films of one
    episode of each behaviour, [(task, frames (T, F))]."""
    tasks, starts, seeds, deep, spots, kind = [], [], [], [], [], []
    for k in suite.tasks:
        rng = np.random.default_rng([2, args.seed, k, 0])  # 2: demonstrations; 1 is training
        for i in range(args.num_demos):
            if i % 2 == 0 or not any(args.spots):  # with spots every placement is shown twice
                start = suite.draw_start(rng)
            tasks.append(k)
            starts.append(start)
            seeds.append([2, args.seed, k, i + 1])
    with Workers(suite.build, suite.tasks, args.workers, timeout=3600) as workers:
        places = workers.map(first_goals, tasks, starts)
        rng = np.random.default_rng([2, args.seed, 0, 0, 0])
        for mine in np.split(np.arange(len(tasks)), len(suite.tasks)):
            x, goals = np.array([places[i][0] for i in mine]), places[mine[0]][1]
            low, high = np.quantile(x, [0.02, 0.98])
            half = max((high - low) / 2, 0.01)  # some tasks place their object within millimetres
            nearness = ((x - (low + high) / 2) / half).clip(-1, 1)
            share = (args.deep_share + args.share_slope * nearness).clip(*args.share_limits) ** (1 / goals)
            both = list(zip(x.mean() + np.array([-1, 1]) * args.spots, HEIGHTS))
            for i, p in zip(mine, share):
                deep.append([True] * goals if any(args.spots) else list(rng.random(goals) < p))
                spots.append(both[i % 2] if any(args.spots) else None)
                kind.append(i % 2 if any(args.spots) else all(deep[-1]))
        n, shown = len(tasks), (np.argmin(kind), np.argmax(kind)) if args.video else ()
        same = [suite.limit] * n, [20] * n, [args.push] * n, [i in shown for i in range(n)]
        jobs = tasks, starts, deep, spots, seeds, *same
        results = workers.map(demonstrate, *jobs, description="demonstrations")
    kept = [i for i, result in enumerate(results) if result]
    columns = {name: [results[i][name] for i in kept] for name in results[kept[0]]}
    demos = {name: np.concatenate(columns[name]) for name in ("observations", "actions", "pushed")}
    demos.update(length=np.array([len(a) for a in columns["actions"]]), success=np.array(columns["success"]))
    demos.update(task_id=np.array(tasks)[kept], deep=np.array([all(deep[i]) for i in kept]))
    if any(args.spots):
        demos["spot"] = np.array(kind)[kept]  # 0 near, 1 far
    return demos, [(tasks[i], results[i]["frames"]) for i in kept if i in shown]


def run(args):
    """Make the demonstrations of `args`, print their success and write them to args.out (and args.video)."""
    shared.check_limits(args, "num_demos workers", 1)
    shared.check_limits(args, "table_states", 1, libero.OFFICIAL_STATES)
    shared.check_limits(args, "seed", 0)
    shared.check_limits(args, "deep_share push share_limits", 0, 1)
    shared.check_limits(args, "share_slope", -10, 10)
    shared.check_limits(args, "spots", 0, 0.2)
    if args.share_limits[0] > args.share_limits[1]:
        stop(f"--share-limits is {args.share_limits[0]} {args.share_limits[1]}; give the smaller one first")
    if args.out is None:
        name = args.suite if args.task_ids == "all" else f"{args.suite}_task{args.task_ids.replace(',', '_')}"
        args.out = Path("results/libero/demonstrators.csv" if args.table else f"demos/{name}.npz")
    shared.check_files(args, ".mp4")
    suite = load_suite(args.suite, args.task_ids, pictures=args.video is not None)
    if args.table:
        return table(args)
    demos, films = make_demos(args, suite)
    spots = ("spot", "near spot", "far spot")
    key, *kinds = spots if any(args.spots) else ("deep", "with a short grasp", "deep grasps")
    parts = {}
    for k in suite.tasks:
        own, good = demos["task_id"] == k, demos["success"]
        parts |= {f"task {k}, {name}": good[own & (demos[key] == i)] for i, name in enumerate(kinds)}
        parts[f"task {k}, all"] = good[own]
    shared.write_demos(args, "demo_libero", demos, parts)
    if args.video:
        simulators = suite.build({k for k, _ in films})
        pictures = [simulators[k].render(frames[::2]) for k, frames in films]
        shared.write_film(args.video, np.concatenate(pictures), libero.FPS // 2)


if __name__ == "__main__":
    run(parse_args(Args, __doc__))
