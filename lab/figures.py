"""The tables, comparisons and figures of what lab/experiments.py and lab/scatter.py left, made from
the tables of results/ alone. The last accuracy of a run counts, not the best. A run has collapsed
if it ends below the accuracy of its cold start."""
import itertools
import math
import statistics
from typing import NamedTuple

import gspo
from lab.plan import (BEST, COMPARED, CURVES, EVALUATIONS, EVIDENCE, EXPERIMENTS, METHODS, MIXED,
                      RANGES, RATES, REGIMES, RESULTS, RUNS, SCATTER, SCATTER_LENGTHS, SIGMAS,
                      mean_of, read)


def endings(name, arm):
    """{seed: held-out accuracy at the end}, without runs that were cut."""
    return {row["seed"]: float(row["accuracy"]) for row in read(EVIDENCE)
            if row["experiment"] == name and row["arm"] == arm and row["accuracy"]}


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
]


class Comparison(NamedTuple):
    """How far one arm ends above another, in pairs of seeds."""
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
    print(f"\n{len(PAIRS)} comparisons. With no effect at all, one t test in 20 is significant.")
    print("\n| experiment | difference | mean ± standard error | interval | above on | t test |")
    print("|---|---|---|---|---|---|")
    for name, arm, other in PAIRS:
        mine = endings(name, arm)
        theirs = endings(name, other)
        if len(mine.keys() & theirs.keys()) < 2:
            continue
        c = compare(mine, theirs)
        print(f"| {name} | {arm} - {other} | {c.mean:+.3f} ± {c.error:.3f} | {c.low:+.3f} to "
              f"{c.high:+.3f} | {c.n_above} of {c.n_pairs} | "
              f"{'significant' if c.significant else 'not significant'} |")


def print_experiments():
    columns = ("accuracy", "reward", "log_w_std", "log_s_std", "log_s_mean", "clip_low",
               "clip_high", "kl", "expert_change", "length")
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


def search_score(arm):
    """The mean of an arm's held-out accuracies up to step 60, which every run of the search has
    made; None if there is no such run."""
    found = [float(row["accuracy"]) for row in read(CURVES)
             if row["experiment"] == "stale-search" and row["arm"] == arm
             and 0 < int(row["step"]) <= 60]
    return statistics.fmean(found) if found else None


def print_search():
    print("\n| clip range |", " | ".join(f"lr {lr}" for lr in RATES), "|")
    print("|---|" + "---|" * len(RATES))
    for arm in RANGES:
        scores = [search_score(f"{arm}, lr {lr}") for lr in RATES]
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
    print_search()
    print_by(SCATTER, "regime", [
        "length", "log_w_std", "log_s_std", "correlation", "log_w_std_replayed",
        "log_s_std_replayed", "correlation_replayed", "log_w_std_routing", "log_s_std_routing",
        "correlation_routing", "expert_change_0", "expert_change_1", "expert_change_2", "changed",
        "log_w_std_changed", "log_w_std_changed_replayed", "log_w_std_unchanged"])


# ---------------------------------------------------------------------------- figures

# Colour, line and marker of each method: they differ in grey too.
STYLES = {
    "gspo": ("#1f5fa8", "-", "o"), "grpo": ("#d9822b", "--", "s"),
    "grpo, r3": ("#7d4f9e", ":", "^"), "gspo_clip_grpo_weight": ("#2a9d8f", "-.", "v"),
    "grpo_clip_gspo_weight": ("#b23a48", (0, (5, 1)), "D"),
    "grpo_dual_clip": ("#6b705c", (0, (1, 1)), "P"), "gspo wide": ("#6fa8dc", ":", "X"),
    "gspo fitted": ("#6fa8dc", ":", "X"), "reinforce": ("#333333", "-", "."),
    "gspo_token, TIS": ("#1f5fa8", "-", "*"),
}


def style(arm):
    """Keywords for axis.plot, by the longest name of a method that the arm begins with."""
    name = max((name for name in STYLES if arm.startswith(name)), key=len)
    colour, line, marker = STYLES[name]
    return {"color": colour, "linestyle": line, "marker": marker, "markersize": 4}


def panels(plt, n, width=10, sharey=True):
    """A figure of n panels side by side."""
    figure, axes = plt.subplots(1, n, figsize=(width, 4), layout="constrained", sharey=sharey)
    for axis in axes:
        axis.grid(alpha=0.3)
    return figure, axes


def draw_curves(axis, name, arms):
    """Held-out accuracy over the RL steps: a thin line for each seed, a thick one for the mean, and
    a band for its bootstrap interval."""
    for arm in arms:
        of_seed = {}            # {seed: {step: accuracy}}
        for row in read(CURVES):
            if row["experiment"] == name and row["arm"] == arm:
                of_seed.setdefault(row["seed"], {})[int(row["step"])] = float(row["accuracy"])
        if not of_seed:
            continue
        looks = style(arm)
        for curve in of_seed.values():
            axis.plot(list(curve), list(curve.values()), **looks | {"marker": ""}, alpha=0.35,
                      linewidth=0.8)
        steps = list(next(iter(of_seed.values())))
        of_step = [[curve[step] for curve in of_seed.values()] for step in steps]
        axis.plot(steps, list(map(statistics.fmean, of_step)), **looks, linewidth=2,
                  label=f"{arm} ({len(of_seed)} seeds)")
        low, high = zip(*map(bootstrap, of_step))
        axis.fill_between(steps, low, high, color=looks["color"], alpha=0.12, linewidth=0)
    axis.set_xlabel("RL step")
    axis.set_ylim(0, 0.6)
    if axis.lines:
        axis.legend(fontsize=8)


def draw_places(axis, name, places):
    """Held-out accuracy at the end, a column for each place {label: {method: arm}}: a marker for
    each seed, a bar for the mean, a line for its bootstrap interval. Methods have their own colour
    and marker, and stand side by side."""
    labelled = set()
    for place, arms in enumerate(places.values()):
        for i, (method, arm) in enumerate(arms.items()):
            values = list(endings(name, arm).values())
            if not values:
                continue
            x = place + 0.18 * (i - (len(arms) - 1) / 2)
            looks = style(method) | {"linestyle": ""}
            label = None if method in labelled else method
            labelled.add(method)
            axis.plot([x] * len(values), values, **looks, alpha=0.6, label=label)
            axis.plot([x - 0.07, x + 0.07], [statistics.fmean(values)] * 2, linewidth=3,
                      color=looks["color"])
            axis.plot([x + 0.07, x + 0.07], bootstrap(values), color=looks["color"])
    axis.set_xticks(range(len(places)), list(places), fontsize=8)
    axis.set_xlim(-0.6, len(places) - 0.4)
    if axis.lines:
        axis.legend(fontsize=8)


def draw_search(axis):
    """The score of the search over the learning rate, a line for each clip range."""
    for i, arm in enumerate(RANGES):
        scores = {float(lr): search_score(f"{arm}, lr {lr}") for lr in RATES}
        scores = {lr: score for lr, score in scores.items() if score is not None}
        axis.plot(list(scores), list(scores.values()), **style(arm) | {"marker": "osvD^"[i % 5]},
                  label=arm)
    axis.set_xscale("log")
    axis.set_xticks([float(lr) for lr in RATES], RATES)
    axis.minorticks_off()
    axis.set_xlabel("learning rate")
    axis.set_ylim(0, 0.6)
    axis.legend(fontsize=7, ncols=2)


def draw_stale(plt):
    """results/stale.png: Countdown with few and with many updates a rollout."""
    figure, axes = panels(plt, 2)
    axes[0].set_title("4 optimiser steps on each rollout")
    draw_curves(axes[0], "fresh", METHODS)
    axes[0].set_ylabel("held-out accuracy, Countdown")
    axes[1].set_title("32 optimiser steps on each rollout")
    draw_curves(axes[1], "stale", METHODS)
    figure.savefig(RESULTS / "stale.png", dpi=110)


def draw_stale_search(plt):
    """results/stale-search.png: the search for 32 optimiser steps, and what it chose."""
    figure, axes = panels(plt, 2)
    axes[0].set_title("the search: mean of steps 20 to 60, 1 seed")
    draw_search(axes[0])
    axes[0].set_ylabel("held-out accuracy, Countdown")
    axes[1].set_title("32 optimiser steps, each as the search chose")
    draw_curves(axes[1], "stale-searched", BEST)
    figure.savefig(RESULTS / "stale-search.png", dpi=110)


# Where log w scatters by itself: (experiment, arm) of GRPO.
NATURAL = {"arithmetic": ("noise", "grpo, noise 0"), "int4 sampler": ("sampler", "grpo, int4"),
           "Countdown": ("fresh", "grpo"), "Countdown, 32 updates": ("stale", "grpo"),
           "Countdown, lag 16": ("lag-countdown", "grpo")}


def spread_of(name, arm):
    """The mean of log_w_std over the runs of an arm, None if there are none."""
    rows = [row for row in read(EVIDENCE) if row["experiment"] == name and row["arm"] == arm]
    return mean_of(rows, "log_w_std") if rows else None


def draw_dose(axis, kind):
    """Held-out accuracy at the end over the spread of log w, and where it lies by itself."""
    for method in ("gspo", "gspo fitted", "grpo"):
        means = {}              # {spread: mean accuracy}
        for arm in [f"{method}, noise 0", *(f"{method}, {kind} {sigma}" for sigma in SIGMAS)]:
            values = list(endings("noise", arm).values())
            if values:
                spread = spread_of("noise", arm)
                means[spread] = statistics.fmean(values)
                axis.plot([spread] * len(values), values, **style(method) | {"linestyle": ""},
                          alpha=0.35)
        if means:
            axis.plot(list(means), list(means.values()), **style(method), label=method)
    for label, (name, arm) in NATURAL.items():
        spread = spread_of(name, arm)
        if spread:
            axis.axvline(spread, color="grey", linewidth=0.8, linestyle=":")
            axis.text(spread, 0.42, label, rotation=90, fontsize=7, ha="right", va="bottom")
    axis.set_xscale("log")
    axis.set_xlabel("spread of log w over tokens")
    axis.legend(fontsize=8, loc="center left")


def draw_noise(plt):
    """results/noise.png: accuracy over the spread of noise on the token ratios."""
    figure, axes = panels(plt, 3, width=15)
    for axis in axes:
        axis.axhline(statistics.fmean(endings("noise", "reinforce, noise 0").values()),
                     color="black", linewidth=0.8, label="reinforce: no ratio")
    draw_dose(axes[0], "noise")
    draw_dose(axes[1], "centred noise")
    axes[0].set_ylabel("held-out accuracy after 80 steps, arithmetic")
    axes[0].set_title("noise of mean 1 on w: log s shifts by -sigma²/2")
    axes[1].set_title("noise of mean 0 on log w: no shift")
    mixed = ("gspo", "gspo fitted", "grpo", "grpo_dual_clip", *MIXED)
    draw_places(axes[2], "noise", {
        "each token,\ncentred, sigma 4": {method: f"{method}, centred noise 4" for method in mixed},
        "each response,\ncentred, sigma 1": {method: f"{method}, common noise 1"
                                             for method in ("gspo", "grpo")}})
    axes[2].set_title("mixed objectives, and noise common to a response")
    figure.savefig(RESULTS / "noise.png", dpi=110)


def draw_samplers(plt):
    """results/samplers.png: accuracy with samplers that are not the trainer."""
    figure, axes = panels(plt, 3, width=14, sharey=False)
    axes[1].sharey(axes[0])
    methods = ("gspo", "gspo wide", "grpo")
    coarse = {"int8": {name: f"{name}, int8" for name in ("gspo", "grpo")},
              "int4": {method: f"{method}, int4" for method in methods}}
    coarse["int4,\nrecomputed"] = {name: f"{name}, int4 recomputed" for name in ("gspo", "grpo")}
    coarse["int4, TIS"] = {"gspo_token, TIS": "gspo_token, int4 tis"}
    draw_places(axes[0], "sampler", coarse)
    same = {method: method for method in methods}
    draw_places(axes[1], "lag", {"8 rollouts old": same})
    draw_places(axes[2], "lag-countdown", {"16 rollouts old": same})
    for axis, title in zip(axes, ("arithmetic, coarse sampler", "arithmetic, old sampler",
                                  "Countdown, old sampler")):
        axis.set_title(title)
    axes[0].set_ylabel("held-out accuracy at the end")
    figure.savefig(RESULTS / "samplers.png", dpi=110)


def clip_range(row):
    """The clip range (low, high) of a row of EVIDENCE."""
    words = row["command"].split()
    if "--clip_low" not in words:
        return gspo.ALGORITHMS[words[words.index("--algorithm") + 1]].clip
    return tuple(float(words[words.index(option) + 1]) for option in ("--clip_low", "--clip_high"))


def clipped_if_normal(row):
    """The share of tokens that the range of a row of EVIDENCE would clip if log-ratios were normal,
    with the spread that was measured and the mean of log s, and had nothing to do with the
    advantages, half of which are negative."""
    spread = row["log_s_std"] if "gspo" in row["arm"] else row["log_w_std"]
    ratio = statistics.NormalDist(float(row["log_s_mean"]), float(spread))
    low, high = clip_range(row)
    below = ratio.cdf(math.log(1 - low)) if low < 1 else 0.0
    above = 1 - ratio.cdf(math.log(1 + high))
    return (below + above) / 2


def draw_clip(plt):
    """results/clip.png: how much is clipped, over the range, and beside what a Gaussian says."""
    figure, (over_range, beside_gaussian) = panels(plt, 2, sharey=False)
    rows = [row for row in read(EVIDENCE) if row["experiment"] == "stale-search"]
    for method in ("gspo", "grpo"):
        of_method = [row for row in rows if row["arm"].startswith(method)]
        measured = [float(row["clip_low"]) + float(row["clip_high"]) for row in of_method]
        looks = style(method) | {"linestyle": "", "label": method}
        over_range.plot([clip_range(row)[0] for row in of_method], measured, **looks)
        beside_gaussian.plot(list(map(clipped_if_normal, of_method)), measured, **looks)
    beside_gaussian.plot([1e-6, 1], [1e-6, 1], color="black", linewidth=0.8, label="as predicted")
    over_range.set_xlabel("clip range below 1")
    over_range.set_ylabel("share of tokens clipped")
    beside_gaussian.set_xlabel("share that a Gaussian predicts")
    for axis in (over_range, beside_gaussian):
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_ylim(1e-4, 1)
        axis.legend(fontsize=8)
    beside_gaussian.set_xlim(1e-6, 1)
    figure.savefig(RESULTS / "clip.png", dpi=110)


PARTS_OF_SPREAD = {"sum_std": ("sum of log w over the response", "#d9822b", "--"),
                   "log_w_std": ("log w, tokens", "#7d4f9e", ":"),
                   "log_s_std": ("log s, their mean", "#1f5fa8", "-")}


def draw_lengths(axis, regime):
    """Spreads over the length of the response, a point for each bucket of lengths: mean of the
    seeds."""
    rows = [row for row in read(SCATTER_LENGTHS) if row["regime"] == regime]
    buckets = {}            # {number: its rows, one for each seed}
    for row in rows:
        buckets.setdefault(row["bucket"], []).append(row)
    buckets = list(buckets.values())
    lengths = [mean_of(bucket, "length") for bucket in buckets]
    for column, (label, colour, line) in PARTS_OF_SPREAD.items():
        axis.plot(lengths, [mean_of(bucket, column) for bucket in buckets], color=colour,
                  linestyle=line, marker="o", label=label)
    independent = [mean_of(bucket, "log_w_std") / length ** 0.5
                   for bucket, length in zip(buckets, lengths)]
    axis.plot(lengths, independent, color="black", linewidth=0.8,
              label="log s if tokens were independent")
    axis.set_xscale("log")
    axis.set_yscale("log")
    ticks = [length for length in (3, 10, 30, 100) if lengths[0] / 2 < length < 2 * lengths[-1]]
    axis.set_xticks(ticks, ticks)
    axis.minorticks_off()
    axis.set_title(regime)
    axis.set_xlabel("tokens in the response")


def draw_scatter(plt):
    """results/scatter.png: spreads over length, and of tokens whose experts changed."""
    figure, axes = panels(plt, 4, width=17, sharey=False)
    regimes = ("arithmetic, 4 updates", "Countdown, 4 updates", "Countdown, 32 updates")
    for axis, regime in zip(axes, regimes):
        draw_lengths(axis, regime)
    axes[0].set_ylabel("standard deviation")
    axes[0].legend(fontsize=7)
    kinds = {"log_w_std_changed": ("experts changed", "#b23a48", "o"),
             "log_w_std_changed_replayed": ("the same tokens, old experts", "#2a9d8f", "v"),
             "log_w_std_unchanged": ("experts unchanged", "#6b705c", "s")}
    rows = read(SCATTER)
    for column, (label, colour, marker) in kinds.items():
        for place, name in enumerate(REGIMES):
            values = [float(row[column]) for row in rows if row["regime"] == name]
            axes[3].plot([place] * len(values), values, color=colour, marker=marker,
                         linestyle="", alpha=0.6, label=None if place else label)
    axes[3].set_yscale("log")
    axes[3].set_title("spread of log w of tokens whose ...")
    axes[3].set_xticks(range(len(REGIMES)), [name.replace(", ", ",\n") for name in REGIMES],
                       fontsize=7)
    axes[3].legend(fontsize=7)
    figure.savefig(RESULTS / "scatter.png", dpi=110)


def accuracies(setting, suffix=None):
    """{step: {seed: mean held-out accuracy}} of a setting, over all kinds of problem or those
    that end in `suffix`."""
    found = {}
    for row in read(EVALUATIONS):
        if row["setting"] == setting and suffix in (None, row["kind"][1:]):
            of_step = found.setdefault(int(row["step"]), {})
            of_step.setdefault(row["seed"], []).append(float(row["accuracy"]))
    return {step: {seed: statistics.fmean(values) for seed, values in of_step.items()}
            for step, of_step in found.items()}


def draw_queries(plt):
    """results/queries.png: held-out accuracy with adaptive and with uniform queries, in the main
    job and with up to five digits; mean and range of the seeds."""
    main = ("main job", "main job, uniform queries")
    five = ("queries, adaptive", "queries, uniform")
    plots = ((main, None, "main job"), (five, None, "1 to 5 digits"), (five, "4", "4 digits"),
             (five, "5", "5 digits"))
    figure, axes = plt.subplots(1, 4, figsize=(16, 3.5), layout="constrained")
    for axis, (settings, suffix, title) in zip(axes, plots):
        for setting, label in zip(settings, ("adaptive", "uniform")):
            of_step = accuracies(setting, suffix)
            values = [list(of_seed.values()) for of_seed in of_step.values()]
            axis.plot(list(of_step), [statistics.fmean(v) for v in values], marker="o", label=label)
            axis.fill_between(list(of_step), [min(v) for v in values], [max(v) for v in values],
                              alpha=0.2)
        axis.set_title(f"{title}: held-out accuracy", fontsize=10)
        axis.set_xlabel("RL step")
        axis.set_ylim(0, 1)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(RESULTS / "queries.png", dpi=110)


def draw_all():
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    for draw in (draw_stale, draw_stale_search, draw_noise, draw_samplers, draw_clip, draw_scatter,
                 draw_queries):
        draw(plt)
        plt.close()
