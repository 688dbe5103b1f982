"""The paper's assumption (Sec. III-B): does a fall of the flow-matching loss order like a rise of the actor's density?

    python tools/check_monotonicity.py                              # two runs of train_aloha.py, with and without the proximal term; half an hour and more
    python tools/check_monotonicity.py --total-env-steps 200000 --every 2

The latent space is small, so the exact log π_θ(x | s) is computable: x is carried back to the noise along the actor's own flow, and
log π_θ(x | s) = log N(x(0); 0, I) - ∫ ∇·v_θ du (Chen et al. 2018), with the exact divergence. That is the density of the continuous flow; a
rollout samples it in 4 steps, which are a little off. Every iteration of a run, on the latents of its rollout,
compares Δℓ of Eq. 2 with log π_θ - log π_θold, θ_old and θ the actor before and after the update. Spearman's rank correlation, twice: with
2 draws of (u, ε), as many as an update has, and with 256, to tell the estimator's noise from the assumption itself. It also fits log π's rise by
D/2 · Δℓ, the slope behind the floor of D2. Results: results/monotonicity/<name>_seed<seed>.csv, and a picture.
"""

import csv
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
from scipy.stats import spearmanr
from tqdm import tqdm

from fpo_actor import FlowActor, draw_flow_noise
from run_files import load_checkpoint, make_out_folder, parse_args, stop, write_atomically

RUNS = dict(defaults=[], no_proximal=["--proximal", "0"], literal=["--literal"])
FEW_DRAWS, MANY_DRAWS = 2, 256
LATENTS = 160  # of an iteration of train_aloha.py: 32 environments, 5 decisions each
COLUMNS = "env_steps spearman spearman_many_draws slope delta_std log_ratio_std cfm_loss".split()


@dataclass
class Args:
    runs: tuple[str, ...] = ("defaults", "no_proximal")
    """which of: defaults, no_proximal, literal; none: only draw the picture again, of the tables in --out"""
    seed: int = 1
    """seed of the runs"""
    total_env_steps: int = 400_000
    """control steps of each"""
    every: int = 1
    """look at every so many iterations"""
    samples: int = 128
    """latents an iteration, of the 160 that it has"""
    ode_steps: int = 32
    """Runge-Kutta steps of the flow; 32 give log π to 1e-3, 16 to 0.04"""
    out: Path = ROOT / "results" / "monotonicity"
    """folder of the tables"""


def log_density(actor, x, s, steps):
    """log π_θ(x | s) of the flow u ∈ [0, 1], dx/du = v_θ(x, u | s), x(0) ~ N(0, I). x: (B, D), s: (B, S) -> (B,).

    Integrated from u = 1 back to 0 by the classical Runge-Kutta method. ∫ D c(u) du = 0 for the linear part of the field (D7), so that
    the divergence is the trace of the net's Jacobian alone, taken exactly.
    """
    D = x.shape[1]

    def field_and_divergence(x, u):
        time = torch.full((1,), u, dtype=x.dtype)
        net = lambda x: actor.net(x, time.expand(len(x)), s)
        column = lambda e: torch.func.jvp(net, (x,), (e.expand_as(x),))[1] @ e  # ∂net_d / ∂x_d
        trace = torch.func.vmap(column)(torch.eye(D, dtype=x.dtype)).sum(0)
        return actor.velocity(x, time.expand(len(x)), s), trace

    h, integral = 1 / steps, torch.zeros(len(x), dtype=x.dtype)
    for k in reversed(range(steps)):
        u = (k + 1) * h
        v1, d1 = field_and_divergence(x, u)
        v2, d2 = field_and_divergence(x - h / 2 * v1, u - h / 2)
        v3, d3 = field_and_divergence(x - h / 2 * v2, u - h / 2)
        v4, d4 = field_and_divergence(x - h * v3, u - h)
        x = x - h / 6 * (v1 + 2 * v2 + 2 * v3 + v4)
        integral = integral + h / 6 * (d1 + 2 * d2 + 2 * d3 + d4)
    return -0.5 * (x.square().sum(1) + D * np.log(2 * np.pi)) - integral


def record(folder, command):
    """Run `command`, which writes folder/last.pt after every iteration, and keep all of those as hard links. -> their paths, in order."""
    output = tempfile.TemporaryFile("w+")  # a pipe that nobody reads would fill up, and stop the run
    child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    source, kept, seen = folder / "last.pt", [], None
    try:
        ended = False
        while not ended:
            ended = child.poll() is not None  # asked before looking, so that the last checkpoint is not missed
            if source.exists() and source.stat().st_mtime_ns != seen:  # every checkpoint is a new file that was renamed
                seen = source.stat().st_mtime_ns
                kept.append(folder / f"iteration{len(kept):04d}.pt")
                os.link(source, kept[-1])
            time.sleep(0.2)
        output.seek(0)
        said = output.read()[-1000:]
        if child.returncode and "a loss became NaN or infinite" not in said:
            stop(f"the run in {folder} ended with code {child.returncode}: {said}", code=1)
        if child.returncode:
            print(f"it ended early, what it did until then counts: {said}", flush=True)
    finally:
        if child.poll() is None:
            child.terminate()
            child.wait()
    return kept


@torch.no_grad()
def compare_update(before, after, samples, ode_steps, generator):
    """Δℓ against the exact change of log π over one update. before, after: consecutive checkpoints. -> a row of the table."""
    batch = {key: after["buffer"][-1][key].flatten(0, 1) for key in ("x", "s")}
    i = torch.randperm(len(batch["x"]), generator=generator)[:samples]
    x, s = batch["x"][i], batch["s"][i]
    D = x.shape[1]
    old, new = (FlowActor(s.shape[1], D) for _ in range(2))
    old.load_state_dict(before["actor"])
    new.load_state_dict(after["actor"])

    def delta_of(draws):  # Eq. 2
        u, eps = draw_flow_noise(len(x), draws, D, generator)
        cfm = new.cfm_loss(x, s, u, eps)[0]
        return old.cfm_loss(x, s, u, eps)[0] - cfm, cfm

    delta, cfm = delta_of(FEW_DRAWS)
    delta_many, _ = delta_of(MANY_DRAWS)
    log_ratio = log_density(new, x, s, ode_steps) - log_density(old, x, s, ode_steps)
    centred = delta_many - delta_many.mean()
    slope = (centred * (log_ratio - log_ratio.mean())).sum() / centred.square().sum()
    return dict(env_steps=after["env_steps"], spearman=spearmanr(delta, log_ratio).statistic, spearman_many_draws=spearmanr(delta_many, log_ratio).statistic,
                slope=slope.item() / (D / 2), delta_std=delta.std().item(), log_ratio_std=log_ratio.std().item(), cfm_loss=cfm.mean().item())  # fmt: skip


def draw(tables, path, title):
    """The rank correlation, and ℓ, over training. tables: {run: rows of its CSV}"""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "the same file every time"
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.2), dpi=150)
    for color, (name, rows) in zip(("#332288", "#cc6677", "#44aa99"), tables.items()):
        rows = [{key: float(value) for key, value in row.items()} for row in rows]
        steps = [row["env_steps"] / 1e6 for row in rows]
        label = name.replace("_", " ")
        left.plot(steps, [row["spearman"] for row in rows], color=color, lw=1.2, label=f"{label}, {FEW_DRAWS} draws")
        left.plot(steps, [row["spearman_many_draws"] for row in rows], color=color, lw=1.2, ls=":", label=f"{label}, {MANY_DRAWS} draws")
        right.plot(steps, [row["cfm_loss"] for row in rows], color=color, lw=1.2, label=label)
    left.set(xlabel="environment steps (millions)", ylabel="Spearman's ρ of Δℓ and Δ log π", ylim=(-1.02, 1.02))
    left.axhline(0, color="0.6", lw=0.8)
    left.legend(fontsize=6, frameon=False, loc="lower left")
    right.axhline(np.pi / 2, color="0.4", ls="--", lw=0.8, label="π/2, the untrained actor")
    right.set(xlabel="environment steps (millions)", ylabel="ℓ_cfm on the executed latents")
    right.legend(fontsize=6, frameon=False)
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    for suffix in (".png", ".svg"):
        figure.savefig(path.with_suffix(suffix), metadata={"Date": None} if suffix == ".svg" else None)


if __name__ == "__main__":
    args = parse_args(Args, __doc__)
    for name in args.runs:
        if name not in RUNS:
            stop(f"--runs has {name}, which is none of {', '.join(RUNS)}")
    for name, least in (("total_env_steps", 1), ("every", 1), ("samples", 3), ("ode_steps", 1)):
        if getattr(args, name) < least:
            stop(f"--{name.replace('_', '-')} is {getattr(args, name)}; give at least {least}")
    if args.samples > LATENTS:
        stop(f"--samples is {args.samples}, and an iteration has {LATENTS} latents; give at most that")
    make_out_folder(args.out)
    for name in args.runs:
        run_name = f"monotonicity_{name}_seed{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
        print(f"train {name}: runs/{run_name}", flush=True)
        command = [sys.executable, ROOT / "train_aloha.py", "--device", "cpu", "--seed", args.seed, "--total-env-steps", args.total_env_steps, "--eval-every", args.total_env_steps,
                   "--eval-episodes", 2, "--run-name", run_name, *RUNS[name]]  # fmt: skip
        kept = record(Path("runs") / run_name, list(map(str, command)))
        generator, rows, before = torch.Generator().manual_seed(args.seed), [], None
        for path in tqdm(kept, desc=f"measure {name}", unit="iteration"):
            after = load_checkpoint(path, "last.pt", "aloha")
            moved = before and after["iteration"] == before["iteration"] + 1 and not torch.equal(after["actor"]["out.bias"], before["actor"]["out.bias"])
            if moved and after["iteration"] % args.every == 0:  # the actor rests while the critics warm up
                rows.append(compare_update(before, after, args.samples, args.ode_steps, generator))
            before = after
            path.unlink()
        if not rows:
            stop(f"{run_name} has no update of the actor to look at; give more --total-env-steps or a lower --every")
        text = "\n".join([",".join(COLUMNS), *(",".join(f"{row[c]:.6g}" for c in COLUMNS) for row in rows)]) + "\n"
        write_atomically(args.out / f"{name}_seed{args.seed}.csv", text.encode())
        for key in ("spearman", "spearman_many_draws", "slope"):
            values = np.array([row[key] for row in rows])
            print(f"{name:16} {key:20} median {np.median(values):6.3f}   5 to 95 %: {np.quantile(values, 0.05):6.3f} to {np.quantile(values, 0.95):6.3f}")
    tables = {name: args.out / f"{name}_seed{args.seed}.csv" for name in RUNS}  # earlier ones too
    draw({name: list(csv.DictReader(path.open())) for name, path in tables.items() if path.exists()}, args.out / f"seed{args.seed}",
         f"ALOHA, seed {args.seed}, a point an update, over latents of its rollout")  # fmt: skip
