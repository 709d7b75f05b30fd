"""What a task is, and how the trainer asks one for what it needs.

A task is a file `data/NAME.py` with a class `Task`, a dataclass or not, that has three methods:

    sample(rng)                    -> a problem: any object with a text `problem.prompt`
    demonstrate(problem, rng)      -> a response to imitate, right or wrong: a text
    reward(problem, response)      -> a finite number, for any text `response`

`rng` is a random.Random, the only source of chance. The rest is optional:

    held_out()                     -> a list of problems that `sample` never gives, for evaluation
    problem.kind                   a short text such as "+3". In the table of accuracies, kinds with
                                   the same first character share a line; in the curves, those with
                                   the same remainder do
    kinds, sample(rng, kind)       a list of all kinds, and a problem of the kind you name, which is
                                   its problem.kind: RL then asks above all what is sometimes
                                   answered right (data/queries.py)
    thinks(response)               True if the text thinks before it answers: the log has the share
                                   that does, and its reward
    measure(problem, response, cut)
                                   a dict {name: number} about any text, with the same names each
                                   time; `cut` says that the text had not ended, so that its reward
                                   is 0. Their means are logged, printed and drawn
    defaults                       a dict {option: value}: other defaults for options of train.py.
                                   In a dataclass, annotate it as ClassVar
    data/NAME.txt                  its own vocabulary, in place of data/vocabulary.txt

If the class is a dataclass, its fields become options of the command line. Every character of a
prompt or a demonstration must be in the vocabulary.
"""
import dataclasses
import importlib.util
import random
from pathlib import Path

METHODS = ("sample", "demonstrate", "reward")


def task_class(name: str) -> type:
    """The class Task of data/NAME.py. ValueError if there is none, or a method is missing."""
    if not name.isidentifier() or importlib.util.find_spec(f"data.{name}") is None:
        raise ValueError(f"task {name!r} does not exist; write data/{name or 'NAME'}.py with a "
                         "class Task, as data/tasks.py says")
    Task = getattr(importlib.import_module(f"data.{name}"), "Task", None)
    if Task is None:
        raise ValueError(f"task {name!r}: data/{name}.py has no class Task; data/tasks.py says "
                         "what it needs")
    missing = [method for method in METHODS if not callable(getattr(Task, method, None))]
    if missing:
        raise ValueError(f"task {name!r}: its class Task lacks {' and '.join(missing)}; "
                         "data/tasks.py says what it needs")
    return Task


def thinks(task, response: str) -> bool:
    """False for all responses if the task does not say what thinking is."""
    return bool(task.thinks(response)) if hasattr(task, "thinks") else False


def measure(task, problem, response: str, cut: bool) -> dict[str, float]:
    """Nothing if the task does not say what to measure."""
    measures = task.measure(problem, response, cut) if hasattr(task, "measure") else {}
    return {name: float(value) for name, value in measures.items()}


def defaults(Task: type, options: type) -> dict:
    """The defaults of a class Task for fields of the dataclass `options`. ValueError for a name
    that is no field."""
    of_task = dict(getattr(Task, "defaults", {}))
    names = [field.name for field in dataclasses.fields(options)]
    for name in of_task:
        if name not in names:
            raise ValueError(f"{Task.__module__}: its `defaults` name {name!r}, which is no option")
    return of_task


def vocabulary(name: str) -> Path:
    """The vocabulary file of data/NAME.py: data/NAME.txt, or else data/vocabulary.txt."""
    own = Path(importlib.util.find_spec(f"data.{name}").origin).with_suffix(".txt")
    return own if own.exists() else Path(__file__).with_name("vocabulary.txt")


def held_out_problems(task) -> list:
    """The task's held-out problems. If it has none: 400 problems as in training, some of which the
    training may draw too."""
    if hasattr(task, "held_out"):
        return task.held_out()
    return [task.sample(random.Random(f"held out {i}")) for i in range(400)]
