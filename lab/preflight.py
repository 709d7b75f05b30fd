"""What a run will ask of its task, asked once before the long work begins.

Every check is a ValueError that names the task, the method and the value."""
import math
import random

from data import demonstrations, tasks
from lab import report


def check(trainer, max_prompt, taken):
    """Problems of every kind and held out, demonstrations, rewards, measures, options. `taken` are
    names that no measure can have."""
    for name, value in trainer.options.items():         # a checkpoint keeps plain data only
        if type(value) not in (int, float, str, bool, type(None)):
            raise ValueError(f"the option {name} is {value!r}, a {type(value).__name__}; it must "
                             "be a plain number or text")
    names = set()
    problems = ask(trainer.task, "sample", all_problems, trainer.task, random.Random("check"))
    for problem in problems:
        check_prompt(trainer, problem, max_prompt)
    check_answers(trainer, problems, names)
    demonstrations.check(trainer.task, trainer.tokenizer, max_prompt, trainer.config.max_new_tokens)
    for name in names.intersection([*report.COLUMNS, *taken]):
        fail(trainer.task, "measure", f"gives {name!r}, a column that metrics.csv has already; "
             "choose another name")
    trainer.measure_names = names


class TaskError(ValueError):
    pass


def fail(task, method, message):
    raise TaskError(f"{type(task).__module__}.Task.{method} {message}")


def ask(task, name, method, *arguments):
    """What a method of a task gives; whatever goes wrong in it becomes a ValueError."""
    try:
        return method(*arguments)
    except TaskError:
        raise
    except Exception as error:
        fail(task, name, f"fails: {type(error).__name__}: {error}")


def all_problems(task, rng):
    """A problem of every kind, or 20 without kinds; then the held-out ones."""
    kinds = list(getattr(task, "kinds", ()))
    problems = [task.sample(rng, kind) for kind in kinds] or [task.sample(rng) for _ in range(20)]
    for kind, problem in zip(kinds, problems):
        if type(kind) is not str or problem.kind != kind:
            fail(task, "kinds", f"has {kind!r}, and problem.kind is {problem.kind!r}; both must be "
                 "the same plain text")
    held_out = tasks.held_out_problems(task)
    if not held_out:
        fail(task, "held_out", "is empty; leave the method out, or give some problems")
    for problem in held_out:
        if type(getattr(problem, "kind", "")) is not str:
            fail(task, "held_out", f"has the kind {problem.kind!r}; it must be a plain text")
    return problems + held_out


def check_prompt(trainer, problem, max_prompt):
    prompt = getattr(problem, "prompt", None)
    if not isinstance(prompt, str):
        fail(trainer.task, "sample", f"or held_out gives {problem!r}, which has no text `prompt`")
    ids = trainer.tokenizer.encode(prompt)
    if not ids:
        fail(trainer.task, "sample", "or held_out gives an empty prompt; it needs a character")
    if len(ids) > max_prompt:
        raise ValueError(f"a prompt of {len(ids)} tokens is too long, {max_prompt} are the limit; "
                         f"ask for shorter ones, by an option of the task: {prompt}")


def check_answers(trainer, problems, names):
    """Rewards and measures of some texts. `names` are those of the measures, which the first one
    gives."""
    task = trainer.task
    rng = random.Random("check")
    for problem in [*problems[:50], *problems[-50:]]:
        said = ask(task, "demonstrate", task.demonstrate, problem, rng)
        if not isinstance(said, str):
            fail(task, "demonstrate", f"gives {said!r} at {problem.prompt!r}; it must be a text")
        trainer.tokenizer.encode(said)
        for text in (said, "", problem.prompt):
            reward = ask(task, "reward", task.reward, problem, text)
            if not is_finite(reward):
                fail(task, "reward", f"gives {reward!r} for {text!r} at {problem.prompt!r}; it "
                     "must be a finite number, below 3e38")
            ask(task, "thinks", tasks.thinks, task, text)
            for truncated in (False, True):
                check_measures(task, problem, text, truncated, names)


def check_measures(task, problem, text, truncated, names):
    measures = ask(task, "measure", tasks.measure, task, problem, text, truncated)
    for name, value in measures.items():
        if not isinstance(name, str) or not name or not name.isprintable():
            fail(task, "measure", f"gives the name {name!r}; it must be a text of one line")
        if not is_finite(value):
            fail(task, "measure", f"gives {measures} for {text!r}; each must be a finite number")
    names |= set() if names else set(measures)
    if set(measures) != names:
        fail(task, "measure", f"gives {sorted(measures)} for {text!r} with truncated={truncated}; "
             f"the names must always be {sorted(names)}")


def is_finite(x):
    """True for a number that fp32 can hold."""
    try:
        return not isinstance(x, str) and math.isfinite(float(x)) and abs(float(x)) < 3e38
    except (TypeError, ValueError, OverflowError):
        return False
