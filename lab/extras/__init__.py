"""What the options can add to the core: one file each, which a reader can skip and a forker delete,
together with its name in the list below.

A file has any of these:

    Options             a dataclass whose fields become flags, under its docstring as a title
    wanted(config)      True if the options ask for the extra; ValueError for options that do not go
                        together
    Extra               a class that is put in front of train.Trainer. It overrides methods that
                        Trainer lists, and gets what they do without it by super()
    COLUMNS             names of what it measures: each a column of metrics.csv
    UPDATE_COLUMNS      the same for updates.csv; LAYER_COLUMNS, of which every layer has one
    ROUTING_REPLAY      names of more ways of --routing_replay

With the default options nothing of these files runs but `metrics`, `cold_cache`, `interrupts`.
"""
import importlib
import inspect

# The first one is outermost: it is called first, and calls the next by super(). What encloses must
# stand before what it encloses, and what replaces a method must stand behind all that call it.
NAMES = [
    "team",                 # averages the gradients before precision divides them by its scale
    "interrupts",
    "metrics",
    "kl_term",              # scores the reference for a whole mini-batch
    "precision",            # before micro_batches and all who score, whose types it sets
    "micro_batches",
    "rescoring",            # corrects whatever advantages there are, the penalty included
    "overlong",             # adds to the rewards that critic and relatives make advantages of
    "dynamic_sampling",
    "other_sampler",
    "critic",               # replaces the advantages
    "relatives",            # replaces the advantages
    "cold_cache",           # takes the place of the cold start, but not of what follows it
]
EXTRAS = [importlib.import_module(f"lab.extras.{name}") for name in NAMES]
OPTIONS = [extra.Options for extra in EXTRAS if hasattr(extra, "Options")]


def collect(kind):
    """All names that the extras have under one of the headings above."""
    names = []
    for extra in EXTRAS:
        names += getattr(extra, kind, ())
    return names


COLUMNS = {kind: collect(kind) for kind in ("COLUMNS", "UPDATE_COLUMNS", "LAYER_COLUMNS")}
ROUTING_REPLAY = collect("ROUTING_REPLAY")


def extend(Trainer, config):
    """The class Trainer with the extras that the options ask for. ValueError if one of them would
    hide what another one does: a method that does not call super() ends the chain."""
    wanted = [extra.Extra for extra in EXTRAS if extra.wanted(config)]
    replaced_by = {}            # name of a method -> the extra that ends its chain
    for Extra in wanted:
        for name, method in vars(Extra).items():
            if not inspect.isfunction(method) or not hasattr(Trainer, name):
                continue
            if name in replaced_by:
                raise ValueError(f"{replaced_by[name]} and {Extra.__module__} do not go together: "
                                 f"the {name} of the first would hide that of the second")
            if "super" not in inspect.unwrap(method).__code__.co_names:
                replaced_by[name] = Extra.__module__
    return type("Trainer", (*wanted, Trainer), {})
