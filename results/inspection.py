"""The page of `python train.py --inspect`: what an update does to a response, token by token.

GRPO has a ratio for every token, GSPO one for the whole response. Both stand beside the experts
that predicted the token: when it was sampled and, where that is not the same, after the update."""
import sys
from math import log
from typing import NamedTuple

import torch

import gspo

WIDTH, BAR = 120, 21        # columns of the terminal, and of the bar that draws log w
COLOURS = {"bold": 1, "dim": 2, "red": 31, "green": 32, "yellow": 33}


def paint(text, *styles):
    """Coloured where the terminal can show it."""
    if not sys.stdout.isatty():
        return text
    return "".join(f"\033[{COLOURS[style]}m" for style in styles) + text + "\033[0m"


def bar(value, largest):
    """A line from the middle to the left or the right, as long as |value| is beside `largest`."""
    half = BAR // 2
    n = round(half * min(1, abs(value) / largest)) if largest else 0
    left, right = ("█" * n, "") if value < 0 else ("", "█" * n)
    return paint(left.rjust(half), "red") + "│" + paint(right.ljust(half), "green")


def experts(old, new):
    """Active experts of one token in one layer, before and after: `1,4` or `1,4→1,6`."""
    old, new = sorted(old), sorted(new)
    return ",".join(map(str, old)) + ("→" + ",".join(map(str, new)) if new != old else "")


def bracket(lines, text):
    """One mark for many lines: GSPO's ratio, in the middle of a bracket."""
    marks = ["╮", *"│" * (lines - 2), "╯"] if lines > 1 else ["╴"]
    marks[(lines - 1) // 2] = ("├ " if lines > 2 else marks[0] + " ") + text
    return marks


class Seen(NamedTuple):
    """A response of n tokens after the update."""
    log_w: torch.Tensor     # (n,)
    s: float
    clipped: dict           # {"grpo": (n,), "gspo": (n,)}
    routing: list           # experts at sampling and now (n, L, K), router's probabilities


def measure(config, model, rollout, row, advantage, ranges):
    """Score one row again -> Seen."""
    row = torch.tensor([row], device=rollout.tokens.device)
    with torch.no_grad():
        logp, _, _, routing = gspo.score(model, rollout, row, config.temperature,
                                         config.routing_replay != "none")
    mask, logp_old = rollout.mask[row], rollout.logp[row]
    r = gspo.ratios(logp, logp_old, mask)
    clipped = {name: gspo.policy_loss(name, logp, logp_old, advantage[None], mask, *clip)[1][mask]
               for name, clip in ranges.items()}
    return Seen(r.log_w[mask], r.log_s[0, 0].exp().item(), clipped, routing)


def contrast(seen):
    """How far GRPO's ratio and GSPO's are apart, at the token where they differ most."""
    return (seen.log_w - log(seen.s)).abs().max().item()


def page(tokens, seen, largest, ranges):
    """The lines of one response's table and of its summary."""
    log_w, s, clipped, (old, new, probs) = seen
    (n, L, _), pairs = old.shape, zip(old.flatten(0, 1).tolist(), new.flatten(0, 1).tolist())
    cell = 2 + max(len(f"layer {L - 1}"), *(len(experts(*pair)) for pair in pairs))
    layers = range(max(0, L - (WIDTH - 82) // cell), L)     # the deepest: the rest takes 82 columns
    axis = f"{-largest:<+{BAR // 2}.2g}0{largest:>+{BAR // 2}.2g}"
    yield paint("  token     " + "".join(f"layer {i}".ljust(cell) for i in layers)
                + f"   log w   {axis}   w, GRPO's ratio    s, GSPO's ratio", "dim")
    one = bracket(len(tokens), f"{s:.4f} " + ("clipped" if clipped["gspo"].any() else "kept"))
    for t, token in enumerate(tokens):
        cells = ""
        for layer in layers:
            text = experts(old[t, layer].tolist(), new[t, layer].tolist())
            cells += paint(text, *(["yellow", "bold"] if "→" in text else ["dim"]))
            cells += " " * (cell - len(text))
        held = clipped["grpo"][t].item()
        moved = abs(log_w[t].item()) > largest / 100        # else dimmed: look at the others
        style = ["red", "bold"] if held else [] if moved else ["dim"]
        weight = f"{log_w[t].exp().item():7.4f} {'clipped' if held else '':<8}"
        yield (f"  {token:<10}{cells}{paint(format(log_w[t].item(), '+8.4f'), *style)}   "
               f"{bar(log_w[t].item(), largest)}   {paint(weight, *style)}   "
               + paint(one[t], "red" if clipped["gspo"].any() else "green"))
    changed = gspo.routing_stats(old, new, probs)["expert_change"]
    w, low, high = log_w.exp(), *ranges["gspo"]
    yield (f"  {sum(changed) / L:.1%} of the active experts changed. GRPO's ratios go from "
           f"{w.min():.4f} to {w.max():.4f}, {clipped['grpo'].sum()} of {n} are clipped;")
    yield (f"  GSPO's is {s:.4f}, clipped below {1 - low:g} if A < 0, above {1 + high:g} if A > 0.")


def show(config, tokenizer, model, rollout, rewards, advantages, rows, ranges):
    """Print, of the chosen rows, the right and the wrong response with the most to see.

    `rollout` was sampled before the update and has rewards (P, G) and advantages (B,) or (B, T);
    `model` is as it is after; `ranges` has clip ranges for "grpo" and "gspo"."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")        # a terminal without these characters
    if advantages.dim() == 2:       # one number for the response, as GSPO needs it
        advantages = gspo.response_mean(advantages * rollout.mask, rollout.mask)[:, 0]
    chosen = {}
    for row in rows:
        if advantages[row] != 0:
            seen = measure(config, model, rollout, row, advantages[row], ranges)
            kind = "right" if rewards.flatten()[row] > 0 else "wrong"
            if kind not in chosen or contrast(seen) > contrast(chosen[kind][1]):
                chosen[kind] = row, seen
    kinds = " and the ".join(sorted(chosen))
    print(f"Of {len(rows)} responses to the last one, the {kinds} one in which GRPO's ratios and "
          "GSPO's differ most:" if chosen else "No response has a signal.")
    largest = max((seen.log_w.abs().max().item() for _, seen in chosen.values()), default=0.0)
    for kind, (row, seen) in sorted(chosen.items()):
        response = rollout.tokens[row, :len(seen.log_w)].tolist()
        problem = tokenizer.decode(rollout.prompts[row * len(rollout.prompts) // len(advantages)])
        print("\n" + paint(f"{problem}  {kind}, A = {advantages[row]:+.2f}", "bold"))
        print(*page([tokenizer.decode([token]) for token in response], seen, largest, ranges),
              sep="\n")
