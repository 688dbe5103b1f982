"""A control: more behaviour cloning. The flow actor, fitted to its successes (reward-weighted flow matching).

    python tools/train_cloning.py --seed 1
    python tools/train_cloning.py --task libero_90_task56 --seed 1

Same frozen base, environments and evaluation as the train scripts; no critic, no ratio, no advantage. After
every rollout the actor takes gradient steps (32 an iteration) of the plain CFM loss on the decisions of
episodes that succeeded: the mean of ∇ℓ_cfm(x | s; θ) over those, that is Eq. 4 with a weight of 1 for success
and 0 for failure. The learning rate falls to 0, as FPO's. It writes args.json, metrics.csv, eval.csv,
table.csv and last.pt. An interrupted run starts anew.
"""

import time
from collections import deque
from dataclasses import dataclass
from typing import Literal

import shared  # first: it makes the folder above known
import numpy as np
import torch
from shared import check_limits

from envs.episodes import TrainingEnvs
from envs.workers import Workers
from evaluate import evaluate, latents_of, print_result
from fpo_actor import FlowActor, draw_flow_noise
from support.ranks import CPUS, SIMULATORS
from support.flags import parse_args, stop
from support.logs import mean, steps_bar


@dataclass
class Args:
    task: shared.Task = "aloha"  # the task, or the suite of tasks, to train on
    seed: int = 1  # of the networks, every draw and the training episodes
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where the networks run; auto is CUDA if there is one
    total_env_steps: int | None = None  # control steps; of one task of LIBERO 100 000, else 300 000
    num_envs: int | None = None  # parallel environments; 32, or a few more for several tasks
    num_workers: int = SIMULATORS  # simulator processes; the results do not depend on it
    eval_every: int | None = None  # control steps between evaluations; as the train scripts if left out
    eval_episodes: int | None = None  # a task, at start and end, half of it between; 200, for LIBERO 50
    run_name: str | None = None  # folder below runs/; cloning_<task>__seed<seed>__<time> if left out
    rollout_decisions: int = 10  # latent chunks an environment and iteration
    window: int = 2000  # decisions of successful episodes that are kept, the newest
    updates: int = 32  # gradient steps an iteration
    minibatch_size: int = 160  # samples of one gradient step
    actor_lr: float = 1e-3  # learning rate (Adam); it falls linearly to 0 over the run
    flow_steps: int = 8  # steps in which the actor's flow is integrated
    num_draws: int = 16  # N, draws of (u, ε) behind every CFM loss


if __name__ == "__main__":
    args = parse_args(Args, __doc__)
    check_limits(args, "rollout_decisions window updates flow_steps num_draws", 1)
    suite, base = shared.start_baseline(args)

    # ---- frozen base, actor, the decisions that it learns from ----
    device = base.device
    torch.manual_seed(args.seed)
    actor = FlowActor(base.state_dim, base.latent_dim).to(device)
    optimizer = torch.optim.Adam(actor.parameters(), args.actor_lr)
    generator = torch.Generator(device).manual_seed(args.seed)
    pending = [[] for _ in range(args.num_envs)]  # (s, x) of the episodes under way
    good = deque(maxlen=args.window)  # (s, x) of those that succeeded
    env_steps, recent = 0, deque(maxlen=100)  # recent: success of the last training episodes
    policies, kind = latents_of(actor, args.flow_steps), f"cloning_{args.task}"

    folder, metrics, episodes = shared.start_files(args, kind, ["losses/cloning"])
    with shared.clean_end(), Workers(suite.build, suite.tasks, args.num_workers) as workers:
        whole = base, workers, suite.tasks, suite.starts[: args.eval_episodes], suite.limit, episodes
        for policy in ("base", "zero latents"):
            evaluate(policy, policies[policy], *whole)
        envs = TrainingEnvs(workers, suite.tasks, args.num_envs, suite.draw_start, suite.limit, args.seed)
        bar = steps_bar(args.total_env_steps)
        s, context = base.encode(envs.observations)

        while env_steps < args.total_env_steps:
            steps_before, latents, losses, clock = env_steps, [], [], time.perf_counter()
            to_go = max(0.0, 1 - env_steps / args.total_env_steps)
            optimizer.param_groups[0]["lr"] = args.actor_lr * to_go

            # ---- rollout ----
            for _ in range(args.rollout_decisions):
                x = actor.sample(s, args.flow_steps, generator)  # (E, D)
                latents.append(x)
                step = envs.step(base.decode(context, x).cpu().numpy())
                ended = step["terminated"] | step["truncated"]
                recent.extend(step["success"][ended])
                env_steps += int(step["num_steps"].sum())
                bar.update(int(step["num_steps"].sum()))
                for i in range(args.num_envs):
                    pending[i].append((s[i], x[i]))
                    if ended[i]:
                        good.extend(pending[i] if step["success"][i] else [])
                        pending[i] = []
                s, context = base.encode(envs.observations)

            # ---- update ----
            torch.set_num_threads(min(CPUS, 4))
            if good:
                s_good, x_good = map(torch.stack, zip(*good))
            for _ in range(args.updates if good else 0):
                i = torch.randint(len(good), (args.minibatch_size,), generator=generator, device=device)
                u, eps = draw_flow_noise(len(i), args.num_draws, base.latent_dim, generator, device)
                loss = actor.cfm_loss(x_good[i], s_good[i], u, eps).mean()
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(actor.parameters(), 1.0)
                optimizer.step()
                losses.append(loss.item())
            torch.set_num_threads(1)
            if losses and not np.isfinite(losses[-1]):
                stop("a loss became NaN or infinite; try a lower --actor-lr", code=1)

            # ---- log, evaluate, save ----
            speed = (env_steps - steps_before) / (time.perf_counter() - clock)
            row = shared.charts(env_steps, recent, speed, torch.cat(latents))
            row["losses/cloning"] = mean(losses)
            bar.set_postfix(success=mean(recent), refresh=False)
            last = env_steps >= args.total_env_steps
            if last or env_steps // args.eval_every > steps_before // args.eval_every:
                checkpoint = dict(actor=actor.state_dict(), task=kind, env_steps=env_steps)
                where = policies["tuned"], base, workers, suite, args, episodes, folder
                row["eval/success"] = shared.evaluate_and_save(*where, checkpoint, last)
            metrics.write(row)
    print_result(folder, suite.names)
    print(f"{env_steps:,} environment steps, files in {folder}")
