"""Other people's machines: situations from public bug reports of the projects that users come from. README.md
here is their log."""

import ctypes.util
import errno
import fcntl
import importlib.metadata
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from envs.physics import opengl_problem  # before mujoco
from envs.libero import Simulator, official
from helpers import ROOT, SIGNALS, SMALL, assert_refused, command, here, python, rows, script
from support.ranks import cores
from support.flags import resumed_args
from support.logs import CsvLog, RunLogs
from support.run_files import clean_end, new_run_folder, save_checkpoint, write_atomically

TRAIN = "train_aloha.py"
SHORT = [*SMALL, *"--rollout-decisions 2 --eval-episodes 1 --total-env-steps 64".split()]


def module(name, cwd, **options):
    return python(cwd, "-m", name, PYTHONPATH=str(ROOT), **options)


# ---- who runs it, and where ----

as_root = pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("setpriv"), reason="only root can be a second user"
)
# a second user: reads everything, even where root's Python lies, and writes what is its own
SECOND_USER = "setpriv --reuid=54321 --regid=54321 --clear-groups --inh-caps=+dac_read_search".split()
SECOND_USER += ["--ambient-caps=+dac_read_search"]


@pytest.fixture
def home(tmp_path):
    os.chown(tmp_path, 54321, 54321)
    return tmp_path


@pytest.mark.slow
@as_root
def test_the_second_person_on_a_machine_runs_libero_with_a_read_only_checkout_and_without_a_home(home):
    """robosuite's log is another user's, and numba has nowhere to keep what it compiles; what it gets instead
    is gone afterwards."""
    log = Path("/tmp/robosuite.log")
    made = not log.exists()
    log.touch(0o644)
    before = log.stat()
    try:
        nowhere = dict(HOME="/nowhere", XDG_CACHE_HOME=None, TMPDIR=str(home))
        result = module("envs.libero", home, prefix=SECOND_USER, **nowhere)
        assert result.returncode == 0 and "control steps/s" in result.stdout, result.stderr
        after = log.stat()
        assert (after.st_mtime_ns, after.st_size) == (before.st_mtime_ns, before.st_size)
        assert not list(home.glob("numba-*"))
    finally:
        if made:
            log.unlink()


def test_a_terminal_without_greek_letters(tmp_path):
    for name in (TRAIN, "train_libero.py"):
        result = script(name, tmp_path, "--help", PYTHONIOENCODING="ascii")
        assert result.returncode == 0 and "? of Eq. 3" in result.stdout, result.stderr
    # all of them read their flags where this is seen to
    for path in (*ROOT.glob("*.py"), *ROOT.glob("tools/*.py")):
        assert "tyro.cli" not in path.read_text(), path


def test_help_waits_for_nothing_heavy(tmp_path):
    for name in (TRAIN, "train_libero.py", "evaluate.py"):
        result = python(tmp_path, "-X", "importtime", ROOT / name, "--help")
        imported = set(re.findall(r"\|\s+(\w+)$", result.stderr, re.M))
        assert result.returncode == 0 and "tyro" in imported
        assert not imported & {"torch", "mujoco", "numba", "scipy", "pandas", "robosuite"}


@pytest.fixture(scope="module")
def mute(tmp_path_factory):
    """A run without any terminal, as cron may start it, with weights of its own."""
    cwd = tmp_path_factory.mktemp("mute")
    shutil.copy(ROOT / "weights" / "aloha.safetensors", cwd / "mine.safetensors")
    closed = ("sh", "-c", 'exec "$@" >&- 2>&-', "sh")
    flags = [*SHORT, "--base", "mine.safetensors", "--run-name", "mute"]
    return cwd, script("tests/short.py", cwd, TRAIN, *flags, prefix=closed)


@pytest.mark.slow
def test_no_terminal_at_all(mute):
    cwd, result = mute
    assert result.returncode == 0
    assert rows(cwd / "runs" / "mute" / "metrics.csv") and (cwd / "runs" / "mute" / "last.pt").exists()


@pytest.mark.slow
def test_two_processes_on_one_run(mute):
    """The second resume is refused before it changes a file."""
    cwd, _ = mute
    folder = cwd / "runs" / "mute"
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    running = os.open(folder, os.O_RDONLY)
    fcntl.flock(running, fcntl.LOCK_EX)
    assert_refused(here(TRAIN, cwd, "--resume", "runs/mute", "--total-env-steps", 400), ["another process"])
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    os.close(running)


@pytest.mark.slow
def test_a_run_outlives_its_terminal_and_finds_weights_that_have_moved(mute):
    """Only the run's own weights are taken."""
    cwd, _ = mute
    shutil.copytree(cwd / "runs" / "mute", cwd / "runs" / "cut")
    before = len(rows(cwd / "runs" / "cut" / "metrics.csv"))
    (cwd / "elsewhere").mkdir()
    (cwd / "mine.safetensors").rename(cwd / "elsewhere" / "mine.safetensors")
    longer = ["--resume", "runs/cut", "--total-env-steps", 320]
    assert_refused(here(TRAIN, cwd, *longer), ["--base mine.safetensors"])
    process = subprocess.Popen(
        command("tests/short.py", TRAIN, *longer, "--base", "elsewhere/mine.safetensors"),
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    process.stdout.read(1)
    process.stdout.close()  # as `| head` does
    assert process.wait(120) == 0
    assert len(rows(cwd / "runs" / "cut" / "metrics.csv")) > before


@pytest.mark.slow
def test_started_through_a_link_and_without_docstrings(tmp_path):
    (tmp_path / "link.py").symlink_to(ROOT / TRAIN)
    result = script(tmp_path / "link.py", tmp_path, "--run-name", "a/b")
    assert_refused(result, ["--run-name is 'a/b'"])  # so it has found the base
    assert script(TRAIN, tmp_path, "--help", PYTHONOPTIMIZE="2").returncode == 0


@pytest.mark.slow
def test_settings_for_other_programs(tmp_path):
    """PyOpenGL's platform, two ways of counting GPUs, and a cache folder that is relative."""
    of_others = dict(PYOPENGL_PLATFORM="osmesa", CUDA_VISIBLE_DEVICES="1", MUJOCO_EGL_DEVICE_ID="0")
    result = module("envs.libero", tmp_path, XDG_CACHE_HOME="cache", MUJOCO_GL="", **of_others)
    assert result.returncode == 0 and "pictures: available" in result.stdout, result.stderr


def test_another_libero_is_named(tmp_path, monkeypatch):
    info = tmp_path / "hf_libero-0.1.4.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: hf-libero\nVersion: 0.1.4\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert importlib.metadata.version("hf-libero") == "0.1.4"
    assert_refused(here("train_libero.py", tmp_path, *SHORT), ["hf-libero 0.1.4", "pip uninstall"])
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_damaged_cache_of_numba(tmp_path):
    (tmp_path / "tiny.py").write_text(
        "import envs.libero, numba\n@numba.njit(cache=True)\ndef f(x): return x + 1\nprint(f(1))"
    )
    places = dict(NUMBA_CACHE_DIR=str(tmp_path / "cache"), PYTHONPATH=str(ROOT))
    for _ in range(2):
        result = script(tmp_path / "tiny.py", tmp_path, **places)
        assert result.stdout == "2\n", result.stderr
        files = list((tmp_path / "cache").rglob("*.nbi"))
        assert files
        for file in files:  # a power cut
            file.write_bytes(b"")


def test_cores_of_a_container(tmp_path):
    free = len(os.sched_getaffinity(0))
    assert cores(tmp_path) == free
    quotas = {"max 100000": free, "150000 100000": 1, "50000 100000": 1, "9900000 100000": free}
    for quota, expected in quotas.items():
        (tmp_path / "cpu.max").write_text(quota)
        assert cores(tmp_path) == expected


@pytest.mark.slow
def test_a_world_size_that_a_platform_has_left(tmp_path):
    left = dict(WORLD_SIZE="2", RANK=None, MASTER_ADDR=None, MASTER_PORT=None)
    assert_refused(script(TRAIN, tmp_path, *SHORT, **left), ["WORLD_SIZE is 2", "torchrun"])
    assert not list(tmp_path.iterdir())


# ---- simulators that fail; more in test_workers.py ----


@pytest.mark.slow
def test_a_simulator_that_cannot_be_built_ends_the_run_with_one_sentence(tmp_path):
    """The paths of another LIBERO installation, which it leaves in the home (lerobot, LIBERO)."""
    (tmp_path / "config.yaml").write_text("bddl_files: /nowhere\n")
    flags = [*SHORT, "--run-name", "broken"]
    result = script("train_libero.py", tmp_path, *flags, LIBERO_CONFIG_PATH=str(tmp_path))
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    assert "/nowhere" in last and "killed" not in result.stderr and result.stderr.count("/nowhere") == 1


def test_no_shared_memory_ends_a_script_with_one_sentence(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("envs.workers.ProcessPoolExecutor", refuse)
    for name, *flags in ((TRAIN, *SHORT), ("evaluate.py", "weights/aloha.safetensors")):
        result = here(name, tmp_path, *flags)
        assert result.returncode == 1, result.stderr
        assert "No space left on device" in result.stderr and "/dev/shm" in result.stderr


# ---- OpenGL ----


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["osmesa", "nonsense"])
def test_an_opengl_library_that_is_not_there(tmp_path, backend):
    if backend == "osmesa" and ctypes.util.find_library("OSMesa"):
        pytest.skip("OSMesa is here")
    for name, *flags in ((TRAIN, "--base", "a_pi0"), ("train_libero.py",)):
        result = script(name, tmp_path, *flags, MUJOCO_GL=backend)
        assert_refused(result, [f"MUJOCO_GL is {backend}", "unset it"])
    assert not list(tmp_path.iterdir())
    result = module("envs.aloha", tmp_path, MUJOCO_GL=backend)  # physics alone does not care
    assert result.returncode == 0 and "control steps/s" in result.stdout, result.stderr


def test_an_opengl_device_that_does_not_start(monkeypatch):
    assert opengl_problem() is None
    monkeypatch.setenv("MUJOCO_EGL_DEVICE_ID", "99")
    assert "MUJOCO_EGL_DEVICE_ID" in opengl_problem() and opengl_problem(pictures=False) is None


@pytest.mark.slow
def test_liberos_pictures_are_those_that_policies_were_trained_on():
    """Mean brightness of LIBERO-Object's first official state. MuJoCo renders it at 139.1 up to 3.3.2 and at
    103.3 from 3.3.3 on."""
    simulator = Simulator("libero_object", 0, pictures=True)
    picture = simulator.look(simulator.reset(official(0))[0], dict(image=(128, 128)))["pixels"]["image"]
    assert abs(picture.mean() - 139.1) < 3


def test_ffmpeg_is_looked_for_first(tmp_path, monkeypatch):
    args = types.SimpleNamespace(base="weights/aloha.safetensors")
    save_checkpoint(tmp_path, dict(task="aloha", env_steps=0, pi0={}, flow_steps=4, hidden=128), args)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/nowhere")
    result = here("evaluate.py", tmp_path, "last.pt", "--video")
    assert_refused(result, ["--video", "IMAGEIO_FFMPEG_EXE"])
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


# ---- flags, folders and requirements ----


NAMES = ["../../x", "a/b", "/tmp/x", "..", ".", "", "x/", "a\nb", "na\udcefve"]


@pytest.mark.parametrize("name", NAMES)
def test_a_run_name_is_one_folder(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        new_run_folder(name, "default")
    assert stopped.value.code == 2 and f"--run-name is {name!r}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_runs_of_the_same_second_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [new_run_folder(None, "run").name for _ in range(3)] == ["run", "run__2", "run__3"]


def test_a_runs_folder_that_leads_nowhere(tmp_path):
    (tmp_path / "runs").symlink_to("/nowhere/else")
    code = "from support.run_files import new_run_folder; new_run_folder(None, 'x')"
    result = python(tmp_path, "-c", code, PYTHONPATH=str(ROOT), timeout=60)
    assert_refused(result, ["runs cannot be made a folder"])


@dataclass
class Tracked:
    track: bool = True


def test_damaged_files_of_a_run(tmp_path, capsys):
    for text in (None, "", "a\n", "b\n1\n"):
        if text is not None:
            (tmp_path / "metrics.csv").write_text(text)
        with pytest.raises(OSError if text is None else SystemExit):
            CsvLog(tmp_path / "metrics.csv", ["a"], keep=1)
    (tmp_path / "args.json").write_text("[]")
    with pytest.raises(SystemExit):
        resumed_args(Tracked, tmp_path, [])
    assert capsys.readouterr().err.count("is damaged") == 4


def test_a_folder_without_fsync(tmp_path, monkeypatch):
    def fail(number):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    code = errno.EINVAL
    write_atomically(tmp_path / "file", b"whole")
    code = errno.EIO  # a disk that breaks is another matter
    with pytest.raises(OSError):
        write_atomically(tmp_path / "file", b"lost")
    assert (tmp_path / "file").read_bytes() == b"whole"


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGXCPU])
def test_the_warning_of_a_batch_system_stops_as_ctrl_c_does(tmp_path, number, capsys):
    handlers = {n: signal.getsignal(n) for n in SIGNALS}
    (tmp_path / "last.pt").touch()
    with pytest.raises(SystemExit) as stopped:
        with clean_end("train.py", tmp_path):
            os.kill(os.getpid(), number)
            time.sleep(5)
    assert stopped.value.code == 130 and f"python train.py --resume {tmp_path}" in capsys.readouterr().err
    for n, handler in handlers.items():
        signal.signal(n, handler)


@pytest.mark.slow
def test_starting_many_environments_shows_progress_and_can_be_interrupted(tmp_path):
    flags = command(TRAIN, *SHORT, "--num-envs", 500_000, "--run-name", "many")
    process = subprocess.Popen(flags, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    seen = b""
    while b"environments" not in seen:
        chunk = process.stderr.read1()
        assert chunk, seen.decode()
        seen += chunk
    process.send_signal(signal.SIGINT)
    message = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 130 and "Traceback" not in message
    assert "stopped before the first checkpoint" in message


@pytest.mark.parametrize("version", ["3.9", "3.10", "3.11", "3.12", "3.13", "3.14"])
def test_requirements_refuse_a_python_that_cannot_work(version):
    lines = (line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines())
    wanted = [Requirement(line) for line in lines if line]
    environment = {"python_version": version, "python_full_version": version + ".1"}
    wanted = [r for r in wanted if r.marker is None or r.marker.evaluate(environment)]
    refused = [str(r.specifier) for r in wanted if "this.needs.python" in str(r.specifier)]
    assert refused == ([] if version in ("3.11", "3.12") else ["==0+this.needs.python.3.11.or.3.12"])
    assert len([r for r in wanted if r.name == "torch"]) == 1


@pytest.mark.slow
def test_pip_ends_at_once_on_another_python(tmp_path):
    found = [shutil.which("python3.13"), *map(str, Path.home().glob(".pyenv/versions/3.13.*/bin/python"))]
    if found[-1] is None:
        pytest.skip("there is no Python 3.13 here")
    subprocess.run([found[-1], "-m", "venv", tmp_path / "venv"], check=True)
    pip = [tmp_path / "venv" / "bin" / "pip", "install", "--dry-run", "-r", ROOT / "requirements.txt"]
    result = subprocess.run(pip, capture_output=True, text=True)
    assert result.returncode == 1 and "this.needs.python.3.11.or.3.12" in result.stderr
    assert "Downloading" not in result.stdout
    assert "Collecting" not in result.stdout.replace("Collecting torch==0+", "")


# ---- Weights & Biases ----


@pytest.mark.slow
def test_tracking_without_a_key_and_without_a_terminal(tmp_path):
    nothing = dict(HOME=str(tmp_path), WANDB_API_KEY=None, WANDB_MODE=None, NETRC=str(tmp_path / "no"))
    result = script(TRAIN, tmp_path, *SHORT, "--track", **nothing)
    assert_refused(result, ["wandb login", "WANDB_MODE=offline"])
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("failing", ["init", "log"])
def test_a_failure_of_tracking_does_not_end_the_run(tmp_path, monkeypatch, capsys, failing):
    def fail(*_, **__):
        raise ConnectionError("the network\nis away")

    def init(id, **_):
        return fail() if ":" in id or failing == "init" else types.SimpleNamespace(log=fail)

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    folder = tmp_path / "a:b"  # a letter that wandb does not take
    folder.mkdir()
    logs = RunLogs(folder, Tracked())
    for k in (1, 2):
        logs.write({"iteration": k, "charts/SPS": 1.0}, k)
    assert [row["iteration"] for row in rows(folder / "metrics.csv")] == ["1", "2"]
    assert capsys.readouterr().err.count("ConnectionError: the network is away") == 1
