"""When does GSPO pay? Experiments with several seeds, their rows and their figures.

    python -m lab.evidence                 how many runs of each experiment are missing
    python -m lab.evidence NAME ...        run what is missing of these experiments; `all`: of all
    python -m lab.evidence --draw          draw all figures, from the tables alone
    python -m lab.evidence --table         print the tables and the comparisons

Two runs at a time, of one thread each. When a run ends, its held-out accuracies are added to
results/evidence-curves.csv, and a row to results/evidence.csv. A run that was killed goes on, as
with --resume. The arms of an experiment share one cold start for each seed and get the same
problems (--queries uniform), so they can be compared in pairs. The last accuracy counts, not the
best. A run has collapsed if it ends below the accuracy of its cold start.
"""
import itertools
import json
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from lab.experiments import RESULTS, append, machine, mean_of, read, shell
from lab.report import clock, read_table

TABLE = RESULTS / "evidence.csv"
CURVES = RESULTS / "evidence-curves.csv"


class Experiment(NamedTuple):
    about: str
    options: str        # of all arms, as on the command line of train.py
    arms: dict          # {name: options}
    seeds: range


COUNTDOWN = "--task countdown --queries uniform"
HUNDRED = "--steps 100 --eval_every 25"
ARITHMETIC = "--queries uniform --steps 80 --eval_every 40"
STALE = "--mini_batches 16 --epochs 2"
GSPO = "--algorithm gspo"
GRPO = "--algorithm grpo"
RANGES = {      # of the search
    "gspo, 1e-3": f"{GSPO} --clip_low 1e-3 --clip_high 1.3e-3",
    "gspo, 3e-3": GSPO,
    "gspo, 1e-2": f"{GSPO} --clip_low 1e-2 --clip_high 1.3e-2",
    "gspo, 3e-2": f"{GSPO} --clip_low 3e-2 --clip_high 4e-2",
    "grpo, 0.05": f"{GRPO} --clip_low 0.05 --clip_high 0.065",
    "grpo, 0.1": f"{GRPO} --clip_low 0.1 --clip_high 0.13",
    "grpo, 0.2": GRPO,
    "grpo, 0.4": f"{GRPO} --clip_low 0.4 --clip_high 0.5",
    "grpo, no clip": f"{GRPO} --clip_low 1 --clip_high 100",
}
RATES = ("4e-5", "7.5e-5", "1.5e-4", "3e-4", "6e-4")
# The lower rates were tried later, because the lowest one had been the best: without the ranges
# that had been the worst, and in the end with the best ones only.
NOT_SEARCHED = {"7.5e-5": ("gspo, 3e-2", "grpo, 0.4", "grpo, no clip"),
                "4e-5": set(RANGES) - {"gspo, 3e-3", "grpo, 0.2"}}
SEARCHED = {}
for lr, name in itertools.product(RATES, RANGES):
    if name not in NOT_SEARCHED.get(lr, ()):
        SEARCHED[f"{name}, lr {lr}"] = f"{RANGES[name]} --lr {lr}"
METHODS = {"gspo": GSPO, "grpo": GRPO, "grpo, r3": f"{GRPO} --routing_replay r3"}
MIXED = {name: f"--algorithm {name}" for name in ("gspo_clip_grpo_weight", "grpo_clip_gspo_weight")}
# The best cells of the search, by the mean of the held-out accuracies up to step 60.
BEST = {name: SEARCHED[name] for name in ("gspo, 3e-3, lr 7.5e-5", "grpo, 0.2, lr 4e-5")}
# For stale rollouts that are off as a whole: ten times the default.
WIDE = f"{GSPO} --clip_low 3e-2 --clip_high 4e-2"
# REINFORCE reads no stored log-prob: noise changes nothing.
NOISE = {"reinforce, noise 0": "--noise 0 --algorithm reinforce --scale std"}
NOISE_ON = {"gspo": "0124", "grpo": "0124", "grpo_dual_clip": "24",
            "gspo_clip_grpo_weight": "024", "grpo_clip_gspo_weight": "024"}
for name, sigmas in NOISE_ON.items():
    for sigma in sigmas:
        NOISE[f"{name}, noise {sigma}"] = f"--noise {sigma} --algorithm {name}"
for name in ("gspo", "grpo"):
    NOISE[f"{name}, centred noise 2"] = f"--noise 2 --centred --algorithm {name}"
# The range is about the spread of log s: 2 divided by the root of some 27 tokens.
NOISE["gspo wide, centred noise 2"] = (
    f"--noise 2 --centred {GSPO} --clip_low 0.4 --clip_high 0.5")
for name in ("gspo", "grpo"):
    NOISE[f"{name}, common noise 1"] = f"--common_noise 1 --centred --algorithm {name}"
SAMPLERS = {}
for sampler, name in itertools.product(("int4", "int8"), ("gspo", "gspo wide", "grpo")):
    method = WIDE if name == "gspo wide" else f"--algorithm {name}"
    SAMPLERS[f"{name}, {sampler}"] = f"{method} --sampler {sampler}"
for name in ("gspo", "grpo"):
    SAMPLERS[f"{name}, int4 recomputed"] = (
        f"--algorithm {name} --sampler int4 --recompute_logp_old")
SAMPLERS["gspo_token, int4 tis"] = "--algorithm gspo_token --sampler int4 --correction tis"
LAGS = {"gspo": GSPO, "gspo wide": WIDE, "grpo": GRPO}

EXPERIMENTS = {
    "stale-search": Experiment(
        "Countdown, 16 mini-batches for 2 epochs: learning rates and clip ranges, on a seed that "
        "is used for nothing else",
        f"{COUNTDOWN} --steps 80 --eval_every 20 {STALE}", SEARCHED, [5]),
    "stale": Experiment(
        "Countdown, 16 mini-batches for 2 epochs, all at the task's learning rate, 6e-4",
        f"{COUNTDOWN} {HUNDRED} {STALE}",
        METHODS | MIXED | {"gspo, r3": f"{GSPO} --routing_replay r3"}, range(5)),
    "fresh": Experiment(
        "Countdown with the default of 4 mini-batches", f"{COUNTDOWN} {HUNDRED}", METHODS,
        range(5)),
    "stale-searched": Experiment(
        "Countdown, 16 mini-batches for 2 epochs, each with the best learning rate and clip range "
        "of the search", f"{COUNTDOWN} {HUNDRED} {STALE}", BEST, range(5)),
    "noise": Experiment("arithmetic, with noise on the ratios", ARITHMETIC, NOISE, range(5)),
    "sampler": Experiment(
        "arithmetic, the sampler's weights rounded", ARITHMETIC, SAMPLERS, range(5)),
    "lag": Experiment(
        "arithmetic, the sampler 8 rollouts old", f"{ARITHMETIC} --lag 8", LAGS, range(5)),
    "lag-countdown": Experiment(
        "Countdown, the sampler 16 rollouts old", f"{COUNTDOWN} {HUNDRED} --lag 16", LAGS,
        range(5)),
}


def command(name, arm, seed):
    """What to give to python."""
    experiment = EXPERIMENTS[name]
    arguments = f"{experiment.options} {experiment.arms[arm]} --threads 1 --seed {seed}".split()
    instruments = "noise" in arm or arm in MIXED
    return ["-m", "lab.instruments", *arguments] if instruments else ["train.py", *arguments]


def folder(name, arm, seed):
    return Path("out/evidence") / f"{name} {arm} {seed}".replace(",", "").replace(" ", "-")


def missing(name):
    """(arm, seed) of all runs of an experiment that have no row yet. With several seeds, neighbours
    differ in them: two runs at a time do not make the same cold start twice."""
    present = {(row["experiment"], row["arm"], row["seed"]) for row in read(TABLE)}
    experiment = EXPERIMENTS[name]
    return [(arm, seed) for arm, seed in itertools.product(experiment.arms, experiment.seeds)
            if (name, arm, str(seed)) not in present]


# ---------------------------------------------------------------------------- running

LATER = ("log_w_std", "log_s_std", "log_s_mean", "outliers", "clip_low", "clip_high")


def rows_of(out, name, arm, seed, commit, where_it_ran):
    """What a finished run in `out` leaves: a row of TABLE, and rows of CURVES."""
    summary = json.loads((out / "summary.json").read_text())
    steps = read_table(out / "metrics.csv")
    updates = read_table(out / "updates.csv")
    # In the first mini-batch of a step nothing has moved yet. kl and expert_change, which
    # metrics.csv has, are means over all mini-batches.
    later = [row for row in updates if row["mini_batch"] != "0"]
    row = {"experiment": name, "arm": arm, "seed": seed,
           "command": "python " + " ".join(command(name, arm, seed)), "commit": commit,
           "machine": where_it_ran, "steps": len(steps),
           "accuracy_cold_start": summary["accuracy_cold_start"], "accuracy": summary["accuracy"],
           "accuracy_greedy": summary["accuracy_greedy"],
           "reward": mean_of(steps, "reward"), "length": mean_of(steps, "length")}
    row |= {column: mean_of(later, column) for column in LATER}
    row |= {"kl": mean_of(steps, "kl"), "expert_change": mean_of(steps, "expert_change"),
            "seconds_rl": summary["seconds_rl"]}
    for column in row:
        if isinstance(row[column], float):
            row[column] = f"{row[column]:.4g}"
    curves = []
    accuracies = [(0, summary["accuracy_cold_start"])]
    accuracies += [(step["step"], float(step["accuracy"])) for step in steps if step["accuracy"]]
    for step, accuracy in accuracies:
        curves.append({"experiment": name, "arm": arm, "seed": seed, "step": step,
                       "accuracy": f"{accuracy:.4f}"})
    return row, curves


def run(name, arm, seed, commit):
    """Make a run, or what is left of it -> what rows_of gives; None if it failed."""
    out = folder(name, arm, seed)
    if not (out / "summary.json").exists():
        resume = ["--resume"] if (out / "checkpoint.pt").exists() else []
        process = subprocess.run([sys.executable, *command(name, arm, seed), *resume,
                                  "--out", str(out)], capture_output=True, text=True)
        if process.returncode:
            print(f"{name}: {arm}, seed {seed}: {process.stderr}", flush=True)
            return None
    return rows_of(out, name, arm, seed, commit, machine().replace("2 threads", "1 thread"))


def run_all(names):
    # Asked once: the tables that are written make the checkout dirty.
    commit = shell("git", "describe", "--always", "--dirty", "--exclude", "*")
    todo = []
    for name in names:
        todo += [(name, arm, seed) for arm, seed in missing(name)]
    began = time.time()
    with ThreadPoolExecutor(2) as pool:
        results = pool.map(lambda job: run(*job, commit), todo)
        for i, result in enumerate(results, start=1):
            if result is None:
                continue
            row, curves = result
            append(CURVES, curves)
            append(TABLE, [row])
            left = (time.time() - began) / i * (len(todo) - i)
            print(f"{i} of {len(todo)}: {row['experiment']}: {row['arm']}, seed {row['seed']}: "
                  f"{row['accuracy']}   {clock(left)} left", flush=True)


# ---------------------------------------------------------------------------- comparing

def endings(name, arm):
    """{seed: held-out accuracy at the end}, without runs that were cut."""
    return {row["seed"]: float(row["accuracy"]) for row in read(TABLE)
            if row["experiment"] == name and row["arm"] == arm and row["accuracy"]}


# Student's t beyond which a difference of so many pairs is significant at 5 %, two-sided.
CRITICAL_T = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}


class Comparison(NamedTuple):
    """How far one arm ends above another, in pairs of seeds."""
    mean: float
    error: float        # the standard error of the mean
    low: float          # bounds of the mean: the middle 95 % of the means of all resamples
    high: float
    n_above: int
    n_pairs: int

    @property
    def significant(self):
        return abs(self.mean) > CRITICAL_T[self.n_pairs] * self.error


def compare(mine, theirs):
    """{seed: accuracy} of two arms -> Comparison of the seeds that both have."""
    differences = [mine[seed] - theirs[seed] for seed in mine if seed in theirs]
    n = len(differences)
    means = sorted(map(statistics.fmean, itertools.product(differences, repeat=n)))
    margin = int(0.025 * len(means))
    return Comparison(statistics.fmean(differences), statistics.stdev(differences) / n ** 0.5,
                      means[margin], means[-1 - margin],
                      sum(difference > 0 for difference in differences), n)


PAIRS = [("fresh", "gspo", "grpo"), ("fresh", "grpo, r3", "grpo"), ("stale", "gspo", "grpo"),
         ("stale", "gspo", "grpo, r3"), ("stale", "grpo, r3", "grpo"),
         ("stale", "gspo_clip_grpo_weight", "grpo"), ("stale", "grpo_clip_gspo_weight", "grpo"),
         ("stale-searched", *BEST)]


def print_comparisons():
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


def print_tables():
    columns = ("accuracy", "reward", "log_w_std", "log_s_std", "log_s_mean", "clip_low",
               "clip_high", "kl", "expert_change", "length")
    for name in EXPERIMENTS:
        rows = [row for row in read(TABLE) if row["experiment"] == name]
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


# ---------------------------------------------------------------------------- drawing

# Colour and line of each method: they differ in grey too.
STYLES = {
    "gspo": ("#1f5fa8", "-", "o"), "grpo": ("#d9822b", "--", "s"),
    "grpo, r3": ("#7d4f9e", ":", "^"), "gspo_clip_grpo_weight": ("#2a9d8f", "-.", "v"),
    "grpo_clip_gspo_weight": ("#b23a48", (0, (5, 1)), "D"),
    "grpo_dual_clip": ("#6b705c", (0, (1, 1)), "P"),
}


def style(arm):
    """Keywords for axis.plot, by the longest name of a method that the arm begins with."""
    name = max((name for name in STYLES if arm.startswith(name)), key=len)
    colour, line, marker = STYLES[name]
    return {"color": colour, "linestyle": line, "marker": marker, "markersize": 4}


def draw_curves(axis, name, arms):
    """Held-out accuracy over the RL steps: a thin line for each seed, a thick one for the mean."""
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
        means = [statistics.fmean(curve[step] for curve in of_seed.values()) for step in steps]
        axis.plot(steps, means, **looks, linewidth=2, label=f"{arm} ({len(of_seed)} seeds)")
    axis.set_xlabel("RL step")
    axis.set_ylim(0, 0.6)
    axis.grid(alpha=0.3)
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
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7, ncols=2)


def draw_stale(plt):
    """results/stale.png: Countdown with few and with many updates a rollout."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
    axes[0].set_title("4 optimiser steps on each rollout")
    draw_curves(axes[0], "fresh", METHODS)
    axes[0].set_ylabel("held-out accuracy, Countdown")
    axes[1].set_title("32 optimiser steps on each rollout")
    draw_curves(axes[1], "stale", METHODS)
    figure.savefig(RESULTS / "stale.png", dpi=110)


def draw_stale_search(plt):
    """results/stale-search.png: the search for 32 optimiser steps, and what it chose."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
    axes[0].set_title("the search: mean of steps 20 to 60, 1 seed")
    draw_search(axes[0])
    axes[0].set_ylabel("held-out accuracy, Countdown")
    axes[1].set_title("32 optimiser steps, each as the search chose")
    draw_curves(axes[1], "stale-searched", BEST)
    figure.savefig(RESULTS / "stale-search.png", dpi=110)


def draw_noise(plt):
    """results/noise.png: accuracy over the spread of noise on the token ratios."""
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    sigmas = "0124"
    for name in NOISE_ON:
        found = {place: list(endings("noise", f"{name}, noise {sigma}").values())
                 for place, sigma in enumerate(sigmas)}
        found = {place: values for place, values in found.items() if values}
        for place, values in found.items():
            axis.plot([place] * len(values), values, **style(name) | {"linestyle": ""}, alpha=0.35)
        axis.plot(list(found), [statistics.fmean(values) for values in found.values()],
                  **style(name), label=name)
    no_ratio = endings("noise", "reinforce, noise 0").values()
    axis.axhline(statistics.fmean(no_ratio), color="black", linewidth=0.8,
                 label="reinforce: no ratio")
    axis.set_xticks(range(len(sigmas)), list(sigmas))
    axis.set_xlabel("spread of the noise on log w, each token for itself (sigma)")
    axis.set_ylabel("held-out accuracy after 80 steps, arithmetic")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(RESULTS / "noise.png", dpi=110)


def draw():
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    draw_stale(pyplot)
    draw_stale_search(pyplot)
    if endings("noise", "reinforce, noise 0"):
        draw_noise(pyplot)


def main(names):
    unknown = set(names) - {*EXPERIMENTS, "all", "--table", "--draw"}
    if unknown:
        sys.exit(f"evidence: {', '.join(unknown)}: no such experiment; there are "
                 f"{', '.join(EXPERIMENTS)}")
    if "--table" in names:
        print_tables()
        print_comparisons()
        print_search()
    elif "--draw" in names:
        draw()
    elif names:
        run_all(EXPERIMENTS if "all" in names else names)
    else:
        for name in EXPERIMENTS:
            print(f"{name}: {len(missing(name))} runs are missing")


if __name__ == "__main__":
    main(sys.argv[1:])
