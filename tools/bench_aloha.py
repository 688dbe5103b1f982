"""Speed of every part of a training run on this machine, in one go.

    python tools/bench_aloha.py            # a minute or two; let nothing else run

Raw physics is MuJoCo's mj_step alone, one process a core, with a scripted demonstration's joint targets as commands; the
environment executes the same commands in the same episodes. So their ratio is the price of observations, rewards and processes.
"""

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import numpy as np
import torch

from mujoco_state import set_state  # before mujoco: it picks the OpenGL library
import mujoco
from base_flow import FlowBase
from demo_aloha import Demonstrator
from env_aloha import HORIZON, Simulator, Workers, sample_box_poses
from fpo_actor import FlowActor, draw_flow_noise
from fpo_critic import QEnsemble, critic_loss, polyak_update, td_target
from fpo_loss import fpo_loss
from run_files import parse_args, stop


@dataclass
class Args:
    num_workers: int = min(os.cpu_count() or 1, 16)
    """processes"""
    num_envs: int = 32
    """environments, as in training"""
    samples: int = 320
    """samples of an iteration, as in training"""
    turns: int = 10
    """measurements of raw physics and of our environment, one after the other"""


def raw_physics(simulator, state, actions):
    """Control steps a second of mj_step alone, in this process."""
    set_state(simulator.model, simulator.data, state)
    controls = simulator.controls(actions)
    start = time.perf_counter()
    for u in controls:
        simulator.data.ctrl[:] = u
        mujoco.mj_step(simulator.model, simulator.data, simulator.substeps)
    return len(actions) / (time.perf_counter() - start)


def seconds(function, repeat=5):
    """Median time of a call, after one call to warm up."""
    function()
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


if __name__ == "__main__":
    args = parse_args(Args, __doc__)
    for name in ("num_workers", "num_envs", "samples", "turns"):
        if getattr(args, name) < 1:
            stop(f"--{name.replace('_', '-')} is {getattr(args, name)}; give at least 1")
    torch.set_num_threads(min(os.cpu_count() or 1, 4))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    n = args.num_envs
    poses = sample_box_poses(np.random.default_rng(0), n)
    demonstrator = Demonstrator(Simulator())
    actions = np.stack([demonstrator.plan(1, pose, 0.002, 0.032, np.random.default_rng(0)) for pose in poses])

    with Workers(args.num_workers) as workers:
        states, observations = workers.reset(poses)
        # both play the same episodes on all workers at once; a raw job is one episode, as an environment job is a chunk
        raw, ours = [], []
        for _ in range(args.turns):  # in turns: the speed of a shared machine wanders
            start = time.perf_counter()
            workers.pool.map(raw_physics, list(states), list(actions))
            raw.append(n * HORIZON / (time.perf_counter() - start))
            now, start = states, time.perf_counter()
            for k in range(0, HORIZON, 40):
                now = np.stack([chunk.state for chunk in workers.run(now, actions[:, k : k + 40])])
            ours.append(n * HORIZON / (time.perf_counter() - start))
    low, middle, high = np.quantile(np.array(ours) / raw, [0.25, 0.5, 0.75])

    base = FlowBase.load(ROOT / "weights" / "aloha.safetensors", device=device)
    S, D, B = base.state_dim, base.latent_dim, args.samples
    actor, critic, target = FlowActor(S, D).to(device), QEnsemble(S, D, 5).to(device), QEnsemble(S, D, 5).to(device)
    actor_optimizer, critic_optimizer = torch.optim.Adam(actor.parameters()), torch.optim.Adam(critic.parameters())
    s, x, r = torch.randn(B, S, device=device), torch.randn(B, D, device=device), torch.zeros(B, device=device)
    u, eps = draw_flow_noise(B, 4, D, device=device)
    (cfm_init, v_old), adv = (part.detach() for part in actor.cfm_loss(x, s, u, eps)), torch.randn(B, device=device)

    def sync():
        if device.type == "cuda":
            torch.cuda.synchronize()

    def decode():
        s, context = base.encode(torch.as_tensor(observations, dtype=torch.float32, device=device))
        base.decode(context, actor.sample(s, 8))
        sync()

    def actor_epoch():
        for i in torch.arange(B, device=device).split(160):
            cfm, v = actor.cfm_loss(x[i], s[i], u[i], eps[i])
            loss, info = fpo_loss(cfm, cfm_init[i], adv[i], 0.2, 0.2, 0.01)
            loss = loss + info["slope"] * (v - v_old[i]).square().mean()
            actor_optimizer.zero_grad()
            loss.backward()
            actor_optimizer.step()
        sync()

    def critic_epoch():
        for i in torch.arange(B, device=device).split(160):
            loss = critic_loss(critic, s[i], x[i], td_target(target, r[i], r[i], r[i], s[i], x[i]))
            critic_optimizer.zero_grad()
            loss.backward()
            critic_optimizer.step()
            polyak_update(target, critic, 0.05)
        sync()

    def critic_loop():  # M networks one after the other, for comparison with the batched ensemble
        for single in singles:
            critic_loss(single, s, x, r).backward()
        sync()

    def critic_batched():
        critic_loss(critic, s, x, r).backward()
        sync()

    singles = [QEnsemble(S, D, 1).to(device) for _ in range(5)]
    print(f"{args.num_workers} workers, torch on {device} with {torch.get_num_threads()} threads")
    print(f"raw physics            {np.median(raw):8.0f} control steps/s, median of {args.turns} turns")
    print(f"our environment        {np.median(ours):8.0f} control steps/s   {middle:.2f} of raw (quartiles {low:.2f} and {high:.2f})")
    print(f"sample and decode      {1000 * seconds(decode):8.1f} ms for {n} environments, one decision")
    print(f"actor epoch            {1000 * seconds(actor_epoch):8.1f} ms for {B} samples, 4 draws")
    print(f"critic epoch           {1000 * seconds(critic_epoch):8.1f} ms for {B} samples, 5 critics")
    print(f"critics, one batch     {1000 * seconds(critic_batched):8.1f} ms batched, {1000 * seconds(critic_loop):.1f} ms as a loop")
