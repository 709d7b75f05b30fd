"""How token ratios scatter, what of it comes from the router, and how it goes with the length.

    python -m lab.study.scatter    measure what is missing: a row in results/scatter.csv for each
                                   regime and seed, and some in scatter-prefixes.csv

A short run is made for each regime and seed, two at a time. Then its sampler writes two more
rollouts. All optimiser steps but the last are made on the first one. The second one, which is not
trained on, is scored twice: with today's experts, and with those that sampled it (r3). So log w is
what it is for the last mini-batch before its first use. In the names of the columns, "replayed" is
with the old experts, and "routing" is the difference: log w minus log w replayed.

Short and long responses differ in more than their length, say in how many are right. So prefixes of
different length are all taken from the same responses: the longer half of the second rollout.
"""
import itertools
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

import gspo
import train
from lab import command_line, extras
from lab.inspection import first
from lab.measures import expert_change, predicting
from lab.study.study import NEW, RESULTS, add, commit, machine
from moe import Rollout

SCATTER = RESULTS / "scatter.csv"               # a row for each regime and seed
PREFIXES = RESULTS / "scatter-prefixes.csv"     # and for each length of the prefixes
REGIMES = {
    "arithmetic, 4 updates": "",
    "arithmetic, lag 8": "--lag 8",
    "arithmetic, int4": "--sampler int4",
    "Countdown, 4 updates": "--task countdown",
    "Countdown, 32 updates": "--task countdown --mini_batches 16 --epochs 2",
    "Countdown, lag 16": "--task countdown --lag 16",
}


def correlation(x: Tensor, mask: Tensor) -> float:
    """The correlation of two tokens of a response, mean over all pairs. x (B, T), mask (B, T)."""
    x = torch.where(mask, x - x[mask].mean(), 0)
    lengths = mask.sum(dim=1)
    products = x.sum(dim=1) ** 2 - (x ** 2).sum(dim=1)      # of all ordered pairs of two tokens
    n_pairs = lengths * (lengths - 1)
    return (products.sum() / n_pairs.sum() / x[mask].var(correction=0)).item()


def spread(x: Tensor) -> float:
    return x.std(correction=0).item()


def spreads(log_w: Tensor, mask: Tensor) -> dict[str, float]:
    """Of log-ratios (B, T) in nats: the standard deviations of log w over tokens, of log s over
    responses, and the correlation within a response."""
    log_s = gspo.response_mean(torch.where(mask, log_w, 0), mask)[:, 0]
    return {"log_w_std": spread(log_w[mask]), "log_s_std": spread(log_s),
            "correlation": correlation(log_w, mask)}


def prefixes(log_w: Tensor, mask: Tensor) -> list[dict[str, float]]:
    """Of the responses of at least median length, log-ratios (B, T) in nats: for n = 2, 4, 8, ...
    the spreads over their first n tokens of log w, and over responses of its sum and mean there;
    and what that of the mean would be if the tokens were independent."""
    lengths = mask.sum(dim=1)
    shortest = lengths.median().item()
    log_w = log_w[lengths >= shortest]
    rows = []
    n = 2
    while n <= shortest:
        x = log_w[:, :n]
        rows.append({"tokens": n, "responses": len(x), "log_w_std": spread(x),
                     "sum_std": spread(x.sum(dim=1)), "log_s_std": spread(x.mean(dim=1)),
                     "independent": spread(x) / n ** 0.5})
        n *= 2
    return rows
