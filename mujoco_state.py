"""What both environments share: the whole state of a MuJoCo simulation as one vector, whether it is still sane, and pictures.

    state = get_state(model, data)          # (S,)
    set_state(model, data, state)           # and from there the same controls give the same states, bit for bit

Import this before anything that imports mujoco: it picks the OpenGL library.
"""

import ctypes.util
import os
import platform

import numpy as np

# MuJoCo picks its OpenGL library on import. Physics needs none, so a machine without EGL trains all the same.
if platform.system() == "Linux" and "MUJOCO_GL" not in os.environ:
    os.environ["MUJOCO_GL"] = "egl" if ctypes.util.find_library("EGL") else "disable"

import mujoco

STATE_SPEC = int(
    mujoco.mjtState.mjSTATE_TIME
    | mujoco.mjtState.mjSTATE_QPOS
    | mujoco.mjtState.mjSTATE_QVEL
    | mujoco.mjtState.mjSTATE_WARMSTART  # without the solver's warm start a resumed run drifts in the last bits
)
DIVERGED = [int(w) for w in (mujoco.mjtWarning.mjWARN_BADQPOS, mujoco.mjtWarning.mjWARN_BADQVEL, mujoco.mjtWarning.mjWARN_BADQACC)]


def get_state(model, data):
    """Time, positions, velocities and warm start. -> (S,)"""
    state = np.empty(mujoco.mj_stateSize(model, STATE_SPEC))
    mujoco.mj_getState(model, data, state, STATE_SPEC)
    return state


def set_state(model, data, state):
    """Go to `state` (S,) and forget everything else, the warnings too."""
    mujoco.mj_resetData(model, data)
    mujoco.mj_setState(model, data, state, STATE_SPEC)


def diverged(data):
    """Whether MuJoCo has found a non-finite or absurd state since the last `set_state`."""
    return any(data.warning[w].number for w in DIVERGED)


def rendering_available():
    """Whether MuJoCo was imported with an OpenGL library. robosuite, and so LIBERO, cannot be imported without one."""
    return hasattr(mujoco, "Renderer") and os.environ.get("MUJOCO_GL") != "disable"


def silence():
    """No warnings from MuJoCo in this process, which would write MUJOCO_LOG.TXT where it stands; `diverged` tells."""
    mujoco.set_mju_user_warning(lambda text: None)


def stack(observations, pictures):
    """n observations as one array: (n, S) of state vectors, or with pictures (n,) of whatever objects they are."""
    if not pictures:
        return np.stack(observations)
    stacked = np.empty(len(observations), dtype=object)
    stacked[:] = observations
    return stacked
