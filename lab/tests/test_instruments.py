"""The instruments: gradients token by token, worked out by hand, and the noise."""
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


def test_the_dual_clip_stops_a_bad_token_beyond_3():
    assert exp(1.2) > instruments.DUAL_CLIP > exp(0.5)
    dual = gradient("grpo_dual_clip", [-1.0, -1.0])
    single = gradient("grpo", [-1.0, -1.0])
    assert dual[1, 0] == 0
    assert single[1, 0] == pytest.approx(-exp(1.2))
    assert torch.equal(dual[0], single[0])


def test_without_a_clip_the_gates_have_the_weights_of_the_other():
    for A in ([1.0, -1.0], [-1.0, 1.0]):
        torch.testing.assert_close(gradient("gspo_clip_grpo_weight", A, 1.0, 100.0),
                                   gradient("grpo", A, 1.0, 100.0))
        torch.testing.assert_close(gradient("grpo_clip_gspo_weight", A, 1.0, 100.0),
                                   gradient("gspo", A, 1.0, 100.0))


@pytest.mark.parametrize("sigma, common", [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.5, 0.5)])
def test_noise_multiplies_the_ratios_with_factors_of_mean_1_or_leaves_the_mean_of_log_w(
        sigma, common):
    zeros = torch.zeros(100_000, 4)
    log_factor = instruments.noise(zeros, sigma, common, False, random.Random(0))
    variance = sigma ** 2 + common ** 2
    assert log_factor.exp().mean().item() == pytest.approx(1, abs=0.02)
    assert log_factor.mean().item() == pytest.approx(-variance / 2, abs=0.02)
    assert log_factor.var().item() == pytest.approx(variance, abs=0.02)
    of_response = log_factor.mean(dim=1)
    assert of_response.var().item() == pytest.approx(sigma ** 2 / 4 + common ** 2, abs=0.02)
    centred = instruments.noise(zeros, sigma, common, True, random.Random(0))
    torch.testing.assert_close(centred - log_factor, torch.full_like(zeros, variance / 2))


def test_every_run_of_the_noisy_trainer_has_the_noise_in_its_ratios(tmp_path):
    """In a process of its own: the instruments make flags of train.py, before it is imported."""
    command = [sys.executable, "-m", "lab.study.instruments", "--noise", "1", "--centred",
               "--cold_steps", "30", "--cold_tokens", "400", "--max_digits", "1", "--steps", "1",
               "--max_new_tokens", "24", "--prompts", "16",
               "--algorithm", "grpo_clip_gspo_weight", "--threads", "1", "--device", "cpu"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent.parent)}
    subprocess.run([*command, "--out", "run"], cwd=tmp_path, env=environment, check=True,
                   capture_output=True, timeout=200)
    options = json.loads((tmp_path / "run/config.json").read_text())
    assert (options["noise"], options["centred"]) == (1, True)
    first = read_table(tmp_path / "run/updates.csv")[0]
    assert float(first["log_w_std"]) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("name, value", [
    ("recompute_logp_old", True), ("correction", "tis"), ("routing_replay", "r2")])
def test_noise_is_refused_where_it_would_be_lost(name, value):
    options = {"algorithm": "grpo", "recompute_logp_old": False, "correction": "none",
               "routing_replay": "r3", "common_noise": 0.0}
    assert instruments.wanted(SimpleNamespace(noise=1.0, **options))
    options[name] = value
    assert not instruments.wanted(SimpleNamespace(noise=0.0, **options))
    with pytest.raises(ValueError, match=f"{name}.* would replace the stored log-probs"):
        instruments.wanted(SimpleNamespace(noise=1.0, **options))
