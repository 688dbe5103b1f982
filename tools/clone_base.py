"""Behaviour cloning: demonstrations -> the frozen base policy π_0, by flow matching in a PCA space of action chunks.

    python tools/clone_base.py --task aloha --overwrite      # makes weights/aloha.safetensors again, end to end

Demonstrations are made first if their file is absent (tools/demo_aloha.py with its defaults, which are those of the
shipped weights). At the end the base plays the evaluation episodes, with Gaussian latents and with all latents zero,
and the figures go into the weights' header. About 10 minutes on two cores.

Training: w_1 = whitened principal components of a demonstrated chunk, w_0 ~ N(0, I), w_u = (1 - u) w_0 + u w_1, and
v(w_u, u | s) regresses on w_1 - w_0 (flow matching, arXiv 2210.02747). 24 components: D12.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import tyro
from statsmodels.stats.proportion import proportion_confint
from tqdm import trange

import demo_aloha
from base_flow import FlowBase
from env_aloha import ACTION_DIM, HORIZON, OBSERVATION_DIM, Workers, play_episodes, sample_box_poses


@dataclass
class Args:
    task: Literal["aloha"] = "aloha"
    """the task to make a base for"""
    demos: Path = Path("demos/aloha.npz")
    """demonstrations; made first if absent"""
    out: Path = Path("weights/aloha.safetensors")
    """where the weights go"""
    overwrite: bool = False
    """replace an existing --out"""
    seed: int = 0
    """of initial weights and minibatches"""
    latent_dim: int = 24
    """principal components of the chunk, and so the size of the latent"""
    chunk_steps: int = 40
    """control steps a chunk"""
    knots: int = 9
    """points of a chunk between which actions are interpolated"""
    flow_steps: int = 10
    """Euler steps from noise to chunk"""
    hidden: int = 256
    """width of the velocity network"""
    blocks: int = 3
    """residual blocks of the velocity network"""
    steps: int = 9000
    """gradient steps"""
    batch: int = 512
    """chunks a gradient step"""
    lr: float = 1e-3
    """AdamW's first learning rate, decayed to 0 along a cosine"""
    ema: float = 0.995
    """decay of the averaged weights, which are the ones kept"""
    state_noise: float = 0.02
    """Gaussian noise on the normalised state in training, in standard deviations"""
    eval_episodes: int = 200
    """episodes of each measurement at the end; 0 measures nothing"""
    workers: int = 2
    """simulator processes"""


def chunks_at(actions, episode, start, args):
    """The demonstrated actions at the knots of chunks. actions: (n, T, A); episode, start: (B,) -> (B, knots, A)."""
    time = start[:, None] + torch.arange(args.knots) * (args.chunk_steps // (args.knots - 1))
    return actions[episode[:, None], time.clamp(max=actions.shape[1] - 1)]  # the last command holds


def fit(base, observations, actions, args):
    """Set normalisation and the whitened PCA basis of `base`. -> the map from chunks at their knots (B, knots, A) to
    whitened components (B, D), and the share of the chunks' variance that these keep."""
    base.state_mean.copy_(observations.mean((0, 1)))
    base.state_std.copy_(observations.std((0, 1)).clamp(min=1e-2))  # in rad, m: less is noise of the simulator
    n, T = actions.shape[:2]
    episode, start = torch.randint(n, (20000,)), torch.randint(T, (20000,))
    knots = chunks_at(actions, episode, start, args)
    scale = actions.std((0, 1)) + 1e-3  # every joint counts alike
    chunks = (knots / scale).flatten(1)  # (20000, knots A)
    mean = chunks.mean(0)
    _, singular, components = torch.linalg.svd(chunks - mean, full_matrices=False)
    variance = singular**2 / len(chunks)
    basis = components[: args.latent_dim] * variance[: args.latent_dim, None].sqrt()
    base.chunk_mean.copy_(mean.view(args.knots, -1) * scale)
    base.chunk_basis.copy_(basis.view(args.latent_dim, args.knots, -1) * scale)
    inverse = (components[: args.latent_dim] / variance[: args.latent_dim, None].sqrt()).T  # (knots A, D)
    explained = (variance[: args.latent_dim].sum() / variance.sum()).item()
    return lambda knots: ((knots / scale).flatten(1) - mean) @ inverse, explained


def clone(base, observations, actions, whitened, args):
    """Flow matching on the demonstrations; leaves the averaged weights in `base`. -> the last mean loss."""
    optimizer = torch.optim.AdamW(base.parameters(), args.lr, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    average = {k: p.detach().clone() for k, p in base.named_parameters()}
    n, T = actions.shape[:2]
    running = None
    progress = trange(args.steps, desc="cloning")
    for step in progress:
        episode, start = torch.randint(n, (args.batch,)), torch.randint(T, (args.batch,))
        s, _ = base.encode(observations[episode, start])
        s = s + args.state_noise * torch.randn_like(s)
        w1 = whitened(chunks_at(actions, episode, start, args))  # (B, D)
        w0, u = torch.randn_like(w1), torch.rand(args.batch)
        wu = (1 - u[:, None]) * w0 + u[:, None] * w1
        loss = ((base.velocity(wu, u, s) - (w1 - w0)) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        decay = min(args.ema, step / (step + 10))  # short memory at first: forget the initial weights
        with torch.no_grad():
            for k, p in base.named_parameters():
                average[k].lerp_(p, 1 - decay)
        if step % 100 == 0:
            running = loss.item() if running is None else 0.9 * running + 0.1 * loss.item()
            progress.set_postfix(loss=f"{running:.3f}")
    base.load_state_dict(average, strict=False)
    return running


def measure(base, workers, episodes, latents):
    """Closed-loop success over the evaluation episodes. latents: "gaussian" or "zero" -> dict for the header."""
    poses = sample_box_poses(np.random.default_rng([0, 0]), episodes)  # 0: evaluation; never training or demonstrations
    generator = torch.Generator().manual_seed(0)

    def act(observations):
        s, context = base.encode(torch.as_tensor(observations, dtype=torch.float32))
        x = torch.randn(episodes, base.latent_dim, generator=generator) * (latents == "gaussian")
        return base.decode(context, base.to_noise(x)).numpy()

    result = play_episodes(workers, poses, act)
    figures = dict(episodes=episodes)
    for name, count in (("official", int(result["success"].sum())), ("strict", int(result["strict"].sum()))):
        print(f"{latents} latents, {episodes} episodes: {name} success {demo_aloha.interval(count, episodes)}")
        low, high = proportion_confint(count, episodes, method="wilson")
        figures[name] = round(count / episodes, 4)
        figures[f"{name}_wilson_95"] = [round(float(low), 4), round(float(high), 4)]
    return figures


def check(args):
    """What is wrong with the command line, in one sentence, or None."""
    for flag in ("latent_dim", "chunk_steps", "flow_steps", "hidden", "blocks", "steps", "batch", "workers"):
        if getattr(args, flag) < 1:
            return f"--{flag.replace('_', '-')} is {getattr(args, flag)}: give 1 or more."
    for flag in ("seed", "eval_episodes"):
        if getattr(args, flag) < 0:
            return f"--{flag.replace('_', '-')} is {getattr(args, flag)}: give 0 or more."
    if args.knots < 2 or args.chunk_steps % (args.knots - 1):
        return f"--knots is {args.knots}: give 2 or more, such that knots - 1 divides --chunk-steps {args.chunk_steps}."
    if args.latent_dim > args.knots * ACTION_DIM:
        return f"--latent-dim is {args.latent_dim}: a chunk has only {args.knots * ACTION_DIM} numbers, give no more."
    if not args.lr > 0:
        return f"--lr is {args.lr}: give a number above 0."
    if not 0 <= args.ema < 1:
        return f"--ema is {args.ema}: give a number from 0 to below 1."
    if not 0 <= args.state_noise < 1:
        return f"--state-noise is {args.state_noise}: give a number from 0 to below 1."
    if args.out.exists() and not args.overwrite:
        return f"--out {args.out} exists: give another path, or --overwrite to replace it."


def load_demos(path):
    """Observations (n, T, 21), actions (n, T, 14) and the settings that made them. ValueError if the file has none."""
    try:
        with np.load(path, allow_pickle=False) as file:
            observations, actions = file["observations"], file["actions"]
            settings = json.loads(str(file["settings"]))
    except Exception as error:  # zipfile, zlib, numpy and json each raise their own
        raise ValueError(f"{path} is no file of demonstrations ({error}): remove it, and it is made anew.") from None
    if observations.shape[2:] != (OBSERVATION_DIM,) or actions.shape != (*observations.shape[:2], ACTION_DIM):
        shapes = f"{observations.shape} and {actions.shape}"
        raise ValueError(f"{path} has arrays of shapes {shapes}: remove it, and it is made anew.")
    return torch.tensor(observations), torch.tensor(actions), settings


def main():
    args = tyro.cli(Args)
    if problem := check(args):
        print(problem, file=sys.stderr)
        sys.exit(2)
    if not args.demos.exists():
        demo_aloha.run(demo_aloha.Args(out=args.demos, workers=args.workers))
    try:
        observations, actions, demonstrations = load_demos(args.demos)
    except ValueError as problem:
        print(f"--demos {problem}", file=sys.stderr)
        sys.exit(2)
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.workers)  # demo_aloha asks for one thread, for its own processes
    start = time.time()
    training = {k: v for k, v in vars(args).items() if k in ("seed", "steps", "batch", "lr", "ema", "state_noise")}
    header = dict(
        task=args.task,
        state_dim=OBSERVATION_DIM,
        action_dim=ACTION_DIM,
        latent_dim=args.latent_dim,
        chunk_steps=args.chunk_steps,
        knots=args.knots,
        flow_steps=args.flow_steps,
        hidden=args.hidden,
        blocks=args.blocks,
        normalisation="s = (observation - state_mean) / state_std, clipped to ±5; knots = chunk_mean + z chunk_basis",
        demonstrations=demonstrations,
    )
    base = FlowBase(header)
    whitened, header["explained_variance"] = fit(base, observations, actions, args)
    header["training"] = dict(training, loss=round(clone(base, observations, actions, whitened, args), 4))
    base.eval()
    print(f"{args.latent_dim} components keep {100 * header['explained_variance']:.2f} % of the chunks' variance; "
          f"loss {header['training']['loss']}, {time.time() - start:.0f} s")
    header["commands"] = [demonstrations["command"], " ".join(["python", "tools/clone_base.py", *sys.argv[1:]])]
    if args.eval_episodes:
        with Workers(args.workers) as workers:
            header["success"] = {k: measure(base, workers, args.eval_episodes, k) for k in ("gaussian", "zero")}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    base.save(args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
