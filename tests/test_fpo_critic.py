"""The critics: Eq. 5 and 6 by hand, the batched ensemble against separate networks, GAE against brute
force."""

import numpy as np
import pytest
import torch
from torch import nn

from fpo_critic import (
    QEnsemble,
    critic_loss,
    draw_states,
    fresh_value,
    gae,
    latent_advantage,
    n_step,
    polyak_update,
    td_target,
)


def ensemble(M=3):
    q = QEnsemble(4, 2, M, hidden=16)
    for p in q.parameters():
        nn.init.normal_(p, std=0.5)
    return q


def separate_networks(q):
    """The ensemble's members as ordinary torch networks with the same weights."""
    networks = []
    for m in range(q.num_critics):
        layers = []
        for layer in q.layers:
            if isinstance(layer, nn.SiLU):
                layers.append(nn.SiLU())
                continue
            if hasattr(layer, "n"):
                copy = nn.LayerNorm(layer.n)
                copy.weight.data = layer.weight.data[m, 0]
            else:
                copy = nn.Linear(*layer.weight.shape[1:])
                copy.weight.data = layer.weight.data[m].T
            copy.bias.data = layer.bias.data[m, 0]
            layers.append(copy)
        networks.append(nn.Sequential(*layers))
    return networks


def test_batched_ensemble_equals_separate_networks():
    q, s, x = ensemble(), torch.randn(9, 4), torch.randn(9, 2)
    expected = torch.stack([net(torch.cat([s, x], 1))[:, 0] for net in separate_networks(q)])
    torch.testing.assert_close(q(s, x), expected)


def test_every_q_starts_at_zero():
    assert (QEnsemble(4, 2, 3)(torch.randn(5, 4), torch.randn(5, 2)) == 0).all()


def test_td_target_by_hand():
    """Eq. 5 with constant critics Q = 3, 1, 2: the minimum is 1; a terminal state has no bootstrap."""
    q = QEnsemble(4, 2, 3)
    q.layers[-1].bias.data[:, 0, 0] = torch.tensor([3.0, 1.0, 2.0])
    y = td_target(
        q,
        torch.tensor([0.5, 0.5]),
        torch.tensor([0.9, 0.9]),
        torch.tensor([0.0, 1.0]),
        torch.randn(2, 4),
        torch.randn(2, 2),
    )
    torch.testing.assert_close(y, torch.tensor([0.5 + 0.9 * 1.0, 0.5]))


def test_td_target_stays_within_the_range_of_the_return():
    """Constant critics Q = 3, 0.3, 2 and then their negatives: what lies above 1 or below 0 is no return of
    one reward."""
    q = QEnsemble(4, 2, 3)
    q.layers[-1].bias.data[:, 0, 0] = torch.tensor([3.0, 0.3, 2.0])
    s, x, discount, terminated = (
        torch.randn(3, 4),
        torch.randn(3, 2),
        torch.full((3,), 0.9),
        torch.tensor([0.0, 1.0, 0.0]),
    )
    y = td_target(q, torch.tensor([0.5, 0.5, 0.9]), discount, terminated, s, x, within=(0, 1))
    torch.testing.assert_close(y, torch.tensor([0.5 + 0.9 * 0.3, 0.5, 1.0]))
    q.layers[-1].bias.data.neg_()
    torch.testing.assert_close(
        td_target(q, torch.zeros(3), discount, terminated, s, x, within=(0, 1)), torch.zeros(3)
    )


def test_critic_loss_is_the_squared_td_error_of_every_member():
    q, s, x, y = ensemble(), torch.randn(9, 4), torch.randn(9, 2), torch.randn(9)
    expected = sum(((net(torch.cat([s, x], 1))[:, 0] - y) ** 2).mean() for net in separate_networks(q))
    torch.testing.assert_close(critic_loss(q, s, x, y), expected)


def test_polyak_update():
    target, critic = ensemble(), ensemble()
    before = [p.clone() for p in target.parameters()]
    polyak_update(target, critic, 0.1)
    for old, new, online in zip(before, target.parameters(), critic.parameters()):
        torch.testing.assert_close(new.data, 0.9 * old + 0.1 * online.data)


def test_value_baselines():
    q, s, x = ensemble(), torch.randn(6, 4), torch.randn(6, 5, 2)
    expected = torch.stack(
        [torch.stack([q(s[b : b + 1], x[b, j : j + 1]).min() for j in range(5)]).mean() for b in range(6)]
    )
    torch.testing.assert_close(fresh_value(q, s, x), expected)


def brute_force_gae(r, v, v_next, discount, terminated, ended, gae_lambda):
    """Â_t = Σ_n w_n (n-step return) - V(s_t), each n-step return written out: the λ-return by its
    definition."""
    T, E = r.shape
    adv = np.zeros((T, E))
    for e in range(E):
        for t in range(T):
            returns, factor, total = [], 1.0, 0.0
            for k in range(t, T):
                total += factor * r[k, e]
                factor *= discount[k, e]
                returns.append(total + factor * (1 - terminated[k, e]) * v_next[k, e])
                if ended[k, e]:
                    break
            weights = [(1 - gae_lambda) * gae_lambda**n for n in range(len(returns))]
            weights[-1] = gae_lambda ** (len(returns) - 1)
            adv[t, e] = sum(w * g for w, g in zip(weights, returns)) - v[t, e]
    return adv


@pytest.mark.parametrize("gae_lambda", [0.0, 0.7, 0.95, 1.0])
def test_gae_against_brute_force_lambda_returns(gae_lambda):
    rng = np.random.default_rng(0)
    T, E = 12, 7
    terminated = (rng.random((T, E)) < 0.15).astype(float)
    truncated = (rng.random((T, E)) < 0.15) * (1 - terminated)
    ended = terminated + truncated
    r, v, v_next = rng.normal(size=(3, T, E))
    # the value of the next state is the next row's value, unless an episode ended in between
    v_next[:-1] = np.where(ended[:-1] > 0, v_next[:-1], v[1:])
    discount = 0.999 ** rng.integers(1, 41, (T, E))
    arrays = (r, v, v_next, discount, terminated, ended)
    result = gae(*(torch.tensor(a) for a in arrays), gae_lambda)
    np.testing.assert_allclose(result.numpy(), brute_force_gae(*arrays, gae_lambda), atol=1e-12)


def test_gae_never_looks_into_the_next_episode():
    ended = torch.tensor([[0.0], [1.0], [0.0], [0.0]])
    zeros, ones = torch.zeros(4, 1), torch.ones(4, 1)
    r = zeros.clone()
    r[3] = 100.0  # a reward of the second episode
    adv = gae(r, zeros, zeros, ones * 0.9, zeros, ended, 0.95)
    assert (adv[:2] == 0).all() and (adv[2:] > 0).all()


def test_critics_learn_a_known_value():
    """A chain of three decisions with reward 1 at its end: Q → γ^steps-to-go."""
    q, target = QEnsemble(3, 2, 2, hidden=32), QEnsemble(3, 2, 2, hidden=32)
    optimizer = torch.optim.Adam(q.parameters(), 1e-3)
    s, s_next = torch.eye(3), torch.eye(3)[[1, 2, 2]]
    r, terminated, discount = torch.tensor([0.0, 0, 1]), torch.tensor([0.0, 0, 1]), torch.full((3,), 0.9)
    for _ in range(1500):
        y = td_target(target, r, discount, terminated, s_next, torch.randn(3, 2))
        loss = critic_loss(q, s, torch.randn(3, 2), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        polyak_update(target, q, 0.05)
    torch.testing.assert_close(
        q(s, torch.randn(3, 2)).mean(0), torch.tensor([0.81, 0.9, 1.0]), atol=0.05, rtol=0
    )


def test_latent_advantage_by_hand():
    """Two states, three latents each: the ensemble's mean, minus the state's mean, over its standard
    deviation plus the floor."""
    q = QEnsemble(2, 4, 3)
    for p in q.parameters():
        p.data = torch.randn(p.shape)
    s, x = torch.randn(2, 2), torch.randn(2, 3, 4)
    adv = latent_advantage(q, s, x, floor=0.5)
    for i in range(2):
        values = [q(s[i : i + 1], x[i, j : j + 1]).mean().item() for j in range(3)]
        mean, std = np.mean(values), np.std(values)
        np.testing.assert_allclose(
            adv[i].numpy(), (np.array(values) - mean) / (std + 0.5), rtol=1e-4, atol=1e-5
        )
    assert latent_advantage(q, s, x[:, :1]).abs().max() == 0  # one latent alone is neither good nor bad


@pytest.mark.parametrize("n", [1, 2, 5, 40])
def test_n_step_against_a_walk_through_each_episode(n):
    """Three environments side by side over 11 decisions: sums by hand, to an episode's or the rows' end."""
    torch.manual_seed(n)
    T, E = 11, 3
    r, discount, ended = torch.rand(T, E), torch.rand(T, E), (torch.rand(T, E) < 0.2).float()
    R, G, last = (v.view(T, E) for v in n_step(r.flatten(), discount.flatten(), ended.flatten(), E, n))
    for t in range(T):
        for e in range(E):
            total, factor, k = 0.0, 1.0, t
            for k in range(t, min(t + n, T)):
                total += factor * r[k, e].item()
                factor *= discount[k, e].item()
                if ended[k, e]:
                    break
            assert last[t, e] == k * E + e
            assert abs(R[t, e] - total) < 1e-5 and abs(G[t, e] - factor) < 1e-5


def test_one_step_is_equation_5():
    r, discount = torch.rand(12), torch.rand(12)
    R, G, last = n_step(r, discount, torch.zeros(12), 4, 1)
    assert torch.equal(R, r) and torch.equal(G, discount) and torch.equal(last, torch.arange(12))


def test_states_are_drawn_where_the_latent_decides():
    """With Q = s x the gap of a pair is s |x_1 - x_2|: the counts follow it, and no state is drawn twice."""
    s = torch.tensor([[1.0], [3.0], [0.0], [6.0]])
    pair = torch.tensor([[[0.0], [1.0]]]).expand(4, 2, 1)

    def critic(s, x):
        return (s * x).squeeze(-1).expand(2, -1)

    generator = torch.Generator().manual_seed(0)
    drawn = torch.cat([draw_states(critic, s, pair, 1, generator) for _ in range(4000)])
    assert np.allclose(torch.bincount(drawn, minlength=4) / 4000, [0.1, 0.3, 0.0, 0.6], atol=0.03)
    assert sorted(draw_states(critic, s, pair, 4, generator).tolist()) == [0, 1, 2, 3]
