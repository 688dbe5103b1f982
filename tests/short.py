"""A script as a user starts it, but with episodes of ALOHA of two decisions: short.py SCRIPT FLAGS."""

import runpy
import sys
from pathlib import Path

HORIZON = 80  # control steps, for 400

if __name__ == "__main__":
    path = Path(__file__).parents[1] / sys.argv[1]
    sys.path[:1] = [str(path.parent), str(path.parents[len(Path(sys.argv[1]).parts) - 1])]
    sys.argv = [str(path), *sys.argv[2:]]
    from envs import aloha

    aloha.HORIZON = HORIZON
    runpy.run_path(str(path), run_name="__main__")
