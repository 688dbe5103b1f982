"""Behaviour cloning: demonstrations -> the frozen base π_0, by flow matching in a PCA space of action chunks.

    python tools/clone_base.py --task aloha --overwrite             # weights/aloha.safetensors, end to end
    python tools/clone_base.py --task libero_90_task56 --overwrite  # LIBERO's butter/tray
    python tools/clone_base.py --task libero_goal --overwrite       # a suite, conditioned on the task

Demonstrations are made first if their file is absent, with the defaults of tools/demo_aloha.py or
tools/demo_libero.py: of butter/tray 400, of a suite 100 of each task, 300 of their beginning and 200 of what
follows the grasp. So the shipped weights of ALOHA were made; of the others results/libero_bases.md says how.
At the end the base plays the evaluation episodes, with Gaussian latents and with all latents zero; the
figures go into the weights' header.

Training: w_1 = whitened principal components of a demonstrated chunk, w_0 ~ N(0, I), w_u = (1 - u) w_0 + u
w_1, and v(w_u, u | s) regresses on w_1 - w_0 (flow matching, arXiv 2210.02747). Few components: the noise of
a policy gradient grows with their number.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import shared  # first: it makes the folder above known
import numpy as np
import torch
from tqdm import trange

from base.flow import FlowBase
from envs import load_suite
from envs.workers import Workers
from evaluate import evaluate
from support.flags import parse_args, stop
from support.logs import wilson

FORMULA = "s = (observation - state_mean) / state_std, clipped to ±5; knots = chunk_mean + z chunk_basis"
UNDECIDED = 5  # control steps at an episode's start, in which the state does not tell the behaviour yet
# metres a radian at arm's length, of six joints; the gripper's full way counts as 0.1
ALOHA_LEVERS = (0.5, 0.5, 0.4, 0.05, 0.2, 0.05, 0.1)
NETWORK = dict(flow_steps=10, hidden=256, blocks=3)  # Euler steps from noise to chunk; width, residual blocks
LR, EMA = 1e-3, 0.995  # AdamW's first learning rate, falling to 0 along a cosine; decay of the weights kept
# k of sin ks and cos ks that base, actor and critics see: a centimetre of the hand's way, which decides on
# LIBERO, is 0.1 standard deviations. On ALOHA they gain nothing that shows.
SINES = dict(sines=[4, 16], sines_of=49)  # all but the task's one-hot
STATE_NOISE = 0.02  # Gaussian noise on the normalised state in training, standard deviations


@dataclass
class Args:
    task: shared.Task = "aloha"  # the task, or the suite of tasks, to make a base for
    demos: Path | None = None  # made first if absent; demos/<task>.npz if left out
    out: Path | None = None  # where the weights go; weights/<task>.safetensors if left out
    overwrite: bool = False  # replace an existing --out
    seed: int = 0  # of initial weights and minibatches
    latent_dim: int = 24  # principal components of a chunk
    chunk_steps: int | None = None  # control steps a chunk; 40, for LIBERO 16 if left out, 0.8 s
    knots: int | None = None  # points between which actions are interpolated; 9, for LIBERO 5 if left out
    steps: int | None = None  # gradient steps; 10000, libero_90_task56 9000, a suite 24000 if left out
    first: int | None = None  # how often a first decision counts; 10, for a suite 3 if left out
    batch: int = 512  # chunks a gradient step
    eval_episodes: int | None = None  # a task, at the end, or 0; 200, 50, for a suite 20 if left out
    workers: int = 2  # simulator processes


@dataclass
class Demos:
    """All steps of all episodes one after the other, N; and what made them."""

    observations: torch.Tensor  # (N, S)
    actions: torch.Tensor  # (N, A)
    last: torch.Tensor  # (N,) the last step of each step's episode
    pushed: torch.Tensor  # (N,) whether the arm was pushed
    behaviours: torch.Tensor  # (N,) 0 or 1 where the state does not tell the behaviour yet, else -1
    task_ids: list | None  # of LIBERO
    settings: dict  # of the demonstrator

    def chunks(self, start, args):
        """Actions at the knots of the chunks that begin at steps `start` (B,). -> (B, knots, A)"""
        time = start[:, None] + torch.arange(args.knots) * (args.chunk_steps // (args.knots - 1))
        return self.actions[torch.minimum(time, self.last[start][:, None])]  # the last command holds


def load_demos(path, task):
    """-> Demos. Stops with one sentence if the file has none of this task."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays, settings, task_ids = dict(file), json.loads(str(file["settings"])), None
        observations, actions = arrays["observations"], arrays["actions"]
        if task == "aloha":  # episodes of one length, (n, T, …)
            length, behaviour = np.full(len(actions), actions.shape[1]), arrays["mode"]
            observations, actions = observations.reshape(-1, 21), actions.reshape(-1, 14)
            pushed = np.zeros(len(actions), dtype=bool)
        else:
            length, pushed = arrays["length"], arrays["pushed"]
            task_ids = np.unique(arrays["task_id"]).tolist()
            behaviour = arrays["behaviour"]
        behaviours, ends = np.full(len(pushed), -1), np.cumsum(length)
        behaviours[(ends - length)[:, None] + np.arange(UNDECIDED)] = behaviour[:, None]
    except Exception as error:  # zipfile, zlib, numpy and json each raise their own
        stop(f"--demos {path} is no file of demonstrations ({error}); remove it, and it is made anew")
    S, A = (21, 14) if task == "aloha" else (139 if task.startswith("libero_90") else 59, 7)
    if (observations.shape, actions.shape) != ((ends[-1], S), (ends[-1], A)):
        shapes = f"{observations.shape} and {actions.shape}"
        stop(f"--demos {path} has arrays of shapes {shapes}; remove it, and it is made anew")
    arrays = observations, actions, np.repeat(ends - 1, length), pushed, behaviours
    return Demos(*map(torch.as_tensor, arrays), task_ids, settings)


def fit(base, demos, starts, args):
    """Set normalisation and the whitened PCA basis of `base`. starts: (n,) first steps of chunks -> the map
    from chunks at knots (B, knots, A) to whitened components (B, D), and the share of variance in these."""
    base.state_mean.copy_(demos.observations.mean(0))
    base.state_std.copy_(demos.observations.std(0).clamp(min=1e-2))  # rad, m: less is the simulator's noise
    knots = demos.chunks(starts[torch.randint(len(starts), (20000,))], args)
    if args.task == "aloha":  # a joint counts by how far it moves the fingertips, which must be exact
        scale = 1 / torch.tensor(2 * ALOHA_LEVERS)
    else:
        scale = demos.actions.std(0) + 1e-3
        scale[:3] /= 3  # the hand's way counts three times the rest: where it closes must be exact
    chunks = (knots / scale).flatten(1)  # (20000, knots A)
    mean, D = chunks.mean(0), args.latent_dim
    _, singular, components = torch.linalg.svd(chunks - mean, full_matrices=False)
    variance = singular**2 / len(chunks)
    deviation = variance[:D, None].sqrt()
    base.chunk_mean.copy_(mean.view(args.knots, -1) * scale)
    base.chunk_basis.copy_((components[:D] * deviation).view(D, args.knots, -1) * scale)
    inverse = (components[:D] / deviation).T  # (knots A, D)
    kept = (variance[:D].sum() / variance.sum()).item()
    return lambda knots: ((knots / scale).flatten(1) - mean) @ inverse, kept


def paired_noise(shape, behaviour):
    """N(0, I) noise for rows of known behaviour (0 or 1; -1: any). behaviour: (B,) -> (B, D), `shape`.

    Behaviour 0 has the lowest third of the first component, behaviour 1 the rest; it must be twice as
    frequent, and then all rows together are N(0, I). What a latent asks for is then the same in every state.
    Without this the clone's own choice depends on the place too, and one constant latent can choose rightly.
    """
    noise, quantile = torch.randn(shape), torch.rand(len(behaviour))
    quantile = torch.where(behaviour == 0, quantile / 3, 1 / 3 + quantile * 2 / 3).clamp(1e-6, 1 - 1e-6)
    noise[:, 0] = torch.where(behaviour < 0, noise[:, 0], torch.special.ndtri(quantile))
    return noise


def clone(base, demos, starts, whitened, args):
    """Flow matching on the demonstrations; leaves the averaged weights in `base`. -> the last mean loss."""
    optimizer = torch.optim.AdamW(base.parameters(), LR, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    average = {k: p.detach().clone() for k, p in base.named_parameters()}
    running, bar = None, trange(args.steps, desc="cloning")
    for step in bar:
        start = starts[torch.randint(len(starts), (args.batch,))]
        _, s = base.encode(demos.observations[start])
        s = s + STATE_NOISE * torch.randn_like(s)
        w1 = whitened(demos.chunks(start, args))  # (B, D)
        w0, u = paired_noise(w1.shape, demos.behaviours[start]), torch.rand(args.batch)
        wu = (1 - u[:, None]) * w0 + u[:, None] * w1
        loss = ((base.velocity(wu, u, s) - (w1 - w0)) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        decay = min(EMA, step / (step + 10))  # short memory at first: forget the initial weights
        with torch.no_grad():
            for k, p in base.named_parameters():
                average[k].lerp_(p, 1 - decay)
        if step % 100 == 0:
            running = loss.item() if running is None else 0.9 * running + 0.1 * loss.item()
            bar.set_postfix(loss=f"{running:.3f}")
    base.load_state_dict(average, strict=False)
    return running


def measure(base, suite, args):
    """Closed-loop success over the evaluation episodes, Gaussian latents and 0. -> dict for the header."""
    figures, where = {}, (suite.tasks, suite.starts[: args.eval_episodes], suite.limit)
    policies = dict(gaussian=lambda s, noise: noise, zero=lambda s, noise: 0 * noise)
    with Workers(suite.build, suite.tasks, args.workers) as workers:
        for name, latents in policies.items():
            result = evaluate(name, latents, base, workers, *where)
            good, n = result["success"], len(result["success"])
            interval = [round(float(x), 4) for x in wilson(good.sum(), n)]
            figures[name] = dict(episodes=n, success=round(float(good.mean()), 4), wilson_95=interval)
            if args.task != "aloha":
                each = {k: round(float(good[result["task"] == k].mean()), 4) for k in suite.tasks}
                figures[name]["tasks"] = each
                print(f"  of each task: {each}")
    return figures


def make_demos(args):
    """Demonstrations with the defaults of the task's demonstrator, in a file args.demos."""
    if args.task == "aloha":
        import demo_aloha

        return demo_aloha.run(demo_aloha.Args(out=args.demos, workers=args.workers))
    import demo_libero

    suite = shared.suite_of(args.task)
    own = dict(suite=suite, task_ids=shared.task_ids(args.task))
    butter = dict(num_demos=400, short=(4.1, 4.2))  # results/libero_bases.md: found by trials
    own |= butter if args.task == "libero_90_task56" else dict(num_demos=100, num_brief=300, num_held=200)
    demo_libero.run(demo_libero.Args(out=args.demos, workers=args.workers, **own))


def check(args):
    """Fill in what depends on the task. Stop with one sentence at a flag that cannot be."""
    known = dict(aloha=(9, 40, 10000, 10, 200), libero_90_task56=(5, 16, 9000, 10, 50))
    names = "knots", "chunk_steps", "steps", "first", "eval_episodes"
    shared.fill_in(args, **dict(zip(names, known.get(args.task, (5, 16, 24000, 3, 20)))))
    shared.fill_in(args, demos=Path(f"demos/{args.task}.npz"), out=Path(f"weights/{args.task}.safetensors"))
    shared.check_limits(args, "chunk_steps steps first batch workers", 1)
    shared.check_limits(args, "seed", 0)
    shared.check_limits(args, "knots", 2)
    shared.check_limits(args, "latent_dim", 1, args.knots * (14 if args.task == "aloha" else 7))
    if args.chunk_steps % (args.knots - 1):
        stop(f"--knots is {args.knots}; knots - 1 must divide --chunk-steps, which is {args.chunk_steps}")
    shared.check_files(args)
    shared.check_limits(args, "eval_episodes", 0, len(load_suite(shared.suite_of(args.task)).starts))


if __name__ == "__main__":
    args = parse_args(Args, __doc__)
    own_demos = args.demos is not None
    check(args)
    if not args.demos.exists():
        make_demos(args)
    demos, name = load_demos(args.demos, args.task), shared.suite_of(args.task)
    if demos.task_ids is not None and not own_demos:
        have, needed = ",".join(map(str, demos.task_ids)), shared.task_ids(args.task)
        if have != needed:
            have = f"{args.demos} has the tasks {have}, and this base is cloned on {needed}"
            stop(f"--demos: {have}; remove it, and it is made anew, or name it with --demos to clone from it")
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.workers)  # the demonstrators ask for one thread, for their own processes
    start = time.time()
    sizes = {k: getattr(args, k) for k in ("task", "latent_dim", "chunk_steps", "knots")} | NETWORK
    sizes |= dict(state_dim=demos.observations.shape[1], action_dim=demos.actions.shape[1])
    sines = {} if args.task == "aloha" else SINES
    header = dict(sizes, **sines, normalisation=FORMULA, demonstrations=demos.settings)
    if demos.task_ids is not None:
        header["task_ids"] = demos.task_ids
    base = FlowBase(header)
    base.device = torch.device("cpu")
    # a chunk during which the arm is pushed holds reactions to what nobody could foresee
    pushes_before = torch.cat([torch.zeros(1, dtype=torch.long), demos.pushed.long().cumsum(0)])
    end = torch.minimum(torch.arange(len(demos.last)) + args.chunk_steps, demos.last + 1)
    starts = torch.nonzero(pushes_before[end] == pushes_before[:-1]).flatten()
    whitened, header["explained_variance"] = fit(base, demos, starts, args)
    first = [starts[demos.behaviours[starts] == k] for k in (0, 1)]  # the second twice: paired_noise
    starts = torch.cat([starts, first[0].repeat(args.first - 1), first[1].repeat(2 * args.first - 1)])
    training = dict(seed=args.seed, steps=args.steps, batch=args.batch, lr=LR, ema=EMA)
    loss = round(clone(base, demos, starts, whitened, args), 4)
    header["training"] = dict(training, state_noise=STATE_NOISE, loss=loss)
    base.eval()
    kept = 100 * header["explained_variance"]
    print(f"{kept:.2f} % of the chunks' variance kept; loss {loss}, {time.time() - start:.0f} s")
    command = " ".join(["python tools/clone_base.py", *sys.argv[1:]])
    header["commands"] = [demos.settings["command"], command]
    if args.eval_episodes:
        task_ids = ",".join(map(str, demos.task_ids)) if demos.task_ids else None
        header["success"] = measure(base, load_suite(name, task_ids), args)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    base.save(args.out)
    print(f"wrote {args.out}")
