"""What a run will ask of its task, asked once before the long work begins.

Every check is a ValueError that names the task, the method and the value."""
import itertools
import math
import random

from data import demonstrations, tasks
from lab import report, runs


def check(trainer, max_prompt, taken):
    """Problems of every kind and held out, demonstrations, rewards, measures, and what a checkpoint
    keeps. `taken` are names that no measure can have."""
    task = trainer.task
    rng = random.Random("check")
    kinds = list(getattr(task, "kinds", ()))
    demonstrations.check(task, trainer.tokenizer, max_prompt, trainer.config.max_new_tokens)
    problems = [task.sample(rng, kind) for kind in kinds] or [task.sample(rng) for _ in range(20)]
    held_out = tasks.held_out_problems(task)
    if not held_out:
        raise ValueError(f"{name_of(task)}.held_out() is empty; leave the method out, or give some "
                         "problems")
    for problem in itertools.chain(problems, held_out):
        check_prompt(trainer, problem, max_prompt)
    names = set()
    for problem in problems[:100]:
        for text in (task.demonstrate(problem, rng), "", problem.prompt):
            check_answer(task, problem, text, names)
    for name in names.intersection([*report.COLUMNS, *taken]):
        raise ValueError(f"{name_of(task)}.measure gives {name!r}, a column that metrics.csv has "
                         "already; choose another name")
    all_kinds = kinds + [getattr(problem, "kind", None) for problem in held_out]
    runs.check_state({"options": trainer.options, "kinds": all_kinds})


def name_of(task):
    return f"{type(task).__module__}.Task"


def check_prompt(trainer, problem, max_prompt):
    ids = trainer.tokenizer.encode(problem.prompt)
    if not 0 < len(ids) <= max_prompt:
        raise ValueError(f"{name_of(trainer.task)}: a prompt has 1 to {max_prompt} tokens; this "
                         f"one has {len(ids)}: {problem.prompt!r}")


def check_answer(task, problem, text, names):
    """The reward and the measures of a text, and of the same one truncated. `names` are those of
    the measures, which the first one gives."""
    reward = task.reward(problem, text)
    if not is_finite(reward):
        raise ValueError(f"{name_of(task)}.reward gives {reward!r} for {text!r} at "
                         f"{problem.prompt!r}; it must be a finite number")
    for truncated in (False, True):
        measures = task.measure(problem, text, truncated) if hasattr(task, "measure") else {}
        if not all(map(is_finite, measures.values())):
            raise ValueError(f"{name_of(task)}.measure gives {measures} for {text!r}; each must be "
                             "a finite number")
        names |= set(measures) if not names else set()
        if set(measures) != names:
            raise ValueError(f"{name_of(task)}.measure gives {sorted(measures)} for {text!r} with "
                             f"truncated={truncated}; the names must always be {sorted(names)}")


def is_finite(x):
    try:
        return math.isfinite(float(x))
    except (TypeError, ValueError):
        return False
