"""On a GPU: the components against float64 on the CPU, both scripts from start to end, resume. Skipped where
torch finds no CUDA device."""

import json
import shutil

import pytest
import torch

from base.flow import FlowBase
from fpo_actor import FlowActor, draw_flow_noise
from fpo_critic import QEnsemble, critic_loss, fresh_value, gae, latent_advantage, td_target
from fpo_loss import fpo_loss
from helpers import ROOT, SMALL, assert_refused, assert_same_results, rows, script

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
FLAGS = [*SMALL, "--device", "cuda", "--eval-episodes", 1]


def everything(device, dtype):
    """Every quantity of Algorithm 1 on random inputs, the same on every device. -> name: tensor."""
    torch.manual_seed(0)
    B, T, E, S, D, M = 64, 8, 8, 11, 6, 3
    actor, old, critic, target = FlowActor(S, D), FlowActor(S, D), QEnsemble(S, D, M), QEnsemble(S, D, M)
    for module in (actor, old, critic, target):
        for p in module.parameters():
            p.data = torch.randn(p.shape) / p.shape[-1] ** 0.5
    s, s_next, r, adv = torch.randn(B, S), torch.randn(B, S), torch.rand(B), torch.randn(B)
    noise, fresh = torch.randn(B, D), torch.randn(B, 4, D)
    u, eps = draw_flow_noise(B, 16, D)
    ended = (torch.rand(T, E) < 0.2).float()
    drawn = (s, s_next, r, adv, noise, fresh, u, eps, ended)
    s, s_next, r, adv, noise, fresh, u, eps, ended = (t.to(device, dtype) for t in drawn)
    for module in (actor, old, critic, target):
        module.to(device, dtype)

    x = actor.sample(s, 8, noise=noise)
    explored = actor.explore(x, s, 4, 0.05)
    cfm = actor.cfm_loss(explored, s, u, eps)
    cfm_init = old.cfm_loss(explored, s, u, eps).detach()
    loss, info = fpo_loss(cfm, cfm_init, adv, 0.2, 0.2, 0.01)
    loss = loss + 0.3 * info["slope"] * cfm.mean()
    loss.backward()
    y = td_target(target, r, 0.9 * torch.ones_like(r), (r > 0.8).to(dtype), s_next, x)
    loss_critic = critic_loss(critic, s, x, y)
    loss_critic.backward()
    v = fresh_value(critic, s, fresh)
    among = latent_advantage(critic, s, fresh)
    result = dict(info, x=x, explored=explored, cfm=cfm, loss=loss)
    result |= dict(y=y, loss_critic=loss_critic, v=v, among=among)
    shaped = [t.view(T, E) for t in (r, v, v.roll(1), torch.full_like(r, 0.9))]
    result["adv"] = gae(*shaped, torch.zeros_like(ended), ended, 0.95)
    for name, module in (("actor_gradient", actor), ("critic_gradient", critic)):
        result[name] = torch.cat([p.grad.flatten() for p in module.parameters()])
    return {name: value.detach().double().cpu() for name, value in result.items()}


@needs_gpu
def test_components_on_the_gpu_equal_float64_on_the_cpu():
    exact, ours = everything("cpu", torch.float64), everything("cuda", torch.float32)
    for name, value in exact.items():
        assert (ours[name] - value).norm() <= 2e-5 * value.norm() + 1e-6, name


@needs_gpu
def test_base_on_the_gpu_equals_the_cpu():
    for file in sorted((ROOT / "weights").glob("*.safetensors")):
        chunks = []
        for device in ("cpu", "cuda"):
            torch.manual_seed(0)
            base = FlowBase.load(file, device=device)
            observation, w = torch.randn(16, len(base.state_mean)), torch.randn(16, base.latent_dim)
            observation = base.state_mean.cpu() + observation * base.state_std.cpu()
            chunks.append(base.decode(base.encode(observation)[1], w.to(device)).cpu())
        torch.testing.assert_close(*chunks, rtol=1e-4, atol=1e-4)


@needs_gpu
@pytest.mark.slow
def test_aloha_trains_resumes_and_is_evaluated(tmp_path):
    """The second half again, bit for bit; a checkpoint of the GPU plays on a CPU, and its run does not go on
    there."""
    flags = "--eval-every 640 --explore-steps 4 --total-env-steps 1280 --run-name whole".split()
    result = script("train_aloha.py", tmp_path, *FLAGS, *flags)
    assert result.returncode == 0, result.stderr
    whole, parts = tmp_path / "runs" / "whole", tmp_path / "runs" / "parts"
    assert json.loads((whole / "args.json").read_text())["args"]["device"] == "cuda"
    shutil.copytree(whole, parts)
    min(parts.glob("step*.pt")).rename(parts / "last.pt")
    on_cpu = script("train_aloha.py", tmp_path, "--resume", "runs/parts", CUDA_VISIBLE_DEVICES="")
    assert_refused(on_cpu, ["--resume", "GPU"])
    rest = script("train_aloha.py", tmp_path, "--resume", "runs/parts")
    assert rest.returncode == 0, rest.stderr
    assert_same_results(whole, parts)
    played = ["runs/whole/last.pt", "--episodes", 1, "--num-workers", 1, "--device", "cpu"]
    assert script("evaluate.py", tmp_path, *played).returncode == 0


@needs_gpu
@pytest.mark.slow
def test_libero_trains(tmp_path):
    flags = ["--rollout-decisions", 2, "--total-env-steps", 128, "--run-name", "gpu"]
    result = script("train_libero.py", tmp_path, *FLAGS, *flags)
    assert result.returncode == 0, result.stderr
    assert float(rows(tmp_path / "runs/gpu/metrics.csv")[-1]["losses/cfm_loss"]) > 0
