"""The paper's figures from finished runs, no training: PNG and SVG.

    python tools/plots.py                                           # those of results/ that need no episodes
    python tools/plots.py --latents runs/<name> --out pictures      # Fig. 7: latents of base and tuned actor
    python tools/plots.py --strip runs/<name> --out pictures        # Fig. 4a, 6: photographs (needs EGL)

The last two play episodes with the checkpoints step*.pt of a run.
"""

from dataclasses import dataclass
from pathlib import Path

from shared import ROOT, check_limits  # first: it makes the folder above known
import matplotlib.pyplot as plt
import numpy as np

from results import ROWS, counts_from, evaluations, on_common_states, read_table, runs_of, t_half
from support.flags import parse_args, stop
from support.run_files import check_same, load_checkpoint, make_out_folder

COLORS = ["#332288", "#88ccee", "#44aa99", "#999933", "#cc6677"]  # Paul Tol's, safe for colour-blind readers
BLUE, RED, GREEN, GREY = COLORS[0], COLORS[4], "#117733", "0.4"
plt.switch_backend("Agg")  # draws to files, whatever screen there is
POINTS = 400  # of a group in a t-SNE


@dataclass
class Args:
    latents: tuple[Path, ...] = ()  # run folders
    strip: tuple[Path, ...] = ()  # run folders
    episodes: int = 50  # evaluation episodes that these two play with each checkpoint
    out: Path | None = None  # where the pictures go; without any of these folders results/figures


def save(figure, out, name):
    plt.rcParams["svg.hashsalt"] = "the same file every time"
    figure.tight_layout()
    figure.savefig(out / f"{name}.png", dpi=150)
    figure.savefig(out / f"{name}.svg", dpi=150, metadata={"Date": None})
    plt.close(figure)
    print(out / f"{name}.png")


def draw_seeds(axes, curves, color, label, most=None, thin=False):
    """Mean of the seeds on a common grid with their 95 % t interval, cut at 0 and at `most`; or `thin`, with
    a thin line each. curves: [(steps, values)]"""
    if not all(len(steps) for steps, _ in curves):
        return
    grid = np.linspace(max(steps[0] for steps, _ in curves), min(steps[-1] for steps, _ in curves), 60)
    values = np.array([np.interp(grid, *curve) for curve in curves])
    mean, half = values.mean(0), t_half(values) if len(values) > 1 else 0
    for steps, value in curves if thin else ():
        axes.plot(steps / 1e6, value, color=color, lw=0.5, alpha=0.5)
    axes.plot(grid / 1e6, mean, color=color, lw=1.6 if thin else 1.4, label=label)
    if not thin:
        low, high = np.clip([mean - half, mean + half], 0, most)
        axes.fill_between(grid / 1e6, low, high, color=color, alpha=0.15, lw=0)


def training_curve(metrics, key, early):
    """(steps, values) of a column of metrics.csv from `early` on: means of 5 rows, empty cells left out."""
    steps = np.array([int(line["charts/env_steps"]) for line in metrics])
    values = np.array([float(line.get(key) or "nan") for line in metrics])
    values[steps < early] = np.nan
    known = np.flatnonzero(np.isfinite(values))
    return steps[known], np.array([np.nanmean(values[max(0, i - 4) : i + 1]) for i in known])


def draw_curves(out, name, pattern, title, paper):
    """Success on held-out states, return of the training episodes, and their length."""
    success, training = [], {}
    for folder in sorted((ROOT / "results").glob(pattern)):
        tested = on_common_states(evaluations(folder / "eval.csv"))
        points = [(k[1], 100 * v.mean()) for k, v in tested.items() if k[0] == "tuned" or k == ("base", 0)]
        success.append(np.array(points).T)
        metrics, early = read_table(folder / "metrics.csv"), counts_from(folder)
        for key in ("return", "episode_length"):
            curve = training_curve(metrics, f"charts/{key}", early)
            training.setdefault(key, []).append(curve)
    figure, panels = plt.subplots(1, 3, figsize=(10, 3.1))
    draw_seeds(panels[0], success, BLUE, f"the same {len(tested['base', 0])} held-out states", 100)
    panels[0].axhline(np.mean([shares[0] for _, shares in success]), color=GREY, ls="--", lw=1, label="base")
    panels[0].axhline(paper, color=GREY, ls="-.", lw=1, label="the paper's π$_0$-FPO")
    draw_seeds(panels[1], training["return"], BLUE, "training episodes", 1)
    draw_seeds(panels[2], training["episode_length"], BLUE, "training episodes")
    labels = ("success (%)", 102), ("return (Eq. 1)", 1.02), ("episode length (control steps)", None)
    for panel, (label, most) in zip(panels, labels):
        panel.set(xlabel="environment steps (millions)", ylabel=label, xlim=(0, None), ylim=(0, most))
        panel.legend(fontsize=7, frameon=False, loc="lower right")
    seeds = f"mean and 95 % t interval of {len(success)} seeds" if len(success) > 1 else "1 seed"
    means = "training curves: running mean of 5 iterations, from three time limits on"
    figure.suptitle(f"{title}: {seeds}; {means}", fontsize=9)
    save(figure, out, name)


def draw_ablations(out):
    """Table II's rows: success of the last 100 training episodes and the norm of the executed latents."""
    figure, panels = plt.subplots(1, 4, figsize=(12, 3.1))
    for task, title, pair in (("aloha/", "ALOHA", panels[:2]), ("libero/butter_", "butter/tray", panels[2:])):
        runs = runs_of(task)
        for row, color in zip(("", "sac", "no_clip", "k1", "single_critic"), COLORS):
            tables = {path: read_table(path / "metrics.csv") for path in runs.get(row, ())}
            if not tables:
                continue
            text = f"{ROWS[row].split(':')[0]}, {len(tables)}"
            shares = [training_curve(v, "charts/success", counts_from(path)) for path, v in tables.items()]
            draw_seeds(pair[0], [(x, 100 * y) for x, y in shares], color, text, thin=True)
            norms = [training_curve(table, "latent/norm", 0) for table in tables.values()]
            draw_seeds(pair[1], norms, color, text, thin=True)
        pair[0].set(ylabel="success of the last 100 training episodes (%)", ylim=(0, 102))
        pair[1].set(ylabel="norm of the executed latents")
        style = dict(title="row, number of seeds", title_fontsize=6.5)
        pair[0].legend(fontsize=6.5, frameon=False, loc="lower right", **style)
        for panel in pair:
            panel.yaxis.label.set_fontsize(8)
            panel.set(xlabel="environment steps (millions)", xlim=(0, None), title=title)
    save(figure, out, "ablations")


def play_run(folder, flag, episodes, record=False):
    """Evaluation episodes with the base and with the actors of a run's checkpoints; `record`: of one
    half way and the last, with frames. -> suite, results of evaluate() with env_steps"""
    from base import Pi0Options, is_pi0, load_base
    from envs import cloned_tasks, load_suite
    from envs.workers import Workers
    from evaluate import evaluate, latents_of
    from fpo_actor import FlowActor
    from support.ranks import SIMULATORS, connect

    paths = sorted(folder.glob("step*.pt"))
    try:
        paths = [paths[(len(paths) - 1) // 2], paths[-1]] if record else paths
        saved = [load_checkpoint(path, flag) for path in paths]
        made, options = saved[0], Pi0Options(**saved[0]["pi0"])
        flow_steps, hidden = made["flow_steps"], made["hidden"]
    except (OSError, ValueError, KeyError, IndexError):
        stop(f"{flag} is {folder}, where step*.pt is missing or old; give a finished run's folder")
    pictures = record or is_pi0(made["base"])
    suite = load_suite(made["suite"] or "aloha", made["task_ids"], pictures)
    base = load_base(made["base"], options, suite, connect("auto"))
    check_same(made, dict(base_sha256=base.sha256), folder, flag)
    tasks = cloned_tasks(suite, base)
    actor = FlowActor(base.state_dim, base.latent_dim, hidden).to(base.device)
    starts = suite.starts[: -(-episodes // len(tasks))]
    with Workers(suite.build, tasks, SIMULATORS, base.pictures) as workers:
        latents, where = latents_of(actor, flow_steps), (base, workers, tasks, starts, suite.limit)
        results = [dict(evaluate("base", latents["base"], *where, record=record), env_steps=0)]
        for content in saved:
            actor.load_state_dict(content["actor"])
            steps = dict(env_steps=content["env_steps"])
            results.append(evaluate("tuned", latents["tuned"], *where, record=record, **steps) | steps)
    return suite, results


def draw_groups(out, folder, episodes):
    """Fig. 7: t-SNE, PCA, norms and variance of each dimension of the paper's groups."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    suite, results = play_run(folder, "--latents", episodes)
    rng, groups = np.random.default_rng(0), []
    for name, runs, kind, color in (
        ("base", results[:1], (False, True), BLUE),
        ("failed, partly trained", results[1:-1], (False,), RED),
        ("successful, trained", results[-1:], (True,), GREEN),
    ):
        drawn = [x for run in runs for x, good in zip(run["drawn"], run["success"]) if good in kind]
        if drawn:
            x = np.concatenate(drawn)
            groups.append((x, color, f"{name} ({min(len(x), POINTS)}, {len(drawn)} episodes)"))
    shown = [x[rng.permutation(len(x))[:POINTS]] for x, *_ in groups]
    together, ends = np.concatenate(shown), np.cumsum(list(map(len, shown)))[:-1]
    figure, panels = plt.subplots(1, 4, figsize=(12, 3.2))
    tsne = TSNE(random_state=0, perplexity=min(30, len(together) // 4))
    for panel, method, name in ((panels[0], tsne, "t-SNE"), (panels[1], PCA(2), "PCA")):
        for (_, color, label), part in zip(groups, np.split(method.fit_transform(together), ends)):
            panel.scatter(*part.T, s=9, lw=0, color=color, alpha=0.7, label=label, rasterized=True)
        panel.set(xlabel=f"{name} 1", ylabel=f"{name} 2", xticks=[], yticks=[])
    for x, color, _ in groups:
        panels[2].hist(np.linalg.norm(x, axis=1), bins=30, density=True, histtype="step", lw=1.4, color=color)
        panels[3].plot(np.arange(1, x.shape[1] + 1), x.var(0), color=color, marker="o", ms=3, lw=1)
    panels[2].set(xlabel="norm of a latent", ylabel="density")
    panels[3].set(xlabel="latent dimension", ylabel="variance", ylim=(0, None))
    title = "the paper's groups, which differ in training as well as in success (Fig. 7)"
    figure.suptitle(f"{suite.name}: {title}", fontsize=9)
    style = dict(ncol=3, loc="lower center", markerscale=2, frameon=False, bbox_to_anchor=(0.27, -0.02))
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=7, **style)
    save(figure, out, f"fig7_{suite.name}")


def draw_strip(out, folder, episodes, columns=6):
    """Frames of an episode at 0, half and full training, where the base fails and the last actor succeeds."""
    from envs.workers import Workers

    suite, results = play_run(folder, "--strip", episodes, record=True)
    chosen = np.flatnonzero(~results[0]["success"] & results[-1]["success"])
    if not len(chosen):
        stop(f"--strip is {folder}, where no episode fails with the base and succeeds with the trained actor")
    figure, panels = plt.subplots(3, columns, figsize=(2 * columns, 5.4))
    task, number = (results[0][key][chosen[0]] for key in ("task", "episode"))
    with Workers(suite.build, [task], 1) as workers:
        for row, result in zip(panels, results):
            frames, good = (result[key][chosen[0]] for key in ("frames", "success"))
            at = np.linspace(0, len(frames) - 1, columns).astype(int)
            for panel, picture, t in zip(row, workers.render([task], [frames[at]])[0], at):
                panel.imshow(picture)
                panel.set(xticks=[], yticks=[], title=f"{t / suite.fps:.1f} s")
                panel.title.set_fontsize(7)
            steps = f"{result['env_steps'] / 1e6:.2f} M steps" if result["env_steps"] else "base"
            row[0].set_ylabel(f"{steps}\n{'success' if good else 'failure'}", fontsize=9)
    figure.suptitle(f"{suite.name}, episode {number}: the same initial state and noise", fontsize=9)
    save(figure, out, f"fig{'4a' if suite.name == 'aloha' else '6'}_{suite.name}")


if __name__ == "__main__":
    args, results = parse_args(Args, __doc__), ROOT / "results"
    everything = not (args.latents or args.strip)
    if args.out is None and not everything:
        stop("--out is missing: results/figures has the pictures of other runs; give a folder for these")
    args.out = args.out or results / "figures"
    check_limits(args, "episodes", 1)
    make_out_folder(args.out)
    if everything:
        draw_curves(args.out, "fig4b_aloha", "aloha/seed*", "ALOHA Transfer Cube (Fig. 4b)", 65)
        draw_curves(args.out, "butter", "libero/butter_seed*", "LIBERO, butter in the tray", 78.5)
        draw_curves(args.out, "fig3_libero_spatial", "libero/libero_spatial_seed*", "LIBERO-Spatial", 97.2)
        draw_ablations(args.out)
    for folder in args.strip:
        draw_strip(args.out, folder, args.episodes)
    for folder in args.latents:
        draw_groups(args.out, folder, args.episodes)
