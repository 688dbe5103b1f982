"""Flow Policy Optimization (FPO) on LIBERO: Algorithm 1 of arXiv 2510.09976, top to bottom.

    python train_libero.py --seed 1                              # butter/tray, the paper's ablation task
    python train_libero.py --suite libero_goal --seed 1          # one actor over the tasks of a suite
    python train_libero.py --resume runs/<name>                  # go on after an interruption, bit for bit
    python evaluate.py runs/<name>/last.pt --video               # look at what it learned
    torchrun --nproc-per-node 8 train_libero.py --num-envs 256   # several processes or GPUs, one run

A frozen base policy turns a latent x, its noise, into an action chunk. The actor π_θ, a small flow, learns
which x to send. A decision is one latent, one chunk, one stored transition. The parts stand in fpo_actor.py,
fpo_critic.py, fpo_loss.py and fpo_buffer.py; here they are wired together. "line 7" is a line of Algorithm 1.
Where we depart from the paper, and why: docs/decisions.md.
"""

import os

os.environ.update(dict(OMP_NUM_THREADS="1", GOMP_SPINCOUNT="1000") | os.environ)  # or idle threads hog cores

import math
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from base import Pi0Options, is_pi0
from support.flags import check_args, parse_args

GAMMA = 0.999  # γ of Eq. 1, per control step
FLOW_STEPS = 4  # steps in which the actor's flow is integrated
CRITIC_BATCH = 128  # transitions of one gradient step of the critics
TAU = 0.05  # Polyak step of the target critics, not the τ of Eq. 7
EXPLORE_ETA = 0.05  # η of Eq. 7
NUM_DRAWS = 2  # N, draws of (u, ε) behind every CFM loss
MINIBATCH = 512  # samples of one gradient step of the actor, or a few more
GAE_LAMBDA = 0.95  # λ of GAE, per decision; for --fresh-latents 0
VALUE_LATENTS = 4  # fresh latents per state behind V(s); for --fresh-latents 0


@dataclass
class Args:
    suite: Literal["libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90"] = "libero_90"
    """the suite of tasks"""
    task_ids: str | None = None  # numbers with commas, or all; if left out all, of libero_90 56
    seed: int = 1  # seed of the actor, the critics, every draw and the training episodes
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where the networks run; auto takes CUDA if there
    total_env_steps: int | None = None  # of training; if left out 100 000, for several tasks 300 000
    num_envs: int | None = None  # parallel environments, over all ranks; 32 or a few more a rank if left out
    num_workers: int | None = None  # simulator processes of a rank; one a core if left out
    rollout_decisions: int = 5  # T_rollout of Algorithm 1: decisions per environment and iteration
    window: int = 80  # iterations that the trajectory buffer keeps
    critic_warmup: int = 4  # first iterations that train the critics only
    critic_steps: int = 160  # K_update of the critics: their gradient steps per iteration
    td_decisions: int = 10  # n, decisions whose rewards Eq. 5 adds up before it bootstraps; the paper's 1
    fresh_latents: int = 8  # latents per state the actor learns from, valued by critics; 0: executed, by GAE
    actor_states: int = 1600  # states of the window, per iteration, whose fresh latents the actor learns from
    actor_choice: int = 4  # candidates a state, drawn by how much the latent matters there; 1: no choice
    actor_lr: float = 1e-3  # learning rate of θ (Adam)
    anneal: bool = True  # let the learning rate, and the noise to act with, fall linearly to 0 over the run
    critic_lr: float = 3e-3  # learning rate of φ (Adam)
    beta: float = 0.2  # β of Eq. 3, sharpness of the ratio where σ is above its floor
    clip_eps: float = 0.5  # ε of Eq. 4; inf leaves the clip out (Table II)
    self_fit: float = 0.5  # κ, weight of ℓ_cfm itself beside Eq. 4 (not in the paper); 0: off
    explore_steps: int = 0  # K of Eq. 7, latent exploration steps in training
    num_critics: int = 5  # M, members of the ensemble
    clamp_target: bool = True  # keep the target of Eq. 5 within [0, 1], where the return lies
    shuffle_advantages: bool = False  # permute the advantages: a control that must not learn
    literal: bool = False  # the paper's words: self-fit 0, fresh-latents 0, td-decisions 1, no anneal, …
    base: str | None = None
    """frozen policy: weights/<suite>.safetensors if left out; a π_0's folder or hub name"""
    pi0: Pi0Options = field(default_factory=Pi0Options)
    eval_every: int | None = None  # steps between evaluations; if left out half of the default run
    eval_episodes: int = 50  # a task, of the first and the last evaluation; those between play half of them
    track: bool = False  # send the scalars to Weights & Biases too; with WANDB_MODE=offline they stay here
    run_name: str | None = None  # folder below runs/; <task>__seed<seed>__<time> if left out
    resume: str | None = None  # run folder to go on with; flags come from there


if __name__ == "__main__":
    args = parse_args(Args, __doc__)

    # after the flags, so that --help need not wait, and here, so that simulator processes do without torch
    import numpy as np
    import torch

    from base import load_base
    from envs import cloned_tasks, load_suite
    from envs.episodes import TrainingEnvs
    from envs.workers import Workers
    from evaluate import evaluate, latents_of, print_result
    from fpo_actor import FlowActor, draw_flow_noise
    from fpo_buffer import TrajectoryBuffer
    from fpo_critic import QEnsemble, critic_loss, draw_states, n_step, polyak_update, td_target
    from fpo_critic import fresh_value, gae, latent_advantage
    from fpo_loss import fpo_loss
    from support import ranks
    from support.logs import RunLogs, check_finite, mean, steps_bar
    from support.run_files import clean_end, load_checkpoint, run_folder, save_checkpoint

    suite = load_suite(args.suite, args.task_ids, pictures=bool(args.base) and is_pi0(args.base))
    several = len(suite.tasks) > 1
    if args.total_env_steps is None:
        args.total_env_steps = 300_000 if several else 100_000
    if args.eval_every is None:
        args.eval_every = 150_000 if several else 50_000
    args.base = args.base or f"weights/{suite.name}.safetensors"
    check_args(args, suite)  # --literal sets its flags here
    torch.set_num_threads(1)  # more in the update only: they would take cores from the simulators

    # ---- frozen base π_0, actor π_θ, critics Q_φ, targets Q_φ̄, buffer B (line 1) ----
    device = ranks.connect(args.device)
    base = load_base(args.base, args.pi0, suite, device)
    tasks = cloned_tasks(suite, base)
    args.device = device.type  # a resumed run stays there: the other device has other random numbers
    args.num_envs = args.num_envs or math.ceil(base.num_envs / len(tasks)) * len(tasks) * ranks.WORLD
    S, D, E, T = base.state_dim, base.latent_dim, args.num_envs, args.rollout_decisions
    own = ranks.share(E, len(tasks))  # the m environments that this process plays; it learns from all E
    sigma_floor = 1e-8 if args.literal else 2 * args.beta / D
    torch.manual_seed(args.seed)
    actor = FlowActor(S, D).to(device)
    critic, target = (QEnsemble(S, D, args.num_critics).to(device) for _ in range(2))
    target.load_state_dict(critic.state_dict())
    actor_adam = torch.optim.Adam(actor.parameters(), args.actor_lr, fused=True)
    critic_adam = torch.optim.Adam(critic.parameters(), args.critic_lr, fused=True)
    learners = dict(actor=actor, critic=critic, target=target, actor_adam=actor_adam, critic_adam=critic_adam)
    buffer = TrajectoryBuffer(args.window)
    generator = torch.Generator(device).manual_seed(args.seed)  # every draw of training
    draw = dict(generator=generator, device=device)
    iteration, env_steps, recent = 0, 0, deque(maxlen=100)  # recent: success of the last training episodes

    # ---- run folder; with --resume everything as it was left ----
    made_for = dict(task=suite.name, base_sha256=base.sha256, latent_dim=D, chunk_steps=base.chunk_steps)
    made_for |= dict(pi0=vars(args.pi0), flow_steps=FLOW_STEPS, hidden=len(actor.inp.bias))
    saved = load_checkpoint(Path(args.resume) / "last.pt", "--resume", made_for) if args.resume else None
    if saved:
        for name, part in learners.items():
            part.load_state_dict(saved[name])
        buffer.iterations = [{k: v.to(device) for k, v in b.items()} for b in saved["buffer"]]
        generator.set_state(saved["generator"])
        iteration, env_steps = saved["iteration"], saved["env_steps"]
        recent.extend(saved["recent"])
    folder = ranks.gathered(run_folder(args, suite.name, ranks.RESTARTS))[0]
    workers = Workers(suite.build, tasks, args.num_workers or ranks.SIMULATORS, base.pictures)
    with clean_end(Path(__file__).name, folder) as interrupts, workers:
        logs = RunLogs(folder, args, saved)

        def play(policy, num_episodes):
            """Evaluate on num_episodes starts per task, which training never sees. -> success rate"""
            who = policy, latents_of(actor, FLOW_STEPS)[policy], base
            where, steps = (tasks, suite.starts[:num_episodes], suite.limit), env_steps
            return float(evaluate(*who, workers, *where, logs.episodes, steps)["success"].mean())

        @torch.no_grad()
        def loss_of_old(x, s, u, eps):
            """ℓ_cfm(x | s; θ_old), for θ has not moved yet; in pieces, which is faster."""
            pieces = zip(x.split(1024), s.split(1024), u.split(1024), eps.split(1024))
            return torch.cat([actor.cfm_loss(*piece) for piece in pieces])

        for policy in ("base", "zero latents") if not saved else ():  # before any update
            play(policy, args.eval_episodes)
        envs = TrainingEnvs(workers, tasks, E, suite.draw_start, suite.limit, args.seed, own)
        if saved:
            envs.load_state_dict(saved["envs"])
        bar = steps_bar(args.total_env_steps, env_steps)
        s, context = base.encode(envs.observations)  # line 6: s for actor and critics, context for decode

        # ---- for each iteration (line 2) ----
        while env_steps < args.total_env_steps:
            if interrupts:
                raise KeyboardInterrupt
            iteration, steps_before, clock = iteration + 1, env_steps, time.perf_counter()
            c = 1 - env_steps / args.total_env_steps if args.anneal else 1.0  # of the noise, when it acts
            actor_adam.param_groups[0]["lr"] = c * args.actor_lr

            # ---- rollout phase (lines 3-12); θ_old is θ, for nothing changes it here ----
            rows, episodes = [], []
            for t in range(T):
                noise = torch.randn(E, D + base.free_dim, generator=generator, device=device)[own]  # (m, …)
                x = actor.sample(s, FLOW_STEPS, noise=c * noise[:, :D])  # line 7: x^(0) ~ π_θ(· | s), (m, D)
                x = actor.explore(x, s, args.explore_steps, EXPLORE_ETA)  # Eq. 7: x^(K), which is executed
                a = base.decode(context, x, noise[:, D:])  # line 8, (m, chunk steps, A)
                step = envs.step(a.cpu().numpy())  # line 9: h' steps, a chunk or to the episode's end
                ended = step["terminated"] | step["truncated"]  # (m,), by success or crash | by time limit
                row = dict(s=s, x=x, terminated=step["terminated"], ended=ended, num_steps=step["num_steps"])
                # reward 1 at the first success; a decision's is Σ_{j<h'} γ^j r_j, its discount γ^h'
                row["discount"] = GAMMA ** step["num_steps"]
                row["r"] = step["success"] * GAMMA ** (step["num_steps"] - 1.0)
                s, context = base.encode(envs.observations)  # line 6, for the next decision
                row["s_next"] = s.clone()
                if ended.any():  # s' of an episode that has ended is its own last state
                    row["s_next"][ended] = base.encode(step["last_observation"][ended])[0]
                rows.append({k: torch.as_tensor(v).float().to(device) for k, v in row.items()})
                for i in np.flatnonzero(ended):
                    success, length = float(step["success"][i]), int(step["episode_steps"][i])
                    episode_return = success * GAMMA ** (length - 1)  # Eq. 1: Σ_t γ^t r_t
                    episodes.append((t, own.start + i, success, length, episode_return))
                bar.update(ranks.WORLD * int(step["num_steps"].sum()))
            batch = ranks.of_all({k: torch.stack([row[k] for row in rows]) for k in rows[0]})  # (T, E, …)
            episodes = sorted(sum(ranks.gathered(episodes), []))  # by (t, environment), as in one process
            env_steps += int(batch.pop("num_steps").sum())
            recent.extend(success for _, _, success, _, _ in episodes)
            if not args.fresh_latents:  # line 10, with the draws, which Eq. 2 needs again
                u, eps = draw_flow_noise(T * E, NUM_DRAWS, D, generator, device)
                cfm_init = loss_of_old(batch["x"].flatten(0, 1), batch["s"].flatten(0, 1), u, eps)
                batch |= dict(u=u.view(T, E, -1), eps=eps.view(T, E, -1, D), cfm_init=cfm_init.view(T, E))
            buffer.push(batch)  # line 11, without a_t, which no equation reads
            rollout_seconds, clock = time.perf_counter() - clock, time.perf_counter()

            # ---- update phase (lines 13-28, reordered): all critic steps, the advantages, the actor ----
            torch.set_num_threads(min(ranks.CPUS, 4))
            w = {k: buffer.flat(k) for k in batch}  # the window, (W T E, …)
            size, critic_losses, infos = len(w["r"]), [], []
            # lines 17-18: x' with the rollout's noise, (W T E, D), once for all critic steps: θ rests in them
            w["x_next"] = actor.sample(w["s_next"], FLOW_STEPS, noise=c * torch.randn(size, D, **draw))
            within = (0, 1) if args.clamp_target else None  # the return lies there: one reward of at most 1
            # n decisions at once, uncorrected: a reward at an episode's end soon reaches its start
            r_n, discount_n, end_row = n_step(w["r"], w["discount"], w["ended"], E, args.td_decisions)
            for _ in range(args.critic_steps):
                i = torch.randint(size, (CRITIC_BATCH,), **draw)  # line 15
                at_end = (w[k][end_row[i]] for k in ("terminated", "s_next", "x_next"))
                y = td_target(target, r_n[i], discount_n[i], *at_end, within)  # line 19, Eq. 5
                loss = critic_loss(critic, w["s"][i], w["x"][i], y)  # line 20, Eq. 6
                critic_adam.zero_grad()
                loss.backward()
                critic_adam.step()
                polyak_update(target, critic, TAU)  # line 21
                critic_losses.append(loss.detach())
            # line 26: the samples (B, …) that the actor learns from, and their advantages (B,)
            if args.fresh_latents:  # nobody has executed them; the critics value them at states of the window
                s_c = w["s"][torch.randint(size, (args.actor_choice * args.actor_states,), **draw)]
                pair = actor.sample(s_c.repeat_interleave(2, 0), FLOW_STEPS, generator).view(-1, 2, D)
                # where any latent will do, the critics' errors would drown the states where it decides
                s_c = s_c[draw_states(critic, s_c, pair, args.actor_states, generator)]
                s_a = s_c.repeat_interleave(args.fresh_latents, 0)
                x_a = actor.sample(s_a, FLOW_STEPS, generator)  # of its whole law, which ℓ_cfm is about
                adv = latent_advantage(critic, s_c, x_a.view(len(s_c), -1, D)).flatten()
                u, eps = draw_flow_noise(len(x_a), NUM_DRAWS, D, generator, device)
                cfm_init = loss_of_old(x_a, s_a, u, eps)  # line 10, for these
            else:  # the paper's: executed latents (W T E, …), valued by GAE along the window, (W T, E)
                s_a, x_a, u, eps, cfm_init = w["s"], w["x"], w["u"], w["eps"], w["cfm_init"]
                both = torch.cat([w["s"], w["s_next"]]).repeat_interleave(VALUE_LATENTS, 0)
                x_s, x_s_next = actor.sample(both, FLOW_STEPS, generator).view(2, size, VALUE_LATENTS, D)
                # V from fresh latents: with the stored one V(s) is Q(s, x), whose advantage is 0 on average
                w["value_next"] = fresh_value(critic, w["s_next"], x_s_next)
                x_s = w["x"][:, None] if args.literal else x_s  # Sec. III-B c: "reuse stored latents"
                w["value"] = fresh_value(critic, w["s"], x_s)
                columns = "r", "value", "value_next", "discount", "terminated", "ended"
                r, value, value_next, *rest, ended = (w[k].view(-1, E) for k in columns)
                # one V a state, so that δ telescopes, but for the last s' of an episode
                value_next[:-1] = torch.where(ended[:-1] > 0, value_next[:-1], value[1:])
                adv = gae(r, value, value_next, *rest, ended, GAE_LAMBDA).flatten()
                adv = (adv - adv.mean()) / (adv.std(correction=0) + 1e-4)  # the paper does it per minibatch
            if args.shuffle_advantages:
                adv = adv[torch.randperm(len(adv), **draw)]
            adv = adv if args.literal else adv.clamp_min(-1)  # bounds un-fitting (not in the paper)

            # lines 22-27: the actor, once through its samples
            minibatches = torch.randperm(len(adv), **draw).tensor_split(max(1, len(adv) // MINIBATCH))
            for i in minibatches if iteration > args.critic_warmup else ():  # the critics alone at first
                cfm = actor.cfm_loss(x_a[i], s_a[i], u[i], eps[i])  # line 23: ℓ_cfm(x | s; θ), (b,)
                # lines 23-25 and 27, Eq. 2-4
                loss, info = fpo_loss(cfm, cfm_init[i], adv[i], args.beta, args.clip_eps, sigma_floor)
                # at ρ = 1 as if κ were added to A; without it the field drifts from what the actor samples
                loss = loss + args.self_fit * info.pop("slope") * cfm.mean()
                actor_adam.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(actor.parameters(), 1.0)  # the paper names no limit
                actor_adam.step()
                infos.append(info)
            ranks.broadcast(actor, critic, target)  # all did the same update: rounding must not drift
            torch.set_num_threads(1)
            update_seconds = time.perf_counter() - clock

            # ---- log, evaluate, save ----
            q = critic(batch["s"].flatten(0, 1), batch["x"].flatten(0, 1)).detach()  # (M, T E)
            scalars = {
                "iteration": iteration,
                "charts/env_steps": env_steps,
                "charts/success": mean(recent),
                "charts/return": mean([episode[4] for episode in episodes]),
                "charts/episode_length": mean([episode[3] for episode in episodes]),
                "charts/SPS": (env_steps - steps_before) / (rollout_seconds + update_seconds),
                "charts/rollout_seconds": rollout_seconds,
                "charts/update_seconds": update_seconds,
                "losses/critic": torch.stack(critic_losses).mean().item() / args.num_critics,
                "critic/q_mean": q.mean().item(),
                "critic/q_spread": q.std(0, correction=0).mean().item(),
                "latent/norm": batch["x"].norm(dim=-1).mean().item(),
            }
            for key in infos[0] if infos else ():
                scalars[f"losses/{key}"] = torch.stack([info[key] for info in infos]).mean().item()
            check_finite(scalars, folder)
            bar.n = env_steps
            bar.set_postfix(success=f"{mean(recent):.2f}" if recent else "-")
            last = env_steps >= args.total_env_steps
            due = last or env_steps // args.eval_every > steps_before // args.eval_every
            if due:
                scalars["eval/success"] = play("tuned", -(-args.eval_episodes // (1 if last else 2)))
            logs.write(scalars, env_steps)
            checkpoint = {name: part.state_dict() for name, part in learners.items()}
            checkpoint |= dict(iteration=iteration, env_steps=env_steps, recent=list(recent))
            checkpoint |= dict(generator=generator.get_state(), buffer=buffer.iterations, logs=logs.rows())
            checkpoint |= dict(envs=ranks.joined(envs.state_dict()))
            save_checkpoint(folder, made_for | checkpoint, args, keep=due)
        print_result(folder, suite.names)
