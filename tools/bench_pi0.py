"""Speed of π_0 as the frozen base: encode, decode, the naive form, the share of the card's own rates, and the FPO update beside it.

    python tools/bench_pi0.py                       # full size, random weights, bf16: 8 GB of GPU memory, a few minutes
    python tools/bench_pi0.py --policy folder       # a policy of yours instead; on a CPU use a tiny one

A chunk costs one encode (PaliGemma over images and words) and one decode (ten steps of the action expert from its cache). The naive form
passes the prefix twice, once for the actor's s and once within predict_action_chunk, one environment at a time. Processors, rendering and
physics are not counted.
"""

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import torch

from base_pi0 import Pi0Base, download, load_strictly
from fpo_actor import FlowActor, draw_flow_noise
from fpo_critic import QEnsemble, critic_loss, polyak_update, td_target
from fpo_loss import fpo_loss
from run_files import parse_args


@dataclass
class Args:
    policy: Path | None = None
    """folder of a π_0 checkpoint; full size with random weights if left out"""
    batches: tuple[int, ...] = (1, 4, 16, 64)
    """environments that are encoded and decoded at once"""
    repeat: int = 10
    """timed calls of each; the median counts"""
    compile: bool = True
    """also time the denoising step through torch.compile"""
    tokens: int = 48
    """words of the instruction, padding included"""


def full_size(device):
    """lerobot's π_0 for LIBERO (two cameras) with random weights, bf16."""
    from lerobot.configs import FeatureType, PolicyFeature
    from lerobot.policies.factory import get_policy_class, make_policy_config

    features = {f"observation.images.{c}": PolicyFeature(type=FeatureType.VISUAL, shape=(3, 224, 224)) for c in ("image", "image2")}
    features["observation.state"] = PolicyFeature(type=FeatureType.STATE, shape=(8,))
    action = {"action": PolicyFeature(type=FeatureType.ACTION, shape=(7,))}
    config = make_policy_config("pi0", input_features=features, output_features=action, device=str(device), dtype="bfloat16", n_action_steps=10)
    return get_policy_class("pi0")(config).eval().requires_grad_(False)


def make_base(policy):
    from lerobot.processor import PolicyProcessorPipeline

    experts = policy.model.paligemma_with_expert
    experts.paligemma.lm_head = experts.gemma_expert.lm_head = None
    empty = PolicyProcessorPipeline(steps=[])
    names = [key.removeprefix("observation.images.") for key in policy.config.image_features]
    return Pi0Base(policy, empty, empty, empty, names)


def random_batch(base, n, tokens):
    config, device = base.config, base.device
    batch = {key: torch.rand(n, *feature.shape, device=device) for key, feature in config.image_features.items()}
    batch["observation.state"] = torch.randn(n, config.input_features["observation.state"].shape[0], device=device)
    batch["observation.language.tokens"] = torch.randint(1, 250, (n, tokens), device=device)
    batch["observation.language.attention_mask"] = torch.ones(n, tokens, dtype=torch.bool, device=device)
    return batch


def seconds(function, repeat, device):
    """Median time of a call, after two to warm up."""
    times = []
    for k in range(repeat + 2):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return float(np.median(times[2:]))


def card_rates(device, repeat):
    """What the card really does: multiplications of large bf16 matrices (FLOP/s) and copies of a large array (bytes/s)."""
    size = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    matrix = 2 * size**3 / seconds(lambda: a @ b, repeat, device)
    c = torch.empty(2**30 if device.type == "cuda" else 2**24, dtype=torch.uint8, device=device)
    d = torch.empty_like(c)
    return matrix, 2 * c.numel() / seconds(lambda: d.copy_(c), repeat, device)


def update_seconds(base, repeat, samples=320):
    """One update phase of the sizes that docs/pi0.md was measured with: 12 critic epochs, 4 actor epochs, minibatches of 160."""
    S, D, device = base.state_dim, base.latent_dim, base.device
    actor, critic, target = FlowActor(S, D).to(device), QEnsemble(S, D, 5).to(device), QEnsemble(S, D, 5).to(device)
    actor_optimizer, critic_optimizer = torch.optim.Adam(actor.parameters()), torch.optim.Adam(critic.parameters())
    s, x, r = torch.randn(samples, S, device=device), torch.randn(samples, D, device=device), torch.zeros(samples, device=device)
    u, eps = draw_flow_noise(samples, 16, D, device=device)
    (cfm_init, v_old), adv = (part.detach() for part in actor.cfm_loss(x, s, u, eps)), torch.randn(samples, device=device)

    def update():
        for epoch in range(12):
            for i in torch.randperm(samples, device=device).split(160):
                loss = critic_loss(critic, s[i], x[i], td_target(target, r[i], r[i], r[i], s[i], x[i]))
                critic_optimizer.zero_grad()
                loss.backward()
                critic_optimizer.step()
                polyak_update(target, critic, 0.05)
        for epoch in range(4):
            for i in torch.randperm(samples, device=device).split(160):
                cfm, v = actor.cfm_loss(x[i], s[i], u[i], eps[i])
                loss, info = fpo_loss(cfm, cfm_init[i], adv[i], 0.2, 0.2, 0.01)
                loss = loss + info["slope"] * (v - v_old[i]).square().mean()
                actor_optimizer.zero_grad()
                loss.backward()
                actor_optimizer.step()

    return seconds(update, max(1, repeat // 5), device)


if __name__ == "__main__":
    args = parse_args(Args, __doc__)
    try:
        from lerobot.configs import PreTrainedConfig
        import lerobot.policies.factory  # registers the types of policies
    except ImportError as error:
        print(f"this needs lerobot ({error}): make the environment with Python 3.12 and `pip install -r requirements.txt`.", file=sys.stderr)
        sys.exit(2)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.policy is None and device.type == "cpu":
        print("--policy is missing: a full-size π_0 on a CPU takes minutes a chunk; name a folder with a small one.", file=sys.stderr)
        sys.exit(2)
    if args.policy is not None:
        try:
            folder = download(args.policy)
            config = PreTrainedConfig.from_pretrained(folder)
            config.device = str(device)
            policy = load_strictly(folder, config)
        except Exception as error:  # lerobot, the hub and safetensors each raise their own
            print(f"--policy is {args.policy}: {error}", file=sys.stderr)
            sys.exit(2)
    else:
        policy = full_size(device)
    base = make_base(policy)
    steps, model, eager = base.config.num_inference_steps, policy.model, policy.model.denoise_step
    print(f"{torch.cuda.get_device_name() if device.type == 'cuda' else 'CPU'}, torch {torch.__version__}, {sum(p.numel() for p in policy.parameters()) / 1e9:.2f} G "
          f"parameters, {base.config.dtype}")  # fmt: skip

    with torch.no_grad():
        # the naive form: a pass for s, then lerobot's own call, for one environment
        one, w = random_batch(base, 1, args.tokens), torch.randn(1, *base.noise_shape, device=device)
        naive = seconds(lambda: (base._prefix(one), policy.predict_action_chunk(one, noise=w)), args.repeat, device)
        print(f"naive form: {1000 * naive:.1f} ms a chunk, {1 / naive:.1f} chunks/s\n")
        print("| batch | encode, ms | decode, ms | decode compiled, ms | chunks/s | of the naive form | compiled | memory, GB |\n|" + "---|" * 8)
        times = {}
        for n in args.batches:
            batch, w = random_batch(base, n, args.tokens), torch.randn(n, *base.noise_shape, device=device)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            encode = seconds(lambda: base._prefix(batch), args.repeat, device)
            prefix = base._prefix(batch)
            prefix.pop("features")
            decode = seconds(lambda: base._integrate(prefix, w), args.repeat, device)
            memory = f"{torch.cuda.max_memory_allocated() / 1e9:.1f}" if device.type == "cuda" else "–"
            times[n], row = (encode, decode), ["–", "–"]
            if args.compile:
                model.denoise_step = torch.compile(eager)
                compiled = seconds(lambda: base._integrate(prefix, w), args.repeat, device)
                model.denoise_step = eager
                row = [f"{1000 * compiled:.1f}", f"{n / (encode + compiled) * naive:.2f}"]
            rate = n / (encode + decode)
            print(f"| {n} | {1000 * encode:.1f} | {1000 * decode:.1f} | {row[0]} | {rate:.1f} | {rate * naive:.2f} | {row[1]} | {memory} |", flush=True)

        from torch.utils.flop_counter import FlopCounterMode

        matrix, bandwidth = card_rates(device, args.repeat)
        with FlopCounterMode(display=False) as counter:
            base._prefix(one)
        prefix = base._prefix(one)
        prefix.pop("features")
        expert = [m for name, m in model.named_children() if name != "paligemma_with_expert"] + [model.paligemma_with_expert.gemma_expert]
        weights = sum(p.numel() * p.element_size() for m in expert for p in m.parameters())
        cache = sum(t.numel() * t.element_size() for layer in prefix["past_key_values"].layers for t in (layer.keys, layer.values))
    first, largest = min(times), max(times)
    print(f"\nthe card: {matrix / 1e12:.1f} TFLOP/s on large bf16 matrices, {bandwidth / 1e9:.0f} GB/s on copies")
    encode, decode = times[first]
    print(f"encode at batch {first}: {counter.get_total_flops() * first / encode / matrix:.1%} of that matrix rate"
          f"; at batch {largest}: {counter.get_total_flops() * largest / times[largest][0] / matrix:.1%}")  # fmt: skip
    print(f"decode at batch {first}: {steps * (weights + 3 * cache * first) / decode / bandwidth:.1%} of that bandwidth (weights once, cache cloned and read, {steps} steps)")
    update = update_seconds(base, args.repeat)
    encode, decode = times[largest]
    chunks = 320 / largest * (encode + decode)
    print(f"update: {update:.2f} s beside {chunks:.2f} s of encoding and decoding 320 chunks at batch {largest}: {update / (update + chunks):.1%} of both")
