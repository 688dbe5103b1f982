"""A control: more behaviour cloning. The flow actor, fitted to its successes (reward-weighted flow matching).

    python tools/train_cloning.py --seed 1
    python tools/train_cloning.py --task libero_90_task56 --seed 1

Same frozen base, environments and evaluation as the train scripts; no critic, no ratio, no advantage. After
every rollout the actor takes gradient steps (32 an iteration) of the plain CFM loss on the decisions of
episodes that succeeded: the mean of ∇ℓ_cfm(x | s; θ) over those, that is Eq. 4 with a weight of 1 for success
and 0 for failure. The learning rate falls to 0, as FPO's. It writes args.json, metrics.csv, eval.csv,
table.csv and last.pt. An interrupted run starts anew.
"""

from collections import deque
from dataclasses import dataclass

import baseline  # first: it makes the folder above known
import numpy as np
import torch
from shared import check_limits

from fpo_actor import FlowActor, draw_flow_noise
from support.ranks import CPUS
from support.run_files import mean, parse_args, stop


@dataclass
class Args(baseline.Args):
    rollout_decisions: int = 10  # latent chunks an environment and iteration
    window: int = 2000  # decisions of successful episodes that are kept, the newest
    updates: int = 32  # gradient steps an iteration
    minibatch_size: int = 160  # samples of one gradient step
    actor_lr: float = 3e-4  # learning rate (Adam); it falls linearly to 0 over the run
    flow_steps: int = 8  # steps in which the actor's flow is integrated
    num_draws: int = 16  # N, draws of (u, ε) behind every CFM loss


if __name__ == "__main__":
    args = parse_args(Args, __doc__)
    check_limits(args, "rollout_decisions window updates flow_steps num_draws", 1)
    run = baseline.Baseline(args, "cloning", ["losses/cloning"])
    base, device = run.base, run.device
    actor = FlowActor(base.state_dim, base.latent_dim).to(device)
    optimizer = torch.optim.Adam(actor.parameters(), args.actor_lr)
    generator = torch.Generator(device).manual_seed(args.seed)
    pending = [[] for _ in range(args.num_envs)]  # (s, x) of the episodes under way
    good = deque(maxlen=args.window)  # (s, x) of those that succeeded

    def sample(s, noise):
        return actor.sample(s, args.flow_steps, noise=noise)

    with run.going():
        s, context = base.encode(run.envs.observations)
        while not run.last:
            optimizer.param_groups[0]["lr"] = args.actor_lr * max(
                0.0, 1 - run.env_steps / args.total_env_steps
            )
            for _ in range(args.rollout_decisions):
                x = actor.sample(s, args.flow_steps, generator)
                step = run.step(context, x)
                for i in range(args.num_envs):
                    pending[i].append((s[i], x[i]))
                    if step["terminated"][i] or step["truncated"][i]:
                        good.extend(pending[i] if step["success"][i] else [])
                        pending[i] = []
                s, context = base.encode(run.envs.observations)

            torch.set_num_threads(min(CPUS, 4))
            losses = []
            if good:
                s_good, x_good = map(torch.stack, zip(*good))
            for _ in range(args.updates if good else 0):
                i = torch.randint(len(good), (args.minibatch_size,), generator=generator, device=device)
                u, eps = draw_flow_noise(len(i), args.num_draws, base.latent_dim, generator, device)
                loss = actor.cfm_loss(x_good[i], s_good[i], u, eps)[0].mean()
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(actor.parameters(), 1.0)
                optimizer.step()
                losses.append(loss.item())
            torch.set_num_threads(1)
            if losses and not np.isfinite(losses[-1]):
                stop("a loss became NaN or infinite; try a lower --actor-lr", code=1)
            row = {"losses/cloning": mean(losses)}
            run.log(row, sample, dict(actor=actor))
