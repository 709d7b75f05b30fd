"""From dataclasses to a command line: every field explains itself and becomes a flag."""
import argparse
import dataclasses
import sys


def option(default, why, low=None, high=None, choices=None):
    """A field of a dataclass that says why it has its default, and which values it can have."""
    return dataclasses.field(default=default, metadata={
        "help": why, "low": low, "high": high, "choices": choices})


def fail(message):
    """Bad input gets one line, and exit code 2."""
    print(f"train.py: error: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(2)


class Parser(argparse.ArgumentParser):
    def __init__(self, **options):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
                         **options)

    def error(self, message):
        fail(f"{message} (see --help)")

    def add_fields(self, title, fields, task_defaults):
        """A group of flags, one for each field. A flag that is not given gets no value at all."""
        group = self.add_argument_group(title)
        for field in fields:
            metadata = field.metadata
            choices = metadata.get("choices")
            help_text = metadata.get("help", "")
            if field.name in task_defaults:
                help_text += f" (default for this task: {task_defaults[field.name]})"
            elif field.default is not None and field.default is not False:
                help_text += f" (default: {field.default})"
            if field.type is bool:
                group.add_argument(f"--{field.name}", action="store_true", help=help_text,
                                   default=argparse.SUPPRESS)
                continue
            group.add_argument(
                f"--{field.name}", help=help_text, default=argparse.SUPPRESS, choices=choices,
                type=in_range(field.type, metadata.get("low"), metadata.get("high")),
                metavar=None if choices else field.type.__name__.upper())


def parser_for(about, groups, task_defaults):
    """The command line of train.py. `groups` has a class for each title of a group of flags; the
    fields of one that is a dataclass become flags. `task_defaults` are for --help only."""
    parser = Parser(description=about)
    existing = parser.add_argument_group("with the last run in out/, or the one in --out")
    existing = existing.add_mutually_exclusive_group()
    existing.add_argument("--ask", metavar="PROMPT", help="let the model answer")
    existing.add_argument("--inspect", nargs="?", const="cold_start",
                          choices=("cold_start", "last"), metavar="WHEN",
                          help="show an update, token by token, to the model as it was after the "
                               "cold start (the default), or with `last` after the last checkpoint")
    existing.add_argument("--eval_only", action="store_true", help="evaluate the model")
    existing.add_argument("--resume", action="store_true", help="go on with RL")
    for title, group in groups.items():
        if dataclasses.is_dataclass(group):
            parser.add_fields(title, dataclasses.fields(group), task_defaults)
    parser.add_argument("--fresh", action="store_true", help="make the cold start, cached or not")
    return parser


def in_range(kind, low, high):
    """A function: text -> a value of that kind from `low` to `high`, or argparse's error."""
    low = -1e9 if low is None else low
    high = 1e9 if high is None else high

    def convert(text):
        value = kind(text)
        if kind is not str and not low <= value <= high:        # NaN is not in the range either
            raise argparse.ArgumentTypeError(f"{text[:20]} is not from {low} to {high}")
        return value
    convert.__name__ = kind.__name__        # argparse shows it: "invalid int value: 'x'"
    return convert
