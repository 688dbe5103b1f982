"""A baseline that trains the base itself: PPO on the flow's Euler steps, to which noise is added.

    python tools/train_flow_noise.py --seed 1                            # ALOHA
    python tools/train_flow_noise.py --task libero_90_task56 --seed 1

As in ReinFlow (arXiv 2505.22094) and π_RL's Flow-Noise (arXiv 2510.25889) every step of the flow becomes a
Gaussian, w_{k+1} ~ N(w_k + v_θ(w_k, u_k | s) / K, σ_ψ(s, u_k)²), so that the likelihood of all K together is
known, and PPO's ratio with it. Trained are the base's own weights θ and the noise σ_ψ; the advantages are GAE
with a V(s). Same base to start from, environments, rewards and evaluation as FPO; evaluated without the added
noise. It writes args.json, metrics.csv, eval.csv, table.csv. An interrupted run starts anew.
"""

from dataclasses import dataclass
from typing import Literal

import shared  # first: it makes the folder above known
import torch
from torch import nn

from envs.workers import Workers
from fpo_critic import QEnsemble, gae
from support.ranks import CPUS, SIMULATORS
from support.flags import parse_args

LOSSES = ("losses/actor", "losses/critic", "losses/clip_fraction", "flow/noise")
GAE_LAMBDA, CRITIC_LR, WARMUP = 0.95, 1e-3, 2  # WARMUP: iterations in which V alone learns


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
    run_name: str | None = None  # folder below runs/; flow_noise_<task>__seed<seed>__<time> if left out
    rollout_decisions: int = 10  # T, decisions of every environment an iteration
    updates: int = 5  # epochs of PPO an iteration
    minibatch_size: int = 64  # decisions of one gradient step
    actor_lr: float = 3e-5  # learning rate of the base and of its noise (Adam), falling linearly to 0
    clip_eps: float = 0.01  # ε of PPO's clip; a ratio is that of K · D Gaussians together
    noise: tuple[float, float] = (0.02, 0.1)  # least and greatest σ of a step; the components' deviation is 1


class NoisyFlow(nn.Module):
    """The base's flow with noise in every step."""

    def __init__(self, base, noise):
        super().__init__()
        self.base, self.low, self.high = base, *noise
        self.sigma = nn.Sequential(
            nn.Linear(base.state_dim + 1, 64), nn.SiLU(), nn.Linear(64, base.latent_dim)
        )

    def step(self, w, k, s):
        """The next point's distribution. w: (B, D), k: (B,) steps done, s: (B, S) -> Normal of (B, D)."""
        u = k / self.base.flow_steps
        sigma = self.low + (self.high - self.low) * self.sigma(torch.cat([s, u[:, None]], -1)).sigmoid()
        return torch.distributions.Normal(w + self.base.velocity(w, u, s) / self.base.flow_steps, sigma)

    @torch.no_grad()
    def sample(self, w, s, generator):
        """All points of the flow from w: (B, D). -> (B, K + 1, D)"""
        points = [w]
        for k in range(self.base.flow_steps):
            law = self.step(points[-1], torch.full((len(w),), float(k), device=w.device), s)
            noise = torch.randn(w.shape, generator=generator, device=w.device)
            points.append(law.mean + law.stddev * noise)
        return torch.stack(points, 1)

    def log_density(self, points, s):
        """log of the density of all steps together. points: (B, K + 1, D), s: (B, S) -> (B,), mean σ"""
        B, K = len(points), self.base.flow_steps
        k = torch.arange(K, device=s.device).repeat(B).float()
        law = self.step(points[:, :-1].flatten(0, 1), k, s.repeat_interleave(K, 0))
        log_density = law.log_prob(points[:, 1:].flatten(0, 1))  # (B K, D)
        return log_density.view(B, -1).sum(1), law.stddev.mean()


if __name__ == "__main__":
    args = parse_args(Args, __doc__)
    shared.check_limits(args, "rollout_decisions", 1)
    shared.check_limits(args, "clip_eps noise", 1e-9)
    suite, base = shared.start_baseline(args)

    # ---- base, its noise, V ----
    device = base.device
    S, D, E = base.state_dim, base.latent_dim, args.num_envs
    policy = NoisyFlow(base.requires_grad_(True), args.noise).to(device)
    critic = QEnsemble(S, 0, 1).to(device)  # V(s): a Q without latents
    actor_adam = torch.optim.Adam(policy.parameters(), args.actor_lr)
    critic_adam = torch.optim.Adam(critic.parameters(), CRITIC_LR)
    generator, iteration = torch.Generator(device).manual_seed(args.seed), 0

    def value(s):
        return critic(s, s[:, :0])[0]

    with shared.clean_end(), Workers(suite.build, suite.tasks, args.num_workers) as workers:
        run = shared.Run(args, suite, base, workers, f"flow_noise_{args.task}", LOSSES)
        while run.to_go > 0:
            actor_adam.param_groups[0]["lr"] = args.actor_lr * run.to_go
            iteration, rows = iteration + 1, []

            # ---- rollout ----
            for _ in range(args.rollout_decisions):
                w = torch.randn(E, D, generator=generator, device=device)
                points = policy.sample(w, run.s, generator)  # (E, K + 1, D)
                with torch.no_grad():
                    log_density, _ = policy.log_density(points, run.s)
                    actions = base.actions(points[:, -1])
                rows.append(run.step(actions, s=run.s, points=points, log_density=log_density))
            rollout = {k: torch.stack([row[k] for row in rows]) for k in rows[0]}  # (T, E, …)

            # ---- GAE, then PPO ----
            torch.set_num_threads(min(CPUS, 4))
            with torch.no_grad():
                v, v_next = (value(rollout[k].flatten(0, 1)).view(-1, E) for k in ("s", "s_next"))
            of_gae = (rollout[k] for k in ("discount", "terminated", "ended"))
            adv = gae(rollout["r"], v, v_next, *of_gae, GAE_LAMBDA)
            flat = {k: rollout[k].flatten(0, 1) for k in ("s", "points", "log_density")}
            returns, adv, infos = (adv + v).flatten(), adv.flatten(), []
            adv = (adv - adv.mean()) / (adv.std() + 1e-3)
            for _ in range(args.updates):
                order = torch.randperm(len(adv), generator=generator, device=device)
                for i in order.split(args.minibatch_size):
                    loss_critic = (value(flat["s"][i]) - returns[i]).square().mean()
                    critic_adam.zero_grad()
                    loss_critic.backward()
                    critic_adam.step()
                    if iteration <= WARMUP:
                        continue
                    log_density, sigma = policy.log_density(flat["points"][i], flat["s"][i])
                    rho = (log_density - flat["log_density"][i]).exp()
                    clipped = rho.clamp(1 - args.clip_eps, 1 + args.clip_eps)
                    loss = -torch.min(rho * adv[i], clipped * adv[i]).mean()
                    actor_adam.zero_grad()
                    loss.backward()
                    torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
                    actor_adam.step()
                    cut = ((rho - 1).abs() > args.clip_eps).float().mean()
                    infos.append([x.item() for x in (loss, loss_critic, cut, sigma)])
            torch.set_num_threads(1)
            x = rollout["points"][:, :, 0].flatten(0, 1)
            run.log(x, infos, lambda s, noise: noise)
        run.print_result()
