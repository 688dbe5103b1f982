"""Demonstrators, behaviour cloning, baselines and the other tools, and their bad input."""

import contextlib
import sys
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ROOT, SMALL, assert_refused, here, rows, short

from base.flow import FlowBase
from envs.aloha import evaluation_poses
from fpo_actor import FlowActor, draw_flow_noise

sys.path.insert(0, str(ROOT / "tools"))


def tool(name, cwd, *flags):
    return here(f"tools/{name}.py", cwd, *flags, play=True)


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory):
    cwd = tmp_path_factory.mktemp("demos")
    result = tool("demo_aloha", cwd, "--num-demos", 16, "--out", "demos.npz", "--seed", 5)
    assert result.returncode == 0, result.stderr
    return cwd, result.stdout


@pytest.mark.slow
def test_each_grasp_works_on_its_half_of_the_table(demonstrations):
    """The slide where the cube lies far from the arm, the hook where it is near; both at every place."""
    from demo_aloha import ARM, MODES

    cwd, text = demonstrations
    with np.load(cwd / "demos.npz", allow_pickle=False) as file:
        mode, success, actions, box = (file[key] for key in ("mode", "success", "actions", "box"))
    assert set(mode) == {0, 1} and actions.shape == (16, 400, 14)
    assert all(f"{name} " in text for name in MODES) and "[" in text
    assert (box[::2] == box[1::2]).all() and (mode[::2] != mode[1::2]).all()
    distance = np.linalg.norm(box[:, :2] - ARM, axis=1)
    suits, clear = (distance > 0.371) == (mode == MODES.index("slide")), abs(distance - 0.371) > 0.03
    assert success[suits & clear].mean() > 0.8 and success[~suits & clear].mean() < 0.2
    with np.load(cwd / "demos.npz", allow_pickle=False) as file:
        starts = file["observations"][:, None, 0, 14:16]
    # no demonstration starts where an evaluation does (metres; observations are float32)
    assert np.abs(starts - evaluation_poses(1000)[None, :, :2]).max(2).min() > 1e-6


@pytest.mark.slow
def test_cloning_makes_a_base_that_loads(demonstrations):
    cwd, _ = demonstrations
    flags = "--demos demos.npz --out base.safetensors --steps 30 --batch 64 --eval-episodes 2 --latent-dim 6"
    result = short("tools/clone_base.py", cwd, *flags.split())
    assert result.returncode == 0, result.stderr
    base = FlowBase.load(cwd / "base.safetensors", task="aloha")
    assert base.latent_dim == 6 and base.header["success"]["gaussian"]["episodes"] == 2
    s, context = base.encode(torch.zeros(3, 21))
    assert base.decode(context, torch.randn(3, 6)).shape == (3, 40, 14)
    assert_refused(tool("clone_base", cwd, *flags.split()), ["exists"])  # never overwritten by accident


@pytest.mark.slow
def test_each_reach_works_for_a_part_of_the_starts_and_its_clone(tmp_path):
    """Short and far reaches are shown from every start; hardly ever both fail, and neither always works."""
    flags = "--task-ids 56 --num-demos 24 --num-brief 8 --num-held 2 --push 0 --short 4.1 4.2"
    result = tool("demo_libero", tmp_path, *flags.split(), *"--video demos.mp4 --out demos.npz".split())
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "demos.mp4").stat().st_size > 10_000
    with np.load(tmp_path / "demos.npz", allow_pickle=False) as file:
        names = "behaviour", "success", "length", "pushed", "actions", "observations", "whole"
        behaviour, success, length, pushed, actions, seen, whole = (file[name] for name in names)
    assert length.sum() == len(actions) == len(pushed) and list(whole) == 24 * [True] + 10 * [False]
    marked, closed = (np.split(x, np.cumsum(length)[:-1]) for x in (pushed, actions[:, 6] > 0))
    assert success[32:].all()
    for k in range(34):  # whole, brief, of which the last step is in no chunk, and held, which begin closing
        expected = closed[k].cumsum() == 0 if k >= 32 else np.arange(length[k]) == (37 if k >= 24 else -1)
        assert (marked[k] == expected).all() and (length[k] == 38 or not 24 <= k < 32)
    assert set(behaviour) == {0, 1} and (behaviour[::2] != behaviour[1::2]).all()
    first = np.cumsum(length) - length
    assert (seen[first[::2]] == seen[first[1::2]]).all()
    one, other = success[whole][::2], success[whole][1::2]
    assert (one | other).mean() > 0.7 and (one & other).mean() < 0.4
    flags = "--task libero_90_task56 --demos demos.npz --out base.safetensors --steps 30 --batch 64"
    result = tool("clone_base", tmp_path, *flags.split(), *"--eval-episodes 1 --workers 1".split())
    assert result.returncode == 0, result.stderr
    base = FlowBase.load(tmp_path / "base.safetensors", task="libero_90_task56")
    assert base.header["task_ids"] == [56] and base.header["success"]["gaussian"]["episodes"] == 1


def test_the_search_for_the_edges_finds_them():
    """Of two tasks with known edges, where an episode in twenty ends by chance."""
    import demo_libero

    rng, known = np.random.default_rng(0), {3: [0.012, 0.05], 7: [0.081, 0.033]}

    def play(_, tasks, starts, aims, *rest):
        assert all(wrong == 0 for *_, wrong, _ in aims)
        right = [s < known[k][j % 2] for j, (k, (s, *_)) in enumerate(zip(tasks, aims))]
        return [dict(success=good ^ (rng.random() < 0.05)) for good in right]

    suite = SimpleNamespace(tasks=[3, 7], limit=300, draw_start=lambda rng: None)
    args = SimpleNamespace(suite="libero_goal", seed=0)
    found = demo_libero.edges(SimpleNamespace(map=play), args, suite)
    assert all(np.allclose(found[k], known[k], atol=0.003) for k in known)


def test_an_odd_number_of_demonstrations_keeps_their_behaviours_apart(monkeypatch):
    import demo_libero

    def play(_, tasks, starts, aims, *rest, **description):
        tilts.extend(tilt for *_, tilt, _, _ in aims)
        arrays = dict(observations=np.zeros((40, 59)), actions=np.zeros((40, 7)), pushed=np.zeros(40, bool))
        return [dict(arrays, success=True, frames=None) for _ in tasks]

    tilts, workers = [], contextlib.nullcontext(SimpleNamespace(map=play))
    monkeypatch.setattr(demo_libero, "Workers", lambda *_, **__: workers)
    suite = SimpleNamespace(tasks=[3, 7], limit=300, build=None, draw_start=lambda rng: rng.random())
    args = demo_libero.Args(num_demos=2, num_brief=1, short=(4, 4))
    demos, _ = demo_libero.make_demos(args, suite)
    assert [demo_libero.TILTS[b] for b in demos["behaviour"]] == tilts
    assert list(demos["task_id"]) == [3, 3, 3, 7, 7, 7] and list(demos["whole"]) == 2 * [True, True, False]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_search_finds_a_known_optimum(seed):
    """Scores are noisy counts of success in 6 tries. The start succeeds in 34 %, the best vector always."""
    from constant_latent import CrossEntropy

    rng, best = np.random.default_rng(seed), np.array([1.0, -1.0, 0.5, 0.0, 2.0, -0.5])
    search = CrossEntropy(6, rng)

    def success(x):
        return np.exp(-((x - best) ** 2).mean(-1))

    assert success(search.mean) < 0.35
    for _ in range(20):
        x = search.ask(24)
        assert x.shape == (24, 6) and np.allclose(x[:12] + x[12:], 2 * search.mean)
        search.tell(x, rng.binomial(6, success(x)) / 6)
    assert success(search.mean) > 0.85


@pytest.mark.slow
def test_constant_latents_are_tabled(tmp_path):
    flags = "--per-place --first-only --states tuning evaluation --total-env-steps 1 --best-of 2 "
    flags += "--episodes 2 --seeds 3 --workers 2 --out t.csv"
    result = short("tools/constant_latent.py", tmp_path, *flags.split())
    assert result.returncode == 0, result.stderr
    table, kinds = rows(tmp_path / "t.csv"), ("tuning", "evaluation")
    constant = "constant per_place first_only"
    expected = [*product(kinds, ("zero latents", "base", "best of 2")), *product(kinds, (constant,))]
    assert [(row["states"], row["policy"]) for row in table] == expected
    assert table[-1]["seed"] == "3" and int(table[-1]["env_steps"]) > 1 and "--seeds 3" in table[0]["command"]
    for row in table:
        success, low, high = (float(row[name]) for name in ("success", "wilson_low", "wilson_high"))
        assert row["episodes"] == "2" and low <= success <= high


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, own",
    [
        ("train_sac", "--warmup-decisions 8"),
        ("train_sac", "--warmup-decisions 8 --noise-aliased"),
        ("train_peers", "--update fpo++"),
        ("train_peers", "--update cloning"),
        ("train_flow_noise", "--rollout-decisions 2"),
    ],
)
def test_baselines_train(tmp_path, name, own):
    from results import evaluations

    steps = 4000 if name == "train_peers" else 2400  # its critics learn alone for 3200
    flags = f"--num-envs 4 --total-env-steps {steps} --eval-every {steps // 2} --eval-episodes 2"
    flags += f" --num-workers 2 --updates 2 --minibatch-size 16 --run-name run {own}"
    result = short(f"tools/{name}.py", tmp_path, *flags.split())
    assert result.returncode == 0, result.stderr
    assert "environment steps" in result.stdout and "fixed" in result.stdout
    run = tmp_path / "runs" / "run"
    metrics, evaluated = rows(run / "metrics.csv"), evaluations(run / "eval.csv")  # as tools/results.py does
    assert [row["eval/success"] != "" for row in metrics].count(True) == 2 and metrics[-1]["charts/success"]
    expected = {"base": [2], "zero latents": [2], "tuned": [1, 2]}
    sizes = {policy: [] for policy, _ in evaluated}
    for (policy, _), episodes in evaluated.items():
        sizes[policy].append(len(episodes))
    assert sizes == expected and ("tuned", int(metrics[-1]["charts/env_steps"])) in evaluated
    assert (run / "args.json").exists()
    if "cloning" in own:  # what begins a run is the same for all
        assert_refused(tool(name, tmp_path, *flags.split()), ["--run-name is run"])


def test_the_density_of_a_noisy_flow_is_that_of_its_gaussian_steps():
    from scipy.stats import norm
    from train_flow_noise import NoisyFlow

    base = FlowBase.load("weights/aloha.safetensors", task="aloha")
    torch.manual_seed(0)
    policy, s = NoisyFlow(base, (0.02, 0.1)), torch.randn(3, base.state_dim)
    points = policy.sample(torch.randn(3, base.latent_dim), s, None)  # (3, K + 1, D)
    expected, K = np.zeros(3), base.flow_steps
    for k in range(K):
        u = torch.full((3,), k / K)
        with torch.no_grad():
            mean = points[:, k] + base.velocity(points[:, k], u, s) / K
            gate = torch.sigmoid(policy.sigma(torch.cat([s, u[:, None]], 1)))
        expected += norm.logpdf(points[:, k + 1], mean, 0.02 + 0.08 * gate).sum(1)
    assert np.allclose(policy.log_density(points, s)[0].detach(), expected, rtol=1e-4)
    quiet = NoisyFlow(base, (1e-9, 1e-9)).sample(points[:, 0], s, None)
    assert torch.allclose(base.actions(quiet[:, -1]), base.decode(s, points[:, 0]), atol=1e-5)


@pytest.mark.slow
def test_log_density_against_the_jacobian_of_the_flow():
    """log π(x) = log N(x0) - log |det ∂x/∂x0|, x = F(x0) integrated forwards, its Jacobian by autograd."""
    from check_monotonicity import log_density

    actor, s = FlowActor(state_dim=2, latent_dim=3).double(), torch.randn(2, dtype=torch.float64)
    torch.nn.init.normal_(actor.out.weight, std=0.1)

    def velocity(x, u):
        return actor.velocity(x[None], torch.tensor([u], dtype=torch.float64), s[None])[0]

    def flow(x, steps=400):
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


@pytest.mark.slow
def test_monotonicity_end_to_end(tmp_path, monkeypatch):
    """Its run is a small one, in this process, where without a success nothing but the self-fit moves the
    actor."""

    def run(command):
        assert " ".join(map(str, command)).count("--self-fit 0") == 1
        assert short("train_aloha.py", tmp_path, *command[2:], *SMALL, "--self-fit", 0.5).returncode == 0

    monkeypatch.setattr("subprocess.run", run)
    flags = "--runs no_self_fit --total-env-steps 1200 --out ."
    result = tool("check_monotonicity", tmp_path, *flags.split())
    assert result.returncode == 0, result.stderr
    assert rows(tmp_path / "no_self_fit_seed1.csv")
    assert "spearman" in result.stdout


def test_the_latent_density_of_sac_is_that_of_a_squashed_gaussian():
    from torch.distributions import AffineTransform, Normal, TanhTransform, TransformedDistribution
    from train_sac import TanhGaussianActor

    actor, s = TanhGaussianActor(4, 3, bound=2.0), torch.randn(50, 4)
    torch.nn.init.normal_(actor.net[-1].weight, std=0.02)  # log σ stays below its limit of 1
    x, log_density = actor(s, torch.randn(50, 3))
    mean, log_std = actor.net(s).chunk(2, -1)
    squash = [AffineTransform(0.0, 0.5), TanhTransform(), AffineTransform(0.0, 2.0)]
    expected = TransformedDistribution(Normal(mean, log_std.exp()), squash).log_prob(x).sum(1)
    near = (x.abs() < 1.9).all(1)  # at the very bound 1 - tanh² is rounded
    assert near.sum() > 20 and torch.allclose(log_density[near], expected[near], atol=1e-3)
    assert torch.allclose(actor.mode(s), 2 * torch.tanh(mean / 2))


@pytest.mark.slow
def test_pictures_of_a_finished_run(tmp_path):
    flags = [*SMALL, "--total-env-steps", 1, "--run-name", "short"]
    assert short("train_aloha.py", tmp_path, *flags).returncode == 0
    result = short("tools/plots.py", tmp_path, *"--latents runs/short --episodes 4 --out .".split())
    assert result.returncode == 0, result.stderr
    for name in ("fig7_aloha.png", "fig7_aloha.svg"):
        assert (tmp_path / name).stat().st_size > 10_000, name


def write_run(folder, counts, curve):
    """A run's files. counts: successes of 50 at each evaluation; curve: (env_steps, success, norm)."""
    folder.mkdir(parents=True)
    (folder / "args.json").write_text('{"args": {"num_envs": 400}}')
    lines = ["charts/env_steps,charts/success,latent/norm,charts/SPS"]
    lines += [f"{steps},{success},{norm},100" for steps, success, norm in curve]
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    lines = ["policy,env_steps,task,episode,success,length"]
    for k, n in enumerate((20, 25, *counts)):
        policy = ("base,0", "zero latents,0", f"tuned,{400 * (k - 1)}")[min(k, 2)]
        lines += [f"{policy},0,{i},{int(i < n)},40" for i in range(50)]
    (folder / "eval.csv").write_text("\n".join(lines) + "\n")


@pytest.mark.slow
def test_tables_of_the_runs(tmp_path, monkeypatch):
    """Mean over seeds of the last evaluation, with the wider of two intervals; a run that stopped early
    counts with its last one."""
    import results
    from scipy import stats
    from statsmodels.stats.proportion import proportion_confint

    monkeypatch.setattr(results, "ROOT", tmp_path)
    (tmp_path / "README.md").write_text("no tables\n")
    for seed, counts in ((1, (10, 40)), (2, (20, 50)), (3, (40,))):
        # before three time limits of all environments it does not count that 90 of 100 have succeeded
        curve = [(47_900, 0.95, 3), (100_000 + 1000 * seed, 0.89 if seed == 3 else 0.9, 3)]
        curve += [(200_000, 0.8 + seed / 100, 4 + seed), (210_000, 0.8 + seed / 100, 4 + seed)]
        write_run(tmp_path / f"results/aloha/no_clip_seed{seed}", counts, curve)
        write_run(tmp_path / f"results/aloha/seed{seed}", (45, 50), curve)
        write_run(tmp_path / f"results/libero/butter_seed{seed}", (45, 50), curve)
        write_run(tmp_path / f"results/aloha/sac_seed{seed}", (25, 25), curve)
        write_run(tmp_path / f"results/libero/butter_sac_seed{seed}", (25, 50), curve)
    results.write_rows(tmp_path / "table.md", results.runs_of("aloha/"))
    low = stats.t.interval(0.95, 2, 260 / 3, stats.sem([80, 100, 80]))[0]
    fpo, no_clip, sac = (tmp_path / "table.md").read_text().splitlines()[2:5]
    assert fpo.startswith("| FPO | 0.00 M | **100.0 % [") and sac.startswith("| soft actor-critic")
    assert f"**86.7 % [{low:.1f}, 100.0]** | 80.0, 100.0, 80.0 |" in no_clip
    assert no_clip.endswith("| 101, 102, – | 81.0, 82.0, 83.0 | 6.0 | 35 |")
    low, high = proportion_confint(300, 300, method="wilson")  # t alone would give ± 0
    assert results.over_seeds([(100, 100)] * 3) == f"100.0 % [{100 * low:.1f}, {100 * high:.1f}]"
    results.write_peers(tmp_path / "peers.md")
    rows = (tmp_path / "peers.md").read_text().splitlines()[2:]
    assert rows[0] == "| FPO | 3 | 100.0 % [100.0, 100.0] | – |"
    # worse on the one task, equal on the other, which counts half
    assert rows[1].endswith("| 3 | 75.0 % [75.0, 75.0] | 0.25 [0.25, 0.25] |") and len(rows) == 2


def test_the_peers_start_alike_and_cut_differently():
    """At θ_old each update's gradient is that of the mean of A ℓ_cfm, for |A| ≤ 1; away from it fpo's is zero
    where the clip has cut, and fpo++ pulls a ratio that has fallen too far back."""
    from train_peers import actor_loss

    torch.manual_seed(0)
    old, x, s, adv = FlowActor(3, 2, hidden=8), torch.randn(64, 2), torch.randn(64, 3), torch.rand(64) * 2 - 1
    torch.nn.init.normal_(old.out.weight)

    def gradient(update, actor, adv, scale=1.0):
        args = SimpleNamespace(update=update, num_draws=4, scale=scale, clip_eps=0.05)
        loss, _, cut = actor_loss(actor, old, x, s, adv, args, torch.Generator().manual_seed(1))
        return torch.autograd.grad(loss, actor.out.bias)[0], cut

    u, eps = draw_flow_noise(64, 4, 2, torch.Generator().manual_seed(1))
    expected = torch.autograd.grad((adv * old.cfm_loss(x, s, u, eps)).mean(), old.out.bias)[0]
    for update in ("fpo", "fpo++", "nft"):
        torch.testing.assert_close(gradient(update, old, adv)[0], expected, rtol=1e-3, atol=1e-5)
    worse = FlowActor(3, 2, hidden=8)
    worse.load_state_dict(old.state_dict())
    with torch.no_grad():
        worse.out.bias += 10  # every loss rises by about 100, every ratio falls to about 1/e
    gone, cut = gradient("fpo", worse, -torch.ones(64), 0.01)
    assert cut == 1 and (gone == 0).all()
    assert (gradient("fpo++", worse, -torch.ones(64), 0.01)[0] > 0.1).all()  # descent lowers the bias again


def test_the_peers_have_what_the_train_scripts_have():
    import train_peers
    from shared import GAMMA as gamma
    from train_aloha import CRITIC_BATCH, FLOW_STEPS, GAMMA, TAU, Args

    peers, flags = vars(train_peers), Args()
    constants = dict(CRITIC_BATCH=CRITIC_BATCH, FLOW_STEPS=FLOW_STEPS, TAU=TAU)
    names = "rollout_decisions window critic_steps td_decisions num_critics critic_lr actor_states"
    names = [*names.split(), "actor_choice", "fresh_latents"]
    constants |= {name.upper(): getattr(flags, name) for name in names}
    constants["WARMUP"] = flags.critic_warmup
    assert {name: peers[name] for name in constants} == constants and gamma == GAMMA


def test_evaluations_are_counted(tmp_path):
    from results import count, evaluations

    episodes = ["policy,env_steps,task,episode,success", "base,0,0,0,1", "base,0,0,1,0"]
    episodes += ["tuned,60000,0,0,1", "tuned,80000,0,0,0"]
    (tmp_path / "eval.csv").write_text("\n".join(episodes) + "\n")
    run = {key: count(played) for key, played in evaluations(tmp_path / "eval.csv").items()}
    assert run == {("base", 0): (1, 2), ("tuned", 60000): (1, 1), ("tuned", 80000): (0, 1)}


def test_the_queue_lists_its_commands():
    result = tool("run_ablations", ROOT, "--list", "--rows", "aloha/no_clip_", "--seeds", 2)
    assert result.returncode == 0 and len(result.stdout.splitlines()) == 2
    assert "--clip-eps inf --seed 2" in result.stdout.splitlines()[1]


RESULTS = ROOT / "results"
BAD = {  # command: what its sentence says
    "run_ablations --rows aloha_everything": ["--rows has aloha_everything", "aloha/no_clip_"],
    "check_monotonicity --runs --out junk.npz": ["--out is junk.npz", "folder"],
    "check_monotonicity --runs magic": ["--runs has magic"],
    "train_peers --update cloning --updates 0": ["--updates is 0"],
    f"train_peers --update cloning --seed {2**64}": ["--seed is", str(2**63 - 1)],
    "train_peers --update fpo --clip-eps 0": ["--clip-eps is 0"],
    "train_peers --update nft --num-draws 0": ["--num-draws is 0"],
    "train_sac --target-entropy 2": ["--target-entropy is 2", "at most 1.41"],
    "train_sac --updates inf": ["--updates is inf", "finite"],
    "train_sac --task libero_90_task56 --eval-episodes 51": ["--eval-episodes is 51", "50"],
    "plots --latents nowhere --out .": ["--latents", "nowhere"],
    f"plots --latents {RESULTS}/aloha/seed1 --out .": ["--latents", "step*.pt"],
    "plots --strip nowhere --out .": ["--strip is nowhere"],
    "plots --strip nowhere --out junk.npz": ["--out is junk.npz", "folder"],
    "plots --latents .": ["--out is missing"],
    "demo_aloha --num-demos 0": ["--num-demos is 0"],
    "demo_aloha --noise -1": ["--noise is -1"],
    "demo_aloha --noise 0.6": ["--noise is 0.6", "0.5"],
    "demo_aloha --video film.gif": ["--video is film.gif", ".mp4"],
    "demo_aloha --out junk.npz": ["--out junk.npz exists", "--overwrite"],
    "demo_libero --suite libero_goal --task-ids 12": ["--task-ids has 12", "0 to 9"],
    "demo_libero --push 2": ["--push is 2"],
    "demo_libero --short 4 20": ["--short is 4.0 20.0", "at most 10"],
    "demo_libero --table --out junk.npz": ["--out junk.npz exists", "--overwrite"],
    "clone_base --steps -3": ["--steps is -3"],
    "clone_base --latent-dim 999": ["--latent-dim is 999"],
    "clone_base --knots 8": ["--knots is 8", "--chunk-steps"],
    "clone_base --demos junk.npz --out x": ["--demos", "junk.npz"],
    "clone_base --task libero_goal --eval-episodes 51": ["--eval-episodes is 51", "50"],
    "constant_latent --episodes 0": ["--episodes is 0"],
    "constant_latent --task libero_10 --episodes 51": ["--episodes is 51", "50"],
    "constant_latent --per-task": ["--task is aloha", "--per-task"],
    "constant_latent --base junk.npz": ["junk.npz"],
    "bench libero --task-ids 99": ["--task-ids has 99"],
    "bench aloha --num-envs 0": ["--num-envs is 0"],
    "bench pi0 --policy nowhere": ["--policy is nowhere"],
}


@pytest.mark.parametrize("command", BAD)
def test_bad_input(tmp_path, command):
    (tmp_path / "junk.npz").write_text("no demonstrations")
    name, *flags = command.split()
    assert_refused(here(f"tools/{name}.py", tmp_path, *flags), BAD[command])
    assert [path.name for path in tmp_path.iterdir()] == ["junk.npz"]
