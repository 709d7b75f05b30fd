"""Bad input gets one line and exit code 2, before any work."""
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import train as train_py
from data import arithmetic
from lab.tests.tools import SHORT


def bad_values():
    for field in (*fields(train_py.Config), *fields(arithmetic.Task)):
        if field.type is bool or field.name == "out":
            continue
        yield f"--{field.name}", "nothing" if field.type is str else "-7"
        yield f"--{field.name}", "" if field.type is str else "nan"
    yield "--nothing",
    yield "--d_model", "30"
    yield "--n_active", "9"
    yield "--max_new_tokens", "3"
    yield "--steps", "1.5"
    yield "--ste", "5"
    yield "--fresh=1",
    yield "--resume",
    yield "--ask", "1+1="
    yield "--eval_only",
    yield "--inspect",
    yield "--inspect", "never"
    yield "--task", "tokenizer"
    yield "--seed", "9" * 400
    yield "--out", "."
    yield "--out", "full/x"
    yield "--device", "cuda"
    yield "--resume", "--out", "broken"
    yield "--resume", "--out", "older"
    yield "--mini_batches", "33"
    yield "--clip_low", "0.1", "--algorithm", "sapo"
    yield "--correction", "tis"
    yield "--overlong", "65"
    yield "--scale", "std", "--algorithm", "ppo"
    yield "--scale", "none", "--algorithm", "ppo"


@pytest.mark.parametrize("arguments", [*bad_values()], ids=" ".join)
def test_bad_input_gets_one_line_and_exit_code_2(train, capsys, arguments):
    Path("full").write_text("not a folder")
    Path("broken").mkdir()
    torch.save({"model": 1}, "broken/checkpoint.pt")
    Path("older").mkdir()
    torch.save({"model": {}}, "older/checkpoint.pt")
    if arguments == ("--device", "cuda") and torch.cuda.is_available():
        pytest.skip("it is no bad input here")
    assert train(*arguments) == 2
    error = capsys.readouterr().err
    name = arguments[0].split("=")[0].removeprefix("--")
    assert name in error or arguments[-1] in error or "run in out/" in error
    assert error.count("\n") == 1
    assert not Path("out").exists()


def test_a_prompt_that_cannot_be_asked_gets_one_line(train, capsys):
    assert train(*SHORT, "0") == 0
    for prompt in ("", "x", "1" * 65):
        capsys.readouterr()
        assert train("--ask", prompt) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "--ask" in error or "'x'" in error
