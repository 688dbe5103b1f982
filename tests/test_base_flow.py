"""The embedded base: what it loads, what it refuses, and what its latents do."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from scipy import stats

from base.flow import FlowBase
from envs.aloha import Simulator

WEIGHTS = Path(__file__).parents[1] / "weights" / "aloha.safetensors"


@pytest.fixture(scope="module")
def base():
    return FlowBase.load(WEIGHTS, task="aloha")


def test_header_says_how_it_was_made_and_what_it_reaches(base):
    text = json.dumps(base.header)
    for word in ("tools/demo_aloha.py", "tools/clone_base.py", "success", "zero"):
        assert word in text
    assert base.latent_dim == 24 and base.state_dim == 21 and base.chunk_steps == 40


@pytest.mark.parametrize(
    "suite, tasks, dim",  # of s: an old base sees the 59 numbers alone, a newer one four waves of 49 too
    [
        ("libero_spatial", 10, 59 + 4 * 49),
        ("libero_object", 10, 59 + 4 * 49),
        ("libero_goal", 6, 59),
        ("libero_10", 6, 59),
    ],
)
def test_every_suite_has_a_base(suite, tasks, dim):
    path = WEIGHTS.with_name(f"{suite}.safetensors")
    base = FlowBase.load(path, task=suite)
    assert len(base.header["task_ids"]) == tasks
    assert all(encoded.shape == (1, dim) for encoded in base.encode(torch.zeros(1, 59)))
    assert path.stat().st_size < 2.5e6


def test_sines_show_a_centimetre():
    base = FlowBase.load(WEIGHTS.with_name("libero_object.safetensors"))
    observation = base.state_mean.repeat(2, 1)
    observation[1, 1] += 0.01  # the hand, 1 cm to the side
    s, context = base.encode(observation)
    normalised = ((observation - base.state_mean) / base.state_std).numpy()
    few = normalised[:, :49]  # all but the task's one-hot
    waves = [np.sin(4 * few), np.cos(4 * few), np.sin(16 * few), np.cos(16 * few)]
    np.testing.assert_allclose(s, np.concatenate([normalised, *waves], 1), atol=1e-6)
    assert (s[1] - s[0]).norm() > 5 * np.linalg.norm(normalised[1] - normalised[0])
    assert context is s


def test_a_missing_shipped_base_names_its_own_fix():
    path = WEIGHTS.with_name("libero_moved.safetensors")
    with pytest.raises(ValueError, match="clone_base.py --task libero_moved --overwrite"):
        FlowBase.load(path)


def test_frozen(base):
    assert not base.training and not any(p.requires_grad for p in base.parameters())


def test_decode_against_a_plain_euler_loop_and_numpy_interpolation(base):
    s, context = base.encode(torch.randn(3, 21) * base.state_std + base.state_mean)
    w = torch.randn(3, 24)
    y = w.clone()
    for k in range(base.flow_steps):
        y = y + base.velocity(y, torch.full((3,), k / base.flow_steps), s) / base.flow_steps
    knots = (base.chunk_mean.flatten() + y @ base.chunk_basis.flatten(1)).view(3, -1, 14).numpy()
    times = np.linspace(0, 40, knots.shape[1])
    steps = np.arange(40)
    expected = [[np.interp(steps, times, knots[b, :, a]) for a in range(14)] for b in range(3)]
    expected = np.swapaxes(expected, 1, 2)
    np.testing.assert_allclose(base.decode(context, w).numpy(), expected, atol=1e-4)


def test_the_first_latent_chooses_the_grasp_wherever_the_cube_lies(base):
    """At an episode's start the lowest third of w_0 begins a slide, the rest a hook, in every state and
    whatever the other latents."""
    places = [(x, y) for x in np.linspace(0.01, 0.19, 5) for y in np.linspace(0.41, 0.59, 5)]
    simulator = Simulator()
    observations = [simulator.reset(np.array([x, y, 0.05, 1, 0, 0, 0]))[1] for x, y in places]
    observations = np.array(observations).repeat(40, 0)
    w = torch.randn(len(observations), 24, generator=torch.Generator().manual_seed(0))
    # of the right gripper: a slide comes nearly closed
    opening = base.decode(base.encode(observations)[1], w)[:, 20, 13]
    hook, border = opening > 0.55, torch.special.ndtri(torch.tensor(1 / 3))
    assert ((opening - 0.55).abs() > 0.15).float().mean() > 0.98  # hardly anything between the two
    clear = (w[:, 0] - border).abs() > 0.15
    assert torch.equal(hook[clear], (w[:, 0] > border)[clear])


def test_paired_noise_is_standard_normal_and_tells_the_behaviour():
    sys.path.insert(0, str(WEIGHTS.parents[1] / "tools"))
    from clone_base import paired_noise

    torch.manual_seed(0)
    behaviour = torch.tensor([-1, 0, 1, 1]).repeat(20_000)  # -1: not paired
    w = paired_noise((80_000, 4), behaviour)
    # the normal distribution's lowest third
    assert w[behaviour == 0, 0].max() < -0.4307 < w[behaviour == 1, 0].min() + 1e-3
    # with the second twice as frequent the two make N(0, I) again
    for rows in (w[behaviour >= 0], w[behaviour < 0]):
        for k in range(4):
            assert stats.kstest(rows[:, k].numpy(), "norm").pvalue > 1e-3


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
            tensors = {k: file.get_tensor(k) for k in file.keys()}
            header = json.loads(file.metadata()["header"])
        if kind == "nan":
            tensors["state_mean"][0] = float("nan")
        elif kind == "missing tensor":
            del tensors["state_mean"]
        elif kind == "wrong shape":
            tensors["state_mean"] = torch.zeros(3)
        elif kind == "other task":
            header["task"] = "libero"
        save_file(tensors, path, None if kind == "no header" else {"header": json.dumps(header)})


KINDS = ["truncated", "empty", "text", "nan", "missing tensor", "wrong shape", "other task", "no header"]


@pytest.mark.parametrize("kind", KINDS)
def test_refuses_a_bad_file_in_one_sentence(tmp_path, kind):
    path = tmp_path / "bad.safetensors"
    damage(path, kind)
    with pytest.raises(ValueError) as error:
        FlowBase.load(path, task="aloha")
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_missing_file(tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        FlowBase.load(tmp_path / "nowhere.safetensors")
