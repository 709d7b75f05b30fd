"""The cache of cold starts: for runs that would make the same, and for no others."""
import os
from pathlib import Path

import torch

import train as train_py
from lab import extras
from lab.tests.tools import SHORT, metrics, odd_trainer


def test_the_cold_start_is_kept_for_runs_that_would_make_the_same(train, capsys):
    brief = (*SHORT, "0", "--cold_steps", "5")
    assert train(*brief) == 0
    assert "taken from" not in capsys.readouterr().out
    assert train(*brief, "--algorithm", "grpo", "--lr", "0.01") == 0
    assert "taken from out/cold-" in capsys.readouterr().out
    assert train(*brief, "--cold_lr", "0.001") == 0
    assert "taken from" not in capsys.readouterr().out


def test_a_run_with_the_cache_is_the_run_without(train):
    assert train(*SHORT, "2", "--out", "with") == 0
    assert train(*SHORT, "2", "--out", "without", "--fresh") == 0
    assert metrics("with") == metrics("without")


def test_whatever_decides_a_cold_start_decides_its_name():
    path = odd_trainer().path()
    assert path == odd_trainer().path()
    for same in ({"algorithm": "ppo"}, {"steps": 9}, {"kl_coef": 1.0}, {"dtype": "bfloat16"}):
        assert odd_trainer(**same).path() == path
    for other in ({"seed": 1}, {"threads": 2}, {"max_grad_norm": 2.0}, {"cold_steps": 9},
                  {"n_layer": 1}, {"cold_tokens": 99}, {"balance": 0.0}, {"max_new_tokens": 63}):
        assert odd_trainer(**other).path() != path
    other_words = odd_trainer()
    other_words.tokenizer.tokens[-1] = "x"
    assert other_words.path() != path
    careful = odd_trainer()
    careful.task.slip = 0.0
    assert careful.path() != path
    torch.set_num_threads(1)


def test_a_byte_more_in_a_file_of_its_code_makes_another_cold_start(train, task_file, tmp_path):
    task_file("inherits", "from data.arithmetic import Task as Arithmetic\n"
              "class Task(Arithmetic):\n    pass\n")
    from data import inherits
    config = train_py.Config(out="unused", threads=1)
    trainer = extras.extend(train_py.Trainer, config)(config, inherits.Task())
    path = trainer.path()
    assert trainer.path() == path
    with open(tmp_path / "data" / "inherits.py", "a") as file:
        file.write("\n")
    assert trainer.path() != path


def test_two_runs_may_make_the_same_cold_start_at_once(train, monkeypatch):
    replace = os.replace

    def another_saves_first(part, path):
        if Path(path).name.startswith("cold-"):
            other = Path(f"{path}.1.part")
            other.write_bytes(Path(part).read_bytes())
            replace(other, path)
        replace(part, path)
    monkeypatch.setattr(os, "replace", another_saves_first)
    assert train(*SHORT, "1", "--fresh", "--out", "run") == 0
    assert train(*SHORT, "1", "--out", "again") == 0
    assert metrics("run") == metrics("again")


def test_a_cache_that_cannot_be_read_gets_one_line_that_names_the_remedy(train, capsys):
    assert train(*SHORT, "0") == 0
    cached, = Path("out").glob("cold-*.pt")
    cached.write_bytes(cached.read_bytes()[:5000])
    capsys.readouterr()
    assert train("--out", "run", *SHORT, "0") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--fresh" in error
    assert train("--out", "run", "--fresh", *SHORT, "0") == 0
