"""The page of `python train.py --inspect`: what an update does to a response, token by token.

GRPO has a ratio for every token, GSPO one for the whole response. Both stand beside the experts
that predicted the token: when it was sampled and, where that is not the same, after the update."""
import itertools
import sys
from math import log
from typing import NamedTuple

import torch

import gspo

WIDTH = 120         # columns of the terminal
BAR = 21            # columns of the bar that draws log w
REST = 82           # columns of a line without those of the layers
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
    left = "█" * n if value < 0 else ""
    right = "█" * n if value >= 0 else ""
    return paint(left.rjust(half), "red") + "│" + paint(right.ljust(half), "green")


def expert_text(old, new):
    """Active experts of one token in one layer, before and after: `1,4` or `1,4→1,6`."""
    before = ",".join(map(str, sorted(old)))
    after = ",".join(map(str, sorted(new)))
    return before if before == after else f"{before}→{after}"


def bracket(n_lines, text):
    """One mark for many lines: GSPO's ratio, in the middle of a bracket."""
    if n_lines == 1:
        return [f"╴ {text}"]
    marks = ["╮", *"│" * (n_lines - 2), "╯"]
    middle = (n_lines - 1) // 2
    marks[middle] = f"{'├' if n_lines > 2 else '╮'} {text}"
    return marks


class Change(NamedTuple):
    """A response of n tokens, as it was sampled and after the update."""
    log_w: torch.Tensor             # (n,) the log-ratio of each token
    s: float                        # GSPO's ratio
    clipped_by_grpo: torch.Tensor   # (n,)
    clipped_by_gspo: bool
    old_routes: list                # per layer and token, the active experts
    new_routes: list


def measure(run, part, advantage, ranges):
    """Score an Experience of one row again -> its Change."""
    settings = run.config.settings()
    rollout = part.rollout
    mask = rollout.response_mask
    with torch.no_grad():
        scores = gspo.score(run.model, rollout, settings.temperature,
                            settings.routing_replay != "none", settings.dtype)
    clipped = {}
    for name, (low, high) in ranges.items():
        clipped[name] = gspo.policy_loss(name, scores.logp, rollout.logp, advantage[None], mask,
                                         low, high)[1][mask]
    r = gspo.ratios(scores.logp, rollout.logp, mask)
    old_routes = rollout.predicting(rollout.routes)[:, mask]                # (L, n, K)
    new_routes = rollout.predicting(scores.routes)[:, mask]
    return Change(r.log_w[mask], r.log_s[0, 0].exp().item(), clipped["grpo"],
                  clipped["gspo"].any().item(), old_routes.tolist(), new_routes.tolist())


def contrast(change):
    """How far GRPO's ratio and GSPO's are apart, at the token where they differ most."""
    return (change.log_w - log(change.s)).abs().max().item()


def page(tokens, change, largest, ranges):
    """The lines of one response's table and of its summary."""
    texts = [[expert_text(old, new) for old, new in zip(*layer)]
             for layer in zip(change.old_routes, change.new_routes)]        # [layer][token]
    n_layer = len(texts)
    cell = 2 + max(len(f"layer {n_layer - 1}"), *map(len, itertools.chain(*texts)))
    layers = range(max(0, n_layer - (WIDTH - REST) // cell), n_layer)       # the deepest that fit
    header = "".join(f"layer {i}".ljust(cell) for i in layers)
    axis = f"{-largest:<+{BAR // 2}.2g}0{largest:>+{BAR // 2}.2g}"
    ratios = "w, GRPO's ratio    s, GSPO's ratio"
    yield paint(f"  token     {header}   log w   {axis}   {ratios}", "dim")
    verdict = "clipped" if change.clipped_by_gspo else "kept"
    marks = bracket(len(tokens), f"{change.s:.4f} {verdict}")
    for t, token in enumerate(tokens):
        log_w = change.log_w[t].item()
        cells = ""
        for i in layers:
            text = texts[i][t]
            style = ("yellow", "bold") if "→" in text else ("dim",)
            cells += paint(text, *style) + " " * (cell - len(text))
        clipped = change.clipped_by_grpo[t].item()
        style = ("red", "bold") if clipped else ()
        if not clipped and abs(log_w) <= largest / 100:     # dim what hardly moves
            style = ("dim",)
        weight = f"{change.log_w[t].exp().item():7.4f} {'clipped' if clipped else '':<8}"
        yield (f"  {token:<10}{cells}{paint(f'{log_w:+8.4f}', *style)}   {bar(log_w, largest)}   "
               f"{paint(weight, *style)}   "
               + paint(marks[t], "red" if change.clipped_by_gspo else "green"))
    yield from summary(len(tokens), change, ranges)


def summary(n, change, ranges):
    old = torch.tensor(change.old_routes)
    new = torch.tensor(change.new_routes)
    changed = gspo.expert_change(old, new).mean().item()
    w = change.log_w.exp()
    low, high = ranges["gspo"]
    yield (f"  {changed:.1%} of the active experts changed. GRPO's ratios go from "
           f"{w.min():.4f} to {w.max():.4f}, {change.clipped_by_grpo.sum()} of {n} are clipped;")
    yield (f"  GSPO's is {change.s:.4f}, clipped below {1 - low:g} if A < 0, above {1 + high:g} if "
           "A > 0.")


def clip_ranges(config):
    """The clip ranges that the page shows: the run's own for its own kind of ratio, else those of
    the table."""
    ranges = {name: gspo.ALGORITHMS[name].clip for name in ("gspo", "grpo")}
    if config.algorithm in ("gspo", "gspo_token"):
        ranges["gspo"] = (config.clip_low, config.clip_high)
    if config.algorithm in ("grpo", "ppo", "dr_grpo", "dapo"):
        ranges["grpo"] = (config.clip_low, config.clip_high)
    return ranges


def show_update(title, run, experience, rewards, rows):
    """Print, of the chosen rows, the right and the wrong response with the most to see. The
    Experience was sampled before an update, run.model is as it is after; rewards are (B,)."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")        # a terminal without these characters
    mask = experience.rollout.response_mask
    advantages = experience.advantages
    if advantages.dim() == 2:           # one number for a response, as GSPO needs it
        advantages = gspo.response_mean(advantages * mask, mask)[:, 0]
    ranges = clip_ranges(run.config)
    chosen = {}
    for row in rows.tolist():
        if advantages[row] == 0:
            continue
        change = measure(run, experience.select(torch.tensor([row])), advantages[row], ranges)
        kind = "right" if rewards[row] > 0 else "wrong"
        if kind not in chosen or contrast(change) > contrast(chosen[kind][1]):
            chosen[kind] = (row, change)
    print(title)
    if not chosen:
        print("No response has a signal.")
        return
    kinds = " and the ".join(sorted(chosen))
    print(f"Of the {len(rows)} responses to the last one, the {kinds} one in which the two ratios "
          "differ most:")
    largest = max(change.log_w.abs().max().item() for _, change in chosen.values())
    for kind, (row, change) in sorted(chosen.items()):
        ids = experience.rollout.tokens[row][experience.rollout.mask[row]].tolist()
        n = len(change.log_w)
        tokens = [run.tokenizer.decode([token]) for token in ids[-n:]]
        title = f"{run.tokenizer.decode(ids[:-n])}  {kind}, A = {advantages[row]:+.2f}"
        print("\n" + paint(title, "bold"))
        print(*page(tokens, change, largest, ranges), sep="\n")
