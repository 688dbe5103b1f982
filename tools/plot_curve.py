"""The learning curve of README from the CSV files in results/aloha/: success on the evaluation states against steps.

    python tools/plot_curve.py            # results/aloha/curve.png
"""

import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

ROOT = Path(__file__).resolve().parents[1]


def evaluations(path):
    """Success of every evaluation in an eval.csv. -> {policy: {env_steps: (share, n)}}"""
    episodes = {}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            episodes.setdefault(row["policy"], {}).setdefault(int(row["env_steps"]), []).append(int(row["success"]))
    return {p: {t: (np.mean(v), len(v)) for t, v in steps.items()} for p, steps in episodes.items()}


if __name__ == "__main__":
    folder = ROOT / "results" / "aloha"
    runs = {path.parent.name: evaluations(path) for path in sorted(folder.glob("seed*/eval.csv"))}
    base = np.mean([run["base"][0][0] for run in runs.values()])
    zero = np.mean([run["zero latents"][0][0] for run in runs.values()])
    figure, axes = plt.subplots(figsize=(6.4, 3.6), dpi=150)
    for name, run in runs.items():
        points = {0: run["base"][0], **run["tuned"]}
        axes.plot([t / 1e6 for t in points], [100 * p for p, _ in points.values()], marker="o", ms=3, lw=1.2, label=name.replace("seed", "seed "))
    axes.axhline(100 * base, color="0.4", ls="--", lw=1, label="base")
    axes.axhline(100 * zero, color="0.4", ls=":", lw=1, label="base, zero latents")
    axes.axhline(65, color="#cc6677", ls="-.", lw=1, label="paper, after 1.6 M steps")
    axes.set(xlabel="environment steps of training (millions)", ylabel="success on held-out states (%)", ylim=(0, 100), xlim=(0, None))
    counts = sorted({n for run in runs.values() for _, n in run["tuned"].values()})
    axes.set_title(f"FPO on ALOHA Transfer Cube; {' or '.join(map(str, counts))} episodes a point", fontsize=9)
    axes.legend(fontsize=7, loc="lower right", frameon=False)
    figure.tight_layout()
    figure.savefig(folder / "curve.png")
