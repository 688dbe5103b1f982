"""What a script has to know of the tasks that it trains or plays: ALOHA's one, or those of a LIBERO suite."""

from dataclasses import dataclass
from functools import partial
from typing import Any, Callable

from support.flags import stop


@dataclass
class Suite:
    """`tasks` are the keys of {task: simulator} that `build(tasks)` makes in every worker process
    (workers.py)."""

    name: str  # what a base for it is called: aloha, libero_goal, libero_90_task56
    tasks: list
    names: dict  # {task: its name}
    limit: int  # control steps an episode
    build: Callable
    draw_start: Callable  # rng -> the start of a training episode
    starts: list[Any]  # of evaluation, the same for every task; training never sees them
    cameras: tuple  # names, for a policy that sees pictures
    fps: int  # control steps a second
    num_episodes: int  # a task, in an evaluation


def load_suite(name, task_ids=None, pictures=False):
    """The suite called `name`; task_ids: of LIBERO, numbers with commas or "all", if left out all, of
    libero_90 56. Stops with one sentence if there is no such task, or the simulator cannot be used here (with
    `pictures`: draw)."""
    if name == "aloha":
        from envs import aloha

        if pictures and (problem := aloha.opengl_problem()):
            stop(f"pictures need OpenGL: {problem}")
        return Suite(
            name="aloha",
            tasks=[aloha.TASK],
            names={aloha.TASK: "Transfer Cube"},
            limit=aloha.HORIZON,
            build=aloha.build,
            draw_start=aloha.draw_start,
            starts=list(aloha.evaluation_poses(1000)),
            cameras=("top",),
            fps=aloha.FPS,
            num_episodes=200,
        )
    from envs import libero

    if problem := libero.libero_problem(pictures):
        stop(problem)
    try:
        tasks = libero.parse_task_ids(name, task_ids or ("56" if name == "libero_90" else "all"))
    except ValueError as error:
        stop(str(error))
    return Suite(
        name="libero_90_task56" if (name, tasks) == ("libero_90", [56]) else name,
        tasks=tasks,
        names={k: libero.suite(name).get_task(k).name for k in tasks},
        limit=libero.STEP_LIMIT[name],
        build=partial(libero.build, name, pictures),
        draw_start=libero.draw_start,
        starts=[libero.official(i) for i in range(libero.OFFICIAL_STATES)],
        cameras=tuple(libero.CAMERAS),
        fps=libero.FPS,
        num_episodes=libero.OFFICIAL_STATES,
    )


def cloned_tasks(suite, base):
    """The tasks that the base was cloned on: those that count. Stops if there is none."""
    tasks = [k for k in suite.tasks if k in base.header.get("task_ids", suite.tasks)]
    if not tasks:
        what = f"--task-ids names tasks {suite.tasks} of {suite.name}, but the base was cloned on the tasks"
        stop(f"{what} {base.header['task_ids']} alone; name some of them")
    return tasks
