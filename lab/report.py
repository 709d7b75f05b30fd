"""What a run shows to the person who watches it: its tables, its words, its samples, its curves.

    python -m lab.report out/run-1        draws out/run-1/curves.png again
    python -m lab.report out/run-1 3      only its first three panels, as out/run-1/curves-3.png
"""
import csv
import io
import itertools
import json
import os
import sys
import time
from pathlib import Path

from data import tasks
from lab.options import fail

HEADER = ("  step  reward  held-out  think  length   clip  no signal       kl  entropy  gradient"
          "  experts  tokens/s    left")


COLOURS = {"bold": 1, "dim": 2, "red": 31, "green": 32, "yellow": 33}


def paint(text, *styles):
    """Coloured where the terminal can show it."""
    if not sys.stdout.isatty():
        return text
    return "".join(f"\033[{COLOURS[style]}m" for style in styles) + text + "\033[0m"


def clock(seconds):
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def mean(values):
    values = list(values)
    return sum(values) / len(values) if values else 0.0


def read_table(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# ---------------------------------------------------------------------------- numbers

def mean_row(rows):
    """The mean of each entry, a number or a list of numbers, over the rows that have it."""
    result = {}
    for name in dict.fromkeys(itertools.chain(*rows)):
        values = [row[name] for row in rows if name in row]
        if isinstance(values[0], list):
            result[name] = [mean(numbers) for numbers in zip(*values)]
        else:
            result[name] = mean(values)
    return result


def means(updates):
    """The mean of each metric over the optimiser steps of an RL step that have it, and over the
    layers where each layer has one."""
    return {name: mean(x) if isinstance(x, list) else x for name, x in mean_row(updates).items()}


def is_right(response):
    """Wholly right: a task may reward a part with less than 1."""
    return response.reward >= 1


def response_metrics(responses):
    """Reward and length of all responses, of those that think and that answer at once, of right and
    wrong ones; and what the task measures. A response that was truncated neither thinks nor answers
    at once."""
    thinking = [r for r in responses if r.thinks]
    kinds = {
        "": responses,
        "_thinking": thinking,
        "_direct": [r for r in responses if not r.truncated and not r.thinks],
        "_right": [r for r in responses if is_right(r)],
        "_wrong": [r for r in responses if not is_right(r)],
    }
    metrics = {
        "responses": len(responses),
        "think": len(thinking) / len(responses),
        "truncated": mean(r.truncated for r in responses),
    }
    for kind, chosen in kinds.items():
        if chosen:
            metrics[f"reward{kind}"] = mean(r.reward for r in chosen)
            metrics[f"length{kind}"] = mean(r.length for r in chosen)
    return metrics | mean_measures(responses)


def mean_measures(responses):
    """The means of what the task measures."""
    return {name: mean(r.measures[name] for r in responses) for name in responses[0].measures}


def share_without_signal(responses, group_size):
    """The share of the groups, which stand one behind the other, that have equal rewards and teach
    nothing; of all that were sampled, those that dynamic sampling dropped included."""
    rewards = [response.reward for response in responses]
    groups = [rewards[i:i + group_size] for i in range(0, len(rewards), group_size)]
    return mean(min(group) == max(group) for group in groups)


def update_metrics(learned):
    """A row of updates.csv for each optimiser step, as gspo.update returns them."""
    rows = []
    for x in learned:
        mask = x.batch.response_mask
        rows.append({
            "mini_batch": x.mini_batch,
            "loss": x.loss,
            "clipped": x.clipped[mask].float().mean().item(),
            "entropy": x.scores.entropy[mask].mean().item(),
            "grad_norm": x.grad_norm,
        })
    return rows


def share_right(responses):
    return mean(is_right(response) for response in responses)


def evaluation(sampled, greedy):
    """Responses to held-out problems -> numbers."""
    metrics = response_metrics(sampled)
    of_kind = {}
    for response in sampled:
        kind = getattr(response.problem, "kind", "all")
        of_kind.setdefault(kind, []).append(response)
    return {
        "accuracy": share_right(sampled),
        "accuracy_greedy": share_right(greedy),
        "think_share": metrics["think"],
        "accuracy_thinking": share_right(r for r in sampled if r.thinks),
        "length": metrics["length"],
        "measures": mean_measures(sampled),
        "kinds": {kind: share_right(of_kind[kind]) for kind in of_kind},
    }


def peak_memory_mib():
    """The most memory that this process has had; None on Windows, which does not tell."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // (2 ** 20 if sys.platform == "darwin" else 2 ** 10)


# ---------------------------------------------------------------------------- tables

# The columns of the core; the extras name their own.
UPDATE = ("loss", "clipped", "entropy", "grad_norm")
COLUMNS = ("step", "accuracy", "accuracy_greedy", "reward", "reward_thinking", "reward_direct",
           "think", "length", "length_thinking", "length_direct", "length_right", "length_wrong",
           "truncated", "no_signal", *UPDATE, "tokens_per_second", "seconds")
UPDATE_COLUMNS = ("step", "mini_batch", *UPDATE)
EVALUATION_COLUMNS = ("step", "kind", "accuracy")


def write(path, content):
    """Atomic: whoever opens the file finds the old content or the new, never a part. OSError, and
    the old content stays, if the disk is full or the folder is gone."""
    part = Path(f"{path}.{os.getpid()}.part")           # two runs may write the same cold start
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def table_writer(path, columns, step):
    """A CSV file, open for more rows. A resumed run keeps the rows up to its checkpoint's step."""
    rows = []
    if path.exists() and step > 0:
        # The last line may have been cut.
        try:
            lines, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
            rows = [row for row in csv.DictReader(lines.splitlines()) if int(row["step"]) <= step]
        except (KeyError, ValueError):
            fail(f"{path} is not as the run has left it; bring it back, or move it away")
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    write(path, text.getvalue().encode())
    # Line by line, for those who look on.
    file = open(path, "a", newline="", buffering=1, encoding="utf-8")
    return csv.DictWriter(file, columns, extrasaction="ignore")


class Log:
    """metrics.csv, a row for each RL step, with a column for each of the `measures` of the task;
    evaluations.csv, the accuracy on each kind of problem in each held-out evaluation; and
    updates.csv, a row for each optimiser step, with a column for each layer of the per-layer
    metrics: expert_change_0, expert_change_1, ... `extra` has the columns of the extras."""
    def __init__(self, folder, options, progress, extra):
        write(folder / "config.json", json.dumps(options, indent=2).encode())
        self.folder = folder
        self.options = options
        self.progress = progress
        self.start = progress["step"]
        self.seconds_before = progress.setdefault("seconds_rl", 0.0)
        self.began = time.time()
        measures = list(progress["evaluation"]["measures"])
        layers = itertools.product(extra["layers"], range(options["n_layer"]))
        layered = [f"{name}_{layer}" for name, layer in layers]
        self.metrics = table_writer(folder / "metrics.csv", [
            *COLUMNS, *extra["metrics"], *measures], self.start)
        self.updates = table_writer(folder / "updates.csv", [
            *UPDATE_COLUMNS, *extra["updates"], *layered], self.start)
        self.evaluations = table_writer(folder / "evaluations.csv", EVALUATION_COLUMNS, self.start)
        if self.start == 0:
            self.write_evaluation(0, progress["first_evaluation"])
        print(f"3 RL: {options['algorithm']}, steps {self.start + 1} to {options['steps']}, in "
              f"{folder}")

    def write_evaluation(self, step, evaluation):
        for kind, accuracy in evaluation["kinds"].items():
            self.evaluations.writerow({"step": step, "kind": kind, "accuracy": accuracy})

    def write(self, responses, updates, measured, evaluated=None):
        """A step, and the evaluation after it if there was one: into the tables, the `progress` and
        onto the screen."""
        progress = self.progress
        step = progress["step"]
        row = {"step": step} | response_metrics(responses) | means(updates) | measured
        row["no_signal"] = share_without_signal(responses, self.options["group_size"])
        row["tokens_per_second"] = sum(r.length for r in responses) / row["seconds"]
        progress["responses"] = progress.get("responses", 0) + len(responses)
        progress["seconds_rl"] = self.seconds_before + time.time() - self.began
        if evaluated:
            progress["evaluation"] = evaluated[0]
            self.write_evaluation(step, evaluated[0])
            row["accuracy"] = evaluated[0]["accuracy"]
            row["accuracy_greedy"] = evaluated[0]["accuracy_greedy"]
        self.metrics.writerow(row)
        for update in updates:
            layered = {}
            for name, values in update.items():
                if isinstance(values, list):
                    layered |= {f"{name}_{layer}": x for layer, x in enumerate(values)}
            self.updates.writerow({"step": step} | update | layered)
        if (step - self.start) % 25 == 1:
            print(HEADER)
        left = (time.time() - self.began) / (step - self.start) * (self.options["steps"] - step)
        print_row(row, progress["evaluation"]["accuracy"], left)
        if evaluated:
            show(*evaluated, self.folder, f"RL step {step}")


# ---------------------------------------------------------------------------- words

def cold_step(step, steps, loss, began):
    """A line now and then; `loss` in nats a token, `began` as from time.time()."""
    if step % 100 == 0 or step == steps:
        left = (time.time() - began) / step * (steps - step)
        print(f"  step {step:5}   loss {loss:.3f} nats a token   {clock(left)} left", flush=True)


def print_row(row, accuracy, left):
    """The line of an RL step under HEADER: `accuracy` of the last evaluation, seconds `left`."""
    def get(name):
        return row.get(name, 0.0)       # a step in which no group has a signal has no ratios
    clip = get("clip_low") + get("clip_high")
    cells = (f"{row['step']:6}", f"{row['reward']:7.3f}", f"{accuracy:9.3f}",
             f"{row['think']:6.2f}", f"{row['length']:7.1f}", f"{clip:6.3f}",
             f"{row['no_signal']:10.2f}", f"{get('kl'):8.1e}", f"{get('entropy'):8.3f}",
             f"{get('grad_norm'):9.3f}", f"{get('expert_change'):8.4f}",
             f"{row['tokens_per_second']:9.0f}", f"{clock(left):>7}")
    print(*cells, flush=True)


def evaluation_lines(result):
    """A held-out evaluation in words, and what the task measures; then a line for all kinds with
    the same first character, such as +1, +2 and +3."""
    yield (f"held-out accuracy {result['accuracy']:.3f} sampled, {result['accuracy_greedy']:.3f} "
           f"greedy; {result['length']:.1f} tokens a response")
    if result["think_share"]:
        yield (f"{result['think_share']:.0%} of the responses think, and of these "
               f"{result['accuracy_thinking']:.0%} are right")
    if result["measures"]:
        yield "   ".join(f"{name} {value:.3f}" for name, value in result["measures"].items())
    if len(result["kinds"]) < 2:
        return
    for operation in dict.fromkeys(kind[:1] for kind in result["kinds"]):
        cells = [f"{kind:>4} {accuracy:.2f}" for kind, accuracy in result["kinds"].items()
                 if kind[:1] == operation]
        yield "   ".join(cells)


def sample_lines(responses, n=5):
    """A few right and a few wrong responses, at most one to a problem."""
    for name, wanted in (("right", True), ("wrong", False)):
        of_prompt = {r.problem.prompt: r for r in responses if is_right(r) == wanted}
        for prompt in list(of_prompt)[::len(of_prompt) // n + 1]:
            response = of_prompt[prompt]
            yield f"{name}   {prompt}{response.text}{' (truncated)' if response.truncated else ''}"


def show(result, responses, folder=None, title=""):
    """Print an evaluation; with a folder, add it to samples.txt there as well."""
    lines = [f"  {line}" for line in evaluation_lines(result)]
    lines += [f"  {line}" for line in sample_lines(responses)]
    print(*lines, sep="\n")
    if folder:
        with open(folder / "samples.txt", "a", encoding="utf-8") as file:
            print(title, *lines, sep="\n", end="\n\n", file=file)


def finish(folder, config, task, progress):
    """summary.json, curves.png and a few words."""
    cold = progress["first_evaluation"]
    last = progress["evaluation"]
    summary = {
        "accuracy_teacher": tasks.teacher_accuracy(task), "accuracy_cold_start": cold["accuracy"],
        "accuracy": last["accuracy"], "accuracy_greedy": last["accuracy_greedy"],
        "think_share_cold_start": cold["think_share"], "think_share": last["think_share"],
        "length_cold_start": cold["length"], "length": last["length"],
        "seconds_cold_start": progress["seconds_cold_start"], "seconds_rl": progress["seconds_rl"],
        "seconds": progress["seconds_cold_start"] + progress["seconds_rl"],
        "peak_memory_mib": peak_memory_mib(), "steps": progress["step"],
        "responses": progress.get("responses", 0),
        "measures_cold_start": cold["measures"], "measures": last["measures"]}
    write(folder / "summary.json", json.dumps(summary, indent=2).encode())
    print("4 report", *summary_lines(summary, config.algorithm), sep="\n  ")
    try:
        print(f"  The curves are in {curves(folder)}.")
    except ImportError:
        print("  No curves.png: matplotlib is not installed.")


def summary_lines(s, algorithm):
    """summary.json in words."""
    yield f"The teacher is right {s['accuracy_teacher']:.1%} of the time."
    yield (f"Imitating it, the model was right {s['accuracy_cold_start']:.1%} of the time on test "
           f"problems; it thought in {s['think_share_cold_start']:.0%} of its responses.")
    yield (f"{s['steps']} steps of RL with {algorithm} took it to {s['accuracy']:.1%} "
           f"({s['accuracy_greedy']:.1%} greedy), thinking in {s['think_share']:.0%}.")
    yield f"A response has {s['length']:.1f} tokens; before RL it had {s['length_cold_start']:.1f}."
    if s["measures"]:
        changes = [f"{name} {before:.3f} → {s['measures'][name]:.3f}"
                   for name, before in s["measures_cold_start"].items()]
        yield f"Before and after RL: {', '.join(changes)}."
    yield (f"That took {clock(s['seconds'])} minutes, {clock(s['seconds_cold_start'])} of them the "
           f"cold start, and {s['peak_memory_mib'] or 'an unknown number of'} MiB of memory.")


# ---------------------------------------------------------------------------- curves

def line(rows, *columns):
    """Rows of a table -> [(step, sum of the columns), ...], without the rows that lack one."""
    full = [row for row in rows if all(row.get(column) for column in columns)]
    return [(int(row["step"]), sum(float(row[column]) for column in columns)) for row in full]


def lines(rows, *columns):
    return {column: line(rows, column) for column in columns}


def layer_lines(rows, name):
    """A line for each layer of a metric in updates.csv."""
    columns = [column for column in (rows[0] if rows else ()) if column.startswith(f"{name}_")]
    return {column.replace(f"{name}_", "layer "): line(rows, column) for column in columns}


def clip_lines(updates):
    """A line for each mini-batch: the share of its tokens that are clipped."""
    result = {}
    for number in sorted({int(row["mini_batch"]) for row in updates}):
        rows = [row for row in updates if int(row["mini_batch"]) == number]
        result[f"mini-batch {number}"] = line(rows, "clip_low", "clip_high")
    return result


def kind_lines(evaluations):
    """One line for all kinds with the same ending (all but their first character), such as +5, -5,
    *5 and /5: their mean accuracy at each evaluation. No line if all problems are of one kind."""
    result = {}
    if len({row["kind"] for row in evaluations}) < 2:
        return result
    for ending in dict.fromkeys(row["kind"][1:] for row in evaluations):
        rows = [row for row in evaluations if row["kind"][1:] == ending]
        accuracies_at = {}
        for row in rows:
            accuracies_at.setdefault(int(row["step"]), []).append(float(row["accuracy"]))
        name = " ".join(dict.fromkeys(row["kind"] for row in rows))
        result[name] = [(step, mean(values)) for step, values in accuracies_at.items()]
    return result


BY_KIND = "held-out accuracy by kind of problem"


def panels(metrics, evaluations, updates, measures):
    """The rows of a run's tables -> {title of a panel: {line: [(step, value), ...]}}. A task has
    kinds or measures, or both, or none: a panel without lines is left out."""
    # They would not fit on one axis.
    large = [name for name in measures if any(float(row[name]) > 1 for row in metrics)]
    small = [name for name in measures if name not in large]
    all_panels = {
        "reward (of what is asked) and held-out accuracy": lines(metrics, "reward", "accuracy"),
        BY_KIND: kind_lines(evaluations),
        "reward, and what the task measures":
            lines(metrics, "reward", *small) if small else {},
        "length of a response, tokens": lines(metrics, "length", "length_right", "length_wrong"),
        "what the task measures, above 1": lines(metrics, *large),
        "share that thinks, and reward with and without":
            lines(metrics, "think", "reward_thinking", "reward_direct"),
        "share of tokens clipped": clip_lines(updates),
        "spread of the log-ratios: tokens, sequences": lines(metrics, "log_w_std", "log_s_std"),
        "share of active experts changed": layer_lines(updates, "expert_change"),
        "load of the busiest expert (1: even)": layer_lines(updates, "expert_load"),
        "entropy (nats) and groups without signal": lines(metrics, "entropy", "no_signal"),
    }
    return {title: named_lines for title, named_lines in all_panels.items() if named_lines}


def smooth(points, width):
    """The mean of each value with those before it, `width` in all: single steps are noisy."""
    values = [value for _, value in points]
    return [(step, mean(values[max(0, i + 1 - width):i + 1])) for i, (step, _) in enumerate(points)]


def draw_panel(axis, title, named_lines, summary):
    """One panel; `summary` has the accuracies of the teacher and of the cold start."""
    from matplotlib import pyplot as plt
    by_kind = title == BY_KIND
    ordered = by_kind or any(name.startswith(("layer", "mini-batch")) for name in named_lines)
    for i, (name, points) in enumerate(named_lines.items()):
        style = {"label": name, "lw": 1.3}
        if ordered:
            style["color"] = plt.cm.viridis(i / max(1, len(named_lines) - 1) * 0.9)
        if name == "accuracy":          # a few points, the first from before the first step
            points = [(0, summary["accuracy_cold_start"]), *points]
            style["marker"] = "o"
            axis.axhline(summary["accuracy_teacher"], color="gray", ls="--", label="teacher")
        elif by_kind:
            style["marker"] = "o"
        else:
            points = smooth(points, 40 if name.startswith("layer") else 10)
        axis.plot([step for step, _ in points], [value for _, value in points], **style)
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("RL step")
    if axis.dataLim.ymin >= 0:
        axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def curves(folder, n_panels=None):
    """The tables of a run -> curves.png, and its path: all panels, or so many. ImportError without
    matplotlib."""
    import matplotlib
    matplotlib.use("Agg")       # no window, no display needed
    from matplotlib import pyplot as plt
    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    tables = [read_table(folder / f"{name}.csv") for name in ("metrics", "evaluations", "updates")]
    all_panels = list(panels(*tables, summary["measures"]).items())
    drawn = all_panels[:n_panels]
    columns = min(len(drawn), 3)
    rows = -(-len(drawn) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4 * columns, 3.25 * rows), squeeze=False,
                                layout="constrained")
    for axis, (title, named_lines) in zip(axes.flat, drawn):
        draw_panel(axis, title, named_lines, summary)
    for axis in axes.flat[len(drawn):]:
        axis.set_visible(False)
    figure.suptitle(f"{config['task']}, {config['algorithm']}, seed {config['seed']}, replay "
                    f"{config['routing_replay']}; lines without dots are means over 10 steps")
    path = folder / ("curves.png" if n_panels is None else f"curves-{n_panels}.png")
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


if __name__ == "__main__":
    if len(sys.argv) in (2, 3):
        print(curves(sys.argv[1], *map(int, sys.argv[2:])))
    else:
        print(__doc__)
