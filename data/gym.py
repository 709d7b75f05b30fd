"""Any short task of reasoning-gym: problems and a verifier that nobody here wrote.

    pip install reasoning-gym
    python train.py --task gym --dataset spell_backward

What all questions of a dataset have in common, at the beginning and at the end, is left out:

    question   Spell this word backward (example: sun -> nus): hypomeron
    prompt     hypomeron=
    response   noremopyh

The reward is the dataset's own score, from 0 to 1: it may be a part for what is partly right.
Accuracy is the share of responses with 1. Kinds are values of what a dataset calls difficulty.
"""
import inspect
import json
import os
import random
import re
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

TOO_LARGE = re.compile(r"\*\*|^-?[\d.]+e[-+]?\d{4}")      # powers; but 0x1e10000 is none


class Problem(NamedTuple):
    prompt: str         # "hypomeron="
    answer: str         # "noremopyh"
    kind: str           # "word_len=9", or "all"
    entry: dict         # as reasoning-gym has it


def without_template(questions: list[str]) -> list[str]:
    """The questions without what all of them have in common at both ends."""
    start = len(os.path.commonprefix(questions))
    end = len(os.path.commonprefix([question[start:][::-1] for question in questions]))
    return [question[start:len(question) - end] for question in questions]


def kind_of(metadata: dict) -> str:
    """The first whole number in it that the dataset calls a difficulty."""
    difficulty = metadata.get("difficulty")
    if isinstance(difficulty, dict):
        for name in difficulty:
            if isinstance(metadata.get(name), int):
                return f"{name}={metadata[name]}"
    return "all"


@dataclass
class Task:
    """The fields become options of the command line."""
    defaults: ClassVar[dict] = {"cold_steps": 500, "steps": 200}
    dataset: str = field(default="spell_backward", metadata={"help": "a name in reasoning-gym"})
    gym: str = field(default="", metadata={
        "help": "parameters of the dataset, such as min_word_len=3,max_word_len=6"})
    gym_seed: int = field(default=0, metadata={"help": "seed of the dataset"})
    n_problems: int = field(default=20000, metadata={
        "help": "problems to make; a tenth, at most 400, are for evaluation, where accuracy is the "
                "share of responses with the full score", "low": 100})
    right: float = field(default=0.5, metadata={
        "help": "share of right answers of the teacher", "low": 0, "high": 1})
    wrong: str = field(default="other", metadata={
        "help": "its wrong ones: the answer to another problem, or one with a wrong character",
        "choices": ("other", "typo")})

    def __post_init__(self):
        """Make the problems. ValueError if reasoning-gym cannot, or they do not fit."""
        try:
            import reasoning_gym
            parameters = json.loads("{" + re.sub(r"(\w+)=", r'"\1":', self.gym) + "}")
            self.data = reasoning_gym.create_dataset(self.dataset, size=self.n_problems,
                                                     seed=self.gym_seed, **parameters)
            entries = list({entry["question"]: entry for entry in self.data}.values())
        except Exception as error:          # of its own kinds, or it is not there
            raise ValueError(f"--dataset {self.dataset} --gym {self.gym!r}: {error}. It takes pip "
                             "install reasoning-gym, and --gym NAME=VALUE,NAME=VALUE") from None
        kinds = [kind_of(entry["metadata"]) for entry in entries]
        if len(set(kinds)) > 30:            # too few problems of each, too many lines in the log
            kinds = ["all" for _ in kinds]
        prompts = without_template([entry["question"] for entry in entries])
        prompts = [f"{prompt}=" for prompt in prompts]
        answers = [str(entry["answer"]) for entry in entries]
        problems = list(map(Problem, prompts, answers, kinds, entries))
        self.test_set = problems[::10][:400]
        self.of_kind = {}                   # the others
        for i, problem in enumerate(problems):
            if i % 10:
                self.of_kind.setdefault(problem.kind, []).append(problem)
        self.kinds = sorted(self.of_kind, key=lambda kind: (len(kind), kind))
        self.letters = sorted(set("".join(answers)))
        self.vocabulary = ["<end>", "<pad>", *sorted(set("".join(prompts + answers)))]
        self.refuse("None" in answers, "has questions without an answer to imitate")
        self.refuse(len(problems) < 20, f"has {len(problems)} different questions, too few")
        source = inspect.getsource(inspect.getmodule(type(self.data)))
        runs = "parse_expr" in source or "eval(answer" in source and "[" in self.letters
        self.refuse(runs and any(map(str.isalpha, self.letters)), "would run a response as Python")

    def refuse(self, bad: bool, reason: str):
        if bad:
            raise ValueError(f"--dataset {self.dataset} {reason}; take another")

    def sample(self, rng: random.Random, kind: str | None = None) -> Problem:
        """A problem of this kind or of any, never a held-out one."""
        return rng.choice(self.of_kind[kind or rng.choice(self.kinds)])

    def held_out(self) -> list[Problem]:
        return self.test_set

    def demonstrate(self, problem: Problem, rng: random.Random) -> str:
        answer = problem.answer
        if rng.random() < self.right:
            return answer
        if self.wrong == "other":
            return self.sample(rng).answer
        i = rng.randrange(len(answer) or 1)
        return answer[:i] + rng.choice(self.letters) + answer[i + 1:]

    def reward(self, problem: Problem, response: str) -> float:
        """The score; 0 for a response with a character that no right answer has, or with a number
        that is too large. Some verifiers run a response as Python: so none can name a function, or
        take forever."""
        if TOO_LARGE.search(response) or not set(response) <= set(self.letters):
            return 0.0
        try:
            return float(self.data.score_answer(response, problem.entry))
        except Exception:                   # a verifier need not know any text
            return 0.0
