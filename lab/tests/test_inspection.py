"""Looking on: --inspect and --ask."""
import math
import random
import re
from pathlib import Path

import pytest
import torch

import gspo
from lab import inspection
from lab.tests.tools import SHORT, odd_trainer, sampled


@pytest.mark.parametrize("when, options", [
    ("cold_start", ()),
    ("last", ("--algorithm", "ppo", "--routing_replay", "r3")),
    ("cold_start", ("--kl_coef", "0.1")),
    ("cold_start", ("--dtype", "float16", "--sampler", "int4", "--recompute_logp_old")),
])
def test_the_page_of_an_update_fits_the_terminal_and_changes_nothing(
        train, capsys, when, options):
    assert train(*SHORT, "2", "--prompts", "16", "--save_every", "1", *options) == 0
    before = Path("out/run-1/checkpoint.pt").read_bytes()
    capsys.readouterr()
    assert train("--inspect", when) == 0
    page = capsys.readouterr().out
    assert page.startswith("Look at")
    assert ("after the cold start" if when == "cold_start" else "after RL step 2") in page
    assert "right, A = +" in page
    assert "wrong, A = -" in page
    assert "\033" not in page
    assert max(map(len, page.splitlines())) <= 120
    assert Path("out/run-1/checkpoint.pt").read_bytes() == before


def test_the_page_has_the_ratios_of_the_last_mini_batch_after_all_steps_but_its_own(capsys):
    trainer = odd_trainer(mini_batches=2, lr=0.01)
    inspection.inspect_update(trainer)
    page = capsys.readouterr().out
    other = odd_trainer(mini_batches=2, lr=0.01)            # the same, and the step is made here
    rng = random.Random(f"{other.config.seed} rl 1")
    rollout, _ = other.collect(other.model, rng)
    rollout.advantages = other.advantages(rollout)
    first = rollout.select(torch.arange(len(rollout.tokens) // 2))
    other.config.mini_batches = 1
    gspo.update(other.model, other.optimizer, first, other.config)
    last = rollout.select(torch.arange(len(rollout.tokens) // 2, len(rollout.tokens)))
    with torch.no_grad():
        logp = gspo.score(other.model, last).logp
    log_s = (logp - last.logp_old).sum(dim=1) / last.lengths
    shown = re.findall(r"GSPO's is (\S+),", page)
    assert len(shown) == 2
    for s in shown:
        assert (log_s - math.log(float(s))).abs().min() < 1e-4


def test_an_answer_into_a_pipe_is_the_prompt_and_the_bare_response(train, capsys):
    assert train(*SHORT, "0") == 0
    capsys.readouterr()
    assert train("--ask", "4+4=") == 0
    line, = capsys.readouterr().out.splitlines()
    assert line.startswith("4+4=")
    assert "<end>" not in line


def test_the_answer_is_the_likeliest_token_each_time(capsys):
    trainer = odd_trainer(max_new_tokens=24)
    inspection.ask(trainer, "4+4=", 64)
    answer = capsys.readouterr().out.rstrip("\n")
    ids = trainer.tokenizer.encode("4+4=")
    for _ in range(24):
        tokens = torch.tensor([ids])
        with torch.no_grad():
            logits = trainer.model(tokens, torch.ones_like(tokens, dtype=torch.bool)).logits
        ids.append(logits[0, -1].argmax().item())
        if ids[-1] == trainer.tokenizer.eos_id:
            ids.pop()
            break
    assert answer == trainer.tokenizer.decode(ids)


def test_a_rollout_without_a_signal_has_nothing_to_show(capsys):
    trainer = odd_trainer()
    rollout = sampled(trainer)
    rollout.advantages = torch.zeros(len(rollout.tokens))
    inspection.show_update("title", trainer, rollout, torch.arange(8))
    assert capsys.readouterr().out == "title\nNo response has a signal.\n"
