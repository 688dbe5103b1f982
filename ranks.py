"""What the ranks of one run tell each other under torchrun. With a single process nothing is sent and no number changes.

    torchrun --nproc-per-node 2 train_aloha.py --seed 1

Every rank has its own environments, base and buffer, and a copy of actor and critics. All ranks draw the same random numbers, for all environments,
and use their own part of them; so n ranks of m environments are the same algorithm, on the same draws, as one rank of n·m.
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


def whole(values, own, size):
    """Values of all ranks: numbers of the others, and our own with their gradient. values: (…, n), own: their places -> (…, size)."""
    if WORLD == 1:
        return values
    full = values.new_zeros(*values.shape[:-1], size)
    full[..., own] = values.detach()
    dist.all_reduce(full)
    full[..., own] = values
    return full


def share(i, num_envs):
    """Which samples of a minibatch are ours. i: (B,) sample numbers, t · num_envs + environment -> (B,) mask, (b,) their places in our own buffer."""
    m = num_envs // WORLD
    ours = i % num_envs // m == RANK
    return ours, i[ours] // num_envs * m + i[ours] % m


def sum_gradients(module):
    """Add up the gradients of all ranks, whose losses are parts of one mean: one flattened all-reduce."""
    if WORLD > 1:
        gradients = [p.grad for p in module.parameters()]
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        for g, total in zip(gradients, flat.split([g.numel() for g in gradients])):
            g.copy_(total.view_as(g))


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
