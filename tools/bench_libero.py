"""Speed of LIBERO's simulation on this machine, in one go: raw physics, our loop, the stock environment, resets, memory.

    python tools/bench_libero.py                                # butter/tray; let nothing else run
    python tools/bench_libero.py --suite libero_goal            # all ten tasks in every worker

Raw physics is the same demonstration with the torques already known: 25 mj_step a control step and nothing else. So the ratio is the
price of controller, success predicate and observation.
"""

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import numpy as np
import psutil

import env_libero
import mujoco
from demo_libero import Demonstrator
from env_libero import Simulator, Workers, libero_problem, official, parse_task_ids, placed, quiet, suite
from run_files import parse_args, stop


@dataclass
class Args:
    suite: Literal["libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90"] = "libero_90"
    """the suite"""
    task_ids: str | None = None
    """tasks of the suite: numbers with commas, or all; 56 for libero_90 and all for the others if left out"""
    steps: int = 80
    """control steps of a measurement"""
    repeats: int = 5
    """measurements, of which the fastest counts for raw and for ours alike"""
    num_workers: int = min(os.cpu_count() or 1, 16)
    """processes of the last measurement"""


def seconds(function, repeats):
    """Shortest time of a call: what the machine can do when nothing interrupts."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def one_task(args, k):
    """Milliseconds: raw control step, ours, stock, placing, reset with settling."""
    simulator = Simulator(args.suite, k)
    state, _ = simulator.reset(official(0))
    demonstrator, actions, now = Demonstrator(simulator, [True] * 9), [], state
    for _ in range(args.steps):  # a demonstration: reaching, grasping, carrying
        actions.append(next(demonstrator.actions))
        now = simulator.run(now, actions[-1][None]).state
    actions = np.array(actions)
    model, data = simulator.model, simulator.data

    torques = []  # of every substep, as our loop computes them
    step2 = mujoco.mj_step2
    env_libero.mujoco.mj_step2 = lambda model, data: (torques.append(data.ctrl.copy()), step2(model, data))
    simulator.run(state, actions)
    env_libero.mujoco.mj_step2 = step2

    def raw():
        simulator._set_state(state)
        for torque in torques:
            data.ctrl[:] = torque
            mujoco.mj_step(model, data)

    def ours():
        simulator.run(state, actions)

    times = dict(raw=seconds(raw, args.repeats) / args.steps, ours=seconds(ours, args.repeats) / args.steps)
    times["place"] = seconds(lambda: simulator._place(1), args.repeats)
    times["reset"] = seconds(lambda: simulator.reset(placed(1)), args.repeats)
    with quiet():
        from libero.libero.envs.env_wrapper import ControlEnv

        stock = ControlEnv(suite(args.suite).get_task_bddl_file_path(k), use_camera_obs=False, has_offscreen_renderer=False, hard_reset=False)
        stock.seed(0)
        stock.reset()
        stock.set_init_state(simulator.official_states[0])
        start = time.perf_counter()
        for action in actions[:20]:
            stock.step(action)
        times["stock"] = (time.perf_counter() - start) / len(actions[:20])
    return {name: 1000 * value for name, value in times.items()}


if __name__ == "__main__":
    args = parse_args(Args, __doc__)
    for name in ("steps", "repeats", "num_workers"):
        if getattr(args, name) < 1:
            stop(f"--{name.replace('_', '-')} is {getattr(args, name)}; give at least 1")
    if problem := libero_problem():
        stop(problem)
    try:
        task_ids = parse_task_ids(args.suite, args.task_ids or ("56" if args.suite == "libero_90" else "all"))
    except ValueError as error:
        stop(str(error))
    rows = []
    for k in task_ids:
        rows.append(one_task(args, k))
        r = rows[-1]
        print(f"task {k:2d}: raw {r['raw']:.2f} ms, ours {r['ours']:.2f} ms ({r['ours'] / r['raw']:.2f} x), stock {r['stock']:.1f} ms "
              f"({r['stock'] / r['raw']:.1f} x), placing {r['place']:.1f} ms, reset with settling {r['reset']:.0f} ms", flush=True)  # fmt: skip
    print(f"median ratio: ours {np.median([r['ours'] / r['raw'] for r in rows]):.2f}, stock {np.median([r['stock'] / r['raw'] for r in rows]):.1f}")

    start = time.perf_counter()
    with Workers(args.num_workers, args.suite, task_ids) as workers:
        tasks = [task_ids[i % len(task_ids)] for i in range(32)]
        states, _ = workers.reset(tasks, [placed(i) for i in range(32)])
        print(f"{args.num_workers} workers ready and 32 environments started after {time.perf_counter() - start:.1f} s")
        actions = np.random.default_rng(0).uniform(-0.3, 0.3, (32, 16, 7))
        workers.run(tasks, states, actions)
        start = time.perf_counter()
        for _ in range(3):
            states = [chunk.state for chunk in workers.run(tasks, states, actions)]
        print(f"32 environments on {args.num_workers} workers: {3 * 32 * 16 / (time.perf_counter() - start):.0f} control steps/s")
        family = [psutil.Process(), *psutil.Process().children(recursive=True)]
        print(f"memory: {sum(p.memory_info().rss for p in family) / 2**30:.2f} GiB over {len(family)} processes, this one with its own copy")
