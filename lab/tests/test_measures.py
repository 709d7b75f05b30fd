"""What is logged of ratios, routers and samplers, against counting and closed forms."""
from math import exp, log

import torch
from pytest import approx

import gspo
from lab import measures
from test_gspo import (
    OLD_LOGP, drifted, filled, mask_of,
    one_thread_and_one_seed,        # noqa: F401 - a fixture of all tests here
    parametrize, random_batch, sample, tensor, tiny)


def metrics_of(d, A, algorithm="gspo", low=0.2, high=0.2):
    """The metrics of responses whose tokens have the log-ratios d, log new - log old."""
    width = max(map(len, d))
    mask = mask_of(d, width)
    logp_old = torch.full(mask.shape, OLD_LOGP).double()
    logp = logp_old + filled(d, width, filler=9.0)
    A = tensor(A)
    _, clipped = gspo.policy_loss(algorithm, logp, logp_old, A, mask, low, high)
    return measures.ratio_metrics(logp, logp_old, A, clipped, mask)


def test_ratio_metrics_of_two_tokens():
    metrics = metrics_of([[0.1, -0.3]], [1.0])
    assert metrics["kl"] == approx((0.0051709181 + 0.0408182207) / 2)       # exp(d) - 1 - d
    assert metrics["outliers"] == 0.5                                       # exp(-0.3) < 0.8
    assert metrics["log_w_mean"] == approx(-0.1)
    assert metrics["log_w_std"] == approx(0.2)
    assert metrics["log_s_mean"] == approx(-0.1)
    assert metrics["log_s_std"] == 0


def test_responses_count_alike_in_log_s_and_tokens_in_log_w():
    metrics = metrics_of([[0.3], [0.1, 0.1, 0.1]], [1.0, 1.0])
    assert metrics["log_s_mean"] == approx(0.2)
    assert metrics["log_s_std"] == approx(0.1)
    assert metrics["log_w_mean"] == approx(0.15)


def test_the_metric_kl_is_that_of_the_old_policy_to_the_new_one():
    old = tensor([0.5, 0.25, 0.25])
    new = tensor([0.2, 0.5, 0.3])
    d = (new / old).log()[[0, 0, 1, 2], None].tolist()      # each token as often as `old` says
    exact = (old * (old / new).log()).sum().item()
    assert metrics_of(d, [1.0] * 4)["kl"] == approx(exact)


def test_clip_fractions_at_the_papers_range_of_padded_responses():
    d = [[3e-4, -6e-4, 9e-4], [5e-4], [-2e-4, -6e-4]]       # inside, above, below
    metrics = metrics_of(d, [1.0, 0.5, -1.5], low=3e-4, high=4e-4)
    assert metrics["clip_high"] == approx(1 / 6)            # one token of six
    assert metrics["clip_low"] == approx(2 / 6)
    assert metrics["clip_high_seq"] == approx(1 / 3)        # one response of three
    assert metrics["clip_low_seq"] == approx(1 / 3)


def test_the_clip_fractions_per_response_are_means_of_its_tokens():
    metrics = metrics_of([[0.9, 0.0, 0.0, 0.9], [0.0]], [1.0, 1.0], algorithm="grpo")
    assert metrics["clip_high"] == approx(2 / 5)
    assert metrics["clip_high_seq"] == approx(1 / 4)
    assert metrics["clip_low"] == metrics["clip_low_seq"] == 0


def test_on_the_sampling_policy_all_metrics_are_0():
    d, A = random_batch(0, scale=0.0)
    assert not any(metrics_of(d, A).values())


@parametrize("d", [-1000.0, 1000.0])
def test_huge_ratios_leave_the_metrics_finite(d):
    assert all(abs(value) < 1e9 for value in metrics_of([[d, 0.0]], [-1.0]).values())


def test_routing_metrics_compare_sets_and_count():
    old = torch.tensor([[[0, 1], [2, 3]], [[1, 0], [3, 1]]])            # (L, N, K): 2, 2, 2
    new = torch.tensor([[[1, 0], [1, 3]], [[2, 3], [0, 1]]])
    there = measures.routing_metrics(old, new, torch.full((2, 2, 4), 7.0))
    back = measures.routing_metrics(new, old, torch.full((2, 2, 4), 7.0))
    assert there["expert_change"] == back["expert_change"] == [0.25, 0.75]
    assert there["expert_load"] == [2, 1]                   # the busiest expert over the mean one
    assert there["router_entropy"] == approx([log(4)] * 2)


def slow_predicting(rollout, x):
    """Row after row, what stands in the column before each token of its response: (N, ...)."""
    columns = []
    for row, n in enumerate(rollout.lengths.tolist()):
        for t in range(n):
            columns.append(x[row, rollout.prompt_width + t - 1])
    return torch.stack(columns)


def test_predicting_takes_the_columns_whose_logits_predict_a_response():
    rollout = sample(tiny())
    routes = measures.predicting(rollout, rollout.routes)               # (L, N, K)
    expected = slow_predicting(rollout, rollout.routes)                 # (N, L, K)
    for layer in range(2):
        assert torch.equal(routes[layer], expected[:, layer])


def test_mismatch_is_measured_on_the_tokens_of_the_responses_and_the_experts_behind_them():
    model, rollout = drifted()
    scores = gspo.score(model, rollout)
    d = []
    changed = []
    for row, n in enumerate(rollout.lengths.tolist()):
        d += (scores.logp[row, :n] - rollout.logp_old[row, :n]).tolist()
    before = slow_predicting(rollout, rollout.routes).flatten(0, 1).tolist()
    after = slow_predicting(rollout, scores.routes).flatten(0, 1).tolist()
    for old, new in zip(before, after):
        changed.append(len(set(old) - set(new)) / 2)
    metrics = measures.mismatch_metrics(rollout, scores)
    assert metrics["mismatch_mean"] == approx(sum(map(abs, d)) / len(d), rel=1e-5)
    assert metrics["mismatch_max"] == approx(max(map(abs, d)), rel=1e-5)
    assert metrics["mismatch_kl"] == approx(sum(exp(x) - 1 - x for x in d) / len(d), rel=1e-3)
    assert metrics["mismatch_experts"] == approx(sum(changed) / len(changed))
    assert metrics["mismatch_experts"] > 0


def test_a_trainer_that_is_the_sampler_has_no_mismatch():
    model = tiny()
    rollout = sample(model)
    metrics = measures.mismatch_metrics(rollout, gspo.score(model, rollout))
    assert metrics["mismatch_max"] < 1e-5
    assert metrics["mismatch_experts"] == 0


# ------------------------------------------------------------------------------------ gradient

LOW = 0.03
HIGH = 0.04


def clipped_mean(logs, A):
    """GMPO's log-ratio: the mean over a response of log w, clipped on the side that A asks for."""
    kept = torch.where(A > 0, logs.log_w.clamp(max=HIGH), logs.log_w.clamp(min=-LOW))
    return (kept * logs.mask).sum(dim=1, keepdim=True) / logs.mask.sum(dim=1, keepdim=True)


def slope_of_gate(logs, A):
    """SAPO's w times the slope of its gate, sech^2(tau/2 (w - 1))."""
    w = logs.log_w.exp()
    tau = torch.where(A > 0, tensor(1.0), tensor(1.05))
    return w / torch.cosh(tau / 2 * (w - 1)) ** 2


# What stands for the ratio in the gradient of each objective, and whether its clip silences.
RATIOS = {
    "gspo": (lambda logs, A: logs.log_s.exp(), True),                   # Eq. 10
    "gspo_token": (lambda logs, A: logs.log_s.exp(), True),             # Eq. 17
    "luspo": (lambda logs, A: logs.log_s.exp(), True),
    "grpo": (lambda logs, A: logs.log_w.exp(), True),                   # Eq. 12
    "dapo": (lambda logs, A: logs.log_w.exp(), True),
    "dr_grpo": (lambda logs, A: logs.log_w.exp(), True),
    "ppo": (lambda logs, A: logs.log_w.exp(), True),
    "gmpo": (lambda logs, A: clipped_mean(logs, A).exp(), True),
    "cispo": (lambda logs, A: logs.log_w.exp().clamp(1 - LOW, 1 + HIGH), False),
    "sapo": (slope_of_gate, False),
    "reinforce": (lambda logs, A: torch.ones_like(logs.log_w), False),
}


@parametrize("seed", range(3))
@parametrize("algorithm", RATIOS)
def test_the_weights_in_closed_form_are_those_of_autograd(algorithm, seed):
    d, A = random_batch(seed)
    mask = mask_of(d, 7)
    A = tensor(A)
    logp_old = torch.full(mask.shape, OLD_LOGP).double()
    logp = (logp_old + filled(d, 7)).requires_grad_()
    loss, clipped = gspo.policy_loss(algorithm, logp, logp_old, A, mask, LOW, HIGH)
    gradient, = torch.autograd.grad(-loss, logp)
    ratio, silences = RATIOS[algorithm]
    logs = gspo.log_ratios(logp.detach(), logp_old, mask)
    weights = gspo.ALGORITHMS[algorithm].token_weights(mask.sum(dim=1).double())
    expected = measures.gradient_weights(ratio(logs, A[:, None]), A, clipped & silences, weights)
    torch.testing.assert_close(gradient, expected * mask, atol=1e-12, rtol=0)


def test_every_objective_has_its_weights_in_closed_form():
    assert set(RATIOS) == set(gspo.ALGORITHMS)
