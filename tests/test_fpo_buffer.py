"""The sliding window: whole iterations, their order and eviction."""

import pytest
import torch

from fpo_buffer import TrajectoryBuffer


def iteration(k, T=3, E=2):
    index = 100 * k + torch.arange(T * E).view(T, E)
    return dict(r=index.float(), x=index[..., None].expand(T, E, 4).float(), cfm_init=index.float() / 7)


def test_window_keeps_the_newest_iterations_whole():
    buffer = TrajectoryBuffer(2)
    for k in range(4):
        buffer.push(iteration(k))
    assert len(buffer) == 2
    assert buffer.flat("r").tolist() == [200, 201, 202, 203, 204, 205, 300, 301, 302, 303, 304, 305]


def test_a_sample_keeps_its_cached_loss_and_latent():
    buffer = TrajectoryBuffer(3)
    for k in range(3):
        buffer.push(iteration(k))
    torch.testing.assert_close(buffer.flat("cfm_init") * 7, buffer.flat("r"))
    torch.testing.assert_close(buffer.flat("x")[:, 3], buffer.flat("r"))


def test_bad_input():
    with pytest.raises(ValueError, match="window is 0"):
        TrajectoryBuffer(0)
    with pytest.raises(ValueError, match="share"):
        TrajectoryBuffer(1).push(dict(r=torch.zeros(3, 2), x=torch.zeros(2, 3, 4)))
