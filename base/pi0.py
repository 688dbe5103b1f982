"""π_0 itself as the frozen base policy: lerobot's PI0Policy (or π_0.5's PI05Policy), cut in two where FPO
needs it.

`encode` runs PaliGemma once over images and instruction and keeps its cache. `decode` integrates the action
expert's flow from that cache and from the noise that the actor chose: bit for bit what
`policy.predict_action_chunk(batch, noise=w)` gives.

    base = Pi0Base.load("lerobot/pi0_libero_finetuned_v044", "libero", ("image", "image2"), device="cuda")
    s, context = base.encode(observations)               # n dicts of Simulator.look -> s (n, 2056)
    x = torch.randn(len(s), base.latent_dim)             # or an actor's latent chunk
    free = torch.randn(len(s), base.free_dim)            # the part of its noise that the latent leaves free
    actions = base.decode(context, x, free)              # (n, chunk_steps, 7)

Images, state and actions pass through lerobot's own processors. lerobot runs its flow time from 1 (noise) to
0 (data); here that stays inside `decode`. Needs Python 3.12 and lerobot, which are looked for on `load` only.
"""

import contextlib
import hashlib
import io
import logging
import math
from pathlib import Path

import numpy as np
import torch

from base.flow import one_line

# SmolVLA has another prefix and cache; every other type has no noise of its own to choose
STEERABLE = ("pi0", "pi05")
BATCH = 32  # observations that PaliGemma sees at once


class Pi0Base:
    """The same methods as FlowBase. A policy of another type (π_0-FAST, Diffusion Policy, ACT) has latent_dim
    0: it can be evaluated under the same protocol, and not be steered."""

    free_dim = 0

    def __init__(
        self, policy, processors, cameras, latent="dct", latent_modes=4, chunk_steps=None, openpi_aloha=False
    ):
        """processors: lerobot's of the policy's input, of its output, and of the environment's output."""
        self.policy, self.config, self.openpi = policy, policy.config, None
        self.preprocess, self.postprocess, self.env_preprocess = processors
        if openpi_aloha:  # SmolVLA has openpi's conventions for ALOHA
            from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

            self.openpi = SmolVLAPolicy
        self.device = next(policy.parameters()).device
        room = torch.cuda.get_device_properties(self.device).total_memory if self.device.type == "cuda" else 0
        self.num_envs = 32 if room > 20e9 else 8
        self.latent, self.steerable = latent, self.config.type in STEERABLE
        self.action_dim = self.config.output_features["action"].shape[0]
        self.chunk_steps = chunk_steps or self.config.n_action_steps
        self.header = dict(task_ids=range(1000))  # language tells the task: none is left out
        # the cameras that both sides know; lerobot shows π_0 a blank picture in place of a missing one
        renamed = next((step.rename_map for step in self.preprocess.steps if hasattr(step, "rename_map")), {})
        names = {renamed.get(f"observation.images.{c}", f"observation.images.{c}"): c for c in cameras}
        self.pictures = {
            names[k]: tuple(f.shape[1:]) for k, f in self.config.image_features.items() if k in names
        }
        if not self.pictures:
            wanted = f"the policy wants the pictures {list(self.config.image_features)}"
            raise ValueError(f"{wanted}, and the environment has {list(cameras)}.")
        if not self.steerable:
            self.state_dim, self.latent_dim = 1, 0
            return
        self.noise_shape = (self.config.chunk_size, self.config.max_action_dim)  # (50, 32)
        if self.chunk_steps > self.config.chunk_size:
            given = f"--pi0.chunk-steps is {self.chunk_steps}"
            raise ValueError(f"{given}; the policy's chunk has {self.config.chunk_size}: give at most that.")
        width = policy.model.paligemma_with_expert.paligemma.config.text_config.hidden_size
        self.state_dim = width + self.config.input_features["observation.state"].shape[0]
        steps, actions = self.noise_shape
        sizes = dict(dct=latent_modes * self.action_dim, full=steps * actions, repeat=actions)
        self.latent_dim = sizes[latent]
        if latent == "dct":
            basis = dct_basis(latent_modes, self.action_dim, steps, actions)  # (D, 50, 32)
            self.basis = basis.to(self.device)
            self.free_dim = steps * actions  # numbers of noise beside the latent

    # ---- the three methods of a base ----

    @torch.no_grad()
    def encode(self, observations):
        """One pass of PaliGemma. observations: (n,) dicts, or None where an episode is over -> s (n, S),
        context for `decode`.

        s is the mean of the prefix's last hidden states, layer-normalised, and the proprioception as the
        policy normalises it.
        """
        known = [i for i, o in enumerate(observations) if o is not None]
        s, context = torch.zeros(len(observations), self.state_dim, device=self.device), []
        for rows in (known[i : i + BATCH] for i in range(0, len(known), BATCH)):
            batch = self._prepare([observations[i] for i in rows])
            if not self.steerable:
                context.append((rows, batch))
                continue
            prefix = self._prefix(batch)
            s[rows] = torch.cat([prefix.pop("features"), batch["observation.state"].float()], -1)
            context.append((rows, prefix))
        return s, (len(observations), context)

    def noise(self, x, free):
        """The latents as π_0's noise. x: (n, D), free: (n, free_dim) from N(0, I) -> w: (n, 50, 32).

        "dct": w = B x + (I - B Bᵀ) ξ, where B's orthonormal columns are the first DCT modes along time of the
        real actions and ξ is `free`; "full": w is x. Either way w is N(0, I) when x is. "repeat": one row for
        all steps, as DSRL does; far outside the prior.
        """
        x = x.to(self.device, torch.float32)
        if self.latent == "repeat":
            return x[:, None].repeat(1, self.noise_shape[0], 1)
        if self.latent == "full":
            return x.view(-1, *self.noise_shape)
        xi = free.to(self.device, torch.float32).view(-1, *self.noise_shape)
        missing = x - torch.einsum("nta,dta->nd", xi, self.basis)
        return xi + torch.einsum("nd,dta->nta", missing, self.basis)

    @torch.no_grad()
    def decode(self, context, x, free):
        """The action chunks of `context` from latents x (n, D) and free noise (n, free_dim) -> (n,
        chunk_steps, A), in the environment's units, on the CPU. Zeros where there was no observation."""
        n, parts = context
        w = self.noise(x, free) if self.steerable else None
        actions = torch.zeros(n, self.chunk_steps, self.action_dim)
        for rows, prefix in parts:
            if self.steerable:
                chunk = self._integrate(prefix, w[rows].to(self.device))
            else:  # the policy's own way to play a chunk; it repeats the picture where it wants a history
                self.policy.reset()
                chunk = torch.stack([self.policy.select_action(prefix) for _ in range(self.chunk_steps)], 1)
            chunk = self.postprocess(chunk[..., : self.action_dim]).float().cpu()
            if self.openpi:
                chunk = self.openpi._pi_aloha_encode_actions(None, chunk)
            actions[rows] = chunk[:, : self.chunk_steps]
        return actions

    # ---- lerobot ----

    def _prepare(self, observations):
        """Dicts of one observation each -> the batch that the policy takes."""
        from lerobot.envs.utils import preprocess_observation

        batch = stack([{k: v for k, v in o.items() if k != "task"} for o in observations])
        batch = preprocess_observation(batch)
        batch = self.env_preprocess(batch | {"task": [o["task"] for o in observations]})
        if self.openpi:
            state = batch["observation.state"].clone()
            batch["observation.state"] = self.openpi._pi_aloha_decode_state(None, state)
        return self.preprocess(batch)

    def _prefix(self, batch):
        """PaliGemma's pass of PI0Pytorch.sample_actions: its cache, and what it knows of the state."""
        from lerobot.policies.common.vla_utils import make_att_2d_masks, prepare_attention_masks_4d

        model = self.policy.model
        images, image_masks = self.policy._preprocess_images(batch)
        tokens = batch["observation.language.tokens"], batch["observation.language.attention_mask"]
        embedded, pad, attend = model.embed_prefix(images, image_masks, *tokens)
        model.paligemma_with_expert.paligemma.model.language_model.config._attn_implementation = "eager"
        (hidden, _), cache = model.paligemma_with_expert.forward(
            attention_mask=prepare_attention_masks_4d(make_att_2d_masks(pad, attend)),
            position_ids=torch.cumsum(pad, dim=1) - 1,
            past_key_values=None,
            inputs_embeds=[embedded, None],
            use_cache=True,
        )
        seen = pad[..., None].float()
        features = (hidden.float() * seen).sum(1) / seen.sum(1)
        features = torch.nn.functional.layer_norm(features, features.shape[-1:])
        prefix = dict(features=features, prefix_pad_masks=pad, past_key_values=cache)
        if self.config.type == "pi0":  # π_0.5 has the state among the words
            prefix["state"] = self.policy.prepare_state(batch)
        return prefix

    def _integrate(self, prefix, w):
        """The action expert's flow from noise w (B, 50, 32) to normalised actions (B, 50, 32)."""
        from lerobot.policies.common.flow_matching import euler_integrate

        def velocity(x, time):
            return self.policy.model.denoise_step(x_t=x, timestep=time, **prefix)

        return euler_integrate(velocity, w, self.config.num_inference_steps)

    @classmethod
    def load(cls, path, env, cameras, device="cpu", dtype=None, **options):
        """The policy in a folder or on the hub. env: "libero" or "aloha", for lerobot's processors; dtype:
        "bfloat16" on a GPU and "float32" on a CPU if left out. ValueError, in one sentence, if it is not
        there or not whole."""
        try:
            from lerobot.configs import PreTrainedConfig
            from lerobot.envs.factory import make_env_config, make_env_pre_post_processors
            from lerobot.policies.factory import make_pre_post_processors
        except ImportError as error:
            fix = "make the environment with Python 3.12 and `pip install -r requirements.txt`"
            raise ValueError(f"π_0 needs lerobot ({error}): {fix}.") from None
        folder, device = download(path), torch.device(device)
        try:
            config = PreTrainedConfig.from_pretrained(folder)
        except Exception as error:  # json, draccus and lerobot each raise their own
            what = f"{path} has no sound config.json of a LeRobot policy"
            raise ValueError(f"{what} ({one_line(error)}).") from None
        config.device = str(device)
        if hasattr(config, "dtype"):
            config.dtype = dtype or ("bfloat16" if device.type == "cuda" else "float32")
        policy = load_strictly(folder, config)
        if config.type in STEERABLE:
            experts = policy.model.paligemma_with_expert
            experts.paligemma.lm_head = experts.gemma_expert.lm_head = None  # 1.5 GiB that never speak
        try:
            there = {"device_processor": {"device": str(device)}}
            both = make_pre_post_processors(config, str(folder), preprocessor_overrides=there)
        except Exception as error:
            raise ValueError(f"the processors of {path} cannot be loaded ({one_line(error)}).") from None
        env_preprocess, _ = make_env_pre_post_processors(make_env_config(env), config)
        base = cls(policy, (*both, env_preprocess), cameras, **options)
        with open(folder / "model.safetensors", "rb") as file:
            base.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return base


def download(path):
    """The folder of a policy, fetched from the hub unless it is one already. ValueError if it is neither
    there nor to be had."""
    if Path(path).is_dir():
        return Path(path).resolve()
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path), allow_patterns=["*.json", "*.safetensors", "*.model"]))
    except Exception as error:
        what = f"{path} is neither a folder nor to be had from the hub"
        raise ValueError(f"{what} ({one_line(error)}).") from None


def load_strictly(folder, config):
    """The policy, frozen, after every tensor of the file has been found in it. lerobot's own loader prints a
    warning and goes on with random weights where the file is missing or does not fit. ValueError in these
    cases."""
    from lerobot.policies.factory import get_policy_class
    from safetensors.torch import load_file

    file = folder / "model.safetensors"
    try:
        stored = load_file(file)
    except Exception as error:
        raise ValueError(f"{file} is missing or damaged ({one_line(error)}).") from None
    logging.getLogger().setLevel(logging.ERROR)  # it warns of names that it then loads
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            build = get_policy_class(config.type).from_pretrained
            policy = build(str(folder), config=config, local_files_only=True)
    except Exception as error:
        raise ValueError(f"lerobot cannot build the {config.type} of {folder} ({one_line(error)}).") from None
    if config.type in STEERABLE:  # its names for openpi's tensors
        stored = policy._fix_pytorch_state_dict_keys(stored, config)
        stored = {k if k.startswith("model.") else f"model.{k}": v for k, v in stored.items()}
    own = policy.state_dict()
    held = {own[k].data_ptr() for k in stored if k in own}
    for name in sorted(own.keys() | stored.keys()):
        if name not in stored and own[name].data_ptr() in held:
            continue  # tied to a tensor that the file has
        if name not in own or name not in stored or own[name].shape != stored[name].shape:
            raise ValueError(f"{file} does not fit a {config.type} policy: see its tensor {name}.")
        if not torch.equal(own[name].cpu(), stored[name].to(own[name].dtype)):
            raise ValueError(f"lerobot did not load the tensor {name} of {file}.")
    return policy.eval().requires_grad_(False)


def dct_basis(modes, action_dim, steps, width):
    """Orthonormal: the first DCT-II modes along time of each real action dimension. -> (modes · action_dim,
    steps, width). ValueError for more modes than steps."""
    if modes > steps:
        fewer = f"a chunk has {steps} steps, fewer than the {modes} modes that --pi0.latent dct steers"
        raise ValueError(f"{fewer}: give --pi0.latent full.")
    time, mode = (torch.arange(steps) + 0.5) / steps, torch.arange(modes)
    norms = torch.where(mode == 0, 1.0, 2.0)[:, None].div(steps).sqrt()
    waves = norms * torch.cos(math.pi * mode[:, None] * time)  # (modes, steps)
    basis = torch.zeros(modes, action_dim, steps, width)
    for a in range(action_dim):
        basis[:, a, :, a] = waves
    return basis.flatten(0, 1)


def stack(observations):
    """Dicts of arrays, however deep -> one dict of arrays (B, …)."""
    if isinstance(observations[0], dict):
        return {key: stack([o[key] for o in observations]) for key in observations[0]}
    return np.stack(observations)
