"""How token ratios scatter, and what of it comes from the router.

    python -m lab.study.scatter    measure what is missing: a row in results/scatter.csv for each
                                   regime of plan.py and seed, rows in scatter-lengths.csv

A short run is made for each regime and seed, two at a time. Then its sampler writes two more
rollouts. All optimiser steps but the last are made on the first one. The second one, which is not
trained on, is scored twice: with today's experts, and with those that sampled it (r3). So log w is
what it is for the last mini-batch before its first use. In the names of the columns, "replayed" is
with the old experts, and "routing" is the difference: log w minus log w replayed.
"""
import itertools
import random
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

import gspo
import train
from gspo import Scores
from lab import command_line, extras
from lab.inspection import first
from lab.measures import expert_change, predicting
from lab.study import experiments
from lab.study.plan import REGIMES, SCATTER, SCATTER_LENGTHS, folder_of, read
from moe import Rollout

STEPS_BEFORE = 20   # RL steps of a run before the measurement
SEEDS = range(5)
N_BUCKETS = 4       # of the responses, by length


def correlation(x: Tensor, mask: Tensor) -> float:
    """The correlation of two tokens of a response, mean over all pairs. x (B, T), mask (B, T)."""
    x = torch.where(mask, x - x[mask].mean(), 0)
    lengths = mask.sum(dim=1)
    products = x.sum(dim=1) ** 2 - (x ** 2).sum(dim=1)      # of all ordered pairs of two tokens
    n_pairs = lengths * (lengths - 1)
    return (products.sum() / n_pairs.sum() / x[mask].var(correction=0)).item()


def spreads(log_w: Tensor, mask: Tensor) -> dict[str, float]:
    """Of log-ratios (B, T): the standard deviations of log w over tokens, of log s over responses,
    and the correlation within a response."""
    log_s = gspo.response_mean(torch.where(mask, log_w, 0), mask)[:, 0]
    return {"log_w_std": log_w[mask].std(correction=0).item(),
            "log_s_std": log_s.std(correction=0).item(),
            "correlation": correlation(log_w, mask)}


def by_length(log_w: Tensor, mask: Tensor) -> list[dict[str, float]]:
    """The responses in N_BUCKETS buckets of equal size, from short to long: the spread of log w,
    of its sum over a response, and of log s, its mean."""
    lengths = mask.sum(dim=1)
    rows = []
    for number, bucket in enumerate(lengths.argsort(stable=True).tensor_split(N_BUCKETS)):
        x = torch.where(mask[bucket], log_w[bucket], 0)
        sums = x.sum(dim=1)
        rows.append({"bucket": number, "length": lengths[bucket].float().mean().item(),
                     "log_w_std": x[mask[bucket]].std(correction=0).item(),
                     "sum_std": sums.std(correction=0).item(),
                     "log_s_std": (sums / lengths[bucket]).std(correction=0).item()})
    return rows


def of_changed_tokens(changed: Tensor, log_w: Tensor, replayed: Tensor) -> dict[str, float]:
    """The spread of log w (N,), as it is and with the old experts, of tokens whose experts changed
    (N,) in some layer, and of the others."""
    return {"changed": changed.float().mean().item(),
            "log_w_std_changed": log_w[changed].std(correction=0).item(),
            "log_w_std_changed_replayed": replayed[changed].std(correction=0).item(),
            "log_w_std_unchanged": log_w[~changed].std(correction=0).item()}


def trainer_of(folder: Path) -> train.Trainer:
    """A trainer that goes on from the last checkpoint of a run."""
    words = ["--eval_only", "--out", str(folder)]
    config, task, _, state = command_line.parse(words, train.Config, train.OPTION_GROUPS, "")
    trainer = extras.extend(train.Trainer, config)(config, task)
    trainer.load_state_dict(state)
    return trainer


def after_update(folder: Path) -> tuple[Rollout, Scores, Scores]:
    """Go on from the last checkpoint of a run, as the module's docstring says -> the rollout as it
    was sampled, and its scores after the update: with the trainer's own experts, and with the old
    ones."""
    trainer = trainer_of(folder)
    config = trainer.config
    rng = random.Random(f"{config.seed} rl {trainer.progress['step'] + 1}")
    trained_on, _ = trainer.collect(trainer.model, rng)
    # By another trainer, because with --lag each rollout of one has newer weights.
    other = trainer_of(folder)
    rollout, _ = other.collect(other.model, rng)
    trained_on.advantages = trainer.advantages(trained_on)
    all_but_last = first(config.mini_batches * config.epochs - 1, trainer.gradient)
    gspo.update(trainer.model, trainer.optimizer, trained_on, config, trainer.loss_terms,
                all_but_last, trainer.optimizer_step)
    return (rollout, trainer.score(trainer.model, rollout),
            trainer.score(trainer.model, rollout, replay=True))


def measure_scatter(folder: Path) -> tuple[dict, list[dict]]:
    """-> the columns of a row of SCATTER, and of rows of SCATTER_LENGTHS."""
    rollout, now, replayed = after_update(folder)
    mask = rollout.response_mask                                            # (B, T)
    log_w = now.logp - rollout.logp_old                                     # (B, T)
    log_w_replayed = replayed.logp - rollout.logp_old
    parts = {"": log_w, "_replayed": log_w_replayed, "_routing": log_w - log_w_replayed}
    row = {"responses": len(mask), "length": rollout.lengths.float().mean().item()}
    for part, x in parts.items():
        row |= {f"{column}{part}": value for column, value in spreads(x, mask).items()}
    old_routes = predicting(rollout, rollout.routes)                        # (L, N, K)
    new_routes = predicting(rollout, now.routes)
    for layer, share in enumerate(expert_change(old_routes, new_routes).tolist()):
        row[f"expert_change_{layer}"] = share
    same = old_routes.sort().values == new_routes.sort().values             # (L, N, K)
    changed = ~same.all(dim=2).all(dim=0)                                   # (N,)
    row |= of_changed_tokens(changed, log_w[mask], log_w_replayed[mask])
    return row, by_length(log_w, mask)


def run(name: str, seed: int) -> dict:
    """Make a run of a regime -> the columns that say what it was."""
    arguments = (f"train.py {REGIMES[name]} --queries uniform --steps {STEPS_BEFORE} --threads 1 "
                 f"--seed {seed}")
    commit = experiments.make_run(arguments.split(), folder_of("scatter", name, seed),
                                  stdout=subprocess.DEVNULL)
    return {"command": f"python {' '.join(arguments.split())}", "commit": commit,
            "machine": experiments.machine(n_threads=1)}


def main():
    done = {(row["regime"], row["seed"]) for row in read(SCATTER)}
    missing = [(name, seed) for name, seed in itertools.product(REGIMES, SEEDS)
               if (name, str(seed)) not in done]
    with ThreadPoolExecutor(2) as pool:
        runs = pool.map(lambda job: run(*job), missing)
        for (name, seed), origin in zip(missing, runs):
            row, lengths = measure_scatter(folder_of("scatter", name, seed))
            about = {"regime": name, "seed": seed}
            experiments.append(SCATTER_LENGTHS,
                               [experiments.rounded(about | bucket) for bucket in lengths])
            experiments.append(SCATTER, [experiments.rounded(about | row) | origin])
            print(f"{name}, seed {seed}: {row}", flush=True)


if __name__ == "__main__":
    main()
