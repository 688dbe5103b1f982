"""π_0 as the base, on a tiny randomly initialised one through lerobot's own classes: the cut, the noise, strict loading, both scripts."""

import csv
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny_pi0
from base_pi0 import Pi0Base

ROOT = Path(__file__).parents[1]
LEROBOT = importlib.util.find_spec("lerobot") is not None
with_lerobot = pytest.mark.skipif(not LEROBOT, reason="lerobot's π_0 needs Python 3.12; .ci/run tests it there")
CAMERAS = ("image", "image2")


def test_without_lerobot_one_sentence(tmp_path):
    """Python 3.11, or 3.12 without the package: here an import that fails."""
    script = "import sys; sys.modules['lerobot'] = None; import runpy; runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    for name in ("train_aloha.py", "train_libero.py"):
        command = [sys.executable, "-c", script, str(ROOT / name), "--base", "pi0", "--checkpoint", "somewhere"]
        environment = dict(PYTHONPATH=str(ROOT), PATH="", OMP_NUM_THREADS="1", HOME=str(tmp_path))
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, timeout=120)
        assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
        assert "lerobot" in result.stderr and "Python 3.12" in result.stderr


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    tiny_pi0.patch()
    place = tmp_path_factory.mktemp("policies")
    return {
        "pi0": tiny_pi0.make(place / "pi0"),
        "pi05": tiny_pi0.make(place / "pi05", "pi05"),
        "aloha": tiny_pi0.make(place / "aloha", cameras=("top",), state_dim=14, action_dim=14, n_action_steps=50),
    }


def observations(n, seed=0):
    rng = np.random.default_rng(seed)
    for _ in range(n):
        pixels = {camera: rng.integers(0, 256, (56, 56, 3), dtype=np.uint8) for camera in CAMERAS}
        eef = dict(pos=rng.normal(size=3), quat=np.array([0.0, 0.6, 0.0, 0.8]), mat=np.eye(3))
        gripper, joints = (dict(zip(names, rng.normal(size=(2, k)))) for k, names in ((2, ("qpos", "qvel")), (7, ("pos", "vel"))))
        yield dict(pixels=pixels, robot_state=dict(eef=eef, gripper=gripper, joints=joints), task="put it there")


@with_lerobot
@pytest.mark.parametrize("kind, dtype", [("pi0", "float32"), ("pi0", "bfloat16"), ("pi05", "float32")])
def test_encode_and_decode_are_the_policys_own_call(folders, kind, dtype):
    base = Pi0Base.load(folders[kind], "libero", CAMERAS, dtype=dtype)
    first, last = observations(2)
    s, context = base.encode([first, None, last])  # the one in the middle is over
    w = base.to_noise(torch.randn(3, base.latent_dim))
    actions = base.decode(context, w)
    batch = base._prepare([first, last])
    expected = base.postprocess(base.policy.predict_action_chunk(batch, noise=w[[0, 2]]))
    assert torch.equal(actions[[0, 2]], expected[:, : base.chunk_steps].float())
    assert actions.shape == (3, 10, 7) and not actions[1].any() and not s[1].any()
    assert (actions[0] - actions[2]).abs().max() > 0.05  # the observation matters
    assert s.shape == (3, tiny_pi0.WIDTH + 8) and (s[0] - s[2]).abs().max() > 0.1
    assert not torch.equal(actions[[0, 2]], base.decode(context, base.to_noise(torch.zeros(3, base.latent_dim)))[[0, 2]])


@with_lerobot
def test_images_and_state_arrive_as_lerobot_wants_them(folders):
    """LIBERO's pictures are turned by 180°, and the quaternion becomes a rotation vector."""
    base = Pi0Base.load(folders["pi0"], "libero", CAMERAS)
    (observation,) = observations(1)
    batch = base._prepare([observation])
    picture = observation["pixels"]["image"][::-1, ::-1].transpose(2, 0, 1) / 255
    np.testing.assert_allclose(batch["observation.images.image"][0].numpy(), picture, atol=1e-6)
    robot = observation["robot_state"]
    rotation = np.array([0, 2 * np.arccos(0.8), 0])
    state = np.concatenate([robot["eef"]["pos"], rotation, robot["gripper"]["qpos"]]) / 2  # the tiny policy's statistics
    np.testing.assert_allclose(batch["observation.state"][0].numpy(), state, atol=1e-5)
    s, _ = base.encode([observation])
    np.testing.assert_allclose(s[0, -8:].numpy(), state, atol=1e-5)
    features = s[0, :-8]
    assert abs(features.mean()) < 1e-4 and abs(features.std(correction=0) - 1) < 1e-2


@with_lerobot
@pytest.mark.parametrize("latent, options", [("dct", dict(latent_modes=1)), ("dct", dict(latent_modes=4)), ("full", {})])
def test_the_noise_of_a_gaussian_actor_is_gaussian(folders, latent, options):
    """D12: with x ~ N(0, I) the frozen policy gets N(0, I), whatever is steered: mean, variance, covariance."""
    base = Pi0Base.load(folders["pi0"], "libero", CAMERAS, latent=latent, **options)
    n = 4000
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, base.latent_dim, generator=generator)
    for k in (base.latent_dim, base.latent_dim // 2):  # --latent-dim: the others come from the generator
        w = base.to_noise(x[:, :k], generator)
        assert w.shape == (n, 50, 32) and w.dtype == torch.float32
        flat = w.flatten(1)
        assert flat.mean(0).abs().max() < 5 / n**0.5
        assert (flat.var(0) - 1).abs().max() < 6 * (2 / n) ** 0.5
        some = torch.cat([w[:, :20, 0], w[:, 30, :]], 1)  # along time in a steered dimension, and across dimensions
        assert (torch.cov(some.T) - torch.eye(some.shape[1])).abs().max() < 6 / n**0.5
    back = torch.einsum("nta,dta->nd", base.to_noise(x, generator), base.basis)
    assert (back - x).abs().max() < 1e-4  # and the latents are in it


@with_lerobot
def test_repeat_is_one_row(folders):
    base = Pi0Base.load(folders["pi0"], "libero", CAMERAS, latent="repeat")
    w = base.to_noise(x := torch.randn(3, 32))
    assert base.latent_dim == 32 and torch.equal(w, x[:, None].expand(3, 50, 32))


@with_lerobot
def test_lerobot_goes_on_with_random_weights_and_we_do_not(folders, tmp_path):
    from lerobot.configs import PreTrainedConfig
    from lerobot.policies.pi0 import PI0Policy
    from safetensors.torch import load_file, save_file

    def broken(name, change):
        folder = tmp_path / name
        shutil.copytree(folders["pi0"], folder)
        change(folder)
        return folder

    def without_a_tensor(folder):
        tensors = load_file(folder / "model.safetensors")
        tensors.pop("model.action_out_proj.weight")
        save_file(tensors, folder / "model.safetensors")

    def of_another_shape(folder):
        tensors = load_file(folder / "model.safetensors")
        tensors["model.state_proj.bias"] = torch.zeros(3)
        save_file(tensors, folder / "model.safetensors")

    cut = lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:5000])
    cases = [
        (broken("absent", lambda f: (f / "model.safetensors").unlink()), "missing or damaged"),
        (broken("key", without_a_tensor), "action_out_proj"),
        (broken("shape", of_another_shape), "state_proj"),
        (broken("cut", cut), "missing or damaged"),
        (broken("config", lambda f: (f / "config.json").write_text("{")), "config.json"),
        (broken("tokenizer", lambda f: (f / "policy_preprocessor.json").unlink()), "processors"),
        (tmp_path / "nowhere", "neither a folder nor"),
    ]
    config = PreTrainedConfig.from_pretrained(str(cases[0][0]))
    config.device = "cpu"
    policy = PI0Policy.from_pretrained(str(cases[0][0]), config=config, local_files_only=True)
    assert isinstance(policy, PI0Policy)  # no file, no error: random weights
    for folder, words in cases:
        with pytest.raises(ValueError, match=words) as error:
            Pi0Base.load(folder, "libero", CAMERAS)
        assert "\n" not in str(error.value)


@with_lerobot
def test_cameras_must_meet(folders):
    with pytest.raises(ValueError, match="pictures"):
        Pi0Base.load(folders["aloha"], "libero", CAMERAS)


@with_lerobot
def test_openpis_convention_there_and_back(folders):
    """What the policy is told of a pose, and what it commands for that pose, are the same pose for gym-aloha."""
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

    base = Pi0Base.load(folders["aloha"], "aloha", ("top",), openpi_aloha=True)
    pose = torch.linspace(-0.8, 0.9, 14)
    pose[[6, 13]] = torch.tensor([0.2, 0.7])
    seen = SmolVLAPolicy._pi_aloha_decode_state(None, pose[None].clone())[0]
    joints = [i for i in range(14) if i not in (6, 13)]
    signs = torch.ones(14)
    signs[[1, 2, 8, 9]] = -1
    assert torch.equal(seen[joints], (signs * pose)[joints])
    command = SmolVLAPolicy._pi_aloha_encode_actions(None, seen[None, None].clone())[0, 0]
    assert torch.allclose(command[joints], pose[joints])
    inverse = SmolVLAPolicy._pi_aloha_encode_actions_inv(None, command[None, None].clone())[0, 0]
    assert torch.allclose(inverse, seen, atol=1e-5)
    # and in the base: state before normalisation, actions after
    observation = dict(pixels=dict(top=np.zeros((56, 56, 3), np.uint8)), agent_pos=pose.numpy().astype(float), task="Transfer cube")
    assert torch.allclose(base._prepare([observation])["observation.state"][0], seen / 2, atol=1e-5)
    s, context = base.encode([observation])
    with_convention = base.decode(context, w := base.to_noise(torch.randn(1, base.latent_dim)))
    base.openpi = None
    plain = base.decode(context, w)
    assert torch.equal(with_convention[..., 1], -plain[..., 1]) and torch.equal(with_convention[..., 0], plain[..., 0])


# ---- the train scripts, on real rendered environments ----

SMALL = ("--num-envs 2 --num-workers 2 --rollout-decisions 2 --critic-warmup 1 --critic-steps 2 --actor-states 3 --fresh-latents 2 "
         "--num-critics 2 --eval-episodes 1 --device cpu --seed 3 --window 2 --no-anneal-lr").split()  # fmt: skip


def train(script, cwd, *flags):
    command = [sys.executable, str(ROOT / "tests" / "tiny_pi0.py"), str(ROOT / script), *map(str, flags)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600)


@with_lerobot
def test_two_iterations_on_libero_with_evaluation_and_resume(folders, tmp_path):
    flags = ["--base", "pi0", "--checkpoint", folders["pi0"], "--chunk-steps", 50, "--eval-every", 10**9, *SMALL]
    whole = train("train_libero.py", tmp_path, *flags, "--total-env-steps", 400, "--run-name", "whole")
    assert whole.returncode == 0, whole.stderr
    assert "gain over base" in whole.stdout
    with open(tmp_path / "runs" / "whole" / "metrics.csv", newline="") as file:
        assert [int(row["charts/env_steps"]) for row in csv.DictReader(file)] == [200, 400]
    parts = train("train_libero.py", tmp_path, *flags, "--total-env-steps", 200, "--run-name", "parts")
    assert parts.returncode == 0, parts.stderr
    rest = train("train_libero.py", tmp_path, "--resume", "runs/parts", "--total-env-steps", 400)
    assert rest.returncode == 0, rest.stderr
    a, b = (torch.load(tmp_path / "runs" / name / "last.pt", weights_only=True) for name in ("whole", "parts"))
    for part in ("actor", "critic"):
        assert all(torch.equal(a[part][k], b[part][k]) for k in a[part])


@with_lerobot
def test_two_iterations_on_aloha_with_resume_and_evaluation_of_the_checkpoint(folders, tmp_path):
    policy = ["--base", "pi0", "--weights", folders["aloha"], "--openpi-aloha"]
    first = train("train_aloha.py", tmp_path, *policy, *SMALL, "--total-env-steps", 200, "--run-name", "whole")
    assert first.returncode == 0, first.stderr
    rest = train("train_aloha.py", tmp_path, "--resume", "runs/whole", "--total-env-steps", 400)
    assert rest.returncode == 0, rest.stderr
    assert "gain over base" in rest.stdout
    with open(tmp_path / "runs" / "whole" / "metrics.csv", newline="") as file:
        assert [int(row["charts/env_steps"]) for row in csv.DictReader(file)] == [200, 400]
    flags = ["--eval-only", "--eval-episodes", 1, "--checkpoint", "runs/whole/last.pt", "--device", "cpu", "--run-name", "again"]
    again = train("train_aloha.py", tmp_path, *policy, *flags)
    assert again.returncode == 0 and "tuned" in again.stdout, again.stderr
    other = train("train_aloha.py", tmp_path, *flags[:-1], "other")
    assert other.returncode == 2 and "another base" in other.stderr  # the embedded one


@with_lerobot
def test_the_benchmark_runs(folders, tmp_path):
    result = train("tools/bench_pi0.py", tmp_path, "--policy", folders["pi0"], "--batches", 1, 3, "--repeat", 1, "--no-compile")
    assert result.returncode == 0, result.stderr
    for words in ("naive form", "| 3 |", "matrix rate", "bandwidth", "update"):
        assert words in result.stdout
    nowhere = train("tools/bench_pi0.py", tmp_path, "--policy", tmp_path / "nowhere")
    assert nowhere.returncode == 2 and "--policy" in nowhere.stderr and "Traceback" not in nowhere.stderr
    # as a user starts it, without tiny_pi0.py, which imports what knows the type "pi0"
    (tmp_path / "no_weights").mkdir()
    shutil.copy(folders["pi0"] / "config.json", tmp_path / "no_weights")
    command = [sys.executable, ROOT / "tools" / "bench_pi0.py", "--policy", tmp_path / "no_weights"]
    plain = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert plain.returncode == 2 and "model.safetensors is missing" in plain.stderr, plain.stderr


@with_lerobot
def test_any_other_policy_can_be_evaluated_and_not_trained(tmp_path):
    """ACT, as small as it gets, under the same protocol: one column, that of the base."""
    from lerobot.configs import FeatureType, PolicyFeature
    from lerobot.policies.factory import get_policy_class, make_policy_config, make_pre_post_processors

    features = {"observation.images.top": PolicyFeature(type=FeatureType.VISUAL, shape=(3, 64, 64)),
                "observation.state": PolicyFeature(type=FeatureType.STATE, shape=(14,))}  # fmt: skip
    config = make_policy_config(
        "act", input_features=features, output_features={"action": PolicyFeature(type=FeatureType.ACTION, shape=(14,))}, device="cpu",
        chunk_size=100, n_action_steps=100, dim_model=32, n_heads=2, dim_feedforward=32, n_encoder_layers=1, n_decoder_layers=1,
        use_vae=False, pretrained_backbone_weights=None,
    )  # fmt: skip
    still = torch.tensor([0, -0.96, 1.16, 0, -0.3, 0, 0] * 2)
    stats = {"action": dict(mean=still, std=torch.full((14,), 1e-3)), "observation.state": dict(mean=still, std=torch.ones(14)),
             "observation.images.top": dict(mean=torch.zeros(3, 1, 1), std=torch.ones(3, 1, 1))}  # fmt: skip
    for part in (get_policy_class("act")(config), *make_pre_post_processors(config, dataset_stats=stats)):
        part.save_pretrained(tmp_path / "act")
    flags = ["--base", "pi0", "--checkpoint", "act", "--device", "cpu", "--num-workers", 1]
    result = train("train_aloha.py", tmp_path, *flags, "--eval-only", "--eval-episodes", 1, "--run-name", "act")
    assert result.returncode == 0, result.stderr
    assert "base" in result.stdout and "zero latents" not in result.stdout
    refused = train("train_aloha.py", tmp_path, *flags)
    assert refused.returncode == 2 and "--eval-only" in refused.stderr and "Traceback" not in refused.stderr
