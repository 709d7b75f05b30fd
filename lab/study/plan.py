"""Which runs there are: SETTINGS, one after another and with two threads, because their times are
reported, and EXPERIMENTS, two at a time and of one thread each. experiments.py runs them, tables.py
and figures.py show what they left.

The arms of an experiment share one cold start for each seed and get the same problems (--queries
uniform), so they can be compared in pairs. So do settings with the same model, task and cold-start
options.
"""
import itertools
import statistics
from pathlib import Path
from typing import Iterable, NamedTuple

from lab.report import read_table

RESULTS = Path(__file__).parent.parent.parent / "results"


def read(path):
    return read_table(path) if path.exists() else []


def mean_of(rows, column):
    return statistics.fmean(float(row[column]) for row in rows if row[column])


# ---------------------------------------------------------------------------- settings

RUNS = RESULTS / "runs.csv"                 # a row for each run
EVALUATIONS = RESULTS / "evaluations.csv"   # its held-out accuracies, by kind of problem
COMPARED = 200      # the first RL steps, in which settings of different length are compared
SHORT = ["--steps", str(COMPARED)]
OBJECTIVES = ("gspo", "gspo_token", "grpo", "ppo", "dr_grpo", "dapo", "cispo", "gmpo", "sapo",
              "luspo", "reinforce")
FIVE_DIGITS = ["--max_digits", "5", "--max_new_tokens", "112"]
LONG = [*FIVE_DIGITS, "--cold_steps", "2200"]       # what the README shows
UNIFORM = ["--queries", "uniform"]
# name: options, seeds
SETTINGS = {
    "main job": ([], range(5)),
    "main job, uniform queries": (UNIFORM, range(5)),
    "long run": ([*LONG, "--steps", "500"], range(3)),
    "long run, 800 steps": ([*LONG, "--steps", "800"], [0]),
    # The first steps of more seeds, and without 1/|y|.
    "long run, first steps": ([*LONG, *SHORT], (3, 4)),
    "long run, first steps, luspo": ([*LONG, "--algorithm", "luspo", *SHORT], range(5)),
    "long run, first steps, dr_grpo": ([*LONG, "--algorithm", "dr_grpo", *SHORT], range(5)),
    "queries, adaptive": ([*FIVE_DIGITS, "--steps", "500"], range(5)),
    "queries, uniform": ([*FIVE_DIGITS, "--steps", "500", *UNIFORM], range(5)),
    "GSPO, the paper's clip range": (
        ["--clip_low", "3e-4", "--clip_high", "4e-4", *SHORT], range(5)),
    "GRPO": (["--algorithm", "grpo", *SHORT], range(5)),
    "countdown, 300 steps": (["--task", "countdown", "--steps", "300"], range(5)),
    "countdown, 400 steps": (["--task", "countdown", "--steps", "400"], range(5)),
    "sampler bfloat16": (["--sampler", "bfloat16"], range(3)),
    "sampler int8": (["--sampler", "int8"], range(3)),
    "dtype bfloat16": (["--dtype", "bfloat16"], range(3)),
    # What it costs to score a rollout again before the update.
    "log-probs of the sampler": (["--steps", "60"], (1, 2)),
    "log-probs recomputed": (["--steps", "60", "--recompute_logp_old"], (1, 2)),
    "objective reinforce, on-policy": (["--algorithm", "reinforce", "--mini_batches", "1"], [0]),
    "objective dapo, dynamic sampling, overlong": (
        ["--algorithm", "dapo", "--dynamic_sampling", "--overlong", "16", *SHORT], [0]),
}
# What three sizes of model cost: short runs, whose accuracy says nothing.
SIZES = {
    "size 0.3 M": [],
    "size 3 M": ["--n_layer", "4", "--d_model", "128", "--n_expert", "16", "--d_expert", "128"],
    "size 20 M": ["--n_layer", "6", "--d_model", "256", "--n_head", "8", "--n_kv_head", "2",
                  "--n_expert", "16", "--d_expert", "256"],
}
for name, options in SIZES.items():
    SETTINGS[name] = ([*options, "--cold_steps", "200", "--steps", "20"], [0])
for name in OBJECTIVES:         # to the end of the main job, each with its own clip range
    SETTINGS[f"objective {name}"] = (["--algorithm", name], [0])
for name in ("gspo", "grpo"):
    for kind in ("none", "r2", "r3"):
        SETTINGS[f"replay {name} {kind}"] = (
            ["--algorithm", name, "--routing_replay", kind, *SHORT], [0])


# ---------------------------------------------------------------------------- experiments

EVIDENCE = RESULTS / "evidence.csv"         # a row for each run
CURVES = RESULTS / "evidence-curves.csv"    # its held-out accuracies


class Experiment(NamedTuple):
    about: str
    options: str        # of all arms, as on the command line of train.py
    arms: dict          # {name: options}
    seeds: Iterable


COUNTDOWN = "--task countdown --queries uniform"
HUNDRED = "--steps 100 --eval_every 25"
STALE = "--mini_batches 16 --epochs 2"
ARITHMETIC = "--queries uniform --steps 80 --eval_every 40"
GSPO = "--algorithm gspo"
GRPO = "--algorithm grpo"
WIDE = f"{GSPO} --clip_low 3e-2 --clip_high 4e-2"       # ten times the default
METHODS = {"gspo": GSPO, "grpo": GRPO, "grpo, r3": f"{GRPO} --routing_replay r3"}
# What is one half of GSPO and one half of GRPO: see instruments.py.
MIXED = {name: f"--algorithm {name}" for name in ("gspo_clip_grpo_weight", "grpo_clip_gspo_weight")}
# GSPO and GRPO without 1/|y|: every token counts the same, that of a long response too.
TOKEN_MEAN = {name: f"--algorithm {name}" for name in ("gspo_token_mean", "grpo_token_mean")}
REINFORCE = "--algorithm reinforce --scale std"         # no ratio, otherwise like GRPO
WITH_WIDE = {"gspo": GSPO, "gspo wide": WIDE, "grpo": GRPO}
EXPERIMENTS = {}

# Few and many optimiser steps on a rollout.
EXPERIMENTS["fresh"] = Experiment(
    "Countdown with the default of 4 mini-batches", f"{COUNTDOWN} {HUNDRED}", METHODS, range(5))
EXPERIMENTS["stale"] = Experiment(
    "Countdown, 16 mini-batches for 2 epochs, all at the task's learning rate, 6e-4",
    f"{COUNTDOWN} {HUNDRED} {STALE}",
    METHODS | MIXED | {"gspo, r3": f"{GSPO} --routing_replay r3", "reinforce": REINFORCE}, range(5))

# The same without a router, and with four times as many experts. All three models have 128 active
# inner units in a layer; the one with many experts has as many parameters as the default in its
# experts, the dense one a quarter.
DENSE = "--n_expert 1 --n_active 1 --d_expert 128"
FINE = "--n_expert 32 --n_active 8 --d_expert 16"
EXPERIMENTS["stale-dense"] = Experiment(
    "like stale, with a dense model", f"{COUNTDOWN} {HUNDRED} {STALE} {DENSE}",
    {"gspo": GSPO, "grpo": GRPO}, range(5))
EXPERIMENTS["stale-fine"] = Experiment(
    "like stale, with 8 of 32 experts active", f"{COUNTDOWN} {HUNDRED} {STALE} {FINE}",
    METHODS, range(5))

# The search: clip ranges and learning rates. Lower rates were added while the lowest one was best:
# 7.5e-5 without the widest ranges; then, with the best range of each method only, 4e-5, and 2e-5
# for the sake of GRPO, which 4e-5 had suited best.
RANGES = {
    "gspo, 1e-3": f"{GSPO} --clip_low 1e-3 --clip_high 1.3e-3",
    "gspo, 3e-3": GSPO,
    "gspo, 1e-2": f"{GSPO} --clip_low 1e-2 --clip_high 1.3e-2",
    "gspo, 3e-2": WIDE,
    "grpo, 0.05": f"{GRPO} --clip_low 0.05 --clip_high 0.065",
    "grpo, 0.1": f"{GRPO} --clip_low 0.1 --clip_high 0.13",
    "grpo, 0.2": GRPO,
    "grpo, 0.4": f"{GRPO} --clip_low 0.4 --clip_high 0.5",
    "grpo, no clip": f"{GRPO} --clip_low 1 --clip_high 100",
}
RATES = ("2e-5", "4e-5", "7.5e-5", "1.5e-4", "3e-4", "6e-4")
ALL_BUT_BEST = [name for name in RANGES if name not in ("gspo, 3e-3", "grpo, 0.2")]
WIDEST = ["gspo, 3e-2", "grpo, 0.4", "grpo, no clip"]
NOT_SEARCHED = {"7.5e-5": WIDEST, "4e-5": ALL_BUT_BEST, "2e-5": ALL_BUT_BEST}
SEARCHED = {}
for lr, name in itertools.product(RATES, RANGES):
    if name not in NOT_SEARCHED.get(lr, ()):
        SEARCHED[f"{name}, lr {lr}"] = f"{RANGES[name]} --lr {lr}"
EXPERIMENTS["stale-search"] = Experiment(
    "like stale: learning rates and clip ranges, on a seed that is used for nothing else",
    f"{COUNTDOWN} --steps 80 --eval_every 20 {STALE}", SEARCHED, [5])
# Again on another seed: the three lower rates and 1.5e-4, without the widest ranges.
SEARCHED_AGAIN = {arm: options for arm, options in SEARCHED.items()
                  if arm.endswith(RATES[:4]) and not arm.startswith(tuple(WIDEST))}
EXPERIMENTS["stale-search-again"] = Experiment(
    "the search on another seed, without the two highest rates and the widest ranges",
    f"{COUNTDOWN} --steps 80 --eval_every 20 {STALE}", SEARCHED_AGAIN, [6])
# The best cells of the first search, by the mean of the held-out accuracies up to step 60.
BEST = {name: SEARCHED[name] for name in ("gspo, 3e-3, lr 7.5e-5", "grpo, 0.2, lr 4e-5")}
EXPERIMENTS["stale-searched"] = Experiment(
    "like stale, each with the best learning rate and clip range of the search",
    f"{COUNTDOWN} {HUNDRED} {STALE}", BEST, range(5))

# Noise of spread sigma on the token ratios, see instruments.py. REINFORCE reads no stored log-prob,
# so that noise changes nothing for it.
SIGMAS = ("1", "2", "4")
NOISE = {"reinforce, noise 0": f"--noise 0 {REINFORCE}"}
for name in ("gspo", "grpo"):
    NOISE[f"{name}, noise 0"] = f"--noise 0 {METHODS[name]}"
for name, sigma in itertools.product(("gspo", "grpo"), SIGMAS):
    NOISE[f"{name}, noise {sigma}"] = f"--noise {sigma} {METHODS[name]}"
# In proportion to sigma: about 0.8 times the spread that log s then has.
FITTED = {"1": "--clip_low 0.2 --clip_high 0.25", "2": "--clip_low 0.4 --clip_high 0.5",
          "4": "--clip_low 0.8 --clip_high 1"}
for sigma in SIGMAS:
    centred = f"--noise {sigma} --centred"
    NOISE[f"gspo, centred noise {sigma}"] = f"{centred} {GSPO}"
    NOISE[f"gspo fitted, centred noise {sigma}"] = f"{centred} {GSPO} {FITTED[sigma]}"
    NOISE[f"grpo, centred noise {sigma}"] = f"{centred} {GRPO}"
NOISE["grpo_dual_clip, centred noise 4"] = "--noise 4 --centred --algorithm grpo_dual_clip"
for name in MIXED:
    NOISE[f"{name}, centred noise 4"] = f"--noise 4 --centred {MIXED[name]}"
for name in ("gspo", "grpo"):
    NOISE[f"{name}, common noise 1"] = f"--common_noise 1 --centred {METHODS[name]}"
EXPERIMENTS["noise"] = Experiment(
    "arithmetic, with noise on the ratios", ARITHMETIC, NOISE, range(5))

# Samplers that are not the trainer: in lower precision, or old.
SAMPLERS = {}
for name in WITH_WIDE:
    SAMPLERS[f"{name}, int4"] = f"{WITH_WIDE[name]} --sampler int4"
for name in ("gspo", "grpo"):
    SAMPLERS[f"{name}, int8"] = f"{WITH_WIDE[name]} --sampler int8"
for name in ("gspo", "grpo"):
    SAMPLERS[f"{name}, int4 recomputed"] = f"{WITH_WIDE[name]} --sampler int4 --recompute_logp_old"
SAMPLERS["gspo_token, int4 tis"] = "--algorithm gspo_token --sampler int4 --correction tis"
EXPERIMENTS["sampler"] = Experiment(
    "arithmetic, the sampler's weights rounded", ARITHMETIC, SAMPLERS, range(5))
EXPERIMENTS["lag"] = Experiment(
    "arithmetic, the sampler 8 rollouts old", f"{ARITHMETIC} --lag 8", WITH_WIDE, range(5))
EXPERIMENTS["lag-countdown"] = Experiment(
    "Countdown, the sampler 16 rollouts old", f"{COUNTDOWN} {HUNDRED} --lag 16", WITH_WIDE,
    range(5))

# Without 1/|y| the policy moves further in a step. So GSPO and GRPO, with and without it, were
# tried with twice the learning rate as well.
LENGTH = {"gspo": GSPO, "grpo": GRPO, **TOKEN_MEAN}
for name in tuple(LENGTH):
    LENGTH[f"{name}, lr 6e-4"] = f"{LENGTH[name]} --lr 6e-4"
LENGTH["dr_grpo"] = "--algorithm dr_grpo"
EXPERIMENTS["length"] = Experiment(
    "arithmetic of one to five digits, with and without 1/|y|",
    "--queries uniform --max_digits 5 --max_new_tokens 112 --steps 100 --eval_every 50", LENGTH,
    range(5))


def command(name, arm, seed):
    """What to give to python."""
    experiment = EXPERIMENTS[name]
    words = f"{experiment.options} {experiment.arms[arm]} --threads 1 --seed {seed}".split()
    not_in_train = {"--noise", "--common_noise", "grpo_dual_clip", *MIXED, *TOKEN_MEAN}
    program = ["-m", "lab.study.instruments"] if not_in_train & {*words} else ["train.py"]
    return [*program, *words]


def folder_of(kind, *words):
    """A run's own folder in out/."""
    name = " ".join(map(str, words))
    return Path("out") / kind / name.replace(",", "").replace(" ", "-")


# ---------------------------------------------------------------------------- scatter.py

SCATTER = RESULTS / "scatter.csv"           # a row for each regime and seed
SCATTER_LENGTHS = RESULTS / "scatter-lengths.csv"
REGIMES = {
    "arithmetic, 4 updates": "",
    "arithmetic, lag 8": "--lag 8",
    "arithmetic, int4": "--sampler int4",
    "Countdown, 4 updates": "--task countdown",
    "Countdown, 32 updates": f"--task countdown {STALE}",
    "Countdown, lag 16": "--task countdown --lag 16",
}
