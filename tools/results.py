"""The learning curves and tables of README and results/, from the CSV files of the runs there.

`python tools/results.py` writes curve.png and tables in the folders of results/, and the tables in the pages.
"""

import csv
import re

from shared import ROOT  # first: it makes the folder above known
import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from support.flags import parse_args
from support.logs import wilson
from support.run_files import write_atomically

TASKS = dict(  # task: its name, folders of its seeds, the paper's π_0-FPO
    aloha=("ALOHA Transfer Cube", "aloha/seed*", "about 65 %"),
    libero_90_task56=("LIBERO, butter in the tray", "libero/butter_seed*", "78.5 %"),
    libero_spatial=("LIBERO-Spatial", "libero/libero_spatial_seed*", "97.2 %"),
    libero_object=("LIBERO-Object", "libero/libero_object_seed*", "97.3 %"),
    libero_goal=("LIBERO-Goal", "libero/libero_goal_seed*", "89.4 %"),
    libero_10=("LIBERO-Long", "libero/libero_10_seed*", "65.3 %"),
)
SUITES = [*TASKS][2:]
TABLE_2 = dict(  # row of run_ablations.py: its name in the paper, whose success on butter/tray it has (%)
    complete=("FPO (complete)", 78.5),
    sac=("without CFM ratio proxy: SAC", 32.4),
    no_clip=("without PPO clipping", 45.1),
    k1=("single-step integration (K = 1)", 61.7),
    single_critic=("single critic", 71.2),
)
EXTRAS = """complete: defaults; literal: --literal, to the letter;
stored_values: stored value latents; no_self_anchor: no self-anchor;
no_velocity_anchor: no velocity anchor; no_anchor: no anchor at all;
drift_limit: no anchor, but the drift limit 0.05; loss_cap: no anchor, but the loss cap 0.1;
prior_anchor: no anchor, but the prior anchor 0.1; advantage_limit: no anchor, but the advantage limit 1;
one_step: one decision a target; all_states: states of the actor all alike; all_noise: with all its noise;
gae: executed latents, valued by GAE; no_self_fit: own latents not fitted; one_iteration: a window of 1;
k4: K = 4; k4_midpoint: K = 4, midpoint grid; k4_end: K = 4, end grid;
raw_ratio: raw ratio exp(Δℓ) (McAllister et al.); half_latent: half the latents;
floor: σ floor 1e-8; floor_no_clip: σ floor 1e-8, without clipping;
shuffled: shuffled advantages; cloning: cloning of successes instead of FPO"""  # the other rows
COLORS = ["#332288", "#88ccee", "#44aa99", "#999933", "#cc6677"]  # Paul Tol's, safe for colour-blind readers


def read_table(path):
    """The lines of a CSV file as dicts; none if it is not there."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def evaluations(path):
    """Success in every evaluation of an eval.csv. -> {(policy, env_steps): {(task, episode): 0 or 1}}"""
    run = {}
    for row in read_table(path):
        episode = row.get("task") or row.get("task_id"), row["episode"]
        run.setdefault((row["policy"], int(row["env_steps"])), {})[episode] = int(row["success"])
    return run


def on_common_states(run):
    """Success (n,) on the states that all evaluations play: only there can points of a curve be compared."""
    common = list(set.intersection(*map(set, run.values())))
    return {key: np.array([*map(episodes.get, common)]) for key, episodes in run.items()}


def count(episodes):
    return sum(episodes.values()), len(episodes)


def played(run):
    """Counts of base, zero latents and tuned actor, its last; when that was; episodes fixed and broken."""
    base, last = run["base", 0], [key for key in run if key[0] == "tuned"][-1]
    change = [success - base[episode] for episode, success in run[last].items()]
    changed, counts = [str(change.count(1)), str(change.count(-1))], (base, run["zero latents", 0], run[last])
    return *map(count, counts), f"{last[1] / 1e6:.2f} M", changed


def silent(run):
    """Counts of the last evaluation from zero noise, of SAC with its mean latent; [] if there is none."""
    return [count(run[key]) for key in run if key[0] in ("zero noise", "tuned mean")][-1:]


def shares(counts):
    return [100 * successes / episodes for successes, episodes in counts]


def t_half(values):
    """Half the width of the 95 % t interval of the mean of values: (n,) -> a number, (n, …) -> (…)."""
    return stats.t.ppf(0.975, len(values) - 1) * np.std(values, axis=0, ddof=1) / np.sqrt(len(values))


def over_seeds(counts):
    """Mean success with each end the further one of the t interval over seeds and Wilson's over all episodes:
    near 100 % a few seeds happen to agree, and t alone vanishes. Cut off at 0 and 100 %; a dash for no
    counts. counts: (successes, episodes) a seed."""
    if not counts:
        return "–"
    total = np.sum(counts, 0)
    low, high = 100 * np.array(wilson(*total))
    if len(counts) > 1:
        mean, half = np.mean(shares(counts)), t_half(shares(counts))
        low, high = min(low, mean - half), max(high, mean + half)
    return f"{100 * total[0] / total[1]:.1f} % [{max(0.0, low):.1f}, {min(100.0, high):.1f}]"


def pooled(lines, task, policy):
    """Success over all seeds as text, a dash if nothing was played. lines: of table.csv; task: its
    number and name."""
    lines = [v for v in lines if (v["task_id"], v["task"], v["policy"]) == (*task, policy)]
    successes, episodes = (sum(int(v[name] or 0) for v in lines) for name in ("successes", "episodes"))
    return f"{100 * successes / episodes:.0f} % of {episodes}" if episodes else "–"


def publish(path, head, rows, *text):
    """Write a table and lines below it to a file, and into the pages that have markers for it."""
    names, *lines = [f"| {line} |" for line in (head, *map(" | ".join, rows))]
    lines = "\n".join([names, "|" + "---|" * (head.count("|") + 1), *lines, *text, ""])
    write_atomically(path, lines.encode())
    begin, end = f"<!-- {str(path).removeprefix(f'{ROOT}/')} -->\n", "<!-- end -->"
    for page in (ROOT / "README.md", *(ROOT / "results").glob("*.md")):
        before, found, after = page.read_text().partition(begin)
        if found:
            write_atomically(page, (before + begin + lines + end + after.partition(end)[2]).encode())


def write_runs(path, runs):
    """table.md: a row a run, on the same initial states. runs: {name: of `evaluations`}"""
    rows, kinds = [], {}  # kinds: the last evaluations of runs of one name but for the seed
    for name, run in runs.items():
        base, zero, tuned, steps, changed = played(run)
        lowest = min(shares(count(run[key]) for key in run if key[0] == "tuned"))
        base, zero, final, mean = map(over_seeds, ([base], [zero], [tuned], silent(run)))
        row = [name.replace("seed", "seed ").replace("_", " "), steps, base, zero, f"**{final}**", mean]
        rows.append([*row, f"{lowest:.0f} %", *changed])
        kind = name.split("seed")[0].removeprefix("butter").strip("_").replace("_", " ") or "FPO"
        kinds.setdefault(kind, []).append(tuned)
    means = ", ".join(f"{kind} **{over_seeds(v)}**" for kind, v in kinds.items() if len(v) > 1) or "–"
    head = "run | steps | base | zero latents | tuned | from zero noise | lowest evaluation | fixed | broken"
    publish(path, head, rows, "", f"Means of the last evaluation: {means}.")


def constant_latents(path):
    """Success on the evaluation states of base, zero latents, best of 16 and the best constant latent, for
    each search. -> {kind: [(successes, episodes)]}"""
    found = dict(constant={}, best={}, base={}, zero={})
    for row in read_table(path):
        if row["states"] == "evaluation":  # a search's last row stays
            found[row["policy"].split()[0]][row["seed"]] = int(row["successes"]), int(row["episodes"])
    return {kind: [*counts.values()] for kind, counts in found.items()}


def write_tasks(results):
    """summary.md: a row a task; libero/suites.md: a row for every task of the suites; table1.md: our rows of
    the paper's Table I. Where FPO has not been run there is what constant_latent.py found, and a dash."""
    summary, suites, ours = [], [], []
    for task, (label, pattern, paper) in TASKS.items():
        runs = [evaluations(file) for file in sorted(results.glob(f"{pattern}/eval.csv"))]
        found = constant_latents(results / f"constant_latent/{task}.csv")
        base, zero, tuned, steps = found["base"], found["zero"], [], ["–"]
        if runs:
            base, zero, tuned, steps, _ = zip(*map(played, runs))
        ours.append([np.mean(shares(counts)) if counts else np.nan for counts in (base, zero, tuned)])
        if not base:
            continue
        cells = *(f"{value:.1f} %" for value in ours[-1][:2]), over_seeds(found["constant"])
        fpo = f"**{over_seeds(tuned)}**" if tuned else "–"
        still = over_seeds(sum(map(silent, runs), []))
        summary.append(
            [label, *cells, over_seeds(found["best"]), fpo, still, str(len(runs)), steps[0], paper]
        )
        if task not in SUITES:
            continue
        lines = [line for file in sorted(results.glob(f"{pattern}/table.csv")) for line in read_table(file)]
        for own in dict.fromkeys((line["task_id"], line["task"]) for line in lines):
            if own[0].isdigit():  # the others are the average
                kinds = "base", "zero latents", "tuned", "zero noise"
                cells = (pooled(lines, own, kind) for kind in kinds)
                suites.append([label, own[0], own[1].replace("_", " "), *cells])
    head = "task | base | zero latents | constant latent | best of 16 | FPO | from zero noise | seeds | steps"
    publish(results / "summary.md", f"{head} | paper, π_0-FPO", summary)
    head = "suite | | task | base | zero latents | tuned | from zero noise"
    publish(results / "libero/suites.md", head, suites)
    page = (results / "libero/table1.md").read_text()
    for label, row in zip(("our base", "our base, zero latents", "our base + FPO"), zip(*ours[2:])):
        row = ["–" if np.isnan(value) else f"{value:.1f}" for value in [*row, np.mean(row)]]
        page = re.sub(rf"(?m)^(\| {re.escape(label)} \|) .*$", rf"\1 {' | – | '.join(row)} | – |", page)
    write_atomically(results / "libero/table1.md", page.encode())


def training_curves(path):
    """runs_curves.csv -> {row: {seed: (3, n) of control steps, success of 100 training episodes, norm}}"""
    points = {}
    for line in read_table(path):
        point = [float(line[name]) for name in ("env_steps", "success", "norm")]
        points.setdefault(line["row"], {}).setdefault(line["seed"], []).append(point)
    return {row: {seed: np.array(v).T for seed, v in seeds.items()} for row, seeds in points.items()}


def write_ablations(path):
    """table2.md and extras.md beside runs.csv: success at a quarter, half and all of the budget; when 90 of
    the last 100 training episodes had succeeded, the share of them that did in the last quarter, and the mean
    norm of the latents since the evaluation before the last."""
    runs, cells, curves = {}, {}, training_curves(path.with_name("runs_curves.csv"))
    for line in read_table(path):
        points = runs.setdefault(line["row"], {}).setdefault(line["seed"], [])
        if line["policy"] == "tuned":
            points.append([int(line[name]) for name in ("env_steps", "successes", "episodes")])
    for row, seeds in runs.items():
        found = {seed: points for seed, points in seeds.items() if points}
        cells[row] = [str(len(found)) + (f" of {len(seeds)}" if len(found) < len(seeds) else "")]
        for k in (0, 1, 3):  # a run that stopped early counts with its last evaluation
            cell = over_seeds([points[: k + 1][-1][1:] for points in found.values()])
            cells[row].append(f"**{cell}**" if k == 3 else cell)
        training = []  # of each seed
        for seed, points in found.items():
            steps, success, norm = curves[row][seed]
            # the first episodes to end are the quick, successful ones: not before 100 failures can have
            to_90 = steps[(steps >= 50_000) & (success >= 0.9)]
            late, since = steps > 0.75 * steps[-1], steps > [[0], *points][-2][0]
            training.append((to_90[:1] / 1000, 100 * success[late].mean(), norm[since].mean()))
        for values, digits in zip(zip(*training), (0, 1, 1)):
            known = np.hstack(values)
            text = ", ".join(f"{value:.{digits}f}" for value in known) or "–"
            if len(known) > 2:
                text = f"{np.mean(known):.{digits}f} ± {t_half(known):.{digits}f}"
            some = f", {len(known)} of {len(found)} seeds" if 0 < len(known) < len(found) else ""
            cells[row].append(text + some)
    rows, head = [], "seeds | a quarter | half | all | thousand steps to 90 % | training, last quarter, %"
    for row, (label, paper) in TABLE_2.items():
        for task, name in (("aloha", "ALOHA"), ("butter", "butter/tray")):
            if (key := f"{task}_{row}") in cells:
                steps = max(curve[0][-1] for curve in curves[key].values()) // 50_000 / 20
                value = str(paper) if task == "butter" else ""
                rows.append([label, f"{name}, {steps:.2g} M steps", *cells[key], value])
    publish(path.with_name("table2.md"), f"row | task | {head} | latents' norm | paper, butter/tray", rows)
    extras = [entry.split(": ", 1) for entry in EXTRAS.replace("\n", " ").split("; ")]
    rows = [[label, *cells[f"short_{row}"]] for row, label in extras if f"short_{row}" in cells]
    extras = [(f"butter_{row}", f"{label}, butter/tray") for row, label in extras]
    rows += [[label, *cells[row]] for row, label in extras if row in cells]
    publish(path.with_name("extras.md"), f"ALOHA, 0.4 M steps | {head} | latents' norm", rows)


def draw_curve(path, seeds, title, paper, paper_label):
    """curve.png: success on held-out states over training, a line a seed. seeds: {name: of `evaluations`}"""
    figure = Figure(figsize=(6.4, 3.6), dpi=150)
    axes = figure.subplots()
    seeds = {name: on_common_states(run) for name, run in seeds.items()}
    for color, (name, run) in zip(COLORS, seeds.items()):
        keys = [key for key in run if key[0] == "tuned" or key == ("base", 0)]
        steps, share = [steps / 1e6 for _, steps in keys], [100 * run[key].mean() for key in keys]
        band = 100 * np.array([wilson(run[key].sum(), len(run[key])) for key in keys])
        label = "seed " + name.split("seed")[1]
        axes.plot(steps, share, color=color, marker="o", ms=3, lw=1.2, label=label)
        axes.fill_between(steps, *band.T, color=color, alpha=0.12, lw=0)
    for policy, style in (("base", "--"), ("zero latents", ":")):
        base = np.mean([run[policy, 0].mean() for run in seeds.values()])
        axes.axhline(100 * base, color="0.35", ls=style, lw=1, label=policy)
    axes.axhline(paper, color="0.35", ls="-.", lw=1, label=paper_label)
    axes.set(xlabel="environment steps of training (millions)", ylabel="success on held-out states (%)")
    axes.set(ylim=(0, 102), xlim=(0, None))
    axes.set_title(f"FPO on {title} states at every point; bands: Wilson 95 %", fontsize=8)
    axes.legend(fontsize=7, loc="lower right", frameon=False, ncol=2)
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    parse_args(lambda: None, __doc__)  # no flags but --help
    for name, prefix, *picture in (
        ("aloha", "", "ALOHA Transfer Cube: the first 100 evaluation", 65, "paper (π$_0$) at 1.6 M"),
        ("libero", "butter_", "LIBERO, butter in the tray: the first 25 official", 78.5, "paper (π$_0$)"),
    ):
        folder = ROOT / "results" / name
        runs = {path.parent.name: evaluations(path) for path in sorted(folder.glob(f"{prefix}*/eval.csv"))}
        seeds = {run: runs[run] for run in runs if run.startswith(f"{prefix}seed")}
        write_runs(folder / "table.md", seeds | runs)
        draw_curve(folder / "curve.png", seeds, *picture)
    write_tasks(ROOT / "results")
    for path in (ROOT / "results").glob("*/runs.csv"):  # former/ and ablations/
        write_ablations(path)
