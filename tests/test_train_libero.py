"""The LIBERO training script and evaluate.py on its suites, as a user runs them: end to end on the real
simulator, resume, the suites' protocol, bad input."""

import json
import shutil
from types import SimpleNamespace

import pytest

from base.flow import FlowBase
from helpers import ROOT, SMALL, assert_refused, assert_same_parameters, checkpoint, here, rows, script
from support.run_files import save_checkpoint

TRAIN = "train_libero.py"
POLICIES = ("base", "zero latents", "tuned")
SUITE = "--suite libero_spatial --task-ids 0,1,2 --base base.safetensors".split()
RUN = "--rollout-decisions 2 --eval-episodes 1 --total-env-steps 128 --eval-every 64 --no-anneal".split()

HEADER = dict(state_dim=59, action_dim=7, latent_dim=6, chunk_steps=16, knots=9, flow_steps=4, hidden=32)
HEADER |= dict(blocks=1, task="libero_spatial", task_ids=[0, 1])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two iterations on three tasks of a suite, of which the base was cloned on two; too short for an episode
    to succeed, so that the counts of steps are known."""
    cwd = tmp_path_factory.mktemp("finished")
    FlowBase(HEADER).save(cwd / "base.safetensors")
    result = here(TRAIN, cwd, *SMALL, *SUITE, *RUN, "--run-name", "whole", play=True)
    assert result.returncode == 0, result.stderr
    return cwd, result


@pytest.mark.slow
def test_writes_what_it_promises(finished):
    cwd, result = finished
    folder = cwd / "runs" / "whole"
    files = "args.json metrics.csv eval.csv table.csv last.pt step00000064.pt step00000128.pt".split()
    for name in files:
        assert (folder / name).stat().st_size > 0, name
    assert list(folder.glob("events.out.tfevents.*"))
    for word in (*POLICIES, "128 steps", "fixed", "broke"):
        assert word in result.stdout, word
    assert [int(row["charts/env_steps"]) for row in rows(folder / "metrics.csv")] == [64, 128]
    episodes = rows(folder / "eval.csv")
    assert [(row["policy"], row["env_steps"], row["task"], row["episode"]) for row in episodes] == [
        (policy, steps, task, "0")
        for policy, steps in zip((*POLICIES, "tuned"), "0 0 64 128".split())
        for task in "01"
    ]
    assert all(int(row["length"]) == 220 or row["success"] == "1" for row in episodes)  # the official limit


@pytest.mark.slow
def test_a_run_made_longer_ends_where_the_longer_one_ends(finished):
    """A run of one iteration, made of the whole one's first checkpoint, goes on for another one."""
    cwd, _ = finished
    folder, args = cwd / "runs" / "parts", cwd / "runs" / "parts" / "args.json"
    shutil.copytree(cwd / "runs" / "whole", folder)
    shutil.copy(folder / "step00000064.pt", folder / "last.pt")
    args.write_text(args.read_text().replace('"total_env_steps": 128', '"total_env_steps": 64'))
    assert json.loads(args.read_text())["args"]["total_env_steps"] == 64
    resume = "--resume runs/parts --total-env-steps 128 --num-workers 2".split()
    result = here(TRAIN, cwd, *resume, play=True)
    assert result.returncode == 0, result.stderr
    assert_same_parameters(checkpoint(cwd / "runs" / "whole"), checkpoint(folder))
    for name in ("eval.csv", "table.csv"):
        assert (folder / name).read_text() == (cwd / "runs" / "whole" / name).read_text()
    assert [row["charts/env_steps"] for row in rows(folder / "metrics.csv")] == ["64", "128"]


@pytest.mark.slow
def test_evaluate_prints_a_row_a_task_and_the_same_success_as_the_run(finished):
    """A task that the base was not cloned on is named, neither dropped nor counted."""
    cwd, whole = finished
    flags = "runs/whole/last.pt --episodes 1 --run-name table".split()
    result = here("evaluate.py", cwd, *flags, play=True)
    assert result.returncode == 0, result.stderr
    table = whole.stdout[whole.stdout.index("\n success") :]
    assert table in result.stdout
    lines = table.splitlines()[2:6]
    assert [line.split()[0] for line in lines] == ["0", "1", "2", "all"]
    assert all("[" in lines[k] for k in (0, 1, 3)) and "not cloned" in lines[2]
    for run in ("whole", "table"):
        table = rows(cwd / "runs" / run / "table.csv")
        of_task = {k: [row for row in table if row["task_id"] == k] for k in ("0", "1", "2", "all")}
        assert [row["policy"] for row in of_task["0"]] == list(POLICIES)
        assert {row["cloned"] for row in of_task["2"]} == {"False"}
        assert {row["cloned"] for k in "01" for row in of_task[k]} == {"True"}
        counts = {k: {row["episodes"] for row in part} for k, part in of_task.items()}
        assert counts == {"0": {"1"}, "1": {"1"}, "2": {"0"}, "all": {"2"}}


@pytest.mark.slow
def test_butter_in_the_tray_is_the_default(tmp_path):
    """Trains the paper's ablation task with the base that ships for it."""
    flags = "--rollout-decisions 1 --eval-episodes 4 --total-env-steps 32 --run-name butter".split()
    result = script(TRAIN, tmp_path, *SMALL, *flags)
    assert result.returncode == 0, result.stderr
    assert "put_it_in_the_tray" in result.stdout
    episodes = rows(tmp_path / "runs" / "butter" / "eval.csv")
    assert [row["policy"] for row in episodes] == [policy for policy in POLICIES for _ in range(4)]
    assert {row["task"] for row in episodes} == {"56"}
    assert all(int(row["length"]) == 400 or row["success"] == "1" for row in episodes)
    assert any(row["success"] == "1" for row in episodes)


BUTTER = str(ROOT / "weights" / "libero_90_task56.safetensors")


@pytest.mark.parametrize(
    "name, flags, words",
    [
        (TRAIN, ["--suite", "libero_nowhere"], ["libero_nowhere", "libero_goal"]),
        (TRAIN, ["--suite", "libero_goal", "--task-ids", "10"], ["--task-ids has 10", "0 to 9"]),
        (TRAIN, ["--task-ids", "fifty-six"], ["--task-ids is fifty-six"]),
        (TRAIN, ["--suite", "libero_goal", "--base", BUTTER], ["--base", "libero_90_task56", "libero_goal"]),
        (TRAIN, ["--task-ids", "3"], ["weights/libero_90.safetensors", "--base", "clone_base"]),
        (TRAIN, ["--eval-episodes", "51"], ["--eval-episodes is 51", "50"]),
        (TRAIN, ["--num-envs", "0"], ["--num-envs is 0", "at least 1"]),
        (TRAIN, ["--suite", "libero_object", "--num-envs", "5"], ["--num-envs is 5", "10 tasks"]),
        (TRAIN, [*SUITE[:2], "--task-ids", "2", *SUITE[4:]], ["--task-ids", "libero_spatial", "cloned on"]),
        (TRAIN, ["--resume", "runs/nothing"], ["--resume is runs/nothing", "no run"]),
        ("evaluate.py", ["aloha.pt"], ["task aloha, here it is libero_goal"]),
        ("evaluate.py", [BUTTER, "--suite", "libero_goal"], ["libero_90_task56", "libero_goal"]),
        ("evaluate.py", [BUTTER, "--suite", "libero_90", "--episodes", "51"], ["--episodes is 51", "50"]),
        (
            "evaluate.py",
            [BUTTER, "--suite", "libero_90", "--task-ids", "90"],
            ["--task-ids has 90", "0 to 89"],
        ),
    ],
)
def test_bad_input_gets_one_sentence_and_touches_nothing(tmp_path, name, flags, words):
    args = SimpleNamespace(base="weights/libero_goal.safetensors", suite="libero_goal", task_ids=None)
    content = dict(task="aloha", env_steps=0, pi0={}, flow_steps=4, hidden=128)
    save_checkpoint(tmp_path, content, args)
    (tmp_path / "last.pt").rename(tmp_path / "aloha.pt")
    FlowBase(HEADER).save(tmp_path / "base.safetensors")
    assert_refused(here(name, tmp_path, *flags), words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["aloha.pt", "base.safetensors"]


@pytest.mark.slow
def test_without_egl(tmp_path):
    assert_refused(script(TRAIN, tmp_path, "--seed", 1, MUJOCO_GL="disable"), ["EGL", "libegl1"])
    assert not list(tmp_path.iterdir())
