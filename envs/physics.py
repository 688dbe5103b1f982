"""What both environments share: the whole state of a MuJoCo simulation as one vector, whether it is still
sane, and pictures.

    state = get_state(model, data)          # (S,)
    set_state(model, data, state)           # the same controls then give the same states, bit for bit

Import this before anything that imports mujoco: it picks the OpenGL library.
"""

import ctypes.util
import os
import platform
import re
import subprocess
import sys

import numpy as np

# MuJoCo loads the OpenGL library that MUJOCO_GL names when it is imported. Physics needs none, so a machine
# without one trains all the same. What needs OpenGL asks `opengl_problem` first.
MUJOCO_GL = os.environ.get("MUJOCO_GL") or "not set"
if platform.system() == "Linux" and MUJOCO_GL == "not set":
    os.environ["MUJOCO_GL"] = "egl" if ctypes.util.find_library("EGL") else "disable"
    os.environ["PYOPENGL_PLATFORM"] = "egl"  # what another program wants there would be refused
try:
    import mujoco
except Exception as error:  # each OpenGL library that is not there fails in a way of its own
    os.environ["MUJOCO_GL"] = "disable"
    import mujoco

    WORDS = f" ({' '.join(str(error).split())})"
else:
    WORDS = ""

from mujoco import mjtState, mjtWarning

STATE_SPEC = mjtState.mjSTATE_TIME | mjtState.mjSTATE_QPOS | mjtState.mjSTATE_QVEL
STATE_SPEC = int(STATE_SPEC | mjtState.mjSTATE_WARMSTART)  # or a resumed run drifts in the last bits
DIVERGED = [int(w) for w in (mjtWarning.mjWARN_BADQPOS, mjtWarning.mjWARN_BADQVEL, mjtWarning.mjWARN_BADQACC)]


def get_state(model, data):
    """Time, positions, velocities and warm start. -> (S,)"""
    state = np.empty(mujoco.mj_stateSize(model, STATE_SPEC))
    mujoco.mj_getState(model, data, state, STATE_SPEC)
    return state


def set_state(model, data, state):
    """Go to `state` (S,) and forget everything else, the warnings too."""
    mujoco.mj_resetData(model, data)
    mujoco.mj_setState(model, data, state, STATE_SPEC)


def has_diverged(data):
    """Whether MuJoCo has found a non-finite or absurd state since the last `set_state`."""
    return any(data.warning[w].number for w in DIVERGED)


def picture(simulator, camera, height, width, options=None):
    """What a camera of a simulator's model sees at present, with MuJoCo's visual `options`.
    -> (height, width, 3) uint8"""
    size = height, width
    if size not in simulator.renderers:
        simulator.renderers[size] = mujoco.Renderer(simulator.model, *size)
    simulator.renderers[size].update_scene(simulator.data, camera, options)
    return simulator.renderers[size].render()


def opengl_problem(pictures=True):
    """What keeps MuJoCo from drawing pictures, in one sentence with what to do, or None.

    pictures=False: what keeps robosuite, and so LIBERO, from being imported, which needs the library but no
    device.
    """
    fix = "install EGL (Debian: apt-get install libegl1 libgl1)"
    if MUJOCO_GL not in ("not set", "egl"):
        fix = f"unset it, and where EGL is missing {fix}"
    if not hasattr(mujoco, "GLContext"):
        return f"MUJOCO_GL is {MUJOCO_GL}, and no OpenGL library could be loaded{WORDS}; {fix}"
    if not pictures:
        return None
    # a library without a device or a display, a device number that does not exist: tried in a process of its
    # own, which may crash
    draw = "import mujoco; mujoco.Renderer(mujoco.MjModel.from_xml_string('<mujoco/>'), 16, 16)"
    tried = subprocess.run([sys.executable, "-P", "-c", draw], capture_output=True, text=True)
    if tried.returncode:
        reasons = [line for line in tried.stderr.splitlines() if re.match(r"[\w.]*(Error|Exception)\b", line)]
        reason = reasons[0] if reasons else "it crashes"
        return f"MUJOCO_GL is {MUJOCO_GL}, and OpenGL does not start ({reason}); {fix}"
    return None


def silence():
    """No warnings from MuJoCo in this process, which would write MUJOCO_LOG.TXT; `has_diverged` tells."""
    mujoco.set_mju_user_warning(lambda text: None)
