"""Countdown: its teacher, reward and measures; and that arithmetic is as it was before it."""
import hashlib
import itertools
import random
import re
from collections import Counter

import pytest

from data import arithmetic, countdown, demonstrations, tasks
from data.tokenizer import Tokenizer

task = countdown.Task()
tokenizer = Tokenizer(tasks.vocabulary("countdown"))
problem = countdown.Problem("3,8,2=30:", (3, 8, 2), 30)
HIT = "8+2=10,10*3=30"
MISS = "8-3=5,5*2=10"


def problems(n, **options):
    rng = random.Random(0)
    chosen = countdown.Task(**options)
    return [chosen.sample(rng) for _ in range(n)]


def all_trials(numbers):
    """Every trial there is, in either order, found in another way than countdown.py does ->
    {trial: result}."""
    if len(numbers) == 1:
        return {"": numbers[0]}
    found = {}
    for i, j in itertools.permutations(range(len(numbers)), 2):
        a = numbers[i]
        b = numbers[j]
        rest = [number for k, number in enumerate(numbers) if k != i and k != j]
        results = [("+", a + b), ("*", a * b)]
        if a - b > 0:
            results.append(("-", a - b))
        if b in [divisor for divisor in range(1, a + 1) if divisor * (a // divisor) == a]:
            results.append(("/", a // b))
        for op, result in results:
            for later, reached in all_trials([*rest, result]).items():
                found[f"{a}{op}{b}={result}" + (f",{later}" if later else "")] = reached
    return found


# ------------------------------------------------------------------------------------ the teacher

@pytest.mark.parametrize("n_numbers", [3, 4])
def test_the_teachers_trials_are_right_and_so_are_its_marks(n_numbers):
    rng = random.Random(0)
    for asked in problems(200, n_numbers=n_numbers):
        result_of = all_trials(asked.numbers)
        trials = re.findall("(.*?)([<>!])", task.demonstrate(asked, rng))
        assert 1 <= len(trials) <= 6
        for trial, mark in trials:
            result = result_of[trial]
            marks = {result < asked.target: "<", result > asked.target: ">",
                     result == asked.target: "!"}
            assert mark == marks[True]
        assert "!" not in [mark for _, mark in trials[:-1]]     # it stops at a hit


def test_the_teacher_is_seldom_right_and_random_search_hits_the_more_the_longer_it_lasts():
    rng = random.Random(0)
    asked = problems(5000)
    rewards = [task.reward(each, task.demonstrate(each, rng)) for each in asked]
    assert sum(rewards) / 5000 == pytest.approx(0.26, abs=0.02)
    for n, hits in ((1, 0.09), (4, 0.30), (8, 0.49), (16, 0.71), (32, 0.88)):
        chances = [1 - (1 - countdown.hit_chance(each.numbers, each.target)) ** n for each in asked]
        assert sum(chances) / 5000 == pytest.approx(hits, abs=0.02)


def test_the_chance_of_a_hit_is_how_often_random_trials_hit():
    rng = random.Random(0)
    # 3 and 2 give 5, 6 or 1 (3/2 is no natural number); 1 and 1 give 2 or 1 (no 0, no 1/1).
    assert countdown.hit_chance((3, 2), 6) == pytest.approx(1 / 3)
    assert countdown.hit_chance((1, 1), 1) == pytest.approx(1 / 2)
    results = Counter(countdown.random_trial((3, 8, 2), rng)[1] for _ in range(20_000))
    for target in (10, 22, 30, 48):
        chance = countdown.hit_chance((3, 8, 2), target)
        assert results[target] / 20_000 == pytest.approx(chance, abs=0.01)


def test_training_never_draws_a_held_out_problem():
    held_out = {(tuple(sorted(each.numbers)), each.target) for each in task.held_out()}
    drawn = {(tuple(sorted(each.numbers)), each.target) for each in problems(50_000)}
    assert len(held_out) > 100
    assert drawn.isdisjoint(held_out)
    assert task.held_out() == countdown.Task().held_out()


@pytest.mark.parametrize("options", [
    {}, {"n_numbers": 4, "max_number": 50}, {"max_number": 5, "max_target": 20}], ids=str)
def test_every_problem_can_be_solved_and_its_target_is_none_of_its_numbers(options):
    chosen = countdown.Task(**options)
    for asked in problems(300, **options) + chosen.held_out():
        assert asked.target not in asked.numbers
        assert 1 <= asked.target <= chosen.max_target
        assert len(asked.numbers) == chosen.n_numbers
    for asked in problems(5, **options):
        assert countdown.hit_chance(asked.numbers, asked.target) > 0


# ------------------------------------------------------------------------------------ the reward

@pytest.mark.parametrize("response, reward", [
    (HIT + "!", 1),
    (MISS + "<" + HIT + "!", 1),
    (MISS + "!" + HIT + "!", 1),                # only the last trial counts
    ("nonsense<" + HIT + "!", 1),
    ("2+8=10,3*10=30!", 1),                     # in any order
    (HIT, 0),                                   # not marked
    (HIT + "<", 0),
    (HIT + "!" + MISS + "<", 0),                # not the last
    (HIT + "!,", 0),
    (HIT + "!!", 0),
    (MISS + "!", 0),                            # marked, and no hit
    ("", 0),
    ("!", 0),
    ("30!", 0),
    ("8+2=10,10*3=31!", 0),                     # wrong
    ("8+2=11,11*3=30!", 0),
    ("10*3=30!", 0),                            # 10 is none of the numbers
    ("3*8=24,24+2=26,26+4=30!", 0),
    ("3*8=24,24+3=27!", 0),                     # 3 twice
    ("8+2=10,10+10=20!", 0),
    ("8+2=10!", 0),                             # not all numbers
    ("3-8=-5,-5*2=-10!", 0),
    ("8+02=10,10*3=30!", 0),
    ("8+2=010,10*3=30!", 0),
    ("8+2=10,,10*3=30!", 0),
    ("8+2=10;10*3=30!", 0),
    (" 8+2=10,10*3=30!", 0),
    ("8+2=10,10*3=30\n!", 0),
    ("٨+2=10,10*3=30!", 0),
    ("8+2=10,10**3=30!", 0),
    ("8/0=0,3*2=6!", 0),
    ("9" * 10 ** 6 + "!", 0),
    ("8+2=" + "9" * 10 ** 5 + ",10*3=30!", 0),
    ("8+2=10," * 10 ** 5 + "10*3=30!", 0),
    ("!" * 10 ** 6, 0),
    ("<" * 10 ** 6 + HIT + "!", 1),
    ("9" * 10 ** 6, 0),
], ids=lambda x: str(x)[:30])
def test_the_reward_of_any_text_is_a_number(response, reward):
    assert task.reward(problem, response) == reward
    assert set(task.measure(problem, response, truncated=False)) == {
        "trials", "random_search", "gave_up", "false_hits", "overlooked_hits"}


def test_a_trial_hits_if_and_only_if_a_slow_list_of_all_trials_has_it():
    rng = random.Random(0)
    n_hits = 0                                  # of 60 * 300
    for asked in problems(60):
        hits = {trial for trial, result in all_trials(asked.numbers).items()
                if result == asked.target}
        assert all(countdown.is_hit(asked, trial) for trial in hits)
        for _ in range(300):                    # a hit with some characters changed
            text = list(rng.choice(sorted(hits)))
            for _ in range(rng.randint(0, 3)):
                i = rng.randrange(len(text))
                text[i:i + rng.randint(0, 2)] = rng.choices("0123456789+-*/=,", k=rng.randint(0, 2))
                text = text or ["="]
            trial = "".join(text)
            n_hits += trial in hits
            assert countdown.is_hit(asked, trial) == (trial in hits)
    assert 1000 < n_hits < 17_000


def test_random_tokens_are_rewarded_and_measured_without_a_fault():
    rng = random.Random(0)
    for asked in problems(300):
        response = "".join(rng.choices(tokenizer.tokens, k=rng.randrange(60)))
        assert task.reward(asked, response) in (0, 1)
        assert all(value >= 0 for value in task.measure(asked, response, truncated=True).values())


def test_what_is_measured_of_a_response():
    def measured(response, truncated=False):
        values = task.measure(problem, response, truncated)
        return [values[name] for name in ("trials", "gave_up", "false_hits", "overlooked_hits")]
    assert measured(HIT + "!") == [1, 0, 0, 0]
    assert measured(MISS + "<" + HIT + "!") == [2, 0, 0, 0]
    assert measured(MISS + "<" + MISS + "<") == [2, 1, 0, 0]
    assert measured(MISS + "!") == [1, 0, 1, 0]
    assert measured(MISS + "<" + HIT + ">" + HIT + "<") == [3, 1, 0, 2]
    assert measured(MISS + "<8+2", truncated=True) == [1, 0, 0, 0]
    chance = countdown.hit_chance((3, 8, 2), 30)
    assert task.measure(problem, MISS + "<" + HIT + "!", False)["random_search"] == 2 * chance
    assert not task.thinks(HIT + "!")
    assert task.thinks(MISS + "<" + HIT + "!")


def test_a_random_searcher_has_the_reward_of_random_search():
    rng = random.Random(0)
    rewards = []
    of_random_search = []
    for asked in problems(20_000):
        response = task.demonstrate(asked, rng)
        rewards.append(task.reward(asked, response))
        of_random_search.append(task.measure(asked, response, truncated=False)["random_search"])
    assert sum(rewards) / 20_000 == pytest.approx(sum(of_random_search) / 20_000, abs=0.01)


# ------------------------------------------------------------------------------------ vocabularies

def test_a_task_may_bring_its_own_vocabulary():
    assert tasks.vocabulary("countdown").name == "countdown.txt"
    assert tasks.vocabulary("arithmetic").name == "vocabulary.txt"
    prompt, response = next(demonstrations.demonstrations(task, tokenizer, random.Random(0)))
    text = tokenizer.decode(prompt + response)
    assert len(text) - len("<end>") + 1 == len(prompt + response)      # a character is a token
    with pytest.raises(ValueError, match="<think>"):
        tokenizer.encode("<think>")


def test_arithmetic_is_as_it_was_before_countdown():
    """Another hash is right only if arithmetic was changed on purpose."""
    examples = demonstrations.demonstrations(arithmetic.Task(), Tokenizer(), random.Random(0))
    first = list(itertools.islice(examples, 1000))
    assert hashlib.sha256(repr(first).encode()).hexdigest().startswith("3cb231339f5c")
