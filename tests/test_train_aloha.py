"""The training script as a user runs it: end to end on the real simulator, resume, reproducibility, bad input."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

ROOT = Path(__file__).parents[1]
SMALL = ("--num-envs 2 --num-workers 1 --rollout-decisions 5 --critic-warmup 1 --critic-steps 2 --actor-states 3 --fresh-latents 2 "
         "--num-critics 2 --eval-episodes 2 --device cpu --seed 1 --window 2").split()  # fmt: skip


def command(*flags):
    return [sys.executable, str(ROOT / "train_aloha.py"), *map(str, flags)]


def train(cwd, *flags, small=True, timeout=300):
    return subprocess.run(command(*(SMALL if small else ()), *flags), cwd=cwd, capture_output=True, text=True, timeout=timeout)


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def same_results(one, other):
    """Metrics equal to the last printed digit (but for times), evaluation files equal, parameters equal bit for bit."""
    timing = ("charts/SPS", "charts/rollout_seconds", "charts/update_seconds")
    strip = lambda path: [{k: v for k, v in row.items() if k not in timing} for row in rows(path / "metrics.csv")]
    assert strip(one) == strip(other)
    assert (one / "eval.csv").read_text() == (other / "eval.csv").read_text()
    with np.load(one / "latents.npz") as a, np.load(other / "latents.npz") as b:
        assert set(a.files) == set(b.files) and all(np.array_equal(a[key], b[key]) for key in a.files)
    checkpoints = [torch.load(path / "last.pt", weights_only=True) for path in (one, other)]
    for part in ("actor", "critic", "target"):
        a, b = (checkpoint[part] for checkpoint in checkpoints)
        assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Four iterations, uninterrupted, with exploration so that x^(0) and x^(K) differ."""
    cwd = tmp_path_factory.mktemp("finished")
    result = train(cwd, "--run-name", "whole", "--total-env-steps", 1600, "--eval-every", 800, "--explore-steps", 4, "--video")
    assert result.returncode == 0, result.stderr
    return cwd, result


def test_writes_what_it_promises(finished):
    cwd, result = finished
    folder = cwd / "runs" / "whole"
    for name in ("args.json", "metrics.csv", "eval.csv", "latents.npz", "last.pt"):
        assert (folder / name).stat().st_size > 0, name
    metrics = rows(folder / "metrics.csv")
    steps = [int(row["charts/env_steps"]) for row in metrics]
    half, end = next(k for k in steps if k >= 800), steps[-1]
    assert steps == sorted(set(steps)) and steps[-2] < 1600 <= end <= 2000
    assert {path.name for path in folder.glob("step*.pt")} == {f"step{half:08d}.pt", f"step{end:08d}.pt"}
    assert list(folder.glob("events.out.tfevents.*")) and list(folder.glob("*.mp4"))
    for word in ("base", "zero latents", "tuned", "gain", f"{end:,} environment steps", "runs/whole"):
        assert word in result.stdout, word
    record = json.loads((folder / "args.json").read_text())
    assert record["args"]["seed"] == 1 and record["versions"]["torch"]
    assert metrics[0]["losses/actor"] == "" and float(metrics[-1]["losses/actor"]) != 0  # warm-up, then updates
    assert float(metrics[-1]["latent/explore_shift"]) > 0
    episodes = rows(folder / "eval.csv")
    assert [(row["policy"], row["env_steps"]) for row in episodes] == [
        ("base", "0"), ("base", "0"), ("zero latents", "0"), ("zero latents", "0"), ("tuned", str(half)),
        *[("tuned", str(end))] * 2, *[("zero noise", str(end))] * 2,
    ]  # fmt: skip
    assert len({(row["episode"], row["cube_x"]) for row in episodes}) == 2  # the same initial states every time
    with np.load(folder / "latents.npz") as latents:
        assert latents["x0"].shape == latents["xK"].shape and latents["x0"].shape[1] == 24
        assert not np.array_equal(latents["x0"], latents["xK"])


def test_same_seed_same_run_whatever_the_number_of_workers(finished):
    cwd, _ = finished
    flags = ("--run-name", "again", "--total-env-steps", 1600, "--eval-every", 800, "--explore-steps", 4, "--num-workers", 2)
    assert train(cwd, *flags).returncode == 0
    same_results(cwd / "runs" / "whole", cwd / "runs" / "again")


def test_resume_ends_where_the_uninterrupted_run_ends(finished):
    cwd, _ = finished
    same = ("--eval-every", 800, "--explore-steps", 4, "--no-anneal-lr")  # annealing depends on the length of the run
    assert train(cwd, "--run-name", "steady", "--total-env-steps", 1600, *same).returncode == 0
    assert train(cwd, "--run-name", "parts", "--total-env-steps", 800, *same).returncode == 0
    # an unfinished iteration's rows are what a crash leaves behind; resume must drop them
    with open(cwd / "runs" / "parts" / "metrics.csv", "a") as file:
        file.write("99,half a ro")
    result = train(cwd, "--resume", "runs/parts", "--total-env-steps", 1600, small=False)
    assert result.returncode == 0, result.stderr
    whole, parts = (torch.load(cwd / "runs" / name / "last.pt", weights_only=True) for name in ("steady", "parts"))
    for part in ("actor", "critic", "target"):
        assert all(torch.equal(whole[part][name], parts[part][name]) for name in whole[part])
    assert torch.equal(whole["envs"]["states"], parts["envs"]["states"])
    iterations = lambda name: [row["iteration"] for row in rows(cwd / "runs" / name / "metrics.csv")]
    assert iterations("parts") == iterations("steady")


@dataclass
class Flags:
    beta: float = 0.2
    anneal_lr: bool = True
    total_env_steps: int = 1_600_000
    resume: str | None = None


def test_resume_compares_flags_with_the_run_and_not_with_the_defaults(tmp_path, capsys):
    """A flag that equals its default is a change all the same, where the run had another value."""
    from run_files import resumed_args

    (tmp_path / "args.json").write_text(json.dumps(dict(args=asdict(Flags(0.3, False, 800_000)))))
    assert resumed_args(Flags, tmp_path, []) == Flags(0.3, False, 800_000, str(tmp_path))
    assert resumed_args(Flags, tmp_path, ["--total-env-steps", "1600000"]) == Flags(0.3, False, 1_600_000, str(tmp_path))
    for flags in (["--beta", "0.2"], ["--anneal-lr"]):
        with pytest.raises(SystemExit) as stopped:
            resumed_args(Flags, tmp_path, flags)
        assert stopped.value.code == 2 and f"{flags[0]} from the run itself" in capsys.readouterr().err


def test_a_start_that_came_to_nothing_is_made_again(tmp_path, monkeypatch):
    """torchrun starts a run anew when a rank dies before the first checkpoint: the folder is there, its rows do not count."""
    from run_files import CsvLog, new_run_folder

    monkeypatch.chdir(tmp_path)
    folder = new_run_folder("run", "default")
    CsvLog(folder / "eval.csv", ["a"]).write({"a": 1})
    with pytest.raises(SystemExit):
        new_run_folder("run", "default")
    CsvLog(new_run_folder("run", "default", again=True) / "eval.csv", ["a"]).write({"a": 2})
    assert (folder / "eval.csv").read_text().split() == ["a", "2"]


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_then_resume_bit_for_bit(finished, sig):
    cwd, _ = finished
    name = f"stopped{int(sig)}"
    flags = ("--run-name", name, "--total-env-steps", 1600, "--eval-every", 800, "--explore-steps", 4)
    process = subprocess.Popen(command(*SMALL, *flags), cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    metrics = cwd / "runs" / name / "metrics.csv"
    deadline = time.time() + 120
    while time.time() < deadline and not (metrics.exists() and len(metrics.read_text().splitlines()) >= 2):
        time.sleep(0.02)
    process.send_signal(sig)
    message = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and f"--resume runs/{name}" in message and "Traceback" not in message, message
    result = train(cwd, "--resume", f"runs/{name}", small=False)
    assert result.returncode == 0, result.stderr
    same_results(cwd / "runs" / "whole", cwd / "runs" / name)


def test_eval_only_prints_the_same_success_as_the_run(finished):
    cwd, whole = finished
    result = train(cwd, "--eval-only", "--checkpoint", "runs/whole/last.pt", "--run-name", "evaluated")
    assert result.returncode == 0, result.stderr
    tuned = lambda text: [line for line in text.splitlines() if line.startswith("tuned")][-1].split()[:6]
    assert tuned(result.stdout) == tuned(whole.stdout)


@pytest.mark.parametrize("flags, words", [
    (["--num-envs", "0"], ["--num-envs is 0", "at least 1"]),
    (["--total-env-steps", "-5"], ["--total-env-steps is -5"]),
    (["--beta", "0"], ["--beta is 0", "positive"]),
    (["--literal", "--clamp-target"], ["--clamp-target is True", "--literal sets it to False"]),
    (["--clip-eps", "1.5"], ["--clip-eps is 1.5", "inf"]),
    (["--actor-lr", "nan"], ["--actor-lr is nan", "finite"]),
    (["--eval-only", "--checkpoint", "eight.pt"], ["trained with flow_steps = 8, here it is 4"]),
    (["--literal", "--proximal", "0.5"], ["--proximal is 0.5", "--literal sets it to 0.0"]),
    (["--literal", "--fresh-latents", "8"], ["--fresh-latents is 8", "--literal sets it to 0"]),
    (["--fresh-latents", "1"], ["--fresh-latents is 1", "2 or more"]),
    (["--seed", str(2**63)], [f"--seed is {2**63}", "below 2**63"]),
    (["--latent", "full"], ["--latent is full", "--base pi0"]),
    (["--chunk-steps", "3"], ["--chunk-steps is 3", "--base pi0"]),
    (["--eval-only", "--video"], ["--video", "--checkpoint"]),
    (["--base", "pi0", "--eval-only", "--weights", "one", "--checkpoint", "two"], ["--checkpoint is two", "--weights one", "leave one out"]),
    (["--weights", "nowhere.safetensors"], ["--weights", "nowhere.safetensors", "clone_base.py"]),
    (["--weights", "truncated.safetensors"], ["--weights", "truncated"]),
    (["--resume", "runs/nothing"], ["--resume is runs/nothing", "no run"]),
    (["--resume", "runs/whole", "--beta", "0.3"], ["--beta", "leave that flag out"]),
    (["--run-name", "whole"], ["--run-name is whole", "exists already"]),
    (["--run-name", 300 * "long"], ["--run-name is long", "name too long"]),
    (["--eval-only", "--checkpoint", "damaged.pt"], ["--checkpoint", "damaged"]),
    (["--eval-only", "--checkpoint", "nowhere.pt"], ["--checkpoint is nowhere.pt", "cannot be read"]),
    (["--eval-only", "--checkpoint", "other.pt"], ["task libero"]),
    (["--checkpoint", "damaged.pt"], ["--eval-only"]),
    (["--no-such-flag", "1"], ["no-such-flag"]),
    (["--device", "cuda"], ["--device is cuda", "--device cpu"]),
])  # fmt: skip
def test_bad_input_gets_one_sentence_and_touches_nothing(finished, flags, words):
    if flags == ["--device", "cuda"] and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    cwd, _ = finished
    weights = (ROOT / "weights" / "aloha.safetensors").read_bytes()
    (cwd / "truncated.safetensors").write_bytes(weights[: len(weights) // 2])
    checkpoint = bytearray((cwd / "runs" / "whole" / "last.pt").read_bytes())
    checkpoint[len(checkpoint) // 2] ^= 1
    (cwd / "damaged.pt").write_bytes(checkpoint)
    from run_files import load_checkpoint, save_checkpoint

    save_checkpoint(cwd / "other.pt", dict(task="libero"))
    save_checkpoint(cwd / "eight.pt", load_checkpoint(cwd / "runs" / "whole" / "last.pt", "", "aloha") | dict(flow_steps=8))
    before = {path: path.stat().st_mtime_ns for path in cwd.rglob("*")}
    result = train(cwd, *flags, small=False)
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    for word in words:
        assert word in result.stderr, result.stderr
    assert {path: path.stat().st_mtime_ns for path in cwd.rglob("*")} == before


@pytest.mark.parametrize("flag", ["--video", "--base pi0"])
def test_pictures_without_egl(tmp_path, flag):
    environment = dict(os.environ, MUJOCO_GL="disable")
    result = subprocess.run(command(*flag.split()), cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2 and flag in result.stderr and "libegl1" in result.stderr
    assert not list(tmp_path.iterdir())


def test_nan_stops_with_the_last_good_checkpoint(tmp_path):
    """A learning rate that makes the critics overflow on real data."""
    result = train(tmp_path, "--run-name", "nan", "--total-env-steps", 4000, "--critic-lr", "1e30", "--critic-steps", 4)
    assert result.returncode == 1 and "NaN" in result.stderr and "runs/nan/last.pt" in result.stderr, result.stderr
    assert "Traceback" not in result.stderr
    from run_files import load_checkpoint

    checkpoint = load_checkpoint(tmp_path / "runs" / "nan" / "last.pt", "--resume", "aloha")
    assert all(value.isfinite().all() for value in checkpoint["critic"].values())


def test_track_offline(tmp_path):
    """Weights & Biases gets every scalar of every iteration that metrics.csv has, here into its file in the run folder."""
    environment = dict(os.environ, WANDB_MODE="offline", HOME=str(tmp_path))
    result = subprocess.run(command(*SMALL, "--track", "--run-name", "tracked", "--total-env-steps", 1200), cwd=tmp_path, env=environment, capture_output=True,
                            text=True, timeout=200)  # fmt: skip
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "runs" / "tracked"
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    data, metrics = file.read_bytes(), rows(folder / "metrics.csv")
    assert len(metrics) >= 3
    for name in metrics[0]:
        assert data.count(name.encode()) >= sum(row[name] != "" for row in metrics), name


def test_a_file_that_cannot_be_written_stops_the_run_with_one_sentence(tmp_path):
    """As on a full disk: no file may grow beyond a limit that is set while the run goes on."""
    process = subprocess.Popen(command(*SMALL, "--run-name", "full", "--total-env-steps", 4000), cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (tmp_path / "runs" / "full" / "last.pt").exists():
        time.sleep(0.02)
    psutil.Process(process.pid).rlimit(psutil.RLIMIT_FSIZE, (500_000, 500_000))
    message = process.communicate(timeout=100)[1]
    assert process.returncode == 1 and "cannot be written" in message and "--resume runs/full" in message and "Traceback" not in message, message
    from run_files import load_checkpoint

    assert load_checkpoint(tmp_path / "runs" / "full" / "last.pt", "--resume", "aloha")["env_steps"] < 4000


def test_full_disk_keeps_the_earlier_checkpoint(tmp_path):
    from run_files import load_checkpoint, save_checkpoint

    path = tmp_path / "last.pt"
    save_checkpoint(path, dict(task="aloha", value=torch.ones(3)))
    script = (f"import resource, torch, run_files; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)); import signal; "
              f"signal.signal(signal.SIGXFSZ, signal.SIG_IGN); run_files.save_checkpoint({str(path)!r}, dict(task='aloha', value=torch.ones(9999)))")  # fmt: skip
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode != 0 and "File too large" in result.stderr
    assert torch.equal(load_checkpoint(path, "--resume", "aloha")["value"], torch.ones(3))
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


@pytest.mark.parametrize("component", ["fpo_actor", "fpo_critic", "fpo_loss", "fpo_buffer"])
def test_usage_example_runs_in_an_empty_folder(component, tmp_path):
    """The example in a component's docstring, with nothing but that file beside it."""
    shutil.copy(ROOT / f"{component}.py", tmp_path)
    scope = {}
    exec(compile((ROOT / f"{component}.py").read_text(), component, "exec"), scope)
    example = "\n".join(line[4:] for line in scope["__doc__"].splitlines() if line.startswith("    ") and "∇" not in line)
    assert len(example.splitlines()) >= 4
    result = subprocess.run([sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
    assert result.returncode == 0, result.stderr
