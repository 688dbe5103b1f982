"""Other people's machines: situations from public bug reports of the projects that users come from. README.md here is their log."""

import ctypes.util
import errno
import fcntl
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

from mujoco_state import opengl_problem  # before mujoco
from env_libero import Simulator, official
from ranks import cores
from run_files import CsvLog, LatentLog, RunLogs, clean_end, new_run_folder, resumed_args, write_atomically
from test_train_aloha import ROOT, SMALL, command, rows
from worker_pool import WorkerPool

import worker_pool


@dataclass
class Tracked:
    track: bool = True


SHORT = [*SMALL, "--eval-episodes", "1", "--total-env-steps", "64"]


def run(script, cwd, *flags, prefix=(), **environment):
    """A script as a process of its own, with stdin closed; None takes a variable out of the environment."""
    variables = {k: v for k, v in (os.environ | environment).items() if v is not None}
    command = [*prefix, sys.executable, str(ROOT / script), *map(str, flags)]
    return subprocess.run(
        command, cwd=cwd, env=variables, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300
    )


# ---- who runs it, and where ----

as_root = pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("setpriv"), reason="only root can be a second user"
)
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
        result = run("env_libero.py", home, prefix=SECOND_USER, HOME=str(home))
        assert result.returncode == 0 and "control steps/s" in result.stdout, result.stderr
        assert (log.stat().st_mtime_ns, log.stat().st_size) == (
            before.st_mtime_ns,
            before.st_size,
        )  # nobody else's log was touched
    finally:
        if made:
            log.unlink()


@as_root
def test_a_read_only_checkout_without_a_home(home):
    """numba has nowhere to keep what it compiles; what it gets instead is gone afterwards."""
    result = run(
        "env_libero.py", home, prefix=SECOND_USER, HOME="/nowhere", XDG_CACHE_HOME=None, TMPDIR=str(home)
    )
    assert result.returncode == 0 and "control steps/s" in result.stdout, result.stderr
    assert not list(home.glob("numba-*"))


def test_a_terminal_without_greek_letters(tmp_path):
    for script in ("train_aloha.py", "train_libero.py"):
        result = run(script, tmp_path, "--help", PYTHONIOENCODING="ascii")
        assert result.returncode == 0 and "? of Eq. 3" in result.stdout, result.stderr
    for path in [
        *ROOT.glob("*.py"),
        *ROOT.glob("tools/*.py"),
    ]:  # all of them read their flags where this is seen to
        assert "tyro.cli" not in path.read_text() or path.name == "run_files.py", path


def test_a_run_outlives_its_terminal(tmp_path):
    process = subprocess.Popen(
        command(*SHORT, "--run-name", "cut"), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    process.stdout.read(1)
    process.stdout.close()  # as `| head` does
    assert process.wait(120) == 0
    assert (
        rows(tmp_path / "runs" / "cut" / "metrics.csv") and (tmp_path / "runs" / "cut" / "last.pt").exists()
    )


def test_help_waits_for_nothing_heavy(tmp_path):
    for script in ("train_aloha.py", "train_libero.py"):
        result = subprocess.run(
            [sys.executable, "-X", "importtime", str(ROOT / script), "--help"], capture_output=True, text=True
        )
        imported = set(re.findall(r"\|\s+(\w+)$", result.stderr, re.M))
        assert result.returncode == 0 and "tyro" in imported
        assert not imported & {"torch", "mujoco", "numba", "scipy", "pandas", "robosuite"}


def test_no_terminal_at_all(tmp_path):
    closed = ("sh", "-c", 'exec "$@" >&- 2>&-', "sh")  # as cron may start it
    assert run("train_aloha.py", tmp_path, *SHORT, "--run-name", "mute", prefix=closed).returncode == 0
    assert rows(tmp_path / "runs" / "mute" / "metrics.csv")


def test_started_through_a_link_and_without_docstrings(tmp_path):
    (tmp_path / "link.py").symlink_to(ROOT / "train_aloha.py")
    result = run(tmp_path / "link.py", tmp_path, "--checkpoint", "nowhere.pt", "--eval-only")
    assert result.returncode == 2 and "nowhere.pt" in result.stderr, (
        result.stderr
    )  # so it has found the base
    assert run("train_aloha.py", tmp_path, "--help", PYTHONOPTIMIZE="2").returncode == 0


def test_settings_for_other_programs(tmp_path):
    """PyOpenGL's platform, two ways of counting GPUs, and a cache folder that is relative."""
    result = run("env_libero.py", tmp_path, PYOPENGL_PLATFORM="osmesa", CUDA_VISIBLE_DEVICES="1", MUJOCO_EGL_DEVICE_ID="0",
                 XDG_CACHE_HOME="cache", MUJOCO_GL="")  # fmt: skip
    assert result.returncode == 0 and "pictures: available" in result.stdout, result.stderr


def test_another_libero_is_named(tmp_path):
    (tmp_path / "hf_libero-0.1.4.dist-info").mkdir()
    (tmp_path / "hf_libero-0.1.4.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: hf-libero\nVersion: 0.1.4\n"
    )
    result = run("train_libero.py", tmp_path, *SHORT, PYTHONPATH=str(tmp_path))
    assert (
        result.returncode == 2 and "hf-libero 0.1.4" in result.stderr and not (tmp_path / "runs").exists()
    ), result.stderr


def test_a_damaged_cache_of_numba(tmp_path):
    (tmp_path / "tiny.py").write_text(
        "import env_libero, numba\n@numba.njit(cache=True)\ndef f(x): return x + 1\nprint(f(1))"
    )
    for _ in range(2):
        result = run(
            tmp_path / "tiny.py", tmp_path, NUMBA_CACHE_DIR=str(tmp_path / "cache"), PYTHONPATH=str(ROOT)
        )
        assert result.stdout == "2\n", result.stderr
        files = list((tmp_path / "cache").rglob("*.nbi"))
        assert files
        for file in files:  # a power cut
            file.write_bytes(b"")


def test_cores_of_a_container(tmp_path):
    free = len(os.sched_getaffinity(0))
    assert cores(tmp_path) == free
    for quota, expected in (
        ("max 100000", free),
        ("150000 100000", 1),
        ("50000 100000", 1),
        ("9900000 100000", free),
    ):
        (tmp_path / "cpu.max").write_text(quota)
        assert cores(tmp_path) == expected


def test_a_world_size_that_a_platform_has_left(tmp_path):
    result = run(
        "train_aloha.py", tmp_path, *SHORT, WORLD_SIZE="2", RANK=None, MASTER_ADDR=None, MASTER_PORT=None
    )
    assert result.returncode == 2 and "WORLD_SIZE is 2" in result.stderr and "torchrun" in result.stderr, (
        result.stderr
    )
    assert not list(tmp_path.iterdir())


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
        with pytest.raises(
            ChildProcessError, match=r"RuntimeError: the arm is missing \(.*test_machines.py:\d+\)"
        ):
            pool.map(_broken_job, range(8))
    assert (tmp_path / "log").read_text() == "built "  # once: it would fail the same way again
    with WorkerPool(1, dict) as pool:
        with pytest.raises(ChildProcessError, match="ValueError: three is too much"):
            pool.map(_broken_job, range(8))
        assert pool.map(_broken_job, [1, 2]) == [1, 2]  # no process has died


def test_a_simulator_that_cannot_be_built_ends_the_run_with_one_sentence(tmp_path):
    """The paths of another LIBERO installation, which it leaves in the home (lerobot, LIBERO)."""
    (tmp_path / "config.yaml").write_text("bddl_files: /nowhere\n")
    result = run(
        "train_libero.py", tmp_path, *SHORT, "--run-name", "broken", LIBERO_CONFIG_PATH=str(tmp_path)
    )
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    assert "/nowhere" in last and "killed" not in result.stderr and result.stderr.count("/nowhere") == 1


def test_no_shared_memory(monkeypatch):
    def refuse(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(worker_pool, "ProcessPoolExecutor", refuse)
    with pytest.raises(ChildProcessError, match="No space left.*/dev/shm"):
        WorkerPool(1, dict)


def test_simulators_start_under_the_debugger(monkeypatch):
    monkeypatch.delattr(sys.modules["__main__"], "__spec__")
    with WorkerPool(1, dict) as pool:
        assert pool.map(_broken_job, [1, 2]) == [1, 2]


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
    result = run("env_aloha.py", tmp_path, MUJOCO_GL=backend)  # physics alone does not care
    assert result.returncode == 0 and "control steps/s" in result.stdout, result.stderr


def test_an_opengl_device_that_does_not_start(monkeypatch):
    assert opengl_problem() is None
    monkeypatch.setenv("MUJOCO_EGL_DEVICE_ID", "99")
    assert "MUJOCO_EGL_DEVICE_ID" in opengl_problem() and opengl_problem(pictures=False) is None


def test_liberos_pictures_are_those_that_policies_were_trained_on():
    """Mean brightness of LIBERO-Object's first official state. MuJoCo renders it at 139.1 up to 3.3.2 and at 103.3 from 3.3.3 on."""
    simulator = Simulator("libero_object", 0)
    picture = simulator.look(simulator.reset(official(0))[0], dict(image=(128, 128)))["pixels"]["image"]
    assert abs(picture.mean() - 139.1) < 3


def test_ffmpeg_is_looked_for_first(tmp_path):
    result = run("train_aloha.py", tmp_path, *SHORT, "--video", IMAGEIO_FFMPEG_EXE="/nowhere")
    assert (
        result.returncode == 2 and "IMAGEIO_FFMPEG_EXE" in result.stderr and not list(tmp_path.iterdir())
    ), result.stderr


# ---- flags, folders and requirements ----


@pytest.mark.parametrize("name", ["../../x", "a/b", "/tmp/x", "..", ".", "", "x/", "a\nb", "na\udcefve"])
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
    command = [sys.executable, "-c", "import run_files; run_files.new_run_folder(None, 'x')"]
    result = subprocess.run(
        command,
        cwd=tmp_path,
        env=os.environ | dict(PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert result.returncode == 2 and "runs cannot be made a folder" in result.stderr


def test_two_processes_on_one_run(tmp_path):
    """The second resume is refused before it changes a file. Then weights that have moved; only the run's own are taken."""
    weights = tmp_path / "mine.safetensors"
    shutil.copy(ROOT / "weights" / "aloha.safetensors", weights)
    folder = tmp_path / "runs" / "r"
    result = run("train_aloha.py", tmp_path, *SHORT, "--weights", "mine.safetensors", "--run-name", "r")
    assert result.returncode == 0, result.stderr
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    running = os.open(folder, os.O_RDONLY)
    fcntl.flock(running, fcntl.LOCK_EX)
    result = run("train_aloha.py", tmp_path, "--resume", "runs/r", "--total-env-steps", 400)
    assert result.returncode == 2 and "another process" in result.stderr, result.stderr
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    os.close(running)
    weights.rename(tmp_path / "moved.safetensors")
    result = run(
        "train_aloha.py",
        tmp_path,
        "--resume",
        "runs/r",
        "--total-env-steps",
        400,
        "--weights",
        "moved.safetensors",
    )
    assert result.returncode == 0, result.stderr


def test_damaged_files_of_a_run(tmp_path, capsys):
    for text in (None, "", "a\n", "b\n1\n"):
        if text is not None:
            (tmp_path / "metrics.csv").write_text(text)
        with pytest.raises(OSError if text is None else SystemExit):
            CsvLog(tmp_path / "metrics.csv", ["a"], keep=1)
    (tmp_path / "latents.npz").write_bytes(b"")
    (tmp_path / "args.json").write_text("[]")
    for read in (
        lambda: LatentLog(tmp_path / "latents.npz", until=1),
        lambda: resumed_args(Tracked, tmp_path, []),
    ):
        with pytest.raises(SystemExit):
            read()
    assert capsys.readouterr().err.count("is damaged") == 5


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
    handlers = {
        n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGXCPU)
    }
    (tmp_path / "last.pt").touch()
    with pytest.raises(SystemExit) as stopped:
        with clean_end("train.py", tmp_path):
            os.kill(os.getpid(), number)
            time.sleep(5)
    assert stopped.value.code == 130 and f"python train.py --resume {tmp_path}" in capsys.readouterr().err
    for n, handler in handlers.items():
        signal.signal(n, handler)


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
    assert (
        process.returncode == 130
        and "stopped before the first checkpoint" in message
        and "Traceback" not in message
    )


@pytest.mark.parametrize("version", ["3.9", "3.10", "3.11", "3.12", "3.13", "3.14"])
def test_requirements_refuse_a_python_that_cannot_work(version):
    lines = (line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines())
    wanted = [Requirement(line) for line in lines if line]
    wanted = [
        r
        for r in wanted
        if r.marker is None
        or r.marker.evaluate({"python_version": version, "python_full_version": version + ".1"})
    ]
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
    assert "Downloading" not in result.stdout and "Collecting" not in result.stdout.replace(
        "Collecting torch==0+", ""
    )


# ---- Weights & Biases ----


def test_tracking_without_a_key_and_without_a_terminal(tmp_path):
    result = run(
        "train_aloha.py",
        tmp_path,
        *SHORT,
        "--track",
        HOME=str(tmp_path),
        WANDB_API_KEY=None,
        WANDB_MODE=None,
        NETRC=str(tmp_path / "no"),
    )
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    assert "wandb login" in result.stderr and "WANDB_MODE=offline" in result.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("failing", ["init", "log"])
def test_a_failure_of_tracking_does_not_end_the_run(tmp_path, monkeypatch, capsys, failing):
    def fail(*_, **__):
        raise ConnectionError("the network\nis away")

    tracked = types.SimpleNamespace(log=fail)
    wandb = types.SimpleNamespace(
        init=fail if failing == "init" else lambda id, **_: tracked if ":" not in id else fail()
    )
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    folder = tmp_path / "a:b"  # a letter that wandb does not take
    folder.mkdir()
    logs = RunLogs(folder, Tracked(), ["a"], ["b"])
    for a in (1, 2):
        logs.write(dict(a=a), a)
    assert [row["a"] for row in rows(folder / "metrics.csv")] == ["1", "2"]
    assert capsys.readouterr().err.count("ConnectionError: the network is away") == 1
