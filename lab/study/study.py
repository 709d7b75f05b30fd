"""Make the training runs that the pages of results/ rest on. results/studies.csv lists them.

    python -m lab.study.study                how many runs of each study are missing
    python -m lab.study.study NAME ...       make what is missing of these

A run adds a row to results/runs.csv and its held-out accuracies to results/curves.csv. To repeat
it, remove its row and its folder in out/study/. A run that was killed goes on from its last
checkpoint. No run is made with code that is not committed.

The arms of a study share one cold start for each seed, and with --queries uniform they get the same
problems: they are compared in pairs. evidence.py does that.
"""
import json
import os
import platform
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd

from lab.report import clock

RESULTS = Path(__file__).parent.parent.parent / "results"
STUDIES = RESULTS / "studies.csv"       # the arms of each study: seeds, and what python gets
RUNS = RESULTS / "runs.csv"             # a row for each run
CURVES = RESULTS / "curves.csv"         # its held-out accuracies: all problems, and each kind
KEYS = ["study", "arm", "seed"]
LATER = ["log_w_std", "log_s_std", "log_s_mean", "outliers", "clip_low", "clip_high"]


def shell(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()


def commit() -> str:
    """The commit that runs; a checkout that differs from it, results/ aside, is refused."""
    if shell("git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":!results"):
        sys.exit("study: the code is not committed; commit it first, so that the rows can say what "
                 "made them")
    return shell("git", "rev-parse", "--short", "HEAD")


def machine() -> str:
    """The processor, as a reader can compare it; no names, no paths."""
    cpuinfo = Path("/proc/cpuinfo")
    named = cpuinfo.exists() and re.search("model name.*: (.*)", cpuinfo.read_text())
    return named[1] if named else platform.processor() or platform.machine()


def make(name: str, arm: str, seed: int, command: str) -> dict[Path, pd.DataFrame]:
    """Make a run, or what is left of it -> its row of RUNS, and its rows of CURVES; nothing if it
    fails."""
    out = Path("out/study", f"{name} {arm} {seed}".replace(",", "").replace(" ", "-"))
    words = f"{command} --seed {seed}".split()
    row = {"study": name, "arm": arm, "seed": seed, "command": " ".join(["python", *words]),
           "commit": commit(), "machine": machine()}
    resume = ["--resume"] if (out / "checkpoint.pt").exists() else []
    if not (out / "summary.json").exists():
        made = subprocess.run([sys.executable, *words, *resume, "--out", str(out)],
                              capture_output=True, text=True)
        if made.returncode:
            print(f"{out}: {made.stderr}", flush=True)
            return {}
    return rows_of(out, row)


def rows_of(out: Path, row: dict) -> dict[Path, pd.DataFrame]:
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
    curve = pd.concat([of_all.assign(kind="all"), of_kinds[of_kinds.kind != "all"]])
    curve = curve.sort_values("step").assign(**{key: row[key] for key in KEYS})
    return {RUNS: pd.DataFrame([row]), CURVES: curve}


def add(path: Path, rows: pd.DataFrame):
    """Append rows to a table, whole or not at all."""
    table = pd.concat([pd.read_csv(path), rows]) if path.exists() else rows
    table.to_csv(f"{path}.part", index=False, float_format="%.5g")
    os.replace(f"{path}.part", path)


def missing(name: str) -> list[tuple]:
    """(name, arm, seed, command) of all runs of a study that have no row yet. Neighbours differ in
    the seed: two at a time do not make the same cold start twice."""
    done = set()
    if RUNS.exists():
        done = set(pd.read_csv(RUNS)[KEYS].itertuples(index=False, name=None))
    runs = []
    for study, arm, seeds, command in pd.read_csv(STUDIES).itertuples(index=False):
        first, last = seeds.split(" to ")
        for seed in range(int(first), int(last) + 1):
            if study == name and (name, arm, seed) not in done:
                runs.append((name, arm, seed, command))
    return runs


def main(names: list[str]):
    """Two runs at a time if they are of one thread; else their times count, and they run alone."""
    known = pd.read_csv(STUDIES).study.unique()
    unknown = set(names) - set(known)
    if unknown:
        sys.exit(f"study: {', '.join(sorted(unknown))}: no such study; without a name you see all")
    if not names:
        for name in known:
            print(f"{name}: {len(missing(name))} runs are missing")
    for name in names:
        runs = missing(name)
        began = time.time()
        alone = any("--threads 2" in command for *_, command in runs)
        with ThreadPoolExecutor(1 if alone else 2) as pool:
            for i, tables in enumerate(pool.map(lambda run: make(*run), runs), start=1):
                left = (time.time() - began) / i * (len(runs) - i)
                print(f"{i} of {len(runs)}: {runs[i - 1][:3]}   {clock(left)} left", flush=True)
                for path, rows in tables.items():
                    add(path, rows)


if __name__ == "__main__":
    main(sys.argv[1:])
