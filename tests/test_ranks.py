"""torchrun: two ranks are one rank with as many environments, and a rank that dies costs at most an
iteration."""

import shutil
import subprocess
import sys
import time

import psutil
import pytest
import torch

from helpers import ROOT, assert_refused, checkpoint, command, here, rows
from support import ranks

# The first iteration warms the critics up, so that its actor cannot have drifted apart by rounding when the
# second one acts. Half of 8 rows, and not fewer, are multiplied as the whole is, to the last bit.
FLAGS = (
    "--num-envs 8 --num-workers 1 --rollout-decisions 5 --critic-warmup 1 --total-env-steps 2000 "
    "--eval-episodes 8 --eval-every 9999 --critic-steps 20 --actor-states 200 --no-anneal --device cpu"
).split()
TWO = [sys.executable, *"-m torch.distributed.run --nproc-per-node 2 --max-restarts 1".split()]


def start(cwd, *command):
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([*map(str, command)], cwd=cwd, **pipes)


def finish(process):
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """runs/one: one process; runs/two: two ranks, of which one is killed once the first iteration is saved;
    runs/parts: a copy of that moment."""
    cwd = tmp_path_factory.mktemp("ranks")
    finish(start(cwd, *command("tests/short.py", "train_aloha.py", *FLAGS, "--run-name", "one")))
    process = start(cwd, *TWO, ROOT / "tests/short.py", "train_aloha.py", *FLAGS, "--run-name", "two")
    while process.poll() is None and not (cwd / "runs" / "two" / "last.pt").exists():
        time.sleep(0.02)
    shutil.copytree(cwd / "runs" / "two", cwd / "runs" / "parts")
    second = [p for p in psutil.Process(process.pid).children() if p.environ().get("RANK") == "1"]
    second[0].kill()
    finish(process)
    return cwd / "runs"


def assert_close(one, other):
    """Parameters to 1e-5; buffers (states, latents, rewards), environments and random numbers exactly."""
    a, b = checkpoint(one), checkpoint(other)
    for part in ("actor", "critic", "target"):
        for name in a[part]:
            assert torch.allclose(a[part][name], b[part][name], atol=1e-5, rtol=0), f"{part} {name}"
    for key in a["buffer"][0]:
        assert torch.equal(a["buffer"][0][key], b["buffer"][0][key]), key
    assert torch.equal(a["generator"], b["generator"])
    assert a["recent"] == b["recent"] and a["env_steps"] == b["env_steps"]
    assert torch.equal(a["envs"]["steps"], b["envs"]["steps"]) and a["envs"]["rngs"] == b["envs"]["rngs"]
    assert torch.equal(a["envs"]["states"], b["envs"]["states"])


@pytest.mark.slow
def test_two_ranks_are_one_and_survive_a_death(folder):
    assert_close(folder / "one", folder / "two")
    assert checkpoint(folder / "one")["actor"]["out.weight"].abs().max() > 1e-4  # it starts at 0
    assert [row["iteration"] for row in rows(folder / "two" / "metrics.csv")] == ["1", "2"]


@pytest.mark.slow
def test_evaluation_is_gathered_exactly(folder):
    """No episode twice or missing, each as the single process played it. Those after the update of the actor
    may differ by its rounding."""
    one, two = (rows(folder / name / "eval.csv") for name in ("one", "two"))
    for name in ("policy", "env_steps", "task", "episode"):
        assert [row[name] for row in one] == [row[name] for row in two]
    untrained = ("base", "zero latents")
    assert [r for r in one if r["policy"] in untrained] == [r for r in two if r["policy"] in untrained]
    assert [int(row["episode"]) for row in one] == 3 * list(range(8))


@pytest.mark.slow
def test_resume_with_another_number_of_ranks(folder):
    """One process does the second iteration, from where two ranks had saved the first."""
    assert checkpoint(folder / "parts")["iteration"] == 1
    finish(start(folder.parent, *command("tests/short.py", "train_aloha.py", "--resume", "runs/parts")))
    assert_close(folder / "one", folder / "parts")


@pytest.mark.parametrize("rank", [0, 1])
def test_environments_that_cannot_be_shared(tmp_path, monkeypatch, rank):
    """One rank says so, and nothing is written."""
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    monkeypatch.setattr(ranks, "WORLD", 2)
    monkeypatch.setattr(ranks, "connect", lambda device: torch.device("cpu"))
    sentence = "error: --num-envs is 7, which 2 ranks cannot share evenly; give a multiple of 2\n"
    result = here("train_aloha.py", tmp_path, "--num-envs", 7)
    assert_refused(result, [])
    assert result.stderr == (sentence if rank == 0 else "") and not list(tmp_path.iterdir())


def test_shares_make_the_whole(monkeypatch):
    monkeypatch.setattr(ranks, "WORLD", 3)
    shares = []
    for rank in range(3):
        monkeypatch.setattr(ranks, "RANK", rank)
        shares += range(12)[ranks.share(12, 5)]
    assert shares == list(range(12))
