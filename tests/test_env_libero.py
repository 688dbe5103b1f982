"""The lean LIBERO loop against the stock robosuite environment, and its independence of workers and of
history."""

import sys
from functools import partial

import numpy as np
import pytest

from envs.libero import FIXTURE_SEED, OBSERVATION_DIM, OFFICIAL_STATES, SETTLING, STEP_LIMIT, Simulator, build
from envs.libero import draw_start, official, parse_task_ids, placed, quiet, suite
from envs.episodes import TrainingEnvs, play_episodes
from envs.workers import Workers
from helpers import ROOT

import mujoco  # after envs.libero, which picks the OpenGL library

sys.path.insert(0, str(ROOT / "tools"))

BUTTER = ("libero_90", 56)


def start_workers(num_workers):
    return Workers(partial(build, BUTTER[0], True), [BUTTER[1]], num_workers)


def training_envs(workers, num_envs, seed):
    limit = STEP_LIMIT[BUTTER[0]]
    return TrainingEnvs(workers, [BUTTER[1]], num_envs, draw_start, limit, seed)


def stock_environment(suite_name, task_id, initialization_noise=None):
    with quiet():
        from libero.libero.envs.env_wrapper import ControlEnv

        path = suite(suite_name).get_task_bddl_file_path(task_id)
        return ControlEnv(
            path,
            use_camera_obs=False,
            has_offscreen_renderer=False,
            hard_reset=False,
            initialization_noise=initialization_noise,
        )


def stock_reset(stock, simulator, start):
    """The protocol of the papers: seed, reset, official state if any, ten settling steps. A placement is set
    like an official state."""
    kind, number = start
    stock.seed(number if kind == "placed" else FIXTURE_SEED)
    stock.reset()
    if kind == "placed":
        simulator._place(number)
        stock.sim.data.qpos[:] = simulator.data.qpos
    gripper = stock.robots[0].gripper
    gripper.current_action = np.zeros_like(gripper.current_action)  # robosuite forgets to reset it
    if kind == "official":
        stock.set_init_state(simulator.official_states[number])
    for action in SETTLING:
        observation, *_ = stock.step(action)
    return observation


def without_warm_start(*models):
    """MuJoCo's solver stops within a tolerance, and where depends on where it starts: from its last result.
    The stock environment solves three times a substep and ours once, so that without this they differ by
    1e-10 at first, and by what contacts make of it later."""
    for model in models:
        model.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_WARMSTART


@pytest.fixture(scope="module")
def simulator():
    return Simulator(*BUTTER)


@pytest.fixture(scope="module")
def workers():
    with start_workers(2) as pool:
        yield pool


def without_warm_start_both(suite_name, task_id):
    simulator, stock = Simulator(suite_name, task_id), stock_environment(suite_name, task_id)
    assert simulator.model.ntex == 0 < stock.sim.model._model.ntex  # ours has nothing to see
    without_warm_start(simulator.model, stock.sim.model._model)
    return simulator, stock


@pytest.fixture(scope="module")
def both():
    """Our simulator of butter/tray and the stock one, without warm start."""
    return without_warm_start_both(*BUTTER)


# Two hundred steps of a demonstration: reaching, closing on the object, carrying, letting go. From the same
# state nine steps in ten agree with the stock environment's to 1e-12 (half of them to 1e-15). In the others a
# mesh slides on a mesh: MuJoCo 3.3.2 finds such contacts by iteration (tolerance 1e-6), so that rounding may
# grow to 7e-5 within a step, in the stock environment as in ours.
@pytest.mark.parametrize(
    "suite_name, task_id, start, wait",
    [
        (*BUTTER, official(0), 1),
        pytest.param("libero_spatial", 0, placed(3), 12, marks=pytest.mark.slow),
        pytest.param("libero_object", 1, placed(3), 1, marks=pytest.mark.slow),
        pytest.param("libero_goal", 3, official(0), 12, marks=pytest.mark.slow),
        pytest.param("libero_10", 0, placed(3), 12, marks=pytest.mark.slow),
    ],
)
def test_same_actions_same_states_and_success_as_the_stock_environment(
    both, suite_name, task_id, start, wait, monkeypatch
):
    import demo_libero

    # above the place; the longer meshes touch in the hand, the further free runs drift apart
    monkeypatch.setattr(demo_libero, "WAIT", wait)
    butter = (suite_name, task_id) == BUTTER
    simulator, stock = both if butter else without_warm_start_both(suite_name, task_id)
    stock_observation = stock_reset(stock, simulator, start)
    state, observation = simulator.reset(start)
    nq = simulator.model.nq
    np.testing.assert_allclose(simulator.data.qpos, stock.sim.data.qpos, atol=1e-9)
    demonstrator, contacts, flags, errors = demo_libero.Demonstrator(simulator), 0, [], []
    for _ in range(200):
        action = np.clip(next(demonstrator.actions), -1, 1)
        simulator._set_state(state)
        simulator.data.qpos[:], simulator.data.qvel[:] = stock.sim.data.qpos, stock.sim.data.qvel
        step = simulator.run(simulator._get_state(), action[None], record=True)
        chunk = simulator.run(state, action[None], record=True)
        state = chunk.state
        stock_observation, *_ = stock.step(action)
        errors.append(
            np.abs(np.stack([step.frames[-1][:nq], chunk.frames[-1][:nq]]) - stock.sim.data.qpos).max(1)
        )
        assert chunk.success[0] == stock.check_success()
        flags.append(chunk.success[0])
        contacts = max(contacts, stock.sim.data.ncon)
    alone, together = np.array(errors).T
    assert np.quantile(alone, 0.9) < 1e-12 and alone.max() < 2e-4
    assert np.quantile(together, 0.5) < 1e-5 and together.max() < 5e-4  # 200 steps without being put right
    assert contacts > 4
    # robosuite samples its observables somewhere within the control step: a millimetre, not a rounding error
    height, near = [0, 0, simulator.height], dict(atol=2e-3)
    np.testing.assert_allclose(chunk.observation[:3], stock_observation["robot0_eef_pos"] - height, **near)
    np.testing.assert_allclose(chunk.observation[9:11], stock_observation["robot0_gripper_qpos"], **near)
    cosines = np.cos(chunk.observation[12:19])  # a joint that turns fast goes farther in that time
    np.testing.assert_allclose(cosines, stock_observation["robot0_joint_pos_cos"], atol=5e-3)
    name = simulator.goals[simulator.subgoal()][1]
    to_object = stock_observation[f"{name}_pos"] - stock_observation["robot0_eef_pos"]
    np.testing.assert_allclose(chunk.observation[19:22], to_object, **near)
    assert chunk.observation.shape == (OBSERVATION_DIM[suite_name],)
    if suite_name in ("libero_90", "libero_spatial", "libero_object"):
        assert any(flags)  # the comparison of success saw both values


# Pull, put in a drawer, drag, twist, push shut, put inside and swing shut; 15 cm short, it closes on nothing
@pytest.mark.slow
@pytest.mark.parametrize("aim", [None, (0.15, 0.3, -0.25, 5.0, 1.0)])
@pytest.mark.parametrize(
    "suite_name, task_id",
    [*(("libero_goal", k) for k in (0, 3, 5, 7)), *(("libero_10", k) for k in (3, 9))],
)
def test_the_demonstrator_does_each_kind_of_goal(suite_name, task_id, aim):
    from demo_libero import demonstrate

    simulators = build(suite_name, False, [task_id])
    own = official(0), aim, [2, 0, 0]
    episode = demonstrate(simulators, task_id, *own, STEP_LIMIT[suite_name], 40, push=0.0, record=False)
    assert episode["success"] == (aim is None) and np.abs(episode["actions"]).max() <= 1


def test_every_official_state_is_the_one_that_libero_ships(both):
    simulator, stock = both
    assert simulator.official_states.shape[0] == OFFICIAL_STATES
    for i in (1, 25, 49):
        stock_reset(stock, simulator, official(i))
        simulator.reset(official(i))
        np.testing.assert_allclose(simulator.data.qpos, stock.sim.data.qpos, atol=1e-9)


def test_a_run_does_not_depend_on_what_came_before(simulator):
    rng = np.random.default_rng(0)
    actions = rng.uniform(-1, 1, (12, 7))
    state, _ = simulator.reset(placed(5))
    whole = simulator.run(state, actions)
    other, _ = simulator.reset(official(3))
    simulator.run(other, -actions)
    first = simulator.run(state, actions[:5])
    simulator.run(other, actions)
    second = simulator.run(first.state, actions[5:])
    np.testing.assert_array_equal(whole.state, second.state)
    np.testing.assert_array_equal(whole.observation, second.observation)


def test_fixtures_travel_with_the_state():
    simulator = Simulator("libero_goal", 0)
    assert len(simulator.fixtures) > 0
    one, _ = simulator.reset(placed(1))
    pose = simulator.model.body_pos[simulator.fixtures].copy()
    simulator.reset(placed(2))
    assert np.abs(pose - simulator.model.body_pos[simulator.fixtures]).max() > 1e-4
    simulator.run(one, np.zeros((1, 7)))
    np.testing.assert_array_equal(pose, simulator.model.body_pos[simulator.fixtures])


def test_what_a_goal_needs_opened_is_observed(simulator):
    """A drawer that opens by 5 cm, along x here, has its handle 5 cm farther; the butter needs nothing."""
    assert not simulator.reset(official(0))[1][44:48].any()
    cabinet = Simulator("libero_goal", 0)
    state, shut = cabinet.reset(official(0))
    drawer = cabinet.model.joint("wooden_cabinet_1_middle_level")
    cabinet._set_state(state)
    cabinet.data.qpos[drawer.qposadr[0]] -= 0.05
    mujoco.mj_forward(cabinet.model, cabinet.data)
    moved = (cabinet.observe() - shut)[44:48]
    np.testing.assert_allclose([moved[0], np.linalg.norm(moved[1:])], [-0.05, 0.05], atol=1e-6)


@pytest.mark.slow
def test_placements_come_from_the_regions_and_are_never_an_official_state(simulator, workers):
    """The butter's region is 5 cm wide (BDDL). No training start is within 1 mm of an official one, both
    settled, in all objects."""
    envs = training_envs(workers, 8, seed=0)
    body = simulator.env.obj_body_id["butter_1"]
    low, high = np.array([0.025, 0.025]) - 1e-3, np.array([0.075, 0.075]) + 1e-3

    def objects(state):
        simulator._set_state(state)
        return simulator.data.qpos[9:].copy()

    officials = np.array([objects(simulator.reset(official(i))[0]) for i in range(OFFICIAL_STATES)])
    for state in envs.states:
        assert np.abs(officials - objects(state)).max(1).min() > 1e-3
        simulator.run(state, np.zeros((1, 7)))
        assert (simulator.data.xpos[body][:2] > low).all() and (simulator.data.xpos[body][:2] < high).all()


def test_the_stock_seed_gives_the_same_placement(simulator):
    """robosuite with its default noise on the arm; and the official states, in all of which the arm has been
    moved as much."""
    stock = stock_environment(*BUTTER, initialization_noise="default")
    for seed in (0, 11):
        simulator._place(seed)
        stock.seed(seed)
        stock.reset()
        np.testing.assert_array_equal(simulator.data.qpos, stock.sim.data.qpos)
    spread = simulator.official_states[:, 1:8].std(0)
    assert (0.01 < spread).all() and (spread < 0.03).all()
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    simulator._place(3)
    np.testing.assert_array_equal(before, np.random.get_state()[1])  # the global generator is left as it was


@pytest.mark.slow
def test_what_stands_on_a_fixture_is_placed_there():
    """A bowl on the stove: the same placements as a hard reset gives, which rebuilds the model, also after
    other placements."""
    with quiet():
        from libero.libero.envs.env_wrapper import ControlEnv

        stock = ControlEnv(
            suite("libero_spatial").get_task_bddl_file_path(7),
            use_camera_obs=False,
            has_offscreen_renderer=False,
            hard_reset=True,
            initialization_noise="default",
        )
    simulator = Simulator("libero_spatial", 7)
    for seed in (3, 8):
        simulator._place(seed)
        stock.seed(seed)
        stock.reset()
        np.testing.assert_array_equal(simulator.data.qpos, stock.sim.data.qpos)
        poses = stock.sim.model.body_pos[simulator.fixtures]
        np.testing.assert_array_equal(simulator.model.body_pos[simulator.fixtures], poses)
        stove = poses[np.argmin(np.linalg.norm(poses[:, :2] - [-0.41, -0.14], axis=1))]
        mujoco.mj_forward(simulator.model, simulator.data)
        assert (
            np.linalg.norm(
                (simulator.data.xpos[simulator.env.obj_body_id[simulator.goals[0][1]]] - stove)[:2]
            )
            < 0.2
        )


@pytest.mark.slow
def test_the_number_of_workers_changes_nothing(workers):
    actions = np.random.default_rng(1).uniform(-1, 1, (2, 5, 4, 7))
    results = []
    with start_workers(1) as single:
        for pool in (workers, single):
            envs = training_envs(pool, 5, seed=4)
            for a in actions:
                step = envs.step(a)
            results.append((np.stack(envs.states), envs.observations, step["last_observation"]))
    for a, b in zip(*results):
        np.testing.assert_array_equal(a, b)


def test_truncation_reports_the_last_state_and_starts_anew(workers):
    envs = training_envs(workers, 2, seed=0)
    envs.steps[:] = [STEP_LIMIT["libero_90"] - 3, 0]
    before = envs.observations.copy()
    step = envs.step(np.tile([0, 0, 1.0, 0, 0, 0, -1], (2, 8, 1)))
    assert (
        list(step["num_steps"]) == [3, 8]
        and list(step["truncated"]) == [True, False]
        and not step["terminated"].any()
    )
    assert step["last_observation"][0, 2] > before[0, 2] + 0.005  # it had risen
    assert list(envs.steps) == [0, 8]
    assert np.abs(envs.observations[0] - step["last_observation"][0]).max() > 1e-3


def test_state_dict_continues_exactly(workers):
    actions = np.random.default_rng(2).uniform(-1, 1, (3, 2, 6, 7))
    envs = training_envs(workers, 2, seed=1)
    envs.steps[0] = STEP_LIMIT["libero_90"] - 8  # an episode ends on the way
    envs.step(actions[0])
    saved = {k: (v.copy() if hasattr(v, "copy") else v) for k, v in envs.state_dict().items()}
    for a in actions[1:]:
        envs.step(a)
    again = training_envs(workers, 2, seed=99)
    again.load_state_dict(saved)
    for a in actions[1:]:
        again.step(a)
    np.testing.assert_array_equal(np.stack(envs.states), np.stack(again.states))
    np.testing.assert_array_equal(envs.observations, again.observations)


def test_absurd_actions_fail_the_episode_and_not_the_run(workers):
    envs = training_envs(workers, 2, seed=0)
    actions = np.zeros((2, 4, 7))
    actions[1] = np.nan
    step = envs.step(actions)
    assert list(step["terminated"]) == [False, True] and not step["success"].any()
    assert np.isfinite(step["last_observation"]).all()


@pytest.mark.parametrize("speed", [1e6, 1e11])
def test_diverged_physics_fail_the_chunk(simulator, speed):
    """At 1e11 MuJoCo has put the arm to its zero pose, where the controller's equations are singular."""
    state, observation = simulator.reset(official(0))
    simulator._set_state(state)
    simulator.data.qvel[:7] = speed
    chunk = simulator.run(simulator._get_state(), np.zeros((3, 7)))
    assert chunk.diverged and len(chunk.success) == 0 and np.isfinite(chunk.observation[:3]).all()
    np.testing.assert_array_equal(
        simulator.reset(official(0))[1], observation
    )  # and the next episode is as it would have been


def test_episodes_end_at_success_or_at_the_limit(workers, simulator):
    """Evaluation from official states: an idle policy plays the official limit to the end and fails."""

    def idle(observations):
        return np.tile([0, 0, 0, 0, 0, 0, -1.0], (len(observations), 100, 1))

    starts = [official(0), official(1)]
    result = play_episodes(workers, [56, 56], starts, idle, STEP_LIMIT["libero_90"], record=True)
    assert (
        list(result["length"]) == [400, 400]
        and not result["success"].any()
        and list(result["decisions"]) == [4, 4]
    )
    assert [len(f) for f in result["frames"]] == [401, 401]  # the first state too


def test_rendering_follows_the_recorded_arm(workers):
    states, _ = workers.reset([56], [official(0)])
    chunk = workers.run([56], states, np.tile([0, 1.0, 0, 0, 0, 0, -1], (1, 12, 1)), record=True)[0]
    first, last = workers.render([56], [chunk.frames[[0, -1]]], height=64, width=64)[0].astype(int)
    assert first.shape == (64, 64, 3) and first.std() > 20  # a picture, not a blank
    assert (np.abs(first - last).max(-1) > 30).mean() > 0.01  # and the arm has moved in it


@pytest.mark.slow
def test_pictures_and_robot_state_are_those_of_the_stock_environment():
    """What lerobot's LiberoEnv hands to π_0: same pictures but for some pixels at edges, same poses within a
    step's sampling."""
    from libero.libero.envs.env_wrapper import OffScreenRenderEnv

    simulator = Simulator("libero_spatial", 0, pictures=True)
    size = (96, 96)
    with quiet():
        bddl = suite("libero_spatial").get_task_bddl_file_path(0)
        stock = OffScreenRenderEnv(bddl_file_name=bddl, camera_heights=size[0], camera_widths=size[1])
    state, _ = simulator.reset(official(4))
    raw = stock_reset(stock, simulator, official(4))
    observation = simulator.look(state, dict(image=size, image2=size))
    for camera, name in (("image", "agentview_image"), ("image2", "robot0_eye_in_hand_image")):
        ours, theirs = observation["pixels"][camera].astype(int), raw[name].astype(int)
        assert theirs.std() > 20 and (np.abs(ours - theirs).max(-1) > 2).mean() < 0.02
    robot = observation["robot_state"]
    for ours, name in (
        (robot["eef"]["pos"], "eef_pos"),
        (robot["eef"]["quat"], "eef_quat"),
        (robot["gripper"]["qpos"], "gripper_qpos"),
        (robot["joints"]["pos"], "joint_pos"),
        (robot["joints"]["vel"], "joint_vel"),
    ):
        np.testing.assert_allclose(ours, raw[f"robot0_{name}"], atol=2e-3)
    assert (
        observation["task"]
        == "pick up the black bowl between the plate and the ramekin and place it on the plate"
    )
    simulator.reset(official(7))
    again = simulator.look(state, dict(image=size, image2=size))  # a pure function of the state
    np.testing.assert_array_equal(observation["pixels"]["image2"], again["pixels"]["image2"])
    stock.close()


@pytest.mark.parametrize("text, word", [("3,x", "3,x"), ("10", "10"), ("-1", "-1")])
def test_task_ids_that_do_not_exist(text, word):
    with pytest.raises(ValueError, match=word):
        parse_task_ids("libero_goal", text)
    assert parse_task_ids("libero_goal", "all") == list(range(10)) and parse_task_ids(
        "libero_90", "56,3"
    ) == [56, 3]
