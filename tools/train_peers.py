"""Peers: other likelihood-free updates of a flow actor, everything else as in FPO for π_0.

    python tools/train_peers.py --update fpo --seed 1       # FPO of McAllister et al., arXiv 2507.21053
    python tools/train_peers.py --update fpo++ --seed 1     # FPO++, arXiv 2602.02481
    python tools/train_peers.py --update nft --seed 1       # DiffusionNFT, arXiv 2509.16117
    python tools/train_peers.py --update cloning --seed 1   # a control

Same frozen base, environments, critics, evaluation and fresh latents with the critics' advantages A as the
train scripts with their default flags, but that A may be below -1. With ℓ_i the CFM loss of one draw of (u,
ε), and Δ_i = c (ℓ_i of θ_old - ℓ_i of θ), minimised are

    fpo      -min(ρ A, clip(ρ, 1 ± ε) A), ρ = exp(mean_i Δ_i): nothing standardised, no fit of own latents
    fpo++    for each draw, ρ_i = exp(Δ_i): the same where A ≥ 0, -ρ_i A + |A| (ρ_i - 1)² / 2ε where A < 0
    nft      r |v_θ - v|² + (1 - r) |2 v_old - v_θ - v|², v = x - ε, r = ½ + ½ clip(A, -1, 1)
    cloning  mean_i ℓ_i of the newest executed latents of episodes that succeeded: no critic, ratio, advantage

It writes args.json, metrics.csv, eval.csv, table.csv. An interrupted run starts anew.
"""

import copy
import math
from dataclasses import dataclass
from typing import Literal

import shared  # first: it makes the folder above known
import torch

from envs.workers import Workers
from evaluate import latents_of
from fpo_actor import FlowActor, draw_flow_noise
from fpo_buffer import TrajectoryBuffer
from fpo_critic import QEnsemble, critic_loss, draw_states, latent_advantage, n_step, polyak_update, td_target
from support.ranks import CPUS, SIMULATORS
from support.flags import parse_args

# as in the train scripts
FLOW_STEPS, CRITIC_BATCH, TAU, ROLLOUT_DECISIONS, WINDOW, WARMUP = 4, 128, 0.05, 5, 80, 4
CRITIC_STEPS, TD_DECISIONS, NUM_CRITICS, CRITIC_LR = 160, 10, 5, 3e-3
ACTOR_STATES, ACTOR_CHOICE, FRESH_LATENTS = 1600, 4, 8
CLONED = 2000  # of executed latents
LOSSES = ("losses/actor", "losses/critic", "losses/cfm_loss", "losses/clip_fraction")


@dataclass
class Args:
    update: Literal["fpo", "fpo++", "nft", "cloning"]  # whose update
    task: shared.Task = "aloha"  # the task, or the suite of tasks, to train on
    seed: int = 1  # of the networks, every draw and the training episodes
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where the networks run; auto is CUDA if there is one
    total_env_steps: int | None = None  # control steps; of one task of LIBERO 100 000, else 300 000
    num_envs: int | None = None  # parallel environments; 32, or a few more for several tasks
    num_workers: int = SIMULATORS  # simulator processes; the results do not depend on it
    eval_every: int | None = None  # control steps between evaluations; as the train scripts if left out
    eval_episodes: int | None = None  # a task, at start and end, half of it between; 200, for LIBERO 50
    run_name: str | None = None  # folder below runs/; <update>_<task>__seed<seed>__<time> if left out
    updates: int = 25  # gradient steps of the actor an iteration
    minibatch_size: int = 512  # samples of one of these
    actor_lr: float = 1e-3  # learning rate (Adam)
    anneal_lr: bool = True  # let it fall linearly to 0 over the run
    num_draws: int = 2  # N, draws of (u, ε) a sample
    clip_eps: float = 0.05  # ε of fpo and fpo++
    scale: float = 1.0  # c, of the mean squared error of a dimension, of fpo and fpo++


def actor_loss(actor, old, x, s, adv, args, generator):
    """The loss (see the top) of samples x (B, D) at states s (B, S) with advantages adv (B,), with draws of
    its own. old: the actor of θ_old. -> the loss, mean ℓ_cfm, and the share of ratios that are cut"""
    B, D = x.shape
    u, eps = draw_flow_noise(B, args.num_draws, D, generator, x.device)
    u, eps = u.flatten(), eps.flatten(0, 1)  # (B N,), (B N, D)
    x, s, adv = (v.repeat_interleave(args.num_draws, 0) for v in (x, s, adv))
    x_u, v = (1 - u[:, None]) * eps + u[:, None] * x, x - eps
    with torch.no_grad():
        v_old = old.velocity(x_u, u, s)
    v_new = actor.velocity(x_u, u, s)
    cfm = (v_new - v).square().mean(1)
    if args.update == "cloning":
        return cfm.mean(), cfm.mean(), torch.zeros(())
    if args.update == "nft":
        r = 0.5 + 0.5 * adv.clamp(-1, 1)
        other = (2 * v_old - v_new - v).square().mean(1)
        return (r * cfm + (1 - r) * other).mean(), cfm.mean(), torch.zeros(())
    delta = args.scale * ((v_old - v).square().mean(1) - cfm)
    if args.update == "fpo":
        delta, adv = (value.view(B, -1).mean(1) for value in (delta, adv))
    rho = delta.clamp(-3, 3).exp()
    clipped = torch.min(rho * adv, rho.clamp(1 - args.clip_eps, 1 + args.clip_eps) * adv)
    if args.update == "fpo++":
        pulled = rho * adv - adv.abs() * (rho - 1).square() / (2 * args.clip_eps)
        clipped = torch.where(adv < 0, pulled, clipped)
    cut = ((rho - 1).abs() > args.clip_eps).float().mean()
    return -clipped.mean(), cfm.mean(), cut


if __name__ == "__main__":
    args = parse_args(Args, __doc__)
    shared.check_limits(args, "num_draws", 1)
    shared.check_limits(args, "clip_eps scale", 1e-9)
    suite, base = shared.start_baseline(args)

    # ---- frozen base, actor, critics, trajectories ----
    device = base.device
    S, D, E = base.state_dim, base.latent_dim, args.num_envs
    actor = FlowActor(S, D).to(device)
    critic = QEnsemble(S, D, NUM_CRITICS).to(device)
    old, target = copy.deepcopy(actor), copy.deepcopy(critic)
    actor_adam = torch.optim.Adam(actor.parameters(), args.actor_lr, fused=True)
    critic_adam = torch.optim.Adam(critic.parameters(), CRITIC_LR, fused=True)
    generator = torch.Generator(device).manual_seed(args.seed)
    buffer, iteration = TrajectoryBuffer(WINDOW), 0

    with shared.clean_end(), Workers(suite.build, suite.tasks, args.num_workers) as workers:
        run = shared.Run(args, suite, base, workers, f"{args.update}_{args.task}", LOSSES)
        while run.to_go > 0:
            actor_adam.param_groups[0]["lr"] = args.actor_lr * (run.to_go if args.anneal_lr else 1)
            # of the noise, when it acts; an actor that is fitted to what it did would narrow
            c = 1.0 if args.update == "cloning" else run.to_go
            iteration, rows = iteration + 1, []

            # ---- rollout ----
            for _ in range(ROLLOUT_DECISIONS):
                noise = c * torch.randn(E, D, generator=generator, device=device)
                x = actor.sample(run.s, FLOW_STEPS, noise=noise)  # (E, D)
                rows.append(run.step(base.decode(run.context, x), s=run.s, x=x))
            buffer.push({k: torch.stack([row[k] for row in rows]) for k in rows[0]})

            # ---- update: the critics, then the actor ----
            torch.set_num_threads(min(CPUS, 4))
            w = {k: buffer.flat(k) for k in rows[0]}  # (W T E, …)
            infos = []
            if args.update == "cloning":  # decisions after which there was a reward in their episode
                one, whole = torch.ones_like(w["r"]), math.ceil(suite.limit / base.chunk_steps)
                good = torch.nonzero(n_step(w["r"], one, w["ended"], E, whole)[0]).flatten()[-CLONED:]
                s_a, x_a, adv, loss_critic = w["s"][good], w["x"][good], one[good], torch.zeros(())
            else:
                noise = c * torch.randn(len(w["r"]), D, generator=generator, device=device)
                w["x_next"] = actor.sample(w["s_next"], FLOW_STEPS, noise=noise)
                r_n, discount_n, end = n_step(w["r"], w["discount"], w["ended"], E, TD_DECISIONS)
                for _ in range(CRITIC_STEPS):
                    i = torch.randint(len(w["r"]), (CRITIC_BATCH,), generator=generator, device=device)
                    of_end = (w[k][end[i]] for k in ("terminated", "s_next", "x_next"))
                    y = td_target(target, r_n[i], discount_n[i], *of_end, (0, 1))
                    loss_critic = critic_loss(critic, w["s"][i], w["x"][i], y)
                    critic_adam.zero_grad()
                    loss_critic.backward()
                    critic_adam.step()
                    polyak_update(target, critic, TAU)
                drawn = ACTOR_CHOICE * ACTOR_STATES
                s_c = w["s"][torch.randint(len(w["r"]), (drawn,), generator=generator, device=device)]
                pair = actor.sample(s_c.repeat_interleave(2, 0), FLOW_STEPS, generator).view(-1, 2, D)
                s_c = s_c[draw_states(critic, s_c, pair, ACTOR_STATES, generator)]
                s_a = s_c.repeat_interleave(FRESH_LATENTS, 0)
                x_a = actor.sample(s_a, FLOW_STEPS, generator)
                adv = latent_advantage(critic, s_c, x_a.view(len(s_c), -1, D)).flatten()
            old.load_state_dict(actor.state_dict())
            order, k = torch.randperm(len(adv), generator=generator, device=device), args.minibatch_size
            for j in range(args.updates if iteration > WARMUP and len(adv) else 0):
                i = order.roll(-j * k)[:k]
                loss, *info = actor_loss(actor, old, x_a[i], s_a[i], adv[i], args, generator)
                actor_adam.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(actor.parameters(), 1.0)
                actor_adam.step()
                infos.append([v.item() for v in (loss, loss_critic / NUM_CRITICS, *info)])
            torch.set_num_threads(1)
            run.log(torch.cat([row["x"] for row in rows]), infos, latents_of(actor, FLOW_STEPS)["tuned"])
        run.print_result()
