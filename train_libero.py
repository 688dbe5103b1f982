"""Flow Policy Optimization (FPO) on LIBERO: Algorithm 1 of arXiv 2510.09976, top to bottom.
D1 … D17: README, "What the paper leaves open".

    python train_libero.py --seed 1                                        # butter/tray, the paper's ablation task
    python train_libero.py --suite libero_goal --seed 1                    # one actor over the tasks of a suite
    python train_libero.py --resume runs/<name>                            # go on after an interruption, bit for bit
    python train_libero.py --suite libero_goal --eval-only                 # the suite's table; with --checkpoint the tuned actor too
    torchrun --nproc-per-node 8 train_libero.py --num-envs 256             # several processes or GPUs, one run

A frozen base policy turns noise into an action chunk. The actor π_θ, a small flow, learns which noise to send. Its
parts stand in fpo_actor.py, fpo_critic.py, fpo_loss.py and fpo_buffer.py; here they are wired together.
From "for each iteration" to the checkpoint the lines are those of train_aloha.py.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers inherit it; the parent sets its own threads below

import math
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from run_files import (
    RunLogs, check_args, clean_end, compare, evaluation_columns, load_checkpoint, new_run_folder, parse_args, print_gain, rate,
    resumed_args, save_checkpoint, set_literal, stop, write_args, write_side_by_side, write_suite_table,
)  # fmt: skip

GAMMA = 0.999  # γ of Eq. 1, an environment step
FLOW_STEPS = 4  # steps in which the actor's flow is integrated
CRITIC_BATCH = 256  # transitions of one gradient step of the critics
TAU = 0.05  # Polyak step of the target critics, not the τ of Eq. 7
EXPLORE_ETA = 0.05  # η of Eq. 7
NUM_DRAWS = 2  # N, draws of (u, ε) behind every CFM loss (D3)
GAE_LAMBDA = 0.95  # λ of GAE, a decision; for --fresh-latents 0
VALUE_LATENTS = 4  # J of D5, the same
MINIBATCH = 512  # samples of one gradient step of the actor; K_update of Algorithm 1 is as many as go once through all samples
LATENT_EPISODES = 50  # the evaluation episodes, at least, whose latents go into latents.npz


@dataclass
class Args:
    suite: Literal["libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90"] = "libero_90"
    """the suite of tasks"""
    task_ids: str | None = None
    """tasks of the suite: numbers with commas, or all; 56 (butter/tray) for libero_90 and all for the others if left out"""
    seed: int = 1
    """seed of the actor, the critics, every draw and the training episodes"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where the networks run; auto takes CUDA where there is one"""
    total_env_steps: int | None = None
    """control steps of training, evaluation not counted; 250 000 for one task, 300 000 for several if left out"""
    num_envs: int | None = None
    """parallel environments, over all ranks; 32 a rank, or the next multiple of the tasks, if left out; 8 with π_0 on a CPU or a GPU of less than 20 GB"""
    num_workers: int | None = None
    """simulator processes of a rank, on which the results do not depend; one a core, 16 at most, if left out"""
    rollout_decisions: int = 5
    """T_rollout of Algorithm 1: latent chunks an environment and iteration"""
    window: int = 80
    """iterations that the trajectory buffer keeps (D10)"""
    critic_warmup: int = 4
    """first iterations that train the critics only (D11)"""
    critic_steps: int = 160
    """gradient steps of the critics an iteration (D11)"""
    fresh_latents: int = 8
    """latents a state that the actor learns from, valued by the critics; 0: the executed ones, valued by GAE, as in the paper (D16)"""
    actor_states: int = 3200
    """states of the window whose fresh latents the actor learns from, an iteration"""
    actor_lr: float = 3e-4
    """learning rate of θ (Adam)"""
    anneal_lr: bool = True
    """let the actor's learning rate fall linearly to 0 over the run"""
    critic_lr: float = 3e-3
    """learning rate of φ (Adam)"""
    beta: float = 0.2
    """β of Eq. 3, sharpness of the ratio"""
    clip_eps: float = 0.5
    """ε of Eq. 4; inf leaves the clip out (Table II)"""
    proximal: float = 0.3
    """κ, weight of |v_θ - v_θ_old|², which holds the actor near the one that made the samples; 0 is off, as in the paper (D4)"""
    explore_steps: int = 0
    """K of Eq. 7, latent exploration steps in training (D6)"""
    num_critics: int = 5
    """M, members of the ensemble"""
    clamp_target: bool = True
    """keep the target of Eq. 5 within [0, 1], where the return lies (D17)"""
    shuffle_advantages: bool = False
    """permute the advantages: a control that must not learn (D14)"""
    literal: bool = False
    """D2, D4, D5, D16, D17 to the letter: σ floor 1e-8, no proximal term, stored value latents, executed latents and GAE, no clamp in Eq. 5"""
    base: Literal["embedded", "pi0"] = "embedded"
    """the frozen base policy π_0: the small flow policy that ships in weights/, or π_0 itself through lerobot"""
    weights: str | None = None
    """the base: for embedded a file, weights/<suite or libero_90_task56>.safetensors if left out; for pi0 a folder or a name on the hub"""
    latent: Literal["dct", "full", "repeat"] = "dct"
    """pi0: what the latents stand for in its noise: low modes along time, every number, or one row repeated as in DSRL (D12)"""
    chunk_steps: int | None = None
    """pi0: control steps that are executed of a chunk; the policy's own n_action_steps if left out"""
    eval_every: int | None = None
    """control steps between evaluations; 50 000 for one task, 100 000 for several if left out"""
    eval_episodes: int = 50
    """episodes a task of the first and the last evaluation, one an official initial state; those between play half of them"""
    eval_only: bool = False
    """evaluate and end; with --checkpoint the tuned actor too"""
    checkpoint: str | None = None
    """the checkpoint to evaluate, for --eval-only; with --base pi0 a name without .pt is that of the base, as --weights"""
    video: bool = False
    """write videos of base and tuned actor from the same initial states (needs EGL)"""
    track: bool = False
    """send the logged scalars to Weights & Biases too; with WANDB_MODE=offline they stay in the run folder"""
    run_name: str | None = None
    """folder below runs/; <task>__seed<seed>__<time> if left out"""
    resume: str | None = None
    """run folder to continue; flags come from there, but for --weights, --total-env-steps, --num-workers, --video and --track"""


if __name__ == "__main__":
    args = parse_args(Args, __doc__)
    if args.resume:
        args = resumed_args(Args, args.resume)
    elif int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0) and args.run_name and (Path("runs") / args.run_name / "last.pt").exists():
        args = resumed_args(Args, f"runs/{args.run_name}", argv=[])  # torchrun --max-restarts: a rank has died
    if args.literal:
        set_literal(args)
    if args.base == "pi0" and args.checkpoint and not args.checkpoint.endswith(".pt"):
        if args.weights:
            stop(f"--checkpoint is {args.checkpoint}, which names a base (it does not end in .pt), and so does --weights {args.weights}; leave one out")
        args.weights, args.checkpoint = args.checkpoint, None

    # imported after the flags, so that --help and bad input need not wait, and here, so that simulator processes do without torch
    import numpy as np
    import torch

    import env_libero
    import ranks
    from base_flow import FlowBase
    from env_libero import OFFICIAL_STATES, STEP_LIMIT, TrainingEnvs, Workers, libero_problem, official, parse_task_ids, play_episodes
    from fpo_actor import FlowActor, draw_flow_noise
    from fpo_buffer import TrajectoryBuffer
    from fpo_critic import QEnsemble, critic_loss, fresh_value, gae, latent_advantage, polyak_update, stored_value, td_target
    from fpo_loss import fpo_loss
    from ranks import RANK, WORLD

    if args.task_ids is None:
        args.task_ids = "56" if args.suite == "libero_90" else "all"
    try:
        task_ids = parse_task_ids(args.suite, args.task_ids)
    except ValueError as error:
        stop(str(error))
    for name, one, several in (("total_env_steps", 250_000, 300_000), ("eval_every", 50_000, 100_000)):
        if getattr(args, name) is None:
            setattr(args, name, one if len(task_ids) == 1 else several)
    check_args(args)
    args.num_workers = args.num_workers or min(ranks.CPUS, 16)
    if problem := libero_problem(pictures=args.video or args.base == "pi0"):
        stop(problem)
    if args.eval_episodes > OFFICIAL_STATES:
        stop(f"--eval-episodes is {args.eval_episodes}; a task has {OFFICIAL_STATES} official initial states, give at most that")
    task = f"libero_90_task{'_'.join(map(str, task_ids))}" if args.suite == "libero_90" else args.suite  # the base's name for it
    device = ranks.connect(torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu"))
    args.device = device.type  # for args.json: a resumed run stays there, for the other device cannot go on with its random numbers
    torch.set_num_threads(1)  # more for the update only: waiting threads of torch spin, and would take the workers' cores

    # ---- frozen base π_0, actor π_θ, critics Q_φ, targets Q_φ̄, buffer B (Algorithm 1, line 1) ----
    try:
        if args.base == "pi0":
            from base_pi0 import Pi0Base

            weights = args.weights
            base = Pi0Base.load(weights, "libero", env_libero.CAMERAS, device, latent=args.latent,
                                chunk_steps=args.chunk_steps)  # fmt: skip
        else:
            if not args.weights and args.suite == "libero_90" and task_ids != [56]:
                stop(f"--task-ids is {args.task_ids}, and of libero_90 a base ships for task 56 alone; give --task-ids 56, another --suite, "
                     "a base of your own with --weights, or --base pi0")  # fmt: skip
            weights = args.weights or Path(__file__).resolve().parent / "weights" / f"{task}.safetensors"
            base = FlowBase.load(weights, device=device, task=task)
    except ValueError as error:
        stop(f"--base {args.base} --weights {weights}: {error}")
    if base.latent_dim == 0 and not args.eval_only:
        stop(f"--weights is {weights}, a {base.config.type} policy, whose noise nobody can choose; add --eval-only to measure it as it is")
    covered = [k for k in task_ids if k in base.header["task_ids"]]  # the others appear in the tables as what they are: not cloned
    if not covered:
        stop(f"--task-ids is {args.task_ids}, but the base in {weights} was cloned on the tasks {base.header['task_ids']} alone; name some of them")
    args.num_envs = E = args.num_envs or math.ceil(base.num_envs / len(covered)) * len(covered) * WORLD  # as many for every task
    if E < len(covered) and not args.eval_only:
        stop(f"--num-envs is {E}, so that some of the {len(covered)} tasks would never be trained; give at least {len(covered)}, or fewer --task-ids")
    if E % WORLD:
        stop(f"--num-envs is {E}, which {WORLD} ranks cannot share evenly; give a multiple of {WORLD}")
    # this rank plays m of the E environments and then learns from all: in one process [own] takes them all, and nothing is sent
    own = slice(RANK * E // WORLD, (RANK + 1) * E // WORLD)
    D = base.latent_dim
    sigma_floor = 1e-8 if args.literal else 2 * args.beta / max(D, 1)  # D2
    torch.manual_seed(args.seed)
    actor = FlowActor(base.state_dim, D).to(device)
    critic, target = (QEnsemble(base.state_dim, D, args.num_critics).to(device) for _ in range(2))
    target.load_state_dict(critic.state_dict())
    actor_optimizer = torch.optim.Adam(actor.parameters(), args.actor_lr)
    critic_optimizer = torch.optim.Adam(critic.parameters(), args.critic_lr)
    learners = dict(actor=actor, critic=critic, target=target, actor_optimizer=actor_optimizer, critic_optimizer=critic_optimizer)
    buffer = TrajectoryBuffer(args.window)
    generator = torch.Generator(device).manual_seed(args.seed)  # every draw of training
    iteration = env_steps = 0
    # how actor and base act: a checkpoint is good for these alone
    played = dict(flow_steps=FLOW_STEPS, chunk_steps=base.chunk_steps, latent=args.latent)
    recent, seconds, evaluations = deque(maxlen=100), 0.0, []
    column = lambda values: torch.as_tensor(values, dtype=torch.float32, device=device)

    if args.checkpoint or args.resume:
        flag, path = ("--checkpoint", args.checkpoint) if args.eval_only else ("--resume", Path(args.resume) / "last.pt")
        saved = load_checkpoint(path, flag, task)
        if saved["latent_dim"] != D or saved["weights_sha256"] != base.sha256:
            stop(f"{flag}: {path} was trained on another base than {weights}, or steers {saved['latent_dim']} latent dimensions and not {D}; "
                 + ("put that base back" if args.resume else "name that base with --weights"))  # fmt: skip
        for name, value in played.items():  # older checkpoints lack some of them
            if saved.get(name, value) != value:
                stop(f"{flag}: {path} was trained with {name} = {saved[name]}, here it is {value}; give the same value here")
        actor.load_state_dict(saved["actor"])
        env_steps = saved["env_steps"]

    # ---- run folder ----
    short = task if len(task) < 80 else f"{args.suite}_{len(task_ids)}_tasks"  # a file's name has at most 255 bytes
    default = f"{short}__seed{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path(args.resume) if args.resume else new_run_folder(args.run_name, default, ranks.RESTARTS > 0) if RANK == 0 else None
    folder = ranks.gathered(folder)[0]
    METRICS = (
        "iteration charts/env_steps charts/success charts/return charts/episode_length charts/success_length charts/SPS "
        "charts/rollout_seconds charts/update_seconds eval/success eval/success_low eval/success_high eval/length "
        "eval/success_length eval/episodes losses/actor losses/surrogate losses/critic losses/ratio_std losses/clip_fraction "
        "losses/floor_share losses/delta_mean losses/cfm_loss losses/move critic/q_mean critic/q_spread latent/norm latent/std "
        "latent/explore_shift"
    ).split()
    EPISODES = "policy env_steps task_id episode success length diverged".split()

    @torch.no_grad()
    def cached_loss(x, s, u, eps):
        """ℓ_cfm(x | s; θ_old) and the velocities behind it, in pieces that a cache holds."""
        parts = [actor.cfm_loss(*part) for part in zip(*(columns.split(1024) for columns in (x, s, u, eps)))]
        return [torch.cat(column) for column in zip(*parts)]

    @torch.no_grad()
    def evaluate(policy, num_episodes, record=False, log=True):
        """Play `num_episodes` official initial states of every task with `policy` ("base", "zero latents", "tuned" or "zero noise"). No exploration."""
        tasks, episodes = np.repeat(covered, num_episodes), np.tile(np.arange(num_episodes), len(covered))
        mine = np.arange(RANK, len(tasks), WORLD)  # the episodes of this rank
        noise = torch.Generator(device).manual_seed(0)  # the same at every evaluation
        drawn = []
        progress = tqdm(desc=f"evaluate {policy}", total=math.ceil(STEP_LIMIT[args.suite] / base.chunk_steps), leave=False, mininterval=mininterval,
                        disable=RANK > 0)  # fmt: skip

        def act(observations):
            progress.update()
            s, context = base.encode(observations)
            x = torch.randn(len(tasks), D, generator=noise, device=device)[mine]  # the base itself takes N(0, I)
            if policy in ("tuned", "zero noise"):  # untrained, the actor would give exactly its noise (D7)
                x = actor.sample(s, FLOW_STEPS, noise=x * (policy == "tuned"))
            elif policy == "zero latents":
                x = torch.zeros_like(x)
            explored = actor.explore(x, s, args.explore_steps, EXPLORE_ETA)  # to be recorded: x itself is executed
            drawn.append(torch.stack([x, explored], 1).cpu().numpy())
            return base.decode(context, base.to_noise(ranks.spread(x, mine, len(tasks)), noise)[mine]).cpu().numpy()

        result = play_episodes(workers, tasks[mine], [official(i) for i in episodes[mine]], act, record) if len(mine) else None
        if result:
            result["drawn"] = list(np.stack(drawn, 1))  # an episode: (decisions, 2, D), x^(0) and x^(K)
        result = dict(ranks.merged(result, mine), policy=policy, env_steps=env_steps * (policy in ("tuned", "zero noise")), task_id=tasks, episode=episodes)
        progress.close()
        for i in range(len(tasks) if log and RANK == 0 else 0):
            row = {key: int(result[key][i]) for key in ("task_id", "episode", "success", "length", "diverged")}
            logs.episodes.write(dict(row, policy=policy, env_steps=result["env_steps"]))
        return result

    def save(name):
        """Everything that decides how the run goes on."""
        states = ranks.collected(envs.state_dict())
        if RANK > 0:
            return
        save_checkpoint(folder / name, dict(
            task=task, latent_dim=D, **played, weights_sha256=base.sha256,
            iteration=iteration, env_steps=env_steps, seconds=elapsed(),
            **{name: part.state_dict() for name, part in learners.items()},
            buffer=buffer.iterations, generator=generator.get_state(), envs=ranks.joined(states), recent=list(recent),
            evaluations=evaluations, metric_rows=logs.metrics.rows, episode_rows=logs.episodes.rows,
        ))  # fmt: skip

    def summary(result):
        by_task = {k: [int(result["success"][result["task_id"] == k].sum()), int((result["task_id"] == k).sum())] for k in covered}
        return dict(policy=result["policy"], env_steps=result["env_steps"], episodes=len(result["success"]),
                    success=int(result["success"].sum()), by_task=by_task)  # fmt: skip

    latent_episodes = math.ceil(LATENT_EPISODES / len(covered))  # a task
    mininterval = 0.5 if sys.stderr.isatty() else 30.0
    start = time.perf_counter()

    def elapsed():
        return seconds + time.perf_counter() - start

    with clean_end("train_libero.py", folder) as interrupts, Workers(args.num_workers, args.suite, covered, base.pictures) as workers:
        if RANK == 0:  # the others compute, and write nothing
            if not args.resume:
                write_args(folder, args)
            logs = RunLogs(folder, args, METRICS, EPISODES, saved if args.resume else None)

        # ---- the untouched base first, before any update ----
        results = {}  # policy: its last evaluation
        if args.eval_only or not args.resume:
            for policy in ["base"] + ["zero latents"] * (D > 0) + ["tuned", "zero noise"] * bool(args.checkpoint):
                results[policy] = evaluate(policy, args.eval_episodes, record=args.video)
                evaluations.append(summary(results[policy]))
                e = evaluations[-1]
                if RANK == 0:
                    print(f"{policy:12} {rate(e['success'], e['episodes'])}", flush=True)
            if RANK == 0:
                logs.latents.add(results["base"], np.flatnonzero(results["base"]["episode"] < latent_episodes))
        if not args.eval_only:
            envs = TrainingEnvs(workers, covered, E, args.seed, own)
            bar = tqdm(total=args.total_env_steps, initial=env_steps, unit="step", unit_scale=True, mininterval=mininterval, smoothing=0.1,
                       disable=RANK > 0)  # fmt: skip
            if args.resume:
                for name, part in learners.items():
                    part.load_state_dict(saved[name])
                buffer.iterations = [{k: v.to(device) for k, v in b.items()} for b in saved["buffer"]]
                generator.set_state(saved["generator"])
                envs.load_state_dict(saved["envs"])
                recent.extend(saved["recent"])
                iteration, seconds, evaluations = (saved[k] for k in ("iteration", "seconds", "evaluations"))
            else:
                save("last.pt")
            s_t, context = base.encode(envs.observations)  # line 6, for the first decision

        # ---- for each iteration (line 2) ----
        while not args.eval_only and env_steps < args.total_env_steps:
            if interrupts:
                raise KeyboardInterrupt
            iteration, steps_before = iteration + 1, env_steps
            clock = time.perf_counter()
            steps, ended_episodes = 0, []

            # ---- rollout phase (lines 3-12); θ_old is θ, for nothing changes it here ----
            rows = []
            for t in range(args.rollout_decisions):
                noise = torch.randn(E, D, generator=generator, device=device)[own]  # (m, D), as x0 and x; m is E without torchrun
                x0 = actor.sample(s_t, FLOW_STEPS, noise=noise)  # line 7: x^(0) ~ π_θ(· | s)
                x = actor.explore(x0, s_t, args.explore_steps, EXPLORE_ETA)  # Eq. 7: x^(K), which is executed
                w = base.to_noise(ranks.spread(x, own, E), generator)[own]  # the base's noise, (m, …)
                a = base.decode(context, w)  # line 8, (m, chunk steps, A)
                step = envs.step(a.cpu().numpy())  # line 9
                # D8: reward 1 at the first success; a decision's reward is Σ_{j<h'} γ^j r_{t+j}, its bootstrap factor γ^h'
                r = step["success"] * GAMMA ** (step["num_steps"] - 1.0)  # (m,)
                ended = step["terminated"] | step["truncated"]
                # every observation is encoded once: s' is the next decision's s, but where an episode ended and another began
                s_after, context = base.encode(envs.observations)  # line 6, for the next decision
                s_next = s_after.clone()  # (m, S)
                if ended.any():
                    s_next[np.flatnonzero(ended)] = base.encode(step["last_observation"][ended])[0]
                rows.append(dict(s=s_t, x0=x0, x=x, s_next=s_next, r=column(r), discount=column(GAMMA ** step["num_steps"]),
                                 terminated=column(step["terminated"]), ended=column(ended)))  # fmt: skip
                s_t = s_after
                for i in np.flatnonzero(ended):
                    success, length = bool(step["success"][i]), int(step["episode_steps"][i])
                    episode_return = success * GAMMA ** (length - 1.0)  # Eq. 1: Σ_t γ^t r_t, with one reward at the first success
                    ended_episodes.append((t, own.start + int(i), success, length, episode_return))
                steps += int(step["num_steps"].sum())
                bar.update(WORLD * int(step["num_steps"].sum()))
            env_steps += sum(ranks.gathered(steps))
            ended_episodes = sorted(sum(ranks.gathered(ended_episodes), []))
            successes, lengths, returns = ([episode[k] for episode in ended_episodes] for k in (2, 3, 4))
            recent.extend(map(float, successes))
            bar.n = env_steps
            bar.set_postfix(success=f"{np.mean(recent):.2f}" if recent else "-", refresh=False)
            batch = ranks.of_all(own, E, {key: torch.stack([row[key] for row in rows]) for key in rows[0]})  # (T, E, …)
            T = args.rollout_decisions
            if not args.fresh_latents:  # line 10, with the draws of Eq. 2 (D3)
                u, eps = draw_flow_noise(T * E, NUM_DRAWS, D, generator, device)
                cfm_init, _ = cached_loss(batch["x"].flatten(0, 1), batch["s"].flatten(0, 1), u, eps)
                batch.update(u=u.view(T, E, -1), eps=eps.view(T, E, -1, D), cfm_init=cfm_init.view(T, E))
            buffer.push(batch)  # line 11, without a_t, which no equation reads
            rollout_seconds = time.perf_counter() - clock
            clock = time.perf_counter()
            torch.set_num_threads(min(ranks.CPUS, 4))

            # ---- update phase (lines 13-28); D13: first the critics, then the advantages once, then the actor ----
            # samples of all W iterations one after the other, (n, …)
            s, s_next, x, r, discount, terminated = (buffer.flat(key) for key in ("s", "s_next", "x", "r", "discount", "terminated"))
            n, losses_critic = len(r), []
            x_next = actor.sample(s_next, FLOW_STEPS, generator)  # lines 17-18: x' ~ π_θ(· | s'), with θ as it is for all steps below
            within = (0, 1) if args.clamp_target else None  # of the return, with one reward of at most 1
            for _ in range(args.critic_steps):
                i = torch.randint(n, (CRITIC_BATCH,), generator=generator, device=device)  # line 15
                y = td_target(target, r[i], discount[i], terminated[i], s_next[i], x_next[i], within)  # line 19, Eq. 5
                loss_critic = critic_loss(critic, s[i], x[i], y)  # line 20, Eq. 6
                critic_optimizer.zero_grad()
                loss_critic.backward()
                critic_optimizer.step()
                polyak_update(target, critic, TAU)  # line 21
                losses_critic.append(loss_critic.detach())

            # line 26: the samples (B, …) that the actor learns from, and their advantages (B,)
            if args.fresh_latents:  # D16: latents of the actor as it is, at states of the window, valued by the critics
                i = torch.randint(n, (args.actor_states,), generator=generator, device=device)
                s_a = s[i].repeat_interleave(args.fresh_latents, 0)
                x_a = actor.sample(s_a, FLOW_STEPS, generator)
                adv = latent_advantage(critic, s[i], x_a.view(len(i), -1, D)).flatten()
                u, eps = draw_flow_noise(len(x_a), NUM_DRAWS, D, generator, device)
                cfm_init, v_old = cached_loss(x_a, s_a, u, eps)  # line 10, for these
            else:  # the paper's: the executed latents, valued by GAE on whole trajectories
                s_a, x_a, u, eps, cfm_init = s, x, buffer.flat("u"), buffer.flat("eps"), buffer.flat("cfm_init")
                both = torch.cat([s, s_next]).repeat_interleave(VALUE_LATENTS, 0)
                x_s, x_s_next = actor.sample(both, FLOW_STEPS, generator).view(2, n, VALUE_LATENTS, D)
                v = stored_value(critic, s, x) if args.literal else fresh_value(critic, s, x_s)  # D5
                v_next, adv = fresh_value(critic, s_next, x_s_next), []
                for b, v_b, v_next_b in zip(buffer.iterations, v.split(T * E), v_next.split(T * E)):
                    v_b, v_next_b = v_b.view(T, E), v_next_b.view(T, E)
                    # V(s_{t+1}) is the next row's V(s_t), but where an episode ended and at the iteration's end
                    v_next_b = torch.cat([torch.where(b["ended"][:-1] > 0, v_next_b[:-1], v_b[1:]), v_next_b[-1:]])
                    adv.append(gae(b["r"], v_b, v_next_b, b["discount"], b["terminated"], b["ended"], GAE_LAMBDA).flatten())
                adv = torch.cat(adv)
                adv = (adv - adv.mean()) / (adv.std(correction=0) + 1e-4)
                v_old = cached_loss(x_a, s_a, u, eps)[1]
            if args.shuffle_advantages:
                adv = adv[torch.randperm(len(adv), generator=generator, device=device)]
            adv = adv.clamp_min(-1)  # D4: nothing is un-fitted harder than

            # lines 22-27: the actor
            if args.anneal_lr:
                actor_optimizer.param_groups[0]["lr"] = args.actor_lr * max(0.0, 1 - steps_before / args.total_env_steps)
            infos, order = [], torch.randperm(len(adv), generator=generator, device=device)
            minibatches = order.tensor_split(max(1, len(order) // MINIBATCH))  # the remainder is dealt out
            for i in minibatches if iteration > args.critic_warmup else ():  # D11: the critics alone at first
                cfm, v = actor.cfm_loss(x_a[i], s_a[i], u[i], eps[i])  # line 23: ℓ_cfm(x | s; θ), (b,)
                loss_actor, info = fpo_loss(cfm, cfm_init[i], adv[i], args.beta, args.clip_eps, sigma_floor)  # lines 23-25, 27: Eq. 2-4
                move = (v - v_old[i]).square().mean()
                loss_actor = loss_actor + args.proximal * info["slope"] * move  # D4: Eq. 3 standardises how far away, this does not
                actor_optimizer.zero_grad()
                loss_actor.backward()
                torch.nn.utils.clip_grad_norm_(actor.parameters(), 1.0)  # the paper names no limit
                actor_optimizer.step()
                infos.append(dict(info, actor=loss_actor.detach(), move=move.detach()))
            ranks.broadcast(actor, critic, target)  # the ranks have done the same: against rounding
            critic_mean = torch.stack(losses_critic).mean().item()
            if not (math.isfinite(critic_mean) and all(torch.isfinite(info["actor"]) for info in infos)):
                stop(f"a loss became NaN or infinite in iteration {iteration}; the last good checkpoint is {folder / 'last.pt'}. "
                     "Start a new run with a lower --actor-lr or --critic-lr", code=1)  # fmt: skip
            update_seconds = time.perf_counter() - clock
            torch.set_num_threads(1)

            # ---- log ----
            executed = batch["x"].flatten(0, 1)  # (T E, D)
            with torch.no_grad():
                q = critic(batch["s"].flatten(0, 1), executed)
            mean = lambda values: float(np.mean(values)) if len(values) else ""
            row = {"iteration": iteration, "charts/env_steps": env_steps, "charts/success": mean(recent),
                   "charts/return": mean(returns), "charts/episode_length": mean(lengths),
                   "charts/success_length": mean([length for length, success in zip(lengths, successes) if success]),
                   "charts/SPS": (env_steps - steps_before) / (rollout_seconds + update_seconds), "charts/rollout_seconds": rollout_seconds,
                   "charts/update_seconds": update_seconds, "losses/critic": critic_mean / args.num_critics,
                   "critic/q_mean": q.mean().item(), "critic/q_spread": q.std(0, correction=0).mean().item(),
                   "latent/norm": executed.norm(dim=-1).mean().item(), "latent/std": executed.std(0).mean().item(),
                   "latent/explore_shift": (batch["x"] - batch["x0"]).norm(dim=-1).mean().item()}  # fmt: skip
            for key in "actor surrogate ratio_std clip_fraction floor_share delta_mean cfm_loss move".split():
                row[f"losses/{key}"] = torch.stack([info[key] for info in infos]).mean().item() if infos else ""

            # ---- evaluate on the states that training never sees ----
            last = env_steps >= args.total_env_steps
            due = last or env_steps // args.eval_every > steps_before // args.eval_every
            if due:
                result = evaluate("tuned", args.eval_episodes if last else max(1, args.eval_episodes // 2), record=args.video and last)
                evaluations.append(e := summary(result))
                row.update(evaluation_columns(result))
                results["tuned"] = result
                if last:  # the same actor, from zero noise
                    evaluations.append(summary(evaluate("zero noise", args.eval_episodes)))
            if due and RANK == 0:
                logs.latents.add(result, np.flatnonzero(result["episode"] < latent_episodes))
                bar.write(f"{env_steps:9,d} steps  {elapsed() / 60:5.1f} min  tuned {rate(e['success'], e['episodes'])}")
            if RANK == 0:
                logs.write(row, env_steps)
            save("last.pt")
            if due:
                save(f"step{env_steps:08d}.pt")

        # ---- the result: a row a task, a column a policy, the same initial states in each ----
        if "tuned" in results and "base" not in results:  # a resumed run has not played the base itself
            results["base"] = evaluate("base", args.eval_episodes, record=args.video, log=False)
        if RANK > 0:
            raise SystemExit
        final = {e["policy"]: e for e in evaluations}  # the last one of each
        print(f"\n{task}, seed {args.seed}, {env_steps:,} environment steps, {elapsed() / 60:.1f} minutes, files in {folder}")
        write_suite_table(folder / "table.csv", {k: env_libero.suite(args.suite).get_task(k).name for k in task_ids}, covered, final)
        if "tuned" in results:
            print_gain(final["base"], final["tuned"])
            before, after = results["base"], results["tuned"]
            for kind, members in compare(before, after).items():
                filmed = [i for i in members if len(before["frames"][i]) and len(after["frames"][i])] if args.video else []
                for i in filmed[:1]:  # Fig. 4a, 6: base left, tuned right, from the same initial state
                    film = folder / f"{kind}_task{before['task_id'][i]}_episode{before['episode'][i]}.mp4"  # every other frame: 10 a second
                    pictures = workers.render([before["task_id"][i]] * 2, [before["frames"][i][::2], after["frames"][i][::2]])
                    write_side_by_side(film, pictures, env_libero.FPS / 2)
                    print(f"{kind}, base | tuned: {film}")
