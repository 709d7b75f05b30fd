"""One update as a page for the browser: a file that loads nothing else and opens from the disk.

    python -m lab.page out/run-1 [out/run-2]    writes out/run-1/update.html, with one run or both

The model as it was after the cold start samples a rollout and makes eight optimiser steps on it,
four mini-batches twice. Before the first step and after each it scores some groups again."""
import json
import random
import sys
from math import ceil
from pathlib import Path

import torch

import gspo
import train
from lab import command_line, extras, inspection, report, runs
from lab.measures import predicting
from moe import Rollout

MINI_BATCHES = 4
EPOCHS = 2
TOKENS = 800        # about so many are shown


def open_run(folder: str) -> train.Trainer:
    """A run as --inspect sees it, with the mini-batches and epochs of the page."""
    words = ["--inspect", "cold_start", "--device", "cpu", "--out", folder]
    with runs.bad_input_in_one_line():
        config, task, _, state = command_line.parse(words, train.Config, train.OPTION_GROUPS, "")
        config.mini_batches = min(MINI_BATCHES, config.prompts)
        config.epochs = EPOCHS
        trainer = extras.extend(train.Trainer, config)(config, task)
        runs.restore(trainer, state)
    return trainer


def choose_groups(rollout: Rollout, config) -> dict[int, int]:
    """{group: its mini-batch}, from 0: at most one of each, the one whose rewards differ most."""
    spread = rollout.rewards.view(-1, config.group_size).std(dim=1).tolist()        # of each group
    mini_batches = torch.arange(len(spread)).tensor_split(config.mini_batches)
    tokens = config.mini_batches * rollout.lengths.sum().item() / len(spread)
    chosen = {}
    for i in range(0, config.mini_batches, ceil(tokens / TOKENS)):
        chosen[max(mini_batches[i].tolist(), key=spread.__getitem__)] = i
    return chosen


def record(trainer: train.Trainer) -> dict:
    """Make the update -> what the page shows of it, as JSON has it."""
    config = trainer.config
    G = config.group_size
    rollout, _ = trainer.collect(trainer.model, random.Random(f"{config.seed} rl 1"))
    rollout.advantages = trainer.advantages(rollout)
    chosen = choose_groups(rollout, config)
    shown = rollout.select(torch.arange(len(rollout.tokens)).view(-1, G)[list(chosen)].flatten())
    rewards = shown.rewards.view(-1, G).double()
    shown.A = gspo.group_advantages(rewards).flatten()
    shown.A_plain = (rewards - rewards.mean(dim=1, keepdim=True)).flatten() * (shown.A != 0)
    free = []           # gspo.Scores before the first step and after each, as the router is then
    replayed = []       # and with the experts that sampled

    def look():
        print(f"{trainer.folder}: {len(free)} of {EPOCHS * config.mini_batches} steps")
        free.append(trainer.score(trainer.model, shown, False))
        replayed.append(trainer.score(trainer.model, shown, True))

    def step_and_look(*arguments):
        grad_norm = trainer.optimizer_step(*arguments)
        look()
        return grad_norm
    look()
    learned = gspo.update(trainer.model, trainer.optimizer, rollout, config, trainer.loss_terms,
                          trainer.gradient, step_and_look)
    responses = [response_as_json(trainer.tokenizer, shown, torch.tensor([row]), free, replayed)
                 for row in range(len(shown.tokens))]
    groups = [{"mini_batch": mini_batch + 1, "responses": responses[i * G:(i + 1) * G]}
              for i, mini_batch in enumerate(chosen.values())]
    turns = [x.mini_batch % config.mini_batches + 1 for x in learned]
    return trainer.options | {
        "out": trainer.folder.name, "sampled": len(rollout.tokens), "shown": len(shown.tokens),
        "turns": turns, "ranges": inspection.clip_ranges(config), "groups": groups}


def response_as_json(tokenizer, shown: Rollout, row, free: list, replayed: list) -> dict:
    """log w in units of 1e-5. `routes` has the experts of each layer and token when it was sampled,
    `moved` those of later passes where they are others."""
    one = shown.select(row)
    mask = one.response_mask

    def log_w(scores):
        logs = gspo.log_ratios(scores.logp[row], one.logp_old, mask)
        return (logs.log_w[mask] * 1e5).round().int().tolist()
    routes = predicting(one, one.routes).sort().values.tolist()             # [layer][token]
    moved = {}
    for step, scores in enumerate(free):
        now = predicting(one, scores.routes[row]).sort().values.tolist()
        for layer, of_tokens in enumerate(now):
            for token, experts in enumerate(of_tokens):
                if experts != routes[layer][token]:
                    moved[f"{step},{layer},{token}"] = experts
    ids = one.tokens[one.mask].tolist()
    n = len(ids) - mask.sum().item()
    return {"prompt": tokenizer.decode(ids[:n]), "tokens": [tokenizer.decode([i]) for i in ids[n:]],
            "reward": one.rewards.item(), "A": one.A.item(), "A_plain": one.A_plain.item(),
            "log_w": [*map(log_w, free)], "replayed": [*map(log_w, replayed)], "routes": routes,
            "moved": moved}


def page(recordings: list[dict]) -> str:
    """page.html with the recordings in it. A text of the model cannot close the script element."""
    data = json.dumps(recordings, separators=(",", ":")).replace("<", "\\u003c")
    return Path(__file__).with_suffix(".html").read_text("utf-8").replace("RECORDINGS", data)


def main(folders: list[str]):
    path = Path(folders[0], "update.html")
    report.write(path, page([record(open_run(folder)) for folder in folders]).encode())
    print(f"open {path}")


if __name__ == "__main__":
    main(sys.argv[1:]) if len(sys.argv) > 1 else print(__doc__)
