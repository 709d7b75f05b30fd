"""How token ratios scatter, what of it comes from the router, and how it goes with the length.

    python -m lab.study.scatter     measure what results/scatter.csv lacks

After a short run the sampler writes two more rollouts. The optimiser steps of an RL step but for
the last one are made on the second. The first is scored, with today's experts and with those that
sampled it ("replayed"; "routing" is the difference): so log w is what a last mini-batch meets.
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

SCATTER = RESULTS / "scatter.csv"               # a row for each regime and seed
PREFIXES = RESULTS / "scatter-prefixes.csv"     # and for each n
REGIMES = {
    "arithmetic, 4 updates": "", "arithmetic, lag 8": "--lag 8",
    "arithmetic, int4": "--sampler int4", "Countdown, 4 updates": "--task countdown",
    "Countdown, 32 updates": "--task countdown --mini_batches 16 --epochs 2",
    "Countdown, lag 16": "--task countdown --lag 16"}


def spreads(log_w: pd.DataFrame) -> pd.Series:
    """Of log w in nats, a row for each token under the number of its response: its spread, that of
    log s over responses, and the correlation of two tokens of a response, mean over all pairs."""
    x = log_w - log_w.mean()
    responses = x.groupby(level=0)
    n = responses.size()
    products = (responses.sum() ** 2).sum() - (x ** 2).sum()    # of all ordered pairs of two tokens
    correlation = products / (n * (n - 1)).sum() / x.var(ddof=0)
    return pd.concat([x.std(ddof=0).add_prefix("log_w_std"),
                      responses.mean().std(ddof=0).add_prefix("log_s_std"),
                      correlation.add_prefix("correlation")])


def prefixes(log_w: pd.DataFrame) -> pd.DataFrame:
    """The spreads in the first n tokens of always the same responses, the longer half, and what
    that of log s would be if tokens were independent. log_w as above, but of one column, ""."""
    lengths = log_w.groupby(level=0).size()
    long = lengths[lengths >= lengths.median()]
    tokens = log_w.loc[long.index].groupby(level=0)
    sizes = [2 ** i for i in range(1, int(long.min()).bit_length())]
    table = pd.DataFrame([spreads(tokens.head(n)) for n in sizes]).drop(columns="correlation")
    table = table.assign(tokens=sizes, responses=len(long))
    return table.assign(sum_std=table.tokens * table.log_s_std,
                        independent=table.log_w_std / table.tokens ** 0.5)


def after_update(folder: Path) -> pd.DataFrame:
    """Go on from a run's last checkpoint, as above -> a row for each token of the first rollout,
    under the number of its response: log w in nats, of its three parts, and for each layer the
    share of its experts that changed."""
    words = ["--eval_only", "--out", str(folder)]
    config, task, _, state = command_line.parse(words, train.Config, train.OPTION_GROUPS, "")
    trainer = extras.extend(train.Trainer, config)(config, task)
    trainer.load_state_dict(copy.deepcopy(state))
    rollout, _ = trainer.collect(trainer.model, random.Random(f"{config.seed} scatter"))
    trainer.load_state_dict(state)      # with --lag, each rollout has newer weights
    trainer.gradient = first(config.mini_batches * config.epochs - 1, trainer.gradient)
    trainer.rl_step(config.steps + 1)
    mask = rollout.response_mask
    now = trainer.score(trainer.model, rollout)
    replayed = trainer.score(trainer.model, rollout, replay=True)
    parts = {"": now.logp - rollout.logp_old, "_replayed": replayed.logp - rollout.logp_old,
             "_routing": now.logp - replayed.logp}                          # (B, T) each
    old = predicting(rollout, rollout.routes)                               # (L, N, K)
    new = predicting(rollout, now.routes)
    return 


