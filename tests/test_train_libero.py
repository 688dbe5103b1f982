"""The LIBERO training script as a user runs it: end to end on the real simulator, resume, the suites' protocol, bad input."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from base_flow import FlowBase

ROOT = Path(__file__).parents[1]
SMALL = ("--num-envs 2 --num-workers 1 --rollout-decisions 2 --critic-warmup 1 --critic-steps 2 --actor-states 3 --fresh-latents 2 "
         "--num-critics 2 --eval-episodes 2 --device cpu --seed 3 --window 2").split()  # fmt: skip


def command(*flags):
    return [sys.executable, str(ROOT / "train_libero.py"), *map(str, flags)]


def train(cwd, *flags, small=True, timeout=300):
    return subprocess.run(command(*(SMALL if small else ()), *flags), cwd=cwd, capture_output=True, text=True, timeout=timeout)


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two iterations on butter/tray, uninterrupted; too short for an episode to succeed, so that the counts of steps are known."""
    cwd = tmp_path_factory.mktemp("finished")
    flags = ("--run-name", "whole", "--total-env-steps", 128, "--eval-every", 64, "--no-anneal-lr", "--video")
    result = train(cwd, *flags)
    assert result.returncode == 0, result.stderr
    return cwd, result


def test_writes_what_it_promises(finished):
    cwd, result = finished
    folder = cwd / "runs" / "whole"
    for name in ("args.json", "metrics.csv", "eval.csv", "table.csv", "latents.npz", "last.pt", "step00000064.pt", "step00000128.pt"):
        assert (folder / name).stat().st_size > 0, name
    assert list(folder.glob("events.out.tfevents.*")) and list(folder.glob("*.mp4"))
    for word in ("task 56", "base", "zero latents", "tuned", "gain", "128 environment steps", "runs/whole", "fixed", "broken"):
        assert word in result.stdout, word
    assert [int(row["charts/env_steps"]) for row in rows(folder / "metrics.csv")] == [64, 128]
    episodes = rows(folder / "eval.csv")
    assert [(row["policy"], row["env_steps"], row["episode"]) for row in episodes] == [
        ("base", "0", "0"), ("base", "0", "1"), ("zero latents", "0", "0"), ("zero latents", "0", "1"), ("tuned", "64", "0"),
        ("tuned", "128", "0"), ("tuned", "128", "1"), ("zero noise", "128", "0"), ("zero noise", "128", "1"),
    ]  # fmt: skip
    assert all(int(row["length"]) == 400 or row["success"] == "1" for row in episodes)  # the official limit
    table = rows(folder / "table.csv")
    assert [(row["task_id"], row["policy"], row["episodes"]) for row in table[:4]] == [("56", p, "2") for p in ("base", "zero latents", "tuned", "zero noise")]


def test_resume_ends_where_the_uninterrupted_run_ends(finished):
    cwd, _ = finished
    assert train(cwd, "--run-name", "parts", "--total-env-steps", 64, "--eval-every", 64, "--no-anneal-lr", "--num-workers", 2).returncode == 0
    result = train(cwd, "--resume", "runs/parts", "--total-env-steps", 128, small=False)
    assert result.returncode == 0, result.stderr
    whole, parts = (torch.load(cwd / "runs" / name / "last.pt", weights_only=True) for name in ("whole", "parts"))
    for part in ("actor", "critic", "target"):
        assert all(torch.equal(whole[part][name], parts[part][name]) for name in whole[part])
    assert torch.equal(whole["envs"]["states"], parts["envs"]["states"])


def test_two_iterations_of_a_suite_and_its_table(tmp_path):
    """Two tasks of a suite with one actor; then the suite's table by --eval-only, with a task that the base was not cloned on."""
    sizes = dict(state_dim=55, action_dim=7, latent_dim=6, chunk_steps=16, knots=9, flow_steps=4, hidden=32, blocks=1)
    FlowBase(dict(sizes, task="libero_object", task_ids=[0, 1])).save(tmp_path / "base.safetensors")
    flags = ("--suite", "libero_object", "--task-ids", "0,1,2", "--weights", "base.safetensors", "--eval-episodes", 1)
    result = train(tmp_path, *flags, "--total-env-steps", 128, "--run-name", "suite")
    assert result.returncode == 0, result.stderr
    with np.load(tmp_path / "runs" / "suite" / "latents.npz") as latents:
        assert set(latents["task_id"]) == {0, 1}
    episodes = rows(tmp_path / "runs" / "suite" / "eval.csv")
    assert {(row["policy"], row["task_id"]) for row in episodes} == {(p, t) for p in ("base", "zero latents", "tuned", "zero noise") for t in "01"}
    result = train(tmp_path, *flags, "--eval-only", "--checkpoint", "runs/suite/last.pt", "--run-name", "table")
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if line.strip().startswith("task")]
    assert len(lines) == 3 and "[" in lines[0] and "[" in lines[1] and "not cloned" in lines[2]  # named, neither dropped nor counted
    table = rows(tmp_path / "runs" / "table" / "table.csv")
    assert [row["cloned"] for row in table if row["task_id"] == "2"] == ["False"]
    assert [row["episodes"] for row in table if row["task_id"] == "all cloned"] == ["2"] * 4


@pytest.mark.parametrize("flags, words", [
    (["--suite", "libero_nowhere"], ["libero_nowhere", "libero_goal"]),
    (["--suite", "libero_goal", "--task-ids", "10"], ["--task-ids has 10", "0 to 9"]),
    (["--task-ids", "fifty-six"], ["--task-ids is fifty-six"]),
    (["--suite", "libero_goal", "--weights", str(ROOT / "weights" / "libero_90_task56.safetensors")], ["--weights", "libero_90_task56", "libero_goal"]),
    (["--task-ids", "3"], ["--task-ids is 3", "task 56", "--base pi0"]),
    (["--eval-episodes", "51"], ["--eval-episodes is 51", "50"]),
    (["--num-envs", "0"], ["--num-envs is 0", "at least 1"]),
    (["--suite", "libero_goal", "--num-envs", "5"], ["--num-envs is 5", "6 tasks"]),
    (["--eval-only", "--checkpoint", "aloha.pt"], ["task aloha", "--suite"]),
    (["--resume", "runs/nothing"], ["--resume is runs/nothing", "no run"]),
])  # fmt: skip
def test_bad_input_gets_one_sentence_and_touches_nothing(tmp_path, flags, words):
    from run_files import save_checkpoint

    save_checkpoint(tmp_path / "aloha.pt", dict(task="aloha"))
    result = train(tmp_path, *flags, small=False)
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    for word in words:
        assert word in result.stderr, result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["aloha.pt"]


def test_without_egl(tmp_path):
    environment = dict(os.environ, MUJOCO_GL="disable")
    result = subprocess.run(command("--seed", "1"), cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2 and "EGL" in result.stderr and "libegl1" in result.stderr
    assert not list(tmp_path.iterdir())
