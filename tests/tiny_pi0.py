"""A tiny, randomly initialised π_0 (or π_0.5) in a folder, as `save_pretrained` leaves a real one: lerobot's
own classes, only the widths are smaller. A process that loads it must call `patch()` first, for the widths
are constants of lerobot.

    python tests/tiny_pi0.py train_libero.py --base folder …     # run a script with the widths patched
"""

import contextlib
import io
import os
import runpy
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
WIDTH, VOCABULARY = 32, 257  # bytes, and one token that stands for an image


def patch():
    from lerobot.policies.pi0 import modeling_pi0
    from lerobot.policies.pi05 import modeling_pi05

    for module in (modeling_pi0, modeling_pi05):
        module.get_gemma_config = lambda variant, m=module: m.GemmaConfig(
            width=WIDTH, depth=2, mlp_dim=2 * WIDTH, num_heads=8, num_kv_heads=1, head_dim=8
        )
        paligemma, gemma = module.PaliGemmaForConditionalGenerationWithPiGemma, module.PiGemmaForCausalLM

        def small_paligemma(config, build=paligemma):
            config._vocab_size = config.text_config.vocab_size = VOCABULARY
            config.image_token_index = VOCABULARY - 1
            vision = config.vision_config
            vision.hidden_size, vision.intermediate_size, vision.num_hidden_layers = WIDTH, 2 * WIDTH, 1
            vision.num_attention_heads, vision.projection_dim = 2, WIDTH
            return build(config=config)

        def small_gemma(config, build=gemma):
            config.vocab_size = VOCABULARY
            return build(config=config)

        module.PaliGemmaForConditionalGenerationWithPiGemma, module.PiGemmaForCausalLM = (
            small_paligemma,
            small_gemma,
        )


def make(
    folder, kind="pi0", cameras=("image", "image2"), state_dim=8, action_dim=7, image=56, n_action_steps=10
):
    """Write the policy and its processors with a byte-level tokenizer. Needs `patch()`."""
    import torch
    from lerobot.configs import FeatureType, PolicyFeature
    from lerobot.policies.factory import get_policy_class, make_policy_config
    from lerobot.policies.pi0 import processor_pi0
    from lerobot.policies.pi05 import processor_pi05
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = Path(folder).resolve()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="!").save_pretrained(folder / "tokenizer")

    features = {
        f"observation.images.{c}": PolicyFeature(type=FeatureType.VISUAL, shape=(3, image, image))
        for c in cameras
    }
    features["observation.state"] = PolicyFeature(type=FeatureType.STATE, shape=(state_dim,))
    config = make_policy_config(
        kind,
        input_features=features,
        output_features={"action": PolicyFeature(type=FeatureType.ACTION, shape=(action_dim,))},
        device="cpu",
        image_resolution=(image, image),
        n_action_steps=n_action_steps,
        tokenizer_max_length=48,
    )
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()):
        policy = get_policy_class(kind)(config)
        # different states must give different actions, also in the first decimals
        for name, p in policy.named_parameters():
            if "action_out_proj" in name or "state_proj" in name:
                p.data.mul_(3)
        processor = {"pi0": processor_pi0, "pi05": processor_pi05}[kind]
        step = processor.TokenizerProcessorStep
        processor.TokenizerProcessorStep = lambda tokenizer_name, **options: step(
            tokenizer_name=str(folder / "tokenizer"), **options
        )
        low, high = torch.full((action_dim,), -0.5), torch.full((action_dim,), 0.5)
        stats = {
            "action": dict(
                mean=torch.linspace(-0.1, 0.1, action_dim), std=high, q01=low, q99=high, min=low, max=high
            ),
            "observation.state": dict(
                mean=torch.zeros(state_dim),
                std=torch.full((state_dim,), 2.0),
                q01=torch.full((state_dim,), -3.0),
                q99=torch.full((state_dim,), 3.0),
                min=torch.full((state_dim,), -3.0),
                max=torch.full((state_dim,), 3.0),
            ),
        }
        make_processors = getattr(processor, f"make_{kind}_pre_post_processors")
        preprocess, postprocess = make_processors(config, stats)
        processor.TokenizerProcessorStep = step
        for part in (policy, preprocess, postprocess):
            part.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    patch()
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
    runpy.run_path(sys.argv[0], run_name="__main__")
