"""README's learning curves and tables, from the CSV files in results/aloha/ and results/libero/.

    python tools/results.py            # results/aloha/curve.png, results/aloha/table.md, the same for libero, and README's tables

A run's files there are those of its run folder: metrics.csv, eval.csv (an evaluation episode a row) and args.json.
"""

import csv
import re
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

# folder, runs that are the seeds of the picture, its title, the paper's figure and its name
PICTURES = (
    ("aloha", "seed", "FPO on ALOHA Transfer Cube: 100 episodes a point, 200 at both ends", 65, "paper (π$_0$) at 1.6 M"),
    ("libero", "butter_seed", "FPO on LIBERO, butter in the tray: 25 official states a point, 50 at both ends", 78.5, "paper (π$_0$)"),
)
COLORS = ["#332288", "#88ccee", "#44aa99", "#999933", "#cc6677"]  # Paul Tol's muted scheme, safe for colour-blind readers


def evaluations(path):
    """Episodes of every evaluation in an eval.csv, in order. -> {(policy, env_steps): {"success": (n,), "strict": (n,), "episode": …}}"""
    episodes = {}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            columns = episodes.setdefault((row["policy"], int(row["env_steps"])), {"success": [], "strict": [], "episode": []})
            columns["success"].append(int(row["success"]))
            columns["strict"].append(int(row.get("strict", row["success"])))  # LIBERO knows one success only
            columns["episode"].append((row.get("task_id"), row["episode"]))
    return {key: {name: v if name == "episode" else np.array(v) for name, v in columns.items()} for key, columns in episodes.items()}


def table_row(name, run):
    """One line of the table: base, zero latents and the last evaluation of one run, on the same initial states."""
    base, zero = run["base", 0], run["zero latents", 0]
    tuned = [run[key] for key in run if key[0] == "tuned"]
    steps, last = max(key[1] for key in run if key[0] == "tuned"), tuned[-1]
    cell = lambda values: rate(values.sum(), len(values)).strip().replace(" %  ", " % ")
    before = dict(zip(base["episode"], base["success"]))  # an evaluation of fewer episodes plays some of these
    before = np.array([before[episode] for episode in last["episode"]])
    fixed, broken = (last["success"] > before).sum(), (last["success"] < before).sum()
    lowest = min(t["success"].mean() for t in tuned)
    cells = [name, f"{steps / 1e6:.2f} M", cell(base["success"]), cell(zero["success"]), f"**{cell(last['success'])}**", cell(last["strict"]),
             f"{100 * lowest:.0f} %", str(fixed), str(broken)]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def write_table(folder, runs, seeds, strict):
    """table.md of a folder: a row a run, the seeds first."""
    lines = ["| run | steps | base | zero latents | tuned | tuned, strict | lowest evaluation | fixed | broken |", "|" + "---|" * 9]
    for name in [*seeds, *(name for name in runs if name not in seeds)]:
        lines.append(table_row(name.replace("seed", "seed ").replace("_", " "), runs[name]))
    if not strict:
        lines = ["|".join(cell for i, cell in enumerate(line.split("|")) if i != 6) for line in lines]
    final = np.array([run[max((k for k in run if k[0] == "tuned"), key=lambda k: k[1])]["success"].mean() for run in seeds.values()])
    if len(final) > 1:
        half = stats.t.ppf(0.975, len(final) - 1) * final.std(ddof=1) / np.sqrt(len(final))
        lines += ["", f"Mean of the last evaluation over {len(final)} seeds: **{100 * final.mean():.1f} % ± {100 * half:.1f}** (95 % t interval over seeds)."]
    (folder / "table.md").write_text("\n".join(lines) + "\n")
    readme = ROOT / "README.md"
    begin, end = f"<!-- results/{folder.name}/table.md -->\n", "<!-- end -->"
    new = begin + "\n".join(lines) + "\n" + end
    readme.write_text(re.sub(re.escape(begin) + ".*?" + end, lambda _: new, readme.read_text(), count=1, flags=re.S))
    print("\n".join(lines))


def draw_curve(folder, seeds, title, papers, paper_label):
    """curve.png of a folder: success on held-out states over training, a line a seed."""
    figure, axes = plt.subplots(figsize=(6.4, 3.6), dpi=150)
    for color, (name, run) in zip(COLORS, seeds.items()):
        points = [(0, run["base", 0]["success"])] + [(steps, e["success"]) for (policy, steps), e in run.items() if policy == "tuned"]
        steps = np.array([t for t, _ in points]) / 1e6
        low, high = np.array([wilson(v.sum(), len(v)) for _, v in points]).T
        axes.plot(steps, [100 * v.mean() for _, v in points], color=color, marker="o", ms=3, lw=1.2, label="seed " + name.split("seed")[1])
        axes.fill_between(steps, 100 * low, 100 * high, color=color, alpha=0.12, lw=0)
    for policy, style in (("base", "--"), ("zero latents", ":")):
        share = np.mean([run[policy, 0]["success"].mean() for run in seeds.values()])
        axes.axhline(100 * share, color="0.35", ls=style, lw=1, label=policy)
    axes.axhline(papers, color="0.35", ls="-.", lw=1, label=paper_label)
    axes.set(xlabel="environment steps of training (millions)", ylabel="success on held-out states (%)", ylim=(0, 102), xlim=(0, None))
    axes.set_title(f"{title}; bands: Wilson 95 %", fontsize=8)
    axes.legend(fontsize=7, loc="lower right", frameon=False, ncol=2)
    figure.tight_layout()
    figure.savefig(folder / "curve.png")
    plt.close(figure)


if __name__ == "__main__":
    for name, prefix, title, papers, paper_label in PICTURES:
        folder = ROOT / "results" / name
        runs = {path.parent.name: evaluations(path) for path in sorted(folder.glob("*/eval.csv"))}
        seeds = {run: episodes for run, episodes in runs.items() if run.startswith(prefix)}
        if seeds:
            write_table(folder, runs, seeds, strict=name == "aloha")
            draw_curve(folder, seeds, title, papers, paper_label)
