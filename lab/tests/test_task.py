"""The arithmetic task, its teacher and reward, the tokenizer, which problems are asked, and what a
task may be."""
import random
import re
from collections import Counter
from fractions import Fraction
from types import SimpleNamespace

import pytest

from data import arithmetic, tasks
from data.queries import Queries
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


def test_a_problem_of_every_kind_can_be_asked_for():
    rng = random.Random(0)
    five = arithmetic.Task(max_digits=5)
    assert len(five.kinds) == 4 * 5
    assert {problem.kind for problem in five.held_out()} == set(five.kinds)
    for kind in five.kinds:
        problem = five.sample(rng, kind)
        operands = re.findall(r"\d+", problem.prompt)
        assert problem.kind == kind == f"{kind[0]}{max(map(len, operands))}"
        assert kind[0] in problem.prompt


def test_the_cold_start_sees_few_long_problems():
    rng = random.Random(0)
    five = arithmetic.Task(max_digits=5)
    digits = Counter(int(five.sample(rng).kind[1:]) for _ in range(20_000))
    for n, weight in zip((1, 2, 3, 4, 5), (1, 2, 3, 0.3, 0.1)):
        assert digits[n] / 20_000 == pytest.approx(weight / 6.4, abs=0.015)
    assert digits[5] > 100


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


# ------------------------------------------------------------------------------------ queries

class TwoKinds:
    kinds = ["easy", "hard"]

    def sample(self, rng, kind):
        return kind


def answered(kind, *rewards):
    return [SimpleNamespace(problem=SimpleNamespace(kind=kind), reward=r) for r in rewards]


def test_the_estimate_of_a_kind_starts_at_a_half_and_moves_half_way_in_a_half_life():
    rates = {}
    queries = Queries(TwoKinds(), True, rates)
    assert rates == {"easy": 0.5, "hard": 0.5}
    queries.learn(answered("easy", *[1.0] * 100))
    assert rates == {"easy": 0.75, "hard": 0.5}
    queries.learn(answered("easy", *[0.0] * 100) + answered("hard", *[0.0] * 200))
    assert rates == {"easy": 0.375, "hard": 0.125}
    queries.learn(answered("hard", *[1.0, 0.0] * 25))        # 50 responses leave 0.7071 of 0.125
    assert rates["hard"] == pytest.approx(0.0884 + 0.2929 / 2, abs=1e-4)


def test_the_estimate_counts_rewards_from_0_to_1():
    rates = {}
    queries = Queries(TwoKinds(), True, rates)
    queries.learn(answered("easy", *[7.0] * 100) + answered("hard", *[-7.0] * 100))
    assert rates == {"easy": 0.75, "hard": 0.25}


def test_adaptive_queries_are_drawn_in_proportion_to_p_times_1_minus_p_plus_a_little():
    rates = {"easy": 0.9, "hard": 0.6}
    queries = Queries(TwoKinds(), True, rates)
    assert queries.weights() == pytest.approx([0.09 + 0.02, 0.24 + 0.02])
    drawn = Counter(queries.draw(20_000, random.Random(0)))
    assert drawn["easy"] / 20_000 == pytest.approx(0.11 / 0.37, abs=0.01)
    assert drawn["easy"] + drawn["hard"] == 20_000


def test_a_kind_that_is_always_right_is_still_asked_now_and_then():
    queries = Queries(TwoKinds(), True, {"easy": 1.0, "hard": 0.5})
    assert 0 < Counter(queries.draw(1000, random.Random(0)))["easy"] < 200


def test_uniform_queries_ask_all_kinds_alike():
    queries = Queries(TwoKinds(), False, {"easy": 1.0, "hard": 0.5})
    drawn = Counter(queries.draw(20_000, random.Random(0)))
    assert drawn["easy"] / 20_000 == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("adaptive", [True, False])
def test_a_task_without_kinds_is_sampled_by_itself(adaptive):
    class Plain:
        def sample(self, rng):
            return rng.random()
    rates = {}
    queries = Queries(Plain(), adaptive, rates)
    rng = random.Random(0)
    assert queries.draw(3, random.Random(0)) == [rng.random(), rng.random(), rng.random()]
    queries.learn([SimpleNamespace(problem=0.5, reward=1.0)])
    assert rates == {}
