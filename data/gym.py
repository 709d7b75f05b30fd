"""Any short task of reasoning-gym: problems and a verifier that nobody here wrote.

    pip install reasoning-gym
    python train.py --task gym --dataset spell_backward

What all questions of a dataset have in common, at the beginning and at the end, is left out:

    question   Spell this word backward (example: sun -> nus): hypomeron
    prompt     hypomeron=
    response   noremopyh

The reward is the dataset's own score, which may be a part for what is partly right. The accuracies
of a run count the full score, 1, alone. Kinds are values of what the dataset calls difficulty.
"""
import inspect
import json
import os
import random
import re
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple


class Problem(NamedTuple):
    prompt: str         # "hypomeron="
    entry: dict         # as reasoning-gym has it
    kind: str           # "word_len=9", or "all"


def without_template(questions: list[str]) -> list[str]:
    """The questions without what all of them have in common at both ends."""
    start = len(os.path.commonprefix(questions))
    backwards = [question[start:][::-1] for question in questions]
    end = len(os.path.commonprefix(backwards))
    return [text[end:][::-1] for text in backwards]


def kind_of(metadata: dict) -> str:
    """The first whole number in it that the dataset calls a difficulty."""
    difficulty = metadata.get("difficulty")
    for name in difficulty if isinstance(difficulty, dict) else ():
        if isinstance(metadata.get(name), int):
            return f"{name}={metadata[name]}"
    return "all"


@dataclass
class Task:
    """The fields become options of the command line."""
    defaults: ClassVar[dict] = {"cold_steps": 500, "steps": 80, "eval_every": 40}
    dataset: str = field(default="spell_backward", metadata={"help": "a name in reasoning-gym"})
    gym: str = field(default="", metadata={
        "help": "parameters of the dataset, such as min_word_len=3,max_word_len=6"})
    gym_seed: int = field(default=0, metadata={"help": "seed of the dataset"})
    n_problems: int = field(default=20000, metadata={
        "help": "problems to make; a tenth are held out. Their accuracy is the share of responses "
                "with the full score, the reward of a step is the mean score", "low": 100})
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
        except ImportError:
            raise ValueError("task gym needs a package: pip install reasoning-gym") from None
        except Exception as error:          # of its own kinds
            raise ValueError(f"--dataset {self.dataset} --gym {self.gym!r}: {error}") from None
        kinds = [kind_of(entry["metadata"]) for entry in entries]
        if len(set(kinds)) > 30:            # too few problems of each, too many lines in the log
            kinds = ["all" for _ in kinds]
        prompts = without_template([entry["question"] for entry in entries])
        problems = [Problem(f"{prompt}=", entry, kind)
                    for prompt, entry, kind in zip(prompts, entries, kinds)]
        self.test_set = problems[::10][:400]
        self.of_kind = {}                   # the others
        for i, problem in enumerate(problems):
            if i % 10:
                self.of_kind.setdefault(problem.kind, []).append(problem)
        self.kinds = sorted(self.of_kind, key=lambda kind: (len(kind), kind))
        answers = [str(entry["answer"]) for entry in entries]
        self.letters = sorted(set("".join(answers)))
        self.vocabulary = ["<end>", "<pad>", *sorted({*"=", *"".join(prompts), *self.letters})]
        if "None" in answers:
            raise ValueError(f"--dataset {self.dataset} has questions without an answer to imitate")
        source = inspect.getsource(inspect.getmodule(type(self.data)))
        if "parse_expr" in source and any(map(str.isalpha, self.letters)):
            raise ValueError(f"--dataset {self.dataset} would run responses as Python")

    def sample(self, rng: random.Random, kind: str | None = None) -> Problem:
        """A problem of this kind or of any, never a held-out one."""
        return rng.choice(self.of_kind[kind or rng.choice(self.kinds)])

    def held_out(self) -> list[Problem]:
        return self.test_set

    def demonstrate(self, problem: Problem, rng: random.Random) -> str:
        answer = str(problem.entry["answer"])
        if rng.random() < self.right:
            return answer
        if self.wrong == "other":
            return str(self.sample(rng).entry["answer"])
        i = rng.randrange(len(answer) or 1)
        return answer[:i] + rng.choice(self.letters) + answer[i + 1:]

    def reward(self, problem: Problem, response: str) -> float:
        """0 for a character that no answer has, and for a power: some verifiers calculate what a
        response says, which may take forever."""
        if "**" in response or not set(response) <= set(self.letters):
            return 0.0
        try:
            return float(self.data.score_answer(response, problem.entry))
        except Exception:                   # a verifier need not know any text
            return 0.0
