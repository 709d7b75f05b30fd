"""The arithmetic task, its teacher and reward, the tokenizer, and what a task may be."""
import random
import re
from collections import Counter
from fractions import Fraction

import pytest

from data import arithmetic, tasks
from data.tokenizer import Tokenizer

task = arithmetic.Task()
tokenizer = Tokenizer()


@pytest.mark.parametrize("response, right", [
    ("932", 1),
    ("<think>7+5+0=12</think>932", 1),
    ("<think></think>932", 1),
    ("932=", 0),
    ("", 0),
    ("0932", 0),
    ("+932", 0),
    ("-932", 0),
    ("9 32", 0),
    ("٩٣٢", 0),
    ("9**9**9", 0),
    ("93", 0),
    ("932</think>", 0),
    ("</think>932", 0),
    ("<think>932", 0),
    ("<think>932</think>", 0),
    ("<think><think></think>932", 0),
    ("<think></think></think>932", 0),
    ("1<think></think>932", 0),
    ("<think></think>932<think>", 0),
    ("<think></think>1</think>932", 0),
    ("932<pad>", 0),
    ("9" * 10 ** 6, 0),
    ("<think>" * 10 ** 5, 0),
    ("</think>" * 10 ** 5 + "932", 0),
], ids=lambda x: str(x)[:30])
def test_the_reward_of_any_text_is_a_number(response, right):
    assert task.reward(arithmetic.Problem("347+585=", "932", "+3"), response) == right


def test_a_teacher_that_neither_slips_nor_guesses_is_always_right():
    rng = random.Random(0)
    careful = arithmetic.Task(slip=0, guess=0, max_digits=5)
    for problem in [careful.sample(rng) for _ in range(3000)]:
        a, op, b = re.fullmatch(r"(\d+)([-+*/])(\d+)=", problem.prompt).groups()
        results = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}
        result = Fraction(int(a), int(b)) if op == "/" else results[op]
        assert problem.answer == str(result)
        assert result >= 0
        assert careful.reward(problem, careful.demonstrate(problem, rng, think=False)) == 1
        assert careful.reward(problem, careful.demonstrate(problem, rng, think=True)) == 1


def test_the_default_teacher_leaves_room_for_rl():
    rng = random.Random(0)
    problems = [task.sample(rng) for _ in range(5000)]
    assert 0.75 < arithmetic.share_right(task, problems, rng) < 0.85


def test_training_never_draws_a_held_out_problem():
    def unordered(problem):         # 3+58 and 58+3 are the same problem
        return problem.kind[0], frozenset(re.findall(r"\d+", problem.prompt))
    rng = random.Random(0)
    held_out = {unordered(problem) for problem in task.held_out()}
    drawn = {unordered(task.sample(rng)) for _ in range(50_000)}
    assert drawn.isdisjoint(held_out)


def test_the_held_out_set_is_fixed_and_even():
    kinds = Counter(problem.kind for problem in task.held_out())
    assert set(kinds.values()) == {40}
    assert len(kinds) == 4 * 3
    assert task.held_out() == arithmetic.Task().held_out()


def test_every_digit_is_a_token():
    text = "347+585=<think>7+5+0=12</think>932<end>"
    ids = tokenizer.encode(text)
    assert len(ids) == len(text) - len("<think></think><end>") + 3
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_id != tokenizer.pad_id


@pytest.mark.parametrize("text", ["é", "٣", "x", "<", "<p<end>ad>", "<thi<end>nk>"])
def test_a_character_without_a_token_is_named(text):
    with pytest.raises(ValueError, match=text[0]):
        tokenizer.encode("3" + text)


def test_a_task_without_held_out_problems_is_evaluated_on_a_fixed_sample():
    class Plain:
        def sample(self, rng):
            return rng.random()
    assert len(tasks.held_out_problems(Plain())) == 400
    assert tasks.held_out_problems(Plain()) == tasks.held_out_problems(Plain())
