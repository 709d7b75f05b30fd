"""Countdown: reach a target with some numbers, by trial after trial. A search that must learn not
to give up.

    prompt     3,8,2=30:                                    make 30 of 3, 8 and 2; `:` ends it
    response   8+2=10,10*3=30!                              a hit at the first trial, or
               8-3=5,5*2=10<8*2=16,16*3=48>8+2=10,10*3=30!  at the third

A trial uses every number once. Each step takes two of the numbers and puts their result in their
place, until one number is left. Behind the trial stands a mark: `<` if that number is below the
target, `>` if it is above, `!` if it hits. So the response says of itself whether to go on. The
answer is the last trial.

The teacher tries at random, stops at a hit, and gives up after 1 to 6 trials. So it seldom hits,
but it shows how to calculate, how to mark and how to go on. A model that imitates it perfectly hits
as seldom. By RL the model can learn not to give up, and to try first what is likelier to hit.

(With one mark for all misses, in place of `<` and `>`, the model did not learn in the same time to
tell a hit from a miss: hits are rare. `<` and `>` make it compare at every trial.)

What a task needs is said in data/tasks.py. To see problems and responses: python data/countdown.py
"""
import hashlib
import itertools
import os
import random
import re
import sys
from dataclasses import dataclass, field
from functools import lru_cache
from typing import ClassVar

LARGEST = 99        # the teacher makes no step with a larger result

Numbers = tuple[int, ...]


@dataclass(frozen=True)
class Problem:
    prompt: str         # "3,8,2=30:"
    numbers: Numbers    # 3, 8, 2
    target: int         # 30


def is_held_out(numbers: Numbers, target: int) -> bool:
    """A tenth of all problems, chosen by a stable hash; the order of the numbers does not count."""
    name = f"{sorted(numbers)}={target}".encode()
    return hashlib.sha256(name).digest()[0] < 26


def calculate(op: str, a: int, b: int) -> int | None:
    """a op b for a and b above 0; None if that is not 1, 2, 3, ..."""
    if op == "+":
        return a + b
    if op == "*":
        return a * b
    if op == "-":
        return a - b if a > b else None
    return a // b if a % b == 0 else None


def possible_steps(numbers: Numbers) -> tuple[tuple[str, Numbers], ...]:
    """The steps that the teacher may make: what it writes, and the numbers that it then has. It
    writes the larger number first."""
    found = []
    for i, j in itertools.combinations(range(len(numbers)), 2):
        a = max(numbers[i], numbers[j])
        b = min(numbers[i], numbers[j])
        rest = [number for k, number in enumerate(numbers) if k not in (i, j)]
        for op in "+-*/":
            result = calculate(op, a, b)
            useless = op == "/" and b == 1          # the same as times 1
            if result is not None and result <= LARGEST and not useless:
                found.append((f"{a}{op}{b}={result}", (*rest, result)))
    return tuple(found)


@lru_cache(maxsize=100_000)         # it is asked for each response to the same problem
def hit_chance(numbers: Numbers, target: int) -> float:
    """How often a random trial hits."""
    if len(numbers) == 1:
        return float(numbers[0] == target)
    steps = possible_steps(numbers)
    return sum(hit_chance(left, target) for _, left in steps) / len(steps)


def random_trial(numbers: Numbers, rng: random.Random) -> tuple[str, int]:
    """A trial and its result."""
    steps = []
    while len(numbers) > 1:
        step, numbers = rng.choice(possible_steps(numbers))
        steps.append(step)
    return ",".join(steps), numbers[0]


def is_hit(problem: Problem, trial: str) -> bool:
    """True if the steps of a trial use every number once, are right and reach the target. The
    teacher's habits, which number comes first and how large a result may be, are not asked for.

    For any text: numbers are compared as text, and only those of the problem are calculated with,
    so that nothing is evaluated and nothing grows long."""
    numbers = [str(number) for number in problem.numbers]
    steps = trial.split(",", len(numbers))
    if len(steps) != len(numbers) - 1:
        return False
    for step in steps:
        parts = re.fullmatch("([0-9]+)([-+*/])([0-9]+)=([0-9]+)", step)
        if not parts:
            return False
        a, op, b, result = parts.groups()
        for operand in (a, b):
            if operand not in numbers:
                return False
            numbers.remove(operand)
        right = calculate(op, int(a), int(b))
        if right is None or result != str(right):
            return False
        numbers.append(result)
    return numbers == [str(problem.target)]


def split(response: str) -> list[tuple[str, str]]:
    """The trials of a response, each with its mark. What follows the last mark is no trial."""
    parts = re.split("([<>!])", response)           # trial, mark, trial, mark, ..., rest
    return list(zip(parts[0::2], parts[1::2]))


@dataclass
class Task:
    """The fields become options of the command line. With the defaults, the teacher is right 0.26
    of the time."""
    n_numbers: int = field(default=3, metadata={
        "help": "numbers of a problem; 4 need a higher --max_new_tokens", "low": 3, "high": 4})
    max_number: int = field(default=9, metadata={
        "help": "each of them is from 1 to this", "low": 5, "high": 50})
    max_target: int = field(default=60, metadata={
        "help": "the target is from 1 to this", "low": 20, "high": LARGEST})
    max_trials: int = field(default=6, metadata={
        "help": "the teacher gives up after 1 to this many trials; RL should go on for longer",
        "low": 1, "high": 40})

    # Other defaults for train.py. Tokens: room for nine trials, more than the teacher makes.
    # Learning rate: a search is learned slowly, so twice that of arithmetic; but at 1e-3 the model
    # called more misses hits, and at 2e-3 it unlearned everything.
    defaults: ClassVar[dict] = {"max_new_tokens": 128, "lr": 6e-4, "steps": 400, "eval_every": 50}

    def random_problem(self, rng: random.Random, held_out: bool) -> Problem:
        """A target that a random trial has reached, on the wanted side of the split."""
        while True:
            numbers = tuple(rng.randint(1, self.max_number) for _ in range(self.n_numbers))
            _, target = random_trial(numbers, rng)
            # A target among the numbers would look solved before it is.
            fits = target <= self.max_target and target not in numbers
            if fits and is_held_out(numbers, target) == held_out:
                return Problem(f"{','.join(map(str, numbers))}={target}:", numbers, target)

    def sample(self, rng: random.Random) -> Problem:
        """A random problem, never a held-out one."""
        return self.random_problem(rng, held_out=False)

    def held_out(self) -> list[Problem]:
        """The fixed test set. With the defaults there are not many problems to hold out, so some
        stand in it several times, most of them with their numbers in another order."""
        rng = random.Random("held out")
        return [self.random_problem(rng, held_out=True) for _ in range(400)]

    def demonstrate(self, problem: Problem, rng: random.Random) -> str:
        """The teacher's response: its trials are right, but seldom hit."""
        response = ""
        for _ in range(rng.randint(1, self.max_trials)):
            trial, result = random_trial(problem.numbers, rng)
            if result == problem.target:
                return f"{response}{trial}!"
            mark = "<" if result < problem.target else ">"
            response += trial + mark
        return response

    def reward(self, problem: Problem, response: str) -> float:
        """1.0 if the response ends with a trial that is marked as a hit and is one, else 0.0."""
        if not response.endswith("!"):
            return 0.0
        trial, _ = split(response)[-1]
        return float(is_hit(problem, trial))

    def thinks(self, response: str) -> bool:
        """True if there is more than one trial: the first would have been an answer at once."""
        return len(split(response)) > 1

    def measure(self, problem: Problem, response: str, cut: bool) -> dict[str, float]:
        """What to log of a response:

        trials            how many there are, right or wrong
        random_search     the hits to expect of as many random trials on this problem. Whoever tries
                          at random and stops at a hit has this mean reward, whenever he gives up
                          (Wald's identity); so a higher reward comes from better trials
        gave_up           1 if it ended without a `!`
        false_hits        trials that are marked as hits and are none
        overlooked_hits   hits that are not marked as such"""
        trials = split(response)
        marked_misses = [trial for trial, mark in trials if mark != "!"]
        marked_hits = [trial for trial, mark in trials if mark == "!"]
        return {
            "trials": len(trials),
            "random_search": hit_chance(problem.numbers, problem.target) * len(trials),
            "gave_up": float(not cut and not response.endswith("!")),
            "false_hits": sum(not is_hit(problem, trial) for trial in marked_hits),
            "overlooked_hits": sum(is_hit(problem, trial) for trial in marked_misses),
        }


def main():
    task = Task()
    rng = random.Random(0)
    for problem in [task.sample(rng) for _ in range(8)]:
        print(f"{problem.prompt:11}{task.demonstrate(problem, rng)}")
    problems = [task.sample(rng) for _ in range(5000)]
    right = sum(task.reward(problem, task.demonstrate(problem, rng)) for problem in problems)
    print(f"\nThe teacher is right {right / len(problems):.3f} of the time.")
    print("How often random search hits within")
    chances = [hit_chance(problem.numbers, problem.target) for problem in problems]
    for n in (1, 2, 4, 8, 16, 32):
        hits = sum(1 - (1 - chance) ** n for chance in chances)
        print(f"    {n:2} trials  {hits / len(problems):.3f}")


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:         # whoever read this, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
