"""What `python train.py --ask` and `--inspect` show. The page of the latter tells what an update
does to a response, token by token.

GRPO has a ratio for every token, GSPO one for the whole response. Both stand beside the experts
that predicted the token: when it was sampled and, where that is not the same, after the update.
After a ratio comes the weight of the token in the gradient of J, times B (Eq. 10, 12)."""
import itertools
import random
import sys
from math import log
from typing import NamedTuple

import torch

import gspo
import moe
from lab import report, runs
from lab.measures import expert_change, gradient_weights, predicting
from lab.report import paint

WIDTH = 120         # columns of the terminal
BAR = 21            # columns of the bar that draws log w
REST = 88           # columns of a line without those of the layers


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
    grpo_weights: torch.Tensor      # (n,) w A / |y|, 0 where clipped
    gspo_weight: float              # s A / |y|, of each token
    old_routes: list                # per layer and token, the active experts
    new_routes: list


def measure(trainer, rollout, advantage, ranges):
    """Score a rollout of one row again -> its Change."""
    mask = rollout.response_mask
    scores = trainer.score(trainer.model, rollout, trainer.config.routing_replay != "none")
    logs = gspo.log_ratios(scores.logp, rollout.logp_old, mask)             # (1, T) each
    ratios = {"grpo": gspo.to_ratio(logs.log_w), "gspo": gspo.to_ratio(logs.log_s)}
    clipped = {}
    weights = {}
    for name, (low, high) in ranges.items():
        _, is_clipped = gspo.policy_loss(name, scores.logp, rollout.logp_old, advantage[None],
                                         mask, low, high)
        clipped[name] = is_clipped[mask]
        weights[name] = gradient_weights(ratios[name], advantage[None], is_clipped,
                                         1 / rollout.lengths)[mask]
    old_routes = predicting(rollout, rollout.routes)                        # (L, n, K)
    new_routes = predicting(rollout, scores.routes)
    return Change(logs.log_w[mask], ratios["gspo"][0, 0].item(), clipped["grpo"],
                  clipped["gspo"].any().item(), weights["grpo"], weights["gspo"][0].item(),
                  old_routes.tolist(), new_routes.tolist())


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
    ratios = "w and weight, GRPO   s and weight, GSPO"
    yield paint(f"  token     {header}   log w   {axis}   {ratios}", "dim")
    verdict = "clipped" if change.clipped_by_gspo else f"{change.gspo_weight:+.4f}"
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
        weight = "clipped" if clipped else f"{change.grpo_weights[t].item():+.4f}"
        ratio = f"{change.log_w[t].exp().item():7.4f} {weight:<8}"
        yield (f"  {token:<10}{cells}{paint(f'{log_w:+8.4f}', *style)}   {bar(log_w, largest)}   "
               f"{paint(ratio, *style)}     "
               + paint(marks[t], "red" if change.clipped_by_gspo else "green"))
    yield from summary(len(tokens), change, ranges)


def summary(n, change, ranges):
    old = torch.tensor(change.old_routes)
    new = torch.tensor(change.new_routes)
    changed = expert_change(old, new).mean().item()
    w = change.log_w.exp()
    low, high = ranges["gspo"]
    yield (f"  {changed:.1%} of the active experts changed. GRPO's ratios go from "
           f"{w.min():.4f} to {w.max():.4f}, {change.clipped_by_grpo.sum()} of {n} are clipped;")
    yield (f"  GSPO's is {change.s:.4f}, clipped below {1 - low:g} if A < 0, above {1 + high:g} if "
           "A > 0.")


def clip_ranges(config):
    """The clip ranges that the page shows: the run's own for its own kind of ratio, else those of
    the table."""
    ranges = {name: gspo.ALGORITHMS[name].clip_range for name in ("gspo", "grpo")}
    low, high = gspo.ALGORITHMS[config.algorithm].clip_range
    own = (low if config.clip_low is None else config.clip_low,
           high if config.clip_high is None else config.clip_high)
    if config.algorithm in ("gspo", "gspo_token"):
        ranges["gspo"] = own
    if config.algorithm in ("grpo", "ppo", "dr_grpo", "dapo"):
        ranges["grpo"] = own
    return ranges


def answer(prompt, text, truncated):
    """The model's answer as --ask shows it: on a terminal the thinking is dim and the answer bold;
    into a pipe it is the bare text."""
    if not sys.stdout.isatty():
        return prompt + text
    thinking, closed, rest = text.rpartition("</think>")
    note = "  (truncated: it had no end after --max_new_tokens)" if truncated else ""
    return prompt + paint(thinking + closed, "dim") + paint(rest, "bold") + note


def look(trainer, todo, max_prompt):
    """What --ask, --inspect or --eval_only have asked for, {name: value}."""
    if "ask" in todo:
        with runs.bad_input_in_one_line():
            ask(trainer, todo["ask"], max_prompt)
    elif "inspect" in todo:
        inspect_update(trainer)
    else:
        report.show(*trainer.evaluate())


def ask(trainer, prompt, longest):
    """Print the model's greedy answer. ValueError for a prompt without tokens or of more than
    `longest`."""
    ids = trainer.tokenizer.encode(prompt)
    if not 0 < len(ids) <= longest:
        example = trainer.task.sample(random.Random(0)).prompt
        raise ValueError(f"argument --ask: a prompt has 1 to {longest} tokens, this one has "
                         f"{len(ids)}; ask something like {example}")
    rollout = moe.generate(trainer.model, [ids], 1, trainer.config.max_new_tokens, 0.0,
                           trainer.tokenizer.eos_id, trainer.tokenizer.pad_id)
    response = rollout.response[0].tolist()
    truncated = response[-1] != trainer.tokenizer.eos_id
    text = trainer.tokenizer.decode(response if truncated else response[:-1])
    print(answer(prompt, text, truncated))


def inspect_update(trainer):
    """Sample groups, make all optimiser steps on them but the last (with one: that one), in memory,
    and show the responses of the last one: what they are to the model that has moved since it
    sampled them."""
    print("Look at the two ratios: GRPO's jumps from token to token, GSPO's is one for the whole "
          "response.")
    print("The weight is what a token counts in the gradient, times B: w A / |y| in GRPO, "
          "s A / |y| in GSPO, 0 if clipped.")
    config = trainer.config
    step = trainer.progress["step"]
    rollout, _ = trainer.collect(trainer.model, random.Random(f"{config.seed} rl {step + 1}"))
    rollout.advantages = trainer.advantages(rollout)
    n_steps = config.mini_batches * config.epochs
    made = max(1, n_steps - 1)
    gspo.update(trainer.model, trainer.optimizer, rollout, config, trainer.loss_terms,
                first(made, trainer.gradient), trainer.optimizer_step)
    when = f"after RL step {step}" if step else "after the cold start"
    title = (f"{trainer.folder}, {config.algorithm}: the model as it was {when} has sampled "
             f"{config.prompts} groups and made {made} of {n_steps} optimiser steps.")
    all_rows = torch.arange(len(rollout.tokens)).view(config.prompts, -1)
    show_update(title, trainer, rollout, all_rows.tensor_split(config.mini_batches)[-1].flatten())


def first(n, gradient):
    """A `gradient` for gspo.update that has something to learn in the first n calls only."""
    calls = itertools.count(1)

    def limited(*arguments):
        return gradient(*arguments) if next(calls) <= n else None
    return limited


def show_update(title, trainer, rollout, rows):
    """Print, of the chosen rows, the right and the wrong response with the most to see. The rollout
    was sampled before an update, trainer.model is as it is after."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")        # a terminal without these characters
    mask = rollout.response_mask
    advantages = rollout.advantages
    if advantages.dim() == 2:           # one number for a response, as GSPO needs it
        advantages = gspo.response_mean(advantages * mask, mask)[:, 0]
    ranges = clip_ranges(trainer.config)
    chosen = {}
    for row in rows.tolist():
        if advantages[row] == 0:
            continue
        change = measure(trainer, rollout.select(torch.tensor([row])), advantages[row], ranges)
        kind = "right" if rollout.rewards[row] >= 1 else "wrong"
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
        ids = rollout.tokens[row][rollout.mask[row]].tolist()
        n = len(change.log_w)
        tokens = [trainer.tokenizer.decode([token]) for token in ids[-n:]]
        title = f"{trainer.tokenizer.decode(ids[:-n])}  {kind}, A = {advantages[row]:+.2f}"
        print("\n" + paint(title, "bold"))
        print(*page(tokens, change, largest, ranges), sep="\n")
