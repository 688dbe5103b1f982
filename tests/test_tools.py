"""The demonstrator and behaviour cloning, on the real simulator, and their bad input."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from base_flow import FlowBase
from env_aloha import evaluation_poses
from fpo_actor import FlowActor

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))


def tool(name, cwd, *flags):
    command = [sys.executable, str(ROOT / "tools" / f"{name}.py"), *map(str, flags)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory):
    cwd = tmp_path_factory.mktemp("demos")
    result = tool("demo_aloha", cwd, "--num-demos", 16, "--out", "demos.npz", "--seed", 5)
    assert result.returncode == 0, result.stderr
    return cwd, result.stdout


def test_each_grasp_works_on_its_half_of_the_table(demonstrations):
    """D15: the slide where the cube lies far from the arm, the hook where it lies near; both are shown at every place."""
    from demo_aloha import ARM, MODES

    cwd, text = demonstrations
    with np.load(cwd / "demos.npz", allow_pickle=False) as file:
        mode, official, strict, actions, box = (file[key] for key in ("mode", "official", "strict", "actions", "box"))
    assert set(mode) == {0, 1} and actions.shape == (16, 400, 14) and all(f"{name} " in text for name in MODES) and "[" in text
    assert (box[::2] == box[1::2]).all() and (mode[::2] != mode[1::2]).all()
    distance = np.linalg.norm(box[:, :2] - ARM, axis=1)
    suits, clear = (distance > 0.371) == (mode == MODES.index("slide")), abs(distance - 0.371) > 0.03
    assert official[suits & clear].mean() > 0.8 and official[~suits & clear].mean() < 0.2
    with np.load(cwd / "demos.npz", allow_pickle=False) as file:
        evaluated = np.abs(file["observations"][:, None, 0, 14:16] - evaluation_poses(200)[None, :, :2]).max(2)
    assert evaluated.min() > 1e-6  # no demonstration starts where an evaluation does (metres; observations are float32)
    assert (strict <= official).all()


def test_cloning_makes_a_base_that_loads(demonstrations):
    cwd, _ = demonstrations
    flags = ("--demos", "demos.npz", "--out", "base.safetensors", "--steps", 30, "--batch", 64, "--eval-episodes", 2, "--latent-dim", 6)
    result = tool("clone_base", cwd, *flags)
    assert result.returncode == 0, result.stderr
    base = FlowBase.load(cwd / "base.safetensors", task="aloha")
    assert base.latent_dim == 6 and base.header["success"]["gaussian"]["episodes"] == 2
    s, context = base.encode(torch.zeros(3, 21))
    assert base.decode(context, torch.randn(3, 6)).shape == (3, 40, 14)
    assert "exists" in tool("clone_base", cwd, *flags).stderr  # never overwritten by accident


def test_libero_demonstrations(tmp_path):
    """Deep grasps put the butter into the tray, short ones do not; pushed chunks are marked."""
    result = tool("demo_libero", tmp_path, "--task-ids", "56", "--num-demos", 6, "--out", "demos.npz", "--video", "demos.mp4")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "demos.mp4").stat().st_size > 10_000
    with np.load(tmp_path / "demos.npz", allow_pickle=False) as file:
        deep, success, length, pushed, actions = (file[key] for key in ("deep", "success", "length", "pushed", "actions"))
    assert length.sum() == len(actions) == len(pushed) and 0 < pushed.mean() < 0.5
    assert set(deep) == {True, False} and success[deep].all() and not success[~deep].any()


def test_each_spot_works_for_its_half_of_the_placements_and_its_clone(tmp_path):
    """D15: near and far grasps are shown at every placement; which one succeeds is the butter's x."""
    result = tool("demo_libero", tmp_path, "--task-ids", "56", "--num-demos", 24, "--spots", 0.045, 0.050, "--out", "demos.npz")
    assert result.returncode == 0, result.stderr
    with np.load(tmp_path / "demos.npz", allow_pickle=False) as file:
        spot, success, length, observations = (file[key] for key in ("spot", "success", "length", "observations"))
    x = observations[np.cumsum(length) - length, 19]  # of the butter, metres; between 0.077 and 0.144
    assert np.allclose(x[::2], x[1::2], atol=1e-3) and (spot[::2] != spot[1::2]).all()
    suits, clear = (x > 0.108) == spot, abs(x - 0.108) > 0.012
    assert success[suits & clear].mean() > 0.7 and success[~suits & clear].mean() < 0.25
    flags = ("--task", "libero_90_task56", "--demos", "demos.npz", "--out", "base.safetensors", "--steps", 30, "--batch", 64, "--eval-episodes", 1)
    result = tool("clone_base", tmp_path, *flags)
    assert result.returncode == 0, result.stderr
    base = FlowBase.load(tmp_path / "base.safetensors", task="libero_90_task56")
    assert base.header["task_ids"] == [56] and base.header["success"]["gaussian"]["episodes"] == 1


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_search_finds_a_known_optimum(seed):
    """Scores are noisy counts of success in 6 tries, as in the tool. The start succeeds in 34 %, the best vector always."""
    from constant_latent import CrossEntropy

    rng, best = np.random.default_rng(seed), np.array([1.0, -1.0, 0.5, 0.0, 2.0, -0.5])
    success = lambda x: np.exp(-((x - best) ** 2).mean(-1))
    search = CrossEntropy(6, rng)
    assert success(search.mean) < 0.35
    for _ in range(20):
        x = search.ask(24)
        assert x.shape == (24, 6) and np.allclose(x[:12] + x[12:], 2 * search.mean)
        search.tell(x, rng.binomial(6, success(x)) / 6)
    assert success(search.mean) > 0.85


@pytest.mark.parametrize("flags", [["--per-place"], ["--first-only", "--states", "tuning", "evaluation"]])
def test_constant_latents_are_tabled(tmp_path, flags):
    flags = ("--total-env-steps", 1, "--best-of", 2, "--episodes", 2, "--seeds", 3, "--workers", 2, "--out", "table.csv", *flags)
    result = tool("constant_latent", tmp_path, *flags)
    assert result.returncode == 0, result.stderr
    with open(tmp_path / "table.csv") as file:
        rows = list(csv.DictReader(file))
    kinds = ["tuning", "evaluation"] if "--states" in flags else ["evaluation"]
    expected = [(name, states) for states in kinds for name in ("zero", "base", "best")] + [("constant", states) for states in kinds]
    assert [(row["policy"].split()[0], row["states"]) for row in rows] == expected
    assert rows[-1]["seed"] == "3" and int(rows[-1]["env_steps"]) > 1 and "--seeds 3" in rows[0]["command"]
    for row in rows:
        assert row["episodes"] == "2" and float(row["wilson_low"]) <= float(row["success"]) <= float(row["wilson_high"])


@pytest.mark.parametrize("name", ["train_sac", "train_cloning"])
def test_baselines_train(tmp_path, name):
    flags = ("--num-envs", 4, "--total-env-steps", 3200, "--eval-every", 1600, "--eval-episodes", 2, "--num-workers", 2, "--minibatch-size", 16, "--updates", 2)
    result = tool(name, tmp_path, *flags, *(("--warmup-decisions", 8) if name == "train_sac" else ()), "--run-name", "run")
    assert result.returncode == 0, result.stderr
    assert "environment steps" in result.stdout and "fixed" in result.stdout
    with open(tmp_path / "runs" / "run" / "eval.csv") as file:
        assert len(file.readlines()) == 1 + 2 + 2 + 1 + 2 + (2 if name == "train_sac" else 0)  # that of the Gaussian's mean
    again = tool(name, tmp_path, "--run-name", "run")
    assert again.returncode == 2 and "--run-name is run" in again.stderr


def test_log_density_against_the_jacobian_of_the_flow():
    """log π(x) = log N(x0) - log |det ∂x/∂x0|, with x = F(x0) integrated forwards and its Jacobian by reverse-mode autograd."""
    from check_monotonicity import log_density

    actor, s = FlowActor(state_dim=2, latent_dim=3).double(), torch.randn(2, dtype=torch.float64)
    torch.nn.init.normal_(actor.out.weight, std=0.1)

    def flow(x, steps=400):
        velocity = lambda x, u: actor.velocity(x[None], torch.tensor([u], dtype=torch.float64), s[None])[0]
        for k in range(steps):
            u, h = k / steps, 1 / steps
            x = x + h * velocity(x + h / 2 * velocity(x, u), u + h / 2)  # the midpoint rule
        return x

    for _ in range(2):
        x_0 = torch.randn(3, dtype=torch.float64)
        determinant = torch.linalg.slogdet(torch.autograd.functional.jacobian(flow, x_0))[1]
        expected = torch.distributions.Normal(0, 1).log_prob(x_0).sum() - determinant
        found = log_density(actor, flow(x_0).detach()[None], s[None], steps=64)[0]
        assert abs(found - expected) < 1e-3


def test_log_density_of_the_untrained_actor_is_that_of_the_prior():
    from check_monotonicity import log_density

    x = torch.randn(5, 24)
    expected = torch.distributions.Normal(0, 1).log_prob(x).sum(1)
    assert torch.allclose(log_density(FlowActor(4, 24), x, torch.randn(5, 4), steps=16), expected, atol=1e-3)


def test_monotonicity_end_to_end(tmp_path):
    result = tool("check_monotonicity", tmp_path, "--runs", "no_proximal", "--total-env-steps", 50_000, "--samples", 8, "--ode-steps", 4, "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    with open(tmp_path / "no_proximal_seed1.csv") as file:
        assert len(file.readlines()) >= 2
    assert "spearman" in result.stdout and (tmp_path / "seed1.png").stat().st_size > 10_000


def test_the_latent_density_of_sac_is_that_of_a_squashed_gaussian():
    from torch.distributions import AffineTransform, Normal, TanhTransform, TransformedDistribution
    from train_sac import TanhGaussianActor

    actor, s = TanhGaussianActor(4, 3, bound=2.0), torch.randn(50, 4)
    torch.nn.init.normal_(actor.net[-1].weight, std=0.02)  # log σ stays below its limit of 1
    x, log_density = actor(s)
    mean, log_std = actor.net(s).chunk(2, -1)
    squash = [AffineTransform(0.0, 0.5), TanhTransform(), AffineTransform(0.0, 2.0)]
    expected = TransformedDistribution(Normal(mean, log_std.exp()), squash).log_prob(x).sum(1)
    near = (x.abs() < 1.9).all(1)  # at the very bound 1 - tanh² is rounded
    assert near.sum() > 20 and torch.allclose(log_density[near], expected[near], atol=1e-3)
    assert torch.allclose(actor.mode(s), 2 * torch.tanh(mean / 2))


def test_pictures_of_a_finished_run(tmp_path):
    result = tool("plots", tmp_path, "--latents", ROOT / "results" / "libero" / "butter_seed1", "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    for name in ("fig5_libero_90.png", "fig5_libero_90.svg", "fig7_libero_90.png", "fig7_libero_90_base_only.png"):
        assert (tmp_path / name).stat().st_size > 10_000, name
    table = (tmp_path / "latents.csv").read_text()
    assert "Mahalanobis distance" in table and "silhouette" in table and "nan" not in table.replace(",nan,nan,", "")


def test_bootstrap_against_another_library():
    """The basic interval of a variance, one latent an episode, as scipy has it; and the same with every episode's latent twice."""
    from plots import bootstrap
    from scipy import stats

    x, episode, rng = np.random.default_rng(0).exponential(size=(40, 1)), np.arange(40), np.random.default_rng(1)
    variance = lambda g: g[0].var(0).mean()
    expected = stats.bootstrap((x[:, 0],), np.var, method="basic", n_resamples=9999, random_state=2).confidence_interval
    for group in ((x, episode), (np.repeat(x, 2, 0), np.repeat(episode, 2))):
        value, low, high = bootstrap(variance, group, rng)
        assert value == pytest.approx(x.var()) and (low, high) == pytest.approx(tuple(expected), abs=0.15)
    assert np.isnan(bootstrap(variance, (x[:4], episode[:4]), rng)[1:]).all()


def test_autocorrelation_of_a_known_process():
    """x_t = 0.6 x_(t-1) + noise has correlation 0.6^lag, whatever mean every decision number has; episodes end at different times."""
    from plots import LAGS, autocorrelation

    rng = np.random.default_rng(0)
    n, T, D = 400, 12, 5
    x = np.zeros((n, T, D))
    x[:, 0] = rng.standard_normal((n, D))
    for t in range(1, T):
        x[:, t] = 0.6 * x[:, t - 1] + 0.8 * rng.standard_normal((n, D))
    episode, chunk = np.indices((n, T))
    kept = chunk < rng.integers(6, T + 1, size=(n, 1))
    found = autocorrelation(((x + 3 * rng.standard_normal((T, D)))[kept], 7 * episode[kept], chunk[kept]))
    assert np.allclose(found, 0.6**LAGS, atol=0.05)


def test_tables_of_the_ablations(tmp_path):
    """Mean over seeds at every evaluation, with the wider of two intervals; a run that stopped early counts with its last evaluation."""
    from results import over_seeds_and_episodes, write_ablations
    from scipy import stats
    from statsmodels.stats.proportion import proportion_confint

    lines = ["row,seed,policy,env_steps,successes,episodes,steps_to_90"]
    for seed, counts in ((1, (10, 20, 30, 40)), (2, (20, 30, 40, 50)), (3, (30, 40))):
        lines += [f"aloha_no_clip,{seed},base,0,20,50,"] + [f"aloha_no_clip,{seed},tuned,{k},{c},50,{'' if seed == 3 else 100_000 + 1000 * seed}" for k, c in enumerate(counts)]
    (tmp_path / "runs.csv").write_text("\n".join(lines) + "\n")
    points = [f"aloha_no_clip,{seed},{steps},{0.9 + seed / 100 if steps > 600 else 0.2},5" for seed in (1, 2, 3) for steps in (200, 600, 700, 800)]
    (tmp_path / "runs_curves.csv").write_text("\n".join(["row,seed,env_steps,success,norm", *points]) + "\n")
    write_ablations(tmp_path / "runs.csv")
    interval = stats.t.interval(0.95, 2, 260 / 3, stats.sem([80, 100, 80]))
    table = (tmp_path / "table2.md").read_text()
    assert "| 3 | 40.0 % [" in table and f"**86.7 % [{interval[0]:.1f}, 100.0]**" in table
    assert "| 101, 102, 2 of 3 seeds |" in table
    assert f"| 92.0 ± {stats.t.ppf(0.975, 2) / 3**0.5:.1f} |" in table  # 91, 92 and 93 %, whose standard deviation is 1
    low, high = proportion_confint(300, 300, method="wilson")
    assert over_seeds_and_episodes([(100, 100)] * 3) == f"100.0 % [{100 * low:.1f}, {100 * high:.1f}]"  # t alone would give ± 0
    assert "without PPO clipping,\"ALOHA, 0.8 M steps\",3," in (tmp_path / "table2.csv").read_text()


def test_differences_against_another_library():
    """Welch's interval as statsmodels has it; none for two seeds, or where no seed differs from another."""
    from results import difference
    from statsmodels.stats.weightstats import CompareMeans

    a, b = [94.0, 95.5, 94.5, 93.0], [99.0, 98.5, 99.5]
    low, high = CompareMeans.from_data(a, b).tconfint_diff(usevar="unequal")
    assert difference(a, b) == f"{np.mean(a) - np.mean(b):+.1f} [{low:+.1f}, {high:+.1f}]"
    assert difference(a, b[:2]) == "-4.5" and difference([79.0] * 3, [79.2] * 3, "{:+z.0f}") == "+0" and difference([], b) == "–"


def test_the_rank_test_against_every_ordering():
    """p as the share of all ways to deal the values whose sum of ranks is at least as far from its mean; with ties too."""
    from itertools import combinations

    from results import rank_test
    from scipy.stats import rankdata

    for a, b in (([94.8, 98.7, 94.1, 84.7], [99.4, 98.6, 98.9]), ([1.0, 2.0, 2.0], [2.0, 3.0, 4.0])):
        ranks = rankdata(a + b)
        sums = [sum(dealt) for dealt in combinations(ranks, len(a))]
        far = [abs(s - np.mean(sums)) >= abs(ranks[: len(a)].sum() - np.mean(sums)) for s in sums]
        assert rank_test(a, b) == rank_test(b, a) == f"{np.mean(far):.2g}"
    assert rank_test([1.0, 2.0, 3.0], [4.0, 5.0, 6.0]) == "0.1"  # 2 of 20


def test_the_queue_knows_a_run_that_has_ended(tmp_path):
    """A finished folder is played again where no table has it; an interrupted one goes on."""
    from run_ablations import ended

    assert not ended(tmp_path)
    (tmp_path / "args.json").write_text('{"args": {"total_env_steps": 500}}')
    assert not ended(tmp_path)
    (tmp_path / "metrics.csv").write_text("iteration,charts/env_steps\n1,320\n")
    assert not ended(tmp_path)
    (tmp_path / "metrics.csv").write_text("iteration,charts/env_steps\n1,320\n2,640\n")
    assert ended(tmp_path)


def test_the_queue_lists_its_commands():
    result = tool("run_ablations", ROOT, "--list", "--rows", "aloha_no_clip", "--seeds", 2)
    assert result.returncode == 0 and len(result.stdout.splitlines()) == 2
    assert "--clip-eps inf --seed 2" in result.stdout.splitlines()[1]


@pytest.mark.parametrize("name, flags, words", [
    ("run_ablations", ["--rows", "aloha_everything"], ["--rows has aloha_everything", "aloha_complete"]),
    ("run_ablations", ["--out", "."], ["--out is .", "a folder"]),
    ("check_monotonicity", ["--samples", "0"], ["--samples is 0"]),
    ("check_monotonicity", ["--samples", "321"], ["--samples is 321", "160"]),
    ("check_monotonicity", ["--runs", "--out", "junk.npz"], ["--out is junk.npz", "folder"]),
    ("check_monotonicity", ["--runs", "magic"], ["--runs has magic"]),
    ("fault_campaign", ["--only", "an earthquake"], ["--only is 'an earthquake'", "a full disk"]),
    ("fault_campaign", ["--tries", "0"], ["--tries is 0"]),
    ("train_cloning", ["--updates", "0"], ["--updates is 0"]),
    ("train_cloning", ["--seed", str(2**64)], ["--seed is", "2**63"]),
    ("train_sac", ["--bound", "1"], ["--target-entropy is 0.7", "--bound 1.0"]),
    ("watch_memory", [str(os.getpid()), "nofolder/x.csv"], ["a file to write"]),
    ("train_sac", ["--tau", "2"], ["--tau is 2"]),
    ("train_sac", ["--bound", "0"], ["--bound is 0"]),
    ("plots", ["--latents", "nowhere", "--out", "."], ["--latents", "nowhere"]),
    ("plots", ["--exploration", "nowhere", "--out", "."], ["--exploration", "nowhere"]),
    ("plots", ["--exploration", str(ROOT / "results" / "libero" / "butter_seed1"), "--out", "."], ["has no perturbations", "--explore-steps"]),
    ("plots", ["--strip", "nowhere", "--out", "."], ["--strip is nowhere"]),
    ("plots", ["--strip", "nowhere", "--out", "junk.npz"], ["--out is junk.npz", "folder"]),
    ("demo_aloha", ["--num-demos", "0"], ["--num-demos is 0"]),
    ("demo_aloha", ["--noise", "-1"], ["--noise is -1"]),
    ("demo_aloha", ["--noise", "0.6"], ["--noise is 0.6", "0.5"]),
    ("demo_aloha", ["--video", "film.gif"], ["--video is film.gif", ".mp4"]),
    ("clone_base", ["--steps", "-3"], ["--steps is -3"]),
    ("constant_latent", ["--episodes", "0"], ["--episodes is 0"]),
    ("constant_latent", ["--task", "libero_10", "--episodes", "51"], ["--episodes is 51", "50"]),
    ("constant_latent", ["--per-task"], ["--task is aloha", "--per-task"]),
    ("clone_base", ["--latent-dim", "999"], ["--latent-dim is 999"]),
    ("clone_base", ["--ema", "1.0"], ["--ema is 1.0"]),
    ("clone_base", ["--demos", "junk.npz"], ["--demos", "junk.npz"]),
    ("clone_base", ["--task", "libero_goal", "--eval-episodes", "51"], ["--eval-episodes is 51", "50"]),
    ("demo_libero", ["--suite", "libero_goal", "--task-ids", "12"], ["--task-ids has 12", "0 to 9"]),
    ("demo_libero", ["--push", "2"], ["--push is 2"]),
    ("demo_libero", ["--spots", "0.04", "2"], ["--spots is 0.04 2"]),
    ("demo_libero", ["--table-states", "51"], ["--table-states is 51"]),
    ("demo_libero", ["--table", "--out", "junk.npz"], ["--out junk.npz exists", "--overwrite"]),
    ("bench_libero", ["--task-ids", "99"], ["--task-ids has 99"]),
    ("bench_aloha", ["--num-envs", "0"], ["--num-envs is 0"]),
    ("train_sac", ["--updates", "inf"], ["--updates is inf", "finite"]),
    ("plots", ["--latents", str(ROOT / "results" / "former" / "short_k4_end_seed1"), "--out", "."], ["--latents", "args.json"]),
    ("plots", ["--latents", "."], ["--out is missing"]),
])  # fmt: skip
def test_bad_input(tmp_path, name, flags, words):
    (tmp_path / "junk.npz").write_text("no demonstrations")
    result = tool(name, tmp_path, *flags)
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    for word in words:
        assert word in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["junk.npz"]
