"""README's learning curve and table, from the CSV files in results/aloha/.

    python tools/aloha_results.py            # results/aloha/curve.png and results/aloha/table.md

A run's files there are those of its run folder: metrics.csv, eval.csv (an evaluation episode a row) and args.json.
"""

import csv
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from scipy import stats

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from run_files import rate, wilson

FOLDER = ROOT / "results" / "aloha"
COLORS = ["#332288", "#88ccee", "#44aa99", "#999933", "#cc6677"]  # Paul Tol's muted scheme, safe for colour-blind readers


def evaluations(path):
    """Episodes of every evaluation in an eval.csv, in order. -> {(policy, env_steps): {"success": (n,), "strict": (n,)}}"""
    episodes = {}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            columns = episodes.setdefault((row["policy"], int(row["env_steps"])), {"success": [], "strict": []})
            for name, values in columns.items():
                values.append(int(row[name]))
    return {key: {name: np.array(v) for name, v in columns.items()} for key, columns in episodes.items()}


def table_row(name, run):
    """One line of the table: base, zero latents and the last evaluation of one run, on the same initial states."""
    base, zero = run["base", 0], run["zero latents", 0]
    tuned = [run[key] for key in run if key[0] == "tuned"]
    steps, last = max(key[1] for key in run if key[0] == "tuned"), tuned[-1]
    cell = lambda values: rate(values.sum(), len(values)).strip().replace(" %  ", " % ")
    before = base["success"][: len(last["success"])]  # an evaluation of fewer episodes plays the first ones
    fixed, broken = (last["success"] > before).sum(), (last["success"] < before).sum()
    lowest = min(t["success"].mean() for t in tuned)
    cells = [name, f"{steps / 1e6:.2f} M", cell(base["success"]), cell(zero["success"]), f"**{cell(last['success'])}**", cell(last["strict"]),
             f"{100 * lowest:.0f} %", str(fixed), str(broken)]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    names = {path.parent.name: path.parent for path in sorted(FOLDER.glob("*/eval.csv"))}
    runs = {name: evaluations(folder / "eval.csv") for name, folder in names.items()}
    seeds = {name: run for name, run in runs.items() if name.startswith("seed")}

    lines = ["| run | steps | base | zero latents | tuned, official | tuned, strict | lowest evaluation | fixed | broken |", "|" + "---|" * 9]
    for name in [*seeds, *(name for name in runs if name not in seeds)]:
        lines.append(table_row(name.replace("seed", "seed ").replace("_", " "), runs[name]))
    final = np.array([run[max((k for k in run if k[0] == "tuned"), key=lambda k: k[1])]["success"].mean() for run in seeds.values()])
    if len(final) > 1:
        half = stats.t.ppf(0.975, len(final) - 1) * final.std(ddof=1) / np.sqrt(len(final))
        lines += ["", f"Mean of the last evaluation over {len(final)} seeds: **{100 * final.mean():.1f} % ± {100 * half:.1f}** (95 % t interval over seeds)."]
    (FOLDER / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))

    figure, axes = plt.subplots(figsize=(6.4, 3.6), dpi=150)
    for color, (name, run) in zip(COLORS, seeds.items()):
        points = [(0, run["base", 0]["success"])] + [(steps, e["success"]) for (policy, steps), e in run.items() if policy == "tuned"]
        steps = np.array([t for t, _ in points]) / 1e6
        low, high = np.array([wilson(v.sum(), len(v)) for _, v in points]).T
        axes.plot(steps, [100 * v.mean() for _, v in points], color=color, marker="o", ms=3, lw=1.2, label=name.replace("seed", "seed "))
        axes.fill_between(steps, 100 * low, 100 * high, color=color, alpha=0.12, lw=0)
    for policy, style in (("base", "--"), ("zero latents", ":")):
        share = np.mean([run[policy, 0]["success"].mean() for run in seeds.values()])
        axes.axhline(100 * share, color="0.35", ls=style, lw=1, label=policy)
    axes.axhline(65, color="0.35", ls="-.", lw=1, label="paper (π$_0$) at 1.6 M")
    axes.set(xlabel="environment steps of training (millions)", ylabel="success on held-out states (%)", ylim=(0, 100), xlim=(0, None))
    axes.set_title("FPO on ALOHA Transfer Cube: 100 episodes a point, 200 at both ends; bands: Wilson 95 %", fontsize=8)
    axes.legend(fontsize=7, loc="lower right", frameon=False, ncol=2)
    figure.tight_layout()
    figure.savefig(FOLDER / "curve.png")
