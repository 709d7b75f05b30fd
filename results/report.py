"""The files of a run, and what it leaves for the eye: its words, its samples and its curves.

    python results/report.py out/run-1        draws out/run-1/curves.png again
"""
import csv
import json
import os
import sys
from pathlib import Path

import torch

COLUMNS = ["step", "accuracy", "accuracy_greedy", "reward", "think", "length", "truncated",
           "no_signal", "loss", "clip_low", "clip_high", "clip_low_seq", "clip_high_seq",
           "log_s_mean", "log_s_std", "log_w_mean", "log_w_std", "outliers", "kl", "entropy",
           "grad_norm", "expert_change", "tokens_per_second", "seconds"]
HEADER = ("  step  reward  held-out  think  length   clip  no signal       kl  entropy  gradient"
          "  experts  tokens/s    left")


def save(path, content):
    """Atomic: whoever opens the file finds the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, f"{path}.part")
    os.replace(f"{path}.part", path)


def load(path, remedy):
    """What `save` wrote: tensors and plain data, never code. ValueError if it cannot be read."""
    if not path.exists():
        raise ValueError(f"there is no {path}; {remedy}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        content["model"].items()        # whatever is saved here has weights
        return content
    except Exception as error:      # whatever a damaged file leads to
        raise ValueError(f"{path} cannot be read ({type(error).__name__}); {remedy}") from error


def last_run():
    runs = sorted(Path("out").glob("*/checkpoint.pt"), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise ValueError("there is no run in out/ yet; begin with: python train.py")
    return str(runs[-1].parent)


def clock(seconds):
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def metrics_writer(path, step):
    """metrics.csv, open for more rows. A resumed run keeps the rows up to its checkpoint's step."""
    rows = []
    if path.exists():
        with open(path, newline="") as file:
            rows = [row for row in csv.DictReader(file) if int(row["step"]) <= step]
    with open(f"{path}.part", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    os.replace(f"{path}.part", path)
    file = open(path, "a", newline="", buffering=1)     # line by line, for who looks on
    return csv.DictWriter(file, COLUMNS)


def print_row(row, accuracy, left):
    """A step's line under HEADER: `accuracy` of the last evaluation, seconds `left`."""
    get = lambda name: row.get(name, 0.0)       # a step in which no group has signal has no ratios
    print(f"{row['step']:6}{row['reward']:8.3f}{accuracy:10.3f}{row['think']:7.2f}"
          f"{row['length']:8.1f}{get('clip_low') + get('clip_high'):7.3f}{row['no_signal']:11.2f}"
          f"{get('kl'):9.1e}{get('entropy'):9.3f}{get('grad_norm'):10.3f}"
          f"{get('expert_change'):9.4f}{row['tokens_per_second']:10.0f}{clock(left):>8}",
          flush=True)


def evaluation_lines(result):
    """A held-out evaluation in words; then a line an operation, a column a number of digits."""
    yield (f"held-out accuracy {result['accuracy']:.3f} sampled, {result['accuracy_greedy']:.3f} "
           f"greedy; {result['length']:.1f} tokens a response")
    yield (f"{result['think_share']:.0%} of the responses think, and of these "
           f"{result['accuracy_thinking']:.0%} are right")
    for row in dict.fromkeys(kind[:1] for kind in result["kinds"]):
        yield "   ".join(f"{kind:>4} {accuracy:.2f}" for kind, accuracy in result["kinds"].items()
                         if kind[:1] == row)


def sample_lines(scored, n=5):
    """A few right and wrong responses of [(problem, text, reward), ...]."""
    for name, wanted in (("right", True), ("wrong", False)):
        # One response a problem: otherwise all might be to the first.
        chosen = {problem.prompt: text for problem, text, reward in scored
                  if (reward > 0) == wanted}
        for prompt in list(chosen)[::len(chosen) // n + 1]:
            text = chosen[prompt]
            yield f"{name}   {prompt}{'(cut before its end)' if text is None else text}"


def show(result, scored, path=None, title=""):
    """Print an evaluation; with a `path` (samples.txt), add it to that file as well."""
    lines = ["  " + line for line in (*evaluation_lines(result), *sample_lines(scored))]
    print(*lines, sep="\n")
    if path:
        with open(path, "a") as file:
            print(title, *lines, sep="\n", end="\n\n", file=file)


def summary_lines(s, algorithm):
    """summary.json in words."""
    yield f"The teacher is right {s['accuracy_teacher']:.1%} of the time."
    yield (f"Imitating it, the model was right {s['accuracy_cold_start']:.1%} of the time on test "
           f"problems; it thought in {s['think_share_cold_start']:.0%} of its responses.")
    yield (f"{s['steps']} steps of RL with {algorithm} took it to {s['accuracy']:.1%} "
           f"({s['accuracy_greedy']:.1%} greedy), thinking in {s['think_share']:.0%}.")
    yield (f"That took {clock(s['seconds'])} minutes, {clock(s['seconds_cold_start'])} of them the "
           f"cold start, and {s['peak_memory_mib']} MiB of memory.")


def peak_memory_mib():
    try:
        import resource
    except ImportError:     # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // (2 ** 20 if sys.platform == "darwin" else 2 ** 10)


# Panel title -> columns of metrics.csv
PANELS = {
    "reward and held-out accuracy": ("reward", "accuracy"),
    "share that thinks": ("think",),
    "length of a response, tokens": ("length",),
    "share of tokens clipped": ("clip_low", "clip_high"),
    "share of groups without signal": ("no_signal",),
    "spread of the log-ratios": ("log_w_std", "log_s_std"),
    "entropy, nats per token": ("entropy",),
    "share of active experts changed": ("expert_change",),
}


def curves(folder):
    """metrics.csv and summary.json -> curves.png, and its path. ImportError without matplotlib."""
    import matplotlib
    matplotlib.use("Agg")       # no window, no display needed
    from matplotlib import pyplot as plt
    with open(Path(folder) / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    config, summary = (json.loads((Path(folder) / f"{name}.json").read_text())
                       for name in ("config", "summary"))
    # Accuracy has no row of its own before the first step; the teacher's is the ceiling to pass.
    rows.insert(0, {"step": 0, "accuracy": summary["accuracy_cold_start"]})
    figure, axes = plt.subplots(2, 4, figsize=(16, 6.5), layout="constrained")
    for axis, (title, columns) in zip(axes.flat, PANELS.items()):
        for column in columns:
            points = [(int(row["step"]), float(row[column])) for row in rows if row.get(column)]
            sparse = column == "accuracy"
            axis.plot(*zip(*points) if points else ([], []), "o-" if sparse else "-",
                      lw=2 if sparse else 0.9, label=column)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("RL step")
        axis.grid(alpha=0.3)
        axis.set_ylim(bottom=0)
        if "accuracy" in columns:
            axis.axhline(summary["accuracy_teacher"], color="gray", ls="--", label="the teacher")
        if len(columns) > 1:
            axis.legend(fontsize=8)
    figure.suptitle(f"{config['algorithm']}, seed {config['seed']}")
    path = Path(folder) / "curves.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def finish(config, state, folder):
    """The end of a run: summary.json, curves.png and a few words."""
    cold, last = state["cold_start"], state["evaluation"]
    summary = {
        "accuracy_teacher": state["accuracy_teacher"], "accuracy_cold_start": cold["accuracy"],
        "accuracy": last["accuracy"], "accuracy_greedy": last["accuracy_greedy"],
        "think_share_cold_start": cold["think_share"], "think_share": last["think_share"],
        "seconds_cold_start": state["seconds_cold_start"], "seconds_rl": state["seconds_rl"],
        "seconds": state["seconds_before_rl"] + state["seconds_rl"],
        "peak_memory_mib": peak_memory_mib(), "steps": state["step"],
        "responses": state["step"] * config.prompts * config.group_size}
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print("4 report", *summary_lines(summary, config.algorithm), sep="\n  ")
    try:
        print(f"  The curves are in {curves(folder)}.")
    except ImportError:
        print("  No curves.png: matplotlib is not installed.")


if __name__ == "__main__":
    print(curves(sys.argv[1]) if len(sys.argv) == 2 else __doc__)
