"""What the ranks of one run tell each other under torchrun. With a single process nothing is sent and no number changes.

    torchrun --nproc-per-node 2 train_aloha.py --seed 1

Every rank plays its own environments with its own base. What they have seen is gathered once an iteration, and then every rank does the
same update on all of it with the same draws; so n ranks of m environments are the same algorithm, on the same draws, as one rank of n·m.
"""

import contextlib
import os
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from run_files import stop


def cores(cgroup=Path("/sys/fs/cgroup")):
    """How many cores this process may use: those that it may run on, or fewer where a container has a quota."""
    free = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # "max 100000" is no quota
        quota, period = (int(number) for number in (cgroup / "cpu.max").read_text().split())
        free = min(free, max(1, quota // period))
    return free


RANK, WORLD = int(os.environ.get("RANK") or 0), int(os.environ.get("WORLD_SIZE") or 1)
CPUS = max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE") or 1))  # of this rank
RESTARTS = int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0)  # by torchrun --max-restarts


def connect(device):
    """Join the other ranks; "cuda" becomes this rank's own GPU. -> device. Stops if a platform has set WORLD_SIZE without torchrun."""
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if WORLD > 1 and missing:
        stop(f"WORLD_SIZE is {WORLD}, but {' and '.join(missing)} are not set; unset WORLD_SIZE, or start with torchrun")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if WORLD > 1:
        # torchrun keeps its store over a restart, with the addresses of dead ranks in it: ours has a part of its own for every start
        store = dist.PrefixStore(f"start{RESTARTS}", next(rendezvous("env://"))[0])
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", store=store, rank=RANK, world_size=WORLD)
    return device


def gathered(value):
    """[value of rank 0, value of rank 1, …], any picklable value, on every rank."""
    values = [value] * WORLD
    if WORLD > 1:
        dist.all_gather_object(values, value)
    return values


def collected(value):
    """[value of rank 0, value of rank 1, …] on rank 0, None on the others."""
    values = [value] * WORLD if RANK == 0 else None
    if WORLD > 1:
        dist.gather_object(value, values)
    return values


def spread(values, own, size):
    """Our rows among zeros. values: (n, …), own: their places -> (size, …)."""
    full = values.new_zeros(size, *values.shape[1:])
    full[own] = values
    return full


def of_all(own, size, columns):
    """Columns of all environments from those of the ranks: {name: (T, m, …)} -> {name: (T, size, …)}, the same on every rank."""
    if WORLD == 1:
        return columns
    for name, values in columns.items():
        columns[name] = values.new_zeros(len(values), size, *values.shape[2:])
        columns[name][:, own] = values
        dist.all_reduce(columns[name])
    return columns


def broadcast(*modules):
    """Give every rank the parameters of rank 0."""
    if WORLD > 1:
        for parameter in (p for module in modules for p in module.parameters()):
            dist.broadcast(parameter.data, 0)


def merged(result, episodes):
    """One result of all episodes from those of the ranks, in the order of their numbers. result: dict of columns, or None without episodes."""
    if WORLD == 1:
        return result
    parts = [(numbers, part) for numbers, part in gathered((episodes, result)) if part is not None]
    order = np.argsort(np.concatenate([numbers for numbers, _ in parts]))
    columns = {key: [part[key] for _, part in parts] for key in parts[0][1]}
    in_order = lambda rows: [rows[i] for i in order]
    for key, column in columns.items():
        arrays = isinstance(column[0], np.ndarray)
        columns[key] = None if column[0] is None else np.concatenate(column)[order] if arrays else in_order(sum(column, []))
    return columns


def joined(states):
    """One state of all environments from those of the ranks: arrays and lists one behind the other, None stays None."""
    join = lambda parts: None if parts[0] is None else np.concatenate(parts) if isinstance(parts[0], np.ndarray) else sum(parts, [])
    return {key: join([s[key] for s in states]) for key in states[0]}
