"""The paper's figures from finished runs, no training: PNG and SVG, and tables of latent statistics.

    python tools/plots.py                                                      # Fig. 3, 4b, 5, 7, Table II's curves, exploration, from results/
    python tools/plots.py --strip runs/<name> --out pictures                   # Fig. 4a, 6: plays episodes of a run folder's checkpoints (needs EGL)
    python tools/plots.py --latents runs/<name> --out pictures                 # Fig. 5 and 7 of another run
    python tools/plots.py --exploration runs/<name> --out pictures             # of a run with --explore-steps: are its perturbations correlated in time?

Curves need metrics.csv and eval.csv, latents need latents.npz, strips need the checkpoints of a run folder.
"""

import csv
import io
import json
import os
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import matplotlib

matplotlib.use("Agg")
matplotlib.rcParams["svg.hashsalt"] = "the same file every time"
import matplotlib.pyplot as plt
import numpy as np
from sklearn.covariance import ledoit_wolf
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_samples

from results import COLORS, TABLE_2, evaluations, on_common_states, t_half, training_curves
from run_files import load_checkpoint, make_out_folder, parse_args, stop, write_atomically

BLUE, RED, GREEN, GREY = "#332288", "#cc6677", "#117733", "0.4"  # Paul Tol's muted scheme, safe for colour-blind readers
POINTS = 400  # of a group in a t-SNE
RESAMPLES = 1000
LEAST = 5  # episodes that an interval needs
LAGS = np.arange(6)  # decisions

# curves: file name, folders of the seeds, title, the paper's base and tuned success (%) or None
CURVES = (
    ("fig4b_aloha", "aloha/seed*", "ALOHA Transfer Cube (Fig. 4b)", (40, 65)),
    ("butter", "libero/butter_seed*", "libero_90 task 56, butter in the tray", None),
    ("fig3_libero_long", "libero/long_task*_seed*", "LIBERO-Long task 1 (Fig. 3)", None),
)


@dataclass
class Args:
    latents: tuple[Path, ...] = (ROOT / "results/libero/butter_seed1",)
    """folders with latents.npz"""
    exploration: tuple[Path, ...] = tuple(sorted((ROOT / "results" / "former").glob("*k4*_seed*")))
    """folders with latents.npz of runs with --explore-steps > 0"""
    strip: tuple[Path, ...] = ()
    """run folders whose checkpoints are played and photographed"""
    out: Path | None = None
    """where the pictures go; those of results/ alone go to results/figures if left out"""


def save(figure, out, name):
    figure.tight_layout()
    for suffix in (".png", ".svg"):
        figure.savefig(out / f"{name}{suffix}", dpi=150, metadata={"Date": None} if suffix == ".svg" else None)
    plt.close(figure)
    print(out / f"{name}.png")


# ---- Fig. 3 and 4b ----


def read_columns(path, names):
    """Columns of a CSV file as float arrays, NaN where a cell is empty."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return [np.array([float(row[name]) if row[name] else np.nan for row in rows]) for name in names]


def smooth(values, width=5):
    """Running mean over the last `width` rows, empty ones left out."""
    known = np.isfinite(values)
    rows = [values[max(0, i - width + 1) : i + 1][known[max(0, i - width + 1) : i + 1]] for i in range(len(values))]
    return np.array([row.mean() if k and len(row) else np.nan for k, row in zip(known, rows)])


def draw_seeds(axes, curves, color, label, most=None):
    """Mean of the seeds and 95 % t interval on a common grid, cut at 0 and at `most`. curves: [(steps, values)]"""
    curves = [(steps[np.isfinite(v)], v[np.isfinite(v)]) for steps, v in curves]
    grid = np.linspace(max(steps[0] for steps, _ in curves), min(steps[-1] for steps, _ in curves), 60)
    values = np.array([np.interp(grid, *curve) for curve in curves])
    axes.plot(grid / 1e6, values.mean(0), color=color, lw=1.4, label=label)
    if len(values) > 1:
        low, high = (np.clip(values.mean(0) + sign * t_half(values), 0, most) for sign in (-1, 1))
        axes.fill_between(grid / 1e6, low, high, color=color, alpha=0.15, lw=0)


def draw_curves(out, name, folders, title, paper):
    """Success on held-out states, return of the training episodes, and their length: all, and successful ones only."""
    keys = ("charts/env_steps", "charts/return", "charts/episode_length", "charts/success_length")
    seeds = [read_columns(folder / "metrics.csv", keys) for folder in folders]
    success = []
    for folder, seed in zip(folders, seeds):
        run = evaluations(folder / "eval.csv")
        tested = on_common_states(run)
        points = [(steps, 100 * v.mean(), len(v)) for (policy, steps), v in tested.items() if policy == "tuned" or (policy, steps) == ("base", 0)]
        success.append(np.array(points).T)
        # at first the episodes that end are the short, successful ones, and then, at the first time limit, all failures at once
        num_envs = json.loads((folder / "args.json").read_text())["args"]["num_envs"]
        early = seed[0] < 3 * num_envs * run["base", 0]["length"].max()
        for column in seed[1:]:
            column[early] = np.nan
    figure, panels = plt.subplots(1, 3, figsize=(10, 3.1))
    draw_seeds(panels[0], [(steps, shares) for steps, shares, _ in success], BLUE, f"the same {success[0][2, 0]:.0f} held-out states", 100)
    panels[0].axhline(np.mean([shares[0] for _, shares, _ in success]), color=GREY, ls="--", lw=1, label="base")
    if paper:
        panels[0].axhline(paper[1], color=GREY, ls="-.", lw=1, label=f"the paper's π$_0$-FPO, from {paper[0]} %")
    panels[0].set(ylabel="success (%)", ylim=(0, 102))
    draw_seeds(panels[1], [(seed[0], smooth(seed[1])) for seed in seeds], BLUE, "training episodes", 1)
    panels[1].set(ylabel="return (Eq. 1)", ylim=(0, 1.02))
    draw_seeds(panels[2], [(seed[0], smooth(seed[2])) for seed in seeds], BLUE, "all training episodes")
    draw_seeds(panels[2], [(seed[0], smooth(seed[3])) for seed in seeds], GREEN, "successful ones only")
    panels[2].set(ylabel="episode length (control steps)", ylim=(0, None))
    for panel in panels:
        panel.set(xlabel="environment steps (millions)", xlim=(0, None))
        panel.legend(fontsize=7, frameon=False, loc="lower right")
    n = len(seeds)
    figure.suptitle(f"{title}: {'mean and 95 % t interval of ' + str(n) + ' seeds' if n > 1 else '1 seed'}; training curves: running mean of 5 iterations, from three time limits on", fontsize=9)
    save(figure, out, name)


def draw_ablations(out, path):
    """Table II's rows: success of the last 100 training episodes and the norm of the executed latents. A thin line a seed, a thick one their mean."""
    runs = training_curves(path)
    figure, panels = plt.subplots(1, 4, figsize=(12, 3.1))
    for k, (task, title) in enumerate((("aloha", "ALOHA"), ("butter", "butter/tray"))):
        for (row, (label, _)), color in zip(TABLE_2.items(), COLORS):
            curves = list(runs.get(f"{task}_{row}", {}).values())
            if not curves:
                continue
            for steps, success, _ in curves:  # before three time limits of 32 environments most episodes that have ended are the short, successful ones
                success[steps < 3 * 32 * 400] = np.nan
            grid = np.linspace(max(steps[0] for steps, *_ in curves), min(steps[-1] for steps, *_ in curves), 60)
            for panel, column, factor in ((panels[2 * k], 1, 100), (panels[2 * k + 1], 2, 1)):
                for seed in curves:
                    panel.plot(seed[0] / 1e6, factor * seed[column], color=color, lw=0.5, alpha=0.5)
                mean = np.mean([np.interp(grid, seed[0], seed[column]) for seed in curves], 0)
                panel.plot(grid / 1e6, factor * mean, color=color, lw=1.6, label=f"{label}, {len(curves)}")
        panels[2 * k].set(ylabel="success of the last 100 training episodes (%)", ylim=(0, 102), title=title)
        panels[2 * k + 1].set(ylabel="norm of the executed latents", title=title)
    for panel in panels:
        panel.yaxis.label.set_fontsize(8)
        panel.set(xlabel="environment steps (millions)", xlim=(0, None))
    for panel in panels[::2]:
        panel.legend(fontsize=6.5, frameon=False, loc="lower right", title="row, number of seeds", title_fontsize=6.5)
    save(figure, out, "table2")


# ---- Fig. 5 and 7 ----


class Latents:
    """Executed latents of some episodes of every evaluation. x: (n, D); step, episode, chunk, success: (n,).

    Evaluations play the same initial states, mostly with the same noise: an episode of that number is one case, however often it was played.
    """

    def __init__(self, path):
        with np.load(path) as file:
            self.x, self.step, self.chunk, self.success = file["x0"], file["env_steps"], file["chunk"], file["success"]
            self.shift = file["xK"] - file["x0"]
            self.episode = file["episode"] + 1000 * file["task_id"] if "task_id" in file else file["episode"]
        self.steps = np.unique(self.step)

    def group(self, which):
        """Latents, episode and chunk numbers and training steps of the rows that a mask chooses."""
        return self.x[which], self.episode[which], self.chunk[which], self.step[which]


def read_latents(folder, flag):
    """The latents of a run folder, or one sentence about what is wrong with it."""
    try:
        latents = Latents(folder / "latents.npz")
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
        stop(f"{flag}: {folder / 'latents.npz'} cannot be read ({error}); give folders of finished runs")
    if len(latents.steps) < 2:
        stop(f"{flag}: {folder} has one evaluation only; let the run end")
    return latents


def dispersion(x):
    """Mean distance of the latents from their centroid, and mean variance of a dimension."""
    return np.linalg.norm(x - x.mean(0), axis=1).mean(), x.var(0, ddof=1).mean()


def bootstrap(statistic, group, rng):
    """A statistic of a group and its 95 % interval, episodes resampled whole. -> (value, low, high), no interval (NaN) for fewer than
    LEAST episodes. group: arrays of n rows, of which the second has the episodes' numbers.

    The basic interval, 2 v - quantile: a resample is to the sample as that is to the truth, also where it is biased, as a variance is.
    """
    _, episode, *_ = group
    rows, value = [np.flatnonzero(episode == e) for e in np.unique(episode)], statistic(group)
    if len(rows) < LEAST:
        return value, np.nan, np.nan
    values = []
    for _ in range(RESAMPLES):
        drawn = [rows[j] for j in rng.integers(len(rows), size=len(rows))]
        i = np.concatenate(drawn)
        number = np.repeat(np.arange(len(drawn)), [len(d) for d in drawn])  # an episode drawn twice is two episodes
        values.append(statistic((group[0][i], number, *(column[i] for column in group[2:]))))
    return value, *(2 * value - np.nanquantile(values, [0.975, 0.025], axis=0))


def draw_evolution(out, name, latents):
    """Fig. 5: t-SNE of the latents at the start, in the middle and at the end, and their dispersion and variance."""
    steps = latents.steps[[0, len(latents.steps) // 2, -1]]
    groups = [latents.group(latents.step == step) for step in steps]
    rng = np.random.default_rng(0)
    shown = [rng.permutation(len(group[0]))[:POINTS] for group in groups]
    together = np.concatenate([group[0][i] for group, i in zip(groups, shown)])
    flat = TSNE(random_state=0, perplexity=min(30, len(together) // 4)).fit_transform(together)
    parts = np.split(flat, np.cumsum([len(i) for i in shown])[:-1])
    figure, panels = plt.subplots(1, 4, figsize=(11, 2.9))
    for panel, part, step, color in zip(panels, parts, steps, (BLUE, RED, GREEN)):
        panel.scatter(*flat.T, s=5, color="0.85", lw=0, rasterized=True)
        panel.scatter(*part.T, s=9, color=color, lw=0, rasterized=True)
        panel.set(title=f"{step / 1e6:.2f} M steps, n = {len(part)}", xlabel="t-SNE 1", ylabel="t-SNE 2", xticks=[], yticks=[])
        panel.title.set_fontsize(9)
    width = 0.35
    for k, label, color in ((0, "dispersion", BLUE), (1, "variance", RED)):
        values = np.array([bootstrap(lambda g: dispersion(g[0])[k], group, rng) for group in groups])
        scale = values[0, 0]
        panels[3].bar(np.arange(3) + (k - 0.5) * width, values[:, 0] / scale, width, color=color, label=f"{label} (start: {scale:.2f})",
                      yerr=np.abs(values[:, 1:] - values[:, :1]).T / scale, error_kw=dict(lw=1))  # fmt: skip
    panels[3].set(xticks=range(3), xticklabels=[f"{step / 1e6:.2f} M" for step in steps], ylabel="relative to the start", xlabel="environment steps")
    panels[3].set_ylim(0, 1.35 * panels[3].get_ylim()[1])
    panels[3].legend(fontsize=6.5, frameon=False, loc="upper left")
    figure.suptitle(f"{name}: latents of evaluation episodes. Dispersion: mean distance from the centroid; variance: mean over dimensions; bars: 95 % bootstrap over episodes", fontsize=9)
    save(figure, out, f"fig5_{name}")


def statistics(groups, success, rng):
    """The statistics of Sec. IV-E of every group, with intervals. groups: {name: as of Latents.group}; success: name of the successful one."""
    # the centroid comes from every second successful episode, and every group's distance from its other episodes: not only the
    # successful latents themselves are closer by construction, those of another evaluation had the same noise
    x, episode, *_ = groups[success]
    fitted = np.unique(episode)[::2]
    known = np.isin(episode, fitted)
    centroid, precision = x[known].mean(0), np.linalg.inv(ledoit_wolf(x[known])[0])

    def mahalanobis(group):
        d = group[0] - centroid
        return np.sqrt(np.einsum("ni,ij,nj->n", d, precision, d)).mean()

    def temporal(group):
        order = np.lexsort((group[2], group[3], group[1]))
        x, episode, chunk, step = (column[order] for column in group)
        follows = (episode[1:] == episode[:-1]) & (step[1:] == step[:-1]) & (chunk[1:] == chunk[:-1] + 1)
        return np.linalg.norm(x[1:] - x[:-1], axis=1)[follows].mean()

    measures = {
        "norm of a latent": lambda g: np.linalg.norm(g[0], axis=1).mean(),
        "spread of the norm (std)": lambda g: np.linalg.norm(g[0], axis=1).std(),
        "variance of a dimension": lambda g: g[0].var(0, ddof=1).mean(),
        "Mahalanobis distance to the success centroid": mahalanobis,
        "difference of consecutive latents": temporal,
    }
    rows = []
    for name, group in groups.items():
        consecutive = len(np.unique(group[2])) > 1
        for measure, statistic in measures.items():
            if statistic is temporal and not consecutive:
                continue
            outside = ~np.isin(group[1], fitted)
            measured = tuple(column[outside] for column in group) if statistic is mahalanobis else group
            if len(measured[0]):
                rows.append((name, measure, *bootstrap(statistic, measured, rng), len(np.unique(measured[1])), len(measured[0])))
        others = np.concatenate([g[0] for other, g in groups.items() if other != name])
        own = silhouette_samples(np.concatenate([group[0], others]), np.repeat([1, 0], [len(group[0]), len(others)]))[: len(group[0])].mean()
        rows.append((name, "silhouette against the other groups", own, np.nan, np.nan, len(np.unique(group[1])), len(group[0])))
    return rows


def draw_groups(out, name, groups, success, title):
    """Fig. 7: t-SNE, PCA, norms and variance of each dimension of three (or two) groups."""
    rng = np.random.default_rng(0)
    shown = {key: group[0][rng.permutation(len(group[0]))[:POINTS]] for key, group in groups.items()}
    together, ends = np.concatenate(list(shown.values())), np.cumsum([len(x) for x in shown.values()])[:-1]
    figure, panels = plt.subplots(1, 4, figsize=(12, 3.2))
    colors = dict(zip(groups, (BLUE, RED, GREEN) if len(groups) == 3 else (RED, GREEN)))
    for panel, method, label in ((panels[0], TSNE(random_state=0, perplexity=min(30, len(together) // 4)), "t-SNE"), (panels[1], PCA(2), "PCA")):
        for key, part in zip(groups, np.split(method.fit_transform(together), ends)):
            label_of_group = f"{key} ({len(part)}, {len(np.unique(groups[key][1]))} episodes)"
            panel.scatter(*part.T, s=9, lw=0, color=colors[key], alpha=0.7, label=label_of_group, rasterized=True)
        panel.set(xlabel=f"{label} 1", ylabel=f"{label} 2", xticks=[], yticks=[])
    for key, (x, *_) in groups.items():
        panels[2].hist(np.linalg.norm(x, axis=1), bins=30, density=True, histtype="step", lw=1.4, color=colors[key], label=key)
        panels[3].plot(np.arange(1, x.shape[1] + 1), x.var(0), color=colors[key], marker="o", ms=3, lw=1, label=key)
    panels[2].set(xlabel="norm of a latent", ylabel="density")
    panels[3].set(xlabel="latent dimension", ylabel="variance", ylim=(0, None))
    figure.suptitle(title, fontsize=9)
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=7, ncol=3, loc="lower center", markerscale=2, frameon=False, bbox_to_anchor=(0.27, -0.02))
    save(figure, out, name)
    return statistics(groups, success, rng)


def latent_pictures(out, folder):
    """Fig. 5 and 7 of one run. -> rows of the table of statistics."""
    latents = read_latents(folder, "--latents")
    try:
        task = json.loads((folder / "args.json").read_text())["args"].get("suite", "aloha")
    except (OSError, ValueError, KeyError) as error:
        stop(f"--latents: {folder / 'args.json'} cannot be read ({error}); give folders of finished runs")
    if folder not in Args.latents:
        task = folder.name  # there may be several of one task
    draw_evolution(out, task, latents)
    first, end = latents.steps[0], latents.steps[-1]
    middle = ~latents.success & (latents.step > first) & (latents.step < end)
    papers = {"base": latents.group(latents.step == first), "failed, partly trained": latents.group(middle), "successful, trained": latents.group(latents.success & (latents.step == end))}
    rows = []
    if middle.any() and len(np.unique(papers["successful, trained"][1])) >= LEAST:
        title = f"{task}: the paper's groups, which differ in training as well as in success (Fig. 7)"
        rows += [(task, "the paper's", *row) for row in draw_groups(out, f"fig7_{task}", papers, "successful, trained", title)]
    # within one checkpoint: the untouched base, all its decisions and its first ones, and the evaluation during training with the most failures
    failures = {step: (~latents.success & (latents.step == step)).sum() for step in latents.steps[1:]}
    hardest = max(failures, key=failures.get)
    opening = latents.chunk == 0
    for kind, label, chosen in (("base", "the base alone", latents.step == first), ("base_first", "the base alone, first decisions", (latents.step == first) & opening),
                                ("tuned", f"the actor after {hardest / 1e6:.2f} M steps alone", latents.step == hardest)):  # fmt: skip
        inside = {key: latents.group((latents.success == good) & chosen) for key, good in (("failed", False), ("successful", True))}
        if min(len(np.unique(group[1])) for group in inside.values()) >= LEAST:
            rows += [(task, label, *row) for row in draw_groups(out, f"fig7_{task}_{kind}_only", inside, "successful", f"{task}: {label}")]
    # where the trained actor has left N(0, I). The base's latents of the same episode and decision are the noise that it started from:
    # taken off, their sampling error does not pass for a shift of the mean
    noise = {(e, c): x for x, e, c, _ in zip(*latents.group(latents.step == first))}
    moved = {
        "norm of a latent": (False, lambda g: np.linalg.norm(g[0], axis=1).mean()),
        "norm of the mean shift from the noise": (True, lambda g: np.linalg.norm(g[0].mean(0))),
        "largest component of the mean shift": (True, lambda g: np.abs(g[0].mean(0)).max()),
        "variance of a dimension": (False, lambda g: g[0].var(0, ddof=1).mean()),
    }
    for key, chosen in (("first decisions", opening), ("later decisions", ~opening)):
        whole = latents.group((latents.step == end) & chosen)
        paired = np.array([(e, c) in noise for e, c in zip(whole[1], whole[2])])
        shift = [x - noise[e, c] for x, e, c, _ in zip(*(column[paired] for column in whole))]
        for measure, (of_shift, statistic) in moved.items():
            group = (np.array(shift), whole[1][paired]) if of_shift else whole
            if len(group[0]):
                found = bootstrap(statistic, group, np.random.default_rng(0))
                rows.append((task, "the trained actor alone", key, measure, *found, len(np.unique(group[1])), len(group[0])))
    return rows


# ---- Eq. 7 ----


def autocorrelation(group):
    """Correlation of the vectors of decisions t and t + lag of one episode, (len(LAGS),). group: (vectors, episode, chunk) of one evaluation, as of Latents.group.

    The mean of every decision number over the episodes is taken off first: what remains is what one episode has and another has not.
    """
    x, episode, chunk, *_ = group
    place = np.unique(episode, return_inverse=True)[1], chunk
    table = np.full((place[0].max() + 1, chunk.max() + 1, x.shape[1]), np.nan)  # episodes, decisions, D
    table[place] = x
    known = np.isfinite(table[..., 0])
    table -= np.nansum(table, 0) / np.maximum(known.sum(0), 1)[:, None]
    n = table.shape[1]
    products = [(table[:, : n - lag] * table[:, lag:]).sum(-1) for lag in LAGS]
    return np.array([np.nanmean(p) if p.size and np.isfinite(p).any() else np.nan for p in products]) / np.nanmean(products[0])


def draw_exploration(out, folder):
    """Are the perturbations x^(K) - x^(0) of Eq. 7 correlated over the decisions of an episode, as Sec. III-B d says? -> rows of a table."""
    latents = read_latents(folder, "--exploration")
    if not latents.shift.any():
        stop(f"--exploration: {folder} has no perturbations; give a run with --explore-steps above 0")
    figure, panels = plt.subplots(1, 2, figsize=(8, 3.1), sharey=True)
    rows = []
    for panel, step in zip(panels, latents.steps[[0, -1]]):
        x, episode, chunk, _ = latents.group(latents.step == step)
        shift = latents.shift[latents.step == step]
        for label, vectors, color in (("x$^{(0)}$", x, GREY), ("x$^{(K)}$ - x$^{(0)}$", shift, BLUE), ("x$^{(K)}$", x + shift, RED)):
            if not vectors.any():  # the untrained actor on the midpoint grid moves nothing
                continue
            found = np.array(bootstrap(autocorrelation, (vectors, episode, chunk), np.random.default_rng(0)))
            panel.errorbar(LAGS + 0.06 * len(panel.lines) / 3, found[0], np.abs(found[1:] - found[0]), color=color, marker="o", ms=3, lw=1.2, label=label)
            size = np.linalg.norm(vectors, axis=1).mean()
            rows += [(folder.name, step, label.translate(str.maketrans("", "", "${}^")), int(lag), size, *value, len(np.unique(episode))) for lag, value in zip(LAGS[1:], found.T[1:])]
        panel.axhline(0, color="0.6", lw=0.8)
        panel.set(xlabel="lag (decisions)", title=f"{step / 1e6:.2f} M steps, {len(np.unique(episode))} episodes")
        panel.title.set_fontsize(9)
    panels[0].set(ylabel="correlation", ylim=(-0.3, 1.05))
    panels[1].legend(fontsize=7, frameon=False)
    figure.suptitle(f"{folder.name.replace('_', ' ')}: is Eq. 7 correlated in time? Bars: 95 % bootstrap over episodes", fontsize=9)
    save(figure, out, f"exploration_{folder.name}")
    return rows


# ---- Fig. 4a and 6 ----


def draw_strip(out, folder, columns=6):
    """Frames of one episode at 0, half and full training: from an initial state where the base fails and the tuned actor succeeds."""
    import torch

    from base_flow import FlowBase
    from fpo_actor import FlowActor

    try:
        flags = json.loads((folder / "args.json").read_text())["args"]
        with open(folder / "eval.csv", newline="") as file:
            episodes = list(csv.DictReader(file))
        flags["weights"], episodes[0]
    except (OSError, ValueError, KeyError, IndexError) as error:
        stop(f"--strip is {folder}, which is no run folder with an evaluation ({type(error).__name__}: {error}); give runs/<name>")
    aloha = "suite" not in flags
    task = "aloha" if aloha else f"libero_90_task{flags['task_ids']}" if flags["suite"] == "libero_90" else flags["suite"]
    checkpoints = sorted(folder.glob("step*.pt"))
    if not checkpoints:
        stop(f"--strip is {folder}, which has no checkpoints step*.pt; give the folder of a finished run")
    if flags.get("base", "embedded") != "embedded":
        stop(f"--strip is {folder}, a run of --base {flags['base']}; give one of the embedded base, or play that one with --eval-only --video")
    try:
        base = FlowBase.load(flags["weights"] or ROOT / "weights" / f"{task}.safetensors", task=task)
    except ValueError as error:
        stop(f"--strip is {folder}, whose base cannot be loaded: {error}")
    last = max(int(row["env_steps"]) for row in episodes)
    key = lambda row: (int(row.get("task_id", 0)), int(row["episode"]))
    failed = {key(row) for row in episodes if row["policy"] == "base" and row["success"] == "0"}
    solved = {key(row) for row in episodes if row["policy"] == "tuned" and int(row["env_steps"]) == last and row["success"] == "1"}
    chosen = min(failed & solved, default=None)
    if chosen is None:
        stop(f"--strip is {folder}, where no episode fails with the base and succeeds with the tuned actor")
    task_id, episode = chosen
    if aloha:
        from env_aloha import FPS, Workers, evaluation_poses, play_episodes

        workers = Workers(1)
        poses = evaluation_poses(episode + 1)
        play = lambda act: play_episodes(workers, poses[episode:], act, True)
        pictures = lambda result, at: workers.render([result["qpos"][0][at]])[0]
    else:
        from env_libero import FPS, Workers, official, play_episodes

        workers = Workers(1, flags["suite"], [task_id])
        play = lambda act: play_episodes(workers, [task_id], [official(episode)], act, True)
        pictures = lambda result, at: workers.render([task_id], [[result["frames"][0][t] for t in at]])[0]
    half = min(checkpoints, key=lambda path: abs(int(path.stem[4:]) - last / 2))
    figure, panels = plt.subplots(3, columns, figsize=(2 * columns, 5.4))
    for row, (label, path) in enumerate((("base", None), ("half", half), ("tuned", checkpoints[-1]))):
        actor, flow_steps = FlowActor(base.state_dim, base.latent_dim), 1  # untrained it returns the noise
        if path:
            saved = load_checkpoint(path, "--strip", task)
            actor.load_state_dict(saved["actor"])
            flow_steps = saved["flow_steps"]
            label = f"{saved['env_steps'] / 1e6:.2f} M steps"
        for attempt in range(20):  # other noise than the evaluation's, where this episode was one of many: the base should fail here too
            noise = torch.Generator().manual_seed(attempt)

            def act(observations):
                s, context = base.encode(observations)
                return base.decode(context, base.to_noise(actor.sample(s, flow_steps, noise), noise)).numpy()

            result = play(act)
            if path or not result["success"][0]:
                break
        frames = result["qpos" if aloha else "frames"][0]
        at = np.linspace(0, len(frames) - 1, columns).astype(int)
        for panel, picture, t in zip(panels[row], pictures(result, at), at):
            panel.imshow(picture)
            panel.set(xticks=[], yticks=[], title=f"{t / FPS:.1f} s")
            panel.title.set_fontsize(7)
        panels[row, 0].set_ylabel(f"{label}\n{'success' if result['success'][0] else 'failure'}", fontsize=9)
    workers.close()
    figure.suptitle(f"{task}, evaluation episode {episode}: the same initial state; the base with the first noise with which it fails", fontsize=9)
    save(figure, out, f"fig{'4a' if aloha else '6'}_{task}")


def write_rows(path, columns, rows):
    """A CSV table with four digits a number."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *([f"{v:.4g}" if isinstance(v, (float, np.floating)) else v for v in row] for row in rows)])
    write_atomically(path, text.getvalue().encode())


if __name__ == "__main__":
    args = parse_args(Args, __doc__)
    if args.out is None and (args.strip or (args.latents, args.exploration) != (Args.latents, Args.exploration)):
        stop("--out is missing: the pictures of other runs would replace those of results/figures; give a folder for them")
    args.out = args.out or ROOT / "results" / "figures"
    make_out_folder(args.out)
    if args.strip:
        for folder in args.strip:
            draw_strip(args.out, folder)
        raise SystemExit
    everything = (args.latents, args.exploration) == (Args.latents, Args.exploration)
    if everything:
        for name, pattern, title, paper in CURVES:
            folders = sorted(path.parent for path in (ROOT / "results").glob(f"{pattern}/metrics.csv"))
            if folders:
                draw_curves(args.out, name, folders, title, paper)
        if (curves := ROOT / "results" / "former" / "runs_curves.csv").exists():
            draw_ablations(args.out, curves)
    if everything or args.latents != Args.latents:
        rows = [row for folder in args.latents for row in latent_pictures(args.out, folder)]
        write_rows(args.out / "latents.csv", "task groups group measure value low high episodes latents".split(), rows)
    if args.exploration and (everything or args.exploration != Args.exploration):
        rows = [row for folder in args.exploration for row in draw_exploration(args.out, folder)]
        write_rows(args.out / "exploration.csv", "run env_steps vector lag mean_length correlation low high episodes".split(), rows)
