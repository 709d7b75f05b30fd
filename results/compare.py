"""Run several settings with several seeds; results/runs.csv gets a row for every run.

    python results/compare.py                  run what is missing (about 3 minutes a run), then:
    python results/compare.py --table          print runs.csv, mean and standard deviation by seeds

A seed's cold start is made once and shared by the settings: they differ in nothing but what their
row says.
"""
import csv
import json
import platform
import statistics
import subprocess
import sys
from pathlib import Path

SETTINGS = {
    "GSPO": [],
    "GSPO, the paper's clip range": ["--clip_low", "3e-4", "--clip_high", "4e-4"],
    "GRPO": ["--algorithm", "grpo"],
}
SEEDS = range(5)
TABLE = Path(__file__).parent / "runs.csv"
MEANS = ["clip_low", "clip_high", "log_s_std", "log_w_std", "outliers", "kl", "expert_change"]


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


def measure(name, options, seed):
    """One run -> its row: the summary, and the means of some metrics over all steps."""
    out = Path("out") / f"{''.join(c for c in name if c.isalnum())}-{seed}"
    command = ["train.py", *options, "--seed", str(seed), "--out", str(out)]
    if not (out / "summary.json").exists():
        subprocess.run([sys.executable, *command], check=True)
    with open(out / "metrics.csv", newline="") as file:
        steps = list(csv.DictReader(file))
    means = {column: statistics.fmean(float(row[column] or 0) for row in steps) for column in MEANS}
    return {"setting": name, "seed": seed, "command": "python " + " ".join(command[:-2]),
            "commit": shell("git", "rev-parse", "--short", "HEAD"), "machine": machine(),
            **json.loads((out / "summary.json").read_text()),
            "reward_first_100": statistics.fmean(float(row["reward"]) for row in steps[:100]),
            **means}


def read():
    if not TABLE.exists():
        return []
    with open(TABLE, newline="") as file:
        return list(csv.DictReader(file))


def print_table():
    columns = ["accuracy_cold_start", "accuracy", "accuracy_greedy", "think_share",
               "reward_first_100", "seconds", *MEANS]
    print("| setting |", " | ".join(columns), "|")
    print("|---|" + "---|" * len(columns))
    for name in dict.fromkeys(row["setting"] for row in read()):
        cells = []
        for column in columns:
            values = [float(row[column]) for row in read() if row["setting"] == name]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.fmean(values):.4g} ± {spread:.2g}")
        print(f"| {name} ({len(values)} seeds) |", " | ".join(cells), "|")


def main():
    for name, options in SETTINGS.items():
        for seed in SEEDS:
            rows = read()
            if any(row["setting"] == name and row["seed"] == str(seed) for row in rows):
                continue
            rows.append(measure(name, options, seed))
            with open(TABLE, "w", newline="") as file:
                writer = csv.DictWriter(file, rows[-1])
                writer.writeheader()
                writer.writerows(rows)


if __name__ == "__main__":
    if "--table" not in sys.argv:
        main()
    print_table()
