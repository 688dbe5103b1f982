"""README's map from the paper's equations and algorithm lines to the lines of the code.

    python tools/equation_map.py           # after an edit that moved lines; tests/test_readme.py tells when

Every entry names a piece of code that occurs once in its file; the map gets that line's number.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


from run_files import parse_args, stop, write_atomically

ENTRIES = [  # what the paper calls it, file, code
    ("Eq. 1, return of an episode", "train_aloha.py", "episode_return = success"),
    ("Eq. 2, Δℓ", "fpo_loss.py", "delta = cfm_init - cfm"),
    ("Eq. 3, ratio ρ", "fpo_loss.py", "return torch.exp(beta * (delta - mu) / sigma)"),
    ("Eq. 4, clipped surrogate", "fpo_loss.py", "surrogate = torch.min("),
    ("Eq. 5, TD target", "fpo_critic.py", "y = r + discount * (1 - terminated) * target("),
    ("Eq. 6, critic loss", "fpo_critic.py", "(critic(s, x) - y).square()"),
    ("Eq. 7, latent exploration", "fpo_actor.py", "x = x + explore_eta * self.velocity("),
    ("ℓ_cfm", "fpo_actor.py", "(v - (x - eps)).square()"),
    ("GAE", "fpo_critic.py", "tail = delta[t] + discount[t] * gae_lambda"),
    ("Algorithm 1, line 1", "train_aloha.py", "(Algorithm 1, line 1)"),
    ("line 2", "train_aloha.py", "# ---- for each iteration (line 2) ----"),
    ("line 3, θ_old", "train_aloha.py", "# ---- rollout phase (lines 3-12)"),
    ("line 6, observe", "train_aloha.py", "s_after, context = base.encode("),
    ("line 7, sample x", "train_aloha.py", "x0 = actor.sample("),
    ("line 8, decode", "train_aloha.py", "a = base.decode("),
    ("line 9, step", "train_aloha.py", "step = envs.step("),
    ("line 10, cache ℓ_init", "train_aloha.py", "cfm_init, v_old = cached_loss("),
    ("line 11, push", "train_aloha.py", "buffer.push(batch)"),
    ("lines 17-18, x'", "train_aloha.py", "x_next = actor.sample("),
    ("line 19", "train_aloha.py", "y = td_target("),
    ("line 20", "train_aloha.py", "loss_critic = critic_loss("),
    ("line 21", "train_aloha.py", "polyak_update(target, critic, TAU)"),
    ("line 23", "train_aloha.py", "cfm, v = actor.cfm_loss("),
    ("line 26, advantages", "train_aloha.py", "adv = latent_advantage("),
    ("lines 23-25 and 27, actor update", "train_aloha.py", "loss_actor, info = fpo_loss("),
]

if __name__ == "__main__":
    parse_args(lambda: None, __doc__)  # no flags but --help
    rows = ["| | where | |", "|---|---|---|"]
    for name, file, code in ENTRIES:
        numbers = [i for i, line in enumerate((ROOT / file).read_text().splitlines(), 1) if code in line]
        if len(numbers) != 1:
            stop(f"{code!r} stands in the lines {numbers} of {file}, and should in one; mend ENTRIES", code=1)
        rows.append(f"| {name} | [{file}:{numbers[0]}]({file}#L{numbers[0]}) | `{code}` |")
    readme = ROOT / "README.md"
    text = re.sub(r"\| \| where \| \|\n.*?\n\n", lambda _: "\n".join(rows) + "\n\n", readme.read_text(), count=1, flags=re.S)
    write_atomically(readme, text.encode())
