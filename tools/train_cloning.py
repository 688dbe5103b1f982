"""A control: more behaviour cloning. The same flow actor, fitted to its own successful episodes (reward-weighted flow matching).

    python tools/train_cloning.py --seed 1
    python tools/train_cloning.py --task libero_90_task56 --seed 1

Same frozen base, environments and evaluation states as the train scripts; no critic, no ratio, no advantage. After every
rollout the actor takes gradient steps (32 an iteration, where FPO's actor takes 8) of the plain CFM loss on the decisions
of episodes that succeeded: the mean of ∇ℓ_cfm(x | s; θ) over those, that is Eq. 4 with a weight of 1 for success and 0
for failure. The learning rate falls to 0, as FPO's. It writes args.json, metrics.csv, eval.csv and last.pt, as the train
scripts do. A run that was interrupted starts anew.
"""

import math
import os
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
from tqdm import tqdm

from base_flow import FlowBase
from fpo_actor import FlowActor, draw_flow_noise
from ranks import CPUS
from run_files import CsvLog, compare, evaluation_columns, new_run_folder, parse_args, rate, save_checkpoint, stop, write_args


@dataclass
class Args:
    task: Literal["aloha", "libero_90_task56"] = "aloha"
    """what to train on"""
    seed: int = 1
    """seed of the actor, every draw and the training episodes"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where the networks run; auto takes CUDA where there is one"""
    total_env_steps: int | None = None
    """control steps of training, evaluation not counted; 800 000 for aloha, 250 000 for LIBERO if left out"""
    num_envs: int = 32
    """parallel environments"""
    num_workers: int = min(CPUS, 16)
    """simulator processes; the results do not depend on it"""
    rollout_decisions: int = 10
    """latent chunks an environment and iteration"""
    window: int = 2000
    """decisions of successful episodes that are kept, the newest"""
    updates: int = 32
    """gradient steps an iteration"""
    minibatch_size: int = 160
    """samples of one gradient step"""
    actor_lr: float = 3e-4
    """learning rate (Adam); it falls linearly to 0 over the run"""
    flow_steps: int = 8
    """steps in which the actor's flow is integrated"""
    num_draws: int = 16
    """N, draws of (u, ε) behind every CFM loss"""
    eval_every: int | None = None
    """control steps between evaluations; 200 000 for aloha, 50 000 for LIBERO if left out"""
    eval_episodes: int | None = None
    """episodes of the first and the last evaluation, half of them between; 200 for aloha, 50 for LIBERO if left out"""
    run_name: str | None = None
    """folder below runs/; cloning_<task>__seed<seed>__<time> if left out"""


if __name__ == "__main__":
    args = parse_args(Args, __doc__)
    aloha = args.task == "aloha"
    for name, default in dict(total_env_steps=(250_000, 800_000), eval_every=(50_000, 200_000), eval_episodes=(50, 200)).items():
        if getattr(args, name) is None:
            setattr(args, name, default[aloha])
    for name in ("total_env_steps", "num_envs", "num_workers", "rollout_decisions", "window", "updates", "minibatch_size", "actor_lr", "flow_steps",
                 "num_draws", "eval_every", "eval_episodes"):  # fmt: skip
        if not 0 < getattr(args, name) < math.inf:
            stop(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be positive and finite")
    if not 0 <= args.seed < 2**63:
        stop(f"--seed is {args.seed}; it must lie between 0 and 2**63")
    if not aloha:
        from env_libero import libero_problem

        if args.eval_episodes > 50:
            stop(f"--eval-episodes is {args.eval_episodes}; a task has 50 official initial states, give at most that")
        if problem := libero_problem():
            stop(problem)
    if args.device == "cuda" and not torch.cuda.is_available():
        stop("--device is cuda, but torch finds no CUDA device here; use --device cpu or --device auto")
    device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)  # more for the updates only: waiting threads of torch spin, and would take the workers' cores

    try:
        base = FlowBase.load(ROOT / "weights" / f"{args.task}.safetensors", device=device, task=args.task)
    except ValueError as error:
        stop(f"--task {args.task}: {error}")
    S, D = base.state_dim, base.latent_dim
    torch.manual_seed(args.seed)
    actor = FlowActor(S, D).to(device)
    optimizer = torch.optim.Adam(actor.parameters(), args.actor_lr)
    generator = torch.Generator(device).manual_seed(args.seed)

    folder = new_run_folder(args.run_name, f"cloning_{args.task}__seed{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}")
    write_args(folder, args)
    METRICS = ("charts/env_steps charts/success charts/SPS eval/success eval/success_low eval/success_high eval/length eval/success_length eval/episodes "
               "losses/cloning latent/norm latent/std").split()  # fmt: skip
    metrics_log = CsvLog(folder / "metrics.csv", METRICS)
    episode_log = CsvLog(folder / "eval.csv", "policy env_steps episode success strict length diverged".split())
    if aloha:
        from env_aloha import TrainingEnvs, Workers, evaluation_poses, play_episodes

        workers = Workers(args.num_workers)
    else:
        from env_libero import TrainingEnvs, Workers, official, play_episodes

        workers = Workers(args.num_workers, "libero_90", [56])
    mininterval = 0.5 if sys.stderr.isatty() else 30.0
    env_steps, recent, start = 0, deque(maxlen=100), time.perf_counter()

    @torch.no_grad()
    def evaluate(policy, n):
        """The same initial states and noise as in the train scripts."""
        noise = torch.Generator(device).manual_seed(0)

        def act(observations):
            s, context = base.encode(observations)
            x = actor.sample(s, args.flow_steps, noise) if policy == "tuned" else torch.randn(len(s), D, generator=noise, device=device) * (policy == "base")
            return base.decode(context, x).cpu().numpy()

        starts = [evaluation_poses(n)] if aloha else [[56] * n, [official(i) for i in range(n)]]
        result = play_episodes(workers, *starts, act)
        for i in range(n):
            row = {key: int(result[key][i]) for key in ("success", "length", "diverged") + ("strict",) * aloha}
            episode_log.write(dict(row, policy=policy, env_steps=env_steps * (policy == "tuned"), episode=i))
        return result

    try:
        before = evaluate("base", args.eval_episodes)
        print(f"base         {rate(before['success'].sum(), args.eval_episodes)}", flush=True)
        print(f"zero latents {rate(evaluate('zero latents', args.eval_episodes)['success'].sum(), args.eval_episodes)}", flush=True)
        envs = TrainingEnvs(workers, *([] if aloha else [[56]]), args.num_envs, args.seed)
        pending = [[] for _ in range(args.num_envs)]  # (s, x) of the episodes under way
        good = deque(maxlen=args.window)  # (s, x) of those that succeeded
        bar = tqdm(total=args.total_env_steps, unit="step", unit_scale=True, mininterval=mininterval, smoothing=0.1)
        s, context = base.encode(envs.observations)
        while env_steps < args.total_env_steps:
            clock, steps_before, latents = time.perf_counter(), env_steps, []
            for _ in range(args.rollout_decisions):
                x = actor.sample(s, args.flow_steps, generator)
                latents.append(x)
                step = envs.step(base.decode(context, x).cpu().numpy())
                for i in range(args.num_envs):
                    pending[i].append((s[i], x[i]))
                    if step["terminated"][i] or step["truncated"][i]:
                        good.extend(pending[i] if step["success"][i] else [])
                        recent.append(float(step["success"][i]))
                        pending[i] = []
                s, context = base.encode(envs.observations)
                env_steps += int(step["num_steps"].sum())
            bar.update(env_steps - steps_before)
            bar.set_postfix(success=f"{np.mean(recent):.2f}" if recent else "-", refresh=False)

            torch.set_num_threads(min(CPUS, 4))
            optimizer.param_groups[0]["lr"] = args.actor_lr * max(0.0, 1 - steps_before / args.total_env_steps)
            losses = []
            if good:
                s_good, x_good = map(torch.stack, zip(*good))
            for _ in range(args.updates if good else 0):
                i = torch.randint(len(good), (args.minibatch_size,), generator=generator, device=device)
                u, eps = draw_flow_noise(len(i), args.num_draws, D, generator, device)
                loss = actor.cfm_loss(x_good[i], s_good[i], u, eps)[0].mean()
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(actor.parameters(), 1.0)
                optimizer.step()
                losses.append(loss.item())
            torch.set_num_threads(1)
            if losses and not math.isfinite(losses[-1]):
                stop("a loss became NaN or infinite; try a lower --actor-lr", code=1)

            executed = torch.cat(latents)
            row = {"charts/env_steps": env_steps, "charts/success": float(np.mean(recent)) if recent else "",
                   "charts/SPS": (env_steps - steps_before) / (time.perf_counter() - clock), "losses/cloning": float(np.mean(losses)) if losses else "",
                   "latent/norm": executed.norm(dim=-1).mean().item(), "latent/std": executed.std(0).mean().item()}  # fmt: skip
            last = env_steps >= args.total_env_steps
            if last or env_steps // args.eval_every > steps_before // args.eval_every:
                after = evaluate("tuned", args.eval_episodes if last else max(1, args.eval_episodes // 2))
                row.update(evaluation_columns(after))
                minutes = (time.perf_counter() - start) / 60
                bar.write(f"{env_steps:9,d} steps  {minutes:5.1f} min  tuned {rate(after['success'].sum(), len(after['success']))}")
                save_checkpoint(folder / "last.pt", dict(task=f"cloning_{args.task}", actor=actor.state_dict(), env_steps=env_steps))
            metrics_log.write(row)
        print(f"\ncloning on {args.task}, seed {args.seed}, {env_steps:,} environment steps, {(time.perf_counter() - start) / 60:.1f} minutes, files in {folder}")
        compare(before, after)
    except ChildProcessError as error:
        stop(str(error), code=1)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        workers.close()
