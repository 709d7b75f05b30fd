"""The task, the command line and whole runs, as executable statements; run `python -m pytest`."""
import csv
import random
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import fields
from fractions import Fraction
from math import nan
from pathlib import Path

import pytest
import torch

import gspo
import train as train_py
from data import arithmetic, responses
from data.tokenizer import Tokenizer

# ------------------------------------------------------------------------------------ the task

task, tokenizer = arithmetic.Task(), Tokenizer()

@pytest.mark.parametrize("response, right", [
    ("932", 1), ("<think>7+5+0=12</think>932", 1), ("<think></think>932", 1), ("932=", 0), ("", 0),
    ("0932", 0), ("+932", 0), ("-932", 0), ("9 32", 0), ("٩٣٢", 0), ("9**9**9", 0), ("93", 0),
    ("932</think>", 0), ("</think>932", 0), ("<think>932", 0), ("<think>932</think>", 0),
    ("<think><think></think>932", 0), ("<think></think></think>932", 0), ("1<think></think>932", 0),
    ("<think></think>932<think>", 0), ("<think></think>1</think>932", 0), ("932<pad>", 0),
    ("9" * 10 ** 6, 0), ("<think>" * 10 ** 5, 0), ("</think>" * 10 ** 5 + "932", 0)])
def test_the_reward_of_any_text_is_a_number(response, right):
    assert task.reward(arithmetic.Problem("347+585=", "932", "+3"), response) == right

def test_the_teacher_is_right_unless_it_slips_or_guesses():
    rng, careful = random.Random(0), arithmetic.Task(slip=0, guess=0, max_digits=5)
    for problem in [careful.sample(rng) for _ in range(3000)]:
        a, op, b = re.fullmatch(r"(\d+)([-+*/])(\d+)=", problem.prompt).groups()
        result = Fraction(a) / int(b) if op == "/" else dict(zip("+-*", (
            int(a) + int(b), int(a) - int(b), int(a) * int(b))))[op]
        assert problem.answer == str(result) and result >= 0
        for think in (False, True):
            assert careful.reward(problem, careful.demonstrate(problem, rng, think)) == 1
    problems = [task.sample(rng) for _ in range(5000)]
    right = [task.reward(p, task.demonstrate(p, rng)) for p in problems]
    assert 0.75 < sum(right) / 5000 < 0.85                          # the ceiling of imitation

def test_the_streams_of_training_never_yield_a_held_out_problem():
    unordered = lambda p: (p.kind[0], frozenset(re.findall(r"\d+", p.prompt)))
    held_out, rng = task.held_out(), random.Random(0)
    trained_on = {unordered(task.sample(rng)) for _ in range(50000)}
    assert trained_on.isdisjoint(map(unordered, held_out))
    assert Counter(p.kind for p in held_out) == {f"{op}{n}": 40 for op in "+-*/" for n in (1, 2, 3)}
    assert held_out == arithmetic.Task().held_out()

def test_every_digit_is_a_token_and_an_unknown_character_is_named():
    text = "347+585=<think>7+5+0=12</think>932<end>"
    assert len(tokenizer.encode(text)) == len(text) - len("<think></think><end>") + 3
    assert tokenizer.decode(tokenizer.encode(text)) == text and tokenizer.end != tokenizer.pad
    for wrong in "é", "٣", "x", "<", "<p<end>ad>", "<thi<end>nk>":
        with pytest.raises(ValueError, match=wrong[0]):
            tokenizer.encode("3" + wrong)

def test_the_overlong_penalty_of_dapo():
    lengths = torch.tensor([80, 81, 90, 100, 101])
    expected = pytest.approx([0, -0.05, -0.5, -1, -1])
    assert responses.overlong_penalty(lengths, 100, 20).tolist() == expected
    assert responses.overlong_penalty(lengths, 100, 0).tolist() == [0] * 5

# ------------------------------------------------------------------------------- the whole job

SHORT = ("--cold_steps", "30", "--prompts", "4", "--group_size", "4", "--max_digits", "1",
         "--threads", "1", "--steps")

@pytest.fixture
def train(tmp_path, monkeypatch):
    """train.main in an empty folder -> exit code."""
    monkeypatch.chdir(tmp_path)
    def run(*arguments):
        try:
            return train_py.main(arguments) or 0
        except SystemExit as stop:
            return stop.code
    return run

def metrics(folder, names=("step", "reward", "loss", "grad_norm", "entropy", "accuracy")):
    with open(f"{folder}/metrics.csv") as file:
        return [[row[name] for name in names] for row in csv.DictReader(file)]

@pytest.mark.parametrize("options", [
    (), ("--algorithm", "ppo"), ("--kl_coef", "0.1", "--routing_replay", "r2")], ids=" ".join)
def test_a_run_that_was_interrupted_and_resumed_equals_one_that_was_not(
        train, monkeypatch, options):
    assert train(*SHORT, "6", "--out", "whole", "--eval_every", "4", *options) == 0
    with monkeypatch.context() as patch:
        update, calls = gspo.update, []
        def interrupting(*args, **options):
            calls.append(len(calls) == 2 and signal.raise_signal(signal.SIGINT))
            return update(*args, **options)
        patch.setattr(gspo, "update", interrupting)
        assert train(*SHORT, "6", "--out", "parts", "--eval_every", "4", "--fresh", *options) == 130
    assert len(metrics("parts")) == 3
    assert train("--resume", "--out", "parts", "--lr", "0.1") == 2      # not the same run
    assert train("--resume", "--out", "parts") == 0
    assert metrics("parts") == metrics("whole")
    assert Path("parts/updates.csv").read_text() == Path("whole/updates.csv").read_text()
    assert train("--resume", "--out", "parts") == 2         # nothing left to do
    assert train("--resume", "--out", "parts", "--steps", "7") == 0 and len(metrics("parts")) == 7
    assert {"config.json", "metrics.csv", "updates.csv", "summary.json", "samples.txt",
            "checkpoint.pt", "curves.png"} == {path.name for path in Path("parts").iterdir()}

class Odd(arithmetic.Task):
    """A task in which an untrained model has something to learn: responses of odd length."""
    def reward(self, problem, response):
        return len(response) % 2

@pytest.mark.parametrize("options", [
    *[dict(algorithm=name) for name in gspo.ALGORITHMS], dict(recompute_logp_old=True, overlong=9),
    *[dict(routing_replay=kind) for kind in ("r2", "r3")], dict(kl_coef=0.1),
    dict(prompts=3, algorithm="dr_grpo"), dict(sampler="bfloat16"),
    dict(sampler="bfloat16", recompute_logp_old=True),
    dict(sampler="bfloat16", algorithm="gspo_token", correction="icepop")], ids=str)
def test_every_algorithm_and_every_way_of_routing_trains(options):
    config = train_py.Config(**dict(prompts=8, group_size=4, threads=1, lr=0.003) | options)
    tokenizer, model = train_py.build(config, Odd(), None)
    learner = train_py.new_learner(config, model, {})
    before = [p.clone() for p in model.parameters()]
    for step in (1, 2):
        row, updates = train_py.rl_step(config, Odd(), tokenizer, learner, step)
        assert 0 < row["grad_norm"] < 1000 and updates
        # In the first mini-batch the ratios are 1, unless the sampler computed otherwise.
        coarse = config.sampler == "bfloat16" and len(options) == 1
        assert updates[0]["mini_batch"] or (updates[0]["log_w_std"] > 1e-3) == coarse
    assert all((p != q).any() for p, q in zip(before, model.parameters()))
    assert (row["expert_change"] == 0) == ("routing_replay" in options)
    assert (row.get("kl_ref", 0) > 0) == ("kl_coef" in options)
    assert not learner.head or (learner.head.weight != 0).any()

@pytest.mark.parametrize("rounds", [99, 1])
def test_dynamic_sampling_goes_on_until_every_group_has_a_signal_or_says_so(rounds, capsys):
    config = train_py.Config(dynamic_sampling=True, sampling_rounds=rounds, group_size=2, threads=1)
    tokenizer, model = train_py.build(config, Odd(), None)
    rollout, rewards, asked = responses.explore(config, Odd(), tokenizer, model, 1)
    signal = (rewards[:, 0] != rewards[:, 1]).sum()
    message = f"after 1 rounds of sampling {32 - signal} of 32 groups have no signal"
    assert rewards.shape == (32, 2) and len(rollout.tokens) == 64
    assert (message in capsys.readouterr().out) == (rounds == 1) == (signal < 32)
    assert len(asked) % 64 == 0 and (len(asked) > 64) == (rounds > 1)
    texts = [(r.text, r.reward) for r in asked]
    for row, n, reward in zip(rollout.tokens.tolist(), rollout.lengths, rewards.flatten().tolist()):
        text = tokenizer.decode(row[:n])
        assert (text.removesuffix("<end>") if text.endswith("<end>") else None, reward) in texts

@pytest.mark.parametrize("options", [(), ("--algorithm", "ppo", "--routing_replay", "r3")])
def test_the_page_of_an_update_fits_the_terminal_and_changes_nothing(train, capsys, options):
    assert train(*SHORT, "2", "--prompts", "16", "--save_every", "1", *options) == 0
    before = Path("out/run-1/checkpoint.pt").read_bytes()
    capsys.readouterr()
    assert train("--inspect") == 0
    page = capsys.readouterr().out
    assert "right, A = +" in page and "wrong, A = -" in page and "GRPO's ratio" in page
    assert max(map(len, page.splitlines())) <= 120 and "\033" not in page
    assert Path("out/run-1/checkpoint.pt").read_bytes() == before

def test_the_reward_rises_in_a_miniature_run_past_that_of_the_teacher(train):
    assert train("--max_digits", "1", "--think", "0", "--guess", "0.5", "--cold_steps", "250",
                 "--steps", "25", "--lr", "1e-3") == 0
    rewards = [float(reward) for reward, in metrics("out/run-1", ["reward"])]
    assert sum(rewards[:5]) / 5 < 0.6 and sum(rewards[-5:]) / 5 > 0.7

def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(train, monkeypatch):
    monkeypatch.setattr(gspo, "group_advantages", lambda rewards, scale: rewards * 0 + nan)
    message = train(*SHORT, "5")
    assert "step 1:" in message and "out/run-1/checkpoint.pt" in message
    assert train("--eval_only") == train("--ask", "4+4=") == 0

def bad_values():
    for field in (*fields(train_py.Config), *fields(arithmetic.Task)):
        if field.type is not bool and field.name != "out":
            yield f"--{field.name}", "-7" if field.type is not str else "nothing"
            yield f"--{field.name}", "nan" if field.type is not str else ""
    yield from (("--nothing",), ("--d_model", "30"), ("--max_new_tokens", "3"), ("--steps", "1.5"),
                ("--resume",), ("--ask", "1+1="), ("--eval_only",), ("--ste", "5"), ("--fresh=1",),
                ("--task", "tokenizer"), ("--seed", "9" * 400), ("--out", "."), ("--out", "full/x"),
                ("--device", "cuda"), ("--resume", "--out", "broken"), ("--inspect",),
                ("--clip_low", "0.1", "--algorithm", "sapo"), ("--correction", "tis"),
                ("--overlong", "65"),
                ("--scale", "std", "--algorithm", "ppo"))

@pytest.mark.parametrize("arguments", [*bad_values()], ids=" ".join)
def test_bad_input_gets_one_line_and_exit_code_2(train, capsys, arguments):
    Path("full").write_text("not a folder")
    Path("broken").mkdir()
    torch.save({"model": 1}, "broken/checkpoint.pt")
    if arguments == ("--device", "cuda") and torch.cuda.is_available():
        pytest.skip("it is no bad input here")
    assert train(*arguments) == 2
    error = capsys.readouterr().err
    named = arguments[0].split("=")[0] in error or arguments[-1] in error or "run in out/" in error
    assert error.count("\n") == 1 and named and not Path("out").exists()

def test_the_task_in_the_readme_runs(tmp_path):
    here = Path(__file__).parent.parent
    code, = re.findall(r"```python\n(.*?)```", (here / "README.md").read_text(), re.DOTALL)
    for name in ("train.py", "gspo.py", "moe.py", "data", "results"):
        copy = shutil.copytree if (here / name).is_dir() else shutil.copy
        copy(here / name, tmp_path / name)
    (tmp_path / "data" / "reverse.py").write_text(code)
    command = ("train.py", "--task", "reverse", "--cold_steps", "20", "--steps", "2")
    subprocess.run([sys.executable, *command], cwd=tmp_path, check=True)
