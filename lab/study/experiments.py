"""Run the settings and experiments of plan.py, with several seeds.

    python -m lab.study.experiments                  how many runs of each are missing
    python -m lab.study.experiments NAME ...         run what is missing of these; `all`: of all
    python -m lab.study.experiments --table          print the tables and the comparisons
    python -m lab.study.experiments --draw           draw all figures, from the tables alone

A run of a setting takes up to 17 minutes. It adds a row to results/runs.csv, and its held-out
evaluations to evaluations.csv. A run of an experiment adds a row to evidence.csv, and its held-out
accuracies to evidence-curves.csv. A run that was killed goes on, as with --resume.
"""
import csv
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lab.report import clock, read_table
from lab.study import figures, tables
from lab.study.plan import (COMPARED, CURVES, EVALUATIONS, EVIDENCE, EXPERIMENTS, RUNS, SETTINGS,
                            command, folder_of, mean_of, read)

# Means of metrics.csv over the RL steps, and of updates.csv over the mini-batches after a step's
# first one, in which nothing has moved yet.
MEANS = ["reward", "clip_low", "clip_high", "log_s_std", "log_w_std", "outliers", "kl",
         "expert_change", "mismatch_mean", "mismatch_max", "mismatch_kl", "mismatch_experts",
         "seconds", "seconds_rescoring"]
MEANS_LATER = ["log_w_std", "log_s_std", "log_s_mean", "outliers", "clip_low", "clip_high"]


def shell(*words):
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()


def commit_of_code():
    """The commit of the checkout, with "-dirty" if anything but results/ differs from it."""
    changed = shell("git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":!results")
    return shell("git", "rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")


def machine(n_threads=2):
    """The processor, as a reader can compare it; no names, no paths."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(": ")[1]
    return f"{model}, {n_threads} thread{'s' if n_threads > 1 else ''}"


def append(path, new_rows):
    """Add rows to a table, in place of those that it has of the same runs."""
    keys = [key for key in ("setting", "experiment", "regime", "arm", "seed") if key in new_rows[0]]

    def run_of(row):
        return tuple(str(row[key]) for key in keys)
    new_runs = set(map(run_of, new_rows))
    rows = [*(row for row in read(path) if run_of(row) not in new_runs), *new_rows]
    columns = dict.fromkeys(itertools.chain(*rows))
    with open(f"{path}.part", "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    os.replace(f"{path}.part", path)


def rounded(row):
    """A row with its floats to four digits."""
    return {column: f"{value:.4g}" if isinstance(value, float) else value
            for column, value in row.items()}


def make_run(arguments, out, **options):
    """Make a run in `out`, or what is left of it, unless it is complete -> the commit that made it;
    several, joined by "+", if the code changed on the way."""
    note = out.with_name(f"{out.name}.commit")      # beside the folder, which must begin empty
    # Without a checkpoint nothing is left of an earlier try, whatever the note says.
    begun = (out / "checkpoint.pt").exists()
    commits = []
    if begun:
        commits = note.read_text().split("+") if note.exists() else ["unknown"]
    if (out / "summary.json").exists():
        return "+".join(commits)
    commit = commit_of_code()       # asked for each run: the process that makes it reads the code
    if commit not in commits:
        commits.append(commit)
    out.parent.mkdir(parents=True, exist_ok=True)
    note.write_text("+".join(commits))
    resume = ["--resume"] if begun else []
    subprocess.run([sys.executable, *arguments, *resume, "--out", str(out)], check=True, **options)
    return "+".join(commits)


def after_first_mini_batch(updates):
    """The rows of updates.csv without those of a step's first mini-batch."""
    return [row for row in updates if row["mini_batch"] != "0"]


# ---------------------------------------------------------------------------- settings

def later(out):
    """Of a run: the means MEANS_LATER, and of expert_change in each layer, over the compared
    steps."""
    compared = [row for row in read_table(out / "updates.csv") if int(row["step"]) <= COMPARED]
    rows = after_first_mini_batch(compared)
    columns = [column for column in (rows[0] if rows else ())
               if column in MEANS_LATER or column.startswith("expert_change_")]
    return {f"{column}_later_{COMPARED}": mean_of(rows, column) for column in columns}


def run_setting(name, options, seed):
    """Make one run. Then add its evaluations to their table, and its row to the other: its summary,
    and means over the compared steps (all, of a shorter run)."""
    out = Path("out") / f"{''.join(filter(str.isalnum, name))}-{seed}"
    arguments = ["train.py", *options, "--seed", str(seed)]
    commit = make_run(arguments, out)
    every_step = read_table(out / "metrics.csv")
    compared = every_step[:COMPARED]
    row = {"setting": name, "seed": seed, "command": "python " + " ".join(arguments),
           "commit": commit, "machine": machine()}
    summary = json.loads((out / "summary.json").read_text())
    row |= summary.pop("measures")
    row |= {f"{column}_cold_start": value
            for column, value in summary.pop("measures_cold_start").items()}
    row |= summary
    row["reward_last_50"] = mean_of(every_step[-50:], "reward")
    row[f"accuracy_{COMPARED}"] = compared[-1]["accuracy"]
    for column in MEANS:
        if any(step[column] for step in compared):
            row[f"{column}_{COMPARED}"] = mean_of(compared, column)
    evaluations = [{"setting": name, "seed": seed} | evaluated
                   for evaluated in read_table(out / "evaluations.csv")]
    last = [float(evaluated["accuracy"]) for evaluated in evaluations
            if evaluated["step"] == evaluations[-1]["step"]]
    row["accuracy_weakest_kind"] = min(last)
    append(EVALUATIONS, evaluations)
    append(RUNS, [row | later(out)])


def missing_seeds(name):
    """Of a setting: the seeds that have no row yet."""
    done = {row["seed"] for row in read(RUNS) if row["setting"] == name}
    return [seed for seed in SETTINGS[name][1] if str(seed) not in done]


# ---------------------------------------------------------------------------- experiments

def missing_runs(name):
    """Of an experiment: (name, arm, seed) of all runs that have no row yet. With several seeds,
    neighbours differ in them: two runs at a time do not make the same cold start twice. (With one
    they do, which costs time only.)"""
    present = {(row["experiment"], row["arm"], row["seed"]) for row in read(EVIDENCE)}
    experiment = EXPERIMENTS[name]
    return [(name, arm, seed) for arm, seed in itertools.product(experiment.arms, experiment.seeds)
            if (name, arm, str(seed)) not in present]


def by_digits(evaluations):
    """Rows of a run's evaluations.csv -> {"accuracy_3": held-out accuracy at the end on problems of
    three digits, ...}, by the digits that end a kind such as "+3". Empty for other tasks."""
    found = {}
    for row in evaluations:
        digits = row["kind"][1:]
        if row["step"] == evaluations[-1]["step"] and digits.isdigit():
            found.setdefault(f"accuracy_{digits}", []).append(float(row["accuracy"]))
    return {column: statistics.fmean(values) for column, values in found.items()}


def rows_of(out, name, arm, seed, commit):
    """What a finished run in `out` leaves: a row of EVIDENCE, and rows of CURVES."""
    summary = json.loads((out / "summary.json").read_text())
    steps = read_table(out / "metrics.csv")
    row = {"experiment": name, "arm": arm, "seed": seed,
           "command": "python " + " ".join(command(name, arm, seed)), "commit": commit,
           "machine": machine(n_threads=1), "steps": len(steps),
           "accuracy_cold_start": summary["accuracy_cold_start"], "accuracy": summary["accuracy"],
           "accuracy_greedy": summary["accuracy_greedy"]}
    row |= {column: mean_of(steps, column) for column in ("reward", "length")}
    later_ones = after_first_mini_batch(read_table(out / "updates.csv"))
    row |= {column: mean_of(later_ones, column) for column in MEANS_LATER}
    # kl and expert_change, which metrics.csv has, are means over all mini-batches.
    row |= {column: mean_of(steps, column) for column in ("kl", "expert_change")}
    row["seconds_rl"] = summary["seconds_rl"]
    row |= {column: mean_of(steps, column) for column in ("length_right", "length_wrong")}
    row |= by_digits(read_table(out / "evaluations.csv"))
    accuracies = [(0, summary["accuracy_cold_start"])]
    accuracies += [(step["step"], float(step["accuracy"])) for step in steps if step["accuracy"]]
    curves = [{"experiment": name, "arm": arm, "seed": seed, "step": step,
               "accuracy": f"{accuracy:.4f}"} for step, accuracy in accuracies]
    return rounded(row), curves


def run(name, arm, seed):
    """Make a run, or what is left of it -> what rows_of gives; None if it failed."""
    out = folder_of("evidence", name, arm, seed)
    try:
        commit = make_run(command(name, arm, seed), out, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        print(f"{name}: {arm}, seed {seed}: {error}\n{error.stderr}", flush=True)
        return None
    return rows_of(out, name, arm, seed, commit)


def run_two_at_a_time(runs):
    """Make the runs (name, arm, seed) of a list."""
    began = time.time()
    with ThreadPoolExecutor(2) as pool:
        results = pool.map(lambda job: run(*job), runs)
        for i, result in enumerate(results, start=1):
            if result is None:
                continue
            row, curves = result
            append(CURVES, curves)
            append(EVIDENCE, [row])
            left = (time.time() - began) / i * (len(runs) - i)
            print(f"{i} of {len(runs)}: {row['experiment']}: {row['arm']}, seed {row['seed']}: "
                  f"{row['accuracy']}   {clock(left)} left", flush=True)


# ---------------------------------------------------------------------------- the command line

def show_missing():
    print("settings, one run at a time, two threads:")
    for name in SETTINGS:
        print(f"  {name}: {len(missing_seeds(name))} runs are missing")
    print("experiments, two runs at a time, one thread each:")
    for name, experiment in EXPERIMENTS.items():
        print(f"  {name}: {len(missing_runs(name))} runs are missing ({experiment.about})")


def main(words):
    unknown = set(words) - {*SETTINGS, *EXPERIMENTS, "all", "--table", "--draw"}
    if unknown:
        sys.exit(f"experiments: {', '.join(sorted(unknown))}: no such setting or experiment; "
                 "without a name you see all")
    if "--table" in words:
        tables.print_all()
    if "--draw" in words:
        figures.draw_all()
    if "--table" in words or "--draw" in words:
        return
    if not words:
        return show_missing()
    runs = []
    for name in EXPERIMENTS:
        if name in words or "all" in words:
            runs += missing_runs(name)
    run_two_at_a_time(runs)
    for name, (options, _) in SETTINGS.items():
        if name in words or "all" in words:
            for seed in missing_seeds(name):
                run_setting(name, options, seed)


if __name__ == "__main__":
    main(sys.argv[1:])
