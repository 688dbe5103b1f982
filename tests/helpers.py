"""The scripts as a user starts them, or in this process, which is quicker, and how two runs are compared."""

import contextlib
import csv
import io
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch

from short import HORIZON

ROOT = Path(__file__).parents[1]
SMALL = (
    "--num-envs 2 --num-workers 1 --rollout-decisions 4 --critic-warmup 1 --critic-steps 2 --actor-states 3 "
    "--fresh-latents 2 --num-critics 2 --eval-episodes 2 --device cpu --seed 1 --window 2"
).split()  # what makes a train script quick
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGXCPU)


def command(name, *flags):
    return [sys.executable, str(ROOT / name), *map(str, flags)]


def python(cwd, *words, prefix=(), timeout=300, **environment):
    """Python as a process of its own, with stdin closed; None takes a variable out of the environment."""
    return subprocess.run(
        [*prefix, sys.executable, *map(str, words)],
        cwd=cwd,
        env={k: v for k, v in (os.environ | environment).items() if v is not None},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def script(name, cwd, *flags, **options):
    return python(cwd, ROOT / name, *flags, **options)


def short(name, cwd, *flags):
    """A script in this process to its end, with short episodes of ALOHA."""
    return here(name, cwd, *flags, play=True, horizon=HORIZON)


def here(name, cwd, *flags, play=False, horizon=400):
    """A script in this process, without the seconds of its imports, up to where it would play its first
    episode, or to its end if it is to `play`. An exception that it does not catch is raised.
    horizon: control steps of an episode of ALOHA."""
    before, argv, handlers = Path.cwd(), sys.argv, {n: signal.getsignal(n) for n in SIGNALS}
    out, err, code = io.StringIO(), io.StringIO(), 0
    no_play = mock.patch("envs.workers.Workers.map", side_effect=AssertionError("it plays"))
    brief = mock.patch("envs.aloha.HORIZON", horizon)
    try:
        os.chdir(cwd)
        sys.argv = [str(ROOT / name), *map(str, flags)]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            with brief, contextlib.nullcontext() if play else no_play:
                runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
    finally:
        os.chdir(before)
        sys.argv = argv
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def assert_refused(result, words):
    """Bad input: code 2 and one sentence that has all the words."""
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    for word in words:
        assert word in result.stderr, result.stderr


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def checkpoint(folder, name="last.pt"):
    """A checkpoint of a run; its checksum is looked at too."""
    from support.run_files import load_checkpoint

    return load_checkpoint(folder / name, "--resume")


def assert_same_parameters(one, other):
    for part in ("actor", "critic", "target"):
        assert all(torch.equal(one[part][name], other[part][name]) for name in one[part]), part
    assert torch.equal(one["envs"]["states"], other["envs"]["states"])


def assert_same_results(one, other):
    """Metrics equal to the last printed digit (but for times), evaluation files equal, parameters and the
    environments' states bit for bit."""
    timing = ("charts/SPS", "charts/rollout_seconds", "charts/update_seconds")
    metrics = [
        [{k: v for k, v in row.items() if k not in timing} for row in rows(folder / "metrics.csv")]
        for folder in (one, other)
    ]
    assert metrics[0] == metrics[1]
    for name in ("eval.csv", "table.csv"):
        assert (one / name).read_text() == (other / name).read_text(), name
    assert_same_parameters(checkpoint(one), checkpoint(other))
