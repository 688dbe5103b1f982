"""Whatever dies on the way costs at most one iteration: faults in short real runs of train_aloha.py, and what is left afterwards.

    python tools/fault_campaign.py                    # five minutes and more; writes results/faults.md
    python tools/fault_campaign.py --tries 20 --only "kill -9 of the parent"

A run of six iterations is made once without a fault. After every fault: no process is left over, the last checkpoint is whole, and the run, resumed where
it had to stop, ends where the undisturbed one ended: metrics, evaluation rows and latents equal, parameters bit for bit. Moments are drawn from --seed.
"""

import csv
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import psutil
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from ranks import CPUS
from run_files import parse_args, stop, write_atomically

SMALL = ("--num-envs 4 --num-workers 2 --rollout-decisions 4 --critic-warmup 1 --critic-steps 12 --actor-states 8 --fresh-latents 2 "
         "--num-critics 2 --eval-episodes 4 --eval-every 1280 --total-env-steps 3840 --device cpu --seed 3").split()  # fmt: skip
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
TRAIN = str(ROOT / "train_aloha.py")


@dataclass
class Args:
    tries: int = 1
    """tries of every kill -9; a quarter as many, and at least 2, of the other faults that strike at a random moment, 1 of the rest"""
    seed: int = 0
    """seed of the moments"""
    at_once: int = CPUS
    """tries side by side"""
    only: str | None = None
    """one fault alone, by its name in the table"""
    out: Path = ROOT / "results" / "faults.md"
    """where the table goes"""


class Run:
    """One run in `folder`/runs/<name>, its output in a file."""

    def __init__(self, folder, name, *flags, launcher=(sys.executable,), resume=False):
        self.path, self.log = folder / "runs" / name, folder / f"{name}.log"
        flags = ["--resume", self.path] if resume else [*SMALL, "--run-name", name, *flags]
        with open(self.log, "w") as log:
            self.process = subprocess.Popen([*launcher, TRAIN, *map(str, flags)], cwd=folder, stdout=log, stderr=log,
                                            env=dict(os.environ, OMP_NUM_THREADS="1", LOCAL_WORLD_SIZE="2"))  # fmt: skip
        self.family = {}

    def descendants(self):
        """Every process that the run has started so far and that is alive."""
        try:
            self.family |= {p.pid: p for p in psutil.Process(self.process.pid).children(recursive=True)}
        except psutil.NoSuchProcess:
            pass
        return [p for p in self.family.values() if is_alive(p)]

    def wait_until(self, condition, seconds=120):
        """Look often until the condition holds or the run ends. -> whether it held"""
        deadline, looked = time.monotonic() + seconds, 0.0
        while self.process.poll() is None and time.monotonic() < deadline:
            if time.monotonic() > looked + 0.2:
                looked = time.monotonic()
                self.descendants()
            if condition():
                return True
            time.sleep(0.002)
        return False

    def finish(self, seconds=180):
        """Wait for the end, and for the end of every process of the run. -> exit code; raises if one stays."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            for p in [*self.descendants(), self.process]:
                p.kill()
            raise AssertionError("it did not end") from None
        deadline = time.monotonic() + 20
        while (left := self.descendants()) and time.monotonic() < deadline:
            time.sleep(0.1)
        for p in left:
            p.kill()
        assert not left, f"{len(left)} processes were left over"
        return code

    def said(self):
        return self.log.read_text()

    def iterations(self):
        path = self.path / "metrics.csv"
        return len(path.read_text().splitlines()) - 1 if path.exists() else 0


def is_alive(process):
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def command_of(process):
    """Its command line; empty for one that has just ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:  # a zombie too
        return ""


def table_of(path):
    with open(path, newline="") as file:
        timing = ("charts/SPS", "charts/rollout_seconds", "charts/update_seconds")
        return [{k: v for k, v in row.items() if k not in timing} for row in csv.DictReader(file)]


def assert_same(whole, run):
    """Metrics, evaluation rows, latents and parameters of two finished runs are equal."""
    for name in ("metrics.csv", "eval.csv"):
        assert table_of(whole / name) == table_of(run / name), f"{name} differs"
    with np.load(whole / "latents.npz") as a, np.load(run / "latents.npz") as b:
        assert all(np.array_equal(a[key], b[key]) for key in a.files), "latents.npz differs"
    a, b = (torch.load(path / "last.pt", weights_only=True) for path in (whole, run))
    for part in ("actor", "critic", "target"):
        assert all(torch.equal(a[part][name], b[part][name]) for name in a[part]), f"the {part} differs"


def go_on(folder, run, whole, launcher=(sys.executable,)):
    """Resume a run that was stopped, or start it anew if it had not come to its first checkpoint; it must end as the undisturbed one."""
    if (run.path / "last.pt").exists():
        again = Run(folder, run.path.name, launcher=launcher, resume=True)
    else:
        shutil.rmtree(run.path, ignore_errors=True)
        again = Run(folder, run.path.name, launcher=launcher)
    code = again.finish()
    assert code == 0, f"resume ended with code {code}: {again.said()[-300:]}"
    assert_same(whole, run.path)


def struck(run, moment, first=0):
    """Wait for a random moment of a run's six iterations: after the first so many, and a part of the next; raises if the run has ended before."""
    done, share = divmod((5 - first) * moment, 1)
    met = run.wait_until(lambda: run.iterations() >= done + first)
    run.wait_until(lambda: False, share * (0.5 if done + first else 4))  # the start takes longer than an iteration
    assert met and run.process.poll() is None, "the moment never came"


# ---- the faults: each takes (folder, name, moment in [0, 1), undisturbed run, random generator) and asserts ----


def kill_parent(folder, name, moment, whole, rng):
    run = Run(folder, name)
    struck(run, moment)
    run.process.kill()
    assert run.finish() == -signal.SIGKILL
    go_on(folder, run, whole)


def kill_worker(folder, name, moment, whole, rng, sign=signal.SIGKILL):
    run = Run(folder, name)
    run.wait_until(lambda: any("spawn_main" in command_of(p) for p in run.descendants()))
    struck(run, moment)
    workers = [p for p in run.descendants() if "spawn_main" in command_of(p)]
    workers[rng.integers(len(workers))].send_signal(sign)
    assert run.finish() == 0, run.said()[-300:]
    assert_same(whole, run.path)


def hang_worker(*arguments):
    kill_worker(*arguments, sign=signal.SIGSTOP)


def kill_rank(folder, name, moment, whole, rng):
    run = Run(folder, name, launcher=TORCHRUN)
    ranks = lambda: [p for p in psutil.Process(run.process.pid).children() if "train_aloha" in command_of(p)]
    run.wait_until(ranks)
    struck(run, moment)  # before its first checkpoint too
    alive = ranks()
    alive[rng.integers(len(alive))].kill()
    code = run.finish()
    assert code == 0, f"torchrun ended with code {code}: {run.said()[-300:]}"
    assert_same(whole.with_name("whole_two_ranks"), run.path)


def interrupt(folder, name, whole, sign, wait):
    """A signal after `wait(run)`."""
    run = Run(folder, name)
    wait(run)
    run.process.send_signal(sign)
    code = run.finish()
    assert code == 130 and "Traceback" not in run.said(), f"code {code}: {run.said()[-300:]}"
    assert "--resume" in run.said() or "before the first checkpoint" in run.said(), "it did not say how to go on"
    go_on(folder, run, whole)


def holds(condition):
    """A wait for condition(run)."""

    def wait(run):
        assert run.wait_until(lambda: condition(run)), "the moment never came"

    return wait


def at_random(sign):  # not before the first iteration: Python may still be importing
    return lambda folder, name, moment, whole, rng: interrupt(folder, name, whole, sign, lambda run: struck(run, moment, first=1))


def in_evaluation(sign):
    return lambda folder, name, moment, whole, rng: interrupt(folder, name, whole, sign, holds(lambda run: "evaluate tuned" in run.said()))


def in_checkpoint(sign):
    def fault(folder, name, moment, whole, rng):
        interrupt(folder, name, whole, sign, holds(lambda run: run.iterations() >= 1 + 3 * moment and (run.path / "last.pt.partial").exists()))

    return fault


def full_disk(folder, name, moment, whole, rng):
    size = (whole / "last.pt").stat().st_size
    run = Run(folder, name)
    assert run.wait_until(lambda: run.iterations() >= 1 + 4 * moment), "the moment never came"
    limit = int(size * (0.3 + 0.6 * moment))
    psutil.Process(run.process.pid).rlimit(psutil.RLIMIT_FSIZE, (limit, limit))  # no file may grow beyond this, as if the disk were full
    code = run.finish()
    assert code == 1 and "cannot be written" in run.said() and "Traceback" not in run.said(), f"code {code}: {run.said()[-300:]}"
    go_on(folder, run, whole)


def damaged(change):
    """A checkpoint that `change(bytes, moment)` has damaged: one sentence, and nothing touched."""

    def fault(folder, name, moment, whole, rng):
        path = folder / "runs" / name
        shutil.copytree(whole, path)
        (path / "last.pt").write_bytes(change((path / "last.pt").read_bytes(), moment))
        before = {p: p.read_bytes() for p in path.iterdir()}
        run = Run(folder, name, resume=True)
        code = run.finish()
        assert code == 2 and "last.pt" in run.said() and "Traceback" not in run.said(), f"code {code}: {run.said()[-300:]}"
        assert before == {p: p.read_bytes() for p in path.iterdir()}, "files were touched"

    return fault


def unreadable(folder, name, moment, whole, rng):
    path = folder / "runs" / name
    shutil.copytree(whole, path)
    (path / "last.pt").unlink()
    (path / "last.pt").mkdir()  # root can read every file
    run = Run(folder, name, resume=True)
    code = run.finish()
    assert code == 2 and "cannot be read" in run.said() and "Traceback" not in run.said(), f"code {code}: {run.said()[-300:]}"


def infinite_actions(folder, name, moment, whole, rng):
    """A base whose actions overflow: what the simulator cannot do costs the episode, counted as failed, not the run."""
    with safe_open(ROOT / "weights" / "aloha.safetensors", "pt") as file:
        tensors, header = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()
    tensors["chunk_basis"] *= 1e38 / tensors["chunk_basis"].abs().max()
    save_file(tensors, folder / "overflow.safetensors", header)
    run = Run(folder, name, "--weights", folder / "overflow.safetensors", "--eval-only")
    code = run.finish()
    assert code == 0 and "Traceback" not in run.said(), f"code {code}: {run.said()[-300:]}"
    rows = table_of(run.path / "eval.csv")
    lost = [row for row in rows if row["diverged"] == "1"]
    assert len(rows) == 8 and lost and all(row["success"] == "0" for row in lost), "episodes were not counted as failed"


def nan_in_a_loss(folder, name, moment, whole, rng):
    run = Run(folder, name, "--critic-lr", "1e30")
    code = run.finish()
    assert code == 1 and "NaN" in run.said() and "last.pt" in run.said() and "Traceback" not in run.said(), f"code {code}: {run.said()[-300:]}"
    saved = torch.load(run.path / "last.pt", weights_only=True)
    assert all(value.isfinite().all() for value in saved["critic"].values()), "the checkpoint is not the last good one"


def flip(data, moment):
    changed = bytearray(data)
    changed[int(moment * len(data))] ^= 0x10
    return bytes(changed)


every, quarter, once = lambda tries: tries, lambda tries: max(min(2, tries), tries // 4), lambda tries: 1
FAULTS = {  # name: (fault, how many of N tries it gets)
    "kill -9 of the parent": (kill_parent, every),
    "kill -9 of a worker": (kill_worker, every),
    "kill -9 of a rank under torchrun --max-restarts 1": (kill_rank, every),
    "a worker that hangs": (hang_worker, once),
    "Ctrl-C in rollout or update": (at_random(signal.SIGINT), quarter),
    "SIGTERM in rollout or update": (at_random(signal.SIGTERM), quarter),
    "Ctrl-C in an evaluation": (in_evaluation(signal.SIGINT), once),
    "SIGTERM in an evaluation": (in_evaluation(signal.SIGTERM), once),
    "Ctrl-C while a checkpoint is written": (in_checkpoint(signal.SIGINT), quarter),
    "SIGTERM while a checkpoint is written": (in_checkpoint(signal.SIGTERM), quarter),
    "a full disk": (full_disk, quarter),
    "an unreadable checkpoint": (unreadable, once),
    "a checkpoint cut short": (damaged(lambda data, moment: data[: int(moment * len(data))]), quarter),
    "a checkpoint with a flipped bit": (damaged(flip), quarter),
    "actions that are not finite": (infinite_actions, once),
    "NaN in a loss": (nan_in_a_loss, once),
}


if __name__ == "__main__":
    args = parse_args(Args, __doc__)
    if args.tries < 1:
        stop(f"--tries is {args.tries}; give at least 1")
    if args.only and args.only not in FAULTS:
        stop(f"--only is {args.only!r}, which is none of: {'; '.join(FAULTS)}")
    if args.at_once < 1:
        stop(f"--at-once is {args.at_once}; give at least 1")
    chosen = {name: fault for name, fault in FAULTS.items() if args.only in (None, name)}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.at_once) as pool:
        folder, start = Path(folder), time.monotonic()
        undisturbed, two = Run(folder, "whole"), Run(folder, "whole_two_ranks", launcher=TORCHRUN)  # side by side, as the tries below
        assert undisturbed.finish() == 0, undisturbed.said()
        assert two.finish() == 0, two.said()
        bar = tqdm(total=sum(count(args.tries) for _, count in chosen.values()), unit="fault")

        def attempt(number, name, i):
            """One try; its moment depends on the seed, the fault and the try alone. -> whether it was survived"""
            rng = np.random.default_rng([args.seed, number, i])
            try:
                FAULTS[name][0](folder, f"fault{number}_{i}", rng.random(), undisturbed.path, rng)
                return True
            except Exception as error:
                tqdm.write(f"{name}, try {i}: {error or type(error).__name__}")
                return False
            finally:
                shutil.rmtree(folder / "runs" / f"fault{number}_{i}", ignore_errors=True)
                bar.update()

        tries = {name: [pool.submit(attempt, number, name, i) for i in range(count(args.tries))]
                 for number, (name, (_, count)) in enumerate(FAULTS.items()) if name in chosen}  # fmt: skip
        survived = {name: [one.result() for one in several] for name, several in tries.items()}
        bar.close()
    lines = ["| fault | tries | survived |", "|---|---|---|", *(f"| {name} | {len(k)} | {sum(k)} |" for name, k in survived.items())]
    failures = sum(len(k) - sum(k) for k in survived.values())
    if args.only is None:
        command = f"python tools/fault_campaign.py --tries {args.tries} --seed {args.seed} --at-once {args.at_once}"
        minutes = (time.monotonic() - start) / 60
        text = "\n".join([*lines, "", f"`{command}`, {minutes:.0f} minutes. Survived: see the top of the tool."]) + "\n"
        write_atomically(args.out, text.encode())
    print("\n".join(lines))
    if failures:
        stop(f"{failures} faults were not survived; see above", code=1)
