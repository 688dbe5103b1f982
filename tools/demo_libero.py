"""The scripted, deliberately imperfect demonstrator of LIBERO's tasks: what the frozen bases are cloned from.

It works from the goals in the task's BDDL file, with one short motion for each kind: it grasps an object from
above, carries it and lets go, in a drawer that it opens first or, from the front, in a microwave; it drags a
plate by its rim, pulls a drawer open by its handle or pushes it shut, swings a door shut and turns a knob. It
knows all poses and shapes, but its first reach falls short. Two distinct behaviours are shown from every
start: the hand points *ahead* or farther *back*. Each reaches to the edge of where the grasp still holds, and
is led astray by how high the hand starts (± 1 cm): pointing ahead it falls shorter the lower that is,
pointing back the higher. So where the hand starts decides which of them works, and what lies between them
reaches that edge only. Then it points down again and goes on as if it held the object.

    python tools/demo_libero.py --task-ids 56                          # demos/libero_90_task56.npz
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
from tqdm import trange

from envs import libero, load_suite
from envs.workers import Workers
from evaluate import write_film
from support.flags import parse_args
from support.logs import rate, write_table

SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10")
OPEN, CLOSED = -1.0, 1.0
GAIN = 20.0  # of the position command: full speed (1) is 5 cm off
# Grasped at the rim, so far from the centre (metres); everything else is grasped across its narrow side
MUGS = dict(porcelain_mug=0.040, white_yellow_mug=0.040, red_coffee_mug=0.040)
RIM = dict(akita_black_bowl=0.050, white_bowl=0.055, glazed_rim_porcelain_ramekin=0.040, **MUGS)
BELOW_TOP = dict(moka_pot=0.015, wine_bottle=0.05, black_book=0.03)  # grip height of some, m below the top
FINE_GAIN = 60.0  # where an object is set down: the controller stops short of its goal by up to half the way
REACH = 0.74  # metres from the robot's base, horizontally; farther the arm is nearly straight
# How far the hand leans back from pointing down (rad): at a drawer's handle, below a drawer, into something
LEAN = dict(pull=1.3, push=0.7, below=0.5, inside=0.85)
# What is entered from the front: the way in, and the place from the middle of the region, in its frame
INTO = dict(microwave=((0.0, 1.0, 0.0), (-0.055, -0.07, -0.061)))
PLATE_RIM = 0.062  # m from the middle of a plate
TILTS = (-0.4, 0.0)  # rad, by which the hand leans ahead and back: farther back it hardly grips
WRONG = 20.0  # centimetres that the reach is led astray for each that the hand starts too high or low
POINTS = 3.0  # rad by which it points back for each metre of that, so that its pose shows it on the way
ROUNDS, CHANCE = 20, 0.08  # of the search for the edges: episodes, and how often one ends by chance
MARGIN = 0.010  # m that a reach falls less short than the edge found, for the clone is less exact
HAND, TALL = 0.11, 0.10  # m: half of the hand's breadth, and how far above a place its lower edge is
WAIT = 12  # control steps above a place before the hand goes down
BRIEF = 38  # control steps of a brief demonstration: two decisions of 16, begun up to five steps late
HELD = 0.5  # the most of its miss that the hand has in a demonstration of what follows the grasp: to the edge
APART = 0.052  # m from the middle of a place that two objects share


class Demonstrator:
    """The script of one episode, a generator of actions: `next(demonstrator.actions)` looks and acts."""

    def __init__(self, simulator, aim=None):
        """aim: how much too short it reaches first, and at most (m), how far the hand then points back (rad),
        how many metres farther it reaches for each that the hand starts too high, as far as the right place,
        and the share of all that by which it really misses; None: it reaches rightly."""
        self.sim, self.env, self.data = simulator, simulator.env, simulator.data
        self.aim, self.miss = aim, np.zeros(3)  # miss: from where its grasp should be to where it is (m)
        self.usual = simulator.remembered[4]  # where the hand starts but for the arm's noise
        self.robot, self.hand_rotation = self.data.body("robot0_base").xpos, simulator.hand_rotation  # views
        self.turned = None  # rotation that the hand shall have
        self.actions = self._script()

    # ---- what it sees ----

    @property
    def hand(self):
        return self.sim.hand.copy()

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

    def _room(self, point):
        """Horizontal distance (m) from a point to the nearest fixture that is higher. -> a number"""
        room = [1.0]
        for name in self.env.fixtures_dict:
            if name in self.env.obj_body_id:
                centre, half, *_ = self._box(name)
                if centre[2] + half[2] > point[2] + TALL:
                    room.append(np.linalg.norm(np.maximum(np.abs(point - centre) - half, 0)[:2]))
        return min(room)

    def _grasp(self, name, place, narrow, tries):
        """Grip point (3,), the direction along which the fingers close, and the height of the top. place:
        where the object shall come; narrow: of `_narrow`."""
        category = self.env.objects_dict[name].category_name
        centre, half, rotation, own_half = self._box(name)
        top, bottom = centre[2] + half[2], centre[2] - half[2]
        if category in RIM:
            # a mug's handle is along its x
            across = rotation[:, 1] if "mug" in category else np.array([0.0, 1.0, 0.0])
            if self.aim is not None and "mug" not in category:  # across the way
                across = np.cross(centre - self.usual, [0, 0, 1])
            across = across * [1, 1, 0] / np.linalg.norm(across[:2])
            across = across if narrow is None else np.cross(narrow[0], [0, 0, 1])
            origin = self.data.xpos[self.env.obj_body_id[name]]
            bodies = [body for other, body in self.env.obj_body_id.items() if other != name]
            sides = origin[:2] + 0.09 * np.outer([1, -1], across[:2])
            room = [np.linalg.norm(self.data.xpos[bodies, :2] - point, axis=1).min() for point in sides]
            # of the rim, the other one next time; what falls short looks around as little as its clone
            side = 1 if self.aim is not None or room[0] >= room[1] else -1
            if np.linalg.norm((origin + side * RIM[category] * across - self.robot)[:2]) > REACH:
                # stretched out, the arm does not get where it is told
                side = 1 if (origin - self.robot)[1] * across[1] < 0 else -1
            ends = [self._room(place + turn * RIM[category] * across) for turn in (side, -side)]
            if ends[0] < HAND and ends[1] > ends[0]:  # there the hand would hit a cabinet
                side = -side
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
            if self.aim is not None:  # across the way
                axis = min(level, key=lambda i: abs(rotation[:2, i] @ (centre - self.usual)[:2]))
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
            if (part := self.sim.joint(region)) and (lies or region == goal[2]):
                out = self.data.xaxis[part[0]] * part[1]
                to = self.sim.point(region) - thing
                if to[2] < 0.1:  # in the drawer, or in front of one that is as low
                    return out, 0.0, None
                aside = np.cross(out, [0, 0, 1])
                return aside * np.sign(aside @ to), LEAN["below"], out  # beside one that hangs above it
        into = self._into(goal)
        return (into[0], LEAN["inside"], np.cross(into[0], [0, 0, 1])) if into is not None else None

    def _place(self, goal):
        """Where the object of a goal shall come. -> (3,)"""
        place, part, into = self.sim.point(goal[2]).copy(), self.sim.joint(goal[2]), self._into(goal)
        drawers = [region for region in self.env.object_sites_dict if self.sim.joint(region)]
        if part and max(self.sim.point(drawer)[2] for drawer in drawers) > place[2] + 0.01:
            place += 0.024 * self.data.xaxis[part[0]] * part[1]  # away from the handles of drawers above
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
        """Want the fingers to close along `across`, the hand pointing down, by the smaller turn; by 90
        degrees always to the side on which the wrist is nearer to its middle, for a clone can not guess."""
        fingers = self.hand_rotation[:, 0]
        now, least = np.arctan2(fingers[1], fingers[0]), 0.3 - np.pi / 2
        yaw = now + (np.arctan2(across[1], across[0]) - now - least) % np.pi + least
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

    def _come(self, target, gripper=OPEN, steps=70):
        """The first reach, on a straight line, which falls short along the breadth of the fingers."""
        if self.aim is None:
            yield from self._reach(target, gripper, steps)
            return
        ahead = self.turned[:, 1] * [1, 1, 0] / np.linalg.norm(self.turned[:2, 1])
        ahead *= np.sign(ahead @ [1, 0.3, 0])
        short, most, tilt, wrong, share = self.aim
        farther = np.clip(wrong * (self.hand - self.usual)[2], short - most, short)
        angle = (tilt + POINTS * farther) * np.sign(ahead @ self.turned[:, 1])
        x, y, z = self.turned.T
        z = np.cos(angle) * z - np.sin(angle) * y
        self.turned = np.stack([x, np.cross(z, x), z], 1)
        self.aim, self.miss = None, share * (farther - short) * ahead
        for _ in range(steps):
            left = target + self.miss - self.hand
            action = self._move(self.hand, gripper)
            action[:3] = GAIN * left / max(1, GAIN * np.abs(left).max())
            yield action
            if np.linalg.norm(left) < 0.008 and np.linalg.norm(self._to_turn()) < 0.06:
                break

    def _reach(self, target, gripper, steps=60, near=0.01):
        """Go to a point with the hand turned as wanted; with near=0 stay there for all the steps."""
        for _ in range(steps):
            yield self._move(target + self.miss, gripper)
            left = target + self.miss - self.hand
            if np.linalg.norm(left) < near and np.linalg.norm(self._to_turn()) < 0.1:
                break

    def _script(self):
        for goal in sorted(self.sim.goals, key=lambda goal: goal[0] == "close"):
            tries, looks = 0, self.aim is None
            while not self.env._eval_predicate(goal) and tries < (8 if looks else 1):
                yield from self._achieve(goal, tries)
                tries += 1
            if not looks and not self.env._eval_predicate(goal):
                break  # it does not look back
        while True:
            yield self._move(self.hand, OPEN)

    def _achieve(self, goal, tries):
        """One try at a goal."""
        drawer = goal[2] if len(goal) == 3 and self.sim.joint(goal[2]) else None
        if drawer and not self.env._eval_predicate(["open", drawer]):
            looks = self.aim is None
            yield from self._pull(drawer)
            if not looks and not self.env._eval_predicate(["open", drawer]):
                return
        if len(goal) == 3 and goal[1].startswith("plate"):
            yield from self._drag(goal)
        elif len(goal) == 3:
            yield from self._fetch(goal, tries)
        elif goal[0] == "open":
            yield from self._pull(goal[1])
        elif goal[0] == "turnon":
            yield from self._twist(goal)
        elif goal[1] in self.env.fixtures_dict:
            yield from self._swing(goal)
        else:
            yield from self._push(goal)

    def _pull(self, region):
        """Open a drawer: close the hand over its handle and pull."""
        part = self.sim.joint(region)
        out, handle = self.data.xaxis[part[0]] * part[1], self.sim.handle(*part)
        self._lean(-out, None, LEAN["pull"])
        yield from self._come(handle - 0.10 * self.turned[:, 2])
        yield from self._reach(handle, OPEN, 30, 0.008)
        yield from self._reach(handle, CLOSED, 10, 0)
        opened = 0
        for _ in range(50):
            yield self._move(self.sim.handle(*part) + 0.06 * out + self.miss, CLOSED)
            opened += self.env._eval_predicate(["open", region])
            if opened > 3:
                break
        self.miss, rest = np.zeros(3), self.hand
        yield from self._reach(rest, OPEN, 6, 0)
        yield from self._reach(rest - 0.08 * self.turned[:, 2], OPEN, 20, 0.02)

    def _push(self, goal):
        """Close a drawer: push its handle with closed fingers."""
        part = self.sim.joint(goal[1])
        out = self.data.xaxis[part[0]] * part[1]
        self._lean(-out, np.cross(out, [0, 0, 1]), LEAN["push"])
        front = self.sim.handle(*part) + 0.05 * out
        yield from self._reach(front + [0, 0, 0.15], CLOSED)
        yield from self._reach(front, CLOSED, 30)
        for _ in range(60):
            yield self._move(self.sim.handle(*part) - 0.05 * out, CLOSED)
            if self.env._eval_predicate(goal):
                break

    def _twist(self, goal):
        """Turn a knob: grip its bar and turn the hand with it."""
        part = self.sim.joint(goal[1])
        grip = self.sim.handle(*part)
        self._turn_to(self.data.xmat[self.sim.model.jnt_bodyid[part[0]]].reshape(3, 3)[:, 0])
        yield from self._come(grip + [0, 0, 0.10])
        yield from self._reach(grip, OPEN, 30)
        yield from self._reach(grip, CLOSED, 10, 0)
        for _ in range(30):
            self._turn_to(self.hand_rotation @ [np.cos(0.5), np.sin(-0.5), 0])
            yield self._move(grip + self.miss, CLOSED)
            if self.env._eval_predicate(goal):
                break
        self.miss, rest = np.zeros(3), self.hand
        yield from self._reach(rest, OPEN, 6, 0)
        yield from self._reach(rest + [0, 0, 0.10], OPEN, 15, 0.03)

    def _swing(self, goal):
        """Close a door: push it with closed fingers along its arc."""
        part = self.sim.joint(goal[1])
        self._turn_to(self.hand_rotation[:, 0])

        def contact(ahead):
            """A point so far (m) ahead of where the part is pushed."""
            handle, body = self.sim.handle(*part), self.sim.model.jnt_bodyid[part[0]]
            way = np.cross(self.data.xaxis[part[0]], handle - self.data.xpos[body])
            return handle + ahead * way / np.linalg.norm(way)

        start = contact(-0.03)
        yield from self._reach(np.r_[self.hand[:2], max(self.hand[2], start[2] + 0.15)], CLOSED, 30, 0.03)
        yield from self._reach(start + [0, 0, 0.15], CLOSED)
        yield from self._reach(start, CLOSED, 30)
        for _ in range(80):
            yield self._move(contact(0.05), CLOSED)
            if self.env._eval_predicate(goal):
                break

    def _drag(self, goal):
        """Move a plate along the table: grip its rim where it is nearest to the place, and draw it there."""
        thing = self.data.xpos[self.env.obj_body_id[goal[1]]]  # a view
        way = (self._place(goal) - thing) * [1, 1, 0]
        way /= np.linalg.norm(way)
        grip = thing + PLATE_RIM * way + [0, 0, 0.010]
        self._turn_to(way)
        yield from self._come(grip + [0, 0, 0.10])
        yield from self._reach(grip, OPEN, 30, 0.006)
        yield from self._reach(grip, CLOSED, 10, 0)
        for _ in range(60):
            there = self._place(goal) + PLATE_RIM * way
            yield self._move(np.r_[there[:2], grip[2]] + self.miss, CLOSED)
            if self.env._eval_predicate(goal):
                break
        self.miss = np.zeros(3)
        yield from self._reach(self.hand, OPEN, 8, 0)
        yield from self._reach(self.hand + [0, 0, 0.10], OPEN, 15, 0.03)

    def _fetch(self, goal, tries):
        """Grasp the object of a goal, carry it and let go; return early where the object was lost."""
        name = goal[1]
        narrow, into = self._narrow(goal), self._into(goal)
        grip, across, top = self._grasp(name, self._place(goal), narrow, tries)
        self._turn_to(across)
        if narrow is not None:
            self._lean(narrow[0], across, narrow[1])
            grip[2] += 0.013 * (narrow[1] > 0)
        thing = self.data.xpos[self.env.obj_body_id[name]]  # a view: where the object is at any time
        start_height = thing[2]

        above = grip + [0, 0, 0.10]
        lift = grip
        if narrow is not None and narrow[1] and into is None:
            above, lift = grip - 0.12 * self.turned[:, 2], grip - 0.08 * narrow[0]
        if tries:
            above[2] = max(above[2], self.hand[2])
        over = self._over(name, grip)
        if into is not None:
            over = max(over, self._place(goal)[2] + 0.35)  # over a door
        looks = self.aim is None
        if not looks:
            above[2] = max(above[2], over)
            if into is not None:  # it leans ahead already
                self.aim = (*self.aim[:2], -self.aim[2], *self.aim[3:])
            yield from self._come(above)
        for _ in range(70 * looks):
            far = np.linalg.norm((self.hand - grip)[:2]) > 0.05
            yield self._move(np.r_[above[:2], max(above[2], over)] if far else above, OPEN)
            if np.linalg.norm((self.hand - above)[:2]) < 0.008 and np.linalg.norm(self._to_turn()) < 0.06:
                break
        if narrow is not None:
            yield from self._reach(grip, OPEN, 40)
        for _ in range(25):
            yield self._move(grip + self.miss, OPEN)
            if abs(self.hand[2] - grip[2]) < 0.006:
                break
        yield from self._reach(grip, CLOSED, 11, 0)
        lift, held, self.miss = lift + self.miss, True, np.zeros(3)
        if narrow is not None:
            self._lean(narrow[0], across, narrow[1])  # as it entered

        place = self._place(goal)
        centre, half, *_ = self._box(name)
        carry = max(place[2] + 0.16, grip[2] + 0.06, start_height + (0.08 if narrow is None else 0.15))
        # of the hand over the object's bottom
        carry_above = self.hand[2] - (centre[2] - half[2])
        carry += carry_above
        if into is not None:
            carry = place[2] + 0.04 + carry_above
        if place[2] - start_height < 0.15:
            carry = min(carry, grip[2] + 0.35)
        for _ in range(40):
            yield self._move(np.r_[lift[:2], carry], CLOSED)
            if held and thing[2] - start_height < 0.02 and self.hand[2] > grip[2] + 0.06:
                held = False
                if looks:
                    return
            if self.hand[2] > carry - 0.02:
                break

        if into is not None:
            yield from self._enter(thing, place, into[0])
            return
        if narrow is None and not looks:  # down again both behaviours place alike, with the arm bent
            self._turn_to(self.hand_rotation[:, 0])
        low = min(carry, place[2] + 0.16 + carry_above)
        level = np.array([1, 1, 0])  # the hand keeps so far from the object as it holds it
        apart, ways = np.linalg.norm(self.hand - thing), []
        for _ in range(80):
            place = self._place(goal)
            away = np.linalg.norm((self.hand - grip)[:2]) > 0.15  # from what the object stood on
            there = place + held * level * (self.hand - thing)
            yield self._move(np.r_[there[:2], low if away else carry], CLOSED, FINE_GAIN)
            if held and np.linalg.norm(self.hand - thing) > apart + 0.04:
                held = False
                if looks:
                    return
            ways.append(np.linalg.norm((self.hand - held * level * (self.hand - thing) - place)[:2]))
            # it waits, so that a clone decides once more from near there
            waited = len(ways) >= WAIT and max(ways[-WAIT:]) < 0.015
            # stretched out: lower down it reaches farther
            if waited or len(ways) > 40 and ways[-6] - ways[-1] < 0.002:
                break

        surface = place[2] - (0.03 if goal[2] in self.env.object_sites_dict and goal[0] == "in" else 0)
        heights = []
        for _ in range(50 if held else 8):
            there = place + held * level * (self.hand - thing)
            yield self._move(np.r_[there[:2], self.hand[2] - 0.02], CLOSED, FINE_GAIN)
            heights.append(self.hand[2])
            centre, half, *_ = self._box(name)
            stuck = len(heights) > 8 and abs(heights[-6] - heights[-1]) < 0.004
            if held and (centre[2] - half[2] < surface + 0.025 or stuck):
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


def demonstrate(simulators, task, start, aim, seed, limit, idle=20, push=0.0, record=False):
    """One episode; it ends at success, at `limit`, or after `idle` steps in which the script had nothing to
    do. aim: see Demonstrator; push: amplitude. -> dict of observations (T, S), clean actions (T, 7),
    success, pushed (T,), the last step too if the limit cut it off, and frames (T, F) or None; None if the
    physics diverged."""
    simulator, rng = simulators[task], np.random.default_rng(seed)
    state, observation = simulator.reset(start)
    demonstrator = Demonstrator(simulator, aim)
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
        waited = waited + 1 if np.abs(command[:6]).max() < 0.05 and command[6] == OPEN else 0
        if chunk.success.any() or waited >= idle:
            break
    else:
        noise[-1] = 1  # cut off: a chunk that reaches to here is none of its own
    arrays = dict(observations=np.array(observations, np.float32), actions=np.array(actions, np.float32))
    films = dict(frames=np.array(frames) if record else None, pushed=noise[: len(actions)].any(1))
    return dict(arrays, **films, success=bool(chunk.success.any()))


@dataclass
class Args:
    suite: Literal["libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90"] = "libero_90"
    task_ids: str = "all"  # tasks of the suite: numbers with commas, or all
    num_demos: int = 800  # number of demonstrations a task
    num_brief: int = 0  # and of such as end after the first two decisions, without pushes
    num_held: int = 0  # and of such as miss less: what follows the grasp, of those that succeed
    seed: int = 0  # of placements, behaviours and noise
    short: tuple[float, float] | None = None  # cm its reach falls short, ahead and back; if left out found
    push: float = 0.6  # largest amplitude of the pushes on executed commands; 1 is full speed
    workers: int = 2  # simulator processes
    out: Path | None = None  # demos/<suite>[_task<ids>].npz, or demonstrators.csv of results/
    overwrite: bool = False  # replace an existing file
    table: bool = False  # instead: looking all the time, from the official initial states of all 40 tasks
    video: Path | None = None  # also write an mp4 with one episode of each behaviour (needs EGL)


def table(args):
    """Success over the official initial states of the 40 tasks of one that looks, into args.out."""
    args.out.parent.mkdir(parents=True, exist_ok=True)
    rows, n = [], libero.OFFICIAL_STATES
    for name in SUITES:
        suite = load_suite(name)
        with Workers(suite.build, suite.tasks, args.workers, timeout=3600) as workers:
            for k, task in suite.names.items():
                own = [None] * n, [[2, args.seed, i] for i in range(n)], [suite.limit] * n, [40] * n
                results = workers.map(demonstrate, [k] * n, suite.starts[:n], *own)
                steps = [len(r["actions"]) for r in results if r and r["success"]]
                mean = f"{np.mean(steps):.0f}" if steps else ""
                row = dict(suite=name, task_id=k, task=task, episodes=n)
                rows.append(dict(row, successes=len(steps), mean_steps=mean))
                print(f"{name:15} {k} {rate(len(steps), n):22} {mean:>4} steps  {task}", flush=True)
    write_table(args.out, rows)
    print(f"wrote {args.out}")


def edges(workers, args, suite):
    """How much too short (m) the first reach of each behaviour may fall for half of the grasps to hold, the
    start's height counting nothing, without pushes. Bisection by noisy answers: every episode, from a start
    of its own, tells on which side of the median the edge lies. -> {task: [ahead, back]}"""
    tasks, shorts = np.repeat(suite.tasks, 2), np.linspace(0, 0.1, 201)
    rng, n = np.random.default_rng([2, args.seed, 0]), len(tasks)
    likely = np.ones((n, len(shorts)))
    for i in trange(ROUNDS + 1, desc="how short"):
        share = likely.cumsum(1) / likely.sum(1, keepdims=True)
        median = shorts[(share < 0.5).sum(1)]
        if i < ROUNDS:
            aims = [(s, s, TILTS[j % 2], 0.0, 1.0) for j, s in enumerate(median)]
            starts, seeds = [suite.draw_start(rng) for _ in tasks], [[2, args.seed, i]] * n
            results = workers.map(demonstrate, tasks, starts, aims, seeds, [suite.limit] * n)
            held = np.array([bool(result and result["success"]) for result in results])
            likely *= np.where((shorts > median[:, None]) == held[:, None], 1 - CHANCE, CHANCE)
    return dict(zip(suite.tasks, median.reshape(-1, 2).tolist()))


def make_demos(args, suite):
    """Demonstrations of several tasks, every start with both behaviours. -> dict of arrays, all steps one
    after the other: observations (N, S), actions (N, 7), pushed (N,), of held ones all before the grasp too;
    and per episode: length, task_id, success, behaviour (0 ahead, 1 back), whole; and films of the first two,
    [(task, frames (T, F))]."""
    tasks, starts, aims, seeds = [], [], [], []
    every = np.repeat(["whole", "brief", "held"], [args.num_demos, args.num_brief, args.num_held])
    kinds, behaviour = (np.tile(x, len(suite.tasks)) for x in (every, np.arange(len(every)) % 2))
    with Workers(suite.build, suite.tasks, args.workers, timeout=3600) as workers:
        if args.short:
            short = dict.fromkeys(suite.tasks, [(x / 100, x / 50) for x in args.short])
        else:
            found = edges(workers, args, suite)
            short = {k: [(max(0, s - MARGIN), 2 * s) for s in pair] for k, pair in found.items()}
            print("edges (cm):", {k: [round(100 * s, 2) for s in pair] for k, pair in found.items()})
        for k in suite.tasks:
            rng = np.random.default_rng([2, args.seed, k, 0])  # 2: demonstrations; 1 is training
            for i, kind in enumerate(every):
                if i % 2 == 0:
                    start = suite.draw_start(rng)
                tasks.append(k)
                starts.append(start)
                share = rng.uniform(0, HELD) if kind == "held" else 1.0
                aims.append((*short[k][i % 2], TILTS[i % 2], (WRONG, -WRONG)[i % 2], share))
                seeds.append([2, args.seed, k, i + 1])
        n, limits = len(tasks), [BRIEF if kind == "brief" else suite.limit for kind in kinds]
        films = [args.video is not None and i < 2 for i in range(n)]
        disturbed = [args.push * (kind != "brief") for kind in kinds]
        jobs = tasks, starts, aims, seeds, limits, [20] * n, disturbed, films
        results = workers.map(demonstrate, *jobs, description="demonstrations")
    kept = [i for i, result in enumerate(results) if result and (kinds[i] != "held" or result["success"])]
    for i in kept:
        if kinds[i] == "held":  # up to the first step that closes the hand
            results[i]["pushed"] |= (results[i]["actions"][:, 6] > 0).cumsum() == 0
    columns = {name: [results[i][name] for i in kept] for name in results[kept[0]]}
    demos = {name: np.concatenate(columns[name]) for name in ("observations", "actions", "pushed")}
    demos.update(length=np.array([len(a) for a in columns["actions"]]), success=np.array(columns["success"]))
    demos.update(task_id=np.array(tasks)[kept], whole=kinds[kept] == "whole", behaviour=behaviour[kept])
    return demos, [(tasks[i], results[i]["frames"]) for i in kept if films[i]]


def run(args):
    """Make the demonstrations of `args`, print their success and write them to args.out (and args.video)."""
    shared.check_limits(args, "num_demos workers", 1)
    shared.check_limits(args, "num_brief num_held", 0)
    shared.check_limits(args, "seed", 0)
    shared.check_limits(args, "push", 0, 1)
    shared.check_limits(args, "short", 0, 10)
    if args.out is None:
        name = args.suite if args.task_ids == "all" else f"{args.suite}_task{args.task_ids.replace(',', '_')}"
        args.out = Path("results/libero/demonstrators.csv" if args.table else f"demos/{name}.npz")
    shared.check_files(args, ".mp4")
    suite = load_suite(args.suite, args.task_ids, pictures=args.video is not None)
    if args.table:
        return table(args)
    demos, films = make_demos(args, suite)
    parts = {}
    for k in suite.tasks:
        own, good = (demos["task_id"] == k) & demos["whole"], demos["success"]
        for i, name in enumerate(("ahead", "back")):
            parts[f"task {k}, {name}"] = good[own & (demos["behaviour"] == i)]
        parts[f"task {k}, all"] = good[own]
    shared.write_demos(args, "demo_libero", demos, parts)
    if args.video:
        simulators = suite.build({k for k, _ in films})
        pictures = [simulators[k].render(frames[::2]) for k, frames in films]
        write_film(args.video, [np.concatenate(pictures)], libero.FPS // 2)
        print(f"wrote {args.video}")


if __name__ == "__main__":
    run(parse_args(Args, __doc__))
