"""Memory of a run, while it runs: a line every half minute, until it ends.

    python tools/watch_memory.py PID memory.csv     # PID: of train_aloha.py, say

Counted is the proportional set size (Linux) of the process and everything it has started: memory that several
processes share counts once.
"""

import csv
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import psutil

from support.run_files import stop

if __name__ == "__main__":
    try:
        parent, file = psutil.Process(int(sys.argv[1])), open(sys.argv[2], "a", newline="")
    except (IndexError, ValueError, OSError, psutil.NoSuchProcess):
        stop("give a running process and a file to write, as python tools/watch_memory.py 1234 memory.csv")
    start = time.monotonic()
    with file:  # of a resumed run too: its seconds start from 0 again
        writer = csv.writer(file)
        if not file.tell():
            writer.writerow(("seconds", "processes", "pss_mib"))
        while parent.is_running() and parent.status() != psutil.STATUS_ZOMBIE:
            try:
                family = [parent, *parent.children(recursive=True)]
                pss = sum(process.memory_full_info().pss for process in family) / 2**20
                writer.writerow((f"{time.monotonic() - start:.0f}", len(family), f"{pss:.1f}"))
                file.flush()
            except psutil.NoSuchProcess:  # one has just ended
                pass
            time.sleep(30)
