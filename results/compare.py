"""Run several settings with several seeds; results/runs.csv gets a row for every run.

    python results/compare.py                  run what is missing, 2 to 8 minutes a run, then:
    python results/compare.py "GSPO, prompts once"          only this setting, or several
    python results/compare.py --table          print runs.csv: mean and standard deviation

A seed's cold start is made once and shared by the settings, so that they differ in nothing but what
their row says. The first three are compared by their first 200 RL steps. The objectives and the
ways of routing ran with one seed, to see that they train and what they do: that is no ranking.
"""
import csv
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

COMPARED = 200      # RL steps
SHORT = ["--steps", str(COMPARED)]
# name: options, seeds
SETTINGS = {
    "GSPO": ([], range(5)),
    "GSPO, the paper's clip range": (
        ["--clip_low", "3e-4", "--clip_high", "4e-4", *SHORT], range(5)),
    "GRPO": (["--algorithm", "grpo", *SHORT], range(5)),
    **{f"replay {algorithm} {kind}": (
        ["--algorithm", algorithm, "--routing_replay", kind, *SHORT], [0])
       for algorithm in ("gspo", "grpo") for kind in ("none", "r2", "r3")},
    # The main job again, since padding is no longer computed.
    "GSPO, faster code": ([], range(3)),
    # And again, since a group's prompt is computed once in an update. The row "GSPO, before prompts
    # once" of runs.csv is the same command in a checkout of its commit, on the same day.
    "GSPO, prompts once": ([], [0]),
    # Every objective, to the end of the main job; its clip range is that of its paper.
    **{f"objective {name}": (["--algorithm", name], [0]) for name in (
        "gspo", "gspo_token", "grpo", "ppo", "dr_grpo", "dapo", "cispo", "gmpo", "sapo", "luspo",
        "reinforce")},
    "objective reinforce, on-policy": (["--algorithm", "reinforce", "--mini_batches", "1"], [0]),
    "objective dapo, dynamic sampling, overlong": (
        ["--algorithm", "dapo", "--dynamic_sampling", "--overlong", "16", *SHORT], [0]),
}
TABLE = Path(__file__).parent / "runs.csv"
MEANS = ["reward", "clip_low", "clip_high", "log_s_std", "log_w_std", "outliers", "kl",
         "expert_change", "seconds", "seconds_rescoring"]


def shell(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def machine():
    """Processor and cores, as a reader can compare them; no names, no paths."""
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [line.split(": ")[1] for line in Path("/proc/cpuinfo").read_text().splitlines()
                 if line.startswith("model name")]
        model = names[0] if names else model
    return f"{model}, 2 threads"


def later(out):
    """Means over the mini-batches after the first of a step: in that one nothing has moved yet."""
    with open(out / "updates.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file)
                if int(row["step"]) <= COMPARED and row["mini_batch"] != "0"]
    columns = [column for column in (rows[0] if rows else ()) if column in
               ("log_w_std", "log_s_std", "outliers", "clip_low", "clip_high")
               or column.startswith("expert_change_")]
    return {f"{column}_later_{COMPARED}": statistics.fmean(float(row[column]) for row in rows)
            for column in columns}


def measure(name, options, seed, commit):
    """One run -> its row: its summary, and the compared steps' accuracy, reward and metrics."""
    out = Path("out") / f"{''.join(c for c in name if c.isalnum())}-{seed}"
    command = ["train.py", *options, "--seed", str(seed)]
    if not (out / "summary.json").exists():
        goes_on = ["--resume"] if (out / "checkpoint.pt").exists() else []
        subprocess.run([sys.executable, *command, *goes_on, "--out", str(out)], check=True)
    with open(out / "metrics.csv", newline="") as file:
        every = list(csv.DictReader(file))
    steps = every[:COMPARED]
    means = {column: statistics.fmean(float(row[column]) for row in steps if row[column])
             for column in MEANS if any(row[column] for row in steps)}
    return {"setting": name, "seed": seed, "command": "python " + " ".join(command),
            "commit": commit, "machine": machine(),
            **json.loads((out / "summary.json").read_text()),
            "reward_last_50": statistics.fmean(float(row["reward"]) for row in every[-50:]),
            f"accuracy_{COMPARED}": steps[-1]["accuracy"],
            **{f"{column}_{COMPARED}": mean for column, mean in means.items()}, **later(out)}


def read():
    if not TABLE.exists():
        return []
    with open(TABLE, newline="") as file:
        return list(csv.DictReader(file))


def print_table():
    columns = ["accuracy_cold_start", "accuracy", "accuracy_greedy", "reward_last_50",
               "think_share", "seconds",
               *(f"{column}_{COMPARED}" for column in ("accuracy", *MEANS))]
    print("| setting |", " | ".join(columns), "|")
    print("|---|" + "---|" * len(columns))
    for name in dict.fromkeys(row["setting"] for row in read()):
        rows, cells = [row for row in read() if row["setting"] == name], []
        for column in columns:
            values = [float(row[column]) for row in rows if row.get(column)]
            spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.4g}{spread}" if values else "")
        print(f"| {name} ({len(rows)} seeds) |", " | ".join(cells), "|")


def main():
    if unknown := set(sys.argv[1:]) - set(SETTINGS):
        sys.exit(f"compare.py: {', '.join(unknown)}: no such setting; see SETTINGS")
    # Asked once: the table that is written makes the checkout dirty.
    commit = shell("git", "describe", "--always", "--dirty", "--exclude", "*")
    for name, (options, seeds) in SETTINGS.items():
        for seed in seeds if name in sys.argv[1:] or not sys.argv[1:] else ():
            rows = read()
            if any(row["setting"] == name and row["seed"] == str(seed) for row in rows):
                continue
            rows.append(measure(name, options, seed, commit))
            with open(f"{TABLE}.part", "w", newline="") as file:
                writer = csv.DictWriter(file, dict.fromkeys(key for row in rows for key in row))
                writer.writeheader()
                writer.writerows(rows)
            os.replace(f"{TABLE}.part", TABLE)


if __name__ == "__main__":
    if "--table" not in sys.argv:
        main()
    print_table()
