"""What the ranks of one run tell each other under torchrun; of a single process nothing is sent.

Every rank plays its own environments with its own base. What they have seen is gathered once an iteration,
and then every rank does the same update on all of it with the same draws; so n ranks of m environments are
the same algorithm, on the same draws, as one rank of n·m.
"""

import contextlib
import os
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from support.flags import RANK, RESTARTS, stop


def cores(cgroup=Path("/sys/fs/cgroup")):
    """How many cores this process may use, fewer than there are where a container has a quota."""
    free = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # "max 100000" is no quota
        quota, period = map(int, (cgroup / "cpu.max").read_text().split())
        free = min(free, max(1, quota // period))
    return free


WORLD = int(os.environ.get("WORLD_SIZE") or 1)
LOCAL_WORLD = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)  # ranks on this machine
CPUS = max(1, cores() // LOCAL_WORLD)  # of this rank
SIMULATORS = min(CPUS, 16)  # processes, where --num-workers is left out


def connect(device):
    """Join the other ranks. device: "auto", "cpu" or "cuda" -> the torch.device of this rank, its own GPU.
    Stops if a platform has set WORLD_SIZE without torchrun."""
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if WORLD > 1 and missing:
        names = " and ".join(missing)
        stop(f"WORLD_SIZE is {WORLD}, but {names} are not set; unset WORLD_SIZE, or start with torchrun")
    if device == "cpu" or not torch.cuda.is_available():
        device, backend = torch.device("cpu"), "gloo"
    else:
        if WORLD > 1 and LOCAL_WORLD > (gpus := torch.cuda.device_count()):
            stop(f"--nproc-per-node is {LOCAL_WORLD}, with {gpus} GPUs here; give {gpus}, or --device cpu")
        device, backend = torch.device("cuda", int(os.environ.get("LOCAL_RANK") or 0)), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    if WORLD > 1:
        # torchrun keeps its store over a restart, with dead ranks' addresses: ours has a part for every start
        store = dist.PrefixStore(f"start{RESTARTS}", next(rendezvous("env://"))[0])
        dist.init_process_group(backend, store=store, rank=RANK, world_size=WORLD)
    return device


def share(num_envs, num_tasks):
    """The environments that this rank plays, a slice. Stops if ranks get unequal shares, or tasks none."""
    if num_envs < num_tasks:
        stop(f"--num-envs is {num_envs}, too few for {num_tasks} tasks; give more, or fewer --task-ids")
    if num_envs % WORLD:
        stop(f"--num-envs is {num_envs}, which {WORLD} ranks cannot share evenly; give a multiple of {WORLD}")
    return slice(RANK * num_envs // WORLD, (RANK + 1) * num_envs // WORLD)


def gathered(value):
    """[value of rank 0, value of rank 1, …], any picklable value, on every rank."""
    values = [value] * WORLD
    if WORLD > 1:
        dist.all_gather_object(values, value)
    return values


def of_all(columns):
    """Columns of all environments from those of the ranks, {name: (T, m, …)} -> {name: (T, n·m, …)}."""
    parts = gathered({name: values.cpu() for name, values in columns.items()})
    return {k: torch.cat([part[k] for part in parts], 1).to(columns[k].device) for k in columns}


def broadcast(*modules):
    """Give every rank the parameters of rank 0."""
    if WORLD > 1:
        for parameter in (p for module in modules for p in module.parameters()):
            dist.broadcast(parameter.data, 0)


def joined(rows):
    """One dict of arrays and lists from those of the ranks, one behind the other. None stays None; a rank
    without rows has None instead of the dict."""
    parts = [part for part in gathered(rows) if part is not None]
    whole = dict(parts[0])
    for key, first in whole.items():
        if first is not None:
            columns = [part[key] for part in parts]
            whole[key] = np.concatenate(columns) if isinstance(first, np.ndarray) else sum(columns, [])
    return whole
