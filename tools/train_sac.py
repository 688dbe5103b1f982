"""A baseline: soft actor-critic in the same latent space, as DSRL (arXiv 2506.15799).

    python tools/train_sac.py --task aloha --seed 1                  # Table II, "without CFM ratio proxy"
    python tools/train_sac.py --task libero_90_task56 --seed 1
    python tools/train_sac.py --task aloha --noise-aliased --seed 1  # DSRL-NA

Same frozen base, environments, critics, rewards and evaluation as FPO. The actor is a tanh-Gaussian that
starts close to N(0, I); its temperature follows a target entropy. Transitions are kept and replayed; nothing
is on-policy. Noise-aliased, critics of actions learn from the transitions, and those of latents, which the
actor follows, are fitted to them at latents from N(0, I), which the base turns into actions. It writes
args.json, metrics.csv, eval.csv, table.csv. An interrupted run starts anew.
"""

import copy
import math
from dataclasses import dataclass
from typing import Literal

import shared  # first: it makes the folder above known
import torch
from torch import nn

from envs.workers import Workers
from fpo_critic import QEnsemble, critic_loss, n_step, polyak_update, td_target
from support.ranks import CPUS, SIMULATORS
from support.flags import parse_args

BOUND = 3.0  # latents lie within ± this; FPO's have no bound
NUM_CRITICS, TAU = 5, 0.05  # as FPO's
LOSSES = ("losses/actor", "losses/critic", "sac/entropy", "critic/q_mean", "sac/temperature")


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
    run_name: str | None = None  # folder below runs/; sac_<task>__seed<seed>__<time> if left out
    warmup_decisions: int = 1000  # first decisions with latents from N(0, I), before any update
    updates: float = 1.0  # gradient steps a decision
    minibatch_size: int = 256  # transitions of one gradient step
    actor_lr: float = 3e-4  # learning rate of the actor and of the temperature (Adam)
    critic_lr: float = 1e-3  # learning rate of the critics (Adam)
    td_decisions: int = 10  # n, decisions whose rewards a target adds up, as FPO's
    target_entropy: float = 0.7
    """entropy that the temperature aims at, nats a latent dimension; N(0, 1) has 1.42"""
    temperature: float = 0.001
    """first temperature; at 0.01 the entropy swells for the first 50 thousand steps"""
    noise_aliased: bool = False  # critics of actions, to which those of latents are fitted


class TanhGaussianActor(nn.Module):
    """x = b tanh(z / b), z ~ N(μ(s), σ(s)²); μ = 0, σ = 1 at first, of which b = 3 leaves 0.91."""

    def __init__(self, state_dim, latent_dim, bound=BOUND, hidden=128):
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
    shared.check_limits(args, "td_decisions", 1)
    shared.check_limits(args, "warmup_decisions", 0)
    shared.check_limits(args, "critic_lr temperature", 1e-9)
    shared.check_limits(args, "target_entropy", -10, 1.41)
    suite, base = shared.start_baseline(args)

    # ---- frozen base, actor, critics, temperature α ----
    device = base.device
    S, D, E = base.state_dim, base.latent_dim, args.num_envs
    actor = TanhGaussianActor(S, D).to(device)
    critic = QEnsemble(S, D, NUM_CRITICS).to(device)
    knots = len(base.chunk_mean) - 1  # of a chunk; between them actions are interpolated
    scale = base.chunk_basis.norm(dim=0) + 1e-3  # the actions' deviation, for that of the components is 1
    learner = critic  # what Eq. 5 trains
    if args.noise_aliased:
        learner = QEnsemble(S, knots * base.action_dim, NUM_CRITICS).to(device)
    target = copy.deepcopy(learner)
    log_alpha = torch.tensor(math.log(args.temperature), device=device, requires_grad=True)
    actor_adam = torch.optim.Adam(actor.parameters(), args.actor_lr)
    critic_adam = torch.optim.Adam(critic.parameters(), args.critic_lr)
    learner_adam = torch.optim.Adam(learner.parameters(), args.critic_lr)
    alpha_adam = torch.optim.Adam([log_alpha], args.actor_lr)
    generator = torch.Generator(device).manual_seed(args.seed)
    replay, decisions, owed = {}, 0, 0.0  # owed: gradient steps
    latents, infos = [], []  # since the last row of metrics.csv

    def noise(s):
        return torch.randn(len(s), D, generator=generator, device=device)

    def taken(s, x):
        """What `learner` sees of latents x (B, D) at s (B, S), the base's context: them, or their actions at
        the knots with the demonstrations' mean and deviation taken out, (B, knots A)."""
        if not args.noise_aliased:
            return x
        actions = base.decode(s, x)[:, :: base.chunk_steps // knots]
        return ((actions - base.chunk_mean[:-1]) / scale[:-1]).flatten(1)

    def descend(adam, loss):
        adam.zero_grad()
        loss.backward(inputs=adam.param_groups[0]["params"])  # not the critics' for the actor's loss
        adam.step()

    kind = f"{'dsrl_na' if args.noise_aliased else 'sac'}_{args.task}"
    with shared.clean_end(), Workers(suite.build, suite.tasks, args.num_workers) as workers:
        run = shared.Run(args, suite, base, workers, kind, LOSSES)
        while run.to_go > 0:
            # ---- one decision in every environment ----
            s = run.s
            with torch.no_grad():
                x = noise(s) if decisions < args.warmup_decisions else actor(s, noise(s))[0]  # (E, D)
            latents.append(x)
            row = run.step(base.decode(run.context, x), s=s, a=taken(s, x))
            # everything ever seen is replayed: 20 thousand decisions are a few MB
            replay = {k: torch.cat([replay[k], v]) for k, v in row.items()} if replay else row
            decisions += E

            # ---- update ----
            torch.set_num_threads(min(CPUS, 4))
            owed += args.updates * E if decisions > args.warmup_decisions else 0
            R, G, end = n_step(replay["r"], replay["discount"], replay["ended"], E, args.td_decisions)
            while owed >= 1:
                owed -= 1
                i = torch.randint(decisions, (args.minibatch_size,), generator=generator, device=device)
                s_b, j = replay["s"][i], end[i]
                s_next, terminated = replay["s_next"][j], replay["terminated"][j]
                alpha = log_alpha.exp().detach()
                with torch.no_grad():  # without the entropy: success ends it, so that failing would pay
                    x_next, _ = actor(s_next, noise(s_next))
                    y = td_target(target, R[i], G[i], terminated, s_next, taken(s_next, x_next))
                loss_critic = critic_loss(learner, s_b, replay["a"][i], y)
                descend(learner_adam, loss_critic)
                polyak_update(target, learner, TAU)
                if args.noise_aliased:
                    w = noise(s_b)
                    y_w = learner(s_b, taken(s_b, w)).mean(0).detach()
                    descend(critic_adam, critic_loss(critic, s_b, w, y_w))
                x_new, log_new = actor(s_b, noise(s_b))
                q = critic(s_b, x_new).min(0).values
                loss_actor = (alpha * log_new - q).mean()
                descend(actor_adam, loss_actor)
                descend(alpha_adam, -(log_alpha * (log_new.detach() + args.target_entropy * D)).mean())
                parts = loss_actor, loss_critic / NUM_CRITICS, -log_new.mean() / D, q.mean(), alpha
                infos.append([part.item() for part in parts])
            torch.set_num_threads(1)
            if run.due or decisions % (10 * E) == 0:
                run.log(torch.cat(latents), infos, lambda s, noise: actor.mode(s))  # not the entropy's noise
                latents, infos = [], []
        run.print_result()
