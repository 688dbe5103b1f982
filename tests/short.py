"""A train script as a user starts it, but with episodes of ALOHA of two decisions: short.py SCRIPT FLAGS."""

import runpy
import sys
from pathlib import Path

HORIZON = 80  # control steps, for 400

if __name__ == "__main__":
    root = Path(__file__).parents[1]
    sys.path[0], sys.argv = str(root), [str(root / sys.argv[1]), *sys.argv[2:]]
    from envs import aloha

    aloha.HORIZON = HORIZON
    runpy.run_path(sys.argv[0], run_name="__main__")
