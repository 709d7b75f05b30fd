"""The page of `python train.py --inspect`: what an update does to a response, token by token.

GRPO has a weight for every token, GSPO one for the whole response; both stand beside the experts
that worked on the token when it was sampled and after the update."""
import sys

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
    """One mark for many lines: GSPO's weight, in the middle of a bracket."""
    marks = ["╮", *"│" * (lines - 2), "╯"] if lines > 1 else ["╴"]
    marks[(lines - 1) // 2] = ("├ " if lines > 2 else marks[0] + " ") + text
    return marks


def measure(model, rollout, row, advantage, temperature, ranges):
    """-> log w (n,), s, clipped by objective {name: (n,)}, experts before and after (n, L, K)."""
    row = torch.tensor([row], device=rollout.tokens.device)
    with torch.no_grad():
        logp, _, _, (old, new, _) = gspo.score(model, rollout, row, temperature)
    mask, logp_old = rollout.mask[row], rollout.logp[row]
    r = gspo.ratios(logp, logp_old, mask)
    clipped = {name: gspo.policy_loss(name, logp, logp_old, advantage[None], mask, *clip)[1][mask]
               for name, clip in ranges.items()}
    return r.log_w[mask], r.log_s[0, 0].exp().item(), clipped, old, new


def page(tokens, log_w, s, clipped, old, new, largest, ranges):
    """The lines of one response's table and of its summary."""
    L, K = old.shape[1:]
    # A cell has to hold two sets of experts; the deepest layers are shown if there are too many.
    cell = max(len(experts(o, n)) for o, n in zip(old.flatten(0, 1).tolist(),
                                                  new.flatten(0, 1).tolist())) + 2
    cell = max(cell, len(f"layer {L - 1}") + 2)
    layers = range(max(0, L - (WIDTH - 82) // cell), L)     # the other columns take 82
    axis = f"{-largest:<+{BAR // 2}.2g}0{largest:>+{BAR // 2}.2g}"
    yield paint("  token     " + "".join(f"layer {i}".ljust(cell) for i in layers)
                + f"   log w   {axis}   GRPO's weight      GSPO's weight", "dim")
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
    changed = gspo.routing_stats(old, new, torch.zeros(*old.shape[:2], 256))["expert_change"]
    w, low, high = log_w.exp(), *ranges["gspo"]
    yield (f"  {sum(changed) / L:.1%} of the active experts changed. GRPO's weights go from "
           f"{w.min():.4f} to {w.max():.4f}, {clipped['grpo'].sum()} of {len(tokens)} are clipped;")
    yield (f"  GSPO's is {s:.4f}, clipped below {1 - low:g} if A < 0, above {1 + high:g} if A > 0.")


def show(config, tokenizer, model, rollout, rewards, ranges):
    """Print, for the right and the wrong response whose tokens have moved most, what they are to
    the next optimiser step. `rollout` was sampled before the update, `model` is the one after it;
    rewards (P, G); `ranges` has a clip range for "grpo" and for "gspo"."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")        # a terminal without these characters
    advantages = gspo.group_advantages(rewards).flatten()
    found = {}
    for row in advantages.nonzero()[:, 0].tolist():
        seen = measure(model, rollout, row, advantages[row], config.temperature, ranges)
        kind = "right" if rewards.flatten()[row] > 0 else "wrong"
        if kind not in found or seen[0].abs().max() > found[kind][1][0].abs().max():
            found[kind] = row, seen
    if not found:
        print("No group has both a right and a wrong response: there is no lesson to show.")
    largest = max((seen[0].abs().max().item() for _, seen in found.values()), default=0.0)
    for kind, (row, seen) in sorted(found.items()):
        response = rollout.tokens[row, :len(seen[0])].tolist()
        tokens = [tokenizer.decode([token]) for token in response]
        problem = tokenizer.decode(rollout.prompts[row * len(rollout.prompts) // len(advantages)])
        print("\n" + paint(f"{problem}  {kind}, A = {advantages[row]:+.2f}", "bold"))
        print(*page(tokens, *seen, largest, ranges), sep="\n")
