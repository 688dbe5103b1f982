"""robosuite's OSC_POSE controller, compiled by numba, and what keeps both libraries off a user's files."""

import os
import pickle
import sys
import tempfile
import types

import numpy as np

# numba keeps what it compiles beside the source or in the user's cache. Where neither can be written (a
# container, another user's checkout) it refuses to compile, so it gets a folder for this run, which the
# workers inherit.
if os.path.expanduser("~") == "~":  # a user without a home; LIBERO asks for one when it is imported
    os.environ["HOME"] = "/"
cache = os.path.abspath(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache"))
while not os.path.exists(cache):
    cache = os.path.dirname(cache)
if not os.access(cache, os.W_OK) and "NUMBA_CACHE_DIR" not in os.environ:
    folder = tempfile.TemporaryDirectory(prefix="numba-", ignore_cleanup_errors=True)
    os.environ["NUMBA_CACHE_DIR"] = folder.name
import numba
from numba.core.caching import IndexDataCacheFile


def load_or_compile(self, key, load=IndexDataCacheFile.load):
    """numba's cache after a power cut or a full disk: a damaged file is dropped, where numba would fail at
    every start (numba #10434)."""
    try:
        return load(self, key)
    except (EOFError, pickle.UnpicklingError):
        self.flush()


IndexDataCacheFile.load = load_or_compile

# robosuite opens /tmp/robosuite.log when it is imported, and whoever did so first owns that file. These are
# its own settings, in the place where it looks for a user's; a user's own do not count here, so that runs do
# not depend on them.
macros = sys.modules["robosuite.macros_private"] = types.ModuleType("robosuite.macros_private")
macros.FILE_LOGGING_LEVEL, macros.CONSOLE_LOGGING_LEVEL = None, "ERROR"


@numba.njit(cache=True)
def osc_torques(ctrl, gripper, limits, rest, bias, closing, goal_position, goal_rotation, sensed):
    """robosuite's OSC_POSE law (Khatib 1987; controllers/osc.py) and its gripper integrator; writes `ctrl`
    (9,), within `limits` (9, 2), and `gripper` (2,).

    rest: the arm's joints (7,). bias: gravity and Coriolis forces (nv,). closing: of the gripper, a substep.
    sensed: the mass matrix (nv, nv), Jacobian (6, nv), qpos, qvel, position and rotation of the grip site.
    """
    mass, J, qpos, qvel, position, rotation = sensed
    mass, J, qd = mass[:7, :7].copy(), J[:, :7].copy(), qvel[:7].copy()
    twist = J @ qd
    mass_inv_Jt = np.linalg.solve(mass, J.T.copy())  # (7, 6)
    A = J @ mass_inv_Jt  # J M⁻¹ Jᵀ, the inverse of the operational-space inertia
    angle = 0.5 * np.cross(rotation.T, goal_rotation.T).sum(0)  # between the columns: rotation error
    kp = 150.0
    kd = 2 * np.sqrt(kp)
    wrench = np.empty(6)
    wrench[:3] = np.linalg.solve(A[:3, :3].copy(), kp * (goal_position - position) - kd * twist[:3])
    wrench[3:] = np.linalg.solve(A[3:, 3:].copy(), kp * angle - kd * twist[3:])
    # the null space pulls the joints towards their rest: Nᵀ M q̈ = M q̈ - Jᵀ A⁻¹ J q̈
    acceleration = 10.0 * (rest - qpos[:7]) - 2 * np.sqrt(10.0) * qd
    torque = J.T.copy() @ (wrench - np.linalg.solve(A, J @ acceleration)) + mass @ acceleration + bias[:7]
    for i in range(7):
        ctrl[i] = min(max(torque[i], limits[i, 0]), limits[i, 1])
    for i, step in enumerate((-closing, closing)):
        gripper[i] = min(max(gripper[i] + step, -1.0), 1.0)
        low, high = limits[7 + i]
        ctrl[7 + i] = (low + high) / 2 + (high - low) / 2 * gripper[i]
