"""The ALOHA training script and evaluate.py as a user runs them: end to end on the real simulator, faults and
resume, bad input."""

import ast
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch

from helpers import ROOT, SMALL, assert_refused, assert_same_results, checkpoint, command, here, rows, script
from helpers import short
from short import HORIZON
from evaluate import latents_of
from fpo_actor import FlowActor
from support.flags import resumed_args
from support.logs import CsvLog
from support.run_files import new_run_folder, save_checkpoint

TRAIN, WHOLE = (
    "train_aloha.py",
    [*SMALL, *"--total-env-steps 1280 --eval-every 640 --explore-steps 4".split()],
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Four iterations, undisturbed, with exploration."""
    cwd = tmp_path_factory.mktemp("finished")
    result = short(TRAIN, cwd, *WHOLE, "--run-name", "whole")
    assert result.returncode == 0, result.stderr
    return cwd, result


def test_writes_what_it_promises(finished):
    cwd, result = finished
    folder = cwd / "runs" / "whole"
    for name in ("args.json", "metrics.csv", "eval.csv", "table.csv", "last.pt"):
        assert (folder / name).stat().st_size > 0, name
    metrics = rows(folder / "metrics.csv")
    steps = [int(row["charts/env_steps"]) for row in metrics]
    half, end = next(k for k in steps if k >= 640), steps[-1]
    assert steps == sorted(set(steps)) and steps[-2] < 1280 <= end <= 1600
    assert {path.name for path in folder.glob("step*.pt")} == {f"step{half:08d}.pt", f"step{end:08d}.pt"}
    assert list(folder.glob("events.out.tfevents.*"))
    for word in ("base", "zero latents", "tuned", "fixed", "broke", "kept", f"{end:,} steps"):
        assert word in result.stdout, word
    record = json.loads((folder / "args.json").read_text())
    assert record["args"]["seed"] == 1 and record["versions"]["torch"]
    # warm-up, then updates
    assert metrics[0]["losses/cfm_loss"] == "" and float(metrics[-1]["losses/cfm_loss"]) > 0
    assert [row["eval/success"] != "" for row in metrics] == [k in (half, end) for k in steps]
    episodes = rows(folder / "eval.csv")
    assert [(row["policy"], row["env_steps"], row["episode"]) for row in episodes] == [
        *[("base", "0", "0"), ("base", "0", "1"), ("zero latents", "0", "0"), ("zero latents", "0", "1")],
        *[("tuned", str(half), "0"), ("tuned", str(end), "0"), ("tuned", str(end), "1")],
    ]
    assert all(int(row["length"]) == HORIZON or row["success"] == "1" for row in episodes)
    last = [
        int(row["success"]) for row in episodes if (row["policy"], row["env_steps"]) == ("tuned", str(end))
    ]
    assert float(metrics[-1]["eval/success"]) == np.mean(last)


def test_the_actor_acts_with_ever_less_of_its_noise(finished):
    """And learns ever more slowly; evaluated it does without. An untrained actor returns its noise, of which
    Eq. 7 with the K = 4 of this run and η = 0.05 makes 0.96 · 1 · 1.04 · 1.05 times as much."""
    last = checkpoint(finished[0] / "runs" / "whole")
    steps = [int(row["charts/env_steps"]) for row in rows(finished[0] / "runs" / "whole" / "metrics.csv")]
    scales = [1 - before / 1280 for before in [0, *steps][-3:-1]]
    spread = [batch["x"].std().item() for batch in last["buffer"]]
    assert spread == pytest.approx([1.048 * scale for scale in scales], rel=0.1)
    assert last["actor_adam"]["param_groups"][0]["lr"] == pytest.approx(1e-3 * scales[1])
    tuned = latents_of(FlowActor(3, 24), 4)["tuned"]
    assert (tuned(torch.zeros(5, 3), torch.randn(5, 24)) == 0).all()


# ---- faults ----


def start(cwd, *flags):
    """-> the process, and where its output goes."""
    log, words = cwd / "output.log", command("tests/short.py", TRAIN, *flags)
    with open(log, "w") as file:
        return subprocess.Popen(words, cwd=cwd, stdout=file, stderr=file), log


def wait_until(process, condition, seconds=200):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, "the moment never came"
        time.sleep(0.01)


@pytest.mark.slow
def test_whatever_strikes_a_run_it_ends_as_the_undisturbed_one(finished):
    """One run with two workers: a worker is killed, which costs nothing, then the run itself, with -9.
    Resumed it gets a Ctrl-C, then a SIGTERM within an evaluation, and the rest is played to the end. No
    process stays, and files and parameters are those of the undisturbed run with one worker, bit for bit."""
    cwd, _ = finished
    folder = cwd / "runs" / "struck"

    def done():  # the iteration of the last row
        first = (folder / "metrics.csv").read_text().splitlines()[-1].split(",")[0]
        return int(first) if first.isdigit() else 0

    process, _ = start(cwd, *WHOLE, "--num-workers", 2, "--run-name", "struck")
    wait_until(process, lambda: (folder / "metrics.csv").exists() and done() >= 1)
    family = psutil.Process(process.pid).children(recursive=True)
    workers = [p for p in family if "spawn_main" in " ".join(p.cmdline())]
    assert len(workers) == 2
    workers[0].kill()
    wait_until(process, lambda: done() >= 2)
    family += psutil.Process(process.pid).children(recursive=True)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not psutil.wait_procs(family, 20)[1], "processes were left over"
    with open(folder / "metrics.csv", "a") as file:
        file.write("99,half a ro")  # what a crash may leave behind of an unfinished iteration

    begun = checkpoint(folder)["iteration"]
    for sign, moment in (
        (signal.SIGINT, lambda: done() == begun + 1),
        (signal.SIGTERM, lambda: "evaluate tuned" in log.read_text()),
    ):
        process, log = start(cwd, "--resume", "runs/struck")
        wait_until(process, moment)
        family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(sign)
        assert process.wait(60) == 130
        said = log.read_text()
        assert "python train_aloha.py --resume runs/struck" in said and "Traceback" not in said, said
        assert not psutil.wait_procs(family, 20)[1], "processes were left over"

    result = short(TRAIN, cwd, "--resume", "runs/struck")
    assert result.returncode == 0, result.stderr
    assert_same_results(cwd / "runs" / "whole", folder)


@pytest.mark.slow
def test_a_full_disk_stops_the_run_with_one_sentence(finished):
    """A resumed run, of which no file may grow beyond some 500 kB."""
    cwd, _ = finished
    folder = cwd / "runs" / "full"
    shutil.copytree(cwd / "runs" / "whole", folder)
    resume, small = (TRAIN, "--resume", "runs/full"), ("sh", "-c", 'ulimit -f 1000; exec "$@"', "sh")
    result = script("tests/short.py", cwd, *resume, "--total-env-steps", 4000, prefix=small)
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    assert "cannot be written" in result.stderr and "--resume runs/full" in result.stderr
    assert (folder / "last.pt").read_bytes() == (cwd / "runs" / "whole" / "last.pt").read_bytes()
    assert not list(folder.glob("*.partial"))


@pytest.mark.parametrize("end", [KeyboardInterrupt, OSError])
def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch, end):
    """Ctrl-C, SIGTERM or a full disk while a checkpoint is written."""
    args = SimpleNamespace(base="a base")
    save_checkpoint(tmp_path, dict(task="aloha", value=torch.ones(3), env_steps=1), args)

    def fail(_):
        raise end

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(end):
        save_checkpoint(tmp_path, dict(task="aloha", value=torch.ones(9999), env_steps=2), args)
    assert torch.equal(checkpoint(tmp_path)["value"], torch.ones(3))
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_a_real_limit_of_a_file_keeps_the_earlier_one(tmp_path):
    (tmp_path / "file").write_bytes(b"whole")
    code = (
        "import resource, sys; from support.run_files import write_atomically; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)); write_atomically(sys.argv[1], bytes(9999))"
    )
    command = [sys.executable, "-c", code, tmp_path / "file"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode != 0 and "File too large" in result.stderr
    assert (tmp_path / "file").read_bytes() == b"whole" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.slow
def test_nan_stops_with_the_last_good_checkpoint(tmp_path):
    """A learning rate that makes the critics overflow on real data."""
    flags = (
        "--run-name nan --total-env-steps 4000 --critic-lr 1e30 --critic-steps 4 --eval-episodes 1".split()
    )
    result = here(TRAIN, tmp_path, *SMALL, *flags, play=True)
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    assert "NaN" in result.stderr and "runs/nan/last.pt" in result.stderr
    saved = checkpoint(tmp_path / "runs" / "nan")
    assert all(value.isfinite().all() for value in saved["critic"].values())


@pytest.mark.slow
def test_track_offline(finished):
    """Weights & Biases gets every scalar of every iteration that a resumed run adds to metrics.csv."""
    cwd, _ = finished
    folder = cwd / "runs" / "tracked"
    shutil.copytree(cwd / "runs" / "whole", folder)
    before = len(rows(folder / "metrics.csv"))
    flags = ("--resume", "runs/tracked", "--track", "--total-env-steps", 2000, "--num-workers", 2)
    result = script("tests/short.py", cwd, TRAIN, *flags, WANDB_MODE="offline", HOME=str(cwd))
    assert result.returncode == 0, result.stderr
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    data, added = file.read_bytes(), rows(folder / "metrics.csv")[before:]
    assert len(added) >= 2
    for name in added[0]:
        if name != "iteration":
            assert data.count(name.encode()) >= sum(row[name] != "" for row in added), name


# ---- evaluate.py ----


@pytest.mark.slow
def test_evaluate_prints_the_same_success_as_the_run_and_makes_films(finished):
    cwd, whole = finished
    flags = ("runs/whole/last.pt", "--episodes", 2, "--video", "--run-name", "evaluated", "--num-workers", 2)
    result = short("evaluate.py", cwd, *flags)
    assert result.returncode == 0, result.stderr
    table = whole.stdout[whole.stdout.index("\n success") :]
    assert "tuned" in table and "Transfer Cube" in table and table in result.stdout
    folder = cwd / "runs" / "evaluated"
    of_run = rows(cwd / "runs" / "whole" / "eval.csv")
    assert rows(folder / "eval.csv") == [
        row for row in of_run if row["policy"] != "tuned" or row["env_steps"] == of_run[-1]["env_steps"]
    ]
    films = list(folder.glob("*.mp4"))
    assert films and all(str(path.relative_to(cwd)) in result.stdout for path in films)


@pytest.mark.slow
def test_a_base_whose_actions_overflow_costs_episodes_and_not_the_evaluation(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(ROOT / "weights" / "aloha.safetensors", "pt") as file:
        tensors, header = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()
    tensors["chunk_basis"] *= 1e38 / tensors["chunk_basis"].abs().max()
    save_file(tensors, tmp_path / "overflow.safetensors", header)
    flags = "overflow.safetensors --episodes 4 --run-name lost".split()
    result = here("evaluate.py", tmp_path, *flags, play=True)
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
    episodes = rows(tmp_path / "runs" / "lost" / "eval.csv")
    lost = [row for row in episodes if row["diverged"] == "1"]
    assert len(episodes) == 8 and lost
    assert all((row["success"], row["length"]) == ("0", "400") for row in lost)


# ---- resume and run folders ----


@dataclass
class Flags:
    beta: float = 0.2
    anneal: bool = True
    total_env_steps: int = 1_600_000
    resume: str | None = None


def test_resume_compares_flags_with_the_run_and_not_with_the_defaults(tmp_path, capsys):
    """A flag that equals its default is a change all the same, where the run had another value."""
    (tmp_path / "args.json").write_text(json.dumps(dict(args=asdict(Flags(0.3, False, 800_000)))))
    assert resumed_args(Flags, tmp_path, []) == Flags(0.3, False, 800_000, str(tmp_path))
    longer = resumed_args(Flags, tmp_path, ["--total-env-steps", "1600000"])
    assert longer == Flags(0.3, False, 1_600_000, str(tmp_path))
    for flags in (["--beta", "0.2"], ["--anneal"]):
        with pytest.raises(SystemExit) as stopped:
            resumed_args(Flags, tmp_path, flags)
        assert stopped.value.code == 2 and f"{flags[0]} from the run itself" in capsys.readouterr().err


def test_a_start_that_came_to_nothing_is_made_again(tmp_path, monkeypatch):
    """torchrun starts a run anew when a rank dies before the first checkpoint: the folder is there, its rows
    do not count."""
    monkeypatch.chdir(tmp_path)
    folder = new_run_folder("run", "default")
    CsvLog(folder / "eval.csv", ["a"]).write({"a": 1})
    with pytest.raises(SystemExit):
        new_run_folder("run", "default")
    CsvLog(new_run_folder("run", "default", again=True) / "eval.csv", ["a"]).write({"a": 2})
    assert (folder / "eval.csv").read_text().split() == ["a", "2"]


# ---- bad input ----


@pytest.fixture(scope="module")
def beside(finished):
    """The finished run and, beside it, files that are not sound: {path: time of change} of all of them."""
    cwd, _ = finished
    weights = (ROOT / "weights" / "aloha.safetensors").read_bytes()
    (cwd / "truncated.safetensors").write_bytes(weights[: len(weights) // 2])
    whole = cwd / "runs" / "whole"
    data, content = (whole / "last.pt").read_bytes(), checkpoint(whole)
    args = SimpleNamespace(base="weights/aloha.safetensors")
    flipped = bytearray(data)
    flipped[len(data) // 3] ^= 0x10
    buffer = io.BytesIO()
    torch.save(dict(task="aloha", actor=content["actor"]), buffer)
    former = buffer.getvalue()
    for name, change in dict(
        flipped=lambda path: path.write_bytes(flipped),
        cut=lambda path: path.write_bytes(data[: len(data) // 2]),
        empty=lambda path: path.write_bytes(b""),
        folder=lambda path: path.mkdir(),  # root can read every file
        libero=lambda path: save_checkpoint(path.parent, content | dict(task="libero_goal"), args),
        eight=lambda path: save_checkpoint(path.parent, content | dict(flow_steps=8), args),
        wide=lambda path: save_checkpoint(path.parent, content | dict(hidden=256), args),
        baseline=lambda path: save_checkpoint(path.parent, dict(actor={}, env_steps=0), args),
        other=lambda path: save_checkpoint(path.parent, content | dict(base_sha256="0"), args),
        former=lambda path: path.write_bytes(former + hashlib.sha256(former).digest()),
        moved=lambda path: save_checkpoint(path.parent, content, SimpleNamespace(base="gone.safetensors")),
    ).items():
        folder = cwd / "runs" / name
        folder.mkdir()
        shutil.copy(whole / "args.json", folder)
        change(folder / "last.pt")
    return cwd, {path: path.stat().st_mtime_ns for path in cwd.rglob("*")}


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--num-envs", "0"], ["--num-envs is 0", "at least 1"]),
        (["--total-env-steps", "-5"], ["--total-env-steps is -5"]),
        (["--beta", "0"], ["--beta is 0", "positive"]),
        (["--literal", "--clamp-target"], ["--clamp-target is True", "--literal sets it to False"]),
        (["--literal", "--self-fit", "0.4"], ["--self-fit is 0.4", "--literal sets it to 0.0"]),
        (["--literal", "--fresh-latents", "8"], ["--fresh-latents is 8", "--literal sets it to 0"]),
        (["--fresh-latents", "0", "--actor-states", "7"], ["--actor-states", "--fresh-latents"]),
        (["--fresh-latents", "1"], ["--fresh-latents is 1", "2 or more"]),
        (["--fresh-latents", "0"], ["--fresh-latents is 0", "--no-anneal"]),
        (["--num-envs", "1", "--rollout-decisions", "1"], ["--num-envs 1", "at least 2"]),
        (["--eval-episodes", "1001"], ["--eval-episodes is 1001", "1000"]),
        (["--clip-eps", "1.5"], ["--clip-eps is 1.5", "inf"]),
        (["--actor-lr", "nan"], ["--actor-lr is nan", "finite"]),
        (["--seed", str(2**63)], [f"--seed is {2**63}", "below 2**63"]),
        (["--pi0.latent", "full"], ["--pi0.latent is full", "no π_0"]),
        (["--pi0.chunk-steps", "3"], ["--pi0.chunk-steps is 3", "no π_0"]),
        (["--base", "a_folder", "--pi0.chunk-steps", "0"], ["--pi0.chunk-steps is 0", "at least 1"]),
        (["--base", "nowhere.safetensors"], ["--base", "nowhere.safetensors", "clone_base.py"]),
        (["--base", "truncated.safetensors"], ["--base", "truncated"]),
        (["--resume", "runs/nothing"], ["--resume is runs/nothing", "no run"]),
        (["--resume", "runs/whole", "--beta", "0.3"], ["--beta", "leave that flag out"]),
        (["--resume", "runs/whole", "--pi0.chunk-steps", "3"], ["--pi0", "leave that flag out"]),
        (["--resume", "runs/flipped"], ["runs/flipped/last.pt", "damaged"]),
        (["--resume", "runs/cut"], ["runs/cut/last.pt", "damaged"]),
        (["--resume", "runs/empty"], ["runs/empty/last.pt", "damaged"]),
        (["--resume", "runs/folder"], ["runs/folder/last.pt", "cannot be read"]),
        (["--resume", "runs/former"], ["runs/former/last.pt", "earlier version"]),
        (["--resume", "runs/libero"], ["--resume", "task libero_goal, here it is aloha"]),
        (["--resume", "runs/whole", "--self-fit", "1"], ["--self-fit", "leave that flag out"]),
        (["--resume", "runs/eight"], ["--resume", "flow_steps 8, here it is 4"]),
        (["--resume", "runs/wide"], ["--resume", "hidden 256, here it is 128"]),
        (["--resume", "runs/other"], ["--resume", "another base"]),
        (["--run-name", "whole"], ["--run-name is whole", "exists already"]),
        (["--run-name", 300 * "long"], ["--run-name is long", "name too long"]),
        (["--no-such-flag", "1"], ["no-such-flag"]),
        (["--device", "cuda"], ["--device is cuda", "--device cpu"]),
    ],
)
def test_bad_input_gets_one_sentence_and_touches_nothing(beside, flags, words):
    if flags == ["--device", "cuda"] and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    cwd, before = beside
    assert_refused(here(TRAIN, cwd, *flags), words)
    assert {path: path.stat().st_mtime_ns for path in cwd.rglob("*")} == before


@pytest.mark.parametrize(
    "flags, words",
    [
        ([], ["Missing", "a checkpoint (.pt)"]),
        (["runs/nowhere/last.pt"], ["runs/nowhere/last.pt", "cannot be read"]),
        (["runs/flipped/last.pt"], ["runs/flipped/last.pt", "damaged"]),
        (["runs/cut/last.pt"], ["runs/cut/last.pt", "damaged"]),
        (["runs/former/last.pt"], ["runs/former/last.pt", "earlier version"]),
        (["runs/baseline/last.pt"], ["runs/baseline/last.pt", "baseline", "train script"]),
        (["runs/other/last.pt"], ["another base"]),
        (["runs/moved/last.pt"], ["gone.safetensors", "--base"]),
        (["runs/libero/last.pt"], ["task libero_goal, here it is aloha"]),
        (["runs/whole/last.pt", "--base", "truncated.safetensors"], ["--base", "truncated"]),
        (["runs/whole/last.pt", "--episodes", "0"], ["--episodes is 0", "at least 1"]),
        (["runs/whole/last.pt", "--episodes", "1001"], ["--episodes is 1001", "1000"]),
        (["runs/whole/last.pt", "--run-name", "whole"], ["--run-name is whole", "exists already"]),
        (["nowhere.safetensors"], ["nowhere.safetensors", "clone_base.py"]),
        (["weights/libero_goal.safetensors"], ["libero_goal", "aloha"]),
        (["weights/aloha.safetensors", "--video"], ["--video", "checkpoint"]),
        (["weights/aloha.safetensors", "--base", "two"], ["--base is two", "leave one of the two out"]),
        (["weights/aloha.safetensors", "--pi0.latent", "full"], ["--pi0.latent is full"]),
        (["weights/aloha.safetensors", "--device", "cuda"], ["--device is cuda", "--device cpu"]),
    ],
)
def test_bad_input_of_evaluate(beside, flags, words):
    if flags[1:] == ["--device", "cuda"] and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    cwd, before = beside
    assert_refused(here("evaluate.py", cwd, *flags), words)
    assert {path: path.stat().st_mtime_ns for path in cwd.rglob("*")} == before


def test_bad_input_of_a_process_of_its_own(beside):
    cwd, before = beside
    assert_refused(script(TRAIN, cwd, "--critic-lr", "-1"), ["error: --critic-lr is -1", "positive"])
    assert {path: path.stat().st_mtime_ns for path in cwd.rglob("*")} == before


@pytest.mark.slow
def test_pictures_without_egl(finished):
    cwd, _ = finished
    for name, *flags in ((TRAIN, "--base", "a_pi0"), ("evaluate.py", "runs/whole/last.pt", "--video")):
        result = script(name, cwd, *flags, "--run-name", "without", MUJOCO_GL="disable")
        assert_refused(result, ["pictures need OpenGL", "libegl1"])
    assert not (cwd / "runs" / "without").exists()


def test_usage_examples_run_in_an_empty_folder(tmp_path):
    """The example in every component's docstring, with nothing but that file beside it."""
    components = ("fpo_actor", "fpo_critic", "fpo_loss", "fpo_buffer")
    for name in components:
        (tmp_path / name).mkdir()
        shutil.copy(ROOT / f"{name}.py", tmp_path / name)
        lines = ast.get_docstring(ast.parse((ROOT / f"{name}.py").read_text())).splitlines()
        example = [line[4:] for line in lines if line.startswith("    ") and "∇" not in line]
        assert len(example) >= 4
        (tmp_path / name / "example.py").write_text("\n".join(example))
    code = (  # one process for all of them, which forgets every component before the next
        "import runpy, sys\n"
        f"for name in {components}:\n"
        "    sys.path[0] = name\n"
        "    runpy.run_path(f'{name}/example.py')\n"
        "    del sys.modules[name]\n"
        "    assert not any(module.startswith('fpo_') for module in sys.modules)\n"
    )
    command = [sys.executable, "-c", code]
    environment = os.environ | dict(PYTHONPATH="")
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
