"""The learning curves and tables of README and results/, from the CSV files there.

    python tools/results.py            # curve.png and tables in results/aloha, results/libero and results/former; in the pages too

A run's files there are those of its run folder: metrics.csv, eval.csv (an evaluation episode a row) and args.json.
"""

import csv
import os
import re
import sys
import warnings
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from scipy import stats

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from run_files import parse_args, rate, wilson, write_atomically

PAGES = tuple(ROOT / name for name in ("README.md", "results/aloha.md", "results/former_bases.md", "results/libero.md"))
# folder, runs that count there, runs that are the seeds of the picture, its title, the paper's figure and its name
PICTURES = (
    ("aloha", "", "seed", "FPO on ALOHA Transfer Cube: the first 100 evaluation states at every point", 65, "paper (π$_0$) at 1.6 M"),
    ("libero", "butter", "butter_seed", "FPO on LIBERO, butter in the tray: the first 25 official states at every point", 78.5, "paper (π$_0$)"),
)
# LIBERO's suites: name, the paper's π_0-FPO (Table I, %)
SUITES = dict(libero_spatial=("LIBERO-Spatial", 97.2), libero_object=("LIBERO-Object", 97.3), libero_goal=("LIBERO-Goal", 89.4),
              libero_10=("LIBERO-Long", 65.3))  # fmt: skip
# the paper's Table I: success (%) and rank a suite, average, average rank
PAPER_TABLE_1 = (
    ("Diffusion Policy", 78.3, 6, 92.5, 2, 68.3, 6, 50.5, 6, 72.4, 5.0),
    ("GRAPE (DPO)", 87.6, 3, 91.2, 4, 82.2, 3, 55.8, 3, 79.2, 3.3),
    ("Octo (SFT)", 78.9, 5, 85.7, 6, 84.6, 2, 51.1, 5, 75.1, 4.5),
    ("OpenVLA (SFT)", 84.7, 4, 88.4, 5, 79.2, 5, 53.7, 4, 76.5, 4.5),
    ("VLA-RL", 90.2, 2, 91.8, 3, 82.2, 3, 59.8, 2, 81.0, 2.5),
    ("π_0-FAST", 96.4, "–", 96.8, "–", 88.6, "–", 60.2, "–", 85.5, "–"),
    ("π_0-FPO", 97.2, 1, 97.3, 1, 89.4, 1, 65.3, 1, 87.2, 1),  # the mean of its four suites is 87.3
)
# rows of tools/run_ablations.py: what the table calls them; Table II also has the paper's success (%) on butter/tray
TABLE_2 = dict(complete=("FPO (complete)", 78.5), sac=("without CFM ratio proxy: SAC", 32.4), no_clip=("without PPO clipping", 45.1),
               k1=("single-step integration (K = 1)", 61.7), single_critic=("single critic", 71.2))  # fmt: skip
EXTRAS = dict(
    complete="defaults", literal="--literal: D2, D4 and D5 to the letter", stored_values="stored value latents (D5)", no_self_anchor="no self-anchor",
    no_velocity_anchor="no velocity anchor", no_anchor="no anchor at all", drift_limit="no anchor, but the drift limit 0.05",
    loss_cap="no anchor, but the loss cap 0.1", prior_anchor="no anchor, but the prior anchor 0.1", advantage_limit="no anchor, but the advantage limit 1",
    k4_midpoint="K = 4, midpoint grid", k4_end="K = 4, end grid", raw_ratio="raw ratio exp(Δℓ) (McAllister et al.)", half_latent="half the latents (D12)",
    floor="σ floor 1e-8 (D2)", floor_no_clip="σ floor 1e-8, without clipping", shuffled="shuffled advantages (D14)",
    cloning="cloning of successes instead of FPO",
)  # fmt: skip
COLORS = ["#332288", "#88ccee", "#44aa99", "#999933", "#cc6677"]  # Paul Tol's muted scheme, safe for colour-blind readers


def evaluations(path):
    """Episodes of every evaluation in an eval.csv, in order. -> {(policy, env_steps): {"success": (n,), "strict": (n,), "length": (n,), "episode": …}}"""
    episodes = {}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            columns = episodes.setdefault((row["policy"], int(row["env_steps"])), {"success": [], "strict": [], "length": [], "episode": []})
            columns["success"].append(int(row["success"]))
            columns["length"].append(int(row["length"]))
            columns["strict"].append(int(row.get("strict") or row["success"]))  # LIBERO knows one success only
            columns["episode"].append((row.get("task_id"), row["episode"]))
    return {key: {name: v if name == "episode" else np.array(v) for name, v in columns.items()} for key, columns in episodes.items()}


def on_common_states(run):
    """Success on the states that every evaluation plays: only there can the points of a curve be compared. run: of `evaluations`.
    -> {(policy, env_steps): (n,)}"""
    common = set.intersection(*(set(columns["episode"]) for columns in run.values()))
    return {key: columns["success"][[episode in common for episode in columns["episode"]]] for key, columns in run.items()}


def last_evaluation(run, policy="tuned"):
    """(policy, env_steps) of a policy's last evaluation, None if it was never evaluated. run: of `evaluations`."""
    return max((key for key in run if key[0] == policy), key=lambda key: key[1], default=None)


def cell(successes):
    """A success rate with its interval, as a cell of a table. successes: (n,)"""
    return rate(successes.sum(), len(successes)).strip().replace(" %  ", " % ")


def table_row(name, run):
    """One line of the table: base, zero latents and the last evaluation of one run, on the same initial states."""
    base, zero = run["base", 0], run["zero latents", 0]
    final = last_evaluation(run)
    last = run[final]
    before = dict(zip(base["episode"], base["success"]))  # an evaluation of fewer episodes plays some of these
    before = np.array([before[episode] for episode in last["episode"]])
    fixed, broken = (last["success"] > before).sum(), (last["success"] < before).sum()
    zero_noise = last_evaluation(run, "zero noise") or last_evaluation(run, "tuned mean")  # SAC's: the mean latent
    lowest = min(run[key]["success"].mean() for key in run if key[0] == "tuned")
    cells = [name, f"{final[1] / 1e6:.2f} M", cell(base["success"]), cell(zero["success"]), f"**{cell(last['success'])}**",
             cell(run[zero_noise]["success"]) if zero_noise else "–", cell(last["strict"]),
             f"{100 * lowest:.0f} %", str(fixed), str(broken)]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def write_table(folder, runs, seeds, strict):
    """table.md of a folder: a row a run, the seeds first."""
    lines = ["| run | steps | base | zero latents | tuned | from zero noise | tuned, strict | lowest evaluation | fixed | broken |", "|" + "---|" * 10]
    for name in [*seeds, *(name for name in runs if name not in seeds)]:
        lines.append(table_row(name.replace("seed", "seed ").replace("_", " "), runs[name]))
    if not strict:
        lines = ["|".join(cell for i, cell in enumerate(line.split("|")) if i != 7) for line in lines]
    kinds = {}  # runs of one name but for the seed
    for name, run in {**seeds, **runs}.items():
        kinds.setdefault(name.split("seed")[0].removeprefix("butter").strip("_").replace("_", " ") or "FPO", []).append(run[last_evaluation(run)]["success"].mean())
    means = [f"{kind} **{over_seeds(shares)}**" for kind, shares in kinds.items() if len(shares) > 1]
    if means:
        lines += ["", f"Means of the last evaluation (95 % t interval over seeds): {', '.join(means)}."]
    publish(folder / "table.md", lines)


def publish(path, lines):
    """Write a table to its file, and into the pages that have markers for that file."""
    write_atomically(path, ("\n".join(lines) + "\n").encode())
    begin, end = f"<!-- {os.path.relpath(path, ROOT)} -->\n", "<!-- end -->"
    new = begin + "\n".join(lines) + "\n" + end
    for page in PAGES:
        text = page.read_text()
        if begin in text:
            write_atomically(page, re.sub(re.escape(begin) + ".*?" + end, lambda _: new, text, count=1, flags=re.S).encode())
    print("\n".join(lines))


def write_suites(folder):
    """suites.md, as the paper's Table I: a row a suite, averages over the tasks that the base was cloned on; and a table of all tasks."""
    head = "suite, tasks cloned, base, zero latents, constant latent, one a task, best of 16, tuned, paper, steps, fixed, broken"
    lines = [f"| {head.replace(', ', ' | ')} |", "|" + "---|" * 12]
    tasks = ["suite,task_id,task,policy,successes,episodes"]
    for suite, (name, paper) in SUITES.items():
        run_folder = folder / f"{suite}_seed1"
        if not run_folder.exists():
            continue
        run = evaluations(run_folder / "eval.csv")
        last = last_evaluation(run)
        policies = [run["base", 0], run["zero latents", 0], run[last]]
        before, after = policies[0]["success"], policies[2]["success"]
        assert policies[0]["episode"] == policies[1]["episode"] == policies[2]["episode"]
        with open(run_folder / "table.csv", newline="") as file:
            table = list(csv.DictReader(file))
        cloned = sorted({int(row["task_id"]) for row in table if row["cloned"] == "True" and row["task_id"].isdigit()})
        listed = f"{len(cloned)} of 10" + ("" if len(cloned) == 10 else f" (not {', '.join(str(k) for k in range(10) if k not in cloned)})")
        searches = folder.parent / "constant_latent"
        one, best = constant_latents(searches / f"{suite}.csv")
        per_task, _ = constant_latents(searches / f"{suite}_per_task.csv")
        cells = [name, listed, cell(before), cell(policies[1]["success"]), one, per_task, best, f"**{cell(after)}**", f"{paper} %", f"{last[1] / 1e6:.2f} M",
                 str((after > before).sum()), str((after < before).sum())]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
        tasks += [",".join([suite, r["task_id"], r["task"], r["policy"] or "not cloned", r["successes"], r["episodes"]]) for r in table if r["task_id"].isdigit()]
    publish(folder / "suites.md", lines)
    write_atomically(folder / "suites.csv", ("\n".join(tasks) + "\n").encode())


def write_summary(path):
    """summary.md: a row a task: base, zero latents, the best constant latent (mean over searches), best of 16, and tuned: mean and t interval
    over seeds, or of one seed Wilson's over episodes."""
    lines = ["| task | base | zero latents | constant latent | best of 16 | FPO | seeds | steps | paper, π_0-FPO |", "|" + "---|" * 9]
    rows = [("aloha", "ALOHA Transfer Cube", "aloha/seed*", "about 65 %")]
    rows += [("libero_90_task56", "LIBERO, butter in the tray", "libero/butter_seed*", "78.5 %")]
    rows += [(suite, name, f"libero/{suite}_seed1", f"{paper} %") for suite, (name, paper) in SUITES.items()]
    for task, label, pattern, paper in rows:
        runs = [evaluations(file) for file in sorted(path.parent.glob(f"{pattern}/eval.csv"))]
        if not runs:
            continue
        lasts = [last_evaluation(run) for run in runs]
        before = [f"{100 * np.mean([run[policy, 0]['success'].mean() for run in runs]):.1f} %" for policy in ("base", "zero latents")]
        finals = [run[last]["success"] for run, last in zip(runs, lasts)]
        tuned = over_seeds([final.mean() for final in finals]) if len(runs) > 1 else cell(finals[0])
        before += constant_latents(path.parent / "constant_latent" / f"{task}.csv")
        lines.append(f"| {label} | {' | '.join(before)} | **{tuned}** | {len(runs)} | {lasts[0][1] / 1e6:.2f} M | {paper} |")
    publish(path, lines)


def constant_latents(path):
    """Cells of the summary, on the evaluation states: the best constant latent, mean and t interval over the searches' last rows, of one search
    Wilson's, and best of 16 with Wilson's."""
    if not path.exists():
        return ["–", "–"]
    with open(path, newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["states"] == "evaluation"]
    counts = {(row["policy"], row.get("seed")): (int(row["successes"]), int(row["episodes"])) for row in rows}  # a seed's last row stays
    searches = [count for (policy, _), count in counts.items() if policy.startswith("constant")]
    constant = over_seeds([good / n for good, n in searches]) if len(searches) > 1 else over_seeds_and_episodes(searches) if searches else "–"
    best = counts.get(("best of 16", ""))
    return [constant, over_seeds_and_episodes([best]) if best else "–"]


def write_table_1(folder):
    """table1.md and table1.csv: the paper's Table I, and our base, zero latents and tuned actor below it. Ours are another base on the tasks it covers."""
    names = ["LIBERO-Spatial", "LIBERO-Object", "LIBERO-Goal", "LIBERO-Long"]
    header = ["method", *(column for name in names for column in (name, "rank")), "average", "average rank"]
    rows = [[f"{row[0]} (paper)", *map(str, row[1:])] for row in PAPER_TABLE_1]
    for policy, label in (("base", "our base"), ("zero latents", "our base, zero latents"), ("tuned", "our base + FPO")):
        shares = []
        for suite in SUITES:
            path = folder / f"{suite}_seed1" / "eval.csv"
            run = evaluations(path) if path.exists() else {}
            last = last_evaluation(run, policy)
            shares.append(100 * run[last]["success"].mean() if last else None)
        cells = [cell for share in shares for cell in (f"{share:.1f}" if share is not None else "–", "–")]
        rows.append([label, *cells, f"{np.mean(shares):.1f}" if None not in shares else "–", "–"])
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header), *("| " + " | ".join(row) + " |" for row in rows)]
    lines += ["", "Ours: averages over the tasks that the base was cloned on, of each suite those that ../libero.md names, and not all ten; 50 episodes a task, one seed."]
    write_atomically(folder / "table1.md", ("\n".join(lines) + "\n").encode())
    write_atomically(folder / "table1.csv", ("\n".join(",".join(row) for row in [header, *rows]) + "\n").encode())


def over_seeds(values):
    """Mean and 95 % t interval over seeds of success rates, as a cell of a table."""
    return mean_and_interval(100 * np.array(values), "{:.1f}", " %")


def over_seeds_and_episodes(counts):
    """Mean success with each end the further one of the t interval over seeds and Wilson's over all episodes: near 100 % a few seeds happen to
    agree, and t alone vanishes. One seed has Wilson's. counts: (successes, episodes) a seed."""
    successes, episodes = np.array(counts).T
    low, high = (100 * np.array(wilson(successes.sum(), episodes.sum()))).tolist()
    if len(counts) > 1:
        rates = 100 * successes / episodes
        low, high = max(0.0, min(low, rates.mean() - t_half(rates))), min(100.0, max(high, rates.mean() + t_half(rates)))
    return f"{100 * successes.sum() / episodes.sum():.1f} % [{low:.1f}, {high:.1f}]"


def t_half(values):
    """Half the width of the 95 % t interval of the mean of values: (n,) -> a number, (n, …) -> (…)."""
    return stats.t.ppf(0.975, len(values) - 1) * np.std(values, axis=0, ddof=1) / np.sqrt(len(values))


def mean_and_interval(values, digits, unit=""):
    """Mean and 95 % t interval of two numbers or more, as text."""
    return f"{digits.format(np.mean(values))}{unit} ± {digits.format(t_half(values))}"


def difference(a, b, digits="{:+z.1f}"):
    """Mean of a minus mean of b with its 95 % Welch interval, as text; none with fewer than three values on a side, or none that vary."""
    text = digits.format(np.mean(a) - np.mean(b)) if a and b else "–"
    if min(len(a), len(b)) < 3 or np.ptp(a) == np.ptp(b) == 0:
        return text
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of a side that does not vary: its variance is 0, which is right
        interval = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    return text + f" [{digits.format(interval.low)}, {digits.format(interval.high)}]"


def training_curves(path):
    """runs_curves.csv by row and seed: {row: {seed: (3, n) array of control steps, success of the last 100 training episodes, latents' norm}}."""
    points = {}
    with open(path, newline="") as file:
        for line in csv.DictReader(file):
            points.setdefault(line["row"], {}).setdefault(line["seed"], []).append([float(line[name]) for name in ("env_steps", "success", "norm")])
    return {row: {seed: np.array(values).T for seed, values in seeds.items()} for row, seeds in points.items()}


def last_quarter(curve):
    """Success of the training episodes in the last quarter of a run, %: the mean over iterations of the last 100 episodes. curve: (3, n)."""
    steps, success, _ = curve
    return 100 * success[steps > 0.75 * steps[-1]].mean()


def rank_test(a, b):
    """Two-sided p of the exact rank test (Mann and Whitney's U over all ways to deal the values), as text: of three values against three it is
    at least 0.1, of five against five at least 0.008."""
    return f"{stats.mannwhitneyu(a, b, method=stats.PermutationMethod()).pvalue:.2g}"


def differences(last, curves):
    """The lines of differences.md: every row of Table II minus the complete algorithm. last: row -> seed -> its last line of runs.csv; curves:
    as training_curves gives them."""
    head = ["all, points", "thousand steps to 90 %", "training, last quarter, points", "rank test of the latter, p"]
    lines = ["| minus FPO (complete) | task | seeds | " + " | ".join(head) + " |", "|" + "---|" * (len(head) + 3)]
    for row, (label, _) in list(TABLE_2.items())[1:]:
        for task, name in (("aloha", "ALOHA"), ("butter", "butter/tray")):
            pair = [f"{task}_{row}", f"{task}_complete"]
            if not set(pair) <= set(last):
                continue
            evaluated = [[100 * int(line["successes"]) / int(line["episodes"]) for line in last[r].values()] for r in pair]
            to_90 = [[float(line["steps_to_90"]) / 1000 for line in last[r].values() if line.get("steps_to_90")] for r in pair]
            reached = f" ({' and '.join(str(len(v)) for v in to_90)} seeds got there)" if sum(map(len, to_90)) < sum(len(last[r]) for r in pair) else ""
            late = [[last_quarter(curves[r][seed]) for seed in last[r]] for r in pair]
            counts = " and ".join(str(len(last[r])) for r in pair)
            found = [difference(*evaluated), difference(*to_90, "{:+z.0f}") + reached, difference(*late), rank_test(*late)]
            lines.append(f"| {label} | {name} | {counts} | {' | '.join(found)} |")
    return lines


def write_ablations(path):
    """table2.md and extras.md beside runs.csv: success at a quarter, half and all of the budget; of the training episodes the control steps until
    90 of the last 100 succeeded, and the share that succeeded in the last quarter (runs_curves.csv); the latents' mean norm in that quarter.
    Means over seeds, success in evaluations with the wider of two intervals. differences.md: Table II's rows minus the complete algorithm."""
    runs, last = {}, {}
    with open(path, newline="") as file:
        for line in csv.DictReader(file):
            evaluated = runs.setdefault(line["row"], {}).setdefault(line["seed"], [])
            if line["policy"] == "tuned":
                evaluated.append((int(line["successes"]), int(line["episodes"])))
                last.setdefault(line["row"], {})[line["seed"]] = line
    curves = training_curves(path.with_name("runs_curves.csv"))

    def cells(row):
        """The seeds, and success at each of the four evaluations; a run that stopped early counts with its last one."""
        seeds = [s for s in runs.get(row, {}).values() if s]
        lost = len(runs.get(row, {})) - len(seeds)  # a loss became infinite before the first evaluation

        def at(k):
            return over_seeds_and_episodes([s[min(k, len(s) - 1)] for s in seeds])

        if not seeds:
            return None
        to_90 = [float(line["steps_to_90"]) / 1000 if line.get("steps_to_90") else None for line in last[row].values()]
        norms = [float(line["latent/norm"]) if line.get("latent/norm") else None for line in last[row].values()]
        late = [last_quarter(curves[row][seed]) for seed in last[row]]
        return [str(len(seeds)) + (f", and {lost} lost" if lost else ""), at(0), at(1), f"**{at(3)}**", numbers(to_90, "{:.0f}"), numbers(late, "{:.1f}"), numbers(norms, "{:.1f}")]

    def numbers(values, digits):
        """Mean and interval over the seeds that have a value (not None); of one or two, the values themselves."""
        found = [value for value in values if value is not None]
        if not found:
            return "–"
        text = mean_and_interval(found, digits) if len(found) > 2 else ", ".join(map(digits.format, found))
        return text + (f", {len(found)} of {len(values)} seeds" if len(found) < len(values) else "")

    head = ["seeds", "a quarter", "half", "all", "thousand steps to 90 %", "training, last quarter, %", "latents' norm"]
    lines = ["| row | task | " + " | ".join(head) + " | paper, butter/tray |", "|" + "---|" * (len(head) + 3)]
    for row, (label, paper) in TABLE_2.items():
        for task, name in (("aloha", "ALOHA, 0.8 M steps"), ("butter", "butter/tray, 0.25 M")):
            if found := cells(f"{task}_{row}"):
                lines.append(f"| {label} | {name} | {' | '.join(found)} | {paper if task == 'butter' else ''} |")
    publish(path.with_name("table2.md"), lines)
    lines = ["| ALOHA, 0.4 M steps | " + " | ".join(head) + " |", "|" + "---|" * (len(head) + 1)]
    lines += [f"| {label} | {' | '.join(found)} |" for row, label in EXTRAS.items() if (found := cells(f"short_{row}"))]
    publish(path.with_name("extras.md"), lines)
    publish(path.with_name("differences.md"), differences(last, curves))
    for name in ("table2", "extras", "differences"):
        text = path.with_name(f"{name}.md").read_text().splitlines()
        plain = [[c.strip().strip("*") for c in line.strip("|").split("|")] for i, line in enumerate(text) if i != 1]
        rows = [",".join(f'"{c}"' if "," in c else c for c in row) for row in plain]
        write_atomically(path.with_name(f"{name}.csv"), ("\n".join(rows) + "\n").encode())


def draw_curve(folder, seeds, title, papers, paper_label):
    """curve.png of a folder: success on held-out states over training, a line a seed."""
    figure, axes = plt.subplots(figsize=(6.4, 3.6), dpi=150)
    seeds = {name: on_common_states(run) for name, run in seeds.items()}
    for color, (name, run) in zip(COLORS, seeds.items()):
        points = [(0, run["base", 0])] + [(steps, v) for (policy, steps), v in run.items() if policy == "tuned"]
        steps = np.array([t for t, _ in points]) / 1e6
        low, high = np.array([wilson(v.sum(), len(v)) for _, v in points]).T
        axes.plot(steps, [100 * v.mean() for _, v in points], color=color, marker="o", ms=3, lw=1.2, label="seed " + name.split("seed")[1])
        axes.fill_between(steps, 100 * low, 100 * high, color=color, alpha=0.12, lw=0)
    for policy, style in (("base", "--"), ("zero latents", ":")):
        share = np.mean([run[policy, 0].mean() for run in seeds.values()])
        axes.axhline(100 * share, color="0.35", ls=style, lw=1, label=policy)
    axes.axhline(papers, color="0.35", ls="-.", lw=1, label=paper_label)
    axes.set(xlabel="environment steps of training (millions)", ylabel="success on held-out states (%)", ylim=(0, 102), xlim=(0, None))
    axes.set_title(f"{title}; bands: Wilson 95 %", fontsize=8)
    axes.legend(fontsize=7, loc="lower right", frameon=False, ncol=2)
    figure.tight_layout()
    figure.savefig(folder / "curve.png")
    plt.close(figure)


if __name__ == "__main__":
    parse_args(lambda: None, __doc__)  # no flags but --help
    for name, counted, prefix, title, papers, paper_label in PICTURES:
        folder = ROOT / "results" / name
        runs = {path.parent.name: evaluations(path) for path in sorted(folder.glob(f"{counted}*/eval.csv"))}
        seeds = {run: episodes for run, episodes in runs.items() if run.startswith(prefix)}
        if seeds:
            write_table(folder, runs, seeds, strict=name == "aloha")
            draw_curve(folder, seeds, title, papers, paper_label)
    write_suites(ROOT / "results" / "libero")
    write_summary(ROOT / "results" / "summary.md")
    write_table_1(ROOT / "results" / "libero")
    if (ablations := ROOT / "results" / "former" / "runs.csv").exists():
        write_ablations(ablations)
