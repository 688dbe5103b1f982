"""A baseline: soft actor-critic in the same latent space, as DSRL (arXiv 2506.15799).

    python tools/train_sac.py --task aloha --seed 1                  # Table II, "without CFM ratio proxy"
    python tools/train_sac.py --task libero_90_task56 --seed 1

Same frozen base, environments, critics, rewards and evaluation as FPO. The actor is a tanh-Gaussian that
starts close to N(0, I); its temperature follows a target entropy. Transitions are kept and replayed; nothing
is on-policy. It writes args.json, metrics.csv, eval.csv, table.csv, last.pt. An interrupted run starts anew.
"""

import copy
import math
from dataclasses import dataclass

import baseline  # first: it makes the folder above known
import numpy as np
import torch
from shared import check_limits
from torch import nn

from fpo_critic import QEnsemble, critic_loss, polyak_update, td_target
from support.ranks import CPUS
from support.run_files import parse_args, stop

LOSSES = ("losses/actor", "losses/critic", "sac/entropy", "critic/q_mean")  # columns of metrics.csv


@dataclass
class Args(baseline.Args):
    warmup_decisions: int = 1000  # first decisions with latents from N(0, I), before any update
    updates: float = 1.0  # gradient steps a decision
    minibatch_size: int = 256  # transitions of one gradient step
    actor_lr: float = 3e-4  # learning rate of the actor and of the temperature (Adam)
    anneal_lr: bool = False  # let the actor's learning rate fall linearly to 0 over the run, as FPO's does
    critic_lr: float = 1e-3  # learning rate of the critics (Adam)
    target_entropy: float = 0.7
    """entropy that the temperature aims at, nats a latent dimension; N(0, 1) has 1.42"""
    temperature: float = 0.001
    """first temperature; at 0.01 the entropy swells for the first 50 thousand steps"""
    backup_entropy: bool = False  # entropy in the TD target: success ends it, failing would pay
    bound: float = 3.0  # latents lie within ± this; FPO's have no bound
    num_critics: int = 5  # M, members of the ensemble
    tau: float = 0.05  # Polyak step of the target critics
    gamma: float = 0.999  # γ of Eq. 1, an environment step


class TanhGaussianActor(nn.Module):
    """x = b tanh(z / b), z ~ N(μ(s), σ(s)²); μ = 0, σ = 1 at first, of which b = 3 leaves 0.91."""

    def __init__(self, state_dim, latent_dim, bound, hidden=256):
        super().__init__()
        self.bound = bound
        first = nn.Linear(state_dim, hidden), nn.LayerNorm(hidden), nn.SiLU()
        second = nn.Linear(hidden, hidden), nn.LayerNorm(hidden), nn.SiLU()
        self.net = nn.Sequential(*first, *second, nn.Linear(hidden, 2 * latent_dim))
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    def mode(self, s):
        """The most likely z, squashed: b tanh(μ(s) / b). s: (B, S) -> x: (B, D)."""
        return self.bound * torch.tanh(self.net(s).chunk(2, -1)[0] / self.bound)

    def forward(self, s, noise):
        """A sample, reparametrised. s: (B, S), noise: (B, D) from N(0, I) -> x (B, D), log π(x | s) (B,)."""
        mean, log_std = self.net(s).chunk(2, -1)
        log_std = log_std.clamp(-5, 1)
        z = mean + log_std.exp() * noise
        log_density = -0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi)
        squashed = torch.tanh(z / self.bound)
        return self.bound * squashed, (log_density - torch.log(1 - squashed**2 + 1e-6)).sum(-1)


if __name__ == "__main__":
    args = parse_args(Args, __doc__)
    check_limits(args, "num_critics", 1)
    check_limits(args, "warmup_decisions", 0)
    check_limits(args, "critic_lr temperature bound", 1e-9)
    check_limits(args, "tau gamma", 1e-9, 1)
    check_limits(args, "target_entropy", -10, 1.41)
    if args.target_entropy >= (most := math.log(2 * args.bound)):
        within = f"within --bound {args.bound} an entropy stays below log(2 · {args.bound}) = {most:.2f}"
        stop(f"--target-entropy is {args.target_entropy}, but {within}; lower the one or raise the other")
    run = baseline.Baseline(args, "sac", [*LOSSES, "sac/temperature"])
    base, device, S, D, E = run.base, run.device, run.base.state_dim, run.base.latent_dim, args.num_envs
    actor = TanhGaussianActor(S, D, args.bound).to(device)
    critic = QEnsemble(S, D, args.num_critics).to(device)
    target = copy.deepcopy(critic)
    log_alpha = torch.tensor(math.log(args.temperature), device=device, requires_grad=True)
    actor_optimizer = torch.optim.Adam(actor.parameters(), args.actor_lr)
    critic_optimizer = torch.optim.Adam(critic.parameters(), args.critic_lr)
    alpha_optimizer = torch.optim.Adam([log_alpha], args.actor_lr)
    generator = torch.Generator(device).manual_seed(args.seed)
    replay, decisions, owed, infos = {}, 0, 0.0, []

    def noise(s):
        return torch.randn(len(s), D, generator=generator, device=device)

    def descend(optimizer, loss):
        optimizer.zero_grad()
        loss.backward(inputs=optimizer.param_groups[0]["params"])  # not the critics' for the actor's loss
        optimizer.step()

    with run.going():
        s, context = base.encode(run.envs.observations)
        while not run.last:
            if args.anneal_lr:
                left = max(0.0, 1 - run.env_steps / args.total_env_steps)
                actor_optimizer.param_groups[0]["lr"] = args.actor_lr * left
            with torch.no_grad():
                x = noise(s) if decisions < args.warmup_decisions else actor(s, noise(s))[0]
            step = run.step(context, x)
            discount = args.gamma ** step["num_steps"]  # and the reward of a decision as in the train scripts
            r = step["success"] * args.gamma ** (step["num_steps"] - 1.0)
            row = dict(r=r, discount=discount, terminated=step["terminated"])
            row = {k: torch.as_tensor(v, dtype=torch.float32, device=device) for k, v in row.items()}
            row.update(s=s, x=x, s_next=base.encode(step["last_observation"])[0])
            # everything ever seen is replayed: 20 thousand decisions are a few MB
            replay = {k: torch.cat([replay[k], v]) for k, v in row.items()} if replay else row
            decisions += E
            s, context = base.encode(run.envs.observations)

            torch.set_num_threads(min(CPUS, 4))
            owed += args.updates * E if decisions > args.warmup_decisions else 0
            while owed >= 1:
                owed -= 1
                i = torch.randint(decisions, (args.minibatch_size,), generator=generator, device=device)
                b = {key: values[i] for key, values in replay.items()}
                alpha = log_alpha.exp().detach()
                with torch.no_grad():
                    x_next, log_next = actor(b["s_next"], noise(b["s_next"]))
                    y = td_target(target, b["r"], b["discount"], b["terminated"], b["s_next"], x_next)
                    if args.backup_entropy:
                        y = y - b["discount"] * (1 - b["terminated"]) * alpha * log_next
                loss_critic = critic_loss(critic, b["s"], b["x"], y)
                descend(critic_optimizer, loss_critic)
                polyak_update(target, critic, args.tau)
                x_new, log_new = actor(b["s"], noise(b["s"]))
                q = critic(b["s"], x_new).min(0).values
                loss_actor = (alpha * log_new - q).mean()
                descend(actor_optimizer, loss_actor)
                descend(alpha_optimizer, -(log_alpha * (log_new.detach() + args.target_entropy * D)).mean())
                parts = loss_actor, loss_critic / args.num_critics, -log_new.mean() / D, q.mean()
                infos.append([part.item() for part in parts])
            torch.set_num_threads(1)
            if infos and not np.isfinite(infos[-1]).all():
                stop("a loss became NaN or infinite; try a lower --actor-lr or --critic-lr", code=1)
            if run.due or decisions % (10 * E) == 0:
                row = dict(zip(LOSSES, np.mean(infos, 0))) if infos else {}
                row["sac/temperature"], infos = log_alpha.exp().item(), []
                run.log(row, lambda s, noise: actor(s, noise)[0], dict(actor=actor, critic=critic))
        # without the noise that the target entropy keeps up
        run.play("tuned mean", lambda s, noise: actor.mode(s))
