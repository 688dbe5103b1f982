"""The flow actor: its initial law, its CFM loss, Eq. 7, and that it learns."""

import math

import numpy as np
import pytest
import torch
from flow_matching.path import CondOTProbPath
from scipy import stats

from fpo_actor import FlowActor, draw_flow_noise, gaussian_velocity


def trained_actor(state_dim, latent_dim):
    """An actor whose output layer is no longer zero."""
    actor = FlowActor(state_dim, latent_dim)
    torch.nn.init.normal_(actor.out.weight, std=0.05)
    torch.nn.init.normal_(actor.out.bias, std=0.05)
    return actor


@pytest.mark.parametrize("flow_steps", [1, 3, 8])
def test_untrained_actor_samples_standard_normal_for_any_number_of_steps(flow_steps):
    n, D = 40_000, 6
    x = FlowActor(5, D).sample(torch.randn(n, 5), flow_steps).numpy()
    assert np.abs(x.mean(0)).max() < 4.5 / math.sqrt(n)
    assert np.abs(np.cov(x.T) - np.eye(D)).max() < 6 / math.sqrt(n)
    for d in range(D):
        assert stats.kstest(x[:, d], "norm").pvalue > 1e-4


def test_untrained_actor_returns_the_very_noise_it_drew():
    actor = FlowActor(5, 6)
    x = actor.sample(torch.randn(9, 5), 8, torch.Generator().manual_seed(3))
    noise = torch.randn(9, 6, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(x, noise, rtol=1e-5, atol=1e-5)


def test_sampling_converges_to_the_ode_of_the_velocity_field():
    """The split integrator against scipy's adaptive Runge-Kutta on the whole field."""
    from scipy.integrate import solve_ivp

    actor, s = trained_actor(4, 3), torch.randn(1, 4)
    noise = torch.randn(1, 3, generator=torch.Generator().manual_seed(1))

    def field(u, x):
        with torch.no_grad():
            return actor.velocity(
                torch.tensor(x[None], dtype=torch.float32), torch.tensor([u], dtype=torch.float32), s
            )[0].numpy()

    exact = solve_ivp(field, (0, 1), noise[0].numpy(), rtol=1e-8, atol=1e-8).y[:, -1]
    errors = [
        np.abs(actor.sample(s, k, torch.Generator().manual_seed(1))[0].numpy() - exact).max()
        for k in (16, 64, 512)
    ]
    assert errors[1] < errors[0] / 8 and errors[2] < 1e-4  # second order: 16 times less


@pytest.mark.parametrize("std", [1.0, 0.7, 0.4])
def test_four_steps_keep_mean_and_spread_of_a_gaussian(std):
    """The exact field of N(m, std²), for which sampling is x = m + std noise."""
    actor = FlowActor(1, 2)
    mean = torch.tensor([1.5, -0.5])

    def net(x, u, s):
        u = u[:, None]
        slope = (std**2 * u - (1 - u)) / ((1 - u) ** 2 + std**2 * u**2)
        return slope * (x - u * mean) + mean - gaussian_velocity(u) * x

    actor.net = net
    noise = torch.randn(5000, 2)
    x = actor.sample(torch.zeros(5000, 1), 4, noise=noise)
    a, b = np.polyfit(noise[:, 0].numpy(), x[:, 0].numpy(), 1)
    assert b == pytest.approx(1.5, rel=0.03 if std < 1 else 1e-4) and a == pytest.approx(std, rel=0.05)


def test_initial_cfm_loss_is_the_optimum_pi_half():
    actor, s, x = FlowActor(3, 8), torch.randn(4000, 3), torch.randn(4000, 8)
    u, eps = draw_flow_noise(4000, 16, 8)
    assert abs(actor.cfm_loss(x, s, u, eps).mean().item() - math.pi / 2) < 0.02  # a zero field has loss 2


def test_gaussian_velocity_is_the_conditional_expectation():
    """E[x - ε | x_u] of independent standard normals, by linear regression on samples."""
    x, eps = torch.randn(400_000), torch.randn(400_000)
    for u in (0.1, 0.5, 0.8):
        x_u = (1 - u) * eps + u * x
        slope = ((x - eps) * x_u).mean() / x_u.square().mean()
        assert abs(slope.item() - gaussian_velocity(torch.tensor(u)).item()) < 0.01


def test_cfm_loss_against_the_flow_matching_package():
    actor = trained_actor(5, 4)
    x, s = torch.randn(7, 4), torch.randn(7, 5)
    u, eps = draw_flow_noise(7, 6, 4)
    loss = actor.cfm_loss(x, s, u, eps)
    expected = torch.zeros(7)
    for k in range(6):
        sample = CondOTProbPath().sample(x_0=eps[:, k], x_1=x, t=u[:, k])
        v = actor.velocity(sample.x_t, sample.t, s)
        expected += (v - sample.dx_t).pow(2).mean(1) / 6
    torch.testing.assert_close(loss, expected)


def test_draws_are_stratified():
    u, eps = draw_flow_noise(50, 16, 3)
    assert torch.equal((u * 16).floor(), torch.arange(16.0).expand(50, 16)) and eps.shape == (50, 16, 3)


def test_cached_draws_remove_the_noise_of_the_loss_difference():
    """After a small parameter step, Δℓ with cached draws is far less noisy than with fresh ones."""
    actor = trained_actor(3, 4)
    x, s = torch.randn(1, 4).expand(300, 4), torch.randn(1, 3).expand(300, 3)
    draws, fresh = draw_flow_noise(300, 8, 4), draw_flow_noise(300, 8, 4)
    with torch.no_grad():
        before = actor.cfm_loss(x, s, *draws)
        for p in actor.parameters():
            p.add_(1e-3 * torch.randn_like(p))
        cached, other = before - actor.cfm_loss(x, s, *draws), before - actor.cfm_loss(x, s, *fresh)
    assert cached.std() < other.std() / 20


def test_explore_is_eq_7():
    actor, s, x = trained_actor(3, 4), torch.randn(5, 3), torch.randn(5, 4)
    expected = x
    for tau in (0.25, 0.5, 0.75, 1.0):
        expected = expected + 0.05 * actor.velocity(expected, torch.full((5,), tau), s)
    torch.testing.assert_close(actor.explore(x, s, 4, 0.05), expected.detach())
    torch.testing.assert_close(actor.explore(x, s, 0, 0.05), x)


def test_explore_on_the_gaussian_field():
    """With K = 1 a latent of N(0, I) becomes longer by 1 + η."""
    actor, s, x = FlowActor(3, 50), torch.randn(2000, 3), torch.randn(2000, 50)
    assert (actor.explore(x, s, 1, 0.05).norm(dim=1) / x.norm(dim=1)).mean().item() == pytest.approx(
        1.05, abs=1e-5
    )


def test_learns_a_known_two_dimensional_distribution():
    """Flow matching on two moons of Gaussians at (±2, 0), width 0.3: means, spread and shares come out."""
    actor = FlowActor(1, 2, hidden=128)
    optimizer = torch.optim.Adam(actor.parameters(), 2e-3)
    for _ in range(1200):
        side = (torch.rand(256) < 0.7).float() * 2 - 1  # 70 % right
        x = torch.stack([2 * side + 0.3 * torch.randn(256), 0.3 * torch.randn(256)], 1)
        loss = actor.cfm_loss(x, torch.zeros(256, 1), *draw_flow_noise(256, 1, 2)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x = actor.sample(torch.zeros(8000, 1), 32)
    right = x[:, 0] > 0
    assert abs(right.float().mean().item() - 0.7) < 0.06
    assert abs(x[right, 0].mean().item() - 2) < 0.12 and abs(x[~right, 0].mean().item() + 2) < 0.12
    assert 0.2 < x[right, 0].std().item() < 0.45 and 0.2 < x[:, 1].std().item() < 0.45
