"""Simulator processes. Knows no simulator itself.

    if __name__ == "__main__":                                   # the processes import this script
        with Workers(build, tasks, num_workers=2) as workers:    # build(tasks) -> {task: simulator} in each
            states, observations = workers.reset(tasks, starts)  # n episodes begin
            chunks = workers.run(tasks, states, actions)         # n chunks of actions are executed

An environment *is* its state vector: every job of a worker is a pure function of its arguments. So results do
not depend on the number of workers, a checkpoint is a copy of the state vectors, and a worker that dies is
replaced and its work done again. A simulator (envs/aloha.py, envs/libero.py) has the methods

    reset(start) -> state, observation                 run(state, actions, stop_at_success, record) -> Chunk
    look(state, sizes) -> what a camera policy sees    render(frames, camera, height, width) -> pictures
"""

import math
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import repeat

import numpy as np
from tqdm import tqdm

TIMEOUT = 300.0  # seconds that a piece of work may take, the start of a worker included
LARGEST_PIECE = 64  # jobs

_simulators = None  # {task: simulator}, in a worker process


@dataclass
class Chunk:
    """What `run` of a simulator did. T is the number of control steps really executed."""

    state: np.ndarray  # (S,) after the last step; before the first if diverged
    observation: np.ndarray  # in that state
    success: np.ndarray  # (T,) bool, after each step
    diverged: bool  # MuJoCo found a non-finite or absurd state: the episode has failed
    frames: np.ndarray | None  # (T + 1, F) with record=True, for `render`: before the first, after every step


# ---- inside a worker process ----


def _start_worker(build, tasks):
    global _simulators
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def exit_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()
    try:
        _simulators = build(tasks)
    except Exception as error:  # told by the first job; raised here it would look like a death
        _simulators = error


def _call(function, jobs):
    try:
        if isinstance(_simulators, Exception):
            raise _simulators
        return [function(_simulators, *job) for job in jobs]
    except Exception as error:  # not a death: the same job would fail the same way again
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = " ".join(str(error).split())
        sentence = f"a simulator failed with {type(error).__name__}: {text} ({where.filename}:{where.lineno})"
        raise ChildProcessError(sentence) from None


def _reset(simulators, task, start, pictures):
    state, observation = simulators[task].reset(start)
    return state, simulators[task].look(state, pictures) if pictures else observation


def _run(simulators, task, state, actions, stop_at_success, record, pictures):
    chunk = simulators[task].run(state, actions, stop_at_success, record)
    if pictures:
        chunk.observation = simulators[task].look(chunk.state, pictures)
    return chunk


def _look(simulators, task, state, pictures):
    return simulators[task].look(state, pictures)


def _render(simulators, task, frames, options):
    return simulators[task].render(frames, **options)


# ---- in the process that owns them ----


def progress(iterable, description, total=None):
    """A progress bar, on stderr, for what may take long: it shows after three seconds. Under torchrun one
    process of a machine has it."""
    hidden = description is None or os.environ.get("LOCAL_RANK", "0") != "0"
    pause = 0.5 if sys.stderr.isatty() else 5.0  # seconds between two looks
    return tqdm(iterable, description, total, leave=False, delay=3, mininterval=pause, disable=hidden)


def stack(observations, pictures):
    """n observations as one array: (n, S) of state vectors, or with pictures (n,) of objects."""
    return np.fromiter(observations, object) if pictures else np.stack(observations)


class Workers:
    """`num_workers` processes, each with its own `build(tasks)`. A worker that dies, or keeps silent for
    `timeout` seconds over a piece of work (up to 64 jobs), is replaced and its jobs are done again; a job
    that does so twice is lost. What a job or the build *raises* comes back at once, as a ChildProcessError
    with its words.

    With `pictures`, {camera: (height, width)}, observations are what the simulators' `look` gives, an object
    array, instead of state vectors. There None stands for an episode that is over or was lost.
    """

    def __init__(self, build, tasks, num_workers, pictures=None, timeout=TIMEOUT):
        self.build, self.tasks, self.num_workers = build, list(tasks), num_workers
        self.pictures, self.timeout = pictures, timeout

    def reset(self, tasks, starts, description=None):
        """Start n episodes. description: of a progress bar -> list of n states, n observations."""
        results = self.map(_reset, tasks, starts, repeat(self.pictures), description=description)
        states, observations = zip(*results)
        self.nothing_seen = None if self.pictures else np.zeros_like(observations[0])
        return list(states), stack(observations, self.pictures)

    def run(self, tasks, states, actions, stop_at_success=False, record=False):
        """`run` of the simulators for every row. actions: n arrays (T, A) -> list of n `Chunk`. One whose
        worker died over it comes back as a diverged one: no step, and the episode has failed."""
        same = repeat(stop_at_success), repeat(record), repeat(self.pictures)
        chunks = self.map(_run, tasks, states, actions, *same, may_lose=True)
        lost = self.nothing_seen, np.zeros(0, bool), True, None
        return [chunk or Chunk(state, *lost) for chunk, state in zip(chunks, states)]

    def look(self, tasks, states):
        """The observations in n states, with pictures."""
        return stack(self.map(_look, tasks, states, repeat(self.pictures)), self.pictures)

    def render(self, tasks, frames, **options):
        """Pictures for a list of recorded episodes, in parallel. options: camera, height, width."""
        return self.map(_render, tasks, frames, repeat(options))

    def map(self, function, *columns, may_lose=False, description=None):
        """[function(simulators, *job) for job in zip(*columns)], spread over the workers. ChildProcessError
        if a job is lost; with may_lose it gives None, so that it costs one episode and not the run, and the
        error comes if several are lost and no other is left."""
        jobs = list(zip(*columns))
        # a message costs, so the first pieces are large; the last ones are small, so that all workers are
        # busy to the end
        cuts = [0]
        while cuts[-1] < len(jobs):
            left = len(jobs) - cuts[-1]
            cuts.append(cuts[-1] + min(math.ceil(left / (2 * self.num_workers)), LARGEST_PIECE))
        results = []
        try:
            pieces = [self.executor.submit(_call, function, jobs[i:j]) for i, j in zip(cuts, cuts[1:])]
            with progress(None, description, len(jobs)) as bar:
                for piece in pieces:
                    results += piece.result(self.timeout)
                    bar.update(len(results) - bar.n)
            return results
        except (BrokenProcessPool, TimeoutError):
            self._restart()
        results = []
        for job in jobs:  # one by one, to find the job that does it
            try:
                results += self.executor.submit(_call, function, [job]).result(self.timeout)
            except (BrokenProcessPool, TimeoutError):
                self._restart()
                results.append(None)
        lost = sum(r is None for r in results)
        if lost and (not may_lose or lost == len(results) > 1):
            raise ChildProcessError(
                f"{lost} of {len(results)} jobs killed their simulator process twice, or kept it silent for "
                f"{self.timeout:g} s each time; run `python -m envs.aloha` or `python -m envs.libero` to see "
                'whether the simulator works here, and give a script of your own `if __name__ == "__main__":`'
            )
        return results

    def __enter__(self):
        # spawn: a forked child of a process that runs torch threads or CUDA may hang
        context = multiprocessing.get_context("spawn")
        sys.modules["__main__"].__dict__.setdefault("__spec__", None)  # spawn asks for it; missing under pdb
        start = self.num_workers, context, _start_worker, (self.build, self.tasks)
        try:
            self.executor = ProcessPoolExecutor(*start)
        except OSError as error:
            sentence = f"simulator processes cannot be started ({error.strerror}); they need room in /dev/shm"
            raise ChildProcessError(f"{sentence} (in Docker: --shm-size)") from None
        return self

    def _restart(self):
        self.__exit__()
        self.__enter__()

    def __exit__(self, *_):
        """Stop the processes at once."""
        for process in list((self.executor._processes or {}).values()):
            process.kill()
        self.executor.shutdown(wait=True, cancel_futures=True)
