"""The critics of FPO: an ensemble Q_φi(s, x), i = 1 … M, and what the algorithm derives from it.

Implements: Eq. 5 (TD target with the minimum over the target critics; the clamp and n decisions are ours),
Eq. 6 (squared TD error), the Polyak update, the draw of states and the advantages of fresh latents among
themselves; for executed latents a conservative V(s) and generalized advantage estimation (GAE). Needs torch
only.

    import torch; from fpo_critic import QEnsemble, critic_loss, polyak_update, td_target
    critic, target = QEnsemble(21, 24, num_critics=5), QEnsemble(21, 24, num_critics=5)
    target.load_state_dict(critic.state_dict())
    s, x = torch.randn(8, 21), torch.randn(8, 24)
    r, discount, terminated = torch.zeros(8), torch.full((8,), 0.96), torch.zeros(8)
    y = td_target(target, r, discount, terminated, s_next=s, x_next=x)
    critic_loss(critic, s, x, y).backward()
    polyak_update(target, critic, tau=0.05)

One transition is one decision: a latent chunk that ran h' control steps. Its reward is Σ_{j<h'} γ^j r_j, its
bootstrap factor `discount` = γ^h'. A success terminates, and so does a crash of the physics, with reward 0; a
time limit only truncates. `terminated` and `ended` are floats, 1 or 0.
"""

import torch
from torch import nn


class EnsembleLinear(nn.Module):
    """M independent linear layers as one batched product: (M, B, in) -> (M, B, out)."""

    def __init__(self, num_critics, n_in, n_out):
        super().__init__()
        bound = n_in**-0.5  # torch.nn.Linear's own initialisation
        self.weight = nn.Parameter(torch.empty(num_critics, n_in, n_out).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(num_critics, 1, n_out).uniform_(-bound, bound))

    def forward(self, h):
        return torch.baddbmm(self.bias, h, self.weight)


class EnsembleLayerNorm(nn.Module):
    """M independent layer norms: (M, B, n) -> (M, B, n)."""

    def __init__(self, num_critics, n):
        super().__init__()
        self.n = n
        self.weight = nn.Parameter(torch.ones(num_critics, 1, n))
        self.bias = nn.Parameter(torch.zeros(num_critics, 1, n))

    def forward(self, h):
        return torch.addcmul(self.bias, nn.functional.layer_norm(h, (self.n,)), self.weight)


class QEnsemble(nn.Module):
    """Q_φi(s, x) for i = 1 … M in one batched computation. s: (B, S), x: (B, D) -> (M, B).

    LayerNorm keeps TD learning stable at high learning rates; a zero output layer starts every Q at 0.
    """

    def __init__(self, state_dim, latent_dim, num_critics, hidden=128):
        super().__init__()
        self.num_critics = num_critics
        self.layers = nn.Sequential(
            EnsembleLinear(num_critics, state_dim + latent_dim, hidden),
            EnsembleLayerNorm(num_critics, hidden),
            nn.SiLU(),
            EnsembleLinear(num_critics, hidden, hidden),
            EnsembleLayerNorm(num_critics, hidden),
            nn.SiLU(),
            EnsembleLinear(num_critics, hidden, 1),
        )
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)

    def forward(self, s, x):
        h = torch.cat([s, x], -1)  # (B, S + D)
        h = h.expand(self.num_critics, *h.shape)  # (M, B, S + D)
        return self.layers(h).squeeze(-1)  # (M, B, 1) -> (M, B)


@torch.no_grad()
def td_target(target, r, discount, terminated, s_next, x_next, within=None):
    """Eq. 5: y = r + discount (1 - terminated) min_i Q_φ̄i(s', x') with x' ~ π_θ(· | s').

    s_next: (B, S), x_next: (B, D), the others (B,) -> y: (B,). discount: γ^h', or of `n_step`. `within`: the
    least and the greatest return that there can be; y is kept between them. The least of M critics lies
    below their mean, and by the bootstrap that adds up, target by target, until Q is below any return.
    """
    y = r + discount * (1 - terminated) * target(s_next, x_next).min(0).values
    return y if within is None else y.clamp(*within)


def n_step(r, discount, ended, num_envs, n):
    """What Eq. 5 takes for r, γ^h' and s' over n decisions: y = R + G (1 - terminated) min_i Q_φ̄i(s', x').

    r, discount, ended: (W T E,), as the buffer's `flat` has them: num_envs rows on is an environment's next
    decision. -> R (W T E,), the discounted sum of n rewards; G (W T E,), the product of n discounts; end
    (W T E,), the row whose s' and `terminated` belong to them. Fewer than n decisions count where the episode
    ends or the rows do. For n > 1 the rewards are those of the actors of then; nothing corrects for that.
    """
    R, G, end = r.clone(), discount.clone(), torch.arange(len(r), device=r.device)
    goes_on, here = ended[:-num_envs] == 0, end[:-num_envs].clone()
    for _ in range(n - 1):
        R[:-num_envs] = r[:-num_envs] + discount[:-num_envs] * goes_on * R[num_envs:]
        G[:-num_envs] = discount[:-num_envs] * torch.where(goes_on, G[num_envs:], 1)
        end[:-num_envs] = torch.where(goes_on, end[num_envs:], here)
    return R, G, end


def critic_loss(critic, s, x, y):
    """Eq. 6: (Q_φi(s, x) - y)², averaged over the batch and summed over the M members.

    s: (B, S), x: (B, D), y: (B,) -> a scalar.
    """
    return (critic(s, x) - y).square().mean(1).sum()


@torch.no_grad()
def polyak_update(target, critic, tau):
    """φ̄ ← (1 - τ) φ̄ + τ φ, once a gradient step (Algorithm 1, line 21)."""
    for slow, fast in zip(target.parameters(), critic.parameters()):
        slow.lerp_(fast, tau)


def q_of_latents(critic, s, x_fresh):
    """Q_φi(s, x̃_j) of J latents of every state. s: (B, S), x_fresh: (B, J, D) -> (M, B, J)."""
    B, J, _ = x_fresh.shape
    return critic(s[:, None].expand(B, J, -1).flatten(0, 1), x_fresh.flatten(0, 1)).view(-1, B, J)


@torch.no_grad()
def fresh_value(critic, s, x_fresh):
    """V(s) = mean_j min_i Q_φi(s, x̃_j) over J fresh latents x̃_j ~ π_θ(· | s).

    s: (B, S), x_fresh: (B, J, D) -> (B,). With the stored latent V(s) would equal Q(s, x), and at Q = Q^π
    advantages would be 0 on average.
    """
    return q_of_latents(critic, s, x_fresh).min(0).values.mean(1)


@torch.no_grad()
def latent_advantage(critic, s, x_fresh, floor=0.05):
    """Advantages of J latents of a state among themselves: (Q(s, x̃_j) - mean_j Q) / (std_j Q + floor).

    s: (B, S), x_fresh: (B, J, D) -> (B, J). Q is the mean of the ensemble: the least would reward latents for
    the critics' agreement. floor, in units of the return: where the critics see little difference between the
    latents the advantages are small.
    """
    q = q_of_latents(critic, s, x_fresh).mean(0)
    return (q - q.mean(1, keepdim=True)) / (q.std(1, correction=0, keepdim=True) + floor)


@torch.no_grad()
def draw_states(critic, s, pair, num, generator=None):
    """Draw states in proportion to |Q(s, x̃_1) - Q(s, x̃_2)|: those at which the choice of a latent decides.

    s: (B, S), pair: (B, 2, D), two fresh latents each -> the indices of num different rows, num <= B. Q is
    the mean of the ensemble. Without replacement: no row is over-sampled by more than B/num.
    So a state counts by how far its latents differ in Q, which `latent_advantage` divides out.
    """
    apart = q_of_latents(critic, s, pair).mean(0).diff(dim=1).abs().squeeze(1)
    apart = apart.nan_to_num(0.0, 0.0)  # a Q that has overflowed is for the caller to notice
    return torch.multinomial(apart + 1e-6, num, generator=generator)


def gae(r, v, v_next, discount, terminated, ended, gae_lambda):
    """Generalized advantage estimation over decisions (Algorithm 1, line 26).

    All, and Â, (T, E): T decisions, one after the other, in each column.

        δ_t = r_t + γ^h' (1 - terminated_t) V(s_{t+1}) - V(s_t),   Â_t = δ_t + γ^h' λ (1 - ended_t) Â_{t+1}

    v_next is the value of the state really reached, before any reset. terminated: no bootstrap. ended =
    terminated or truncated: the sum stops, for the next row belongs to another episode.
    """
    delta = r + discount * (1 - terminated) * v_next - v
    adv = torch.zeros_like(delta)
    tail = torch.zeros_like(delta[0])
    for t in reversed(range(len(delta))):
        tail = delta[t] + discount[t] * gae_lambda * (1 - ended[t]) * tail
        adv[t] = tail
    return adv
