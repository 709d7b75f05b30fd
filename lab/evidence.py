"""When does GSPO pay? Experiments with several seeds, their rows and their figures.

    python -m lab.evidence                 what there is, what is missing, and how long it may take
    python -m lab.evidence NAME ...        run what is missing of these experiments; `all`: of all
    python -m lab.evidence --draw          draw all figures, from the tables alone
    python -m lab.evidence --table         print the tables of results/README.md

Two runs at a time, of one thread each. When a run ends, a row is added to results/evidence.csv, and
its held-out accuracies to results/evidence-curves.csv. A run that was killed is begun anew. The
arms of an experiment share one cold start for each seed and get the same problems (--queries
uniform), so they can be compared in pairs. The last accuracy counts, not the best. A run has
collapsed if it ends below the accuracy of its cold start.
"""
import itertools
import json
import shutil
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
RANGES = {
    "gspo, 1e-3": f"{GSPO} --clip_low 1e-3 --clip_high 1.3e-3",
    "gspo, 3e-3": GSPO,
    "gspo, 1e-2": f"{GSPO} --clip_low 1e-2 --clip_high 1.3e-2",
    "gspo, 3e-2": f"{GSPO} --clip_low 3e-2 --clip_high 4e-2",
    "grpo, 0.1": f"{GRPO} --clip_low 0.1 --clip_high 0.13",
    "grpo, 0.2": GRPO,
    "grpo, 0.4": f"{GRPO} --clip_low 0.4 --clip_high 0.5",
    "grpo, no clip": f"{GRPO} --clip_low 1 --clip_high 100",
}
RATES = ("1.5e-4", "3e-4", "6e-4")
SEARCHED = {f"{name}, lr {lr}": f"{options} --lr {lr}"
            for lr in RATES for name, options in RANGES.items()}
METHODS = {"gspo": GSPO, "grpo": GRPO, "grpo, r3": f"{GRPO} --routing_replay r3"}
NOISE_METHODS = {
    "gspo": GSPO,
    "grpo": GRPO,
    "grpo_dual_clip": "--algorithm grpo_dual_clip",
    "gate_of_gspo": "--algorithm gate_of_gspo",
    "gate_of_grpo": "--algorithm gate_of_grpo",
}
SIGMAS = ("0", "1", "2", "4")
# REINFORCE reads no stored log-prob: noise changes nothing.
NOISE = {"reinforce, noise 0": "--noise 0 --algorithm reinforce --scale std"}
NOISE |= {f"{name}, noise {sigma}": f"--noise {sigma} {options}"
          for sigma in SIGMAS for name, options in NOISE_METHODS.items()}

EXPERIMENTS = {
    "search, stale": Experiment(
        "Countdown, 16 mini-batches for 2 epochs: learning rates and clip ranges, on a seed that no "
        "verdict uses", f"{COUNTDOWN} --steps 80 --eval_every 20 {STALE}", SEARCHED, [5]),
    "stale": Experiment(
        "Countdown, 16 mini-batches for 2 epochs", f"{COUNTDOWN} {HUNDRED} {STALE}", METHODS,
        range(5)),
    "fresh": Experiment(
        "Countdown as it comes, 4 mini-batches", f"{COUNTDOWN} {HUNDRED}", METHODS, range(5)),
    "noise": Experiment(
        "arithmetic, with noise of mean one on the ratios", ARITHMETIC, NOISE, range(5)),
}


def command(name, arm, seed):
    """What to give to python."""
    experiment = EXPERIMENTS[name]
    arguments = f"{experiment.options} {experiment.arms[arm]} --threads 1 --seed {seed}".split()
    instruments = "noise" in arm
    return ["-m", "lab.instruments", *arguments] if instruments else ["train.py", *arguments]


def folder(name, arm, seed):
    return Path("out/evidence") / "".join(c for c in f"{name} {arm} {seed}" if c not in ", ")


def missing(name):
    """(arm, seed) of all runs of an experiment that have no row yet. Neighbours have different
    seeds: two runs at a time do not make the same cold start twice."""
    done = {(row["experiment"], row["arm"], row["seed"]) for row in read(TABLE)}
    experiment = EXPERIMENTS[name]
    return [(arm, seed) for arm, seed in itertools.product(experiment.arms, experiment.seeds)
            if (name, arm, str(seed)) not in done]


# ---------------------------------------------------------------------------- running

LATER = ("log_w_std", "log_s_std", "log_s_mean", "outliers", "clip_low", "clip_high")


def rows_of(out, name, arm, seed, commit, where):
    """What a finished run in `out` leaves: a row of TABLE, and rows of CURVES."""
    summary = json.loads((out / "summary.json").read_text())
    steps = read_table(out / "metrics.csv")
    updates = read_table(out / "updates.csv")
    # In the first mini-batch of a step nothing has moved yet.
    later = [row for row in updates if row["mini_batch"] != "0"]
    row = {"experiment": name, "arm": arm, "seed": seed,
           "command": "python " + " ".join(command(name, arm, seed)), "commit": commit,
           "machine": where, "steps": len(steps),
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
    out = folder(name, arm, seed)
    if not (out / "summary.json").exists():
        shutil.rmtree(out, ignore_errors=True)
        done = subprocess.run([sys.executable, *command(name, arm, seed), "--out", str(out)],
                              capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"evidence: {name}, {arm}, seed {seed}: {done.stderr}")
    return rows_of(out, name, arm, seed, commit, machine().replace("2 threads", "1 thread"))


def run_all(names):
    commit = shell("git", "describe", "--always", "--dirty", "--exclude", "*")
    todo = [(name, arm, seed) for name in names for arm, seed in missing(name)]
    began = time.time()
    with ThreadPoolExecutor(2) as pool:
        results = pool.map(lambda job: run(*job, commit), todo)
        for done, (row, curves) in enumerate(results, start=1):
            append(TABLE, [row])
            append(CURVES, curves)
            left = (time.time() - began) / done * (len(todo) - done)
            print(f"{done} of {len(todo)}: {row['experiment']}: {row['arm']}, seed {row['seed']}: "
                  f"{row['accuracy']}   {clock(left)} left", flush=True)


# ---------------------------------------------------------------------------- comparing

def endings(name, arm):
    """{seed: held-out accuracy at the end}"""
    return {row["seed"]: float(row["accuracy"]) for row in read(TABLE)
            if row["experiment"] == name and row["arm"] == arm}


def paired(name, arm, other):
    """How far an arm ends above another, in pairs of seeds -> mean, standard error, number of
    seeds on which it is above, number of pairs."""
    mine = endings(name, arm)
    theirs = endings(name, other)
    differences = [mine[seed] - theirs[seed] for seed in mine if seed in theirs]
    error = statistics.stdev(differences) / len(differences) ** 0.5
    above = sum(difference > 0 for difference in differences)
    return statistics.fmean(differences), error, above, len(differences)


# Student's t beyond which a difference of so many pairs is significant at 5 %, two-sided.
CRITICAL_T = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}


def interval(values):
    """Bounds of the mean: the middle 95 % of the means of all resamples with replacement."""
    means = sorted(statistics.fmean(sample)
                   for sample in itertools.product(values, repeat=len(values)))
    margin = int(0.025 * len(means))
    return means[margin], means[-1 - margin]


def print_tables():
    columns = ("accuracy", "reward", "log_w_std", "log_s_std", "log_s_mean", "clip_low",
               "clip_high", "kl", "expert_change", "length")
    for name in EXPERIMENTS:
        rows = [row for row in read(TABLE) if row["experiment"] == name]
        print(f"\n{name}: {EXPERIMENTS[name].about}\n")
        print("| arm | seeds |", " | ".join(columns), "| collapsed |")
        print("|---|" + "---|" * (len(columns) + 2))
        for arm in EXPERIMENTS[name].arms:
            of_arm = [row for row in rows if row["arm"] == arm]
            if not of_arm:
                continue
            cells = [f"{mean_of(of_arm, column):.3g}" for column in columns]
            each = " ".join(row["accuracy"] for row in sorted(of_arm, key=lambda r: r["seed"]))
            collapsed = sum(float(row["accuracy"]) < float(row["accuracy_cold_start"])
                            for row in of_arm)
            print(f"| {arm} | {each} |", " | ".join(cells), f"| {collapsed} of {len(of_arm)} |")


def main(names):
    unknown = set(names) - {*EXPERIMENTS, "all", "--table"}
    if unknown:
        sys.exit(f"evidence: {', '.join(unknown)}: no such experiment; there are "
                 f"{', '.join(EXPERIMENTS)}")
    if "--table" in names:
        print_tables()
    elif names:
        run_all(EXPERIMENTS if "all" in names else names)
    else:
        for name in EXPERIMENTS:
            print(f"{name}: {len(missing(name))} runs are missing")


if __name__ == "__main__":
    main(sys.argv[1:])
