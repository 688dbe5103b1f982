"""The flags of a script: read, taken from the run that is resumed, and refused with one clear sentence."""

import importlib
import io
import json
import math
import os
import sys
from dataclasses import fields, replace
from pathlib import Path

import tyro

# torch and wandb are imported where they are used: --help need not wait for them

RANK = int(os.environ.get("RANK") or 0)  # under torchrun; rank 0 writes
RESTARTS = int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0)  # by torchrun --max-restarts


def say(message):
    """One line on stderr; under torchrun one process of a machine speaks."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(message, file=sys.stderr, flush=True)


def stop(message, code=2):
    """End the program with one sentence on stderr. Code 2: bad input, nothing has been written."""
    say(f"error: {message}")
    raise SystemExit(code)


class LastingStream(io.TextIOWrapper):
    """Outlives its terminal or reader (`| head`): what nobody can read any more is dropped."""

    def write(self, text):
        try:
            super().write(text)
            self.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())  # for what is still buffered, too


def parse_args(cls, description):
    """The command line as an instance of the dataclass `cls`, with the first paragraph of `description` (None
    under -OO) in its help; of a run that is resumed, or started again by torchrun --max-restarts, its flags.

    From here on nothing that is printed can end the program: letters that a terminal or log cannot show
    become "?", and one that goes away or was never there is not written to.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed, by cron say
            setattr(sys, name, LastingStream(open(os.devnull, "wb"), errors="replace"))
        elif type(stream) is io.TextIOWrapper:  # not one of ours
            setattr(sys, name, LastingStream(stream.buffer, stream.encoding, errors="replace"))
    args = tyro.cli(cls, description=(description or "").split("\n\n")[0])
    if getattr(args, "resume", None):
        return resumed_args(cls, args.resume)
    if RESTARTS and getattr(args, "run_name", None) and Path("runs", args.run_name, "last.pt").exists():
        return resumed_args(cls, f"runs/{args.run_name}", argv=[])
    return args


def resumed_args(cls, folder, argv=None):
    """The flags of the run in `folder`, of class `cls`, with what the command line (argv, or the program's
    own) changes. Stops at a flag that would change the run. The base may have moved, its checksum is that of
    the run; a run may be made longer, and what falls over a run then follows the new length."""
    path = Path(folder) / "args.json"
    try:
        saved = json.loads(path.read_text())["args"]
    except OSError:
        stop(f"--resume is {folder}, where there is no run (no args.json); give a folder such as runs/<name>")
    except (ValueError, KeyError, TypeError):
        stop(f"--resume: {path} is damaged; restore it, or start a new run")
    known = {field.name: saved[field.name] for field in fields(cls) if field.name in saved}
    if "pi0" in known:
        known["pi0"] = type(cls().pi0)(**known["pi0"])
    of_run = cls(**known | dict(resume=str(folder)))
    args = replace(tyro.cli(cls, default=of_run, args=argv), resume=str(folder))
    for name, value in vars(of_run).items():
        if getattr(args, name) != value and name not in ("total_env_steps", "num_workers", "track", "base"):
            stop(f"--resume takes --{name.replace('_', '-')} from the run itself; leave that flag out")
    return args


def check_args(args, suite):
    """Stop with a clear sentence at the first impossible flag value. --literal sets its flags here."""
    counts = "total_env_steps rollout_decisions window critic_steps td_decisions actor_states actor_choice"
    most = len(suite.starts)
    rules = (  # flags, whether a value is possible, and what to say of one that is not
        (f"{counts} num_critics eval_every eval_episodes", lambda v: v > 0, "it must be at least 1"),
        ("eval_episodes", lambda v: v <= most, f"give at most {most}, all initial states of a task"),
        ("num_envs num_workers", lambda v: v is None or v > 0, "it must be at least 1, or be left out"),
        ("critic_warmup explore_steps seed", lambda v: v >= 0, "it must not be negative"),
        ("seed", lambda v: v < 2**63, "it must be below 2**63"),
        ("self_fit", lambda v: 0 <= v < math.inf, "it must be finite and not negative"),
        ("actor_lr critic_lr beta", lambda v: 0 < v < math.inf, "it must be positive and finite"),
        ("clip_eps", lambda v: 0 < v < 1 or v == math.inf, "give ε between 0 and 1, or inf for no clip"),
        ("fresh_latents", lambda v: v == 0 or v > 1, "give 2 or more to compare, or 0 for the executed ones"),
    )
    for names, possible, fix in rules:
        for name in names.split():
            if not possible(getattr(args, name)):
                stop(f"--{name.replace('_', '-')} is {getattr(args, name)}; {fix}")
    if args.literal:
        literal = dict(self_fit=0.0, fresh_latents=0, td_decisions=1, clamp_target=False, anneal=False)
        given = tyro.cli(type(args), default=replace(args, **literal))  # differs where the command line does
        for name, value in literal.items():
            setattr(args, name, value)
            if getattr(given, name) != value:
                flag = f"--{name.replace('_', '-')} is {getattr(given, name)}"
                stop(f"{flag}, but --literal sets it to {value}; leave one of the two flags out")
    for name in ("actor_states", "actor_choice") if args.fresh_latents == 0 else ():
        if getattr(args, name) != getattr(type(args), name):
            flag = f"--{name.replace('_', '-')}"
            stop(f"{flag} is about the states of --fresh-latents, which is 0; leave one of the two out")
    if args.fresh_latents == 0 and args.anneal:  # fitted to what it did it would narrow with every update
        stop("--fresh-latents is 0; give --no-anneal with it, to act with all of the noise")
    if args.num_envs and args.num_envs * args.rollout_decisions < 2:
        one = f"--num-envs {args.num_envs} with --rollout-decisions {args.rollout_decisions}"
        stop(f"{one} makes one sample an iteration; Eq. 3 needs at least 2")
    check_device(args.device, args.resume)
    if args.track:
        check_tracking()


def check_device(device, resume=None):
    """Stop if a GPU was asked for, or is that of the run to resume, and torch finds none."""
    if device == "cuda" and not importlib.import_module("torch").cuda.is_available():
        if resume:  # a CPU draws other random numbers
            stop(f"--resume is {resume}, a run of a GPU; resume it where torch finds a CUDA device")
        stop("--device is cuda, but torch finds no CUDA device here; use --device cpu or --device auto")


def check_tracking():
    """Stop with one sentence if Weights & Biases would not take a run. On a terminal it asks for the key,
    before anything is written."""
    try:
        import wandb

        if RANK == 0 and wandb.Settings().mode not in ("offline", "dryrun", "disabled"):
            wandb.login()
    except ImportError:
        stop("--track needs wandb, which is not installed; pip install wandb")
    except Exception as error:
        what = f"--track: Weights & Biases does not let this run in ({' '.join(str(error).split())})"
        stop(f"{what}; run `wandb login` first, or set WANDB_MODE=offline")
