"""Arithmetic with an imperfect teacher and a reward that is a rule.

    prompt     347+585=
    response   932                                          the answer at once, or
               <think>7+5+0=12,4+8+1=13,3+5+1=9</think>932  worked digit by digit

    +  low digit first     digit + digit + carry = sum                   7+5+0=12,4+8+1=13
    -  low digit first     10 + digit - digit - borrow = difference      12-5-0=7,14-8-1=5
                           (below 10: the next digit lends)
    *  low digit first     digit * factor = product + carry = sum        7*6=42+0=42,4*6=24+4=28
    /  high digit first    rest,digit / divisor = quotient * divisor     8/6=1*6=6,8-6=2,
                           = product; the next rest is the difference    24/6=4*6=24,4-4=0
                           of the last digits, borrowing 10 if needed

Each step is a fact of a few digits, small enough that other problems nearly always share it.

The teacher thinks in a part of its demonstrations. It slips at a step now and then, and carries the
slip on to the answer. When it does not think, it guesses, and the guess may be wrong. A model that
imitates it perfectly is right as often as the teacher: imitation ends there, and RL goes past it.

What a task needs is said in data/tasks.py. To see problems and responses: python data/arithmetic.py
"""
import hashlib
import itertools
import os
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

OPERATIONS = "+-*/"
# How often the cold start sees problems of 1, 2, 3, ... digits: the long ones are left to RL.
DIGIT_WEIGHTS = (1, 2, 3, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)


@dataclass(frozen=True)
class Problem:
    prompt: str         # "347+585="
    answer: str         # "932", canonical: no sign, no leading zero
    kind: str           # "+3": the operation and the digits of the larger operand


def is_held_out(op: str, a: int, b: int) -> bool:
    """A tenth of all problems, chosen by a stable hash; 3+58 and 58+3 are on the same side."""
    name = f"{max(a, b)}{op}{min(a, b)}".encode()
    return hashlib.sha256(name).digest()[0] < 26


def random_number(digits: int, rng: random.Random) -> int:
    return rng.randrange(10 ** (digits - 1) if digits > 1 else 0, 10 ** digits)


def random_problem(op: str, digits: int, rng: random.Random, held_out: bool = False) -> Problem:
    """A problem whose larger operand has that many digits, on the wanted side of the split."""
    while True:
        a = random_number(digits, rng)
        if op in "+-":
            other = random_number(rng.randint(1, digits), rng)
            b = min(a, other)
            a = max(a, other)
        else:
            b = rng.randint(1, 9)
        if op == "/":
            a -= a % b                      # exact; this may lose a digit: 11/6 becomes 6/6
        operands = (b, a) if op == "+" and rng.random() < 0.5 else (a, b)
        if len(str(max(operands))) == digits and is_held_out(op, a, b) == held_out:
            left, right = operands
            return Problem(f"{left}{op}{right}=", str(calculate(op, left, right)), f"{op}{digits}")


def calculate(op: str, a: int, b: int) -> int:
    if op == "+":
        return a + b
    if op == "-":
        return a - b
    if op == "*":
        return a * b
    return a // b


def work(op: str, a: int, b: int, slip: Callable) -> tuple[list[str], int]:
    """The steps of a calculation and its result; `slip(value, n)` may give a wrong one below n."""
    if op == "/":
        return divide(a, b, slip)
    steps = []
    result = ""
    carry = 0
    n_digits = len(str(a)) if op == "*" else max(len(str(a)), len(str(b)))
    for i in range(n_digits):                           # the low digit first
        x = a // 10 ** i % 10
        y = b // 10 ** i % 10
        if op == "+":
            total = slip(x + y + carry, 20)
            steps.append(f"{x}+{y}+{carry}={total}")
            carry = total // 10
        elif op == "-":
            total = slip(10 + x - y - carry, 20)        # 1 is always borrowed, and left if unused
            steps.append(f"1{x}-{y}-{carry}={total}")
            carry = int(total < 10)
        else:
            total = slip(x * b + carry, 90)
            steps.append(f"{x}*{b}={x * b}+{carry}={total}")
            carry = total // 10
        result = f"{total % 10}{result}"
    return steps, int(result if op == "-" else f"{carry}{result}")


def divide(a: int, b: int, slip: Callable) -> tuple[list[str], int]:
    """The steps of a division and its result; the rest is carried from the high digit down."""
    steps = []
    result = ""
    rest = 0
    for digit in str(a):
        top = 10 * rest + int(digit)
        quotient = slip(min(top // b, 9), 10)           # above 9 only after a slip
        product = quotient * b
        rest = (top - product) % 10
        steps.append(f"{top}/{b}={quotient}*{b}={product},{top % 10}-{product % 10}={rest}")
        result += str(quotient)
    return steps, int(result)


@dataclass
class Task:
    """The fields become options of the command line. With the defaults, the teacher is right 0.78
    of the time."""
    max_digits: int = field(default=3, metadata={
        "help": "operands have 1 to this many digits; the cold start sees few of more than 3",
        "low": 1, "high": 9})
    think: float = field(default=0.4, metadata={
        "help": "share of demonstrations that think; RL should raise it", "low": 0, "high": 1})
    slip: float = field(default=0.05, metadata={
        "help": "chance that a worked step is wrong", "low": 0, "high": 1})
    guess: float = field(default=0.3, metadata={
        "help": "chance that an answer given at once is wrong", "low": 0, "high": 1})

    @property
    def kinds(self) -> list[str]:
        """What `sample` can be asked for: "+1", "+2", ... "/3"."""
        return [f"{op}{digits}" for op, digits in
                itertools.product(OPERATIONS, range(1, self.max_digits + 1))]

    def sample(self, rng: random.Random, kind: str | None = None) -> Problem:
        """A random problem of that kind, never a held-out one. Without a kind, as the cold start
        needs them: division twice as often as each other operation, digits as in DIGIT_WEIGHTS."""
        if kind is not None:
            return random_problem(kind[0], int(kind[1:]), rng)
        op = rng.choice("+-*//")
        weights = DIGIT_WEIGHTS[:self.max_digits]
        digits = rng.choices(range(1, self.max_digits + 1), weights)[0]
        return random_problem(op, digits, rng)

    def held_out(self, per_kind: int = 40) -> list[Problem]:
        """The fixed test set: `per_kind` problems of each operation and number of digits.

        There are few one-digit problems to hold out (4 subtractions, 8 divisions), so each of these
        stands in it several times."""
        rng = random.Random("held out")
        kinds = itertools.product(OPERATIONS, range(1, self.max_digits + 1), range(per_kind))
        return [random_problem(op, digits, rng, held_out=True) for op, digits, _ in kinds]

    def demonstrate(self, problem: Problem, rng: random.Random, think: bool | None = None) -> str:
        """The teacher's response, right or wrong; `think` decides whether it thinks."""
        def maybe_slip(value, n):
            if rng.random() >= self.slip:
                return value
            return rng.choice([wrong for wrong in range(n) if wrong != value])

        if think is None:
            think = rng.random() < self.think
        if think:
            op = problem.kind[0]
            a, b = map(int, problem.prompt[:-1].split(op))
            steps, result = work(op, a, b, maybe_slip)
            return f"<think>{','.join(steps)}</think>{result}"
        if rng.random() >= self.guess:
            return problem.answer
        wrong = int(problem.answer)
        while str(wrong) == problem.answer:         # as long as the answer, but not the answer
            wrong = random_number(len(problem.answer), rng)
        return str(wrong)

    def reward(self, problem: Problem, response: str) -> float:
        """1.0 if what follows the thinking is the answer, digit for digit, else 0.0.

        Any text gets a number in one pass: it is compared as text, nothing is evaluated."""
        thinking, closed, answer = response.rpartition("</think>")
        if closed and not thinking.startswith("<think>"):
            return 0.0
        nested = "<" in thinking.removeprefix("<think>")
        return float(answer == problem.answer and not nested)

    def thinks(self, response: str) -> bool:
        """True if it works the answer out, or begins to."""
        return response.startswith("<think>")


def share_right(task: Task, problems: list[Problem], rng: random.Random) -> float:
    """How often the teacher is right."""
    return sum(task.reward(p, task.demonstrate(p, rng)) for p in problems) / len(problems)


def main():
    task = Task()
    rng = random.Random(0)
    kinds = list(itertools.product(OPERATIONS, range(1, task.max_digits + 1)))
    print("prompt   at once   worked")
    for op, digits in kinds:
        problem = random_problem(op, digits, rng)
        at_once = task.demonstrate(problem, rng, think=False)
        worked = task.demonstrate(problem, rng, think=True)
        print(f"{problem.prompt:9}{at_once:10}{worked}")
    print("\nHow often the teacher is right (it thinks in "
          f"{task.think:.0%} of its demonstrations, slips at {task.slip:.0%} of the steps and "
          f"guesses wrong {task.guess:.0%} of the time)")
    for op, digits in kinds:
        problems = [random_problem(op, digits, rng) for _ in range(3000)]
        unit = "digit" if digits == 1 else "digits"
        print(f"    {op} {digits} {unit:6} {share_right(task, problems, rng):.3f}")
    problems = [task.sample(rng) for _ in range(10_000)]
    print(f"    all        {share_right(task, problems, rng):.3f}")
    print("\nvocabulary  ", *(Path(__file__).parent / "vocabulary.txt").read_text().split())


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:         # whoever read this, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
