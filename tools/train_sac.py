"""A baseline: soft actor-critic in the same latent space, in the manner of DSRL (arXiv 2506.15799). Table II, "without the CFM ratio".

    python tools/train_sac.py --task aloha --seed 1
    python tools/train_sac.py --task libero_90_task56 --seed 1

Same frozen base, environments, critics, rewards and evaluation states as FPO. The actor is a tanh-Gaussian that starts close to N(0, I);
its temperature follows a target entropy. Transitions are kept and replayed; nothing is on-policy. It writes args.json, metrics.csv,
eval.csv and last.pt, as the train scripts do. A run that was interrupted starts anew.
"""

import copy
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
from torch import nn
from tqdm import tqdm

from base_flow import FlowBase
from fpo_critic import QEnsemble, critic_loss, polyak_update, td_target
from ranks import CPUS
from run_files import CsvLog, compare, evaluation_columns, new_run_folder, parse_args, rate, save_checkpoint, stop, write_args


@dataclass
class Args:
    task: Literal["aloha", "libero_90_task56"] = "aloha"
    """what to train on"""
    seed: int = 1
    """seed of the actor, the critics, every draw and the training episodes"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where the networks run; auto takes CUDA where there is one"""
    total_env_steps: int | None = None
    """control steps of training, evaluation not counted; 800 000 for aloha, 250 000 for LIBERO if left out"""
    num_envs: int = 32
    """parallel environments"""
    num_workers: int = min(CPUS, 16)
    """simulator processes; the results do not depend on it"""
    warmup_decisions: int = 1000
    """first decisions with latents from N(0, I), before any update"""
    updates: float = 1.0
    """gradient steps a decision"""
    minibatch_size: int = 256
    """transitions of one gradient step"""
    actor_lr: float = 3e-4
    """learning rate of the actor and of the temperature (Adam)"""
    anneal_lr: bool = False
    """let the actor's learning rate fall linearly to 0 over the run, as FPO's does"""
    critic_lr: float = 1e-3
    """learning rate of the critics (Adam)"""
    target_entropy: float = 0.7
    """entropy that the temperature aims at, nats a latent dimension; N(0, 1) has 1.42"""
    temperature: float = 0.001
    """first temperature; at 0.01 the entropy swells for the first 50 thousand steps"""
    backup_entropy: bool = False
    """count the entropy of later decisions in the TD target too; success ends an episode and with it that bonus, so that failing would pay"""
    bound: float = 3.0
    """latents lie within ± this; FPO's have no bound"""
    num_critics: int = 5
    """M, members of the ensemble"""
    tau: float = 0.05
    """Polyak step of the target critics"""
    gamma: float = 0.999
    """γ of Eq. 1, an environment step"""
    eval_every: int | None = None
    """control steps between evaluations; 200 000 for aloha, 50 000 for LIBERO if left out"""
    eval_episodes: int | None = None
    """episodes of the first and the last evaluation, half of them between; 200 for aloha, 50 for LIBERO if left out"""
    run_name: str | None = None
    """folder below runs/; sac_<task>__seed<seed>__<time> if left out"""


class TanhGaussianActor(nn.Module):
    """x = b tanh(z / b), z ~ N(μ(s), σ(s)²); μ = 0, σ = 1 at the start, where b = 3 leaves 0.91 and b = 6 0.97 of it. s: (B, S) -> x: (B, D)."""

    def __init__(self, state_dim, latent_dim, bound, hidden=256):
        super().__init__()
        self.bound = bound
        self.net = nn.Sequential(nn.Linear(state_dim, hidden), nn.LayerNorm(hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.LayerNorm(hidden),
                                 nn.SiLU(), nn.Linear(hidden, 2 * latent_dim))  # fmt: skip
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    def mode(self, s):
        """The most likely z, squashed: b tanh(μ(s) / b)."""
        return self.bound * torch.tanh(self.net(s).chunk(2, -1)[0] / self.bound)

    def forward(self, s, generator=None):
        """A sample by reparametrisation, and log π(x | s) (B,)."""
        mean, log_std = self.net(s).chunk(2, -1)
        log_std = log_std.clamp(-5, 1)
        noise = torch.randn(mean.shape, generator=generator, device=mean.device)
        z = mean + log_std.exp() * noise
        log_density = -0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi)
        squashed = torch.tanh(z / self.bound)
        return self.bound * squashed, (log_density - torch.log(1 - squashed**2 + 1e-6)).sum(-1)


if __name__ == "__main__":
    args = parse_args(Args, __doc__)
    aloha = args.task == "aloha"
    for name, for_aloha, for_libero in (("total_env_steps", 800_000, 250_000), ("eval_every", 200_000, 50_000), ("eval_episodes", 200, 50)):
        if getattr(args, name) is None:
            setattr(args, name, for_aloha if aloha else for_libero)
    for name in ("total_env_steps", "num_envs", "num_workers", "updates", "minibatch_size", "actor_lr", "critic_lr", "temperature", "bound", "gamma", "num_critics",
                 "eval_every", "eval_episodes"):  # fmt: skip
        if not 0 < getattr(args, name) < math.inf:
            stop(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be positive and finite")
    for name, low, high in (("tau", 0, 1), ("gamma", 0, 1), ("seed", 0, 2**32), ("warmup_decisions", 0, 10**9), ("target_entropy", -10, 1.41)):
        if not low <= getattr(args, name) <= high:
            stop(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must lie between {low} and {high}")
    if not aloha and args.eval_episodes > 50:
        stop(f"--eval-episodes is {args.eval_episodes}; a task has 50 official initial states, give at most that")
    if args.target_entropy >= math.log(2 * args.bound):
        stop(f"--target-entropy is {args.target_entropy}, but within --bound {args.bound} an entropy stays below log(2 · {args.bound}) = "
             f"{math.log(2 * args.bound):.2f}; lower the one or raise the other")  # fmt: skip
    if not aloha:
        from env_libero import libero_problem

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
    actor = TanhGaussianActor(S, D, args.bound).to(device)
    critic = QEnsemble(S, D, args.num_critics).to(device)
    target = copy.deepcopy(critic)
    log_alpha = torch.tensor(math.log(args.temperature), device=device, requires_grad=True)
    actor_optimizer = torch.optim.Adam(actor.parameters(), args.actor_lr)
    critic_optimizer = torch.optim.Adam(critic.parameters(), args.critic_lr)
    alpha_optimizer = torch.optim.Adam([log_alpha], args.actor_lr)
    generator = torch.Generator(device).manual_seed(args.seed)

    folder = new_run_folder(args.run_name, f"sac_{args.task}__seed{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}")
    write_args(folder, args)
    METRICS = ("charts/env_steps charts/success charts/SPS eval/success eval/success_low eval/success_high eval/length eval/success_length eval/episodes "
               "losses/actor losses/critic sac/temperature sac/entropy critic/q_mean latent/norm latent/std").split()  # fmt: skip
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
            if policy == "tuned mean":  # without the noise that the target entropy keeps up; FPO samples, and so does "tuned"
                x = actor.mode(s)
            else:
                x = actor(s, noise)[0] if policy == "tuned" else torch.randn(len(s), D, generator=noise, device=device) * (policy == "base")
            return base.decode(context, x).cpu().numpy()

        if aloha:
            result = play_episodes(workers, evaluation_poses(n), act)
        else:
            result = play_episodes(workers, [56] * n, [official(i) for i in range(n)], act)
        for i in range(n):
            row = {key: int(result[key][i]) for key in ("success", "length", "diverged") + ("strict",) * aloha}
            episode_log.write(dict(row, policy=policy, env_steps=env_steps * policy.startswith("tuned"), episode=i))
        return result

    try:
        before = evaluate("base", args.eval_episodes)
        print(f"base         {rate(before['success'].sum(), args.eval_episodes)}", flush=True)
        print(f"zero latents {rate(evaluate('zero latents', args.eval_episodes)['success'].sum(), args.eval_episodes)}", flush=True)
        envs = TrainingEnvs(workers, *([] if aloha else [[56]]), args.num_envs, args.seed)
        replay = {}  # everything ever seen: 20 thousand decisions are a few MB
        size, decisions, owed = 0, 0, 0.0
        bar = tqdm(total=args.total_env_steps, unit="step", unit_scale=True, mininterval=mininterval, smoothing=0.1)
        clock, steps_then, infos, latents = time.perf_counter(), 0, [], []
        s, context = base.encode(envs.observations)
        while env_steps < args.total_env_steps:
            steps_before = env_steps
            with torch.no_grad():
                x = torch.randn(args.num_envs, D, generator=generator, device=device) if decisions < args.warmup_decisions else actor(s, generator)[0]
            latents.append(x)
            step = envs.step(base.decode(context, x).cpu().numpy())
            r = step["success"] * args.gamma ** (step["num_steps"] - 1.0)  # D8
            s_next, _ = base.encode(step["last_observation"])
            column = lambda values: torch.as_tensor(values, dtype=torch.float32, device=device)
            rows = dict(s=s, x=x, r=column(r), discount=column(args.gamma ** step["num_steps"]), terminated=column(step["terminated"]), s_next=s_next)
            for key, values in rows.items():
                if size + args.num_envs > len(replay.get(key, ())):  # full: twice the room
                    grown = torch.zeros(2 * (size + args.num_envs), *values.shape[1:], device=device)
                    grown[:size] = replay[key][:size] if size else 0
                    replay[key] = grown
                replay[key][size : size + args.num_envs] = values
            size, decisions = size + args.num_envs, decisions + args.num_envs
            s, context = base.encode(envs.observations)
            env_steps += int(step["num_steps"].sum())
            bar.update(env_steps - steps_before)
            recent.extend(float(step["success"][i]) for i in np.flatnonzero(step["terminated"] | step["truncated"]))

            torch.set_num_threads(min(CPUS, 4))
            if args.anneal_lr:
                actor_optimizer.param_groups[0]["lr"] = args.actor_lr * max(0.0, 1 - steps_before / args.total_env_steps)
            owed += args.updates * args.num_envs if decisions > args.warmup_decisions else 0
            while owed >= 1:
                owed -= 1
                i = torch.randint(size, (args.minibatch_size,), generator=generator, device=device)
                b = {key: values[i] for key, values in replay.items()}
                alpha = log_alpha.exp().detach()
                with torch.no_grad():
                    x_next, log_next = actor(b["s_next"], generator)
                    y = td_target(target, b["r"], b["discount"], b["terminated"], b["s_next"], x_next)
                    if args.backup_entropy:
                        y = y - b["discount"] * (1 - b["terminated"]) * alpha * log_next
                loss_critic = critic_loss(critic, b["s"], b["x"], y)
                critic_optimizer.zero_grad()
                loss_critic.backward()
                critic_optimizer.step()
                polyak_update(target, critic, args.tau)
                x_new, log_new = actor(b["s"], generator)
                q = critic(b["s"], x_new).min(0).values
                loss_actor = (alpha * log_new - q).mean()
                actor_optimizer.zero_grad()
                loss_actor.backward(inputs=list(actor.parameters()))  # the critics' own gradients are not wanted here
                actor_optimizer.step()
                loss_alpha = -(log_alpha * (log_new.detach() + args.target_entropy * D)).mean()
                alpha_optimizer.zero_grad()
                loss_alpha.backward()
                alpha_optimizer.step()
                infos.append((loss_actor.item(), loss_critic.item() / args.num_critics, -log_new.mean().item() / D, q.mean().item()))
            torch.set_num_threads(1)
            if infos and not math.isfinite(infos[-1][0] + infos[-1][1]):
                stop("a loss became NaN or infinite; try a lower --actor-lr or --critic-lr", code=1)

            last = env_steps >= args.total_env_steps
            due = last or env_steps // args.eval_every > steps_before // args.eval_every
            if due or decisions % (10 * args.num_envs) == 0:
                columns = np.mean(infos, 0) if infos else [""] * 4
                executed = torch.cat(latents)
                row = {"charts/env_steps": env_steps, "charts/success": float(np.mean(recent)) if recent else "", "losses/actor": columns[0],
                       "charts/SPS": (env_steps - steps_then) / (time.perf_counter() - clock), "losses/critic": columns[1], "sac/entropy": columns[2],
                       "critic/q_mean": columns[3], "sac/temperature": log_alpha.exp().item(), "latent/norm": executed.norm(dim=-1).mean().item(),
                       "latent/std": executed.std(0).mean().item()}  # fmt: skip
                bar.set_postfix(success=f"{np.mean(recent):.2f}" if recent else "-", refresh=False)
                clock, steps_then, infos, latents = time.perf_counter(), env_steps, [], []
                if due:
                    after = evaluate("tuned", args.eval_episodes if last else max(1, args.eval_episodes // 2))
                    row.update(evaluation_columns(after))
                    minutes = (time.perf_counter() - start) / 60
                    bar.write(f"{env_steps:9,d} steps  {minutes:5.1f} min  tuned {rate(after['success'].sum(), len(after['success']))}")
                    save_checkpoint(folder / "last.pt", dict(task=f"sac_{args.task}", actor=actor.state_dict(), critic=critic.state_dict(), env_steps=env_steps))
                metrics_log.write(row)
        print(f"\nSAC on {args.task}, seed {args.seed}, {env_steps:,} environment steps, {(time.perf_counter() - start) / 60:.1f} minutes, files in {folder}")
        compare(before, after)
        print(f"tuned, mean  {rate(evaluate('tuned mean', args.eval_episodes)['success'].sum(), args.eval_episodes)}", flush=True)
    except ChildProcessError as error:
        stop(str(error), code=1)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        workers.close()
