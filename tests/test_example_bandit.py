"""The example runs as its reader would run it, learns, and finds Δℓ and Δ log π moving together."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "example_bandit.py"


@pytest.mark.slow
def test_the_bandit_learns_and_draws_its_picture(tmp_path):
    command = [sys.executable, SCRIPT]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "bandit.png").read_bytes().startswith(b"\x89PNG")
    number = r"(-?\d\.\d+)"
    last = re.search(f"mean reward {number} before, {number} after; correlation {number}", result.stdout)
    before, after, correlation = map(float, last.groups())
    assert before < 0.2  # N(0, I) has 0.10
    assert after > 0.75  # ten seeds have 0.91 to 0.99
    assert correlation > 0.8  # ten seeds have 0.93 to 0.99


def test_it_is_as_short_as_it_promises():
    lines = SCRIPT.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 70 and max(map(len, lines)) <= 110
