"""The commands, files and metrics that the pages name exist, and the two train scripts are one text."""

import re
from pathlib import Path

from support.logs import METRICS

ROOT = Path(__file__).parents[1]
PAGES = {p: p.read_text() for folder in (".", "docs", "results") for p in (ROOT / folder).glob("*.md")}
OTHERS = {"logdir", "nproc-per-node", "max-restarts", "nnodes", "rdzv-backend", "rdzv-endpoint", "python"}
OF_FORMER = {"weights", "tries", "only", "at-once"}  # flags of commands that made what is recorded


def test_every_logged_metric_is_explained():
    assert len(METRICS) <= 18
    for name in METRICS[1:]:  # the first is the iteration
        assert name in PAGES[ROOT / "docs" / "run_files.md"], name


def test_every_flag_and_file_named_exists():
    files = [*ROOT.glob("*.py"), *ROOT.glob("tools/*.py"), ROOT / "base" / "__init__.py"]
    source = "".join(file.read_text() for file in files)
    for page, text in PAGES.items():
        for flag in set(re.findall(r"--(?:pi0\.)?([a-z]+(?:-[a-z]+)*)", text)) - OTHERS - OF_FORMER:
            names = {flag.replace("-", "_"), flag.removeprefix("no-").replace("-", "_")}  # tyro: --no-x
            known = any(re.search(rf"^    {name}: ", source, re.M) for name in names)
            assert flag == "help" or known, f"{page.name}: {flag}"
        for path in set(re.findall(r"\]\((?!http)([\w/.]+?)(?:#[\w-]+)?\)", text)):
            assert (page.parent / path).exists(), f"{page.name}: {path}"
        for path in set(re.findall(r"(?:python|pytest) ((?:tools/|tests/)?\w+\.py)", text)):
            assert (ROOT / path).exists() or page.parent.name == "results", f"{page.name}: {path}"


def test_every_function_of_the_map_exists():
    rows = re.findall(r"^\| .+ \| (`.+) in (\w+\.py) \|$", PAGES[ROOT / "README.md"], re.M)
    assert len(rows) >= 7
    for names, file in rows:
        for name in re.findall(r"`(?:\w+\.)?(\w+)`", names):
            assert re.search(rf"\b{name}\b", (ROOT / file).read_text()), f"{file} lacks {name}"


def test_the_train_scripts_are_the_same_text_from_the_device_on():
    texts = [(ROOT / name).read_text() for name in ("train_aloha.py", "train_libero.py")]
    one, other = (text[text.index("    torch.set_num_threads(1)") :] for text in texts)
    assert one == other and "# ---- for each iteration" in one


def test_components_import_torch_and_the_standard_library_only():
    for name in ("fpo_actor", "fpo_critic", "fpo_loss", "fpo_buffer"):
        imports = re.findall(r"^(?:from|import) (\w+)", (ROOT / f"{name}.py").read_text(), re.M)
        assert set(imports) <= {"torch", "math"}, name


def test_every_flag_has_a_help_text():
    for name in ("train_aloha.py", "train_libero.py", "evaluate.py", "base/__init__.py"):
        text = (ROOT / name).read_text()
        flags = re.search(r"@dataclass\nclass .+?(?=\n\n\n)", text, re.S).group()
        for flag, rest in re.findall(r"^    (\w+): (.+(?:\n    (?:    .+|\)|\"\"\".+))*)", flags, re.M):
            assert "  # " in rest.splitlines()[0] or '"""' in rest or flag == "pi0", f"{name}: {flag}"
