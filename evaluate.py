"""Play whole episodes of a frozen base and of a trained actor on the states that training never sees, and
compare.

    python evaluate.py runs/<name>/last.pt --video                  # base, zero latents and actor; films
    python evaluate.py weights/libero_goal.safetensors --suite libero_goal    # a base alone
    python evaluate.py <folder or hub name> --suite libero_goal --pi0.chunk-steps 10     # π_0 itself

Writes eval.csv (an episode a row), on LIBERO table.csv (a row a task and policy) and with --video films to a
new folder below runs/. The train scripts evaluate with the same two functions.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers inherit it

import csv
import math
import subprocess
import time
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import tyro
from tqdm import tqdm

from base import Pi0Options, is_pi0
from support.flags import RANK, parse_args, stop
from support.logs import progress_bar, rate, write_table

# success of the base and of the tuned actor in the same episode
KINDS = dict(fixed=(False, True), broken=(True, False), kept=(True, True), failed=(False, False))


def latents_of(actor, flow_steps):
    """{policy: latents(s, noise) -> x}: what each sends to the base, given encoded states (n, S) and N(0, I)
    noise (n, D). The tuned actor does without noise, as at the end of its training."""
    return {
        "base": lambda s, noise: noise,
        "zero latents": lambda s, noise: 0 * noise,
        "tuned": lambda s, noise: actor.sample(s, flow_steps, noise=0 * noise),
    }


def evaluate(policy, latents, base, workers, tasks, starts, limit, log=None, env_steps=0, record=False):
    """One episode from every start of every task, at most `limit` control steps each. No exploration. Prints
    the success.

    policy: its name. latents(s, noise) -> x: the latents that it sends, from encoded states (n, S) and N(0,
    I) noise (n, D), an episode's own, whichever others are played beside it. log: an eval.csv to write to;
    env_steps: how long the policy was trained. Under torchrun every rank plays its part, and all get the
    result: a dict of task, episode, success, length (to the success, or limit), diverged, decisions, all
    (n,), drawn, the latents sent, a list of (decisions, D), and frames, with record=True.
    """
    import torch

    from envs.episodes import play_episodes
    from support import ranks

    episodes = [(task, number) for task in tasks for number in range(len(starts))]
    n, mine = len(episodes), np.array_split(np.arange(len(episodes)), ranks.WORLD)[ranks.RANK]
    D, drawn, decisions = base.latent_dim, [], math.ceil(limit / base.chunk_steps)
    bar = progress_bar(decisions, desc=f"evaluate {policy}", leave=False)

    def noise_of(task, number):
        """N(0, I) noise of all decisions of one episode. -> (decisions, …)"""
        generator = torch.Generator(base.device).manual_seed(1000 * task + number)
        return torch.randn(decisions, D + base.free_dim, generator=generator, device=base.device)

    @torch.no_grad()
    def act(observations):
        bar.update()
        s, context = base.encode(observations)
        both = noise[:, len(drawn)]  # of this decision
        x = latents(s, both[:, :D])
        drawn.append(x.cpu().numpy())
        return base.decode(context, x, both[:, D:]).cpu().numpy()

    result = None
    if len(mine):
        own = [episodes[i] for i in mine]
        noise = torch.stack([noise_of(*episode) for episode in own])
        first = [starts[number] for _, number in own]
        result = play_episodes(workers, [task for task, _ in own], first, act, limit, record)
        result["drawn"] = [x[:k] for x, k in zip(np.stack(drawn, 1), result["decisions"])]
    bar.close()
    result = ranks.joined(result)
    result |= dict(task=np.array([task for task, _ in episodes]), episode=np.array([k for _, k in episodes]))
    if ranks.RANK == 0:
        tqdm.write(f"{env_steps:9,d} steps  {policy:12} {rate(int(result['success'].sum()), n)}")
    for i in range(n if log else 0):
        row = {key: int(result[key][i]) for key in ("task", "episode", "success", "length", "diverged")}
        log.write(dict(row, policy=policy, env_steps=env_steps))
    return result


def print_result(folder, names):
    """Print what eval.csv of a run says of every policy's last evaluation: success with its Wilson interval,
    a row a task, and how many episodes the tuned actor fixed and broke; write the rows to table.csv. names:
    {task: name}; a task without episodes is one that the base was not cloned on."""
    if RANK > 0:
        return
    with open(folder / "eval.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    last = {row["policy"]: row["env_steps"] for row in rows}
    played = {p: {} for p in last}  # {policy: {(task, episode): success}}
    for row in rows:
        if row["env_steps"] == last[row["policy"]]:
            played[row["policy"]][row["task"], int(row["episode"])] = row["success"] == "1"
    print(f"\n{'success':>8}  " + "".join(f"{policy:26}" for policy in last))
    table = []
    for task, name in [*names.items(), ("all", "")] if len(names) > 1 else names.items():
        cells = {
            p: [good for (k, _), good in e.items() if task == "all" or k == str(task)]
            for p, e in played.items()
        }
        if any(cells.values()):
            rates = "".join(f"{rate(sum(good), len(good)):26}" for good in cells.values())
            print(f"{task:>8}  {rates}{name}")
        else:
            print(f"{task:>8}  {'not cloned':{26 * len(last)}}{name}")
        for policy, good in cells.items():
            counts = dict(successes=sum(good), episodes=len(good))
            table.append(dict(task_id=task, task=name, cloned=len(good) > 0, policy=policy, **counts))
    write_table(folder / "table.csv", table)
    if "tuned" in played:
        same = [(played["base"][key], good) for key, good in played["tuned"].items()]
        fixed, broken, kept, failed = (same.count(pair) for pair in KINDS.values())
        what = f"of {len(same)} episodes the actor fixed {fixed}, broke {broken}, kept {kept}"
        print(f"{what}, left failed {failed}: {100 * (fixed - broken) / len(same):+.1f} points")


def write_film(path, films, fps):
    """Write an mp4 of films side by side (Fig. 4a, 6). films: arrays (T, height, width, 3) uint8."""
    import imageio.v2 as imageio

    path.parent.mkdir(parents=True, exist_ok=True)
    n = max(map(len, films))  # an episode that is over waits on its last frame
    films = [np.concatenate([film, film[-1:].repeat(n - len(film), 0)]) for film in films]
    partial = path.with_suffix(".partial.mp4")
    imageio.mimwrite(partial, np.concatenate(films, 2), fps=fps, macro_block_size=8)
    partial.replace(path)


def check_ffmpeg():
    """Stop with one sentence where films cannot be written."""
    import imageio_ffmpeg

    try:
        subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-version"], capture_output=True, check=True)
    except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
        what = f"--video needs ffmpeg, which does not start ({error})"
        stop(f"{what}; unset IMAGEIO_FFMPEG_EXE, or pip install imageio[ffmpeg]")


@dataclass
class Args:
    what: tyro.conf.Positional[str]
    """a checkpoint (.pt), a flow policy (.safetensors), or the folder or hub name of a π_0"""
    suite: Literal["aloha", "libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90"] = (
        "aloha"
    )
    """the tasks of a base; a checkpoint knows its own"""
    task_ids: str | None = None
    """of a LIBERO suite: numbers with commas, or all; 56 for libero_90, else all if left out"""
    base: str | None = None  # of a checkpoint, where it has moved
    pi0: Pi0Options = field(default_factory=Pi0Options)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where the networks run; auto takes CUDA where there is one"""
    episodes: int | None = None  # a task; 200 on ALOHA and 50, the official states, on LIBERO if left out
    num_workers: int | None = None
    """simulator processes of a rank; results do not depend on it; one a core if left out"""
    video: bool = False
    """films, base and tuned actor side by side: an episode fixed, broken, kept, failed (needs EGL)"""
    run_name: str | None = None  # folder below runs/; evaluate__<task>__<time> if left out


if __name__ == "__main__":
    args = parse_args(Args, __doc__)

    import torch

    from base import load_base
    from envs import cloned_tasks, load_suite
    from envs.workers import Workers
    from fpo_actor import FlowActor
    from support import ranks
    from support.flags import check_device
    from support.logs import EPISODES, CsvLog
    from support.run_files import check_same, clean_end, load_checkpoint, new_run_folder

    check_device(args.device)
    for name in ("episodes", "num_workers"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            flag = f"--{name.replace('_', '-')} is {getattr(args, name)}"
            stop(f"{flag}; it must be at least 1, or be left out")
    saved = load_checkpoint(args.what, "the checkpoint") if args.what.endswith(".pt") else None
    if saved and "hidden" not in saved:
        stop(f"the checkpoint {args.what} is of a baseline or an older version; give one of a train script")
    if args.video and saved is None:
        what = "--video shows the base and a tuned actor side by side"
        stop(f"{what}; give a checkpoint such as runs/<name>/last.pt")
    if args.video:
        check_ffmpeg()
    if saved:
        args.suite, args.task_ids = saved["suite"] or "aloha", saved["task_ids"]
        args.pi0 = Pi0Options(**saved["pi0"])
    elif args.base:
        stop(f"--base is {args.base}, but {args.what} is a base already; leave one of the two out")
    base_name = (args.base or saved["base"]) if saved else args.what
    pictures = args.video or is_pi0(base_name)
    suite = load_suite(args.suite, args.task_ids, pictures)
    episodes = args.episodes or suite.num_episodes
    if episodes > len(suite.starts):
        most = f"a task has {len(suite.starts)} initial states for evaluation"
        stop(f"--episodes is {episodes}; {most}, give at most that")
    torch.set_num_threads(1)
    device = ranks.connect(args.device)
    base = load_base(base_name, args.pi0, suite, device, steerable=False)
    tasks = cloned_tasks(suite, base)
    actor, flow_steps = None, None
    names = ["base", "zero latents"] if base.latent_dim else ["base"]
    if saved:
        now = dict(task=suite.name, base_sha256=base.sha256)
        now |= dict(latent_dim=base.latent_dim, chunk_steps=base.chunk_steps)
        check_same(saved, now, args.what, "the checkpoint")
        actor = FlowActor(base.state_dim, base.latent_dim, saved["hidden"]).to(device)
        flow_steps = saved["flow_steps"]
        actor.load_state_dict(saved["actor"])
        names += ["tuned"]

    folder = None
    if ranks.RANK == 0:
        folder = new_run_folder(args.run_name, f"evaluate__{suite.name}__{time.strftime('%Y%m%d-%H%M%S')}")
    folder, results = ranks.gathered(folder)[0], {}
    workers = Workers(suite.build, tasks, args.num_workers or ranks.SIMULATORS, base.pictures)
    with clean_end("evaluate.py", folder), workers:
        log = CsvLog(folder / "eval.csv", EPISODES) if ranks.RANK == 0 else None
        latents, where = latents_of(actor, flow_steps), (tasks, suite.starts[:episodes], suite.limit)
        for policy in names:
            who = policy, latents[policy], base
            trained = saved["env_steps"] if policy == "tuned" else 0
            results[policy] = evaluate(*who, workers, *where, log, trained, record=args.video)
        print_result(folder, suite.names)
        if args.video and ranks.RANK == 0:  # Fig. 4a, 6: base left, tuned right, from the same initial state
            before, after = results["base"], results["tuned"]
            every = round(suite.fps / 12.5)  # 10 to 12.5 pictures a second
            for kind, (good_before, good_after) in KINDS.items():
                of_kind = (before["success"] == good_before) & (after["success"] == good_after)
                filmed = [i for i in np.flatnonzero(of_kind) if len(before["frames"][i])]
                for i in filmed[:1]:
                    task, episode = before["task"][i], before["episode"][i]
                    frames = [result["frames"][i][::every] for result in (before, after)]
                    film = folder / f"{kind}_task{task}_episode{episode}.mp4"
                    write_film(film, workers.render([task] * 2, frames), suite.fps / every)
                    print(f"{kind}, base | tuned: {film}")
