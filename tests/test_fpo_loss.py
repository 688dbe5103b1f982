"""Eq. 2-4: the gradient identity of D1, the floor of D2, the stabilisers of D4, and that FPO alone learns a bandit."""

import pytest
import torch

from fpo_actor import FlowActor, draw_flow_noise
from fpo_loss import fpo_loss, ratio_from_cfm


@pytest.mark.parametrize("sigma_floor", [1e-8, 10.0])
def test_gradient_identity_d1(sigma_floor):
    """∇L = (β / σn) Σ m ρ A ∇ℓ, with the sum on the right written out from detached numbers; autograd on the left."""
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

    a = (adv - adv.mean()) / adv.std(correction=0)
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
    """D2: exactly zero with cached draws, no NaN, and a gradient that is neither infinite nor nothing."""
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
    assert info["ratio_mean"] == 1 and info["floor_share"] == 1


def test_ratio_is_eq_3_and_blind_to_shift_and_scale():
    delta = torch.randn(50)
    rho, _ = ratio_from_cfm(delta, 0.3, 1e-8)
    torch.testing.assert_close(rho, torch.exp(0.3 * (delta - delta.mean()) / delta.std(correction=0)))
    torch.testing.assert_close(ratio_from_cfm(5 * delta - 7, 0.3, 1e-8)[0], rho)  # D4
    torch.testing.assert_close(ratio_from_cfm(delta, 0.3, 1e-8, "raw")[0], delta.exp())


def test_an_unknown_ratio_is_refused():
    with pytest.raises(ValueError, match="'raws'"):
        ratio_from_cfm(torch.zeros(2), beta=0.2, sigma_floor=0.02, ratio="raws")


def test_wrong_shapes_and_missing_anchors_are_refused():
    """A column of advantages would silently make a (B, B) surrogate."""
    cfm, adv = torch.rand(4), torch.randn(4)
    with pytest.raises(ValueError, match=r"\(4, 1\)"):
        fpo_loss(cfm, cfm, adv[:, None], beta=0.2, clip_eps=0.2, sigma_floor=0.02)
    for anchor in ("velocity_anchor", "prior_anchor"):
        with pytest.raises(ValueError, match=anchor):
            fpo_loss(cfm, cfm, adv, beta=0.2, clip_eps=0.2, sigma_floor=0.02, **{anchor: 0.1})


def test_ages_are_standardised_apart():
    """D10: an offset between the iterations of the window leaves no trace in z."""
    age = torch.tensor([0, 1]).repeat_interleave(30)
    delta = torch.randn(60)
    z = ratio_from_cfm(delta, 0.2, 1e-8, age=age)[0].log() / 0.2
    torch.testing.assert_close(ratio_from_cfm(delta + 9 * age, 0.2, 1e-8, age=age)[0].log() / 0.2, z, atol=1e-4, rtol=0)
    torch.testing.assert_close(z[:30].mean(), torch.tensor(0.0), atol=1e-5, rtol=0)


def test_clipped_surrogate_by_hand():
    """Eq. 4 on two samples with A = ±1 after standardising and Δ = ±1, so z = ±1 and ρ = e^±β."""
    cfm_init, beta = torch.zeros(2), 0.5
    loss = lambda cfm, **flags: fpo_loss(cfm, cfm_init, torch.tensor([1.0, -1.0]), beta, 0.2, 1e-8, **flags)[0].item()
    up, down = 2.718281828**beta, 2.718281828**-beta
    assert loss(torch.tensor([-1.0, 1.0])) == pytest.approx(-(1.2 - 0.8) / 2, abs=1e-5)  # both clipped
    assert loss(torch.tensor([-1.0, 1.0]), clip=False) == pytest.approx(-(up - down) / 2, abs=1e-5)
    assert loss(torch.tensor([1.0, -1.0])) == pytest.approx(-(down - up) / 2, abs=1e-5)  # the pessimistic side: no clip


def test_stabilisers():
    cfm_init, adv = torch.rand(30), torch.randn(30)
    cfm = (cfm_init + 0.1 * torch.randn(30)).requires_grad_()
    plain, _ = fpo_loss(cfm, cfm_init, adv, 0.2, 0.2, 5.0)
    anchored, _ = fpo_loss(cfm, cfm_init, adv, 0.2, 0.2, 5.0, self_anchor=2.0)
    torch.testing.assert_close(anchored - plain, 2.0 * 0.2 / 5.0 * cfm.mean())
    prior = torch.rand(30)
    with_prior, _ = fpo_loss(cfm, cfm_init, adv, 0.2, 0.2, 5.0, prior_anchor=3.0, cfm_prior=prior)
    torch.testing.assert_close(with_prior - plain, 3.0 * 0.2 / 5.0 * prior.mean())

    with_velocity, _ = fpo_loss(cfm, cfm_init, adv, 0.2, 0.2, 5.0, velocity_anchor=3.0, departure=prior)
    torch.testing.assert_close(with_velocity - plain, 3.0 * 0.2 / 5.0 * prior.mean())

    far = (cfm_init + 1.0).requires_grad_()  # every loss has risen by 1
    capped, _ = fpo_loss(far, cfm_init, adv, 0.2, 0.2, 5.0, loss_cap=0.5)
    (gradient,) = torch.autograd.grad(capped, far)
    a = adv - adv.mean()
    assert (gradient[a < 0] == 0).all() and (gradient[a > 0] != 0).all()


def test_advantage_limit_leaves_no_negative_weight():
    """D4: with κ = limit = 1 the gradient of every sample's own loss is at least zero, however rare the failures."""
    cfm_init = torch.rand(100)
    cfm = cfm_init.clone().requires_grad_()
    adv = torch.zeros(100)
    adv[:5] = -1.0  # 5 % failures: standardised, they weigh -4.4
    weight = lambda limit: torch.autograd.grad(fpo_loss(cfm, cfm_init, adv, 0.2, 0.2, 1.0, self_anchor=1.0, advantage_limit=limit)[0], cfm)[0]
    assert weight(0.0)[:5].max() < -3 * 0.2 / 100 and weight(1.0).min() >= 0
    torch.testing.assert_close(weight(1.0)[5:], weight(0.0)[5:])


def test_advantage_floor_keeps_small_advantages_small():
    """D4: the weight of a sample is Â/max(σ_A, floor): what stays under the floor keeps its size, what lies above is standardised as before."""
    cfm_init = torch.rand(100)
    cfm = cfm_init.clone().requires_grad_()
    adv = torch.randn(100)
    adv = (adv - adv.mean()) / adv.std(correction=0)
    weight = lambda adv, **flags: torch.autograd.grad(fpo_loss(cfm, cfm_init, adv, 0.2, 0.2, 1.0, **flags)[0], cfm)[0]
    torch.testing.assert_close(weight(0.02 * adv, advantage_floor=0.1), 0.2 * 0.2 / 100 * adv)  # 0.02/0.1 of β/(σ n) Â
    torch.testing.assert_close(weight(0.3 * adv, advantage_floor=0.1), weight(0.3 * adv))
    assert weight(torch.full((100,), 0.5), advantage_floor=0.1).abs().max() < 1e-6  # nothing to tell the samples apart: no step


def test_self_anchor_has_no_gradient_where_the_actor_fits_its_own_samples():
    """D4: at the initial actor, x ~ N(0, I) is on-policy, and the expected gradient of ℓ vanishes."""
    actor = FlowActor(2, 3, hidden=16)
    torch.nn.init.zeros_(actor.out.weight)
    s, x = torch.zeros(200_000, 2), torch.randn(200_000, 3)
    loss = actor.cfm_loss(x, s, *draw_flow_noise(200_000, 1, 3)).mean()
    bias = torch.autograd.grad(loss, actor.out.bias)[0]
    assert bias.abs().max() < 0.02  # a shifted law has a gradient of the size of its shift
    shifted = actor.cfm_loss(x + 0.5, s, *draw_flow_noise(200_000, 1, 3)).mean()
    assert torch.autograd.grad(shifted, actor.out.bias)[0].abs().min() > 0.2


def test_fpo_alone_moves_the_prior_to_the_rewarded_half_plane():
    """A bandit: reward 1 where x_0 > 0.5 (31 % of N(0, I)). FPO lifts it above 80 %; shuffled advantages do not."""

    def train(shuffle):
        torch.manual_seed(1)
        actor, s = FlowActor(1, 2, hidden=32, blocks=1), torch.zeros(256, 1)
        optimizer = torch.optim.Adam(actor.parameters(), 3e-4)
        for _ in range(40):
            x = actor.sample(s, 8)
            r = (x[:, 0] > 0.5).float()
            adv = r[torch.randperm(256)] if shuffle else r
            u, eps = draw_flow_noise(256, 8, 2)
            with torch.no_grad():
                cfm_init = actor.cfm_loss(x, s, u, eps)
            for _ in range(4):
                loss, _ = fpo_loss(actor.cfm_loss(x, s, u, eps), cfm_init, adv, 0.2, 0.2, 0.2, self_anchor=1.0)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return (actor.sample(torch.zeros(4000, 1), 8)[:, 0] > 0.5).float().mean().item()

    assert train(shuffle=False) > 0.8
    assert train(shuffle=True) < 0.45
