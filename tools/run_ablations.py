"""The queue of the ablations: Table II on ALOHA and on butter/tray, and what the additions of ours do.

    python tools/run_ablations.py --list          # every command, and which are done
    python tools/run_ablations.py                 # run what is missing, seed 1 of every row first; many hours

A run that has ended is in --out, a line an evaluation, and is not run again; its curve is in a file beside
that. An interrupted one goes on from its last iteration at the next call, but for the baselines.
"""

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from shared import ROOT, check_limits  # first: it makes the folder above known
from tqdm import tqdm

from results import count, evaluations, read_table
from support.flags import parse_args, say, stop
from support.run_files import write_atomically

ALOHA = "--total-env-steps 400000 --eval-every 100000 --eval-episodes 100"
BUTTER = "--total-env-steps 100000 --eval-every 25000"
TABLE_2 = dict(complete="", no_clip="--clip-eps inf", k1="--explore-steps 1", single_critic="--num-critics 1")
EXTRAS = dict(literal="--literal", gae="--fresh-latents 0 --noise-scale 1", no_self_fit="--self-fit 0")
EXTRAS |= dict(one_step="--td-decisions 1", all_states="--actor-choice 1", all_noise="--noise-scale 1")
EXTRAS |= dict(one_iteration="--window 1", k4="--explore-steps 4", shuffled="--shuffle-advantages")
# row: its command without --seed and --run-name; three seeds each
ROWS = {f"aloha_{row}": f"train_aloha.py {ALOHA} {flags}" for row, flags in TABLE_2.items()}
ROWS |= {f"short_{row}": f"train_aloha.py {ALOHA} {flags}" for row, flags in EXTRAS.items()}
ROWS["aloha_sac"] = f"tools/train_sac.py --task aloha {ALOHA}"
ROWS["short_cloning"] = f"tools/train_cloning.py --task aloha {ALOHA}"
ROWS |= {f"butter_{row}": f"train_libero.py {BUTTER} {flags}" for row, flags in TABLE_2.items()}
ROWS |= {
    f"butter_{row}": f"train_libero.py {BUTTER} {EXTRAS[row]}"
    for row in ("one_step", "all_states", "all_noise")
}
ROWS["butter_sac"] = f"tools/train_sac.py --task libero_90_task56 {BUTTER}"
COLUMNS = "row seed status command policy env_steps successes episodes".split()


@dataclass
class Args:
    rows: tuple[str, ...] = tuple(ROWS)  # rows to run
    seeds: int = 3  # only the first seeds of every row, so many
    out: Path = ROOT / "results" / "ablations" / "runs.csv"  # where the results go
    list: bool = False  # print the commands and which are done, and end


def write_table(path, columns, rows):
    lines = [",".join(map(str, row)) for row in (columns, *rows)]
    write_atomically(path, ("\n".join(lines) + "\n").encode())


def play(command, seed, folder):
    """A run, from where it was interrupted if it was. -> (exit code, what it printed)"""
    command = [*command.split(), "--seed", str(seed), "--run-name", folder.name]
    if command[0].startswith("train") and (folder / "last.pt").exists():
        command = [command[0], "--resume", str(folder)]
    else:
        shutil.rmtree(folder, ignore_errors=True)  # there is nothing to go on from
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


if __name__ == "__main__":
    args, failed = parse_args(Args, __doc__), 0
    for row in set(args.rows) - set(ROWS):
        stop(f"--rows has {row}, which is none of {', '.join(ROWS)}")
    check_limits(args, "seeds", 1)
    if args.out.is_dir() or any(list(line) != COLUMNS for line in read_table(args.out)):
        stop(f"--out is {args.out}, which is a folder or a file of something else; give a new file")
    queue = [(row, seed) for seed in range(1, args.seeds + 1) for row in args.rows]
    curves_out = args.out.with_name(f"{args.out.stem}_curves.csv")
    lines = [list(line.values()) for line in read_table(args.out)]
    curves = [list(line.values()) for line in read_table(curves_out)]
    done = {(row, int(seed)) for row, seed, *_ in lines}
    if args.list:
        for row, seed in queue:
            print(f"{'done' if (row, seed) in done else '':5}{row}: python {ROWS[row]} --seed {seed}")
        raise SystemExit(0)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for row, seed in tqdm([job for job in queue if job not in done], unit="run"):
        # another --out has run folders of its own
        folder = ROOT / "runs" / f"{args.out.resolve().parent.name}_{args.out.stem}_{row}_seed{seed}"
        try:
            code, text = play(ROWS[row], seed, folder)
        except KeyboardInterrupt:  # the run has had it too
            code = 130
        if code == 130:
            say(f"\nstopped. To go on: python {' '.join(sys.argv)}")
            raise SystemExit(130)
        diverged = "a loss became NaN or infinite" in text
        if code and not diverged:
            failed += 1
            tqdm.write(f"{row} seed {seed} ended with code {code}:\n{text[-1500:]}", file=sys.stderr)
            continue
        curves = [line for line in curves if line[:2] != [row, str(seed)]]
        for line in read_table(folder / "metrics.csv"):
            if success := line["charts/success"]:
                curves.append([row, str(seed), line["charts/env_steps"], success, line["latent/norm"]])
        write_table(curves_out, ["row", "seed", "env_steps", "success", "norm"], curves)
        cells = [row, seed, "loss not finite" if diverged else "", f"{ROWS[row]} --seed {seed}"]
        lines += [[*cells, *key, *count(run)] for key, run in evaluations(folder / "eval.csv").items()]
        write_table(args.out, COLUMNS, lines)  # last: from here on the run is done
    if failed:
        stop(f"{failed} runs failed; their last lines are above, and the next call tries them again", code=1)
