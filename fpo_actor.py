"""The flow actor of FPO: a small flow-matching policy π_θ(x | s) over latent chunks x.

Implements: the velocity field v_θ(x, u | s), sampling (Algorithm 1, line 7), Eq. 7 (multi-step latent
exploration) and the per-sample conditional flow-matching (CFM) loss ℓ_cfm(x | s; θ) behind Eq. 2. Needs torch
only.

    import torch; from fpo_actor import FlowActor, draw_flow_noise
    actor = FlowActor(state_dim=21, latent_dim=24)
    s = torch.randn(8, 21)
    x = actor.sample(s, flow_steps=8)                          # (8, 24), N(0, I) before any training
    u, eps = draw_flow_noise(8, 16, 24)                        # draw once, keep with the sample
    cfm = actor.cfm_loss(x, s, u, eps)                         # (8,), differentiable in θ

Flow time u runs from noise (0) to data (1): x_u = (1 - u) ε + u x, with target velocity x - ε.
"""

import math

import torch
from torch import nn


def draw_flow_noise(batch, num_draws, latent_dim, generator=None, device=None):
    """Draws for the CFM loss: u (batch, N), one in each N-th of [0, 1] for less variance; ε (batch, N, D).

    ℓ_cfm is an expectation over u and ε. Eq. 2 subtracts two losses of the *same* sample, so both must use
    the same draws, or their noise drowns the difference: draw once per sample, use for θ_old and for θ.
    """
    offset = torch.rand(batch, num_draws, generator=generator, device=device)
    u = (torch.arange(num_draws, device=device) + offset) / num_draws
    eps = torch.randn(batch, num_draws, latent_dim, generator=generator, device=device)
    return u, eps


def gaussian_velocity(u):
    """Factor c(u) of the flow-matching optimum v*(x, u) = c(u) x for data x ~ N(0, I).

    c(u) = (2u - 1) / ((1 - u)² + u²); its CFM loss is π/2 a dimension, the least that any field can have.
    """
    return (2 * u - 1) / ((1 - u) ** 2 + u**2)


class FlowActor(nn.Module):
    """Velocity field v_θ(x, u | s) = c(u) x + net(x, u, s), net zero at the start.

    So the untrained actor samples exactly N(0, I), the noise that the frozen base was trained with, and its
    CFM loss is already optimal for that. Shapes: x (B, D), u (B,), s (B, S).
    """

    def __init__(self, state_dim, latent_dim, hidden=128, blocks=2):
        super().__init__()
        self.state_dim, self.latent_dim = state_dim, latent_dim
        # u enters as sines and cosines with periods of 2, 1, … 1/16
        self.register_buffer("frequencies", math.pi * 2.0 ** torch.arange(6), persistent=False)
        self.inp = nn.Linear(latent_dim + state_dim + 2 * len(self.frequencies), hidden)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(hidden), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, hidden)
            )
            for _ in range(blocks)
        )
        self.out = nn.Linear(hidden, latent_dim)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def net(self, x, u, s):
        """The learned part of the velocity. x: (B, D), u: (B,), s: (B, S) -> (B, D)."""
        angles = u[:, None] * self.frequencies
        h = self.inp(torch.cat([x, s, angles.sin(), angles.cos()], -1))
        for block in self.blocks:
            h = h + block(h)
        return self.out(nn.functional.silu(h))

    def velocity(self, x, u, s):
        """v_θ(x, u | s). x: (B, D), u: (B,), s: (B, S) -> (B, D)."""
        return gaussian_velocity(u)[:, None] * x + self.net(x, u, s)

    @torch.no_grad()
    def sample(self, s, flow_steps, generator=None, noise=None):
        """Sample latent chunks x ~ π_θ(· | s). s: (B, S) -> x: (B, D). Algorithm 1, lines 7 and 18.

        noise: (B, D), where the flow starts; drawn from N(0, I) if left out.

        With tan α = u / (1 - u) and g = √((1-u)² + u²), the linear part c(u) x of the field only scales x by
        g, and dx/du = v_θ becomes d(x/g)/dα = g net, from α = 0 to π/2. Each of a few equal steps in α takes
        the net at its middle, reached with the slope of the step before. Any N(m, I) comes out exactly. Four
        Euler steps of v_θ would shrink N(0, I) to 0.72 of it; an actor that learns from its own samples
        repeats such an error until it diverges.
        """
        y, step, slope = noise, math.pi / 2 / flow_steps, 0.0  # y = x / g, g = 1 at both ends
        if y is None:
            y = torch.randn(len(s), self.latent_dim, generator=generator, device=s.device)
        for k in range(flow_steps):
            alpha = (k + 0.5) * step
            g = 1 / (math.cos(alpha) + math.sin(alpha))
            u = torch.full((len(s),), g * math.sin(alpha), device=s.device)
            slope = g * self.net(g * (y + step / 2 * slope), u, s)
            y = y + 2 * math.sin(step / 2) * slope  # ∫ cos α dα over the step, over cos α at its middle
        return y

    @torch.no_grad()
    def explore(self, x, s, explore_steps, explore_eta):
        """Eq. 7: x^(k+1) = x^(k) + η v_θ(x^(k), τ^(k) | s) for k < K. x: (B, D), s: (B, S) -> x^(K): (B, D).

        x^(0) is at u = 1 already; the field at flow time τ^(k) moves it on, and nothing random is added. The
        paper leaves the grid open; here τ^(k) = (k + 1)/K.
        """
        for k in range(explore_steps):
            tau = torch.full((len(x),), (k + 1) / explore_steps, device=x.device)
            x = x + explore_eta * self.velocity(x, tau, s)
        return x

    def cfm_loss(self, x, s, u, eps):
        """ℓ_cfm(x | s; θ) of Eq. 2 from given draws: the mean over N and D of |v_θ(x_u, u | s) - (x - ε)|².

        x: (B, D), s: (B, S), u: (B, N), eps: (B, N, D) -> ℓ (B,), differentiable in θ.
        """
        B, N, D = eps.shape
        x = x[:, None].expand(B, N, D)
        x_u = (1 - u[..., None]) * eps + u[..., None] * x  # (B, N, D)
        s = s[:, None].expand(B, N, -1)
        v = self.velocity(x_u.flatten(0, 1), u.flatten(), s.flatten(0, 1)).view(B, N, D)
        return (v - (x - eps)).square().mean((1, 2))
