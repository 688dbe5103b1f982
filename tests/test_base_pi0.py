"""π_0 as the base, on a tiny randomly initialised one through lerobot's own classes: the cut, the noise,
strict loading, the scripts."""

import importlib.util
import shutil
import sys

import numpy as np
import pytest
import torch

import tiny_pi0
from base.pi0 import Pi0Base
from helpers import ROOT, SMALL, assert_refused, assert_same_parameters, checkpoint, here, rows, script

LEROBOT = importlib.util.find_spec("lerobot") is not None
with_lerobot = pytest.mark.skipif(
    not LEROBOT, reason="lerobot's π_0 needs Python 3.12; .ci/run tests it there"
)
CAMERAS = ("image", "image2")


def test_without_lerobot_one_sentence(tmp_path, monkeypatch):
    """Python 3.11, or 3.12 without the package: here an import that fails."""
    for name in ["lerobot", *(name for name in sys.modules if name.startswith("lerobot."))]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr("envs.aloha.opengl_problem", lambda *_: None)
    for name, *flags in (
        ("train_aloha.py", "--base", "somewhere"),
        ("train_libero.py", "--base", "somewhere"),
        ("evaluate.py", "somewhere"),
    ):
        assert_refused(here(name, tmp_path, *flags), ["--base somewhere", "lerobot", "Python 3.12"])
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    tiny_pi0.patch()
    place = tmp_path_factory.mktemp("policies")
    return {
        "pi0": tiny_pi0.make(place / "pi0"),
        "pi05": tiny_pi0.make(place / "pi05", "pi05"),
        "aloha": tiny_pi0.make(
            place / "aloha", cameras=("top",), state_dim=14, action_dim=14, n_action_steps=50
        ),
    }


def observations(n, seed=0):
    rng = np.random.default_rng(seed)
    for _ in range(n):
        pixels = {camera: rng.integers(0, 256, (56, 56, 3), dtype=np.uint8) for camera in CAMERAS}
        eef = dict(pos=rng.normal(size=3), quat=np.array([0.0, 0.6, 0.0, 0.8]), mat=np.eye(3))
        gripper, joints = (
            dict(zip(names, rng.normal(size=(2, k))))
            for k, names in ((2, ("qpos", "qvel")), (7, ("pos", "vel")))
        )
        yield dict(
            pixels=pixels, robot_state=dict(eef=eef, gripper=gripper, joints=joints), task="put it there"
        )


@with_lerobot
@pytest.mark.parametrize("kind, dtype", [("pi0", "float32"), ("pi0", "bfloat16"), ("pi05", "float32")])
def test_encode_and_decode_are_the_policys_own_call(folders, kind, dtype):
    base = Pi0Base.load(folders[kind], "libero", CAMERAS, dtype=dtype)
    first, last = observations(2)
    s, context = base.encode([first, None, last])  # the one in the middle is over
    x, free = torch.randn(3, base.latent_dim), torch.randn(3, base.free_dim)
    actions = base.decode(context, x, free)
    batch, w = base._prepare([first, last]), base.noise(x, free)
    expected = base.postprocess(base.policy.predict_action_chunk(batch, noise=w[[0, 2]]))
    assert torch.equal(actions[[0, 2]], expected[:, : base.chunk_steps].float())
    assert actions.shape == (3, 10, 7) and not actions[1].any() and not s[1].any()
    assert (actions[0] - actions[2]).abs().max() > 0.05  # the observation matters
    assert s.shape == (3, tiny_pi0.WIDTH + 8) and (s[0] - s[2]).abs().max() > 0.1
    for other in (base.decode(context, 0 * x, free), base.decode(context, x, 0 * free)):
        assert not torch.equal(actions[[0, 2]], other[[0, 2]])


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
    state = (
        np.concatenate([robot["eef"]["pos"], rotation, robot["gripper"]["qpos"]]) / 2
    )  # the tiny policy's statistics
    np.testing.assert_allclose(batch["observation.state"][0].numpy(), state, atol=1e-5)
    s, _ = base.encode([observation])
    np.testing.assert_allclose(s[0, -8:].numpy(), state, atol=1e-5)
    features = s[0, :-8]
    assert abs(features.mean()) < 1e-4 and abs(features.std(correction=0) - 1) < 1e-2


@with_lerobot
@pytest.mark.parametrize(
    "latent, options", [("dct", dict(latent_modes=1)), ("dct", dict(latent_modes=4)), ("full", {})]
)
def test_the_noise_of_a_gaussian_actor_is_gaussian(folders, latent, options):
    """With x ~ N(0, I) the frozen policy gets N(0, I), whatever is steered: mean, variance,
    covariance."""
    base = Pi0Base.load(folders["pi0"], "libero", CAMERAS, latent=latent, **options)
    n = 4000
    x, free = torch.randn(n, base.latent_dim), torch.randn(n, base.free_dim)
    w = base.noise(x, free)
    assert w.shape == (n, 50, 32) and w.dtype == torch.float32
    flat = w.flatten(1)
    assert flat.mean(0).abs().max() < 5 / n**0.5
    assert (flat.var(0) - 1).abs().max() < 6 * (2 / n) ** 0.5
    # along time in a steered dimension, and across dimensions
    some = torch.cat([w[:, :20, 0], w[:, 30, :]], 1)
    assert (torch.cov(some.T) - torch.eye(some.shape[1])).abs().max() < 6 / n**0.5
    back = flat if latent == "full" else torch.einsum("nta,dta->nd", w, base.basis)
    assert (back - x).abs().max() < 1e-4  # and the latents are in it
    assert base.free_dim == (0 if latent == "full" else 50 * 32)


@with_lerobot
def test_repeat_is_one_row(folders):
    base = Pi0Base.load(folders["pi0"], "libero", CAMERAS, latent="repeat")
    w = base.noise(x := torch.randn(3, 32), torch.zeros(3, 0))
    assert (base.latent_dim, base.free_dim) == (32, 0) and torch.equal(w, x[:, None].expand(3, 50, 32))


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

    def cut(folder):
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:5000])

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
    """What the policy is told of a pose, and what it commands for it, are the same pose for gym-aloha."""
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
    observation = dict(
        pixels=dict(top=np.zeros((56, 56, 3), np.uint8)),
        agent_pos=pose.numpy().astype(float),
        task="Transfer cube",
    )
    assert torch.allclose(base._prepare([observation])["observation.state"][0], seen / 2, atol=1e-5)
    s, context = base.encode([observation])
    x, free = torch.randn(1, base.latent_dim), torch.randn(1, base.free_dim)
    with_convention = base.decode(context, x, free)
    base.openpi = None
    plain = base.decode(context, x, free)
    assert torch.equal(with_convention[..., 1], -plain[..., 1]) and torch.equal(
        with_convention[..., 0], plain[..., 0]
    )


# ---- the scripts, on real rendered environments ----

PLAY = [*SMALL, *"--rollout-decisions 2 --eval-episodes 1 --no-anneal".split()]


def tiny(name, cwd, *flags):
    """A script with the widths of the tiny π_0."""
    return script("tests/tiny_pi0.py", cwd, ROOT / name, *flags, timeout=600)


@with_lerobot
@pytest.mark.slow
def test_libero_with_resume(folders, tmp_path):
    """Two iterations, of which the second is done again from the checkpoint of the first."""
    suite = ["--suite", "libero_spatial", "--task-ids", 0]  # 220 control steps an episode, the fewest
    flags = [*suite, "--base", folders["pi0"], "--pi0.chunk-steps", 50, "--eval-every", 200, *PLAY]
    whole = tiny("train_libero.py", tmp_path, *flags, "--total-env-steps", 400, "--run-name", "whole")
    assert whole.returncode == 0, whole.stderr
    assert "fixed" in whole.stdout
    folder = tmp_path / "runs" / "parts"
    shutil.copytree(tmp_path / "runs" / "whole", folder)
    assert [int(row["charts/env_steps"]) for row in rows(folder / "metrics.csv")] == [200, 400]
    shutil.copy(folder / "step00000200.pt", folder / "last.pt")
    rest = tiny("train_libero.py", tmp_path, "--resume", "runs/parts")
    assert rest.returncode == 0, rest.stderr
    assert_same_parameters(checkpoint(tmp_path / "runs" / "whole"), checkpoint(folder))


@with_lerobot
@pytest.mark.slow
def test_aloha_with_resume_and_evaluation_of_the_checkpoint(folders, tmp_path):
    policy = ["--base", folders["aloha"], "--pi0.openpi-aloha"]
    flags = [*PLAY, "--total-env-steps", 200, "--run-name", "whole"]
    first = tiny("train_aloha.py", tmp_path, *policy, *flags)
    assert first.returncode == 0, first.stderr
    rest = tiny("train_aloha.py", tmp_path, "--resume", "runs/whole", "--total-env-steps", 400)
    assert rest.returncode == 0, rest.stderr
    metrics = rows(tmp_path / "runs" / "whole" / "metrics.csv")
    assert [int(row["charts/env_steps"]) for row in metrics] == [200, 400]
    flags = ["--episodes", 1, "--device", "cpu", "--run-name", "again"]
    again = tiny("evaluate.py", tmp_path, "runs/whole/last.pt", *flags)
    assert again.returncode == 0, again.stderr
    table = rest.stdout[rest.stdout.index("\n success") :]
    assert "tuned" in table and table in again.stdout
    other = ["--base", ROOT / "weights" / "aloha.safetensors"]
    result = here("evaluate.py", tmp_path, "runs/whole/last.pt", *other, "--device", "cpu")
    assert_refused(result, ["openpi", "no π_0"])


@with_lerobot
@pytest.mark.slow
def test_the_benchmark_runs(folders, tmp_path):
    flags = ["pi0", "--policy", folders["pi0"], "--batches", 1, 3, "--repeat", 1]
    result = tiny("tools/bench.py", tmp_path, *flags)
    assert result.returncode == 0, result.stderr
    for words in ("naive form", "| 3 |", "matrix rate", "bandwidth"):
        assert words in result.stdout
    # as a user starts it, without tiny_pi0.py, which imports what knows the type "pi0"
    (tmp_path / "no_weights").mkdir()
    shutil.copy(folders["pi0"] / "config.json", tmp_path / "no_weights")
    plain = script("tools/bench.py", tmp_path, "pi0", "--policy", tmp_path / "no_weights")
    assert_refused(plain, ["model.safetensors is missing"])


@with_lerobot
@pytest.mark.slow
def test_the_best_constant_latent_of_a_pi0_can_be_looked_for(folders, tmp_path):
    """Without a search, for one takes 144 episodes: zero latents, the base, and a state's second try."""
    flags = ["--task", "aloha", "--base", folders["aloha"], "--total-env-steps", 0, "--best-of", 2]
    result = tiny("tools/constant_latent.py", tmp_path, *flags, "--episodes", 1, "--out", "found.csv")
    assert result.returncode == 0, result.stderr
    found = rows(tmp_path / "found.csv")
    assert [row["policy"] for row in found] == ["zero latents", "base", "best of 2"]
    assert {row["episodes"] for row in found} == {"1"}


@with_lerobot
@pytest.mark.slow
def test_any_other_policy_can_be_evaluated_and_not_trained(tmp_path):
    """ACT, as small as it gets, under the same protocol: one column, that of the base."""
    from lerobot.configs import FeatureType, PolicyFeature
    from lerobot.policies.factory import get_policy_class, make_policy_config, make_pre_post_processors

    features = {
        "observation.images.top": PolicyFeature(type=FeatureType.VISUAL, shape=(3, 64, 64)),
        "observation.state": PolicyFeature(type=FeatureType.STATE, shape=(14,)),
    }
    config = make_policy_config(
        "act",
        input_features=features,
        output_features={"action": PolicyFeature(type=FeatureType.ACTION, shape=(14,))},
        device="cpu",
        chunk_size=100,
        n_action_steps=100,
        dim_model=32,
        n_heads=2,
        dim_feedforward=32,
        n_encoder_layers=1,
        n_decoder_layers=1,
        use_vae=False,
        pretrained_backbone_weights=None,
    )
    still = torch.tensor([0, -0.96, 1.16, 0, -0.3, 0, 0] * 2)
    stats = {
        "action": dict(mean=still, std=torch.full((14,), 1e-3)),
        "observation.state": dict(mean=still, std=torch.ones(14)),
        "observation.images.top": dict(mean=torch.zeros(3, 1, 1), std=torch.ones(3, 1, 1)),
    }
    for part in (get_policy_class("act")(config), *make_pre_post_processors(config, dataset_stats=stats)):
        part.save_pretrained(tmp_path / "act")
    flags = ["--episodes", 1, "--device", "cpu", "--num-workers", 1, "--run-name", "act"]
    result = tiny("evaluate.py", tmp_path, "act", *flags)
    assert result.returncode == 0, result.stderr
    assert "base" in result.stdout and "zero latents" not in result.stdout
    refused = here("train_aloha.py", tmp_path, "--base", "act", "--device", "cpu")
    assert_refused(refused, ["evaluate.py", "act"])
