"""The figures of what experiments.py and scatter.py left, drawn from the tables of results/
alone."""
import math
import statistics

import gspo
from lab.study.plan import (BEST, CURVES, EVALUATIONS, EVIDENCE, METHODS, MIXED, RANGES, RATES,
                            REGIMES, RESULTS, SCATTER, SCATTER_LENGTHS, SIGMAS, mean_of, read)
from lab.study.tables import bootstrap, endings, search_score

# Colour, line and marker of each method. Two in one panel differ in grey too.
STYLES = {
    "gspo": ("#1f5fa8", "-", "o"), "grpo": ("#d9822b", "--", "s"),
    "grpo, r3": ("#7d4f9e", ":", "^"), "gspo_clip_grpo_weight": ("#2a9d8f", "-.", "v"),
    "grpo_clip_gspo_weight": ("#b23a48", (0, (5, 1)), "D"),
    "grpo_dual_clip": ("#6b705c", (0, (1, 1)), "P"), "gspo wide": ("#6fa8dc", ":", "X"),
    "gspo fitted": ("#6fa8dc", ":", "X"),
    "gspo_token, TIS": ("#1f5fa8", "-", "*"), "dr_grpo": ("#b23a48", "-.", "D"),
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


def draw_places(axis, places, column="accuracy"):
    """A column of EVIDENCE, by default the accuracy at the end, of several places {label:
    (experiment, {method: arm})}: a marker for each seed, a bar for the mean, a line for its
    bootstrap interval. Methods have their own colour and marker, and stand side by side."""
    labelled = set()
    for place, (name, arms) in enumerate(places.values()):
        for i, (method, arm) in enumerate(arms.items()):
            values = list(endings(name, arm, column).values())
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


def draw_search(axis, name):
    """The score of a search over the learning rate, a line for each clip range."""
    for i, arm in enumerate(RANGES):
        scores = {float(lr): search_score(name, f"{arm}, lr {lr}") for lr in RATES}
        scores = {lr: score for lr, score in scores.items() if score is not None}
        if not scores:
            continue
        axis.plot(list(scores), list(scores.values()), **style(arm) | {"marker": "osvD^"[i % 5]},
                  label=arm)
    axis.set_xscale("log")
    axis.set_xticks([float(lr) for lr in RATES], RATES)
    axis.minorticks_off()
    axis.set_xlabel("learning rate")
    axis.set_ylim(0, 0.6)
    if axis.lines:
        axis.legend(fontsize=7, ncols=2)


def draw_stale(plt):
    """results/stale.png: Countdown with few and with many optimiser steps on a rollout."""
    figure, axes = panels(plt, 2)
    axes[0].set_title("4 optimiser steps on each rollout")
    draw_curves(axes[0], "fresh", METHODS)
    axes[0].set_ylabel("held-out accuracy, Countdown")
    axes[1].set_title("32 optimiser steps on each rollout")
    draw_curves(axes[1], "stale", METHODS)
    figure.savefig(RESULTS / "stale.png", dpi=110)


def draw_stale_search(plt):
    """results/stale-search.png: the search for 32 optimiser steps, and what it chose."""
    figure, axes = panels(plt, 3, width=14)
    axes[0].set_title("the search: mean of steps 20 to 60, seed 5")
    draw_search(axes[0], "stale-search")
    axes[0].set_ylabel("held-out accuracy, Countdown")
    axes[1].set_title("the same, seed 6")
    draw_search(axes[1], "stale-search-again")
    axes[2].set_title("32 optimiser steps, each as the first search chose")
    draw_curves(axes[2], "stale-searched", BEST)
    figure.savefig(RESULTS / "stale-search.png", dpi=110)


def draw_models(plt):
    """results/models.png: Countdown with many optimiser steps on a rollout, with three models."""
    figure, axes = panels(plt, 3, width=14)
    models = {"stale-dense": "dense", "stale": "2 of 8 experts active",
              "stale-fine": "8 of 32 experts active"}
    for axis, (name, title) in zip(axes, models.items()):
        draw_curves(axis, name, METHODS)
        axis.set_title(f"32 optimiser steps on each rollout: {title}", fontsize=10)
    axes[0].set_ylabel("held-out accuracy, Countdown")
    figure.savefig(RESULTS / "models.png", dpi=110)


def draw_length(plt):
    """results/length.png: GSPO and GRPO with and without 1/|y|, on up to five digits."""
    figure, axes = panels(plt, 3, width=14, sharey=False)
    columns = {"accuracy": "one to five digits", "accuracy_4": "four digits",
               "accuracy_5": "five digits"}
    with_length = {"gspo": "gspo", "grpo": "grpo"}
    without = {"gspo": "gspo_token_mean", "grpo": "grpo_token_mean", "dr_grpo": "dr_grpo"}
    for axis, (column, title) in zip(axes, columns.items()):
        draw_places(axis, {"1/|y|": ("length", with_length),
                           "all tokens alike": ("length", without)}, column)
        axis.set_title(title)
    axes[0].set_ylabel("held-out accuracy after 100 steps, arithmetic")
    figure.savefig(RESULTS / "length.png", dpi=110)


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
            # 0.42 is below all points.
            axis.text(spread, 0.42, label, rotation=90, fontsize=7, ha="right", va="bottom")
    axis.set_xscale("log")
    axis.set_xlabel("spread of log w over tokens")
    axis.legend(fontsize=8, loc="center left")


def draw_noise(plt):
    """results/noise.png: accuracy over the spread of log w under noise; mixed objectives."""
    figure, axes = panels(plt, 3, width=15)
    for axis in axes:
        axis.axhline(statistics.fmean(endings("noise", "reinforce, noise 0").values()),
                     color="black", linewidth=0.8, label="reinforce: no ratio")
    draw_dose(axes[0], "noise")
    draw_dose(axes[1], "centred noise")
    axes[0].set_ylabel("held-out accuracy after 80 steps, arithmetic")
    axes[0].set_title("w times noise of mean 1: log s shifts by -sigma²/2")
    axes[1].set_title("noise of mean 0 on log w: no shift")
    mixed = ("gspo", "gspo fitted", "grpo", "grpo_dual_clip", *MIXED)
    of_token = {method: f"{method}, centred noise 4" for method in mixed}
    of_response = {method: f"{method}, common noise 1" for method in ("gspo", "grpo")}
    draw_places(axes[2], {"each token,\ncentred, sigma 4": ("noise", of_token),
                          "each response,\ncentred, sigma 1": ("noise", of_response)})
    axes[2].set_title("mixed objectives, and noise common to a response")
    figure.savefig(RESULTS / "noise.png", dpi=110)


def draw_samplers(plt):
    """results/samplers.png: accuracy with samplers that are not the trainer."""
    figure, axes = panels(plt, 3, width=14, sharey=False)
    axes[1].sharey(axes[0])
    both = ("gspo", "grpo")
    methods = ("gspo", "gspo wide", "grpo")
    recomputed = {name: f"{name}, int4 recomputed" for name in both}
    draw_places(axes[0], {"int8": ("sampler", {name: f"{name}, int8" for name in both}),
                          "int4": ("sampler", {name: f"{name}, int4" for name in methods}),
                          "int4,\nrecomputed": ("sampler", recomputed),
                          "int4, TIS": ("sampler", {"gspo_token, TIS": "gspo_token, int4 tis"})})
    same = {method: method for method in methods}
    draw_places(axes[1], {"8 rollouts old": ("lag", same)})
    draw_places(axes[2], {"16 rollouts old": ("lag-countdown", same)})
    for axis, title in zip(axes, ("arithmetic, coarse sampler", "arithmetic, old sampler",
                                  "Countdown, old sampler")):
        axis.set_title(title)
    axes[0].set_ylabel("held-out accuracy at the end")
    figure.savefig(RESULTS / "samplers.png", dpi=110)


def clip_range(row):
    """The clip range (low, high) of a row of EVIDENCE."""
    words = row["command"].split()
    if "--clip_low" not in words:
        return gspo.ALGORITHMS[words[words.index("--algorithm") + 1]].clip_range
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
    over_range.set_xlabel("clip_low")
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
    for draw in (draw_stale, draw_stale_search, draw_models, draw_noise, draw_samplers, draw_clip,
                 draw_scatter, draw_length, draw_queries):
        draw(plt)
        plt.close()
