"""Options: the fields of a dataclass explain themselves, and the command line is made of them."""
import argparse
import dataclasses
import importlib
import itertools
import sys
from pathlib import Path

from results import report

# What a resumed run may do otherwise than before.
MAY_CHANGE = ("steps", "eval_every", "save_every", "device", "threads", "out")


def option(default, why, low=None, high=None, choices=None):
    """A field of a dataclass that says why it has its default, and what values it can have."""
    return dataclasses.field(default=default, metadata=dict(
        help=why, low=low, high=high, choices=choices))


def fail(message):
    """Bad input gets one line, and exit code 2."""
    print(f"train.py: error: {message}", file=sys.stderr)
    sys.exit(2)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        fail(f"{message} (see --help)")

    def add_fields(self, title, fields):
        """A flag for every field. A flag that is not given gets no value at all."""
        group = self.add_argument_group(title)
        for field in fields:
            info = {"help": "", "low": None, "high": None, "choices": None} | field.metadata
            unsaid = field.default is None or field.default is False
            default = "" if unsaid else f" (default: {field.default})"
            kind = {"action": "store_true"} if field.type is bool else {
                "type": in_range(field.type, info["low"], info["high"]),
                "choices": info["choices"],
                "metavar": None if info["choices"] else field.type.__name__.upper()}
            group.add_argument(f"--{field.name}", default=argparse.SUPPRESS,
                               help=info["help"] + default, **kind)


def in_range(kind, low, high):
    """Text -> a value of that kind from `low` to `high`, or argparse's error."""
    low, high = -1e9 if low is None else low, 1e9 if high is None else high

    def convert(text):
        value = kind(text)
        if kind is not str and not low <= value <= high:        # NaN is not, either
            raise argparse.ArgumentTypeError(f"{text[:20]} is not from {low} to {high}")
        return value
    convert.__name__ = kind.__name__        # argparse shows it: "invalid int value: 'x'"
    return convert


def task_class(name):
    exists = name.isidentifier() and (Path(__file__).parent / f"{name}.py").exists()
    Task = getattr(importlib.import_module(f"data.{name}"), "Task", None) if exists else None
    return Task or fail(f"argument --task: {name!r} is none; write data/NAME.py with a class Task")


def parse(argv, Config, about):
    """The command line -> config, task, what to do, and the state of the run to go on with, if it
    is to go on with one. The flags are the fields of Config and of the task."""
    first = Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--task", default=Config.task)
    Task = task_class(first.parse_known_args(argv)[0].task)     # the task has options of its own
    parser = Parser(description=about, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    existing = parser.add_argument_group("with the last run in out/, or the one in --out")
    existing = existing.add_mutually_exclusive_group()
    existing.add_argument("--ask", metavar="PROMPT", help="let the model answer")
    existing.add_argument("--inspect", action="store_true", help="show an update, token by token")
    existing.add_argument("--eval_only", action="store_true", help="evaluate the model")
    existing.add_argument("--resume", action="store_true", help="go on with RL")
    parser.add_argument("--fresh", action="store_true", help="make the cold start, cached or not")
    parser.add_fields("options of a run", dataclasses.fields(Config))
    parser.add_fields(f"options of the task {Task.__module__}", dataclasses.fields(Task))
    given = vars(parser.parse_args(argv))
    todo = {key: given.pop(key) for key in ("ask", "inspect", "eval_only", "resume", "fresh")}
    state = None
    if todo["ask"] is not None or todo["inspect"] or todo["eval_only"] or todo["resume"]:
        given["out"] = given.get("out") or report.last_run()
        state = report.load(Path(given["out"]) / "checkpoint.pt", "name another run with --out")
        for key, value in given.items():
            if key not in MAY_CHANGE and value != state["options"].get(key):
                fail(f"argument --{key}: this run has {state['options'].get(key)}, which only a "
                     "new run can change")
        given = state["options"] | given
        Task = task_class(given["task"])
    own = [field.name for field in dataclasses.fields(Config)]
    config = Config(**{key: value for key, value in given.items() if key in own})
    task = Task(**{key: value for key, value in given.items() if key not in own})
    config.out = config.out or next(f"out/run-{i}" for i in itertools.count(1)
                                    if not Path(f"out/run-{i}").exists())
    if state is None and Path(config.out).exists() and any(Path(config.out).iterdir()):
        fail(f"argument --out: {config.out} is not empty; --resume it or name another folder")
    if todo["resume"] and config.steps <= state["step"]:
        fail(f"argument --steps: {config.out} has made {state['step']} already; ask for more")
    return config, task, todo, state
