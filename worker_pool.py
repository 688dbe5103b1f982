"""Simulator processes: a pool that survives a worker's death, because its jobs are pure functions.

    if __name__ == "__main__":                             # the processes import the script that starts them
        pool = WorkerPool(2, Simulator)                    # each process builds its own Simulator()
        results = pool.map(Simulator.reset, poses)         # simulator.reset(pose) for every pose, in order

A job must not depend on what the process did before. Then a dead worker's job is simply done again elsewhere.
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

from tqdm import tqdm

WORKER_TIMEOUT = 300.0  # seconds
LARGEST_PIECE = 64  # jobs

_simulator = None  # one a worker process


def _start_worker(build, arguments):
    global _simulator
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def exit_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()
    try:
        _simulator = build(*arguments)
    except Exception as error:  # told by the first job: what an initializer raises, the parent sees as a death without a cause
        _simulator = error


def _call(function, jobs):
    try:
        if isinstance(_simulator, Exception):
            raise _simulator
        return [function(_simulator, *job) for job in jobs]
    except Exception as error:  # not a death: the same job would fail the same way again
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = " ".join(str(error).split())
        raise ChildProcessError(f"a simulator failed with {type(error).__name__}: {text} ({where.filename}:{where.lineno})") from None


def progress(iterable=None, total=None, description=None):
    """A progress bar, on stderr, for what may take long: it shows after three seconds. Under torchrun one process of a machine has it."""
    return tqdm(iterable, total=total, desc=description, leave=False, delay=3, mininterval=0.5 if sys.stderr.isatty() else 5.0,
                disable=description is None or os.environ.get("LOCAL_RANK", "0") != "0")  # fmt: skip


class WorkerPool:
    """`num_workers` processes, each with its own `build(*arguments)`. A worker that dies, or needs more than `timeout` seconds
    for a piece of work (its start included, and up to 64 of the jobs of a map), is replaced and its jobs are done again; a job that
    kills its worker twice is lost. What a job or the build *raises* comes back at once, as a ChildProcessError with its words."""

    def __init__(self, num_workers, build, *arguments, timeout=WORKER_TIMEOUT):
        self.num_workers, self.initargs, self.timeout = num_workers, (build, arguments), timeout
        self._start()

    def _start(self):
        # spawn: a forked child of a process that runs torch threads or CUDA may hang
        context = multiprocessing.get_context("spawn")
        sys.modules["__main__"].__dict__.setdefault("__spec__", None)  # under pdb it is missing, and spawn asks for it
        try:
            self.executor = ProcessPoolExecutor(
                self.num_workers, mp_context=context, initializer=_start_worker, initargs=self.initargs
            )
        except OSError as error:
            raise ChildProcessError(
                f"simulator processes cannot be started ({error.strerror}); they need room in /dev/shm (in Docker: --shm-size)"
            ) from None

    def map(self, function, *columns, may_lose=False, description=None):
        """[function(simulator, *job) for job in zip(*columns)], spread over the workers. ChildProcessError if a job is lost;
        with may_lose it gives None, so that it costs one episode and not the run, and the error comes if several are lost and no other is left.
        description: of a progress bar."""
        jobs = list(zip(*columns))
        # a message costs, so the first pieces are large; the last ones are small, so that all workers are busy to the end
        cuts = [0]
        while cuts[-1] < len(jobs):
            cuts.append(cuts[-1] + min(math.ceil((len(jobs) - cuts[-1]) / (2 * self.num_workers)), LARGEST_PIECE))
        try:
            pieces = [self.executor.submit(_call, function, jobs[i:j]) for i, j in zip(cuts, cuts[1:])]
            results = []
            with progress(total=len(jobs), description=description) as bar:
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
                f"{lost} of {len(results)} jobs killed their simulator process twice, or kept it silent for {self.timeout:g} s each time"
                "; run env_aloha.py or env_libero.py alone to see whether the simulator works here, "
                'and give a script of your own `if __name__ == "__main__":`'
            )
        return results

    def _restart(self):
        self.close()
        self._start()

    def close(self):
        """Stop the processes at once."""
        for process in list((self.executor._processes or {}).values()):
            process.kill()
        self.executor.shutdown(wait=True, cancel_futures=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
