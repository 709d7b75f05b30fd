"""The tables and comparisons of what experiments.py and scatter.py left, made from the tables of
results/ alone. The last accuracy of a run counts, not the best. A run has collapsed if it ends
below the accuracy of its cold start."""
import itertools
import statistics
from typing import NamedTuple

from lab.study.plan import (BEST, COMPARED, CURVES, EVIDENCE, EXPERIMENTS, MIXED, RANGES, RATES,
                            RUNS, SCATTER, SIGMAS, mean_of, read)


def endings(name, arm, column="accuracy"):
    """{seed: held-out accuracy at the end, or another column of EVIDENCE}, without runs that
    have none: they were stopped early."""
    return {row["seed"]: float(row[column]) for row in read(EVIDENCE)
            if row["experiment"] == name and row["arm"] == arm and row[column]}


# ---------------------------------------------------------------------------- comparing

# Student's t beyond which a difference of so many pairs is significant at 5 %, two-sided.
CRITICAL_T = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571}
PAIRS = [
    ("fresh", "gspo", "grpo"), ("fresh", "grpo, r3", "grpo"), ("stale", "gspo", "grpo"),
    ("stale", "gspo", "grpo, r3"), ("stale", "grpo, r3", "grpo"), ("stale", "gspo, r3", "gspo"),
    ("stale", "reinforce", "grpo"),
    ("stale", "gspo_clip_grpo_weight", "grpo"), ("stale", "gspo", "gspo_clip_grpo_weight"),
    ("stale", "grpo_clip_gspo_weight", "grpo"), ("stale", "gspo", "grpo_clip_gspo_weight"),
    ("stale-searched", *BEST),
    ("stale-dense", "gspo", "grpo"),
    ("stale-fine", "gspo", "grpo"), ("stale-fine", "gspo", "grpo, r3"),
    ("stale-fine", "grpo, r3", "grpo"),
    ("noise", "gspo, noise 0", "grpo, noise 0"),
    ("noise", "gspo, noise 0", "reinforce, noise 0"),
    *(("noise", f"gspo, noise {sigma}", f"grpo, noise {sigma}") for sigma in SIGMAS),
    *(("noise", f"{name}, noise 4", f"{name}, noise 0") for name in ("gspo", "grpo")),
    *(("noise", f"gspo, centred noise {sigma}", f"grpo, centred noise {sigma}")
      for sigma in SIGMAS),
    *(("noise", f"gspo fitted, centred noise {sigma}", f"gspo, centred noise {sigma}")
      for sigma in SIGMAS),
    *(("noise", f"{name}, centred noise 4", f"{name}, noise 0") for name in ("gspo", "grpo")),
    *(("noise", f"{name}, centred noise 4", "grpo, centred noise 4")
      for name in ("grpo_dual_clip", *MIXED)),
    ("noise", "gspo, common noise 1", "grpo, common noise 1"),
    ("sampler", "gspo, int8", "grpo, int8"), ("sampler", "gspo, int4", "grpo, int4"),
    ("sampler", "gspo wide, int4", "gspo, int4"), ("sampler", "gspo wide, int4", "grpo, int4"),
    ("sampler", "gspo, int4 recomputed", "gspo, int4"),
    ("sampler", "grpo, int4 recomputed", "grpo, int4"),
    ("sampler", "gspo_token, int4 tis", "gspo, int4 recomputed"),
    ("lag", "gspo", "grpo"), ("lag", "gspo wide", "gspo"), ("lag", "gspo wide", "grpo"),
    ("lag-countdown", "gspo", "grpo"), ("lag-countdown", "gspo wide", "gspo"),
    ("lag-countdown", "gspo wide", "grpo"),
    ("length", "gspo", "grpo"), ("length", "gspo_token_mean", "gspo"),
    ("length", "grpo_token_mean", "grpo"), ("length", "gspo_token_mean", "grpo_token_mean"),
    ("length", "dr_grpo", "grpo_token_mean"),
    *(("length", f"{name}_token_mean, lr 6e-4", f"{name}, lr 6e-4") for name in ("gspo", "grpo")),
    *(("length", f"{name}_token_mean", f"{name}, lr 6e-4") for name in ("gspo", "grpo")),
]


class Comparison(NamedTuple):
    """How far one arm ends above another, in pairs of runs with the same seed."""
    mean: float
    error: float        # the standard error of the mean
    low: float          # bounds of the mean, from bootstrap
    high: float
    n_above: int
    n_pairs: int

    @property
    def significant(self):
        return abs(self.mean) > CRITICAL_T[self.n_pairs] * self.error


def bootstrap(values):
    """The bounds of the middle 95 % of the means of all resamples of a few values."""
    means = sorted(map(statistics.fmean, itertools.product(values, repeat=len(values))))
    margin = int(0.025 * len(means))
    return means[margin], means[-1 - margin]


def compare(mine, theirs):
    """{seed: accuracy} of two arms -> Comparison of the seeds that both have."""
    differences = [mine[seed] - theirs[seed] for seed in mine if seed in theirs]
    n = len(differences)
    return Comparison(statistics.fmean(differences), statistics.stdev(differences) / n ** 0.5,
                      *bootstrap(differences), sum(difference > 0 for difference in differences), n)


# ---------------------------------------------------------------------------- tables

def print_comparisons():
    comparisons = {}
    for name, arm, other in PAIRS:
        mine = endings(name, arm)
        theirs = endings(name, other)
        if len(mine.keys() & theirs.keys()) > 1:
            comparisons[name, arm, other] = compare(mine, theirs)
    print(f"\n{len(comparisons)} comparisons. With no effect, one t test in 20 is significant.")
    print("\n| experiment | difference | mean ± standard error | interval | above on | t test |")
    print("|---|---|---|---|---|---|")
    for (name, arm, other), c in comparisons.items():
        print(f"| {name} | {arm} - {other} | {c.mean:+.3f} ± {c.error:.3f} | {c.low:+.3f} to "
              f"{c.high:+.3f} | {c.n_above} of {c.n_pairs} | "
              f"{'significant' if c.significant else 'not significant'} |")


def print_experiments():
    columns = ("accuracy", "accuracy_greedy", "reward", "log_w_std", "log_s_std", "log_s_mean",
               "clip_low", "clip_high", "kl", "expert_change", "length")
    for name in EXPERIMENTS:
        rows = [row for row in read(EVIDENCE) if row["experiment"] == name]
        print(f"\n{name}: {EXPERIMENTS[name].about}\n")
        print("| arm | accuracy by seed |", " | ".join(columns), "| collapsed |")
        print("|---|" + "---|" * (len(columns) + 2))
        for arm in EXPERIMENTS[name].arms:
            of_arm = [row for row in rows if row["arm"] == arm and row["accuracy"]]
            if not of_arm:
                continue
            cells = [f"{mean_of(of_arm, column):.3g}" for column in columns]
            each = " ".join(row["accuracy"] for row in sorted(of_arm, key=lambda r: r["seed"]))
            collapsed = sum(float(row["accuracy"]) < float(row["accuracy_cold_start"])
                            for row in of_arm)
            print(f"| {arm} | {each} |", " | ".join(cells), f"| {collapsed} of {len(of_arm)} |")


def search_score(name, arm):
    """The mean of an arm's held-out accuracies up to step 60, which every run of a search has made;
    None if there is no such run."""
    found = [float(row["accuracy"]) for row in read(CURVES)
             if row["experiment"] == name and row["arm"] == arm and 0 < int(row["step"]) <= 60]
    return statistics.fmean(found) if found else None


def print_search(name):
    print(f"\n| {name}: clip range |", " | ".join(f"lr {lr}" for lr in RATES), "|")
    print("|---|" + "---|" * len(RATES))
    for arm in RANGES:
        scores = [search_score(name, f"{arm}, lr {lr}") for lr in RATES]
        print(f"| {arm} |", " | ".join("" if x is None else f"{x:.3f}" for x in scores), "|")


def print_by(path, key, columns):
    """Mean ± standard deviation of some columns of a table, for each value of the column `key`."""
    rows = read(path)
    print(f"\n| {key} |", " | ".join(columns), "|")
    print("|---|" + "---|" * len(columns))
    for name in dict.fromkeys(row[key] for row in rows):
        of_name = [row for row in rows if row[key] == name]
        cells = []
        for column in columns:
            values = [float(row[column]) for row in of_name if row.get(column)]
            spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.4g}{spread}" if values else "")
        print(f"| {name} ({len(of_name)} seeds) |", " | ".join(cells), "|")


def print_all():
    of_steps = ("accuracy", "reward", "clip_low", "clip_high", "log_s_std", "log_w_std", "outliers",
                "kl", "expert_change", "mismatch_mean", "mismatch_max", "mismatch_kl",
                "mismatch_experts", "seconds", "seconds_rescoring")
    print_by(RUNS, "setting", [
        "accuracy_cold_start", "accuracy", "accuracy_greedy", "accuracy_weakest_kind",
        "reward_last_50", "think_share", "seconds",
        *(f"{column}_{COMPARED}" for column in of_steps)])
    print_experiments()
    print_comparisons()
    print_search("stale-search")
    print_search("stale-search-again")
    print_by(SCATTER, "regime", [
        "length", "log_w_std", "log_s_std", "correlation", "log_w_std_replayed",
        "log_s_std_replayed", "correlation_replayed", "log_w_std_routing", "log_s_std_routing",
        "correlation_routing", "expert_change_0", "expert_change_1", "expert_change_2", "changed",
        "log_w_std_changed", "log_w_std_changed_replayed", "log_w_std_unchanged"])
