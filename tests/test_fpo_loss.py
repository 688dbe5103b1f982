"""Eq. 2-4: the gradient identity, σ's floor, the fit of own latents, and that FPO alone learns a bandit."""

import math

import pytest
import torch

from fpo_actor import FlowActor, draw_flow_noise
from fpo_loss import fpo_loss, ratio_from_cfm


@pytest.mark.parametrize("sigma_floor", [1e-8, 10.0])
def test_gradient_identity_d1(sigma_floor):
    """∇L = (β / σn) Σ m ρ A ∇ℓ, with the sum on the right written out from detached numbers; autograd on the
    left."""
    actor = FlowActor(3, 4, hidden=16)
    s, x, adv = torch.randn(40, 3), torch.randn(40, 4), torch.randn(40)
    u, eps = draw_flow_noise(40, 4, 4)
    cfm_init = actor.cfm_loss(x, s, u, eps).detach()
    for p in actor.parameters():
        p.data += 0.02 * torch.randn_like(p)
    cfm = actor.cfm_loss(x, s, u, eps)
    beta, clip_eps = 0.2, 0.1
    loss, info = fpo_loss(cfm, cfm_init, adv, beta, clip_eps, sigma_floor)
    left = torch.autograd.grad(loss, actor.parameters(), retain_graph=True)

    a = adv
    delta = (cfm_init - cfm).detach()
    sigma = max(delta.std(correction=0).item(), sigma_floor)
    rho = torch.exp(beta * (delta - delta.mean()) / sigma)
    active = ((a > 0) & (rho > 1 + clip_eps)) | ((a < 0) & (rho < 1 - clip_eps))
    if sigma_floor < 1:
        assert active.any() and not active.all()  # the clip must matter for the test to say something
    right = torch.autograd.grad((beta / sigma / 40 * (~active) * rho * a * cfm).sum(), actor.parameters())
    for one, other in zip(left, right):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert info["clip_fraction"].item() == pytest.approx(active.float().mean().item())


def test_at_theta_old_the_difference_is_zero_and_the_gradient_finite():
    """Exactly zero with cached draws, no NaN, and a gradient that is neither infinite nor nothing."""
    actor = FlowActor(3, 4)
    s, x = torch.randn(20, 3), torch.randn(20, 4)
    u, eps = draw_flow_noise(20, 8, 4)
    with torch.no_grad():
        cfm_init = actor.cfm_loss(x, s, u, eps)
    cfm = actor.cfm_loss(x, s, u, eps)
    assert torch.equal(cfm.detach(), cfm_init)
    loss, info = fpo_loss(cfm, cfm_init, torch.randn(20), 0.2, 0.2, 2 * 0.2 / 4)
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in actor.parameters()])
    assert gradient.isfinite().all() and gradient.abs().sum() > 0
    rho, _ = ratio_from_cfm(cfm_init - cfm, 0.2, 2 * 0.2 / 4)
    assert torch.equal(rho, torch.ones(20)) and info["floor_share"] == 1


def test_ratio_is_eq_3_and_blind_to_shift_and_scale():
    delta = torch.randn(50)
    rho, _ = ratio_from_cfm(delta, 0.3, 1e-8)
    torch.testing.assert_close(rho, torch.exp(0.3 * (delta - delta.mean()) / delta.std(correction=0)))
    torch.testing.assert_close(ratio_from_cfm(5 * delta - 7, 0.3, 1e-8)[0], rho)


def test_wrong_shapes_are_refused():
    """A column of advantages would silently make a (B, B) surrogate."""
    cfm, adv = torch.rand(4), torch.randn(4)
    with pytest.raises(ValueError, match=r"\(4, 1\)"):
        fpo_loss(cfm, cfm, adv[:, None], beta=0.2, clip_eps=0.2, sigma_floor=0.02)


def test_clipped_surrogate_by_hand():
    """Eq. 4 on two samples with A = ±1 and Δ = ±1, so z = ±1 and ρ = e^±β."""
    cfm_init, beta = torch.zeros(2), 0.5

    def loss(cfm, eps=0.2):
        return fpo_loss(cfm, cfm_init, torch.tensor([1.0, -1.0]), beta, eps, 1e-8)[0].item()

    up, down = 2.718281828**beta, 2.718281828**-beta
    assert loss(torch.tensor([-1.0, 1.0])) == pytest.approx(-(1.2 - 0.8) / 2, abs=1e-5)  # both clipped
    assert loss(torch.tensor([-1.0, 1.0]), math.inf) == pytest.approx(-(up - down) / 2, abs=1e-5)
    # the pessimistic side: no clip
    assert loss(torch.tensor([1.0, -1.0])) == pytest.approx(-(down - up) / 2, abs=1e-5)


def test_with_the_own_latents_fitted_the_update_is_a_weighted_regression():
    """Without a clip, (κ + A)-weighted: where the latents of one place share a velocity v, it moves to their
    mean with the weights κ + A. Here v itself is the parameter, and ρ is linear in Δ near θ_old."""
    v_old, own, kappa = torch.randn(1, 4, 3), torch.randn(5, 4, 3), 2.0
    adv = torch.tensor([1.0, 0.5, 0.0, -0.5, -1.0])
    v = v_old.clone().requires_grad_()

    def cfm(v):
        return (v - own).square().mean((1, 2))

    optimizer = torch.optim.Adam([v], 0.01)
    for _ in range(2000):
        # a wide floor: the slope is β/σ everywhere
        loss, info = fpo_loss(cfm(v), cfm(v_old), adv, 0.2, math.inf, 1e3)
        loss = loss / info["slope"] + kappa * cfm(v).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    weights = (kappa + adv)[:, None, None]
    expected = (weights * own).sum(0, keepdim=True) / weights.sum()
    torch.testing.assert_close(v.detach(), expected, atol=2e-3, rtol=0)


def test_fpo_alone_moves_the_prior_to_the_rewarded_half_plane():
    """A bandit: reward 1 where x_0 > 0.5 (31 % of N(0, I)). FPO lifts it above 80 %; shuffled advantages do
    not."""

    def train(shuffle):
        torch.manual_seed(1)
        actor, s = FlowActor(1, 2, hidden=32, blocks=1), torch.zeros(256, 1)
        optimizer = torch.optim.Adam(actor.parameters(), 3e-4)
        for _ in range(40):
            x = actor.sample(s, 8)
            r = (x[:, 0] > 0.5).float()
            adv = r[torch.randperm(256)] if shuffle else r
            adv = ((adv - adv.mean()) / adv.std()).clamp_min(-1)
            u, eps = draw_flow_noise(256, 8, 2)
            with torch.no_grad():
                cfm_init = actor.cfm_loss(x, s, u, eps)
            for _ in range(4):
                cfm = actor.cfm_loss(x, s, u, eps)
                loss, info = fpo_loss(cfm, cfm_init, adv, 0.2, 0.2, 0.2)
                loss = loss + 0.5 * info["slope"] * cfm.mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return (actor.sample(torch.zeros(4000, 1), 8)[:, 0] > 0.5).float().mean().item()

    assert train(shuffle=False) > 0.8
    assert train(shuffle=True) < 0.45
