"""How token ratios scatter, what of it comes from the router, and how it goes with the length.

    python -m lab.study.scatter     measure what results/scatter.csv lacks

A short run's sampler writes two rollouts, and all optimiser steps but the last are made on one: so
log w (B, T) of the other, in nats, NaN in padding, is as in a last mini-batch. "replayed" is log w
with the experts that sampled, "routing" the difference, log s the mean over a response.
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
from lab.study.study import RESULTS, add, commit, machine, shell

SHORT = "--queries uniform --steps 20 --eval_every 1000 --threads 1"
REGIMES = {"arithmetic, 4 updates": "", "arithmetic, lag 8": "--lag 8",
           "arithmetic, int4": "--sampler int4", "Countdown, 4 updates": "--task countdown",
           "Countdown, 32 updates": "--task countdown --mini_batches 16 --epochs 2",
           "Countdown, lag 16": "--task countdown --lag 16"}


def spreads(log_w: pd.DataFrame, part: str = "") -> dict[str, float]:
    """Of log w (B, T); the correlation is the mean over all pairs of two tokens of a response."""
    x = log_w - log_w.stack().mean()
    lengths = x.count(axis=1)
    products = x.sum(axis=1) ** 2 - (x ** 2).sum(axis=1)        # of all ordered pairs of two tokens
    variance = x.stack().var(ddof=0)
    return {f"log_w_std{part}": variance ** 0.5, f"log_s_std{part}": x.mean(axis=1).std(ddof=0),
            f"correlation{part}": products.sum() / (lengths * (lengths - 1)).sum() / variance}


def prefixes(log_w: pd.DataFrame) -> pd.DataFrame:
    """Spreads of log w (B, T) in the first n tokens, always of the longer half of the responses."""
    x = log_w.dropna(thresh=int(log_w.count(axis=1).median())).dropna(axis=1)
    sizes = [2 ** i for i in range(1, x.shape[1].bit_length())]
    rows = [{"tokens": n, "responses": len(x)} | spreads(x.iloc[:, :n]) for n in sizes]
    table = pd.DataFrame(rows).drop(columns="correlation")
    return table.assign(sum_std=table.tokens * table.log_s_std,
                        independent=table.log_w_std / table.tokens ** 0.5)   # log s's, if they were


def after_update(folder: Path) -> tuple:
    """From a run's last checkpoint -> the rollout not trained on, its scores now and replayed."""
    words = ["--eval_only", "--device", "cpu", "--out", str(folder)]
    config, task, _, state = command_line.parse(words, train.Config, train.OPTION_GROUPS, "")
    trainer = extras.extend(train.Trainer, config)(config, task)
    trainer.load_state_dict(copy.deepcopy(state))
    rollout, _ = trainer.collect(trainer.model, random.Random(f"{config.seed} scatter"))
    trainer.load_state_dict(state)      # with --lag, the next rollout would have newer weights
    trainer.gradient = first(config.mini_batches * config.epochs - 1, trainer.gradient)
    trainer.rl_step(config.steps + 1)
    replayed = trainer.score(trainer.model, rollout, replay=True)
    return rollout, trainer.score(trainer.model, rollout), replayed


def measure(name: str, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Make a run, or what is left of it -> its rows of scatter.csv and of scatter-prefixes.csv."""
    words = f"train.py {REGIMES[name]} {SHORT} --seed {seed}".split()
    origin = {"command": " ".join(["python", *words]), "commit": commit(), "machine": machine()}
    folder = Path("out/scatter", f"{name} {seed}".replace(",", "").replace(" ", "-"))
    resume = ["--resume"] if (folder / "checkpoint.pt").exists() else []
    if not (folder / "summary.json").exists():
        shell(sys.executable, *words, *resume, "--out", str(folder))
    rollout, now, replayed = after_update(folder)
    mask = rollout.response_mask.numpy()                                    # (B, T)
    log_w = pd.DataFrame(now.logp - rollout.logp_old).where(mask)           # (B, T)
    log_w_replayed = pd.DataFrame(replayed.logp - rollout.logp_old).where(mask)
    routes = [predicting(rollout, x.routes).sort().values for x in (rollout, now)]  # (L, N, K) each
    changed = (routes[0] != routes[1]).any(dim=2).any(dim=0).numpy()        # (N,)
    run = pd.DataFrame([{"regime": name, "seed": seed}])
    row = run.assign(
        responses=len(mask), length=mask.sum() / len(mask), **spreads(log_w),
        **spreads(log_w_replayed, "_replayed"), **spreads(log_w - log_w_replayed, "_routing"),
        **pd.Series(expert_change(*routes)).add_prefix("expert_change_"), changed=changed.mean(),
        log_w_std_changed=log_w.values[mask][changed].std(),
        log_w_std_changed_replayed=log_w_replayed.values[mask][changed].std(),
        log_w_std_unchanged=log_w.values[mask][~changed].std(), **origin)
    return row, run.merge(prefixes(log_w), how="cross")


if __name__ == "__main__":
    done = pd.read_csv(RESULTS / "scatter.csv", index_col=["regime", "seed"]).index
    missing = pd.MultiIndex.from_product([REGIMES, range(10, 15)]).difference(done)
    with ThreadPoolExecutor(2) as pool:
        for row, of_prefixes in pool.map(measure, *zip(*missing)):
            add(RESULTS / "scatter.csv", row)
            add(RESULTS / "scatter-prefixes.csv", of_prefixes)
