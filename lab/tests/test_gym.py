"""Tasks of reasoning-gym: with a stand-in for it, and, if it is there, with itself."""
import random
import re
import sys
from types import SimpleNamespace

import pytest

from data import countdown, gym, tasks
from data.tokenizer import Tokenizer
from lab import report
from lab.tests.tools import metrics


class Sums:
    """A dataset as reasoning-gym has them; a number that is off by one has half of the score."""
    def __init__(self, size, seed, low=0):
        self.rng = random.Random(seed)
        self.numbers = [(self.rng.randint(low, 9), self.rng.randint(low, 9)) for _ in range(size)]

    def __iter__(self):
        for a, b in self.numbers:
            yield {"question": f"What is {a} plus {b}, please?", "answer": str(a + b),
                   "metadata": {"difficulty": {"low": (0, 9), "first": (0, 9)}, "first": a}}

    def score_answer(self, answer, entry):
        return max(0.0, 1 - abs(int(answer) - int(entry["answer"])) / 2)


def create_dataset(name, size, seed, **parameters):
    if name != "sums":
        raise ValueError(f"Dataset '{name}' not registered")
    return Sums(size, seed, **parameters)


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym",
                        SimpleNamespace(create_dataset=create_dataset))


def test_problems_come_without_their_template_and_with_kinds(stand_in):
    task = gym.Task("sums")
    problem = task.sample(random.Random(0), "first=7")
    assert re.fullmatch("7 plus [0-9]=", problem.prompt)
    assert problem.kind == "first=7"
    assert task.kinds == [f"first={a}" for a in range(10)]
    assert task.vocabulary == ["<end>", "<pad>", *" 0123456789=lpsu"]


def test_held_out_problems_are_never_drawn(stand_in):
    task = gym.Task("sums")
    held_out = {problem.entry["question"] for problem in task.held_out()}
    assert len(held_out) == len(task.held_out()) == 10           # of 100 different questions
    rng = random.Random(0)
    drawn = {task.sample(rng).entry["question"] for _ in range(3000)}
    assert len(drawn) == 90
    assert not drawn & held_out


@pytest.mark.parametrize("wrong", ["other", "typo"])
def test_the_teacher_is_right_as_often_as_asked(stand_in, wrong):
    task = gym.Task("sums", right=0.7, wrong=wrong)
    rng = random.Random(0)
    problems = [task.sample(rng) for _ in range(4000)]
    right = [task.demonstrate(p, rng) == p.answer for p in problems]
    by_chance = 0.3 * (0.067 if wrong == "other" else 0.1)      # two sums of 0 to 9 are the same
    assert sum(right) / 4000 == pytest.approx(0.7 + by_chance, abs=0.03)


@pytest.mark.parametrize("response, reward", [
    ("9", 1.0), ("8", 0.5), ("7", 0.0), ("", 0.0), ("nine", 0.0), ("1 0", 0.0), ("9**9", 0.0)])
def test_the_reward_is_the_score_of_any_text(stand_in, response, reward):
    task = gym.Task("sums")
    entry = {"question": "What is 4 plus 5, please?", "answer": "9"}
    assert task.reward(gym.Problem("4 plus 5=", "9", "all", entry), response) == reward


def test_parameters_are_parsed_and_not_run(stand_in):
    task = gym.Task("sums", gym="low=5")
    assert {entry["answer"] for entry in task.data} == {str(n) for n in range(10, 19)}


@pytest.mark.parametrize("options, named", [
    (("--dataset", "products"), "products"),
    (("--dataset", "sums", "--gym", "high=3"), "high"),
    (("--dataset", "sums", "--gym", "low=__import__('os')"), "--gym"),
    (("--dataset", "sums", "--gym", "low"), "--gym"),
    (("--dataset", "sums", "--gym", "low=9"), "different questions"),
    (("--dataset", "sums", "--wrong", "never"), "never"),
])
def test_what_cannot_be_is_told_in_one_line(stand_in, train, capsys, options, named):
    assert train("--task", "gym", *options) == 2
    error = capsys.readouterr().err
    assert named in error
    assert len(error.splitlines()) == 1


def test_without_the_package_one_line_says_what_to_install(monkeypatch, train, capsys):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    assert train("--task", "gym") == 2
    assert "pip install reasoning-gym" in capsys.readouterr().err


# ------------------------------------------------------------------------------------ in a run

RUN = ("--task", "gym", "--dataset", "sums", "--cold_steps", "40", "--cold_tokens", "400",
       "--n_layer", "1", "--max_new_tokens", "4", "--prompts", "8", "--threads", "1", "--device",
       "cpu", "--right", "1")


def test_a_part_of_the_score_is_learned_from_and_is_not_accuracy(stand_in, train):
    assert train(*RUN, "--steps", "2") == 0
    (reward, signal, grad_norm), _ = metrics("out/run-1", ("reward", "no_signal", "grad_norm"))
    assert float(reward) * 64 % 0.5 == 0
    assert float(signal) < 1
    assert float(grad_norm) > 0
    responses = [SimpleNamespace(reward=r, truncated=False, thinks=False, length=1, measures={},
                                 problem=SimpleNamespace(kind="k")) for r in (1.0, 0.5, 0.5, 0.0)]
    evaluation = report.evaluation(responses, responses[:2])
    assert evaluation["accuracy"] == 0.25
    assert evaluation["accuracy_greedy"] == 0.5
    assert evaluation["kinds"] == {"k": 0.25}
    assert report.response_metrics(responses)["reward"] == 0.5
    assert report.response_metrics(responses)["reward_wrong"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("word, code", [("ulps", 0), ("times", 2)])
def test_a_run_keeps_the_vocabulary_that_it_began_with(stand_in, train, capsys, monkeypatch, word,
                                                       code):
    assert train(*RUN, "--steps", "1") == 0

    class NextVersion(Sums):
        def __iter__(self):
            for entry in super().__iter__():
                yield entry | {"question": entry["question"].replace("plus", word)}

    def create_another(name, size, seed):
        return NextVersion(size, seed, low=5)
    another = SimpleNamespace(create_dataset=create_another)
    monkeypatch.setitem(sys.modules, "reasoning_gym", another)
    assert train("--ask", "4 plus 5=") == code
    assert train("--resume", "--steps", "2") == code
    shown = capsys.readouterr()
    assert ("4 plus 5=" in shown.out) == (code == 0)
    assert ("is not in the vocabulary" in shown.err) == (code == 2)


# ------------------------------------------------------------------------------ with the package

FIT = """ab base_conversion basic_arithmetic binary_alternation bitwise_arithmetic chain_sum
coin_flip complex_arithmetic count_bits count_primes cryptarithm decimal_arithmetic dice
fraction_simplification gcd isomorphic_strings lcm mini_sudoku number_sequence
palindrome_generation power_function prime_factorization products puzzle24 ransom_note
spell_backward string_insertion string_splitting string_synthesis word_ladder""".split()


@pytest.mark.parametrize("dataset", FIT)
def test_a_dataset_fits_and_its_own_answers_have_the_full_score(dataset):
    pytest.importorskip("reasoning_gym")
    task = gym.Task(dataset, n_problems=100, right=1.0)
    tokenizer = Tokenizer(tasks.vocabulary("gym", task))
    rng = random.Random(0)
    for problem in [*task.held_out(), *(task.sample(rng) for _ in range(50))]:
        answer = task.demonstrate(problem, rng)
        assert task.reward(problem, answer) == 1.0, problem
        assert len(tokenizer.encode(problem.prompt)) <= 64
        assert len(tokenizer.encode(answer)) < 64


@pytest.mark.parametrize("response", ["1e9999999999", "0.e6109619141", "-1e+99999", "9e", "-" * 99])
def test_a_number_without_end_is_no_answer(response):
    pytest.importorskip("reasoning_gym")
    task = gym.Task("coin_flip", n_problems=200, wrong="typo")
    assert task.reward(task.held_out()[0], response) < 1


@pytest.mark.parametrize("dataset, said", [("graph_color", "without an answer"),
                                           ("simple_integration", "as Python")])
def test_what_cannot_be_imitated_or_judged_safely_is_refused(dataset, said):
    pytest.importorskip("reasoning_gym")
    with pytest.raises(ValueError, match=said):
        gym.Task(dataset, n_problems=100)


def as_expression(problem, trial):
    """A trial of our countdown, 8+2=10,10*3=30, as one expression, (8+2)*3; or the trial as it is,
    where a step is not one of positive whole numbers, or its result is wrong."""
    left = [(number, str(number)) for number in problem.numbers]
    for step in trial.split(","):
        parts = re.fullmatch(r"(\d+)([-+*/])(\d+)=(\d+)", step)
        if not parts:
            return trial
        operands = []
        for value in (int(parts[1]), int(parts[3])):
            found = next((pair for pair in left if pair[0] == value), None)
            if found is None:
                return trial
            left.remove(found)
            operands.append(found[1])
        text = f"({operands[0]}{parts[2]}{operands[1]})"
        value = eval(text)                  # of numbers that the problem has
        if value < 1 or value != int(parts[4]):
            return trial
        left.append((int(value), text))
    return left[0][1] if len(left) == 1 else trial


def test_the_reward_of_countdown_is_that_of_another_verifier():
    rg = pytest.importorskip("reasoning_gym")
    verifier = rg.create_dataset("countdown", size=1, seed=0)
    task = countdown.Task()
    rng = random.Random(0)
    rewards = []
    for i in range(1000):
        problem = task.sample(rng)
        trial, result = countdown.random_trial(problem.numbers, rng)
        while i % 2 and result != problem.target:           # every second one hits
            trial, result = countdown.random_trial(problem.numbers, rng)
        if i % 3 == 0:                                      # every third is damaged
            place = rng.randrange(len(trial))
            trial = trial[:place] + rng.choice("0123456789+-*/=,") + trial[place + 1:]
        entry = {"metadata": {"numbers": list(problem.numbers), "target": problem.target}}
        theirs = verifier.score_answer(as_expression(problem, trial), entry)
        rewards.append(task.reward(problem, f"{trial}!"))
        assert rewards[-1] == (theirs == 1.0), (problem, trial)
    assert 300 < sum(rewards) < 700
