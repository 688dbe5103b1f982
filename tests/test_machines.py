"""Other people's machines: situations from public bug reports of the projects that users come from. README.md here is their log."""

import ctypes.util
import os
import re
import shutil
import signal
import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from mujoco_state import opengl_problem  # before mujoco
from env_libero import Simulator, official
from run_files import RunLogs, new_run_folder
from test_train_aloha import ROOT, SMALL, command, rows, train
from worker_pool import WorkerPool

SHORT = [*SMALL, "--eval-episodes", "1", "--total-env-steps", "64"]


def run(script, cwd, *flags, prefix=(), **environment):
    """A script as a process of its own, with stdin closed; None takes a variable out of the environment."""
    variables = {k: v for k, v in (os.environ | environment).items() if v is not None}
    command = [*prefix, sys.executable, str(ROOT / script), *map(str, flags)]
    return subprocess.run(command, cwd=cwd, env=variables, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300)


# ---- who runs it, and where ----

as_root = pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("setpriv"), reason="only root can be a second user")
# a second user: reads everything, even where root's Python lies, and writes what is its own
SECOND_USER = "setpriv --reuid=54321 --regid=54321 --clear-groups --inh-caps=+dac_read_search --ambient-caps=+dac_read_search".split()


@pytest.fixture
def home(tmp_path):
    os.chown(tmp_path, 54321, 54321)
    return tmp_path


@as_root
def test_the_second_person_on_a_machine_runs_libero(home):
    log = Path("/tmp/robosuite.log")
    made = not log.exists()
    log.touch(0o644)
    before = log.stat()
    try:
        result = run("train_libero.py", home, *SHORT, "--run-name", "second", prefix=SECOND_USER, HOME=str(home))
        assert result.returncode == 0, result.stderr
        assert (log.stat().st_mtime_ns, log.stat().st_size) == (before.st_mtime_ns, before.st_size)  # nobody else's log was touched
    finally:
        if made:
            log.unlink()


@as_root
def test_a_read_only_checkout_without_a_home(home):
    """numba has nowhere to keep what it compiles; what it gets instead is gone afterwards."""
    result = run("env_libero.py", home, prefix=SECOND_USER, HOME="/nowhere", XDG_CACHE_HOME=None, TMPDIR=str(home))
    assert result.returncode == 0 and "control steps/s" in result.stdout, result.stderr
    assert not list(home.glob("numba-*"))


def test_a_terminal_without_greek_letters(tmp_path):
    for script in ("train_aloha.py", "train_libero.py"):
        result = run(script, tmp_path, "--help", PYTHONIOENCODING="ascii")
        assert result.returncode == 0 and "? of Eq. 3" in result.stdout, result.stderr
    for path in [*ROOT.glob("*.py"), *ROOT.glob("tools/*.py")]:  # all of them read their flags where this is seen to
        assert "tyro.cli" not in path.read_text() or path.name == "run_files.py", path


def test_a_run_outlives_its_terminal(tmp_path):
    process = subprocess.Popen(command(*SHORT, "--run-name", "cut"), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    process.stdout.read(1)
    process.stdout.close()  # as `| head` does
    assert process.wait(120) == 0
    assert rows(tmp_path / "runs" / "cut" / "metrics.csv") and (tmp_path / "runs" / "cut" / "last.pt").exists()


def test_help_waits_for_nothing_heavy(tmp_path):
    for script in ("train_aloha.py", "train_libero.py"):
        result = subprocess.run([sys.executable, "-X", "importtime", str(ROOT / script), "--help"], capture_output=True, text=True)
        imported = set(re.findall(r"\|\s+(\w+)$", result.stderr, re.M))
        assert result.returncode == 0 and "tyro" in imported
        assert not imported & {"torch", "mujoco", "numba", "scipy", "pandas", "robosuite"}


# ---- simulators that fail ----


def _broken_build(path):
    with open(path, "a") as file:
        file.write("built ")
    raise RuntimeError("the arm is\nmissing")


def _broken_job(_, number):
    if number == 3:
        raise ValueError("three is too much")
    return number


def test_an_exception_in_a_worker_comes_back_with_its_own_words(tmp_path):
    with WorkerPool(1, _broken_build, str(tmp_path / "log")) as pool:
        with pytest.raises(ChildProcessError, match=r"RuntimeError: the arm is missing \(.*test_machines.py:\d+\)"):
            pool.map(_broken_job, range(8))
    assert (tmp_path / "log").read_text() == "built "  # once: it would fail the same way again
    with WorkerPool(1, dict) as pool:
        with pytest.raises(ChildProcessError, match="ValueError: three is too much"):
            pool.map(_broken_job, range(8))
        assert pool.map(_broken_job, [1, 2]) == [1, 2]  # no process has died


def test_a_simulator_that_cannot_be_built_ends_the_run_with_one_sentence(tmp_path):
    """The paths of another LIBERO installation, which it leaves in the home (lerobot, LIBERO)."""
    (tmp_path / "config.yaml").write_text("bddl_files: /nowhere\n")
    result = run("train_libero.py", tmp_path, *SHORT, "--run-name", "broken", LIBERO_CONFIG_PATH=str(tmp_path))
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    assert "/nowhere" in last and "killed" not in result.stderr and result.stderr.count("/nowhere") == 1


# ---- OpenGL ----


@pytest.mark.parametrize("backend", ["osmesa", "nonsense"])
def test_an_opengl_library_that_is_not_there(tmp_path, backend):
    if backend == "osmesa" and ctypes.util.find_library("OSMesa"):
        pytest.skip("OSMesa is here")
    for script, flags in (("train_aloha.py", ["--video"]), ("train_libero.py", [])):
        result = run(script, tmp_path, *flags, MUJOCO_GL=backend)
        assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
        assert f"MUJOCO_GL is {backend}" in result.stderr and "unset it" in result.stderr
    assert not list(tmp_path.iterdir())
    result = run("train_aloha.py", tmp_path, *SHORT, MUJOCO_GL=backend)  # physics alone does not care
    assert result.returncode == 0, result.stderr


def test_an_opengl_device_that_does_not_start(monkeypatch):
    assert opengl_problem() is None
    monkeypatch.setenv("MUJOCO_EGL_DEVICE_ID", "99")
    assert "MUJOCO_EGL_DEVICE_ID" in opengl_problem() and opengl_problem(pictures=False) is None


def test_liberos_pictures_are_those_that_policies_were_trained_on():
    """Mean brightness of LIBERO-Object's first official state. MuJoCo renders it at 139.1 up to 3.3.2 and at 103.3 from 3.3.3 on."""
    simulator = Simulator("libero_object", 0)
    picture = simulator.look(simulator.reset(official(0))[0], dict(image=(128, 128)))["pixels"]["image"]
    assert abs(picture.mean() - 139.1) < 3


# ---- flags, folders and requirements ----


@pytest.mark.parametrize("name", ["../../x", "a/b", "/tmp/x", "..", ".", "", "x/"])
def test_a_run_name_is_one_folder(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        new_run_folder(name, "default")
    assert stopped.value.code == 2 and f"--run-name is {name!r}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_runs_of_the_same_second_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [new_run_folder(None, "run").name for _ in range(3)] == ["run", "run__2", "run__3"]


def test_starting_many_environments_shows_progress_and_can_be_interrupted(tmp_path):
    flags = command(*SHORT, "--num-envs", 500_000, "--run-name", "many")
    process = subprocess.Popen(flags, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    seen = b""
    while b"environments" not in seen:
        chunk = process.stderr.read1()
        assert chunk, seen.decode()
        seen += chunk
    process.send_signal(signal.SIGINT)
    message = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 130 and "stopped before the first checkpoint" in message and "Traceback" not in message


@pytest.mark.parametrize("version", ["3.9", "3.10", "3.11", "3.12", "3.13", "3.14"])
def test_requirements_refuse_a_python_that_cannot_work(version):
    lines = (line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines())
    wanted = [Requirement(line) for line in lines if line]
    wanted = [r for r in wanted if r.marker is None or r.marker.evaluate({"python_version": version, "python_full_version": version + ".1"})]
    refused = [str(r.specifier) for r in wanted if "this.needs.python" in str(r.specifier)]
    assert refused == ([] if version in ("3.11", "3.12") else ["==0+this.needs.python.3.11.or.3.12"])
    assert len([r for r in wanted if r.name == "torch"]) == 1


def test_pip_ends_at_once_on_another_python(tmp_path):
    found = [shutil.which("python3.13"), *map(str, Path.home().glob(".pyenv/versions/3.13.*/bin/python"))]
    if found[-1] is None:
        pytest.skip("there is no Python 3.13 here")
    subprocess.run([found[-1], "-m", "venv", tmp_path / "venv"], check=True)
    pip = [tmp_path / "venv" / "bin" / "pip", "install", "--dry-run", "-r", ROOT / "requirements.txt"]
    result = subprocess.run(pip, capture_output=True, text=True)
    assert result.returncode == 1 and "this.needs.python.3.11.or.3.12" in result.stderr
    assert "Downloading" not in result.stdout and "Collecting" not in result.stdout.replace("Collecting torch==0+", "")


# ---- Weights & Biases ----


@dataclass
class Tracked:
    track: bool = True


def test_tracking_without_a_key_and_without_a_terminal(tmp_path):
    result = run("train_aloha.py", tmp_path, *SHORT, "--track", HOME=str(tmp_path), WANDB_API_KEY=None, WANDB_MODE=None, NETRC=str(tmp_path / "no"))
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    assert "wandb login" in result.stderr and "WANDB_MODE=offline" in result.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("failing", ["init", "log"])
def test_a_failure_of_tracking_does_not_end_the_run(tmp_path, monkeypatch, capsys, failing):
    def fail(*_, **__):
        raise ConnectionError("the network\nis away")

    tracked = types.SimpleNamespace(log=fail)
    wandb = types.SimpleNamespace(init=fail if failing == "init" else lambda **_: tracked)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    logs = RunLogs(tmp_path, Tracked(), ["a"], ["b"])
    for a in (1, 2):
        logs.write(dict(a=a), a)
    assert [row["a"] for row in rows(tmp_path / "metrics.csv")] == ["1", "2"]
    assert capsys.readouterr().err.count("ConnectionError: the network is away") == 1
