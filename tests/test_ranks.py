"""torchrun: two ranks are one rank with as many environments, and a rank that dies costs at most an iteration. Real runs on ALOHA."""

import csv
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from run_files import load_checkpoint

ROOT = Path(__file__).parents[1]
# the first iteration warms the critics up, so that its actor cannot have drifted apart by rounding when the second one acts
FLAGS = ("--num-envs 8 --num-workers 1 --rollout-decisions 8 --critic-warmup 1 --total-env-steps 4000 --eval-episodes 8 --eval-every 100000 "
         "--critic-steps 20 --actor-states 200 --no-anneal-lr --device cpu").split()  # fmt: skip
ALONE = [sys.executable, str(ROOT / "train_aloha.py")]
TWO = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1", str(ROOT / "train_aloha.py")]


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def start(cwd, *command):
    return subprocess.Popen([*map(str, command)], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process, code=0):
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, err[-3000:]
    return out, err


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """runs/one: one process; runs/two: two ranks, of which one is killed once the first iteration is saved."""
    cwd = tmp_path_factory.mktemp("ranks")
    finish(start(cwd, *ALONE, *FLAGS, "--run-name", "one"))
    process = start(cwd, *TWO, *FLAGS, "--run-name", "two")
    metrics = cwd / "runs" / "two" / "metrics.csv"
    while process.poll() is None and not (metrics.exists() and len(rows(metrics)) >= 1):
        time.sleep(0.02)
    second = [p for p in psutil.Process(process.pid).children() if p.environ().get("RANK") == "1"]
    second[0].kill()
    finish(process)
    return cwd / "runs"


def assert_close(one, other):
    """Parameters to 1e-5; buffers (states, latents, rewards), environments and random numbers exactly."""
    a, b = (load_checkpoint(path / "last.pt", "--resume", "aloha") for path in (one, other))
    for part in ("actor", "critic", "target"):
        for name in a[part]:
            assert torch.allclose(a[part][name], b[part][name], atol=1e-5, rtol=0), f"{part} {name}"
    for key in a["buffer"][0]:
        assert torch.equal(a["buffer"][0][key], b["buffer"][0][key]), key
    assert torch.equal(a["generator"], b["generator"]) and a["recent"] == b["recent"] and a["env_steps"] == b["env_steps"]
    assert torch.equal(a["envs"]["steps"], b["envs"]["steps"]) and a["envs"]["rngs"] == b["envs"]["rngs"]
    assert torch.equal(a["envs"]["states"], b["envs"]["states"])


def test_two_ranks_are_one_and_survive_a_death(folder):
    assert_close(folder / "one", folder / "two")
    actor = load_checkpoint(folder / "one" / "last.pt", "--resume", "aloha")["actor"]
    assert actor["out.weight"].abs().max() > 1e-4  # it starts at 0
    assert [row["iteration"] for row in rows(folder / "two" / "metrics.csv")] == ["1", "2"]


def test_evaluation_is_gathered_exactly(folder):
    """No episode twice or missing, each as the single process played it. The last one may differ by rounding in the actor."""
    one, two = (rows(folder / name / "eval.csv") for name in ("one", "two"))
    key = lambda row: (row["policy"], row["env_steps"], row["episode"])
    assert [key(row) for row in one] == [key(row) for row in two]
    assert [row for row in one if row["policy"] != "tuned"] == [row for row in two if row["policy"] != "tuned"]
    with np.load(folder / "one" / "latents.npz") as a, np.load(folder / "two" / "latents.npz") as b:
        first = a["env_steps"] == 0
        assert all(np.array_equal(a[key][first], b[key][first]) for key in a.files)


def test_resume_with_another_number_of_ranks(folder):
    cwd = folder.parent
    one_iteration = ["2000" if flag == "4000" else flag for flag in FLAGS]
    finish(start(cwd, *TWO, *one_iteration, "--run-name", "parts"))
    finish(start(cwd, *ALONE, "--resume", "runs/parts", "--total-env-steps", 4000))
    assert_close(folder / "one", folder / "parts")


def test_environments_that_cannot_be_shared(tmp_path):
    once = [flag for flag in TWO if flag not in ("--max-restarts", "1")]
    _, err = finish(start(tmp_path, *once, "--num-envs", 7), code=1)  # torchrun's own code
    assert err.count("--num-envs is 7, which 2 ranks cannot share evenly; give a multiple of 2") == 1
    assert not (tmp_path / "runs").exists()
