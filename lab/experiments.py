"""Run several settings with several seeds; results/runs.csv gets a row for every run.

    python -m lab.experiments                  run what is missing, 2 to 8 minutes a run, then:
    python -m lab.experiments --table          print the table: mean and standard deviation
    python -m lab.experiments "GSPO, plain code"        run only this setting, or several

A seed's cold start is made once and shared by the settings, so that they differ in nothing but what
their row says. The first three settings are compared by their first 200 RL steps. The objectives
and the kinds of routing replay ran with one seed, which shows that they train and what they do; it
ranks nothing.
"""
import csv
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

from lab.report import read_table

COMPARED = 200      # RL steps
SHORT = ["--steps", str(COMPARED)]
OBJECTIVES = ("gspo", "gspo_token", "grpo", "ppo", "dr_grpo", "dapo", "cispo", "gmpo", "sapo",
              "luspo", "reinforce")
# name: options, seeds
SETTINGS = {
    "GSPO": ([], range(5)),
    "GSPO, the paper's clip range": (
        ["--clip_low", "3e-4", "--clip_high", "4e-4", *SHORT], range(5)),
    "GRPO": (["--algorithm", "grpo", *SHORT], range(5)),
    # The main job again, since the model is plain code: what the README shows.
    "GSPO, plain code": ([], range(3)),
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
TABLE = Path(__file__).parent.parent / "results" / "runs.csv"
MEANS = ["reward", "clip_low", "clip_high", "log_s_std", "log_w_std", "outliers", "kl",
         "expert_change", "seconds", "seconds_rescoring"]


def shell(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def machine():
    """The processor, as a reader can compare it; no names, no paths."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.split(': ')[1]}, 2 threads"
    return f"{platform.processor() or platform.machine()}, 2 threads"


def mean_of(rows, column):
    return statistics.fmean(float(row[column]) for row in rows if row[column])


def later(out):
    """Means over the mini-batches after the first of a step: in the first nothing has moved yet."""
    rows = [row for row in read_table(out / "updates.csv")
            if int(row["step"]) <= COMPARED and row["mini_batch"] != "0"]
    chosen = ("log_w_std", "log_s_std", "outliers", "clip_low", "clip_high")
    columns = [column for column in (rows[0] if rows else ())
               if column in chosen or column.startswith("expert_change_")]
    return {f"{column}_later_{COMPARED}": mean_of(rows, column) for column in columns}


def measure(name, options, seed, commit):
    """One run -> its row: its summary, and the compared steps' accuracy, reward and metrics."""
    out = Path("out") / f"{''.join(filter(str.isalnum, name))}-{seed}"
    command = ["train.py", *options, "--seed", str(seed)]
    if not (out / "summary.json").exists():
        resume = ["--resume"] if (out / "checkpoint.pt").exists() else []
        subprocess.run([sys.executable, *command, *resume, "--out", str(out)], check=True)
    every_step = read_table(out / "metrics.csv")
    compared = every_step[:COMPARED]
    row = {"setting": name, "seed": seed, "command": "python " + " ".join(command),
           "commit": commit, "machine": machine()}
    row |= json.loads((out / "summary.json").read_text())
    row["reward_last_50"] = mean_of(every_step[-50:], "reward")
    row[f"accuracy_{COMPARED}"] = compared[-1]["accuracy"]
    for column in MEANS:
        if any(step[column] for step in compared):
            row[f"{column}_{COMPARED}"] = mean_of(compared, column)
    return row | later(out)


def read():
    return read_table(TABLE) if TABLE.exists() else []


def append(row):
    rows = [*read(), row]
    columns = dict.fromkeys(key for row in rows for key in row)
    with open(f"{TABLE}.part", "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    os.replace(f"{TABLE}.part", TABLE)


def print_table():
    columns = ["accuracy_cold_start", "accuracy", "accuracy_greedy", "reward_last_50",
               "think_share", "seconds",
               *(f"{column}_{COMPARED}" for column in ("accuracy", *MEANS))]
    print("| setting |", " | ".join(columns), "|")
    print("|---|" + "---|" * len(columns))
    for name in dict.fromkeys(row["setting"] for row in read()):
        rows = [row for row in read() if row["setting"] == name]
        cells = []
        for column in columns:
            values = [float(row[column]) for row in rows if row.get(column)]
            spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.4g}{spread}" if values else "")
        print(f"| {name} ({len(rows)} seeds) |", " | ".join(cells), "|")


def main(names):
    unknown = set(names) - set(SETTINGS)
    if unknown:
        sys.exit(f"experiments: {', '.join(unknown)}: no such setting; see SETTINGS")
    # Asked once: the table that is written makes the checkout dirty.
    commit = shell("git", "describe", "--always", "--dirty", "--exclude", "*")
    for name in names or SETTINGS:
        options, seeds = SETTINGS[name]
        for seed in seeds:
            done = [row for row in read()
                    if row["setting"] == name and row["seed"] == str(seed)]
            if not done:
                append(measure(name, options, seed, commit))


if __name__ == "__main__":
    if "--table" not in sys.argv:
        main(sys.argv[1:])
    print_table()
