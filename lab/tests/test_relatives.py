"""GSPO's relatives: each against its paper, and against the others where they are the same."""
from functools import partial
from math import exp, inf, log, nan

import pytest
import torch
from pytest import approx
from torch.nn import functional as F
from torch.testing import assert_close

import gspo
import lab.extras       # adds rows to gspo.ALGORITHMS
from lab.tests import formulas
import test_gspo
from test_gspo import (
    OLD_LOGP, OUTLIERS, REWARDS, assert_value_and_gradient, both_signs_and_sides, cases,
    clip_by_hand, drifted, evaluate, exactly, filled, mask_of, mean,
    one_thread_and_one_seed,        # noqa: F401 - a fixture of all tests here
    parametrize, random_batch, slow_scores, tensor, three_seeds)

ALL = tuple(gspo.ALGORITHMS)
every_algorithm = parametrize("algorithm", ALL)
ONE_PER_RESPONSE = ("gspo", "luspo", "gmpo")        # advantages


# ---------------------------------------------------------------------------- the objectives

def term_by_hand(algorithm, row, still, t, a, low, high):
    """What token t of a response contributes in the papers, from the log-ratios of the response.
    `still` has the same numbers, and is used where a paper stops the gradient."""
    w = exp(row[t])
    match algorithm:
        case "gspo" | "luspo":
            return clip_by_hand(exp(mean(row)), a, low, high)
        case "gspo_token":
            return clip_by_hand(exp(mean(still)) * w / exp(still[t]), a, low, high)
        case "cispo":
            return max(1 - low, min(1 + high, exp(still[t]))) * a * (row[t] + OLD_LOGP)
        case "gmpo":
            return exp(mean([min(x, high) if a > 0 else max(x, -low) for x in row])) * a
        case "sapo":
            tau = 1.0 if a > 0 else 1.05
            return 4 / tau / (1 + exp(-tau * (w - 1))) * a
        case "reinforce":
            return (row[t] + OLD_LOGP) * a
    return clip_by_hand(w, a, low, high)


def weight_by_hand(algorithm, d, row):
    """How much one token of a response with the log-ratios `row` counts in the batch d."""
    match algorithm:
        case "dapo" | "cispo":
            return 1 / sum(map(len, d))
        case "luspo" | "dr_grpo":
            return 1 / len(d)
    return 1 / len(d) / len(row)


def loss_by_hand(algorithm, still, A, low, high, d):
    """The papers' losses, one number after the other; A has a list of advantages per response."""
    J = 0.0
    for row, row_still, a in zip(d, still, A):
        for t in range(len(row)):
            term = term_by_hand(algorithm, row, row_still, t, a[t], low, high)
            J += weight_by_hand(algorithm, d, row) * term
    return -J


@three_seeds
@every_algorithm
def test_value_and_gradient_are_those_of_the_papers(algorithm, seed):
    d, A = random_batch(seed)
    A_of_tokens = [[a] * len(row) for a, row in zip(A, d)]
    loss = partial(loss_by_hand, algorithm, d, A_of_tokens, 0.03, 0.04)
    assert_value_and_gradient(evaluate(algorithm, d, A, 0.03, 0.04), loss, d)


@three_seeds
@parametrize("algorithm", [name for name in ALL if name not in ONE_PER_RESPONSE])
def test_advantages_per_token_too(algorithm, seed):
    d, _ = random_batch(seed)
    A, _ = random_batch(seed + 10, scale=1.0)
    loss = partial(loss_by_hand, algorithm, d, A, 0.03, 0.04)
    assert_value_and_gradient(evaluate(algorithm, d, A, 0.03, 0.04), loss, d)


@cases("algorithm, d, A, loss, grad", {
    "gmpo, good": ("gmpo", OUTLIERS, [1.0], -exp(-2.6 / 3), [[0, -exp(-2.6 / 3) / 3, 0]]),
    "gmpo, bad": ("gmpo", OUTLIERS, [-1.0], exp(3.4 / 3),
                  [[exp(3.4 / 3) / 3, 0, exp(3.4 / 3) / 3]]),
    "cispo": ("cispo", OUTLIERS, [1.0], 1.28 / 3, [[-0.4, -0.8 / 3, -0.4]]),
    "sapo, good": ("sapo", OUTLIERS, [1.0], -2.631370552,
                   [[-1.377e-7, -0.0133488517, -0.5152888644]]),
    "sapo, bad": ("sapo", OUTLIERS, [-1.0], 2.505045309, [[5.304e-8, 0.0130653662, 0.5069263338]]),
    "sapo, good, w = 1": ("sapo", [[0.0]], [1.0], -2, [[-1]]),
    "sapo, bad, w = 1": ("sapo", [[0.0]], [-1.0], 2 / 1.05, [[1]]),
    "sapo, good, w = 2": ("sapo", [[log(2)]], [1.0], -4 / (1 + exp(-1)), [[-1.5728955]]),
    "sapo, bad, w = 2": ("sapo", [[log(2)]], [-1.0], 4 / 1.05 / (1 + exp(-1.05)), [[1.5362195]]),
    "gspo_token": ("gspo_token", [[log(0.5), 0, log(1.5)]], [[1.0, -1.0, 2.0]], -0.6057068643,
                   [[-0.3028534321, 0.3028534321, -0.6057068643]]),
    "gspo_token, two responses":
        ("gspo_token", [[log(0.5), 0, log(1.5)], [log(0.5) + 1, 1, log(1.5) + 1]],
         [[1.0, -1.0, 2.0]] * 2, -0.4912329415,
         [[-0.1514267161, 0.1514267161, -0.3028534321], [0, 0.4116204900, 0]]),
    "gspo_token, two signs": ("gspo_token", [[log(1.5)] * 2], [[1.0, -1.0]], 0.15, [[0, 0.75]])})
def test_values_known_in_advance(algorithm, d, A, loss, grad):
    result = evaluate(algorithm, d, A)
    assert result.loss == approx(loss, abs=1e-9)
    assert_close(result.grad, tensor(grad), atol=1e-7, rtol=0)


@both_signs_and_sides
def test_gspo_token_clips_the_sides_that_gspo_clips(A, ratio, loss, slope):
    result = evaluate("gspo_token", [[log(ratio)]], [A])
    assert result.loss == approx(loss)
    assert result.grad.item() == approx(slope)
    assert result.clipped.item() == (slope == 0)


@every_algorithm
def test_a_ratio_on_the_edge_of_its_range_is_not_clipped(algorithm):
    result = evaluate(algorithm, [[0.0]], [1.0], 0.0, 0.0)
    assert result.grad.item() == -1
    assert not result.clipped.item()


@parametrize("algorithm", [name for name in ALL if name != "cispo"])    # it keeps all its gradient
def test_clipped_tokens_are_those_without_gradient(algorithm):
    d, A = random_batch(0)
    result = evaluate(algorithm, d, A, 0.03, 0.04)
    assert torch.equal(result.clipped, mask_of(d, 7) & (result.grad == 0))


def test_cispo_counts_the_tokens_whose_weight_it_limits():
    result = evaluate("cispo", [[-0.3, -0.1, 0.1, 0.3], [0.3]], [1.0, 0.0])
    assert result.clipped[0].tolist() == [True, False, False, True]
    assert not result.clipped[1].any()                      # nothing to gain or to lose


@parametrize("algorithm, loss, of_short, of_long", [
    ("gspo", 0, 1 / 2, 1 / 6), ("gspo_token", 0, 1 / 2, 1 / 6), ("grpo", 0, 1 / 2, 1 / 6),
    ("ppo", 0, 1 / 2, 1 / 6), ("dapo", 1 / 2, 1 / 4, 1 / 4), ("dr_grpo", 1, 1 / 2, 1 / 2),
    ("luspo", 1, 1 / 2, 1 / 2)])
def test_how_a_short_and_a_long_response_add_up(algorithm, loss, of_short, of_long):
    result = evaluate(algorithm, [[0.0], [0.0] * 3], [1.0, -1.0])
    assert result.loss == approx(loss)
    exactly(result.grad, tensor([[-of_short, 0, 0], [of_long] * 3]))


@every_algorithm
def test_on_the_sampling_policy_every_algorithm_is_reinforce(algorithm):
    d, A = random_batch(0, scale=0.0)
    result = evaluate(algorithm, d, A, 3e-4, 4e-4)
    expected = [[-a * weight_by_hand(algorithm, d, row)] * len(row) for row, a in zip(d, A)]
    exactly(result.grad, filled(expected, 7))
    assert not result.clipped.any()


@every_algorithm
@parametrize("filler, dtype", [(123.0, torch.bool), (-inf, torch.long), (nan, torch.float)])
def test_neither_padding_nor_order_nor_the_type_of_the_mask_matters(algorithm, filler, dtype):
    test_gspo.test_neither_padding_nor_order_nor_the_type_of_the_mask_matters(
        algorithm, filler, dtype)


@every_algorithm
@parametrize("d, A", [(100.0, 1.0), (-100.0, -1.0), (100.0, -1.0)])
def test_huge_ratios_leave_the_gradient_finite(algorithm, d, A):
    logp = torch.full((1, 3), d, requires_grad=True)        # in float32, exp(100) is infinite
    loss, _ = gspo.policy_loss(algorithm, logp, torch.zeros(1, 3), torch.tensor([A]),
                               torch.ones(1, 3), 0.2, 0.2)
    loss.backward()
    assert loss.isfinite()
    assert logp.grad.isfinite().all()


@parametrize("algorithm", ["gspo", "gspo_token"])
@parametrize("logp, logp_old, A, loss", [
    (100.0, 0.0, 1.0, -1.2), (-100.0, 0.0, -1.0, 0.8), (100.0, 0.0, -1.0, exp(20)),
    (-1.0, -50.0, -1.0, exp(20))])
def test_gspo_token_has_no_gradient_beyond_the_bound_like_gspo(algorithm, logp, logp_old, A, loss):
    logp = torch.full((1, 2), logp, requires_grad=True)
    value, _ = gspo.policy_loss(algorithm, logp, torch.full((1, 2), logp_old), torch.tensor([A]),
                                torch.ones(1, 2), 0.2, 0.2)
    value.backward()
    assert value.item() == approx(loss)
    assert logp.grad.tolist() == [[0, 0]]


# ---------------------------------------------------------------------------- what is the same

@three_seeds
@cases("other, tokens, clip_range, same", {
    "gspo_token, with one advantage per response": ("gspo_token", 7, 0.03, True),
    "grpo, in a response of one token": ("grpo", 1, 0.03, True),
    "not grpo otherwise": ("grpo", 7, 0.03, False),
    "gmpo, without a clip": ("gmpo", 7, 9.0, True),
    "not gmpo otherwise": ("gmpo", 7, 0.03, False)})
def test_what_is_the_same_as_gspo(other, tokens, clip_range, same, seed):
    d, A = random_batch(seed)
    d = [row[:tokens] for row in d]
    one = evaluate("gspo", d, A, clip_range, clip_range)
    two = evaluate(other, d, A, clip_range, clip_range)
    assert (one.loss == approx(two.loss, abs=1e-12)) == same
    assert torch.allclose(one.grad, two.grad, atol=1e-12) == same


@three_seeds
def test_gspos_lower_clip_is_the_off_policy_mask_of_deepseek(seed):
    """DeepSeek-V3.2 drops a response if A < 0 and the mean of log(old / new) exceeds delta."""
    delta = 0.02
    d, A = random_batch(seed)
    result = evaluate("gspo", d, A, 1 - exp(-delta), 99)
    for row, a, slopes in zip(d, A, result.grad):
        dropped = a < 0 and -mean(row) > delta
        assert slopes[:len(row)].any() != dropped


@cases("algorithm, expected", {
    "luspo has the true gradient": ("luspo", [-0.134411, 0.142184]),
    "gspo prefers short responses": ("gspo", [-0.105812, 0.071092])})
def test_expected_gradient_of_a_policy_that_goes_on_or_stops(algorithm, expected):
    theta = tensor([0.3, -0.2]).requires_grad_()            # logits of going on at step 1 and 2
    go = F.logsigmoid(theta)
    stop = F.logsigmoid(-theta)
    outcomes = [(stop[:1], 1), (torch.stack((go[0], stop[1])), 0), (go, 1)]     # log-probs, reward
    value = sum(logp.sum().exp() * reward for logp, reward in outcomes)
    J = 0
    for logp, reward in outcomes:
        A = reward - value[None]
        loss, _ = gspo.policy_loss(algorithm, logp[None], logp[None], A, torch.ones(1, len(logp)))
        J -= logp.sum().exp().detach() * loss
    gradient, = torch.autograd.grad(J, theta, retain_graph=True)
    assert_close(gradient, tensor(expected), atol=1e-6, rtol=0)
    if algorithm == "luspo":
        exactly(gradient, torch.autograd.grad(value, theta)[0])


# ---------------------------------------------------------------------------- advantages, options

def advantages(rewards, **options):
    """What a trainer makes of rewards (P, G) -> (P, G)."""
    trainer = formulas.trainer(group_size=rewards.shape[1], **options)
    _, rollout = drifted()
    rollout.rewards = rewards.flatten()
    return trainer.advantages(rollout).view_as(rewards)


@cases("options, divided", {
    "gspo": ({}, True), "gspo without": ({"scale": "none"}, False),
    "dapo": ({"algorithm": "dapo"}, True), "dr_grpo": ({"algorithm": "dr_grpo"}, False),
    "dr_grpo with": ({"algorithm": "dr_grpo", "scale": "std"}, True),
    "reinforce": ({"algorithm": "reinforce"}, False)})
def test_advantages_are_divided_by_the_deviation_or_not(options, divided):
    rewards = tensor([[1, 0, 0, 0], [7, 7, 1, 1]])
    expected = tensor([[1.5, -0.5, -0.5, -0.5], [0.75 ** 0.5] * 2 + [-0.75 ** 0.5] * 2])
    if not divided:
        expected = tensor([[0.75, -0.25, -0.25, -0.25], [3, 3, -3, -3]])
    A = advantages(rewards, **options)
    if options.get("algorithm") == "dr_grpo":               # up to the constant that it divides by
        A = A * expected[0, 0] / A[0, 0]
    exactly(A, expected)


def test_a_group_of_equal_rewards_has_advantages_of_exactly_0():
    assert not advantages(torch.full((2, 8), 0.1), scale="none").any()


@parametrize("G", [2, 3, 4])
def test_the_groups_own_mean_as_baseline_shrinks_the_policy_gradient_by_1_over_G(G):
    theta = tensor([0.3, -0.5, 0.1]).requires_grad_()
    reward = tensor([1.0, 0.2, 0.0])
    log_pi = theta.log_softmax(0)
    true, = torch.autograd.grad(log_pi.exp() @ reward, theta, retain_graph=True)
    groups = torch.cartesian_prod(*[torch.arange(3)] * G)               # (3 ** G, G)
    expected_loss = 0
    for group, A in zip(groups, advantages(reward[groups], scale="none")):
        logp = log_pi[group][:, None]
        loss, _ = gspo.policy_loss("gspo", logp, logp, A, torch.ones(G, 1))
        expected_loss += log_pi[group].sum().exp().detach() * loss
    gradient, = torch.autograd.grad(-expected_loss, theta)
    exactly(gradient, (1 - 1 / G) * true)


@parametrize("algorithm, low, high", [
    ("gspo_token", 3e-3, 4e-3), ("dr_grpo", 0.2, 0.2), ("dapo", 0.2, 0.28), ("cispo", 1.0, 4.0),
    ("gmpo", 0.4, 0.4), ("luspo", 2e-3, 2.5e-3), ("ppo", 0.2, 0.2)])
def test_a_clip_range_that_is_left_out_is_that_of_the_algorithm(algorithm, low, high):
    d, A = random_batch(0, scale=1.0)
    given = evaluate(algorithm, d, A, low, high).loss
    assert evaluate(algorithm, d, A, None, high).loss == given
    assert evaluate(algorithm, d, A, low, None).loss == given


@parametrize("scale", [None, "std"])
@parametrize("longest", [10, 20])
def test_dr_grpo_divides_by_the_longest_response_there_can_be(longest, scale):
    model, rollout = drifted()
    trainer = formulas.trainer(model, algorithm="dr_grpo", max_new_tokens=longest, scale=scale)
    learned, = formulas.update(trainer, rollout, lr=0.0)
    A = REWARDS - REWARDS.mean(dim=1, keepdim=True)
    if scale == "std":
        A = gspo.group_advantages(REWARDS)
    J = 0
    for row, n in enumerate(rollout.lengths.tolist()):
        logp, _ = slow_scores(model, rollout, row)
        for w in (logp - rollout.logp_old[row, :n]).exp():
            a = A.flatten()[row]
            J = J + torch.minimum(w * a, w.clamp(0.8, 1.2) * a) / 16 / longest
    assert learned.loss == approx(-J.item(), abs=1e-6)
    expected = torch.autograd.grad(-J, list(model.parameters()))
    assert_close([p.grad for p in trainer.model.parameters()], list(expected), atol=1e-6, rtol=1e-4)


@parametrize("algorithm", ONE_PER_RESPONSE)
def test_an_advantage_per_token_is_refused_by_those_that_have_one_per_response(algorithm):
    with pytest.raises(ValueError):
        evaluate(algorithm, [[0.1, 0.2]], [[1.0, -1.0]])


@parametrize("options", [
    {"algorithm": "sapo", "clip_low": 0.1}, {"algorithm": "reinforce", "clip_high": 0.1},
    {"algorithm": "ppo", "scale": "std"}, {"algorithm": "ppo", "scale": "none"}], ids=str)
def test_options_that_an_algorithm_does_not_have_are_refused(options):
    with pytest.raises(ValueError):
        formulas.trainer(**options)
