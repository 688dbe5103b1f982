"""Behaviour cloning: demonstrations -> the frozen base policy π_0, by flow matching in a PCA space of action chunks.

    python tools/clone_base.py --task aloha --overwrite             # makes weights/aloha.safetensors again, end to end
    python tools/clone_base.py --task libero_90_task56 --overwrite  # LIBERO's butter/tray
    python tools/clone_base.py --task libero_goal --overwrite       # one base for a suite, conditioned on the task

Demonstrations are made first if their file is absent, as for the shipped weights: with the defaults of tools/demo_aloha.py or
tools/demo_libero.py, and for a suite 120 of each of the tasks that the latter calls COVERED. At the end the base plays the evaluation episodes, with Gaussian latents and with all latents
zero, and the figures go into the weights' header.

Training: w_1 = whitened principal components of a demonstrated chunk, w_0 ~ N(0, I), w_u = (1 - u) w_0 + u w_1, and
v(w_u, u | s) regresses on w_1 - w_0 (flow matching, arXiv 2210.02747). Few components: D12.
"""

import importlib
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from statsmodels.stats.proportion import proportion_confint
from tqdm import trange

from base_flow import FlowBase
from run_files import parse_args

# task: latent dimension, control steps a chunk, knots a chunk, gradient steps
SETTINGS = dict(
    aloha=(24, 40, 9, 10000),
    libero_90_task56=(16, 16, 9, 9000),
    libero_spatial=(16, 16, 9, 15000),
    libero_object=(16, 16, 9, 15000),
    libero_goal=(16, 16, 9, 15000),
    libero_10=(16, 16, 9, 15000),
)
UNDECIDED = 5  # control steps at an episode's start, in which the state does not tell the behaviour yet
# metres a radian at arm's length, of six joints; the gripper's full way counts as 0.1
ALOHA_LEVERS = (0.5, 0.5, 0.4, 0.05, 0.2, 0.05, 0.1)


@dataclass
class Args:
    task: Literal["aloha", "libero_90_task56", "libero_spatial", "libero_object", "libero_goal", "libero_10"] = "aloha"
    """the task, or the suite of tasks, to make a base for"""
    demos: Path | None = None
    """demonstrations, made first if absent; demos/<task>.npz if left out. With this flag a suite's may be of any of its tasks"""
    out: Path | None = None
    """where the weights go; weights/<task>.safetensors if left out"""
    overwrite: bool = False
    """replace an existing --out"""
    seed: int = 0
    """of initial weights and minibatches"""
    latent_dim: int | None = None
    """principal components of the chunk, and so the size of the latent; 24 for aloha, 16 for LIBERO if left out"""
    chunk_steps: int | None = None
    """control steps a chunk; 40 for aloha (0.8 s), 16 for LIBERO (0.8 s) if left out"""
    knots: int | None = None
    """points of a chunk between which actions are interpolated; 9 if left out"""
    flow_steps: int = 10
    """Euler steps from noise to chunk"""
    hidden: int = 256
    """width of the velocity network"""
    blocks: int = 3
    """residual blocks of the velocity network"""
    steps: int | None = None
    """gradient steps; 10000 for aloha, 9000 for libero_90_task56, 15000 for a suite if left out"""
    batch: int = 512
    """chunks a gradient step"""
    lr: float = 1e-3
    """AdamW's first learning rate, decayed to 0 along a cosine"""
    ema: float = 0.995
    """decay of the averaged weights, which are the ones kept"""
    state_noise: float = 0.02
    """Gaussian noise on the normalised state in training, in standard deviations"""
    eval_episodes: int | None = None
    """episodes of each measurement at the end; 200 for aloha, 50 for libero_90_task56, 20 a task for a suite if left out; 0 measures nothing"""
    workers: int = 2
    """simulator processes"""


def chunks_at(actions, start, last, args):
    """The demonstrated actions at the knots of chunks. actions: (N, A) of all episodes one after the other; start: (B,) first steps of
    chunks, last: (B,) last steps of their episodes -> (B, knots, A)."""
    time = start[:, None] + torch.arange(args.knots) * (args.chunk_steps // (args.knots - 1))
    return actions[torch.minimum(time, last[:, None])]  # the last command holds


def fit(base, observations, actions, last, starts, args):
    """Set normalisation and the whitened PCA basis of `base`. -> the map from chunks at their knots (B, knots, A) to
    whitened components (B, D), and the share of the chunks' variance that these keep."""
    base.state_mean.copy_(observations.mean(0))
    base.state_std.copy_(observations.std(0).clamp(min=1e-2))  # in rad, m: less is noise of the simulator
    start = starts[torch.randint(len(starts), (20000,))]
    knots = chunks_at(actions, start, last[start], args)
    if args.task == "aloha":  # a joint counts by how far it moves the fingertips, which must be exact
        scale = 1 / torch.tensor(2 * ALOHA_LEVERS)
    else:
        scale = actions.std(0) + 1e-3
        scale[:3] /= 3  # the hand's way counts three times the rest: where it closes must be exact
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


def paired_noise(shape, behaviour):
    """N(0, I) noise for rows of known behaviour (0 or 1; -1: it does not matter). behaviour: (B,) -> (B, D), `shape`.

    Behaviour 0 has the lowest third of the first component, behaviour 1 the rest; it must be twice as frequent, and then
    all rows together are N(0, I). What a latent asks for is then the same in every state. Without this the clone's own
    choice depends on the place too, and one constant latent can choose rightly by itself.
    """
    noise, quantile = torch.randn(shape), torch.rand(len(behaviour))
    quantile = torch.where(behaviour == 0, quantile / 3, 1 / 3 + quantile * 2 / 3).clamp(1e-6, 1 - 1e-6)
    noise[:, 0] = torch.where(behaviour < 0, noise[:, 0], torch.special.ndtri(quantile))
    return noise


def clone(base, observations, actions, last, starts, whitened, behaviours, args):
    """Flow matching on the demonstrations; leaves the averaged weights in `base`. -> the last mean loss."""
    optimizer = torch.optim.AdamW(base.parameters(), args.lr, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    average = {k: p.detach().clone() for k, p in base.named_parameters()}
    running = None
    progress = trange(args.steps, desc="cloning")
    for step in progress:
        start = starts[torch.randint(len(starts), (args.batch,))]
        s, _ = base.encode(observations[start])
        s = s + args.state_noise * torch.randn_like(s)
        w1 = whitened(chunks_at(actions, start, last[start], args))  # (B, D)
        w0, u = paired_noise(w1.shape, behaviours[start]), torch.rand(args.batch)
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


def measure(base, args, latents):
    """Closed-loop success over the evaluation episodes. latents: "gaussian" or "zero" -> dict for the header."""
    n = args.eval_episodes if args.task == "aloha" else args.eval_episodes * len(base.header["task_ids"])
    generator = torch.Generator().manual_seed(0)

    def act(observations):
        s, context = base.encode(torch.as_tensor(observations, dtype=torch.float32))
        x = torch.randn(n, base.latent_dim, generator=generator) * (latents == "gaussian")
        return base.decode(context, base.to_noise(x)).numpy()

    if args.task == "aloha":
        env = importlib.import_module("env_aloha")
        with env.Workers(args.workers) as workers:
            poses = env.evaluation_poses(n)
            result = env.play_episodes(workers, poses, act)
        counts = dict(official=result["success"].sum(), strict=result["strict"].sum())
    else:
        env = importlib.import_module("env_libero")
        tasks = np.repeat(base.header["task_ids"], args.eval_episodes)
        with env.Workers(args.workers, suite_name(args.task), base.header["task_ids"]) as workers:
            starts = [env.official(i) for i in range(args.eval_episodes)] * len(base.header["task_ids"])
            result = env.play_episodes(workers, tasks, starts, act)
        counts = dict(official=result["success"].sum())
        for k in base.header["task_ids"]:
            print(f"  task {k:2d}: {result['success'][tasks == k].sum():3d} of {args.eval_episodes}")
    figures = dict(episodes=n)
    for name, count in counts.items():
        low, high = proportion_confint(count, n, method="wilson")
        print(f"{latents} latents, {n} episodes: {name} success {100 * count / n:.1f} % [{100 * low:.1f}, {100 * high:.1f}]", flush=True)
        figures[name] = round(float(count / n), 4)
        figures[f"{name}_wilson_95"] = [round(float(low), 4), round(float(high), 4)]
    if args.task != "aloha":
        figures["tasks"] = {k: round(float(result["success"][tasks == k].mean()), 4) for k in base.header["task_ids"]}
    return figures


def suite_name(task):
    return task.split("_task")[0]


def make_demos(args):
    """Demonstrations with the defaults of the task's demonstrator, in a file args.demos."""
    if args.task == "aloha":
        demo = importlib.import_module("demo_aloha")
        return demo.run(demo.Args(out=args.demos, workers=args.workers))
    demo = importlib.import_module("demo_libero")
    if args.task == "libero_90_task56":
        return demo.run(demo.Args(task_ids="56", spots=(0.045, 0.050), out=args.demos, workers=args.workers), [56])
    name = suite_name(args.task)
    task_ids = demo.COVERED[name]
    defaults = demo.Args(suite=name, task_ids=",".join(map(str, task_ids)), num_demos=120, out=args.demos, workers=args.workers)
    demo.run(defaults, task_ids)


def check(args):
    """What is wrong with the command line, in one sentence, or None."""
    for flag in ("latent_dim", "chunk_steps", "flow_steps", "hidden", "blocks", "steps", "batch", "workers"):
        if getattr(args, flag) < 1:
            return f"--{flag.replace('_', '-')} is {getattr(args, flag)}: give 1 or more."
    for flag in ("seed", "eval_episodes"):
        if getattr(args, flag) < 0:
            return f"--{flag.replace('_', '-')} is {getattr(args, flag)}: give 0 or more."
    if args.task != "aloha" and args.eval_episodes > 50:
        return f"--eval-episodes is {args.eval_episodes}: a task of LIBERO has 50 official initial states."
    if args.knots < 2 or args.chunk_steps % (args.knots - 1):
        return f"--knots is {args.knots}: give 2 or more, such that knots - 1 divides --chunk-steps {args.chunk_steps}."
    action_dim = 14 if args.task == "aloha" else 7
    if args.latent_dim > args.knots * action_dim:
        return f"--latent-dim is {args.latent_dim}: a chunk has only {args.knots * action_dim} numbers, give no more."
    if not args.lr > 0:
        return f"--lr is {args.lr}: give a number above 0."
    if not 0 <= args.ema < 1:
        return f"--ema is {args.ema}: give a number from 0 to below 1."
    if not 0 <= args.state_noise < 1:
        return f"--state-noise is {args.state_noise}: give a number from 0 to below 1."
    if args.out.exists() and not args.overwrite:
        return f"--out {args.out} exists: give another path, or --overwrite to replace it."


def load_demos(path, task):
    """Observations (N, S) and actions (N, A) of all episodes one after the other, the last step (N,) of every step's episode, whether the
    arm was pushed (N,), the behaviour (N,) where the state does not tell it yet, else -1, the tasks, and the settings that made them.
    ValueError if the file has none."""
    try:
        with np.load(path, allow_pickle=False) as file:
            observations, actions = file["observations"], file["actions"]
            settings = json.loads(str(file["settings"]))
            if task == "aloha":  # episodes of one length, (n, T, ...)
                length, task_ids = np.full(len(actions), actions.shape[1]), None
                pushed = np.zeros(length.sum(), dtype=bool)
                observations, actions = observations.reshape(-1, observations.shape[2]), actions.reshape(-1, actions.shape[2])
                behaviours = np.full((len(length), length[0]), -1)
                behaviours[:, :UNDECIDED] = file["mode"][:, None]
                behaviours = behaviours.reshape(-1)
            else:
                pushed, length, task_ids = file["pushed"], file["length"], sorted({int(k) for k in file["task_id"]})
                behaviours = np.full(len(pushed), -1)
                if "spot" in file:
                    for step in range(UNDECIDED):
                        behaviours[np.cumsum(length) - length + step] = file["spot"]
    except Exception as error:  # zipfile, zlib, numpy and json each raise their own
        raise ValueError(f"{path} is no file of demonstrations ({error}): remove it, and it is made anew.") from None
    expected = dict(aloha=(21, 14), libero_90_task56=(45, 7)).get(task, (55, 7))
    if (observations.shape[1:], actions.shape[1:]) != ((expected[0],), (expected[1],)) or not len(observations) == len(actions) == length.sum():
        shapes = f"{observations.shape} and {actions.shape}"
        raise ValueError(f"{path} has arrays of shapes {shapes}: remove it, and it is made anew.")
    last = torch.as_tensor(np.repeat(np.cumsum(length) - 1, length))
    return torch.tensor(observations), torch.tensor(actions), last, torch.tensor(pushed), torch.tensor(behaviours), task_ids, settings


def main():
    args = parse_args(Args, __doc__)
    defaults = dict(zip(("latent_dim", "chunk_steps", "knots", "steps"), SETTINGS[args.task]))
    own_demos = args.demos is not None
    defaults.update(demos=Path(f"demos/{args.task}.npz"), out=Path(f"weights/{args.task}.safetensors"), eval_episodes={"aloha": 200, "libero_90_task56": 50}.get(args.task, 20))
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if problem := check(args):
        print(problem, file=sys.stderr)
        sys.exit(2)
    if not args.demos.exists():
        make_demos(args)
    try:
        observations, actions, last, pushed, behaviours, task_ids, demonstrations = load_demos(args.demos, args.task)
        if args.task != "aloha" and not own_demos and task_ids != (covered := importlib.import_module("demo_libero").COVERED[suite_name(args.task)]):
            raise ValueError(f"{args.demos} has demonstrations of the tasks {task_ids}, and this base is cloned on {covered}: remove it, and it is made anew, "
                             "or say with --demos that it is what you want.")  # fmt: skip
    except ValueError as problem:
        print(f"--demos {problem}", file=sys.stderr)
        sys.exit(2)
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.workers)  # the demonstrators ask for one thread, for their own processes
    start = time.time()
    training = {k: v for k, v in vars(args).items() if k in ("seed", "steps", "batch", "lr", "ema", "state_noise")}
    header = dict(
        task=args.task,
        state_dim=observations.shape[1],
        action_dim=actions.shape[1],
        latent_dim=args.latent_dim,
        chunk_steps=args.chunk_steps,
        knots=args.knots,
        flow_steps=args.flow_steps,
        hidden=args.hidden,
        blocks=args.blocks,
        normalisation="s = (observation - state_mean) / state_std, clipped to ±5; knots = chunk_mean + z chunk_basis",
        demonstrations=demonstrations,
    )
    if task_ids is not None:
        header["task_ids"] = task_ids
    base = FlowBase(header)
    # a chunk during which the arm is pushed holds reactions to what nobody could foresee
    pushes_before = torch.cat([torch.zeros(1, dtype=torch.long), pushed.long().cumsum(0)])
    end = torch.minimum(torch.arange(len(last)) + args.chunk_steps, last + 1)
    starts = torch.nonzero(pushes_before[end] == pushes_before[:-1]).flatten()
    whitened, header["explained_variance"] = fit(base, observations, actions, last, starts, args)
    first = [starts[behaviours[starts] == k] for k in (0, 1)]  # an episode's first decisions count ten times, and
    starts = torch.cat([starts, first[0].repeat(9), first[1].repeat(19)])  # the second behaviour's twice that
    header["training"] = dict(training, loss=round(clone(base, observations, actions, last, starts, whitened, behaviours, args), 4))
    base.eval()
    print(f"{args.latent_dim} components keep {100 * header['explained_variance']:.2f} % of the chunks' variance; "
          f"loss {header['training']['loss']}, {time.time() - start:.0f} s")
    header["commands"] = [demonstrations["command"], " ".join(["python", "tools/clone_base.py", *sys.argv[1:]])]
    if args.eval_episodes:
        header["success"] = {k: measure(base, args, k) for k in ("gaussian", "zero")}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    base.save(args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
