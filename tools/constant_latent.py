"""The best latent that is one in every state, and the best of N draws: what a base does without an actor.

    python tools/constant_latent.py --task aloha                     # three seeds
    python tools/constant_latent.py --task libero_goal --per-task --states tuning    # one for each task

The cross-entropy method finds the vector (a "golden ticket", arXiv 2603.15757) on starts of training, whose
steps count as in training. "best of N": the share of states that one of N tries with N(0, I) solves.
"""

import sys
from dataclasses import dataclass
from itertools import count, islice, product
from pathlib import Path
from typing import Literal

import shared  # first: it makes the folder above known
import numpy as np
import torch
from tqdm import tqdm

from base import Pi0Options, is_pi0, load_base
from envs import cloned_tasks, load_suite
from envs.episodes import play_episodes
from envs.workers import Workers
from support.ranks import SIMULATORS, connect
from support.flags import parse_args, stop
from support.logs import rate, write_table
from support.run_files import make_out_folder

CANDIDATES, TRIES = 24, 6  # vectors a generation; training starts a vector, the same for all of a generation
ARM, NEAR = np.array([0.469, 0.5]), 0.371  # ALOHA's right arm, metres; half of the cube's places are nearer


@dataclass
class Args:
    task: shared.Task = "aloha"
    base: str | None = None  # file, folder or hub name; weights/<task>.safetensors if left out
    per_task: bool = False  # one vector for each task of a suite, whose steps all count
    per_place: bool = False  # ALOHA: one vector for the nearer half of the cube's places, one for the others
    first_only: bool = False  # send the vector at an episode's first decision only, N(0, I) afterwards
    seeds: tuple[int, ...] = (1, 2, 3)  # of candidates and training starts, one search each
    total_env_steps: int = 400_000  # control steps of a search, evaluation not counted; 0 for no search
    eval_every: int = 50_000  # control steps between evaluations of the search's mean
    best_of: int = 16  # N, tries for each state; 0 for none
    states: tuple[Literal["evaluation", "tuning"], ...] = ("evaluation",)  # bases are chosen on the latter
    episodes: int | None = None  # states; if left out 200 (tuning: 400) for aloha, 50 a task for LIBERO
    workers: int = SIMULATORS  # simulator processes; the results do not depend on it
    out: Path | None = None  # the table; results/constant_latent/<task>.csv if left out


class CrossEntropy:
    """N(mean, std²), moved to the best quarter of the last three generations; pooled, luck weighs less."""

    def __init__(self, dim, rng):
        self.mean, self.std, self.rng, self.seen = np.zeros(dim), np.ones(dim), rng, []

    def ask(self, n):  # n / 2 pairs of candidates that mirror each other -> (n, D)
        half = self.std * self.rng.standard_normal((n // 2, len(self.mean)))
        return np.concatenate([self.mean + half, self.mean - half])

    def tell(self, x, score):  # x: (n, D), score: (n,), the higher the better; of equal ones the newest count
        self.seen = [(x, score), *self.seen][:3]
        x, score = (np.concatenate(column) for column in zip(*self.seen))
        elite = x[np.argsort(-score, kind="stable")[: max(2, len(x) // 4)]]
        self.mean, self.std = elite.mean(0), elite.std(0).clip(0.25)  # it goes on searching


if __name__ == "__main__":
    args = parse_args(Args, __doc__)
    shared.check_limits(args, "eval_every episodes workers", 1)
    shared.check_limits(args, "total_env_steps best_of", 0)
    if args.per_task if args.task == "aloha" else args.per_place:
        stop(f"--task is {args.task}; --per-task is for LIBERO, --per-place for aloha")
    name = args.base or f"weights/{args.task}.safetensors"
    pictures = is_pi0(name)
    suite = load_suite(shared.suite_of(args.task), shared.task_ids(args.task), pictures)
    shared.check_limits(args, "episodes", 1, len(suite.starts) if "evaluation" in args.states else 10**9)
    device = connect("auto" if pictures else "cpu")  # a small base gains nothing on a GPU
    base = load_base(name, Pi0Options(), suite, device)
    tasks, out = cloned_tasks(suite, base), args.out or Path(f"results/constant_latent/{args.task}.csv")
    make_out_folder(out.parent)
    torch.set_num_threads(1)
    groups, rows = range(2 if args.per_place else len(tasks) if args.per_task else 1), []

    def group_of(task, start):  # of starts; each has one vector
        near = args.per_place and np.hypot(*start[:2] - ARM) < NEAR
        return tasks.index(task) if args.per_task else int(near)

    states, rng = {}, np.random.default_rng([3, 0])  # 0, 1 and 2: evaluation, training, demonstrations
    for name in args.states:
        n = args.episodes or suite.num_episodes * (2 if name == "tuning" and args.task == "aloha" else 1)
        tuning = ((task, suite.draw_start(rng)) for task, _ in product(tasks, range(n)))
        states[name] = list(tuning if name == "tuning" else product(tasks, suite.starts[:n]))

    def play(starts, generator, x=None):
        """An episode from every start, with latents x (n, D) or N(0, I). -> success (n,), length (n,)"""
        x, decisions = None if x is None else torch.tensor(np.array(x), dtype=torch.float32), count()

        def act(observations):
            drawn = x is None or (next(decisions) and args.first_only and x.any())  # zero latents stay zero
            w = torch.randn(len(starts), base.latent_dim, generator=generator) if drawn else x
            free = torch.randn(len(starts), base.free_dim, generator=generator)
            return base.decode(base.encode(observations)[1], w.to(device), free.to(device)).cpu().numpy()

        result = play_episodes(workers, *zip(*starts), act, suite.limit)
        return result["success"], result["length"]  # control steps to the first success, as in training

    def report(policy, name, success, **more):
        n, good = len(success), int(success.sum())
        rows.append(dict(policy=policy, **more, states=name, successes=good, episodes=n))
        rows[0]["command"] = " ".join(["python tools/constant_latent.py", *sys.argv[1:]])
        tqdm.write(f"{policy:24} {' '.join(map(str, more.values())):12} {name:10} {rate(good, n)}")
        write_table(out, rows)

    with Workers(suite.build, tasks, args.workers, base.pictures) as workers:
        for name, starts in states.items():
            generator, solved = torch.Generator().manual_seed(0), np.zeros(len(starts), dtype=bool)
            zeros = np.zeros((len(starts), base.latent_dim))
            report("zero latents", name, play(starts, torch.Generator().manual_seed(0), zeros)[0])
            for attempt in range(1, args.best_of + 1):  # a state that is solved is not tried again
                if len(left := np.flatnonzero(~solved)):
                    solved[left] = play([starts[i] for i in left], generator)[0]
                if attempt in (1, args.best_of):  # the first try is the base as it is
                    report("base" if attempt == 1 else f"best of {attempt}", name, solved)
        form = [k for k in ("per_task", "per_place", "first_only") if vars(args)[k]]
        for seed in args.seeds if args.total_env_steps else ():
            rng, generator, steps = np.random.default_rng([1, seed]), torch.Generator().manual_seed(seed), 0
            searches = [CrossEntropy(base.latent_dim, rng) for _ in groups]
            bar = tqdm(total=args.total_env_steps, desc=f"seed {seed}", leave=False)
            while (before := steps) < args.total_env_steps:
                asked, starts = [s.ask(CANDIDATES) for s in searches], []
                for group in groups:
                    drawn = ((int(rng.choice(tasks)), suite.draw_start(rng)) for _ in count())  # without end
                    starts += list(islice((s for s in drawn if group_of(*s) == group), TRIES)) * CANDIDATES
                success, length = play(starts, generator, np.concatenate(asked).repeat(TRIES, 0))
                for one, x, solved in zip(searches, asked, success.reshape(-1, CANDIDATES, TRIES)):
                    one.tell(x, solved.mean(1))
                steps += int(length.sum())
                bar.update(steps - before)
                if steps // args.eval_every > before // args.eval_every or steps >= args.total_env_steps:
                    for name, starts in states.items():
                        x = [searches[group_of(*start)].mean for start in starts]
                        success = play(starts, torch.Generator().manual_seed(0), x)[0]
                        report(" ".join(["constant", *form]), name, success, seed=seed, env_steps=steps)
