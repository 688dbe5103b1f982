"""Speed of every part on this machine, in one go; let nothing else run.

    python tools/bench.py aloha                       # raw physics, our loop, environments, base; a run
    python tools/bench.py libero --suite libero_goal  # butter/tray if left out; all ten tasks in every worker
    python tools/bench.py pi0                         # full size, random weights; or --policy folder

Raw physics is mj_step alone with known motor commands, which our loop computes itself on the same way: the
ratio is the price of controller, success and observation. The update's share of an iteration is that in half
of a run with the default flags, minutes. A chunk of π_0 costs one encode (PaliGemma over images and words)
and one decode (ten steps of the action expert from its cache); the naive form passes the prefix twice, one
environment at a time.
"""

import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import shared  # first: it makes the folder above known
import numpy as np
import torch
import tyro
from torch.utils.flop_counter import FlopCounterMode

from base.flow import FlowBase
from envs import load_suite
from envs.physics import mujoco
from envs.episodes import TrainingEnvs
from envs.workers import Workers
from fpo_actor import FlowActor
from support.ranks import SIMULATORS
from support.flags import parse_args, stop


FLOW_STEPS = 4  # of the actor, as in the train scripts


@dataclass
class Args:
    what: tyro.conf.Positional[Literal["aloha", "libero", "pi0"]]  # what to measure
    repeat: int = 10  # timed calls of each part, of which the median counts
    num_envs: int = 32  # parallel environments
    num_workers: int = SIMULATORS  # simulator processes
    suite: Literal["libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90"] = "libero_90"
    task_ids: str | None = None  # of it, with commas, or all; of libero_90 56, else all if left out
    policy: Path | None = None  # folder of a π_0; full size with random weights if left out
    batches: tuple[int, ...] = (1, 4, 16, 64)  # environments that π_0 encodes and decodes at once


def seconds(function, repeat):
    """Median time of a call, after one to warm up."""
    times = []
    for _ in range(repeat + 1):
        start = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return float(np.median(times[1:]))


def print_update(args, suite, base):
    """Print the update's share of an iteration, in half of a run with the default flags."""
    from results import read_table  # not above: simulator processes do without pandas

    script = [sys.executable, shared.ROOT / f"train_{args.what}.py", "--base", base]
    if args.what == "libero":
        script += ["--suite", args.suite, "--task-ids", ",".join(map(str, suite.tasks))]
    steps = 50_000 if len(suite.tasks) == 1 and args.what == "libero" else 150_000
    flags = dict(total_env_steps=steps, eval_episodes=1, num_envs=args.num_envs, num_workers=args.num_workers)
    script += [text for k, v in flags.items() for text in (f"--{k.replace('_', '-')}", v)]
    with tempfile.TemporaryDirectory() as folder:
        command = [*map(str, script), "--run-name", "bench"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            stop(f"a run ended with code {done.returncode}:\n{done.stderr[-1500:]}", code=1)
        rows = read_table(Path(folder) / "runs/bench/metrics.csv")
    columns = "charts/rollout_seconds", "charts/update_seconds"
    rollout, update = (np.mean([float(row[column]) for row in rows]) for column in columns)
    share = update / (rollout + update)
    print(f"rollout {rollout:.2f} s, update {update:.2f} s; update / iteration {share:.3f}")


def lean_loops(args, suite, base):
    """Print the times of a control step, raw and ours, where the base plays five decisions in a process."""

    def note(model, data):
        commands.append(data.ctrl.copy())
        step2(model, data)

    def raw():
        simulator.run(start, actions[:0])  # goes to the state
        for u in commands:
            simulator.data.ctrl[:] = u
            mujoco.mj_step(simulator.model, simulator.data, substeps)

    for k, name in suite.names.items():
        simulator, commands, chunks = suite.build([k])[k], [], []
        start, observation = state, _ = simulator.reset(suite.starts[0])
        mujoco.mj_step2, step2 = note, mujoco.mj_step2  # writes down what our loop sends to the motors
        for _ in range(5):
            x = torch.randn(1, base.latent_dim, device=base.device)
            chunks.append(base.decode(base.encode(observation[None])[1], x)[0].cpu().numpy())
            chunk = simulator.run(state, chunks[-1])
            state, observation = chunk.state, chunk.observation
        mujoco.mj_step2, actions = step2, np.concatenate(chunks)
        substeps = simulator.substeps * len(actions) // len(commands)
        play = partial(simulator.run, start, actions)
        # in turns: the speed of a shared machine wanders
        both = [(seconds(raw, 1), seconds(play, 1)) for _ in range(args.repeat)]
        (basis, ours), ratio = 1000 * np.median(both, 0) / len(actions), np.median([b / a for a, b in both])
        reset = 1000 * seconds(lambda: simulator.reset(suite.starts[0]), args.repeat)
        print(f"{name}: reset {reset:.1f} ms; a control step raw {basis:.2f} ms", flush=True)
        print(f"  ours {ours:.2f} ms, {ratio:.2f} times raw")
        if args.what == "libero":
            simulator.env.reset()
            theirs = 1000 * seconds(lambda: simulator.env.step(actions[0]), args.repeat)
            print(f"  LIBERO's own environment {theirs:.1f} ms, {theirs / basis:.1f} times raw")


def rollout(args, suite, base):
    """Print the speed of environments in workers, and of the base."""
    actor, times = FlowActor(base.state_dim, base.latent_dim).to(base.device), []
    torch.set_num_threads(1)
    with Workers(suite.build, suite.tasks, args.num_workers) as workers:
        envs = TrainingEnvs(workers, suite.tasks, args.num_envs, suite.draw_start, suite.limit, 0)
        for _ in range(args.repeat + 1):
            start = time.perf_counter()
            s, context = base.encode(envs.observations)
            actions = base.decode(context, actor.sample(s, FLOW_STEPS)).cpu().numpy()
            between = time.perf_counter()
            steps = envs.step(actions)["num_steps"].sum()
            times.append((between - start, time.perf_counter() - between, steps))
    decide, play, steps = np.median(times[1:], 0)  # the first one warms up
    print(f"{args.num_workers} workers: {steps / play:.0f} control steps/s")
    print(f"sample and decode: {1000 * decide:.1f} ms a decision of {args.num_envs} environments")


def make_pi0(policy, device):
    """π_0 from a folder, or for LIBERO, of full size, with random weights and no processors. -> Pi0Base"""
    if policy is None and device.type == "cpu":
        stop("--policy is missing: a CPU takes minutes a chunk of a full-size π_0; name a folder")
    try:
        from base.pi0 import Pi0Base

        if policy:
            return Pi0Base.load(policy, "libero", ("image", "image2", "top"), device)
        from lerobot.configs import FeatureType, PolicyFeature
        from lerobot.policies.factory import get_policy_class, make_policy_config
        from lerobot.processor import PolicyProcessorPipeline
    except (ImportError, ValueError) as error:
        stop(f"--policy is {policy}: {error}")
    cameras, picture = ("image", "image2"), PolicyFeature(FeatureType.VISUAL, (3, 224, 224))
    inputs = {f"observation.images.{camera}": picture for camera in cameras}
    inputs["observation.state"] = PolicyFeature(FeatureType.STATE, (8,))
    sizes = dict(input_features=inputs, output_features={"action": PolicyFeature(FeatureType.ACTION, (7,))})
    config = make_policy_config("pi0", device=str(device), dtype="bfloat16", n_action_steps=10, **sizes)
    policy = get_policy_class("pi0")(config).eval().requires_grad_(False)
    experts = policy.model.paligemma_with_expert
    experts.paligemma.lm_head = experts.gemma_expert.lm_head = None  # as Pi0Base.load does
    return Pi0Base(policy, [PolicyProcessorPipeline(steps=[])] * 3, cameras)


def pi0_parts(args, base):
    """Print the times of several batch sizes, beside the naive form and the card."""
    policy, config, device, cuda = base.policy, base.config, base.device, base.device.type == "cuda"

    def batch_of(n, words=48):  # of the instruction, padding included
        batch = {key: torch.rand(n, *f.shape, device=device) for key, f in config.image_features.items()}
        state = config.input_features["observation.state"].shape
        batch["observation.state"] = torch.randn(n, *state, device=device)
        batch["observation.language.tokens"] = torch.randint(1, 250, (n, words), device=device)
        batch["observation.language.attention_mask"] = torch.ones(n, words, dtype=torch.bool, device=device)
        return batch, torch.randn(n, *base.noise_shape, device=device)

    print(f"{torch.cuda.get_device_name() if cuda else 'CPU'}, torch {torch.__version__}, {config.dtype}")
    one, w = batch_of(1)
    naive = seconds(lambda: (base._prefix(one), policy.predict_action_chunk(one, noise=w)), args.repeat)
    print(f"naive form: {1000 * naive:.1f} ms a chunk, {1 / naive:.1f} chunks/s\n")
    print("| batch | encode, ms | decode, ms | chunks/s | of the naive form | peak, GB |\n|" + "---|" * 6)
    times = {}
    for n in args.batches:
        batch, w = batch_of(n)
        encode, prefix = seconds(lambda: base._prefix(batch), args.repeat), base._prefix(batch)
        prefix.pop("features")
        decode = seconds(lambda: base._integrate(prefix, w), args.repeat)
        times[n], rate = (encode, decode), n / (encode + decode)
        cells = n, 1000 * encode, 1000 * decode, rate, rate * naive, torch.cuda.max_memory_allocated() / 1e9
        print("| {} | {:.1f} | {:.1f} | {:.1f} | {:.2f} | {:.1f} |".format(*cells), flush=True)
    # what the card really does: products of large bf16 matrices, copies of a large array
    size, room = (8192, 2**30) if cuda else (512, 2**24)
    square = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    matrix = 2 * size**3 / seconds(lambda: square @ square, args.repeat)
    copies = 2 * room / seconds(torch.zeros(room, dtype=torch.uint8, device=device).clone, args.repeat)
    with FlopCounterMode(display=False) as counter:
        prefix = base._prefix(one)
    modules = [m for name, m in policy.model.named_children() if name != "paligemma_with_expert"]
    modules.append(policy.model.paligemma_with_expert.gemma_expert)
    weights = sum(p.nbytes for module in modules for p in module.parameters())
    cache = sum(layer.keys.nbytes + layer.values.nbytes for layer in prefix["past_key_values"].layers)
    print(f"\nthe card: {matrix / 1e12:.1f} TFLOP/s on large bf16 matrices, copies {copies / 1e9:.0f} GB/s")
    for n, (encode, decode) in times.items():  # decode: the weights once a step, the cache cloned and read
        compute = counter.get_total_flops() * n / encode / matrix
        memory = config.num_inference_steps * (weights + 3 * cache * n) / decode / copies
        print(f"batch {n}: encode {compute:.1%} of that matrix rate, decode {memory:.1%} of that bandwidth")


if __name__ == "__main__":
    args = parse_args(Args, __doc__)
    shared.check_limits(args, "repeat num_envs num_workers batches", 1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.what == "pi0":
        base = make_pi0(args.policy, device)
        with torch.no_grad():
            pi0_parts(args, base)
    else:
        suite = load_suite(args.suite if args.what == "libero" else "aloha", args.task_ids)
        weights = shared.ROOT / "weights" / f"{suite.name}.safetensors"
        base = FlowBase.load(weights, device)
        lean_loops(args, suite, base)
        rollout(args, suite, base)
        print_update(args, suite, weights)
