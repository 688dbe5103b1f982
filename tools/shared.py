"""What several tools need. Imported first: it lets them find the modules of the folder above."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers inherit it
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import contextlib
import json
import math
import time
from typing import Literal

import numpy as np

from envs import cloned_tasks, load_suite
from support.flags import check_device, stop
from support.logs import EPISODES, CsvLog, mean, rate
from support.run_files import new_run_folder, save_checkpoint, write_args

GAMMA = 0.999  # γ of Eq. 1, as in the train scripts
# what there is a base for in weights/: two tasks, and suites of tasks
Task = Literal[
    "aloha", "libero_90_task56", "libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90"
]

LIBERO_90 = [2, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 24, 25, 27, 29]

# columns of metrics.csv that both baselines have
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
    hidden = ("workers", "out", "overwrite", "video", "table", "table_states")  # change nothing in the arrays
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


def write_film(path, pictures, fps):
    """Write pictures (T, height, width, 3) uint8 to an .mp4, or a single one (height, width, 3) to a .png."""
    import imageio.v2 as imageio  # ffmpeg

    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".png":
        imageio.imwrite(path, pictures)
    else:
        imageio.mimwrite(path, pictures, fps=fps, macro_block_size=1)
    print(f"wrote {path}")


# ---- of the tools train_*.py ----


def evaluate_and_save(latents, base, workers, suite, args, episodes, folder, checkpoint, last):
    """Evaluate the tuned actor, from all of --eval-episodes starts if it is the `last` time, else from half,
    and save `checkpoint`, a dict with env_steps. latents: of `evaluate`. -> the success rate"""
    from evaluate import evaluate  # not above: needs torch, which some tools do without

    starts = suite.starts[: args.eval_episodes if last else max(1, args.eval_episodes // 2)]
    where = workers, suite.tasks, starts, suite.limit, episodes, checkpoint["env_steps"]
    result = evaluate("tuned", latents, base, *where)
    save_checkpoint(folder, checkpoint, args)
    return float(result["success"].mean())


def start_baseline(args):
    """Fill in what depends on the task. Stop with one sentence at a flag that cannot be. -> the suite, with
    the tasks that its base was cloned on, and the base"""
    import torch  # as above

    from base import Pi0Options, load_base
    from support.ranks import connect

    steps, every, episodes = (100_000, 50_000, 50) if "_task" in args.task else (300_000, 100_000, 50)
    if args.task == "aloha":
        every, episodes = 150_000, 200
    fill_in(args, total_env_steps=steps, eval_every=every, eval_episodes=episodes)
    check_limits(args, "total_env_steps num_envs num_workers minibatch_size eval_every", 1)
    check_limits(args, "updates actor_lr", 1e-9)
    check_limits(args, "seed", 0, 2**63 - 1)
    check_device(args.device)
    suite = load_suite(suite_of(args.task), task_ids(args.task))
    check_limits(args, "eval_episodes", 1, len(suite.starts))
    torch.set_num_threads(1)  # more for updates only: waiting threads spin, and take the workers' cores
    base = load_base(f"weights/{args.task}.safetensors", Pi0Options(), suite, connect(args.device))
    suite.tasks = cloned_tasks(suite, base)
    fill_in(args, num_envs=math.ceil(32 / len(suite.tasks)) * len(suite.tasks))
    return suite, base


def start_files(args, kind, columns):
    """A new folder of the run, with args.json. kind: what it is called if it got no name; columns: of
    metrics.csv beside METRICS. -> the folder, and the logs metrics.csv and eval.csv in it"""
    default = f"{kind}__seed{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    folder = new_run_folder(args.run_name, default)
    write_args(folder, args)
    return folder, CsvLog(folder / "metrics.csv", [*METRICS, *columns]), CsvLog(folder / "eval.csv", EPISODES)


@contextlib.contextmanager
def clean_end():
    """Ctrl-C and dead simulators end the program with one sentence."""
    try:
        yield
    except ChildProcessError as error:
        stop(str(error), code=1)
    except KeyboardInterrupt:
        stop("stopped", code=130)


def charts(env_steps, recent, speed, x):
    """Cells of METRICS. recent: success of the last training episodes; x: the latents executed since the last
    row, (n, D)."""
    spread = x.norm(dim=-1).mean().item(), x.std(0).mean().item()
    return dict(zip(METRICS, (env_steps, mean(recent), speed, "", *spread)))
