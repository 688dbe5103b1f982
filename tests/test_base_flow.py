"""The embedded base: what it loads, what it refuses, and what its latents do."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from base_flow import FlowBase
from env_aloha import Simulator

WEIGHTS = Path(__file__).parents[1] / "weights" / "aloha.safetensors"


@pytest.fixture(scope="module")
def base():
    return FlowBase.load(WEIGHTS, task="aloha")


def test_header_says_how_it_was_made_and_what_it_reaches(base):
    text = json.dumps(base.header)
    for word in ("tools/demo_aloha.py", "tools/clone_base.py", "success", "zero"):
        assert word in text
    assert base.latent_dim == 24 and base.state_dim == 21 and base.chunk_steps == 40


def test_a_missing_shipped_base_names_its_own_fix():
    path = WEIGHTS.with_name("libero_moved.safetensors")
    with pytest.raises(ValueError, match="clone_base.py --task libero_moved --overwrite"):
        FlowBase.load(path)


def test_frozen(base):
    assert not base.training and not any(p.requires_grad for p in base.parameters())


def test_to_noise_is_standard_normal_for_any_number_of_steered_components(base):
    """D12: the first k come from the actor, the rest from N(0, I), so N(0, I) stays N(0, I)."""
    for k in (1, 8, 24):
        x = torch.randn(20_000, k)
        w = base.to_noise(x, torch.Generator().manual_seed(1))
        assert torch.equal(w[:, :k], x)
        assert w.mean(0).abs().max() < 0.04 and (torch.cov(w.T) - torch.eye(24)).abs().max() < 0.06
    with pytest.raises(ValueError):
        base.to_noise(torch.randn(2, 25))


def test_decode_against_a_plain_euler_loop_and_numpy_interpolation(base):
    s, context = base.encode(torch.randn(3, 21) * base.state_std + base.state_mean)
    w = torch.randn(3, 24)
    y = w.clone()
    for k in range(base.flow_steps):
        y = y + base.velocity(y, torch.full((3,), k / base.flow_steps), s) / base.flow_steps
    knots = (base.chunk_mean.flatten() + y @ base.chunk_basis.flatten(1)).view(3, -1, 14).numpy()
    times = np.linspace(0, 40, knots.shape[1])
    expected = np.stack([np.stack([np.interp(np.arange(40), times, knots[b, :, a]) for a in range(14)], 1) for b in range(3)])
    np.testing.assert_allclose(base.decode(context, w).numpy(), expected, atol=1e-4)


def test_latents_choose_the_grasp(base):
    """At an episode's start one and the same state leads to a level or a downward wrist, by the noise alone (D14)."""
    observation = Simulator().reset(np.array([0.1, 0.5, 0.05, 1, 0, 0, 0]))[1]
    s, context = base.encode(torch.tensor(observation, dtype=torch.float32).expand(256, -1))
    actions = base.decode(context, torch.randn(256, 24, generator=torch.Generator().manual_seed(0)))
    pitch = actions[:, -1, [8, 9, 11]].sum(1)  # shoulder, elbow and wrist angle of the right arm: the gripper's pitch
    assert pitch.std() > 0.1  # rad
    low, high = pitch.quantile(0.02), pitch.quantile(0.98)
    between = ((pitch > low + 0.35 * (high - low)) & (pitch < low + 0.65 * (high - low))).float().mean()
    assert between < 0.3  # two clusters, little between them


def damage(path, kind):
    data = WEIGHTS.read_bytes()
    if kind == "truncated":
        path.write_bytes(data[:-1000])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("not weights")
    else:
        with safe_open(WEIGHTS, "pt") as file:
            tensors, header = {k: file.get_tensor(k) for k in file.keys()}, json.loads(file.metadata()["header"])
        if kind == "nan":
            tensors["state_mean"][0] = float("nan")
        elif kind == "missing tensor":
            del tensors["state_mean"]
        elif kind == "wrong shape":
            tensors["state_mean"] = torch.zeros(3)
        elif kind == "other task":
            header["task"] = "libero"
        save_file(tensors, path, None if kind == "no header" else {"header": json.dumps(header)})


@pytest.mark.parametrize("kind", ["truncated", "empty", "text", "nan", "missing tensor", "wrong shape", "other task", "no header"])
def test_refuses_a_bad_file_in_one_sentence(tmp_path, kind):
    path = tmp_path / "bad.safetensors"
    damage(path, kind)
    with pytest.raises(ValueError) as error:
        FlowBase.load(path, task="aloha")
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_missing_file(tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        FlowBase.load(tmp_path / "nowhere.safetensors")
