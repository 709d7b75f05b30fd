"""The instruments: gradients token by token, worked out by hand, and the noise."""
import random
from math import exp

import pytest
import torch

import gspo
from lab import instruments

# Two responses of three tokens and of two. log s is 0.1 and -0.2.
LOG_W = torch.tensor([[0.5, -0.1, -0.1], [1.2, -1.6, 0.0]])
MASK = torch.tensor([[True, True, True], [True, True, False]])


def gradient(name, A, low=None, high=None):
    """The weight of each token: -B |y| d loss / d logp."""
    logp_old = torch.full(LOG_W.shape, -2.0)
    logp = (logp_old + LOG_W).requires_grad_()
    loss, clipped = gspo.policy_loss(name, logp, logp_old, torch.tensor(A), MASK, low, high)
    loss.backward()
    assert (logp.grad[clipped] == 0).all()
    return -logp.grad * len(LOG_W) * MASK.sum(dim=1, keepdim=True)


@pytest.mark.parametrize("name, A, weights", [
    # 1.2 in a good response is beyond 1.27, -1.6 in a good one keeps its gradient. In a bad one it
    # is the other way round.
    ("grpo_dual_clip", [1.0, -1.0], [[0, exp(-0.1), exp(-0.1)], [0, 0, 0]]),
    ("grpo_dual_clip", [-1.0, 1.0], [[-exp(0.5), -exp(-0.1), -exp(-0.1)], [0, exp(-1.6), 0]]),
    # The first response is clipped if it is good, the second one if it is bad.
    ("gate_of_gspo", [1.0, -1.0], [[0.0, 0, 0], [0, 0, 0]]),
    ("gate_of_gspo", [-1.0, 1.0],
     [[-exp(0.5), -exp(-0.1), -exp(-0.1)], [exp(1.2), exp(-1.6), 0]]),
    ("gate_of_grpo", [1.0, -1.0], [[0, exp(0.1), exp(0.1)], [-exp(-0.2), 0, 0]]),
    ("gate_of_grpo", [-1.0, 1.0],
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
        torch.testing.assert_close(gradient("gate_of_gspo", A, 1.0, 100.0),
                                   gradient("grpo", A, 1.0, 100.0))
        torch.testing.assert_close(gradient("gate_of_grpo", A, 1.0, 100.0),
                                   gradient("gspo", A, 1.0, 100.0))


@pytest.mark.parametrize("sigma, common", [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.5, 0.5)])
def test_noise_multiplies_the_ratios_with_factors_of_mean_1(sigma, common):
    log_factor = instruments.noise(torch.zeros(100_000, 4), sigma, common, random.Random(0))
    assert log_factor.exp().mean().item() == pytest.approx(1, abs=0.02)
    of_response = log_factor.mean(dim=1)
    expected = sigma ** 2 / 4 + common ** 2
    assert of_response.var().item() == pytest.approx(expected, abs=0.02)
    assert log_factor.var().item() == pytest.approx(sigma ** 2 + common ** 2, abs=0.02)
