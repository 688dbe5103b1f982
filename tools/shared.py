"""What several tools need. Imported first: it lets them find the modules of the folder above."""

import os
import sys
from pathlib import Path

os.environ.update(dict(OMP_NUM_THREADS="1", GOMP_SPINCOUNT="1000") | os.environ)  # or idle threads hog cores
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import contextlib
import json
import math
import time
from collections import deque
from typing import Literal

import numpy as np

from envs import cloned_tasks, load_suite
from envs.episodes import TrainingEnvs
from support.flags import check_device, stop
from support.logs import EPISODES, CsvLog, mean, rate, steps_bar
from support.run_files import new_run_folder, write_args

GAMMA = 0.999  # γ of Eq. 1, as in the train scripts
# what there is a base for in weights/: two tasks, and suites of tasks
Task = Literal[
    "aloha", "libero_90_task56", "libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90"
]

LIBERO_90 = [2, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 24, 25, 27, 29]

# columns of metrics.csv that all baselines have
METRICS = "charts/env_steps charts/success charts/SPS eval/success latent/norm latent/std".split()


def suite_of(task):
    """The suite that a task of `Task` is in, as load_suite names it."""
    return task.split("_task")[0]


def task_ids(task):
    """The tasks of LIBERO that the base `task` of ours is cloned on, numbers with commas. Of libero_90 twenty
    in order of number, of those in which something is grasped."""
    own = dict(libero_90_task56=[56], libero_90=LIBERO_90)
    return ",".join(map(str, own.get(task, range(10))))


def check_limits(args, names, low, high=math.inf):
    """Stop with one sentence at the first of the flags `names`, with blanks between, that is not within low …
    high. One that was left out (None) is within, a tuple of numbers if all of them are."""
    for name in names.split():
        values = getattr(args, name) if isinstance(getattr(args, name), tuple) else (getattr(args, name),)
        if not all(value is None or low <= value <= high and value < math.inf for value in values):
            given, most = " ".join(map(str, values)), f" and at most {high}" * (high < math.inf)
            stop(f"--{name.replace('_', '-')} is {given}; give a finite number, at least {low}{most}")


def fill_in(args, **defaults):
    """Give the flags that were left out (None) these values."""
    for name, value in defaults.items():
        setattr(args, name, value if getattr(args, name) is None else getattr(args, name))


def check_files(args, *suffixes):
    """Stop with one sentence if --out exists, or --video is no film. suffixes: those of films, ".mp4" …"""
    if args.out.exists() and not args.overwrite:
        stop(f"--out {args.out} exists; give another path, or --overwrite to replace it")
    if suffixes and args.video and args.video.suffix not in suffixes:
        stop(f"--video is {args.video}; give a path that ends in {' or '.join(suffixes)}")


def write_demos(args, tool, demos, success):
    """Write the arrays `demos` to args.out, with what made them; print the success {part: (n,)}."""
    hidden = ("workers", "out", "overwrite", "video", "table")  # change nothing in the arrays
    settings = {k: v for k, v in vars(args).items() if k not in hidden}
    values = {k: " ".join(map(str, v)) if isinstance(v, tuple) else v for k, v in settings.items()}
    flags = [f"--{k.replace('_', '-')} {v}" for k, v in values.items() if v is not None]
    settings["command"] = " ".join([f"python tools/{tool}.py", *flags, f"--out {args.out.as_posix()}"])
    settings["success"] = {}
    for part, good in success.items():
        if n := len(good):
            print(f"{part:26} {n:5d} demonstrations: {rate(int(good.sum()), n)}")
            settings["success"][part] = dict(n=n, success=round(float(good.mean()), 4))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    partial = args.out.with_suffix(".part.npz")
    np.savez_compressed(partial, settings=json.dumps(settings), **demos)
    partial.replace(args.out)
    print(f"wrote {args.out}")


# ---- of the tools train_*.py ----


def start_baseline(args):
    """Fill in what depends on the task. Stop with one sentence at a flag that cannot be. -> the suite, with
    the tasks that its base was cloned on, and the base"""
    import torch  # not above: some tools do without

    from base import Pi0Options, load_base
    from support.ranks import connect

    steps = 100_000 if "_task" in args.task else 300_000  # and the others, as in the train scripts
    fill_in(args, total_env_steps=steps, eval_every=steps // 2)
    check_limits(args, "total_env_steps num_envs num_workers minibatch_size eval_every", 1)
    check_limits(args, "updates actor_lr", 1e-9)
    check_limits(args, "seed", 0, 2**63 - 1)
    check_device(args.device)
    suite = load_suite(suite_of(args.task), task_ids(args.task))
    fill_in(args, eval_episodes=suite.num_episodes)
    check_limits(args, "eval_episodes", 1, len(suite.starts))
    torch.set_num_threads(1)  # more for updates only: waiting threads spin, and take the workers' cores
    base = load_base(f"weights/{args.task}.safetensors", Pi0Options(), suite, connect(args.device))
    suite.tasks = cloned_tasks(suite, base)
    fill_in(args, num_envs=math.ceil(32 / len(suite.tasks)) * len(suite.tasks))
    torch.manual_seed(args.seed)
    return suite, base


@contextlib.contextmanager
def clean_end():
    """Ctrl-C and dead simulators end the program with one sentence."""
    try:
        yield
    except ChildProcessError as error:
        stop(str(error), code=1)
    except KeyboardInterrupt:
        stop("stopped", code=130)


class Run:
    """A baseline's run: folder, environments, and what is counted and logged. It begins with the evaluation
    of base and zero latents. s, (E, S), and context: of the next decision."""

    def __init__(self, args, suite, base, workers, kind, losses):
        """kind: what the run is called if it got no name; losses: columns of metrics.csv beside METRICS."""
        self.args, self.suite, self.base, self.workers = args, suite, base, workers
        default = f"{kind}__seed{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
        self.folder = new_run_folder(args.run_name, default)
        write_args(self.folder, args)
        self.metrics = CsvLog(self.folder / "metrics.csv", [*METRICS, *losses])
        self.episodes = CsvLog(self.folder / "eval.csv", EPISODES)
        self.losses, self.env_steps, self.recent = losses, 0, deque(maxlen=100)  # success of episodes
        self.evaluate("base", lambda s, noise: noise)
        self.evaluate("zero latents", lambda s, noise: 0 * noise)
        where = suite.tasks, args.num_envs, suite.draw_start, suite.limit, args.seed
        self.envs, self.bar = TrainingEnvs(workers, *where), steps_bar(args.total_env_steps)
        self.s, self.context = base.encode(self.envs.observations)
        self.clock, self.logged = time.perf_counter(), 0  # when the last row was written

    def evaluate(self, policy, latents, part=1):
        """Play a policy from one in `part` of the --eval-episodes starts. -> the success rate"""
        from evaluate import evaluate  # not above: needs torch

        starts = self.suite.starts[: max(1, self.args.eval_episodes // part)]
        where = self.workers, self.suite.tasks, starts, self.suite.limit, self.episodes, self.env_steps
        return float(evaluate(policy, latents, self.base, *where)["success"].mean())

    @property
    def to_go(self):
        """The share of the run that lies ahead."""
        return max(0.0, 1 - self.env_steps / self.args.total_env_steps)

    @property
    def due(self):
        """Whether an evaluation is."""
        every = self.args.eval_every
        return self.to_go <= 0 or self.env_steps // every > self.logged // every

    def step(self, actions, **row):
        """Execute a decision in every environment. row: what else belongs to it -> all of it, (E, …)"""
        import torch

        step = self.envs.step(actions.cpu().numpy())
        self.env_steps += int(step["num_steps"].sum())
        self.bar.update(int(step["num_steps"].sum()))
        ended = step["terminated"] | step["truncated"]
        self.recent.extend(step["success"][ended])
        r = step["success"] * GAMMA ** (step["num_steps"] - 1.0)  # of a decision, as in the train scripts
        numbers = dict(r=r, discount=GAMMA ** step["num_steps"], terminated=step["terminated"], ended=ended)
        row |= {k: torch.as_tensor(v).float().to(self.base.device) for k, v in numbers.items()}
        row["s_next"], _ = self.base.encode(step["last_observation"])
        self.s, self.context = self.base.encode(self.envs.observations)
        return row

    def log(self, x, infos, latents):
        """A row of metrics.csv, and if one is due an evaluation. x: latents executed since the
        last row, (n, D); infos: the `losses` of every gradient step since then; latents: how the actor acts,
        as `evaluate` takes it."""
        if infos and not np.isfinite(infos[-1]).all():
            stop("a loss became NaN or infinite; try a lower --actor-lr", code=1)
        speed = (self.env_steps - self.logged) / (time.perf_counter() - self.clock)
        spread = x.norm(dim=-1).mean().item(), x.std(0).mean().item()
        row = dict(zip(METRICS, (self.env_steps, mean(self.recent), speed, "", *spread)))
        row |= dict(zip(self.losses, np.mean(infos, 0))) if infos else {}
        self.bar.set_postfix(success=mean(self.recent), refresh=False)
        if self.due:  # the last one from all starts, the others from half of them
            row["eval/success"] = self.evaluate("tuned", latents, 1 if self.to_go <= 0 else 2)
        self.metrics.write(row)
        self.clock, self.logged = time.perf_counter(), self.env_steps

    def print_result(self):
        from evaluate import print_result

        print_result(self.folder, self.suite.names)
        print(f"{self.env_steps:,} environment steps, files in {self.folder}")
