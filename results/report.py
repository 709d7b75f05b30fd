"""The files of a run, and what it leaves for the eye: its words, its samples and its curves.

    python results/report.py out/run-1        draws out/run-1/curves.png again
"""
import csv
import json
import os
import sys
from pathlib import Path

import torch

COLUMNS = ["step", "accuracy", "accuracy_greedy", "reward", "reward_thinking", "reward_direct",
           "think", "length", "length_thinking", "length_direct", "length_right", "length_wrong",
           "truncated", "no_signal", "loss", "clip_low", "clip_high", "clip_low_seq",
           "clip_high_seq", "log_s_mean", "log_s_std", "log_w_mean", "log_w_std", "outliers", "kl",
           "kl_ref", "value_error", "entropy", "grad_norm", "expert_change", "expert_load",
           "router_entropy", "tokens_per_second", "seconds", "seconds_rescoring"]
# The same for each optimiser step; those of LAYERED also for each layer: expert_change_0 ...
UPDATE_COLUMNS = ["step", "mini_batch", *COLUMNS[COLUMNS.index("loss"):COLUMNS.index("kl_ref")],
                  "entropy", "grad_norm"]
LAYERED = ["expert_change", "expert_load", "router_entropy"]
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


def mean(values):
    values = list(values)
    return sum(values) / len(values) if values else 0.0


def read_table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def table_writer(path, columns, step):
    """A CSV file, open for more rows. A resumed run keeps the rows up to its checkpoint's step."""
    rows = [row for row in read_table(path) if int(row["step"]) <= step] if path.exists() else []
    with open(f"{path}.part", "w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(f"{path}.part", path)
    file = open(path, "a", newline="", buffering=1)     # line by line, for who looks on
    return csv.DictWriter(file, columns, extrasaction="ignore")


class Log:
    """metrics.csv, a row per RL step, and updates.csv, a row per optimiser step."""
    def __init__(self, folder, step, n_layer):
        layered = [f"{name}_{layer}" for name in LAYERED for layer in range(n_layer)]
        self.metrics = table_writer(folder / "metrics.csv", COLUMNS, step)
        self.updates = table_writer(folder / "updates.csv", UPDATE_COLUMNS + layered, step)

    def write(self, row, updates):
        self.metrics.writerow(row)
        for update in updates:
            layered = {f"{name}_{layer}": value for name in LAYERED
                       for layer, value in enumerate(update[name])}
            self.updates.writerow({"step": row["step"]} | update | layered)


def means(updates):
    """Of every metric over the mini-batches, and over the layers where there is one per layer."""
    return {name: mean(mean(update[name]) if name in LAYERED else update[name]
                       for update in updates) for name in (updates[0] if updates else ())}


def thinks(text):
    return text is not None and text.startswith("<think>")


def response_stats(responses):
    """Reward and length of all responses, of those that think, that do not, right and wrong ones.
    A response that was cut neither thinks nor does not."""
    kinds = {
        "": responses,
        "_thinking": [r for r in responses if thinks(r.text)],
        "_direct": [r for r in responses if r.text is not None and not thinks(r.text)],
        "_right": [r for r in responses if r.reward > 0],
        "_wrong": [r for r in responses if r.reward <= 0],
    }
    return {f"{name}{kind}": mean(getattr(r, name) for r in those)
            for kind, those in kinds.items() if those for name in ("reward", "length")} | {
        "responses": len(responses), "think": len(kinds["_thinking"]) / len(responses),
        "truncated": mean(r.text is None for r in responses)}


def evaluation(sampled, greedy):
    """Responses to held-out problems -> numbers."""
    stats, kinds = response_stats(sampled), {}
    for response in sampled:
        kinds.setdefault(getattr(response.problem, "kind", "all"), []).append(response.reward)
    return {"accuracy": stats["reward"], "accuracy_greedy": mean(r.reward for r in greedy),
            "think_share": stats["think"], "accuracy_thinking": stats.get("reward_thinking", 0.0),
            "length": stats["length"],
            "kinds": {kind: mean(rewards) for kind, rewards in kinds.items()}}


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


def sample_lines(responses, n=5):
    """A few right and a few wrong responses."""
    for name, wanted in (("right", True), ("wrong", False)):
        # One response a problem: otherwise all might be to the first.
        chosen = {r.problem.prompt: r.text for r in responses if (r.reward > 0) == wanted}
        for prompt in list(chosen)[::len(chosen) // n + 1]:
            text = chosen[prompt]
            yield f"{name}   {prompt}{'(cut before its end)' if text is None else text}"


def show(result, responses, path=None, title=""):
    """Print an evaluation; with a `path` (samples.txt), add it to that file as well."""
    lines = ["  " + line for line in (*evaluation_lines(result), *sample_lines(responses))]
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


def panels(metrics, updates):
    """Rows of metrics.csv and updates.csv -> {panel: {line: [(step, value), ...]}}."""
    def line(rows, *columns):
        return [(int(row["step"]), sum(float(row[column]) for column in columns))
                for row in rows if all(row.get(column) for column in columns)]
    columns = lambda *names: {name: line(metrics, name) for name in names}
    layers = lambda name: {column.replace(name + "_", "layer "): line(updates, column)
                           for column in (updates[0] if updates else ())
                           if column.startswith(name + "_")}
    numbers = sorted({int(row["mini_batch"]) for row in updates})
    return {
        "reward and held-out accuracy": columns("reward", "accuracy"),
        "share that thinks, and reward with and without":
            columns("think", "reward_thinking", "reward_direct"),
        "length of a response, tokens": columns("length", "length_right", "length_wrong"),
        "share of tokens clipped": {
            f"mini-batch {i}": line([row for row in updates if int(row["mini_batch"]) == i],
                                    "clip_low", "clip_high") for i in numbers},
        "spread of the log-ratios: tokens, sequences": columns("log_w_std", "log_s_std"),
        "share of active experts changed": layers("expert_change"),
        "load of the busiest expert (1: even)": layers("expert_load"),
        "entropy (nats) and groups without signal": columns("entropy", "no_signal"),
    }


def smooth(points, width):
    """Each value's mean with those before it, `width` in all: single steps are noisy."""
    values = [value for _, value in points]
    return [(step, mean(values[max(0, i + 1 - width):i + 1])) for i, (step, _) in enumerate(points)]


def curves(folder):
    """The tables of a run -> curves.png, and its path. ImportError without matplotlib."""
    import matplotlib
    matplotlib.use("Agg")       # no window, no display needed
    from matplotlib import pyplot as plt
    folder = Path(folder)
    config, summary = (json.loads((folder / f"{name}.json").read_text())
                       for name in ("config", "summary"))
    metrics, updates = (read_table(folder / f"{name}.csv") for name in ("metrics", "updates"))
    figure, axes = plt.subplots(2, 4, figsize=(16, 6.5), layout="constrained")
    for axis, (title, lines) in zip(axes.flat, panels(metrics, updates).items()):
        ordered = any(name.startswith(("layer", "mini-batch")) for name in lines)
        for i, (name, points) in enumerate(lines.items()):
            if name == "accuracy":      # a few points; the first is before the first step
                points = [(0, summary["accuracy_cold_start"])] + points
                axis.axhline(summary["accuracy_teacher"], color="gray", ls="--", label="teacher")
            else:
                points = smooth(points, 40 if name.startswith("layer") else 10)
            colour = plt.cm.viridis(i / max(1, len(lines) - 1) * 0.9) if ordered else None
            axis.plot(*(zip(*points) if points else ((), ())), "o-" if name == "accuracy" else "-",
                      color=colour, lw=1.3, label=name)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("RL step")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.suptitle(f"{config['algorithm']}, seed {config['seed']}, routing replay "
                    f"{config['routing_replay']}; lines are means over 10 steps")
    path = folder / "curves.png"
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
        "responses": state["responses"]}
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print("4 report", *summary_lines(summary, config.algorithm), sep="\n  ")
    try:
        print(f"  The curves are in {curves(folder)}.")
    except ImportError:
        print("  No curves.png: matplotlib is not installed.")


if __name__ == "__main__":
    print(curves(sys.argv[1]) if len(sys.argv) == 2 else __doc__)
