"""The tables of README and results/, from the CSV files of the runs there.

`python tools/results.py` writes them in the folders of results/, and in the pages.
"""

import csv
import json
import re

from shared import ROOT  # first: it makes the folder above known
import numpy as np
import pandas as pd
from scipy import stats

from run_ablations import PARTS, PEERS
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
KINDS = ["base", "zero latents", "tuned"]
SILENT = {"zero noise": "tuned", "tuned mean": "tuned"}  # older runs played the actor with noise, then so
ROWS = {"": "FPO", "long": "FPO, `--total-env-steps 1600000 --eval-every 400000`"}
ROWS |= {row: f"{name}: `{command}`" for row, (name, command) in (PARTS | PEERS).items()}


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
    """Counts of base, zero latents and tuned actor, its last; and when that was."""
    base, last = run["base", 0], [key for key in run if key[0] == "tuned" or key[0] in SILENT][-1]
    return *map(count, (base, run["zero latents", 0], run[last])), f"{last[1] // 10_000 / 100:.2f} M"


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


def counts_from(folder):
    """The control step of a run from which its training episodes count: the quick, successful ones end first,
    so three time limits of all environments."""
    limit = max(int(line["length"]) for line in read_table(folder / "eval.csv"))
    return 3 * limit * json.loads((folder / "args.json").read_text())["args"]["num_envs"]


def training(folder):
    """What metrics.csv says of a run: thousand steps until 90 of the last 100 training episodes had
    succeeded, a dash if never; the share that did in the last quarter, %; the norm of the latents in it;
    minutes."""
    lines = read_table(folder / "metrics.csv")
    names = "charts/env_steps", "charts/success", "latent/norm", "charts/SPS"
    steps, success, norm, speed = (np.array([float(v[k] or "nan") for v in lines]) for k in names)
    late = steps > 0.75 * steps[-1]
    minutes = np.nansum(np.diff(steps, prepend=0) / speed) / 60
    to_90 = [f"{step / 1000:.0f}" for step in steps[(steps >= counts_from(folder)) & (success >= 0.9)][:1]]
    return (*to_90, "–")[0], 100 * np.nanmean(success[late]), norm[late].mean(), minutes


def write_rows(path, folders):
    """table.md: a row for each kind of run, over its seeds. folders: {row: the folders of its runs}"""
    rows, bases, zeros = [], {}, {}  # dicts, for their order
    for row, paths in folders.items():
        runs = [evaluations(folder / "eval.csv") for folder in paths]
        base, zero, tuned, steps = zip(*map(played, runs))
        bases |= dict.fromkeys(base)
        zeros |= dict.fromkeys(zero)
        to_90, late, norm, minutes = zip(*map(training, paths))
        each = ", ".join(f"{share:.1f}" for share in shares(tuned))
        numbers = ", ".join(to_90), ", ".join(f"{x:.1f}" for x in late), f"{np.mean(norm):.1f}"
        cells = ROWS[row], steps[-1], f"**{over_seeds(tuned)}**", each
        rows.append([*cells, *numbers, f"{np.mean(minutes):.0f}"])
    head = "run | steps | last evaluation | its seeds | 90 of 100 after, k steps"
    base, zero = (" or ".join(over_seeds([counts]) for counts in found) for found in (bases, zeros))
    text = f"Base {base}, zero latents {zero}."
    publish(path, f"{head} | last quarter of training, % | norm | minutes", rows, "", text)


def runs_of(task):
    """{row: the folders of its runs, by seed}, of "aloha/" or "libero/butter_"."""
    folders = {}
    for row in ROWS:
        paths = sorted((ROOT / "results").glob(f"{task}{row + '_' * bool(row)}seed*"))
        folders |= {row: paths} if paths else {}
    return folders


def write_peers(path):
    """peers.md: over ALOHA and butter/tray, and their first seeds, the interquartile mean of the last
    evaluation and the probability of a better run than one of FPO, with stratified bootstrap intervals
    (rliable, arXiv 2108.13264)."""
    from rliable import library, metrics  # slow to import

    tasks, scores = [runs_of(task) for task in ("aloha/", "libero/butter_")], {}
    for row in ("", *PEERS):
        ends = []  # of each task, the share of a run's last evaluation that succeeded
        for runs in tasks:
            counts = [played(evaluations(folder / "eval.csv"))[2] for folder in runs.get(row, ())]
            ends.append(shares(counts))
        if (n := min(map(len, ends))) > 1:
            scores[ROWS[row]] = np.array([end[:n] for end in ends]).T  # (seeds, tasks)
    np.random.seed(0)  # what rliable draws from
    mean, within = library.get_interval_estimates(
        scores, lambda x: np.array([metrics.aggregate_iqm(x)]), reps=1000
    )
    pairs = {name: (score, scores["FPO"]) for name, score in scores.items() if name != "FPO"}
    better, among = library.get_interval_estimates(pairs, metrics.probability_of_improvement, reps=1000)
    rows = []
    for name, score in scores.items():
        low, high = within[name].ravel()
        cells = [name, str(len(score)), f"{mean[name][0]:.1f} % [{low:.1f}, {high:.1f}]", "–"]
        if name in pairs:
            low, high = among[name].ravel()
            cells[-1] = f"{better[name]:.2f} [{low:.2f}, {high:.2f}]"
        rows.append(cells)
    publish(path, "method | seeds a task | interquartile mean | probability of a better run than FPO's", rows)


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
            base, zero, tuned, steps = zip(*map(played, runs))
        ours.append([np.mean(shares(counts)) if counts else np.nan for counts in (base, zero, tuned)])
        if not base:
            continue
        cells = *(f"{value:.1f} %" for value in ours[-1][:2]), over_seeds(found["constant"])
        fpo = f"**{over_seeds(tuned)}**" if tuned else "–"
        summary.append([label, *cells, over_seeds(found["best"]), fpo, str(len(runs)), steps[0], paper])
        if task not in SUITES:
            continue
        tables = [pd.read_csv(file, dtype=dict(task_id=str)) for file in results.glob(f"{pattern}/table.csv")]
        tables = [t.replace(SILENT).drop_duplicates(["task_id", "policy"], keep="last") for t in tables]
        for (k, name), rows in pd.concat(tables).groupby(["task_id", "task"]) if tables else ():
            sums = rows.groupby("policy")[["successes", "episodes"]].sum()  # over the seeds
            pairs = sums.reindex(KINDS, fill_value=0).values
            cells = [f"{100 * good / n:.0f} % of {n:.0f}" if n > 0 else "–" for good, n in pairs]
            suites.append([label, k, name.replace("_", " "), *cells])
    head = "task | base | zero latents | constant latent | best of 16 | FPO | seeds | steps"
    publish(results / "summary.md", f"{head} | paper, π_0-FPO", summary)
    head = "suite | | task | base | zero latents | tuned"
    publish(results / "libero/suites.md", head, suites)
    page = (results / "libero/table1.md").read_text()
    for label, row in zip(("our base", "our base, zero latents", "our base + FPO"), zip(*ours[2:])):
        row = ["–" if np.isnan(value) else f"{value:.1f}" for value in [*row, np.mean(row)]]
        page = re.sub(rf"(?m)^(\| {re.escape(label)} \|) .*$", rf"\1 {' | – | '.join(row)} | – |", page)
    write_atomically(results / "libero/table1.md", page.encode())


if __name__ == "__main__":
    parse_args(lambda: None, __doc__)  # no flags but --help
    write_rows(ROOT / "results/aloha/table.md", runs_of("aloha/"))
    write_rows(ROOT / "results/libero/table.md", runs_of("libero/butter_"))
    write_tasks(ROOT / "results")
    write_peers(ROOT / "results/peers.md")
