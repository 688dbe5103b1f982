"""Does a fall of the flow-matching loss order like a rise of the actor's density, as Sec. III-B assumes?

    python tools/check_monotonicity.py    # two runs, with and without --self-fit; half an hour or more

The latent space is small, so log π_θ(x | s) can be computed: x is carried back to the noise along the actor's
own flow, and log π_θ(x | s) = log N(x(0); 0, I) - ∫ ∇·v_θ du (Chen et al. 2018), with the exact divergence.
After every update of a run Δℓ of Eq. 2 is compared with log π_θ - log π_θold on latents x ~ π_θold at states
of its rollout:
Spearman's rank correlation with 2 draws of (u, ε), as many as an update has, and with 256, which tells noise
from the assumption; and the slope of log π's rise on D/2 · Δℓ.
"""

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from shared import ROOT, check_limits  # first: it makes the folder above known
import numpy as np
import torch
from flow_matching.solver import ODESolver
from scipy.stats import spearmanr
from tqdm import tqdm

from fpo_actor import FlowActor, draw_flow_noise
from support.flags import parse_args, stop
from support.run_files import load_checkpoint, make_out_folder

RUNS = dict(defaults="", no_self_fit="--self-fit 0", literal="--literal")
SAMPLES, ODE_STEPS = 128, 32  # latents an iteration; Runge-Kutta steps: log π to about 1e-3
COLUMNS = "env_steps spearman spearman_many_draws slope cfm_loss".split()


@dataclass
class Args:
    runs: tuple[str, ...] = ("defaults", "no_self_fit")  # which of: defaults, no_self_fit, literal
    seed: int = 1  # seed of the runs
    total_env_steps: int = 400_000  # control steps of each
    out: Path = Path("runs/monotonicity")  # folder of the tables


def log_density(actor, x, s, steps=ODE_STEPS):
    """log π_θ(x | s) of the flow dx/du = v_θ(x, u | s), x(0) ~ N(0, I), from u = 1 back to 0.
    x: (B, D), s: (B, S) -> (B,)."""

    def velocity(x, t):
        return actor.velocity(x, t.expand(len(x)), s)

    def prior(x):
        return torch.distributions.Normal(0, 1).log_prob(x).sum(1)

    solver = ODESolver(velocity)
    return solver.compute_likelihood(x, prior, 1 / steps, method="rk4", exact_divergence=True)[1]


@torch.no_grad()
def compare_update(before, after, generator):
    """Δℓ against the change of log π over one update. before, after: consecutive checkpoints. -> a row"""
    s = after["buffer"][-1]["s"].flatten(0, 1)
    s = s[torch.randperm(len(s), generator=generator)[:SAMPLES]]
    old, new = (FlowActor(s.shape[1], before["latent_dim"]) for _ in range(2))
    old.load_state_dict(before["actor"])
    new.load_state_dict(after["actor"])
    x = old.sample(s, before["flow_steps"], generator)
    log_ratio = log_density(new, x, s) - log_density(old, x, s)
    deltas = []  # Eq. 2
    for draws in (2, 256):
        noise = draw_flow_noise(len(x), draws, x.shape[1], generator)
        cfm = new.cfm_loss(x, s, *noise)
        deltas.append(old.cfm_loss(x, s, *noise) - cfm)
    ranks = [spearmanr(delta, log_ratio).statistic for delta in deltas]
    slope = np.polyfit(deltas[1] * x.shape[1] / 2, log_ratio, 1)[0]
    return [after["env_steps"], *ranks, slope, cfm.mean().item()]


if __name__ == "__main__":
    args = parse_args(Args, __doc__)
    for name in set(args.runs) - set(RUNS):
        stop(f"--runs has {name}, which is none of {', '.join(RUNS)}")
    check_limits(args, "total_env_steps", 1)
    make_out_folder(args.out)
    for name in args.runs:
        run_name = f"monotonicity_{name}_seed{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
        flags = f"--device cpu --seed {args.seed} --run-name {run_name} {RUNS[name]}"
        flags += f" --total-env-steps {args.total_env_steps}"
        flags += " --eval-every 1 --eval-episodes 2"  # a checkpoint is kept at every evaluation: all of them
        subprocess.run([sys.executable, ROOT / "train_aloha.py", *flags.split()])
        kept = sorted(Path("runs", run_name).glob("step*.pt"))  # of a run that has failed those until then
        generator, rows, before = torch.Generator().manual_seed(args.seed), [], None
        for path in tqdm(kept, desc=f"measure {name}", unit="iteration"):
            after = load_checkpoint(path, "last.pt")
            path.unlink()
            moved = before and not torch.equal(after["actor"]["out.bias"], before["actor"]["out.bias"])
            if moved and after["iteration"] == before["iteration"] + 1:
                rows.append(compare_update(before, after, generator))
            before = after
        if not rows:
            stop(f"{run_name} has no update of the actor to look at; give more --total-env-steps")
        csv = args.out / f"{name}_seed{args.seed}.csv"
        np.savetxt(csv, rows, "%.8g", ",", header=",".join(COLUMNS), comments="")
        for k in (1, 2, 3):
            low, median, high = np.quantile(np.array(rows)[:, k], (0.05, 0.5, 0.95))
            print(f"{name:12} {COLUMNS[k]:20} median {median:6.3f}   5 to 95 %: {low:6.3f} to {high:6.3f}")
