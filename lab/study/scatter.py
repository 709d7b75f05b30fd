"""How token ratios scatter, what of it comes from the router, and how it goes with the length.

    python -m lab.study.scatter     measure what results/scatter.csv lacks

After a short run the sampler writes two more rollouts. On one the optimiser steps of an RL step are
made, but for the last. So log w of the other is what it is in a last mini-batch: with today's
experts, or with those that sampled ("replayed"); "routing" is the difference. Spreads are in nats.
"""
import copy
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd

import train
from lab import command_line, extras
from lab.inspection import first
from lab.measures import expert_change, predicting
from lab.study.study import NEW, RESULTS, add, commit, machine, shell

SCATTER = RESULTS / "scatter.csv"
REGIMES = {
    "arithmetic, 4 updates": "", "arithmetic, lag 8": "--lag 8",
    "arithmetic, int4": "--sampler int4", "Countdown, 4 updates": "--task countdown",
    "Countdown, 32 updates": "--task countdown --mini_batches 16 --epochs 2",
    "Countdown, lag 16": "--task countdown --lag 16"}


def spreads(log_w: pd.DataFrame, part: str = "") -> dict[str, float]:
    """Of log w (B, T), NaN in padding. The correlation is that of two tokens of a response, mean
    over all pairs."""
    x = log_w - log_w.stack().mean()
    lengths = x.count(axis=1)
    products = x.sum(axis=1) ** 2 - (x ** 2).sum(axis=1)        # of all ordered pairs of two tokens
    variance = x.stack().var(ddof=0)
    return {f"log_w_std{part}": variance ** 0.5, f"log_s_std{part}": x.mean(axis=1).std(ddof=0),
            f"correlation{part}": products.sum() / (lengths * (lengths - 1)).sum() / variance}


def prefixes(log_w: pd.DataFrame) -> pd.DataFrame:
    """Of log w (B, T), NaN in padding: the spreads in the first n tokens of always the same
    responses, the longer half, and that of log s if the tokens were independent."""
    x = log_w.dropna(thresh=int(log_w.count(axis=1).median())).dropna(axis=1)
    sizes = [2 ** i for i in range(1, x.shape[1].bit_length())]
    table = pd.DataFrame([spreads(x.iloc[:, :n]) for n in sizes]).drop(columns="correlation")
    table.insert(0, "tokens", sizes)
    table.insert(1, "responses", len(x))
    table.insert(3, "sum_std", table.tokens * table.log_s_std)
    return table.assign(independent=table.log_w_std / table.tokens ** 0.5)


def after_update(folder: Path) -> tuple:
    """Go on from a run's last checkpoint -> the rollout that is not learned from, and its scores
    after the update, with today's experts and with the old ones."""
    words = ["--eval_only", "--out", str(folder)]
    config, task, _, state = command_line.parse(words, train.Config, train.OPTION_GROUPS, "")
    trainer = extras.extend(train.Trainer, config)(config, task)
    trainer.load_state_dict(copy.deepcopy(state))
    rollout, _ = trainer.collect(trainer.model, random.Random(f"{config.seed} scatter"))
    trainer.load_state_dict(state)      # because with --lag each rollout has newer weights
    trainer.gradient = first(config.mini_batches * config.epochs - 1, trainer.gradient)
    trainer.rl_step(config.steps + 1)
    replayed = trainer.score(trainer.model, rollout, replay=True)
    return rollout, trainer.score(trainer.model, rollout), replayed


def measure(name: str, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Make a run, if it is not there -> its row of scatter.csv, its rows of scatter-prefixes.csv."""
    words = (f"train.py {REGIMES[name]} --queries uniform --steps 20 --eval_every 1000 --threads 1 "
             f"--seed {seed}").split()
    run = pd.DataFrame([{"regime": name, "seed": seed}])
    origin = {"command": " ".join(["python", *words]), "commit": commit(), "machine": machine(1)}
    folder = Path("out/scatter", f"{name} {seed}".replace(",", "").replace(" ", "-"))
    if not (folder / "summary.json").exists():
        shell(sys.executable, *words, "--out", str(folder))
    rollout, now, replayed = after_update(folder)
    mask = rollout.response_mask                                            # (B, T)
    log_w = pd.DataFrame(now.logp - rollout.logp_old).where(mask.numpy())   # (B, T)
    routing = pd.DataFrame(now.logp - replayed.logp)
    old = predicting(rollout, rollout.routes).sort().values                 # (L, N, K)
    new = predicting(rollout, now.routes).sort().values
    changed = mask.clone()
    changed[mask] = (old != new).any(dim=2).any(dim=0)                      # (B, T)
    row = {"responses": len(mask), "length": mask.sum().item() / len(mask), 
           **spreads(log_w), **spreads(log_w - routing, "_replayed"), **spreads(routing.where(mask), "_routing"),
           **pd.Series(expert_change(old, new)).add_prefix("expert_change_")}
    
    return run.assign(**row, **origin), run.merge(prefixes(log_w), how="cross")


if __name__ == "__main__":
    done = pd.MultiIndex.from_frame(pd.read_csv(SCATTER)[["regime", "seed"]])
    missing = pd.MultiIndex.from_product([REGIMES, NEW]).difference(done)
    with ThreadPoolExecutor(2) as pool:
        for row, of_prefixes in pool.map(measure, *zip(*missing)):
            add(SCATTER, row)
            add(RESULTS / "scatter-prefixes.csv", of_prefixes)
