"""The instruments: gradients and clipped shares worked out by hand, noise, and random rewards."""
import json
import os
import random
import subprocess
import sys
from math import exp
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import gspo
from lab.report import read_table
from lab.study import instruments
from moe import Rollout

# Two responses of three tokens and of two. log s is 0.1 and -0.2.
LOG_W = torch.tensor([[0.5, -0.1, -0.1], [1.2, -1.6, 0.0]])
MASK = torch.tensor([[True, True, True], [True, True, False]])


@pytest.fixture(autouse=True)
def with_instruments(monkeypatch):
    monkeypatch.setattr(gspo, "ALGORITHMS", gspo.ALGORITHMS | instruments.INSTRUMENTS)


def gradient(name, A, low=None, high=None):
    """The weight of each token: -B |y| d loss / d logp."""
    logp_old = torch.full(LOG_W.shape, -2.0)
    logp = (logp_old + LOG_W).requires_grad_()
    loss, clipped = gspo.policy_loss(name, logp, logp_old, torch.tensor(A), MASK, low, high)
    loss.backward()
    assert (logp.grad[clipped] == 0).all()
    return -logp.grad * len(LOG_W) * MASK.sum(dim=1, keepdim=True)


@pytest.mark.parametrize("name, A, weights", [
    # w = exp(1.2) = 3.3 is clipped if good, and if bad by the dual clip. w = exp(-1.6) = 0.2 is
    # kept if good, clipped if bad.
    ("grpo_dual_clip", [1.0, -1.0], [[0, exp(-0.1), exp(-0.1)], [0, 0, 0]]),
    ("grpo_dual_clip", [-1.0, 1.0], [[-exp(0.5), -exp(-0.1), -exp(-0.1)], [0, exp(-1.6), 0]]),
    # The first response is clipped if it is good, the second one if it is bad.
    ("gspo_clip_grpo_weight", [1.0, -1.0], [[0.0, 0, 0], [0, 0, 0]]),
    ("gspo_clip_grpo_weight", [-1.0, 1.0],
     [[-exp(0.5), -exp(-0.1), -exp(-0.1)], [exp(1.2), exp(-1.6), 0]]),
    ("grpo_clip_gspo_weight", [1.0, -1.0], [[0, exp(0.1), exp(0.1)], [-exp(-0.2), 0, 0]]),
    ("grpo_clip_gspo_weight", [-1.0, 1.0],
     [[-exp(0.1), -exp(0.1), -exp(0.1)], [0, exp(-0.2), 0]]),
])
def test_each_token_has_the_weight_worked_out_by_hand(name, A, weights):
    torch.testing.assert_close(gradient(name, A), torch.tensor(weights))


def test_without_a_clip_the_gates_have_the_weights_of_the_other():
    for A in ([1.0, -1.0], [-1.0, 1.0]):
        torch.testing.assert_close(gradient("gspo_clip_grpo_weight", A, 1.0, 100.0),
                                   gradient("grpo", A, 1.0, 100.0))
        torch.testing.assert_close(gradient("grpo_clip_gspo_weight", A, 1.0, 100.0),
                                   gradient("gspo", A, 1.0, 100.0))


@pytest.mark.parametrize("sigma, common", [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.5, 0.5)])
def test_noise_has_factors_of_mean_1_or_leaves_the_mean_of_log_w(sigma, common):
    options = instruments.Options(sigma, common)
    zeros = torch.zeros(100_000, 4)
    log_factor = instruments.noise(zeros, options, torch.Generator().manual_seed(0))
    variance = sigma ** 2 + common ** 2
    assert log_factor.exp().mean().item() == pytest.approx(1, abs=0.02)
    assert log_factor.mean().item() == pytest.approx(-variance / 2, abs=0.02)
    assert log_factor.var().item() == pytest.approx(variance, abs=0.02)
    of_response = log_factor.mean(dim=1)
    assert of_response.var().item() == pytest.approx(sigma ** 2 / 4 + common ** 2, abs=0.02)
    options.centred = True
    centred = instruments.noise(zeros, options, torch.Generator().manual_seed(0))
    torch.testing.assert_close(centred - log_factor, torch.full_like(zeros, variance / 2))


def test_responses_and_clipped_shares_are_counted_by_length_and_sign():
    def learned(mini_batch, lengths, A, n_clipped):
        mask = torch.arange(-1, 200) < torch.tensor(lengths)[:, None]           # (B, 1 + 200)
        batch = Rollout(mask.long(), mask, prompt_width=1, advantages=torch.tensor(A))
        clipped = torch.arange(200) < torch.tensor(n_clipped)[:, None]    # the first ones
        return gspo.Learned(batch, None, 0.0, clipped, mini_batch=mini_batch)
    found = instruments.clipped_by_length([
        learned(0, [4, 20], [1.0, -1.0], [4, 20]),          # the first one: nothing has moved yet
        learned(1, [4, 5, 16], [1.0, 0.5, -1.0], [1, 5, 4]),
        learned(2, [3, 130, 128], [2.0, -1.0, -0.5], [3, 13, 0])])
    assert found == pytest.approx(dict.fromkeys(instruments.COLUMNS, 0.0) | {
        "responses_good_4": 2, "clipped_good_4": 1 / 4 + 3 / 3,
        "responses_good_16": 1, "clipped_good_16": 5 / 5,
        "responses_bad_16": 1, "clipped_bad_16": 4 / 16,
        "responses_bad_128": 2, "clipped_bad_128": 13 / 130})


def test_random_rewards_do_not_depend_on_the_responses():
    class Base:
        def collect(self, model, rng):
            empty = torch.zeros(1000, 0)
            return Rollout(empty, empty > 0, 0, logp_old=empty, rewards=self.rewards), []

    class Trainer(instruments.Extra, Base):
        config = instruments.Options(random_rewards=True)
    trainer = Trainer()
    drawn = []
    for reward in (0.0, 1.0):
        trainer.rewards = torch.full((1000,), reward)
        drawn.append(trainer.collect(None, random.Random(0))[0].rewards)
    assert torch.equal(*drawn)
    assert set(drawn[0].tolist()) == {0.0, 1.0}
    assert drawn[0].mean().item() == pytest.approx(0.5, abs=0.05)


def test_a_run_has_noise_in_its_ratios_what_was_clipped_and_another_last_evaluation(tmp_path):
    """In a process of its own: the instruments make flags of train.py, before it is imported."""
    options = ("--noise 1 --centred --random_rewards --final_samples 8 --cold_steps 30 --steps 1 "
               "--cold_tokens 400 --max_digits 1 --max_new_tokens 24 --prompts 16 --threads 1 "
               "--algorithm grpo_clip_gspo_weight --device cpu --out run")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent.parent)}
    subprocess.run([sys.executable, "-m", "lab.study.instruments", *options.split()], cwd=tmp_path,
                   env=environment, check=True, capture_output=True, timeout=200)
    first = read_table(tmp_path / "run/updates.csv")[0]
    assert float(first["log_w_std"]) == pytest.approx(1, abs=0.1)
    step = read_table(tmp_path / "run/metrics.csv")[0]
    assert sum(float(step[name]) for name in instruments.COLUMNS) > 0
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["accuracy"] != float(step["accuracy"])      # of 8 samples a problem, and of 4


@pytest.mark.parametrize("name, value", [
    ("recompute_logp_old", True), ("correction", "tis"), ("routing_replay", "r2")])
def test_noise_is_refused_where_it_would_be_lost(name, value):
    options = {"algorithm": "grpo", "recompute_logp_old": False, "correction": "none",
               "routing_replay": "r3", "common_noise": 0.0}
    assert instruments.wanted(SimpleNamespace(noise=1.0, **options))
    options[name] = value
    assert instruments.wanted(SimpleNamespace(noise=0.0, **options))
    with pytest.raises(ValueError, match=f"{name}.* would replace the stored log-probs"):
        instruments.wanted(SimpleNamespace(noise=1.0, **options))
