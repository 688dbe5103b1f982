"""The policy loss of FPO: a PPO-style clipped surrogate whose ratio comes from the change of the CFM loss.

Implements: Eq. 2 (Δℓ), Eq. 3 (likelihood-free ratio) and Eq. 4 (clipped surrogate). Needs torch only.

    import torch; from fpo_loss import fpo_loss
    cfm_init = torch.rand(64)                                       # ℓ_cfm(x | s; θ_old), cached
    cfm = (cfm_init + 0.01 * torch.randn(64)).requires_grad_()      # ℓ_cfm(x | s; θ), with the same draws
    loss, info = fpo_loss(cfm, cfm_init, adv=torch.randn(64), beta=0.2, clip_eps=0.2, sigma_floor=0.02)
    loss.backward()

What the gradient is: with m_i = 0 where the clip is active, else 1,
    ∇L = β / (σ B) Σ_i m_i ρ_i A_i ∇ℓ_cfm(x_i | s_i; θ),
a signed, advantage-weighted flow-matching regression: latents that did better than expected are made more
likely by fitting them, the others less likely by un-fitting them.
"""

import torch


def ratio_from_cfm(delta, beta, sigma_floor):
    """Eq. 3: z = (Δ - μ) / σ, ρ = exp(β z). delta: (B,) -> ρ (B,) and σ ().

    Read literally, "stop gradients through ρ" leaves no gradient at all: here they stop at μ and σ only.
    At θ = θ_old Δ is 0, up to rounding, and z is 0/0, so σ is at least sigma_floor. At a floor of 2β/D
    ρ is exp(½ D (Δ - μ)), and D Δ, summed over the dimensions of x, is on average π/2 times the log ratio
    of two unit Gaussians.
    """
    mu, sigma = delta.detach().mean(), delta.detach().std(correction=0).clamp_min(sigma_floor)
    return torch.exp(beta * (delta - mu) / sigma), sigma


def fpo_loss(cfm, cfm_init, adv, beta, clip_eps, sigma_floor):
    """Eq. 4 with Eq. 2 and Eq. 3. cfm, cfm_init, adv: (B,) -> the scalar loss and a dict of logs.

    cfm: ℓ_cfm(x | s; θ), with gradient. cfm_init: the same draws under θ_old. adv: advantages, used as
    they are. beta, sigma_floor: of Eq. 3, see ratio_from_cfm. clip_eps: ε of Eq. 4; math.inf leaves the clip
    out. info["slope"] is β/σ, the factor that Eq. 3 puts before ∇ℓ: multiply by it what is added to the loss
    and shall count like an advantage. Raises ValueError where cfm, cfm_init and adv differ in shape.
    """
    if not cfm.shape == cfm_init.shape == adv.shape:  # (B,) and (B, 1) would make (B, B) of Eq. 4
        raise ValueError(
            "cfm, cfm_init and adv must share one shape (B,); got "
            f"{[tuple(t.shape) for t in (cfm, cfm_init, adv)]}"
        )
    delta = cfm_init - cfm  # Eq. 2: positive where the actor now fits the sample better
    rho, sigma = ratio_from_cfm(delta, beta, sigma_floor)  # Eq. 3
    plain, clipped = rho * adv, rho.clamp(1 - clip_eps, 1 + clip_eps) * adv
    loss = -torch.min(plain, clipped).mean()  # Eq. 4
    with torch.no_grad():
        info = dict(
            slope=beta / sigma,
            surrogate=loss.detach(),
            clip_fraction=(clipped < plain).float().mean(),
            floor_share=(sigma <= sigma_floor).float(),  # 1: z is divided by the floor, 0: by σ
            cfm_loss=cfm.mean(),
        )
    return loss, info
