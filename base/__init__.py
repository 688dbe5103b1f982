"""The frozen base policy π_0: a small flow policy from a file (flow.py), or π_0 itself from a folder or the
hub (pi0.py)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from support.flags import stop


@dataclass
class Pi0Options:
    """How π_0 itself is played; for a small flow policy they must stay as they are."""

    latent: Literal["dct", "full", "repeat"] = "dct"
    """what x steers: low modes along time, all noise, or one row as DSRL"""
    chunk_steps: int | None = None
    """control steps executed of a chunk; the policy's own n_action_steps if left out"""
    openpi_aloha: bool = False
    """the policy comes from openpi, whose ALOHA has other signs of joints and gripper units"""


def is_pi0(name):
    """Whether a base of this name is a π_0, which looks through cameras, not a file of a flow policy."""
    return not str(name).endswith(".safetensors")


def load_base(name, options, suite, device, steerable=True):
    """The base in `name`: a .safetensors file of a flow policy for `suite`, or the folder or hub name of a
    π_0 that sees through the cameras of `suite`. A file that is not here is looked for beside the scripts.
    Stops with one sentence if it is not there, not sound, for another task, or has no noise to choose."""
    try:
        if not is_pi0(name):
            from base.flow import FlowBase

            for field, value in vars(options).items():
                if value != getattr(Pi0Options, field):
                    flag = f"--pi0.{field.replace('_', '-')}"
                    stop(f"{flag} is {value}, but {name} is no π_0; leave that flag out, or name a π_0")
            beside = Path(__file__).resolve().parents[1] / name
            file = beside if beside.exists() and not Path(name).exists() else name
            return FlowBase.load(file, device, suite.name)
        if options.chunk_steps is not None and options.chunk_steps < 1:
            stop(f"--pi0.chunk-steps is {options.chunk_steps}; it must be at least 1, or be left out")
        from base.pi0 import Pi0Base

        env = "aloha" if suite.name == "aloha" else "libero"
        base = Pi0Base.load(name, env, suite.cameras, device, **vars(options))
    except ValueError as error:
        stop(f"--base {name}: {error}")
    if steerable and base.latent_dim == 0:
        stop(f"--base is {name}, whose noise nobody can choose; python evaluate.py measures it as it is")
    return base
