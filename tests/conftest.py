import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
# tests run side by side: what they start takes one core each (support/ranks.py)
os.environ["LOCAL_WORLD_SIZE"] = str(os.cpu_count() or 1)
sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    torch.set_num_threads(1)
