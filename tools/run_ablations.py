"""The queue of the runs behind results/: FPO, FPO without one of its parts, and its peers.

    python tools/run_ablations.py --list          # every command, and which are done
    python tools/run_ablations.py                 # run what is missing, seed 1 of every row first; many hours

A run that has ended has its args.json and tables in results/, and is not run again. An interrupted one goes
on from its last iteration at the next call, but for the peers.
"""

import shutil
import subprocess
import sys
from dataclasses import dataclass

from shared import ROOT, check_limits  # first: it makes the folder above known
from tqdm import tqdm

from support.flags import parse_args, say, stop

PARTS = {  # row: what it is of FPO, and its flags
    "literal": ("the paper to the letter", "--literal"),
    "no_clip": ("without the clip", "--clip-eps inf"),
    "k1": ("exploration, K = 1", "--explore-steps 1"),
    "single_critic": ("one critic", "--num-critics 1"),
    "gae": ("executed latents, by GAE", "--fresh-latents 0 --no-anneal"),
    "no_self_fit": ("own latents not fitted", "--self-fit 0"),
    "one_step": ("one decision a target", "--td-decisions 1"),
    "all_states": ("states all alike", "--actor-choice 1"),
    "no_anneal": ("noise and learning rate not falling", "--no-anneal"),
    "one_iteration": ("a window of one iteration", "--window 1"),
    "no_clamp": ("targets not clamped", "--no-clamp-target"),
    "shuffled": ("shuffled advantages", "--shuffle-advantages"),
}
PEERS = {  # row: what it is, and its tool
    "sac": ("soft actor-critic", "train_sac.py"),
    "dsrl_na": ("DSRL-NA", "train_sac.py --noise-aliased"),
    "fpo": ("FPO of McAllister et al.", "train_peers.py --update fpo"),
    "fpo++": ("FPO++", "train_peers.py --update fpo++"),
    "nft": ("DiffusionNFT", "train_peers.py --update nft"),
    "flow_noise": ("PPO on the base's noisy steps", "train_flow_noise.py"),
    "cloning": ("cloning of successes", "train_peers.py --update cloning"),
}
# the folder of a row's runs in results/, but for the seed: its command, but for --seed and --run-name
ROWS = {"aloha/": "train_aloha.py", "libero/butter_": "train_libero.py"}
for row, (_, flags) in PARTS.items():
    ROWS[f"aloha/{row}_"] = f"train_aloha.py {flags}"
    if row in ("no_clip", "k1", "single_critic", "shuffled"):  # Table II, and the control
        ROWS[f"libero/butter_{row}_"] = f"train_libero.py {flags}"
for row, (_, command) in PEERS.items():
    ROWS[f"aloha/{row}_"] = f"tools/{command}"
    ROWS[f"libero/butter_{row}_"] = f"tools/{command} --task libero_90_task56"
for suite in ("libero_spatial", "libero_object", "libero_goal", "libero_10"):
    ROWS[f"libero/{suite}_"] = f"train_libero.py --suite {suite} --eval-episodes 20"
    ROWS[f"libero/{suite}_sac_"] = f"tools/train_sac.py --task {suite} --eval-episodes 20"


@dataclass
class Args:
    rows: tuple[str, ...] = tuple(ROWS)  # rows to run
    seeds: int = 3  # only the first seeds of every row, so many
    list: bool = False  # print the commands and which are done, and end


def play(command, seed, folder):
    """A run, from where it was interrupted if it was. -> (exit code, what it printed)"""
    command = [*command.split(), "--seed", str(seed), "--run-name", folder.name]
    if command[0].startswith("train") and (folder / "last.pt").exists():
        command = [command[0], "--resume", str(folder)]
    else:
        shutil.rmtree(folder, ignore_errors=True)  # there is nothing to go on from
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def publish(folder, to):
    """The run's small files, in one piece: a folder in results/ is a run that has ended."""
    part = to.with_name(f"{to.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for name in ("args.json", "metrics.csv", "eval.csv", "table.csv"):
        if (folder / name).exists():
            shutil.copy(folder / name, part)
    part.rename(to)


if __name__ == "__main__":
    args, failed = parse_args(Args, __doc__), 0
    for row in set(args.rows) - set(ROWS):
        stop(f"--rows has {row}, which is none of {', '.join(ROWS)}")
    check_limits(args, "seeds", 1)
    queue = [(row, seed) for seed in range(1, args.seeds + 1) for row in args.rows]
    results = {(row, seed): ROOT / "results" / f"{row}seed{seed}" for row, seed in queue}
    if args.list:
        for row, seed in queue:
            print(f"{'done' if results[row, seed].exists() else '':5}python {ROWS[row]} --seed {seed}")
        raise SystemExit(0)
    for row, seed in tqdm([job for job in queue if not results[job].exists()], unit="run"):
        folder = ROOT / "runs" / f"queue_{row.replace('/', '_')}seed{seed}"
        try:
            code, text = play(ROWS[row], seed, folder)
        except KeyboardInterrupt:  # the run has had it too
            code = 130
        if code == 130:
            say(f"\nstopped. To go on: python {' '.join(sys.argv)}")
            raise SystemExit(130)
        if code and "a loss became NaN or infinite" not in text:  # that one is a result
            failed += 1
            tqdm.write(f"{row} seed {seed} ended with code {code}:\n{text[-1500:]}", file=sys.stderr)
            continue
        publish(folder, results[row, seed])
    if failed:
        stop(f"{failed} runs failed; their last lines are above, and the next call tries them again", code=1)
