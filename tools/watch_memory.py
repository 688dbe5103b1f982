"""Memory of a run, while it runs: a line every half minute, until it ends.

    python tools/watch_memory.py PID memory.csv     # PID: of train_aloha.py, say

Counted is the proportional set size (Linux) of the process and everything it has started: memory that several
processes share counts once.
"""

import contextlib
import sys
import time

from shared import stop
import psutil

if __name__ == "__main__":
    try:
        parent, file = psutil.Process(int(sys.argv[1])), open(sys.argv[2], "a")
    except (IndexError, ValueError, OSError, psutil.NoSuchProcess):
        stop("give a running process and a file to write, as python tools/watch_memory.py 1234 memory.csv")
    start = time.monotonic()
    with file:  # of a resumed run too: its seconds start from 0 again
        if not file.tell():
            print("seconds,processes,pss_mib", file=file)
        while parent.is_running() and parent.status() != psutil.STATUS_ZOMBIE:
            with contextlib.suppress(psutil.NoSuchProcess):  # one has just ended
                family = [parent, *parent.children(recursive=True)]
                pss = sum(process.memory_full_info().pss for process in family) / 2**20
                print(f"{time.monotonic() - start:.0f},{len(family)},{pss:.1f}", file=file, flush=True)
            time.sleep(30)
