"""What several tools need. Imported first: it lets them find the modules of the folder above."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers inherit it
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import json
import math
from typing import Literal

import numpy as np

from support.run_files import rate, stop

# what there is a base for in weights/: two tasks, and suites of tasks
Task = Literal["aloha", "libero_90_task56", "libero_spatial", "libero_object", "libero_goal", "libero_10"]


def check_limits(args, names, low, high=math.inf):
    """Stop with one sentence at the first of the flags `names`, with blanks between, that is not within low …
    high. One that was left out (None) is within, a tuple of numbers if all of them are."""
    for name in names.split():
        values = getattr(args, name) if isinstance(getattr(args, name), tuple) else (getattr(args, name),)
        if not all(value is None or low <= value <= high and value < math.inf for value in values):
            given, most = " ".join(map(str, values)), f" and at most {high}" * (high < math.inf)
            stop(f"--{name.replace('_', '-')} is {given}; give a finite number, at least {low}{most}")


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
    flags = [f"--{k.replace('_', '-')} {v}" for k, v in values.items()]
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
