"""FPO on a bandit in the plane: the four components, wired as in train_aloha.py. 10 seconds on one core.

The latent x is the arm. The actor starts as N(0, I); two regions pay, and it has to find the better one. Its
exact density is known here, so bandit.png also tests Eq. 3: does Δℓ move as Δ log π?"""

import matplotlib.pyplot as plt
import torch
from torch.autograd.functional import jacobian

from fpo_actor import FlowActor, draw_flow_noise
from fpo_buffer import TrajectoryBuffer
from fpo_critic import QEnsemble, critic_loss, latent_advantage, td_target
from fpo_loss import fpo_loss


def pay(x):  # the chance that arm x has reward 1, else 0. (n, 2) -> (n,)
    return torch.exp(-2 * torch.cdist(x, torch.tensor([[1.5, 0], [-1.5, 0]])) ** 2) @ torch.tensor([1, 0.2])


SEED, ITERATIONS, EARLY, STEPS, BETA, KAPPA, LR = 1, 40, 10, 8, 0.2, 0.5, 1e-3
torch.manual_seed(SEED)
start, early, actor = (FlowActor(state_dim=1, latent_dim=2, hidden=64) for _ in range(3))
critic, buffer = QEnsemble(state_dim=1, latent_dim=2, num_critics=5, hidden=64), TrajectoryBuffer(window=5)
actor_optimizer, critic_optimizer = (torch.optim.Adam(net.parameters(), LR) for net in (actor, critic))
rewards, s = [], torch.zeros(1024, 1)  # a bandit has one state
for k in range(ITERATIONS):
    if k == EARLY:
        early.load_state_dict(actor.state_dict())
    x = actor.sample(s[:256], STEPS)
    r = torch.bernoulli(pay(x))
    rewards.append(r.mean().item())
    print(f"{k:2}: reward {rewards[-1]:.2f}", end="\n" if k % 5 == 4 else "   ", flush=True)
    buffer.push({"s": s[None, :256], "x": x[None], "r": r[None]})  # (T, E, …): T = 1 decision, E = 256 arms
    s_w, x_w, r_w = (buffer.flat(key) for key in "sxr")  # the window, (n, …)
    for _ in range(40):
        i, one = torch.randint(len(r_w), (256,)), torch.ones(256)
        y = td_target(critic, r_w[i], one, one, s_w[i], x_w[i])  # Eq. 5: y = r, as all terminate at once
        critic_optimizer.zero_grad()
        critic_loss(critic, s_w[i], x_w[i], y).backward()  # Eq. 6
        critic_optimizer.step()
    x_a = actor.sample(s, STEPS)  # the actor learns from 8 fresh latents a state, valued by the critics
    adv = latent_advantage(critic, s[:128], x_a.view(128, 8, 2)).flatten().clamp_min(-1)
    u, eps = draw_flow_noise(1024, 4, 2)  # the same for both losses of Eq. 2
    cfm_init = actor.cfm_loss(x_a, s, u, eps).detach()  # of θ_old
    actor_optimizer.param_groups[0]["lr"] = LR * (1 - k / ITERATIONS)
    for i in torch.randperm(1024).split(256):
        cfm = actor.cfm_loss(x_a[i], s[i], u[i], eps[i])
        loss, info = fpo_loss(cfm, cfm_init[i], adv[i], BETA, clip_eps=0.5, sigma_floor=BETA)  # Eq. 2-4
        actor_optimizer.zero_grad()
        (loss + KAPPA * info["slope"] * cfm.mean()).backward()  # fit the own latents, too
        actor_optimizer.step()
x = e = torch.randn(1024, 2)  # arms of the start, θ_old here; θ is the actor after EARLY updates
for _ in range(10):  # Newton: the noise e that θ carries to x, and the Jacobian dx/de
    J = jacobian(lambda e: FlowActor.sample.__wrapped__(early, s, STEPS, noise=e).sum(0), e).movedim(1, 0)
    e = e - torch.linalg.solve(J, early.sample(s, STEPS, noise=e) - x)
log_ratio = (x.square() - e.square()).sum(1) / 2 - torch.linalg.slogdet(J).logabsdet  # change of variables
u, eps = draw_flow_noise(1024, 64, 2)
delta = (start.cfm_loss(x, s, u, eps) - early.cfm_loss(x, s, u, eps)).detach()  # Eq. 2
corr = torch.corrcoef(torch.stack([delta, log_ratio]))[0, 1]
print(f"mean reward {rewards[0]:.2f} before, {rewards[-1]:.2f} after; correlation {corr:.3f}")
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 4), layout="constrained")
grid = torch.linspace(-3, 3, 99)
left.contourf(grid, grid, pay(torch.cartesian_prod(grid, grid)).view(99, 99).T, cmap="Greens")
left.plot(*x.T, "k.", *actor.sample(s, STEPS, noise=x).T, "r.", ms=2)
left.set(title="before (black) and after (red) over reward", xlim=(-3, 3), ylim=(-3, 3))
middle.plot(rewards)
middle.set(title="mean reward of 256 arms", xlabel="iteration", ylim=(0, 1))
right.plot(delta, log_ratio, ".", delta, delta, "k-", ms=3)
right.set(title=f"Eq. 2, {EARLY} updates: correlation {corr:.2f}", xlabel="Δℓ", ylabel="Δ log π (line: Δℓ)")
figure.savefig("bandit.png", dpi=150)
