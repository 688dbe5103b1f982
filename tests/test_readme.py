"""README's map points at the lines it says, and the commands of README and docs/ are those that exist."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))

from equation_map import ENTRIES

PAGES = {path: path.read_text() for folder in (".", "docs", "results") for path in (ROOT / folder).glob("*.md")}
README = PAGES[ROOT / "README.md"]


def test_every_line_of_the_map_carries_what_the_map_says():
    entries = re.findall(r"\| (.+?) \| \[([\w/]+\.py):(\d+)\]\(.+?\) \| `(.+?)` \|", README)
    assert [(name, file, code) for name, file, _, code in entries] == ENTRIES  # what tools/equation_map.py would write
    for name, file, line, code in entries:
        assert code in (ROOT / file).read_text().splitlines()[int(line) - 1], f"{name}: {file}:{line} does not hold {code}"


def test_every_logged_metric_is_explained():
    for script in ("train_aloha.py", "train_libero.py"):
        metrics = re.search(r'METRICS = \(\n(.+?)\n    \)', (ROOT / script).read_text(), re.S).group(1)
        names = re.findall(r"\w+/\w+", metrics)
        assert len(names) > 25
        for name in names:
            assert name in PAGES[ROOT / "docs" / "run_files.md"], name


OTHERS = {"logdir", "nproc-per-node", "max-restarts", "nnodes", "rdzv-backend", "rdzv-endpoint", "python"}


def test_every_flag_and_file_named_exists():
    files = {"train_aloha.py", "train_libero.py", "tools/clone_base.py", "tools/plots.py", "tools/fault_campaign.py",
             "tools/check_monotonicity.py", "tools/run_ablations.py", "tools/constant_latent.py"}  # fmt: skip
    for page, text in PAGES.items():
        named = set() if page == ROOT / "README.md" else set(re.findall(r"tools/\w+\.py", text))
        source = "".join((ROOT / file).read_text() for file in files | named)
        for flag in set(re.findall(r"--([a-z]+(?:-[a-z]+)*)", text)) - OTHERS:
            names = {flag.replace("-", "_"), flag.removeprefix("no-").replace("-", "_")}  # tyro: --no-x switches x off
            assert flag == "help" or any(re.search(rf"^    {name}: ", source, re.M) for name in names), f"{page.name}: {flag}"
        for path in set(re.findall(r"\]\((?!http)([\w/.]+?)(?:#[\w-]+)?\)", text)):
            assert (page.parent / path).exists(), f"{page.name}: {path}"


def test_components_import_torch_and_the_standard_library_only():
    for name in ("fpo_actor", "fpo_critic", "fpo_loss", "fpo_buffer"):
        imports = re.findall(r"^(?:from|import) (\w+)", (ROOT / f"{name}.py").read_text(), re.M)
        assert set(imports) <= {"torch", "math"}, name
