"""How token ratios scatter, and what of it comes from the router: after an update, each response of
a rollout is scored twice, with the experts of today and with those that sampled it (r3).

    python -m lab.scatter        measure what is missing: a row in results/scatter.csv for each
                                 setting and seed, rows in scatter-lengths.csv; see --draw of
                                 lab.experiments

For each setting of SETTINGS a short run is made, two at a time. Then one more rollout is sampled,
all optimiser steps on it are made but the last, and log w is measured for all its responses: this
is what the last mini-batch works with. In the names of the columns, "replayed" is with the old
experts, and "routing" is the difference: log w minus log w replayed.
"""
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

import gspo
import train
from data.queries import Queries
from lab import experiments
from lab.plan import SCATTER, SCATTER_LENGTHS, read

STEPS = 20
COUNTDOWN = "--task countdown"
SETTINGS = {
    "arithmetic, 4 updates": "",
    "arithmetic, lag 8": "--lag 8",
    "arithmetic, int4": "--sampler int4",
    "Countdown, 4 updates": COUNTDOWN,
    "Countdown, 32 updates": f"{COUNTDOWN} --mini_batches 16 --epochs 2",
    "Countdown, lag 16": f"{COUNTDOWN} --lag 16",
}
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
    for bucket in lengths.argsort(stable=True).tensor_split(N_BUCKETS):
        x = torch.where(mask[bucket], log_w[bucket], 0)
        sums = x.sum(dim=1)
        rows.append({"length": lengths[bucket].float().mean().item(),
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


def after_update(folder: Path):
    """Go on from the last checkpoint of a run: sample a rollout, and make all optimiser steps on it
    but the last -> the rollout as it was sampled, and twice as the trainer scores it now: with its
    own experts, and with the old ones."""
    config, task, _, state = train.parse(["--inspect", "--out", str(folder)])
    run = train.build(config, task, state)
    settings = config.settings()
    learner = train.new_learner(run, state)
    queries = Queries(task, config.queries == "adaptive", state["success_rates"])
    rng = random.Random(f"{config.seed} rl {state['step'] + 1}")
    samples = train.sample_and_reward(run, train.sampling_model(run, learner), queries, rng)
    experience, _ = gspo.prepare(run.model, samples.rollout, samples.rewards, settings)
    gspo.update(run.model, learner.optimizer, experience, settings,
                first=settings.mini_batches * settings.epochs - 1)
    now, _ = gspo.rescore(run.model, samples.rollout, settings)
    replayed, _ = gspo.rescore(run.model, samples.rollout, settings, replay=True)
    return samples.rollout, now, replayed


def measure(folder: Path) -> tuple[dict, list[dict]]:
    """-> the columns of a row of SCATTER, and of rows of SCATTER_LENGTHS."""
    rollout, now, replayed = after_update(folder)
    mask = rollout.response_mask                                            # (B, T)
    parts = {"": now.logp - rollout.logp, "_replayed": replayed.logp - rollout.logp,
             "_routing": now.logp - replayed.logp}                          # (B, T) each
    row = {"responses": len(mask), "length": rollout.lengths.float().mean().item()}
    lengths = []
    for part, log_w in parts.items():
        row |= {f"{column}{part}": value for column, value in spreads(log_w, mask).items()}
        lengths += [{"part": part.strip("_") or "all"} | found for found in by_length(log_w, mask)]
    old_routes = rollout.predicting(rollout.routes)[:, mask]                # (L, N, K)
    new_routes = rollout.predicting(now.routes)[:, mask]
    for layer, share in enumerate(gspo.expert_change(old_routes, new_routes).tolist()):
        row[f"expert_change_{layer}"] = share
    same = old_routes.sort().values == new_routes.sort().values             # (L, N, K)
    changed = ~same.all(dim=2).all(dim=0)                                   # (N,)
    row |= of_changed_tokens(changed, parts[""][mask], parts["_replayed"][mask])
    return row, lengths


def main():
    commit = experiments.shell("git", "describe", "--always", "--dirty", "--exclude", "*")
    done = {(row["setting"], row["seed"]) for row in read(SCATTER)}
    jobs = []
    for name, options in SETTINGS.items():
        for seed in SEEDS:
            if (name, str(seed)) not in done:
                folder = Path("out/scatter") / f"{name} {seed}".replace(",", "").replace(" ", "-")
                arguments = f"{options} --queries uniform --steps {STEPS} --threads 1 --seed {seed}"
                jobs.append((name, seed, ["train.py", *arguments.split()], folder))
    with ThreadPoolExecutor(2) as pool:
        runs = pool.map(lambda job: experiments.train(*job[2:], capture_output=True), jobs)
        for (name, seed, arguments, folder), _ in zip(jobs, runs):
            row, lengths = measure(folder)
            about = {"setting": name, "seed": seed}
            origin = {"command": "python " + " ".join(arguments), "commit": commit,
                      "machine": experiments.machine(n_threads=1)}
            experiments.append(SCATTER_LENGTHS,
                               [experiments.rounded(about | found) for found in lengths])
            experiments.append(SCATTER, [experiments.rounded(about | row) | origin])
            print(f"{name}, seed {seed}: {row}", flush=True)


if __name__ == "__main__":
    main()
