"""Mistakes on purpose: each is found by the tests of the core, and made in RL steps only."""
import collections
import json
import subprocess
import sys
from pathlib import Path

import pytest

import gspo
import moe
from lab.extras import mistakes
from lab.tests import tools
from lab.tests.tools import HOUSE, SHORT, metrics, odd_trainer


@pytest.fixture(scope="module")
def caught():
    """{mistake: names of the tests of the core that fail}, which the end of the session prints."""
    run = subprocess.run([sys.executable, "-m", "lab.tests.planted"], cwd=HOUSE, text=True,
                         capture_output=True)
    assert run.returncode == 0, run.stderr
    caught = json.loads(run.stdout)
    assert caught.pop("none") == []
    tools.LAST_WORDS.append("mistakes that test_gspo.py catches: how many tests fail, and the one "
                            "that fails for the fewest others")
    for name, tests in caught.items():
        tools.LAST_WORDS.append(f"  {name:21}{len(tests):3}   {most_telling(tests, caught)}")
    return caught


def most_telling(tests, caught):
    """The test that fails for the fewest mistakes."""
    times = collections.Counter(sum(caught.values(), []))
    return min(tests, key=times.get, default="none")


@pytest.mark.parametrize("name", mistakes.MISTAKES)
def test_a_planted_mistake_makes_a_test_of_the_core_fail(caught, name):
    assert caught[name]


def test_without_a_mistake_the_core_is_the_right_one():
    assert gspo.policy_loss is mistakes.policy_loss
    assert gspo.score is mistakes.score
    assert moe.Experts.forward is mistakes.experts_forward


def test_the_page_names_the_test_that_tells_each_mistake(caught):
    page = (HOUSE / "results/claims/mistakes.md").read_text(encoding="utf-8")
    for name, tests in caught.items():
        row, = [line for line in page.splitlines() if line.startswith(f"| `{name}`")]
        assert any(f"`{test}`" in row for test in tests), name


# ------------------------------------------------------------------------------------ in a run

@pytest.mark.parametrize("name", mistakes.MISTAKES)
def test_a_mistake_is_made_in_rl_steps_and_not_in_evaluations(name):
    owner, attribute = mistakes.PLACES[vars(mistakes)[name]]
    right = getattr(owner, attribute)
    trainer = odd_trainer(mistake=name)
    seen = []
    collect = trainer.collect

    def look(*arguments):
        seen.append(getattr(owner, attribute))
        return collect(*arguments)
    trainer.collect = look
    trainer.rl_step(1)
    assert seen == [vars(mistakes)[name]]
    assert getattr(owner, attribute) is right


def test_a_run_with_a_mistake_has_the_cold_start_of_the_right_run_and_other_steps(train):
    assert train(*SHORT, "1") == 0
    assert train(*SHORT, "1", "--mistake", "sampled_colder") == 0
    right, wrong = [json.load(open(f"out/run-{i}/summary.json")) for i in (1, 2)]
    assert right["accuracy_cold_start"] == wrong["accuracy_cold_start"]
    assert metrics("out/run-1", ["length"]) != metrics("out/run-2", ["length"])


def test_a_stopped_run_goes_on_with_its_mistake(train):
    with_mistake = ("--mistake", "sampled_colder", "--save_every", "1")
    assert train(*SHORT, "3", *with_mistake) == 0
    assert train(*SHORT, "2", *with_mistake) == 0
    assert train("--resume", "--steps", "3") == 0
    names = ("step", "reward", "length", "loss", "grad_norm")
    assert metrics("out/run-1", names) == metrics("out/run-2", names)


def ask_which(*folder):
    return subprocess.run([sys.executable, "-m", "lab.extras.mistakes", *folder], cwd=HOUSE,
                          text=True, capture_output=True)


def test_a_mistake_to_be_found_is_named_only_when_asked(train, capsys):
    assert train(*SHORT, "1", "--mistake", "?") == 0
    shown = capsys.readouterr().out
    name = json.load(open("out/run-1/config.json"))["mistake"]
    assert name in mistakes.MISTAKES
    assert name not in shown
    answer = ask_which(str(Path("out/run-1").resolve()))
    assert answer.returncode == 0
    assert answer.stderr == ""
    assert f"`{name}`" in answer.stdout


@pytest.mark.parametrize("folder", ["nowhere", ""])
def test_a_folder_without_a_run_is_told_in_one_line(folder):
    answer = ask_which(*folder.split())
    assert answer.returncode == 2
    assert len(answer.stderr.splitlines()) == 1


def test_a_mistake_of_gspo_is_refused_for_others(train, capsys):
    assert train("--mistake", "sum_for_mean", "--algorithm", "grpo") == 2
    assert "mistake" in capsys.readouterr().err
