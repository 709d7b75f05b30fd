"""Run several settings with several seeds. A run adds a row to results/runs.csv, and its held-out
evaluations to results/evaluations.csv.

    python -m lab.experiments                  run what is missing, up to 17 minutes a run, then:
    python -m lab.experiments --table          print the table: mean and standard deviation
    python -m lab.experiments --figure         draw results/queries.png: adaptive beside uniform
    python -m lab.experiments "main job"       run only this setting, or several

Settings with the same model, task and cold-start options share one cold start for each seed, so
that they differ in nothing but what their row says. The objectives and the kinds of routing replay
ran with one seed: enough to show that they train, not to rank them. Training rewards are of the
problems asked: do not compare them between adaptive and uniform queries.
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
RESULTS = Path(__file__).parent.parent / "results"
TABLE = RESULTS / "runs.csv"
EVALUATIONS = RESULTS / "evaluations.csv"
MEANS = ["reward", "clip_low", "clip_high", "log_s_std", "log_w_std", "outliers", "kl",
         "expert_change", "mismatch_mean", "mismatch_max", "mismatch_kl", "mismatch_experts",
         "seconds", "seconds_rescoring"]


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
    """Make one run, unless it is in out/ already. Then append its evaluations to their table, and
    its row to the other: its summary, and means over the compared steps (all, of a shorter run).
    `commit` is that of the checkout."""
    out = Path("out") / f"{''.join(filter(str.isalnum, name))}-{seed}"
    command = ["train.py", *options, "--seed", str(seed)]
    if not (out / "summary.json").exists():
        resume = ["--resume"] if (out / "checkpoint.pt").exists() else []
        subprocess.run([sys.executable, *command, *resume, "--out", str(out)], check=True)
    every_step = read_table(out / "metrics.csv")
    compared = every_step[:COMPARED]
    row = {"setting": name, "seed": seed, "command": "python " + " ".join(command),
           "commit": commit, "machine": machine()}
    summary = json.loads((out / "summary.json").read_text())
    row |= summary.pop("measures")
    row |= {f"{name}_cold_start": value
            for name, value in summary.pop("measures_cold_start").items()}
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
    append(TABLE, [row | later(out)])


def read(path):
    return read_table(path) if path.exists() else []


def append(path, new_rows):
    rows = [*read(path), *new_rows]
    columns = dict.fromkeys(key for row in rows for key in row)
    with open(f"{path}.part", "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    os.replace(f"{path}.part", path)


def print_table():
    columns = ["accuracy_cold_start", "accuracy", "accuracy_greedy", "accuracy_weakest_kind",
               "reward_last_50", "think_share", "seconds",
               *(f"{column}_{COMPARED}" for column in ("accuracy", *MEANS))]
    print("| setting |", " | ".join(columns), "|")
    print("|---|" + "---|" * len(columns))
    for name in dict.fromkeys(row["setting"] for row in read(TABLE)):
        rows = [row for row in read(TABLE) if row["setting"] == name]
        cells = []
        for column in columns:
            values = [float(row[column]) for row in rows if row.get(column)]
            spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.4g}{spread}" if values else "")
        print(f"| {name} ({len(rows)} seeds) |", " | ".join(cells), "|")


def accuracies(setting, ending=None):
    """{step: {seed: mean held-out accuracy}} of a setting, over all kinds or those that end so."""
    found = {}
    for row in read(EVALUATIONS):
        if row["setting"] == setting and ending in (None, row["kind"][1:]):
            of_step = found.setdefault(int(row["step"]), {})
            of_step.setdefault(row["seed"], []).append(float(row["accuracy"]))
    return {step: {seed: statistics.fmean(values) for seed, values in of_step.items()}
            for step, of_step in found.items()}


def draw_queries():
    """results/queries.png: held-out accuracy with adaptive and with uniform queries, in the main
    job and with up to five digits; mean and range of the seeds."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    main = ("main job", "main job, uniform queries")
    five = ("queries, adaptive", "queries, uniform")
    plots = ((main, None, "main job"), (five, None, "1 to 5 digits"), (five, "4", "4 digits"),
             (five, "5", "5 digits"))
    figure, axes = plt.subplots(1, 4, figsize=(16, 3.5), layout="constrained")
    for axis, (settings, ending, title) in zip(axes, plots):
        for setting, label in zip(settings, ("adaptive", "uniform")):
            of_step = accuracies(setting, ending)
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


def main(names):
    unknown = set(names) - set(SETTINGS)
    if unknown:
        sys.exit(f"experiments: {', '.join(unknown)}: no such setting; see SETTINGS")
    # Asked once: the table that is written makes the checkout dirty.
    commit = shell("git", "describe", "--always", "--dirty", "--exclude", "*")
    for name in names or SETTINGS:
        options, seeds = SETTINGS[name]
        for seed in seeds:
            done = [row for row in read(TABLE)
                    if row["setting"] == name and row["seed"] == str(seed)]
            if not done:
                measure(name, options, seed, commit)


if __name__ == "__main__":
    if "--figure" in sys.argv:
        draw_queries()
    else:
        if "--table" not in sys.argv:
            main(sys.argv[1:])
        print_table()
