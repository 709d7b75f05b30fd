"""Tasks of one's own: what they may be, and what is said of those that cannot work."""
import json
from pathlib import Path

import pytest

from lab import report
from lab.tests.tools import PLAIN


def test_a_task_is_any_class_with_three_methods(train, task_file):
    task_file("plain", PLAIN)
    assert train("--task", "plain", "--cold_steps", "5", "--cold_tokens", "400", "--steps", "1",
                 "--max_new_tokens", "9", "--threads", "1") == 0
    assert train("--ask", "1+1=") == 0


SPELLING = """
class Problem:
    prompt = "cat:"

class Task:
    defaults = {"cold_steps": 5, "steps": 2, "threads": 1, "max_new_tokens": 9}

    def sample(self, rng):
        return Problem()
    def held_out(self):
        return [Problem()] * 20
    def demonstrate(self, problem, rng):
        return rng.choice(["tac", "act"])
    def reward(self, problem, response):
        return response == "tac"
    def thinks(self, response):
        return True
    def measure(self, problem, response, truncated):
        return {"letters": len(response), "no_end": float(truncated)}
"""


@pytest.fixture
def spelling(task_file, tmp_path):
    task_file("spelling", SPELLING)
    (tmp_path / "data" / "spelling.txt").write_text("<pad> <end> a c t :")


def test_a_task_may_have_a_vocabulary_defaults_and_measures_of_its_own(train, capsys, spelling):
    assert train("--task", "spelling", "--out", "run") == 0
    assert json.loads(Path("run/config.json").read_text())["max_new_tokens"] == 9
    rows = report.read_table("run/metrics.csv")
    assert len(rows) == 2
    for row in rows:
        assert 0 < float(row["letters"]) <= 7 * 9           # <pad> and <end> are five characters
        assert float(row["no_end"]) == float(row["truncated"])
        assert float(row["think"]) == 1 - float(row["truncated"])
    summary = json.loads(Path("run/summary.json").read_text())
    assert list(summary["measures"]) == list(summary["measures_cold_start"])
    assert "letters" in capsys.readouterr().out
    assert train("--ask", "cat:", "--out", "run") == 0
    assert train("--ask", "1+1=", "--out", "run") == 2


def test_an_option_that_is_given_counts_more_than_the_tasks_default(train, capsys, spelling):
    assert train("--task", "spelling", "--out", "run", "--steps", "1") == 0
    assert train("--out", "run", "--resume", "--steps", "3") == 0
    assert [row["step"] for row in report.read_table("run/metrics.csv")] == ["1", "2", "3"]
    assert train("--task", "spelling", "--help") == 0
    described = " ".join(capsys.readouterr().out.split())
    assert "(default for this task: 9)" in described
    assert "query heads (default: 4)" in described


@pytest.mark.parametrize("name, old, new, says", [
    ("no_class", "class Task", "class Other", "has no class Task"),
    ("no_reward", "def reward", "def rewards", "lacks reward"),
    ("letters", '"1+1="', '"what?"', "'w' in 'what?' is not in the vocabulary"),
    ("long", '"1+1="', '"1" * 65', "a prompt of 65 tokens is too long"),
    ("empty", '"1+1="', '""', "empty prompt"),
    ("speaks", '"23"', '"xyz"', "is not in the vocabulary"),
    ("wishes", "    def sample", "    defaults = {'stepps': 3}\n    def sample",
     "name 'stepps', which is no option"),
    ("repeats", "    def sample", "    def measure(self, *_):\n        return {'length': 1}\n"
     "    def sample", "'length', a column that metrics.csv has already"),
    ("repeats_an_extra", "    def sample", "    def measure(self, *_):\n"
     "        return {'kl_ref': 1}\n    def sample",
     "'kl_ref', a column that metrics.csv has already"),
])
def test_a_task_that_cannot_work_gets_one_line(train, capsys, task_file, name, old, new, says):
    assert old in PLAIN
    task_file(name, PLAIN.replace(old, new))
    assert train("--task", name) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not Path("out").exists()
