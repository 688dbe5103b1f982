"""The queue of the ablations: Table II repeated on ALOHA and on butter/tray, and what the additions of ours do.

    python tools/run_ablations.py --list          # every command, and which are done
    python tools/run_ablations.py                 # run what is missing, seed 1 of every row first; about 12 hours on two cores
    python tools/run_ablations.py --rows aloha_complete aloha_sac

A run that has ended is one block of lines in results/ablations/runs.csv, a line an evaluation, and is not run again; its curve goes into
runs_curves.csv beside that. One that was interrupted (Ctrl-C, power) goes on from its last iteration at the next call; train_sac.py and
train_cloning.py start anew. Run folders are in runs/ablations/, with another --out in runs/ablations_<its name and a number of its path>/;
one that has ended, but stands in no --out, is of a file that is gone, and is played again.
Two runs go side by side, each on its half of the cores: on two cores that is faster than one run after the other on both.
"""

import csv
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
import zlib
from collections import deque
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tqdm import tqdm

from run_files import parse_args, stop, write_atomically

ALOHA = "train_aloha.py --total-env-steps 800000 --eval-every 200000 --eval-episodes 100"
SHORT = "train_aloha.py --total-env-steps 400000 --eval-every 100000 --eval-episodes 100"
BUTTER = "train_libero.py --total-env-steps 250000 --eval-every 62500"

# row: its seeds, and its command without --seed and --run-name
ROWS = {
    # Table II on ALOHA and on butter/tray
    "aloha_complete": (5, ALOHA),
    "aloha_sac": (5, "tools/train_sac.py --task aloha --total-env-steps 800000 --eval-every 200000 --eval-episodes 100"),
    "aloha_no_clip": (5, f"{ALOHA} --clip-eps inf"),
    "aloha_k1": (5, f"{ALOHA} --explore-steps 1"),
    "aloha_single_critic": (5, f"{ALOHA} --num-critics 1"),
    "butter_complete": (3, BUTTER),
    "butter_sac": (3, "tools/train_sac.py --task libero_90_task56 --total-env-steps 250000 --eval-every 62500"),
    "butter_no_clip": (3, f"{BUTTER} --clip-eps inf"),
    "butter_k1": (3, f"{BUTTER} --explore-steps 1"),
    "butter_single_critic": (3, f"{BUTTER} --num-critics 1"),
    # the decisions D1-D16 on ALOHA, half the budget
    "short_complete": (3, SHORT),
    "short_literal": (3, f"{SHORT} --literal"),
    "short_gae": (3, f"{SHORT} --fresh-latents 0"),
    "short_no_proximal": (3, f"{SHORT} --proximal 0"),
    "short_one_iteration": (3, f"{SHORT} --window 1"),
    "short_k4": (3, f"{SHORT} --explore-steps 4"),
    "short_shuffled": (3, f"{SHORT} --shuffle-advantages"),
    "short_cloning": (3, "tools/train_cloning.py --task aloha --total-env-steps 400000 --eval-every 100000 --eval-episodes 100"),
}  # fmt: skip
MEANS = "losses/cfm_loss losses/clip_fraction losses/floor_share latent/norm latent/std".split()  # over the iterations since the last evaluation
COLUMNS = ["row", "seed", "policy", "env_steps", "successes", "episodes", "status", "minutes", "steps_to_90", *MEANS, "command"]
CURVE = dict(env_steps="charts/env_steps", success="charts/success", norm="latent/norm")  # columns of runs_curves.csv, and of metrics.csv
RESUMED = ("train_aloha.py", "train_libero.py")


CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


@dataclass
class Args:
    rows: tuple[str, ...] = tuple(ROWS)
    """rows to run"""
    seeds: int | None = None
    """only the first seeds of every row, so many; all of them if left out"""
    at_once: int = min(2, len(CORES))
    """runs side by side"""
    out: Path = ROOT / "results" / "ablations" / "runs.csv"
    """where the results go"""
    list: bool = False
    """print the commands and which are done, and end"""


def read_table(path):
    """The lines of a CSV file as dicts; none if it is not there."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def write_table(path, columns, lines):
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, columns, restval="")
    writer.writeheader()
    writer.writerows(lines)
    write_atomically(path, table.getvalue().encode())


def curve(folder):
    """Success of the last 100 training episodes and the latents' norm after every iteration of a run. -> dicts"""
    return [{name: line[key] for name, key in CURVE.items()} for line in read_table(folder / "metrics.csv") if line["charts/success"]]


def evaluations(folder):
    """The evaluations of a run folder, in order: dicts with the columns of runs.csv that it knows. steps_to_90: control steps after which 90
    of the last 100 training episodes have succeeded; empty if they never have."""
    counts = {}
    for episode in read_table(folder / "eval.csv"):
        count = counts.setdefault((episode["policy"], episode["env_steps"]), [0, 0])
        count[0] += int(episode["success"])
        count[1] += 1
    metrics = read_table(folder / "metrics.csv")
    steps = [int(line["charts/env_steps"]) for line in metrics]
    # not before 100 episodes can have ended: the first ones are the quick, successful ones
    reached = [t for t, line in zip(steps, metrics) if t >= 50_000 and float(line["charts/success"]) >= 0.9]
    before = 0
    for (policy, env_steps), (successes, episodes) in counts.items():
        known = {}
        if policy == "tuned":
            since = [line for t, line in zip(steps, metrics) if before < t <= int(env_steps)]
            columns = {key: [float(line[key]) for line in since if line.get(key)] for key in MEANS}
            known = {key: f"{sum(values) / len(values):.6g}" for key, values in columns.items() if values}
            known["steps_to_90"], before = min(reached, default=""), int(env_steps)
        yield dict(known, policy=policy, env_steps=env_steps, successes=successes, episodes=episodes)


def ended(folder):
    """Whether a run has taken all its steps. folder: of a train script."""
    try:
        total = json.loads((folder / "args.json").read_text())["args"]["total_env_steps"]
    except (OSError, ValueError, KeyError):
        return False
    metrics = read_table(folder / "metrics.csv")
    return bool(metrics) and int(metrics[-1]["charts/env_steps"]) >= total


def run(row, seed, folder):
    """One run from its start, or from where it was interrupted. folder: below runs/. -> (exit code, the end of what it printed)."""
    name, command = folder.relative_to(ROOT / "runs").as_posix(), ROWS[row][1].split()
    if command[0] in RESUMED and (folder / "last.pt").exists() and not ended(folder):
        command = [command[0], "--resume", str(folder)]
    else:
        shutil.rmtree(folder, ignore_errors=True)  # of this queue, and without a checkpoint to go on from
        command += ["--seed", str(seed), "--run-name", name]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.returncode, done.stdout


if __name__ == "__main__":
    args = parse_args(Args, __doc__)
    for row in args.rows:
        if row not in ROWS:
            stop(f"--rows has {row}, which is none of {', '.join(ROWS)}")
    if args.seeds is not None and args.seeds < 1:
        stop(f"--seeds is {args.seeds}; give at least 1, or leave it out")
    if not 1 <= args.at_once <= len(CORES):
        stop(f"--at-once is {args.at_once}; give a number from 1 to {len(CORES)}, the cores of this machine")
    queue = [(row, seed) for seed in range(1, 6) for row in args.rows if seed <= min(ROWS[row][0], args.seeds or 5)]
    # another --out has run folders of its own: the rows are played again, and those of this repository stay
    runs = ROOT / "runs" / ("ablations" if args.out.resolve() == Args.out else f"ablations_{args.out.stem}_{zlib.crc32(bytes(args.out.resolve())):08x}")
    if args.out.is_dir() or any("row" not in line or "seed" not in line for line in read_table(args.out)):
        stop(f"--out is {args.out}, which is a folder or a file of something else; give a file of this tool, or a new one")
    curves_out = args.out.with_name(f"{args.out.stem}_curves.csv")
    lines, curves = read_table(args.out), read_table(curves_out)
    done = {(line["row"], int(line["seed"])) for line in lines}
    if args.list:
        for row, seed in queue:
            print(f"{'done' if (row, seed) in done else '':5}{row} seed {seed}: python {ROWS[row][1]} --seed {seed}")
        raise SystemExit
    args.out.parent.mkdir(parents=True, exist_ok=True)
    jobs, failed, interrupted, lock = deque(job for job in queue if job not in done), [], [], threading.Lock()
    bar = tqdm(total=len(jobs), unit="run")

    def record(row, seed, folder, code, text, minutes):
        """What a run has brought goes into runs.csv at once; what a failed one said goes to the terminal."""
        diverged = "a loss became NaN or infinite" in text
        if code and not diverged:
            failed.append((row, seed))
            return tqdm.write(f"{row} seed {seed} ended with code {code}:\n{text[-1500:]}", file=sys.stderr)
        known = dict(row=row, seed=seed, status="loss not finite" if diverged else "", minutes=f"{minutes:.1f}", command=f"{ROWS[row][1]} --seed {seed}")
        curves[:] = [line for line in curves if (line["row"], line["seed"]) != (row, str(seed))]
        curves.extend(dict(point, row=row, seed=str(seed)) for point in curve(folder))
        write_table(curves_out, ["row", "seed", *CURVE], curves)
        lines.extend(known | evaluation for evaluation in evaluations(folder))
        write_table(args.out, COLUMNS, lines)  # last: from here on the run is done
        tqdm.write(f"{row} seed {seed}: {lines[-1]['successes']} of {lines[-1]['episodes']} after {lines[-1]['env_steps']} steps, {minutes:.1f} min")

    def lane(cores):
        """Take jobs until none is left, on these cores."""
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, cores)  # 0 is this thread; the runs that it starts inherit its cores
        while True:
            with lock:
                if interrupted or not jobs:
                    return
                row, seed = jobs.popleft()
            start, folder = time.perf_counter(), runs / f"{row}_seed{seed}"
            code, text = run(row, seed, folder)
            if code == 130:  # Ctrl-C: it has saved, and goes on at the next call
                interrupted.append((row, seed))
                return
            with lock:
                record(row, seed, folder, code, text, (time.perf_counter() - start) / 60)  # of the last sitting, if it was interrupted
                bar.update()

    lanes = [threading.Thread(target=lane, args=(CORES[k :: args.at_once],)) for k in range(args.at_once)]
    try:
        for thread in lanes:
            thread.start()
        for thread in lanes:
            thread.join()
    except KeyboardInterrupt:  # the runs have had it too: they save and end
        interrupted.append(None)
        for thread in lanes:
            thread.join()
    if interrupted:
        print(f"\nstopped. To go on: python {shlex.join(sys.argv)}", file=sys.stderr)
        raise SystemExit(130)
    if failed:
        stop(f"{len(failed)} runs failed; their last lines are above, and the next call tries them again", code=1)
