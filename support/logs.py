"""What a run says of itself: metrics.csv, eval.csv, TensorBoard, progress bars; and success rates."""

import csv
import io
import math
import re
import sys
from dataclasses import asdict

import numpy as np
from tqdm import tqdm

from support.flags import RANK, say, stop
from support.run_files import write_atomically

# statsmodels and wandb are imported where they are used: --help need not wait for them

METRICS = (
    "iteration charts/env_steps charts/success charts/return charts/episode_length charts/SPS "
    "charts/rollout_seconds charts/update_seconds eval/success losses/critic losses/surrogate "
    "losses/clip_fraction losses/floor_share losses/cfm_loss critic/q_mean critic/q_spread "
    "latent/norm"
).split()
EPISODES = "policy env_steps task episode success length diverged".split()


def mean(values):
    """The mean of a list, or the "" of an empty cell."""
    return float(np.mean(values)) if len(values) else ""


def wilson(successes, n):
    """Wilson 95 % interval of a success rate. -> (low, high)."""
    from statsmodels.stats.proportion import proportion_confint

    return proportion_confint(successes, n, method="wilson")


def rate(successes, n):
    """A success rate as text, with its Wilson interval in percent."""
    low, high = wilson(successes, n)
    return f"{100 * successes / n:5.1f} %  [{100 * low:.1f}, {100 * high:.1f}]"


def progress_bar(total, **options):
    """A bar of the rank that writes; options: tqdm's. Where it is no terminal it speaks twice a minute."""
    seconds = 0.5 if sys.stderr.isatty() else 30.0
    return tqdm(total=total, mininterval=seconds, disable=RANK > 0, **options)


def steps_bar(total, initial=0):
    """The bar of a run: control steps, a second, time left."""
    return progress_bar(total, initial=initial, unit="step", unit_scale=True, smoothing=0.1)


def check_finite(row, folder):
    """Stop if a loss of a row of metrics is NaN or infinite."""
    if not all(math.isfinite(value) for key, value in row.items() if key.startswith("losses/")):
        good = f"the last good checkpoint is {folder / 'last.pt'}"
        what = f"a loss became NaN or infinite in iteration {row['iteration']}; {good}"
        stop(f"{what}. Start a new run with a lower --actor-lr or --critic-lr", code=1)


class RunLogs:
    """What rank 0 writes of a run as it goes: metrics.csv, the same scalars for TensorBoard (and Weights &
    Biases), and eval.csv, an evaluation episode a row. saved: on resume, the checkpoint; what was written
    after it is dropped."""

    def __init__(self, folder, args, saved=None):
        self.episodes = self.metrics = self.track = None
        if RANK > 0:
            return
        from torch.utils.tensorboard import SummaryWriter

        kept = saved["logs"] if saved else {}
        self.metrics = CsvLog(folder / "metrics.csv", METRICS, kept.get("metrics"))
        self.episodes = CsvLog(folder / "eval.csv", EPISODES, kept.get("episodes"))
        self.scalars = SummaryWriter(folder, purge_step=saved["env_steps"] + 1 if saved else None)
        if args.track:
            import wandb

            options = dict(name=folder.name, resume="allow", dir=folder, config=asdict(args))
            options["id"] = re.sub(r"[:;,#?/'\\]", "-", folder.name)
            self.track = self._tracked(wandb.init, project="fpo", **options)

    def write(self, row, env_steps):
        """A row of metrics, after env_steps control steps; "" is an empty cell."""
        if RANK > 0:
            return
        self.metrics.write(row)
        known = {key: value for key, value in row.items() if value != "" and key != "iteration"}
        for key, value in known.items():
            self.scalars.add_scalar(key, value, env_steps)
        if self.track:
            self._tracked(self.track.log, known, step=env_steps)

    def rows(self):
        """How many rows the files have, for the checkpoint."""
        return dict(metrics=self.metrics.rows, episodes=self.episodes.rows) if self.metrics else None

    def _tracked(self, call, *values, **options):
        """call(…) of Weights & Biases. A failure is told once, and the run goes on without it."""
        try:
            return call(*values, **options)
        except Exception as error:
            self.track = None
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            say(f"Weights & Biases failed ({reason}); the run goes on without it")


class CsvLog:
    """A CSV file that grows by rows. `keep`: on resume, how many rows to keep of what is there."""

    def __init__(self, path, columns, keep=None):
        header = ",".join(columns)
        lines = [f"{header}\r\n"]
        if keep is not None:
            with open(path, newline="") as file:
                lines = file.readlines()[: keep + 1]
            if len(lines) <= keep or lines[0].strip() != header:
                stop(f"--resume: {path} is damaged, rows are missing; restore it, or start a new run")
        write_atomically(path, "".join(lines).encode())
        self.rows = keep or 0
        self.file = open(path, "a", newline="")
        self.writer = csv.DictWriter(self.file, columns, restval="")

    def write(self, row):
        self.writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
        self.file.flush()
        self.rows += 1


def write_table(path, rows):
    """Write a small table as CSV, in one piece; Wilson intervals beside every count of successes. rows:
    dicts."""
    added = ["success", "wilson_low", "wilson_high"]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [*dict.fromkeys(key for row in rows for key in row), *added], restval="")
    writer.writeheader()
    for row in rows:
        n, shares = row.get("episodes"), ()
        if n:
            shares = (f"{share:.4f}" for share in (row["successes"] / n, *wilson(row["successes"], n)))
        writer.writerow(row | dict(zip(added, shares)))
    write_atomically(path, text.getvalue().encode())
