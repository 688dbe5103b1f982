"""The policy loss of FPO: a PPO-style clipped surrogate whose ratio comes from the change of the CFM loss.

Implements: Eq. 2 (Δℓ), Eq. 3 (likelihood-free ratio), Eq. 4 (clipped surrogate) and the stabilisers that make it last
(D4), each off at 0. Needs torch only. D1 … D14: README, "What the paper leaves open".

    import torch; from fpo_loss import fpo_loss
    cfm_init = torch.rand(64)                                       # ℓ_cfm(x | s; θ_old), cached at rollout
    cfm = (cfm_init + 0.01 * torch.randn(64)).requires_grad_()      # ℓ_cfm(x | s; θ)
    loss, info = fpo_loss(cfm, cfm_init, adv=torch.randn(64), beta=0.2, clip_eps=0.2, sigma_floor=0.02)
    loss.backward()

What the gradient is (D1): with m_i = 0 where the clip is active, else 1,
    ∇L = β / (σ n) Σ_i m_i ρ_i A_i ∇ℓ_cfm(x_i | s_i; θ),
a signed, advantage-weighted flow-matching regression: latents that did better than expected are made more likely by
fitting them, the others less likely by un-fitting them.
"""

import torch


def ratio_from_cfm(delta, beta, sigma_floor, ratio="standardized", age=None):
    """Eq. 3: z = (Δ - μ) / σ, ρ = exp(β z). delta: (B,) -> ρ and σ_eff, both (B,).

    D1: read literally, "stop gradients through ρ" leaves no gradient at all. μ and σ are detached, ρ is not.
    D2: on the first minibatch Δ = 0, up to rounding, and z is 0/0, so σ_eff = max(σ, sigma_floor). sigma_floor = 2β/D makes the slope
        under the floor that of ρ = exp(½ Δ of the loss summed over the D dimensions).
    D10: `age` (B,), an integer for each sample's iteration: μ and σ are taken within samples of one age, or the age
        of a sample would decide its z. With several ages keep the floor of D2: a sample that is alone with its age has
        σ = 0, so that under a tiny floor its gradient outweighs that of all others.
    ratio="raw": ρ = exp(Δ), unstandardised (McAllister et al., arXiv 2507.21053, with Δ a mean over dimensions). Its slope is 1, so
        that σ_eff is given as β. Raises ValueError for another ratio.
    """
    if ratio not in ("standardized", "raw"):
        raise ValueError(f"ratio is {ratio!r}; it must be 'standardized' or 'raw'")
    if ratio == "raw":
        return torch.exp(delta), torch.full_like(delta, beta)
    d = delta.detach()
    age = torch.zeros_like(d) if age is None else age
    mu, sigma = torch.zeros_like(d), torch.zeros_like(d)
    for a in age.unique():
        member = age == a
        mu[member] = d[member].mean()
        sigma[member] = d[member].std(correction=0)
    sigma = sigma.clamp_min(sigma_floor)
    z = (delta - mu) / sigma
    return torch.exp(beta * z), sigma


def fpo_loss(
    cfm,
    cfm_init,
    adv,
    beta,
    clip_eps,
    sigma_floor,
    ratio="standardized",
    age=None,
    clip=True,
    advantage_floor=0.0,
    advantage_limit=0.0,
    loss_cap=0.0,
    self_anchor=0.0,
    cfm_anchor=None,
    velocity_anchor=0.0,
    departure=None,
    prior_anchor=0.0,
    cfm_prior=None,
):
    """Eq. 4 with Eq. 2 and Eq. 3, plus the stabilisers of D4. Inputs (B,), returns the scalar loss and a dict of logs.

    cfm: ℓ_cfm(x^(K) | s; θ), with gradient. cfm_init: the same draws under the actor that collected the sample.
    adv: advantages; standardised here, over the minibatch.
    beta, sigma_floor, ratio, age: of Eq. 3, see ratio_from_cfm. clip_eps, clip: ε of Eq. 4; clip=False leaves the clip out.
    advantage_floor: the advantages' standard deviation counts as at least this. Where nearly every episode succeeds, advantages are the
        critics' noise; standardising would blow it up to the size of a signal, and the actor would drift away for ever.
    advantage_limit: standardised advantages below -limit count as -limit. With limit = κ no sample's total weight
        β/σ (m ρ A + κ) is negative at ρ = 1 where x^(0) = x^(K): nothing is un-fitted, which is what inflates the latents once
        failures are rare and their standardised advantages therefore large.
    loss_cap: no push on a sample with A < 0 whose loss already exceeds the cached one by this much.
    self_anchor κ: + κ (β/σ) mean ℓ_cfm(x^(0) | s; θ), `cfm_anchor` where x^(0) differs from the executed x^(K) (D6).
        On-policy its expected gradient is zero where the actor fits its own samples, so it does not bias the policy
        gradient, but it supplies the curvature that Eq. 3 throws away: z does not change under Δ → aΔ + b, hence the
        clip cannot see how far the actor has moved.
    velocity_anchor κ_v: + κ_v (β/σ) mean |v_θ - v*|², given as `departure`: stay close to the base's prior, measured where
        the actor goes. Unlike κ_0 it does not ask for latents that have been found to fail.
    prior_anchor κ_0: + κ_0 (β/σ) mean ℓ_cfm(x ~ N(0, I) | s; θ), given as `cfm_prior`: stay on the base's support.
    Raises ValueError where cfm, cfm_init and adv differ in shape, or an anchor lacks its input.
    """
    if not cfm.shape == cfm_init.shape == adv.shape:  # (B,) and (B, 1) would make (B, B) of Eq. 4
        raise ValueError(f"cfm, cfm_init and adv must share one shape (B,); got {[tuple(t.shape) for t in (cfm, cfm_init, adv)]}")
    if (velocity_anchor > 0 and departure is None) or (prior_anchor > 0 and cfm_prior is None):
        raise ValueError("velocity_anchor needs departure, and prior_anchor needs cfm_prior")
    adv = (adv - adv.mean()) / (adv.std(correction=0) + 1e-8).clamp_min(advantage_floor)
    if advantage_limit > 0:
        adv = adv.clamp_min(-advantage_limit)
    delta = cfm_init - cfm  # Eq. 2: positive where the actor now fits the sample better
    rho, sigma = ratio_from_cfm(delta, beta, sigma_floor, ratio, age)  # Eq. 3
    clipped = rho.clamp(1 - clip_eps, 1 + clip_eps) if clip else rho
    surrogate = torch.min(rho * adv, clipped * adv)  # Eq. 4
    if loss_cap > 0:
        surrogate = torch.where((adv < 0) & (-delta.detach() > loss_cap), 0.0, surrogate)
    loss = -surrogate.mean()
    # β/σ is the factor that Eq. 3 puts before ∇ℓ: with it, κ counts in units of a standardised advantage.
    slope = beta / sigma
    if self_anchor > 0:
        loss = loss + self_anchor * (slope * (cfm if cfm_anchor is None else cfm_anchor)).mean()
    if velocity_anchor > 0:
        loss = loss + velocity_anchor * (slope * departure).mean()
    if prior_anchor > 0:
        loss = loss + prior_anchor * (slope * cfm_prior).mean()
    with torch.no_grad():
        outside = ((adv > 0) & (rho > 1 + clip_eps)) | ((adv < 0) & (rho < 1 - clip_eps))
        info = dict(
            surrogate=-surrogate.mean(),
            ratio_mean=rho.mean(),
            ratio_std=rho.std(correction=0),
            clip_fraction=outside.float().mean(),
            floor_share=(sigma <= sigma_floor).float().mean(),  # 1: Eq. 3 acts as an unstandardised ratio here (D2); of no meaning if raw
            delta_mean=delta.mean(),
            delta_std=delta.std(correction=0),
            cfm_loss=cfm.mean(),
        )
    return loss, info
