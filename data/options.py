"""Options: the fields of a dataclass explain themselves, and the command line is made of them."""
import argparse
import dataclasses
import sys


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
