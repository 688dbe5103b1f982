"""What train_sac.py and train_cloning.py have in common: task and frozen base, evaluation, files of a run."""

import contextlib
import time
from collections import deque
from dataclasses import dataclass
from typing import Literal

import shared  # first: it makes the folder above known
import torch

from base import Pi0Options, load_base
from envs import load_suite
from envs.workers import TrainingEnvs, Workers
from evaluate import evaluate, print_result
from support import run_files
from support.ranks import SIMULATORS, connect
from support.run_files import CsvLog, mean, stop

METRICS = "charts/env_steps charts/success charts/SPS eval/success latent/norm latent/std".split()


@dataclass
class Args:
    task: Literal["aloha", "libero_90_task56"] = "aloha"  # what to train on
    seed: int = 1  # of the networks, every draw and the training episodes
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where the networks run; auto is CUDA if there is one
    total_env_steps: int | None = None  # control steps of training; 800 000, for LIBERO 250 000 if left out
    num_envs: int = 32  # parallel environments
    num_workers: int = SIMULATORS  # simulator processes; the results do not depend on it
    eval_every: int | None = None  # control steps between evaluations; 200 000, for LIBERO 50 000 if left out
    eval_episodes: int | None = None  # at start and end, half of it between; 200, for LIBERO 50 if left out
    run_name: str | None = None  # folder below runs/; <kind>_<task>__seed<seed>__<time> if left out


class Baseline:
    """A run: its suite, frozen base and files. metrics: columns of metrics.csv beside METRICS. Stops with one
    sentence at a flag that cannot be."""

    def __init__(self, args, kind, metrics):
        self.args, self.kind = args, f"{kind}_{args.task}"
        steps, every, episodes = (800_000, 200_000, 200) if args.task == "aloha" else (250_000, 50_000, 50)
        defaults = dict(total_env_steps=steps, eval_every=every, eval_episodes=episodes)
        for name, value in defaults.items():
            setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
        shared.check_limits(args, "total_env_steps num_envs num_workers minibatch_size eval_every", 1)
        shared.check_limits(args, "updates actor_lr", 1e-9)
        shared.check_limits(args, "seed", 0, 2**63 - 1)
        run_files.check_device(args.device)
        self.suite = load_suite(args.task.split("_task")[0])
        shared.check_limits(args, "eval_episodes", 1, len(self.suite.starts))
        self.device = connect(args.device)
        self.base = load_base(f"weights/{args.task}.safetensors", Pi0Options(), self.suite, self.device)
        torch.manual_seed(args.seed)
        torch.set_num_threads(1)  # more for updates only: waiting threads spin, and take the workers' cores
        default = f"{self.kind}__seed{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
        self.folder = run_files.new_run_folder(args.run_name, default)
        run_files.write_args(self.folder, args)
        self.metrics = CsvLog(self.folder / "metrics.csv", [*METRICS, *metrics])
        self.episodes = CsvLog(self.folder / "eval.csv", run_files.EPISODES)
        self.env_steps, self.evaluations, self.recent, self.latents = 0, 0, deque(maxlen=100), []
        self.due = self.last = False  # whether the next `log` evaluates, and ends the training

    @contextlib.contextmanager
    def going(self):
        """Evaluate the base, have `envs` while the run trains, print its result. Errors end the program."""
        args, suite = self.args, self.suite
        try:
            with Workers(suite.build, suite.tasks, args.num_workers) as self.workers:
                self.play("base", lambda s, noise: noise)
                self.play("zero latents", lambda s, noise: 0 * noise)
                starts = suite.draw_start, suite.limit, args.seed
                self.envs = TrainingEnvs(self.workers, suite.tasks, args.num_envs, *starts)
                self.bar = run_files.steps_bar(args.total_env_steps)
                self.clock, self.steps_then = time.perf_counter(), 0
                yield
        except ChildProcessError as error:
            stop(str(error), code=1)
        except KeyboardInterrupt:
            stop("stopped", code=130)
        print_result(self.folder, suite.names)
        print(f"{self.env_steps:,} environment steps, files in {self.folder}")

    def play(self, policy, latents, episodes=None):
        """Evaluate on states that training never sees. latents: as in evaluate.py -> success rate"""
        starts, who = self.suite.starts[: episodes or self.args.eval_episodes], (policy, latents, self.base)
        where = self.suite.tasks, starts, self.suite.limit
        return float(evaluate(*who, self.workers, *where, self.episodes, self.env_steps)["success"].mean())

    def step(self, context, x):
        """Execute the chunks of latents x (E, D) in all environments. -> the dict of TrainingEnvs.step"""
        step = self.envs.step(self.base.decode(context, x).cpu().numpy())
        self.latents.append(x)
        self.recent.extend(step["success"][step["terminated"] | step["truncated"]])
        self.bar.update(int(step["num_steps"].sum()))
        self.env_steps += int(step["num_steps"].sum())
        self.last = self.env_steps >= self.args.total_env_steps
        self.due = self.last or self.env_steps // self.args.eval_every > self.evaluations
        return step

    def log(self, row, tuned, networks):
        """Write a row of metrics; where it is due, play `tuned` and save the networks {name: module}."""
        speed = (self.env_steps - self.steps_then) / (time.perf_counter() - self.clock)
        x = torch.cat(self.latents)  # as executed since the last row
        spread = x.norm(dim=-1).mean().item(), x.std(0).mean().item()
        row = dict(zip(METRICS, (self.env_steps, mean(self.recent), speed, "", *spread)), **row)
        self.bar.set_postfix(success=mean(self.recent), refresh=False)
        if self.due:
            self.evaluations = self.env_steps // self.args.eval_every
            n = self.args.eval_episodes if self.last else max(1, self.args.eval_episodes // 2)
            row["eval/success"] = self.play("tuned", tuned, n)
            content = {name: network.state_dict() for name, network in networks.items()}
            content |= dict(task=self.kind, env_steps=self.env_steps)
            run_files.save_checkpoint(self.folder, content, self.args)
        self.metrics.write(row)
        self.clock, self.steps_then, self.latents = time.perf_counter(), self.env_steps, []
