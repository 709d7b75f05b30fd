"""The studies: which training runs the pages of results/ rest on, and the program that makes them.

    python -m lab.study.study                how many runs of each study are missing
    python -m lab.study.study NAME ...       make what is missing of these

A run adds a row to results/runs.csv and its held-out accuracies to results/curves.csv. To repeat
it, remove its row and its folder in out/study/. A run that was killed goes on from its last
checkpoint. No run is made with code that is not committed.

The arms of a study share one cold start for each seed, and with --queries uniform they get the same
problems: they are compared in pairs. evidence.py does that.
"""
import itertools
import json
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from lab.report import clock

RESULTS = Path(__file__).parent.parent.parent / "results"
RUNS = RESULTS / "runs.csv"             # a row for each run
CURVES = RESULTS / "curves.csv"         # its held-out accuracies: all problems, and each kind
KEYS = ["study", "arm", "seed"]
LATER = ["log_w_std", "log_s_std", "log_s_mean", "outliers", "clip_low", "clip_high"]


# ---------------------------------------------------------------------------- the studies

class Study(NamedTuple):
    about: str
    options: str            # of all arms, as on the command line of train.py
    arms: dict[str, str]    # {name: options}
    seeds: range
    threads: int = 1        # with 1, two runs at a time; with 2, one: its times are reported


COUNTDOWN = "--task countdown --queries uniform --steps 100 --eval_every 25"
STALE = f"{COUNTDOWN} --mini_batches 16 --epochs 2"
ARITHMETIC = "--queries uniform --steps 80 --eval_every 40"
FIVE_DIGITS = "--max_digits 5 --max_new_tokens 112"
MANY = "--final_samples 32"             # in the last evaluation, in place of 4
FIRST = range(5)                        # the seeds of the first studies
NEW = range(10, 15)                     # and of those that ask again

GSPO = "--algorithm gspo"
GRPO = "--algorithm grpo"
WIDE = f"{GSPO} --clip_low 3e-2 --clip_high 4e-2"       # ten times the default
REINFORCE = "--algorithm reinforce --scale std"         # no ratio, otherwise like GRPO
BOTH = {"gspo": GSPO, "grpo": GRPO}
WITH_R3 = BOTH | {"grpo, r3": f"{GRPO} --routing_replay r3"}
WITH_WIDE = BOTH | {"gspo wide": WIDE}
DUAL_CLIP = {"grpo_dual_clip": "--algorithm grpo_dual_clip"}
HALVES = {"gspo_clip_grpo_weight": "--algorithm gspo_clip_grpo_weight",
          "grpo_clip_gspo_weight": "--algorithm grpo_clip_gspo_weight"}
LENGTH = BOTH | {"gspo_token_mean": "--algorithm gspo_token_mean",
                 "grpo_token_mean": "--algorithm grpo_token_mean"}
# A range of 0.8 times the spread that log s has with noise.
FITTED = {"gspo fitted, noise 1": f"{GSPO} --noise 1 --clip_low 0.2 --clip_high 0.25",
          "gspo fitted, noise 2": f"{GSPO} --noise 2 --clip_low 0.4 --clip_high 0.5",
          "gspo fitted, noise 4": f"{GSPO} --noise 4 --clip_low 0.8 --clip_high 1"}


def each(arms: dict[str, str], option: str, *values: str) -> dict[str, str]:
    """Every arm with every value of an option: {"arm, option value": options}."""
    return {f"{name}, {option} {value}": f"{options} --{option} {value}"
            for value in values for name, options in arms.items()}


STUDIES = {
    "main job": Study(
        "python train.py as it comes", "",
        {"adaptive": "", "uniform": "--queries uniform"}, FIRST, threads=2),
    "a minute": Study(
        "for the impatient", "--max_digits 2 --cold_steps 300 --steps 60", {"gspo": GSPO},
        range(3), threads=2),
    "long run": Study(
        "one to five digits", f"{FIVE_DIGITS} --cold_steps 2200 --steps 500",
        {"gspo": GSPO}, range(3), threads=2),
    "without the length": Study(
        "the first 200 steps of the long run", f"{FIVE_DIGITS} --cold_steps 2200 --steps 200",
        {name: f"--algorithm {name}" for name in ("gspo", "luspo", "dr_grpo")}, FIRST, threads=2),
    "queries": Study(
        "one to five digits", f"{FIVE_DIGITS} --steps 500",
        {"adaptive": "", "uniform": "--queries uniform"}, FIRST, threads=2),
    "Countdown": Study(
        "python train.py --task countdown as it comes", "--task countdown --steps 400",
        {"gspo": GSPO}, FIRST, threads=2),
    "precision": Study(
        "the main job in other precisions", "",
        {name: f"--{name}" for name in ("sampler bfloat16", "sampler int8", "dtype bfloat16")},
        range(3), threads=2),
    "fresh": Study("Countdown, 4 updates a rollout", COUNTDOWN, WITH_R3, FIRST),
    "stale": Study(
        "Countdown, 32 updates a rollout", STALE,
        WITH_R3 | HALVES | {"gspo, r3": f"{GSPO} --routing_replay r3", "reinforce": REINFORCE},
        FIRST),
    "stale, dense": Study(
        "the same with a dense model", f"{STALE} --n_expert 1 --n_active 1 --d_expert 128",
        BOTH, FIRST),
    "stale, 32 experts": Study(
        "the same, 8 of 32 experts active", f"{STALE} --n_expert 32 --n_active 8 --d_expert 16",
        WITH_R3, FIRST),
    "stale, searched": Study(
        "the same, each at the rate that a search on seed 5 chose", STALE,
        {"gspo": f"{GSPO} --lr 7.5e-5", "grpo": f"{GRPO} --lr 4e-5"}, FIRST),
    "rates": Study(
        "the same over the learning rate", f"{STALE} --steps 80 --eval_every 20 {MANY}",
        each(BOTH, "lr", "3e-5", "8e-5", "2.2e-4", "6e-4"), NEW),
    "stale, arithmetic": Study(
        "arithmetic, 32 updates a rollout", f"{ARITHMETIC} --mini_batches 16 --epochs 2 {MANY}",
        WITH_WIDE, NEW),
    "ranges": Study(
        "arithmetic, 4 updates, over the clip range", f"{ARITHMETIC} {MANY}",
        {"gspo, 3e-4": f"{GSPO} --clip_low 3e-4 --clip_high 4e-4", "gspo, 3e-3": GSPO,
         "gspo, 1e-2": f"{GSPO} --clip_low 1e-2 --clip_high 1.3e-2", "gspo, 3e-2": WIDE,
         "grpo, 0.2": GRPO}, NEW),
    "random rewards": Study(
        "arithmetic, rewards drawn at random", f"{ARITHMETIC} {MANY} --random_rewards", BOTH, NEW),
    "noise": Study(
        "arithmetic, noise of mean 1 on w", ARITHMETIC,
        BOTH | {"reinforce": REINFORCE} | each(BOTH, "noise", "1", "2", "4"), FIRST),
    "centred noise": Study(
        "arithmetic, noise of mean 0 on log w", f"{ARITHMETIC} --centred",
        each(BOTH, "noise", "1", "2", "4") | FITTED | each(HALVES | DUAL_CLIP, "noise", "4"),
        FIRST),
    "dual clip": Study(
        "arithmetic, noise of mean 1 on w, GRPO as verl has it", f"{ARITHMETIC} {MANY}",
        each(BOTH | DUAL_CLIP, "noise", "2", "4"), NEW),
    "common noise": Study(
        "arithmetic, noise that all tokens of a response share",
        f"{ARITHMETIC} --common_noise 1 --centred", BOTH, FIRST),
    "int8": Study("arithmetic, a sampler in int8", f"{ARITHMETIC} --sampler int8", BOTH, FIRST),
    "int4": Study("arithmetic, one in int4", f"{ARITHMETIC} --sampler int4", WITH_WIDE, FIRST),
    "int4, recomputed": Study(
        "the same, log-probs scored again", f"{ARITHMETIC} --sampler int4 --recompute_logp_old",
        BOTH, FIRST),
    "int4, TIS": Study(
        "the same, corrected", f"{ARITHMETIC} --sampler int4 --correction tis",
        {"gspo_token": "--algorithm gspo_token"}, FIRST),
    "int4, ranges": Study(
        "arithmetic, one in int4, three ranges each", f"{ARITHMETIC} {MANY} --sampler int4",
        {"gspo, 3e-3": GSPO, "gspo, 3e-2": WIDE,
         "gspo, 1e-1": f"{GSPO} --clip_low 0.1 --clip_high 0.13",
         "grpo, 0.05": f"{GRPO} --clip_low 0.05 --clip_high 0.065", "grpo, 0.2": GRPO,
         "grpo, 0.4": f"{GRPO} --clip_low 0.4 --clip_high 0.5"}, NEW),
    "lag": Study("arithmetic, one 8 rollouts old", f"{ARITHMETIC} --lag 8", WITH_WIDE, FIRST),
    "lag, Countdown": Study("Countdown, one 16 rollouts old", f"{COUNTDOWN} --lag 16", WITH_WIDE,
                            FIRST),
    "length": Study(
        "one to five digits, with and without 1/|y|",
        f"--queries uniform {FIVE_DIGITS} --steps 100 --eval_every 50",
        LENGTH | each(LENGTH, "lr", "6e-4") | {"dr_grpo": "--algorithm dr_grpo"}, FIRST),
}


# ---------------------------------------------------------------------------- making them

def command(name: str, arm: str, seed: int) -> list[str]:
    """What to give to python."""
    study = STUDIES[name]
    words = f"{study.options} {study.arms[arm]} --threads {study.threads} --seed {seed}".split()
    not_in_train = {"--noise", "--common_noise", "--final_samples", *DUAL_CLIP, *HALVES, *LENGTH}
    instruments = (not_in_train - set(BOTH)) & set(words)
    program = ["-m", "lab.study.instruments"] if instruments else ["train.py"]
    return [*program, *words]


def shell(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()


def commit() -> str:
    """The commit that runs; a checkout that differs from it, results/ aside, is refused."""
    if shell("git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":!results"):
        sys.exit("study: the code is not committed; commit it first, so that the rows can say what "
                 "made them")
    return shell("git", "rev-parse", "--short", "HEAD")


def machine(threads: int) -> str:
    """The processor, as a reader can compare it; no names, no paths."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(": ")[1]
    return f"{model}, {threads} thread{'s' if threads > 1 else ''}"


def make(name: str, arm: str, seed: int) -> tuple[pd.DataFrame, pd.DataFrame] | None:
    """Make a run, or what is left of it -> its row of RUNS, and its rows of CURVES; None if it
    fails."""
    out = Path("out/study", f"{name} {arm} {seed}".replace(",", "").replace(" ", "-"))
    words = command(name, arm, seed)
    row = dict(zip(KEYS, (name, arm, seed))) | {
        "command": " ".join(["python", *words]), "commit": commit(),
        "machine": machine(STUDIES[name].threads)}
    resume = ["--resume"] if (out / "checkpoint.pt").exists() else []
    if not (out / "summary.json").exists():
        made = subprocess.run([sys.executable, *words, *resume, "--out", str(out)],
                              capture_output=True, text=True)
        if made.returncode:
            print(f"{out}: {made.stderr}", flush=True)
            return None
    return rows_of(out, row)


def rows_of(out: Path, row: dict) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What a finished run leaves. Its metrics are means over the RL steps; those of ratios and
    clipping over the mini-batches after a step's first one, in which nothing has moved yet."""
    summary = json.loads((out / "summary.json").read_text())
    measures = summary.pop("measures")
    before = summary.pop("measures_cold_start")
    row |= summary | measures | {f"{key}_cold_start": value for key, value in before.items()}
    steps = pd.read_csv(out / "metrics.csv")
    row |= steps.drop(columns=["step", "accuracy", "accuracy_greedy", "seconds"]).mean().to_dict()
    updates = pd.read_csv(out / "updates.csv")
    row |= updates.loc[updates.mini_batch > 0, LATER].mean().to_dict()
    of_kinds = pd.read_csv(out / "evaluations.csv")
    of_all = steps[["step", "accuracy"]].dropna()
    of_all.loc[-1] = [0, summary["accuracy_cold_start"]]
    curve = pd.concat([of_all.assign(kind="all"), of_kinds[of_kinds.kind != "all"]]).sort_values("step")
    for key in reversed(KEYS):
        curve.insert(0, key, row[key])
    return pd.DataFrame([row]).dropna(axis="columns"), curve


def add(path: Path, rows: pd.DataFrame):
    """Append rows to a table, whole or not at all."""
    table = pd.concat([pd.read_csv(path), rows]) if path.exists() else rows
    table.to_csv(f"{path}.part", index=False, float_format="%.5g")
    os.replace(f"{path}.part", path)


def missing(name: str) -> list[tuple]:
    """(name, arm, seed) of all runs of a study that have no row yet. Neighbours differ in the seed:
    two at a time do not make the same cold start twice."""
    done = set()
    if RUNS.exists():
        done = set(pd.read_csv(RUNS)[KEYS].itertuples(index=False, name=None))
    runs = itertools.product([name], STUDIES[name].arms, STUDIES[name].seeds)
    return [run for run in runs if run not in done]


def main(names: list[str]):
    unknown = set(names) - set(STUDIES)
    if unknown:
        sys.exit(f"study: {', '.join(sorted(unknown))}: no such study; without a name you see all")
    if not names:
        for name, study in STUDIES.items():
            print(f"{name}: {len(missing(name))} runs are missing ({study.about})")
    for name in names:
        runs = missing(name)
        began = time.time()
        with ThreadPoolExecutor(2 // STUDIES[name].threads) as pool:
            for i, made in enumerate(pool.map(lambda run: make(*run), runs), start=1):
                left = (time.time() - began) / i * (len(runs) - i)
                print(f"{i} of {len(runs)}: {runs[i - 1]}   {clock(left)} left", flush=True)
                if made is not None:
                    add(RUNS, made[0])
                    add(CURVES, made[1])


if __name__ == "__main__":
    main(sys.argv[1:])
