"""GSPO as a list of its properties. To check them all, run `python -m pytest test_gspo.py`.

Equation numbers are those of arXiv 2507.18071. What a test expects comes from a closed form, an
enumeration, finite differences, or a slow and obvious version of the same thing.
"""
import doctest
from dataclasses import replace
from functools import partial
from math import exp, inf, log, nan, sqrt
from typing import NamedTuple

import pytest
import torch
from pytest import approx
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

import gspo
import moe
from data import demonstrations
from gspo import Experience, Settings
from moe import MoEConfig, MoETransformer, Rollout

tensor = partial(torch.tensor, dtype=torch.float64)
exactly = partial(assert_close, atol=1e-12, rtol=0)     # for float64
closely = partial(assert_close, atol=1e-5, rtol=0)      # for float32
parametrize = pytest.mark.parametrize
ALL = gspo.ALGORITHMS.keys()
every_algorithm = parametrize("algorithm", ALL)
three_seeds = parametrize("seed", range(3))
FAMILY = ("gspo", "gspo_token", "grpo")


def cases(names, table):
    """Parametrize a test with the rows of a table, a dict from what a row is called to the row."""
    return parametrize(names, list(table.values()), ids=list(table))


@pytest.fixture(autouse=True)
def one_thread_and_one_seed():
    """The models are so small that a second thread only costs time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


# ---------------------------------------------------------------------------- the objectives

OLD_LOGP = -1.0     # of every token, unless a test says otherwise


class Result(NamedTuple):
    loss: float
    grad: Tensor    # (B, width) of the loss, for the new log-probs
    metrics: dict


def lay_out(rows, width, filler=0.0):
    """Lists of different lengths -> a tensor (B, width), filled up on the right."""
    return tensor([row + [filler] * (width - len(row)) for row in rows])


def mask_of(rows, width):
    return lay_out([[1.0] * len(row) for row in rows], width) > 0


def evaluate(algorithm, d, A, low=0.2, high=0.2, width=None, filler=0.0):
    """The loss of responses whose tokens have the log-ratios d, which are log new - log old. A has
    one advantage for each response, or a list with one for each token."""
    width = width or max(map(len, d))
    mask = mask_of(d, width)
    A = lay_out(A, width, filler) if isinstance(A[0], list) else tensor(A)
    logp_old = torch.full(mask.shape, OLD_LOGP).double()
    logp = logp_old + lay_out(d, width, filler)
    for x in (logp, logp_old, A):
        x.requires_grad_()
    loss, clipped = gspo.policy_loss(algorithm, logp, logp_old, A, mask, low, high)
    loss.backward()
    assert logp_old.grad is None and A.grad is None         # only the new policy is moved
    with torch.no_grad():
        metrics = gspo.ratio_metrics(logp, logp_old, A, clipped, mask)
    return Result(loss.item(), logp.grad, metrics)


def random_batch(seed, scale=0.1):
    """Log-ratios of six responses, of 1 to 7 tokens, and their advantages."""
    draw = torch.Generator().manual_seed(seed)
    d = [torch.randn(n, generator=draw).mul(scale).tolist() for n in (1, 4, 2, 7, 3, 5)]
    return d, torch.randn(6, generator=draw).tolist()


def mean(numbers):
    return sum(numbers) / len(numbers)


def clip_by_hand(ratio, a, low, high):
    return min(ratio * a, max(1 - low, min(1 + high, ratio)) * a)


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
        case "luspo":
            return 1 / len(d)
        case "dr_grpo":
            return 1 / len(d) / max(map(len, d))
    return 1 / len(d) / len(row)


def loss_by_hand(algorithm, d, still, A, low, high):
    """The papers' losses, one number after the other; A has a list of advantages per response."""
    J = 0.0
    for row, row_still, a in zip(d, still, A):
        for t in range(len(row)):
            term = term_by_hand(algorithm, row, row_still, t, a[t], low, high)
            J += weight_by_hand(algorithm, d, row) * term
    return -J


def slope_by_hand(loss, d, i, t, h=1e-6):
    """How fast loss(d) changes with the log-ratio of token t of response i."""
    up = [row.copy() for row in d]
    down = [row.copy() for row in d]
    up[i][t] += h
    down[i][t] -= h
    return (loss(up) - loss(down)) / (2 * h)


@three_seeds
@parametrize("algorithm, per_token", [(name, False) for name in ALL] + [
    (name, True) for name in sorted(ALL - {"gspo", "luspo", "gmpo"})])
def test_value_and_gradient_are_those_of_the_papers(algorithm, per_token, seed):
    d, A = random_batch(seed)
    A_of_tokens = [[a] * len(row) for a, row in zip(A, d)]
    if per_token:
        A, _ = random_batch(seed + 10, scale=1.0)
        A_of_tokens = A
    loss = partial(loss_by_hand, algorithm, still=d, A=A_of_tokens, low=0.03, high=0.04)
    result = evaluate(algorithm, d, A, 0.03, 0.04)
    assert result.loss == approx(loss(d), abs=1e-12)
    for i, row in enumerate(d):
        slopes = [slope_by_hand(loss, d, i, t) for t in range(len(row))]
        assert result.grad[i].tolist() == approx(slopes + [0] * (7 - len(row)), abs=1e-8)


OUTLIERS = [[3.0, -3.0, 0.6]]       # their mean is 0.2, the clip range


@cases("algorithm, d, A, loss, grad", {
    "gspo": ("gspo", [[0.3, -0.1, 0.1]], [1.0], -exp(0.1), [[-exp(0.1) / 3] * 3]),
    "gspo, a response without tokens is worth 0 but counts":
        ("gspo", [[0.3, -0.1, 0.1], []], [1.0, 9.0], -exp(0.1) / 2, [[-exp(0.1) / 6] * 3, [0] * 3]),
    "gspo, good": ("gspo", OUTLIERS, [1.0], -1.2, [[0, 0, 0]]),
    "gspo, bad": ("gspo", OUTLIERS, [-1.0], exp(0.2), [[exp(0.2) / 3] * 3]),
    "grpo, good": ("grpo", OUTLIERS, [1.0], -0.8165956895, [[0, -0.0165956895, 0]]),
    "grpo, bad": ("grpo", OUTLIERS, [-1.0], 7.5692185745, [[6.6951789744, 0, 0.6073729335]]),
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


@parametrize("algorithm", FAMILY)
@cases("A, ratio, loss, slope", {
    "good and likelier: clipped": (1.0, 1.5, -1.2, 0),
    "good and less likely: kept": (1.0, 0.5, -0.5, -0.5),
    "bad and less likely: clipped": (-1.0, 0.5, 0.8, 0),
    "bad and likelier: kept, however far": (-1.0, 5.0, 5, 5)})
def test_the_sign_of_the_advantage_decides_which_side_is_clipped(algorithm, A, ratio, loss, slope):
    result = evaluate(algorithm, [[log(ratio)]], [A])
    assert result.loss == approx(loss)
    assert result.grad.item() == approx(slope)
    assert result.metrics["clip_high"] == (A > 0 and slope == 0)
    assert result.metrics["clip_low"] == (A < 0 and slope == 0)


@every_algorithm
def test_a_ratio_on_the_edge_of_its_range_is_not_clipped(algorithm):
    result = evaluate(algorithm, [[0.0]], [1.0], 0.0, 0.0)
    assert result.grad.item() == -1
    assert result.metrics["clip_high"] == 0


@parametrize("algorithm, loss, of_short, of_long", [
    ("gspo", 0, 1 / 2, 1 / 6), ("gspo_token", 0, 1 / 2, 1 / 6), ("grpo", 0, 1 / 2, 1 / 6),
    ("ppo", 0, 1 / 2, 1 / 6), ("dapo", 1 / 2, 1 / 4, 1 / 4), ("dr_grpo", 1 / 3, 1 / 6, 1 / 6),
    ("luspo", 1, 1 / 2, 1 / 2)])
def test_how_a_short_and_a_long_response_add_up(algorithm, loss, of_short, of_long):
    result = evaluate(algorithm, [[0.0], [0.0] * 3], [1.0, -1.0])
    assert result.loss == approx(loss)
    exactly(result.grad, tensor([[-of_short, 0, 0], [of_long] * 3]))


def test_the_papers_clip_range_on_padded_responses():
    d = [[3e-4, -6e-4, 9e-4], [5e-4], [-2e-4, -6e-4]]       # inside, above, below
    loss, grad, metrics = evaluate("gspo", d, [1.0, 0.5, -1.5], 3e-4, 4e-4)
    assert loss == approx(-0.00028334, abs=1e-11)
    assert_close(grad, tensor([[-0.111133336] * 3, [0] * 3, [0] * 3]), atol=1e-9, rtol=0)
    assert metrics["clip_high"] == approx(1 / 6)            # one token of six
    assert metrics["clip_low"] == approx(2 / 6)
    assert metrics["clip_high_seq"] == approx(1 / 3)        # one response of three
    assert metrics["clip_low_seq"] == approx(1 / 3)


@three_seeds
def test_equation_5_in_a_straight_line_is_the_gspo_loss(seed):
    d, A = random_batch(seed)
    loss, grad, _ = evaluate("gspo", d, A, 0.03, 0.04)
    logp_old = torch.full((6, 7), OLD_LOGP).double()
    logp = (logp_old + lay_out(d, 7, filler=nan)).requires_grad_()
    J = gspo.gspo_objective(logp, logp_old, tensor(A), mask_of(d, 7), 0.03, 0.04)
    J.backward()
    assert J.item() == approx(-loss, abs=1e-12)
    exactly(logp.grad, -grad)


@parametrize("module, examples", [(gspo, 5), (moe, 0)], ids=["gspo", "moe"])
def test_the_examples_in_the_docstrings(module, examples):
    result = doctest.testmod(module)
    assert result.failed == 0
    assert result.attempted >= examples


@every_algorithm
@parametrize("dtype", [torch.bool, torch.long, torch.float32], ids=str)
def test_a_mask_may_have_any_type(algorithm, dtype):
    d, A = random_batch(0)
    mask = mask_of(d, 7).to(dtype)
    logp_old = torch.full((6, 7), OLD_LOGP).double()
    logp = logp_old + lay_out(d, 7, filler=5.0)
    loss, _ = gspo.policy_loss(algorithm, logp, logp_old, tensor(A), mask, 0.03, 0.04)
    assert loss.item() == evaluate(algorithm, d, A, 0.03, 0.04).loss


@parametrize("algorithm", sorted(ALL - {"cispo"}))          # which keeps all its gradient
def test_the_clip_fraction_counts_the_tokens_without_gradient(algorithm):
    d, A = random_batch(0)
    _, grad, metrics = evaluate(algorithm, d, A, 0.03, 0.04)
    share = 1 - grad.count_nonzero().item() / sum(map(len, d))
    assert metrics["clip_low"] + metrics["clip_high"] == approx(share)


@every_algorithm
def test_on_the_sampling_policy_every_algorithm_is_reinforce(algorithm):
    d, A = random_batch(0, scale=0.0)
    result = evaluate(algorithm, d, A, 3e-4, 4e-4)
    expected = [[-a * weight_by_hand(algorithm, d, row)] * len(row) for row, a in zip(d, A)]
    exactly(result.grad, lay_out(expected, 7))
    assert not any(result.metrics.values())


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
def test_the_lower_clip_is_the_off_policy_mask_of_deepseek(seed):
    """DeepSeek-V3.2 drops a response if A < 0 and the mean of log(old / new) exceeds delta."""
    delta = 0.02
    d, A = random_batch(seed)
    result = evaluate("gspo", d, A, 1 - exp(-delta), 99)
    for row, a, slopes in zip(d, A, result.grad):
        dropped = a < 0 and -mean(row) > delta
        assert slopes[:len(row)].any() != dropped


@every_algorithm
@parametrize("filler", [123.0, -inf, nan])
def test_padding_and_the_order_of_responses_do_not_matter(algorithm, filler):
    d, A = random_batch(1)
    one = evaluate(algorithm, d, A, 0.03, 0.04)
    two = evaluate(algorithm, d[::-1], A[::-1], 0.03, 0.04, 9, filler)
    factor = 9 / 7 if algorithm == "dr_grpo" else 1         # it divides by the longest length
    assert two.loss * factor == approx(one.loss, abs=1e-15)
    exactly(two.grad.flip(0) * factor, F.pad(one.grad, (0, 2)))
    assert two.metrics == approx(one.metrics)


@parametrize("d", [[0.02, 0.02, 0.02], [0.06, 0.0, 0.0], [0.03, -0.02, 0.05]], ids=str)
def test_gspo_sees_only_the_mean_of_the_log_ratios_and_grpo_more(d):
    one = evaluate("gspo", [[0.05, -0.02, 0.03]], [-1.0])
    two = evaluate("gspo", [d], [-1.0])
    assert two.loss == approx(one.loss)
    exactly(two.grad, one.grad)
    arithmetic_mean = evaluate("grpo", [d], [-1.0]).loss
    if len(set(d)) == 1:
        assert arithmetic_mean == approx(one.loss)
    else:
        assert arithmetic_mean > one.loss + 1e-4


@cases("d, loss", {"said twice": ([0.05, -0.02, 0.03] * 2, exp(0.02)),
                   "with swapped policies": ([-0.05, 0.02, -0.03], exp(-0.02))})
def test_the_ratio_of_a_response_said_twice_or_with_swapped_policies(d, loss):
    assert evaluate("gspo", [d], [-1.0]).loss == approx(loss)


@every_algorithm
@parametrize("d, A, loss", [(100.0, 1.0, -1.2), (-100.0, -1.0, 0.8), (100.0, -1.0, exp(20))])
def test_huge_ratios_leave_the_gradient_finite(algorithm, d, A, loss):
    logp = torch.full((1, 3), d, requires_grad=True)
    logp_old = torch.zeros(1, 3)
    mask = torch.ones(1, 3)
    value, _ = gspo.policy_loss(algorithm, logp, logp_old, torch.tensor([A]), mask, 0.2, 0.2)
    value.backward()
    assert logp.grad.isfinite().all()
    if algorithm in FAMILY:
        assert value.item() == approx(loss)


@parametrize("algorithm", FAMILY)
@parametrize("logp, dtype", [(-600.0, torch.float32), (-0.02, torch.bfloat16)], ids=str)
def test_ratios_near_1_survive_coarse_log_probs(algorithm, logp, dtype):
    old = torch.full((1, 4), logp, dtype=dtype)
    new = old.clone()
    new[0, 0] = new[0, 0].nextafter(torch.zeros((), dtype=dtype))       # the smallest step up
    d = (new.double() - old.double()).mean().item()
    loss, _ = gspo.policy_loss(algorithm, new, old, torch.ones(1), torch.ones(1, 4))
    assert 1e-5 < d < 3e-4
    assert loss.item() == approx(-exp(d), abs=1e-7)


def test_the_metric_kl_is_that_of_the_old_policy_to_the_new_one():
    old = tensor([0.5, 0.25, 0.25])
    new = tensor([0.2, 0.5, 0.3])
    d = (new / old).log()[[0, 0, 1, 2], None].tolist()      # each token as often as `old` says
    exact = (old * (old / new).log()).sum().item()
    assert evaluate("gspo", d, [1.0] * 4).metrics["kl"] == approx(exact)


def test_ratio_metrics_of_two_tokens():
    metrics = evaluate("gspo", [[0.1, -0.3]], [1.0]).metrics
    assert metrics["kl"] == approx((0.0051709181 + 0.0408182207) / 2)       # exp(d) - 1 - d
    assert metrics["outliers"] == 0.5                                       # exp(-0.3) < 0.8
    assert metrics["log_w_mean"] == approx(-0.1)
    assert metrics["log_w_std"] == approx(0.2)
    assert metrics["log_s_mean"] == approx(-0.1)


# ---------------------------------------------------------------------------- advantages, critics

@parametrize("G, k", [(4, 1), (8, 1), (8, 5), (3, 2)])
def test_advantages_when_k_of_G_responses_succeed(G, k):
    rewards = tensor([[1.0] * k + [0.0] * (G - k)])
    p = k / G
    good = sqrt((G - 1) / G) * sqrt((1 - p) / p)
    bad = sqrt((G - 1) / G) * -sqrt(p / (1 - p))
    expected = tensor([[good] * k + [bad] * (G - k)])
    exactly(gspo.group_advantages(rewards), expected)
    exactly(gspo.group_advantages(3 * rewards + 7), expected)
    exactly(gspo.group_advantages(rewards, "none"), rewards - p)


@parametrize("scale", ["std", "none"])
def test_a_group_of_equal_rewards_has_advantages_of_exactly_0(scale):
    assert not gspo.group_advantages(torch.full((2, 8), 0.1), scale).any()


@parametrize("G", [2, 3, 4])
def test_the_groups_own_mean_as_baseline_shrinks_the_policy_gradient_by_1_over_G(G):
    theta = tensor([0.3, -0.5, 0.1]).requires_grad_()
    reward = tensor([1.0, 0.2, 0.0])
    log_pi = theta.log_softmax(0)
    true, = torch.autograd.grad(log_pi.exp() @ reward, theta, retain_graph=True)
    expected_loss = 0
    for group in torch.cartesian_prod(*[torch.arange(3)] * G):
        A = gspo.group_advantages(reward[group][None], "none")[0]
        logp = log_pi[group][:, None]
        loss, _ = gspo.policy_loss("gspo", logp, logp, A, torch.ones(G, 1))
        expected_loss += log_pi[group].sum().exp().detach() * loss
    gradient, = torch.autograd.grad(-expected_loss, theta)
    exactly(gradient, (1 - 1 / G) * true)


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


def test_the_kl_term_is_exact_on_average():
    policy = torch.randn(5).double().log_softmax(0)
    reference = torch.randn(5).double().log_softmax(0)
    exact = (policy.exp() * (policy - reference)).sum()
    everything = torch.ones(5, 1) > 0
    # Every token is a response of its own, which weighs as much as it is probable.
    exactly(gspo.kl_loss(policy[:, None], reference[:, None], everything, policy.exp()), exact)


@parametrize("d, value, slope", [(0.1, 0.0048374180, 0.0951625820),
                                 (-0.1, 0.0051709181, -0.1051709181)])
def test_the_kl_term_of_one_token(d, value, slope):
    logp = tensor([[d - 1, 7]]).requires_grad_()
    reference = tensor([[-1, nan]])
    loss = gspo.kl_loss(logp, reference, torch.tensor([[True, False]]), tensor([1]))
    loss.backward()
    assert loss.item() == approx(value)
    assert logp.grad.tolist() == [[approx(slope), 0]]


def test_generalised_advantages_by_their_definition():
    gamma = 0.9
    lam = 0.8
    real = torch.arange(7) < torch.tensor([[7], [1], [4]])          # after its end a row is 0
    rewards = torch.randn(3, 7).double() * real
    values = torch.randn(3, 7).double() * real
    surprise = rewards + gamma * F.pad(values, (0, 1))[:, 1:] - values
    expected = torch.zeros(3, 7).double()
    for t in range(7):
        for later in range(t, 7):
            expected[:, t] += (gamma * lam) ** (later - t) * surprise[:, later]
    exactly(gspo.gae(rewards, values, gamma, lam), expected)


def test_ppo_pays_the_last_token_and_brings_advantages_to_mean_0_and_deviation_1():
    rollout = sample(tiny())
    mask = rollout.response_mask
    rewards = torch.arange(12.0)
    settings = Settings("ppo", gae_lambda=1.0)
    A, critic = gspo.ppo_advantages(rollout, None, torch.zeros(mask.shape), rewards, settings)
    closely(critic.returns[mask], rewards[:, None].expand_as(A)[mask])
    assert A[mask].mean().item() == approx(0, abs=1e-6)
    assert A[mask].std().item() == approx(1, rel=1e-5)


@parametrize("value, loss, slope", [(0.1, 0.405, -0.9), (0.5, 0.32, 0), (-0.5, 1.125, -1.5)])
def test_a_value_gains_nothing_by_moving_beyond_its_clip_range(value, loss, slope):
    value = tensor([[value]]).requires_grad_()              # it was 0 and should be 1
    error = gspo.value_loss(value, tensor([[0]]), tensor([[1]]), value < 9, tensor([1]))
    error.backward()
    assert error.item() == approx(loss)
    assert value.grad.item() == approx(slope)


@parametrize("kind, expected", [("tis", [0.1, 0.6, 1, 2, 2]), ("icepop", [0, 0.6, 1, 3, 0])])
def test_weights_of_tokens_that_the_sampler_saw_otherwise(kind, expected):
    ratio = tensor([[0.1, 0.6, 1, 3, 9]])
    weights = gspo.mismatch_weights(kind, ratio.log() - 2, torch.full((1, 5), -2.0))
    exactly(weights, tensor([expected]))


# ---------------------------------------------------------------------------- the model

PROMPTS = [[3, 4, 5], [6], [7, 2, 8, 9, 4]]
END = 1


def tiny(seed=0, **sizes):
    torch.manual_seed(seed)
    small = {"vocab_size": 12, "max_length": 16, "n_layer": 2, "d_model": 16, "n_expert": 4,
             "d_expert": 8}
    return MoETransformer(MoEConfig(**small | sizes))


def sample(model, prompts=PROMPTS, group_size=4, max_new_tokens=6, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(len(prompts) * group_size, max_new_tokens, generator=generator)
    options = {"eos_id": END, "uniform": uniform} | options
    return moe.generate(model, prompts, group_size, max_new_tokens, **options)


def alone(model, tokens):
    """A forward pass for one row of tokens (n,) without padding."""
    return model(tokens[None], torch.ones(1, len(tokens)) > 0)


def slow_scores(model, rollout, row, temperature=1.0):
    """Log-probs (n,) and entropies (n,) of one response: no batch, no padding, no cache."""
    tokens = rollout.tokens[row, rollout.mask[row]]
    n = rollout.lengths[row]
    log_probs = (alone(model, tokens).logits[0, -n - 1:-1] / temperature).log_softmax(dim=-1)
    return log_probs[range(n), tokens[-n:]], torch.special.entr(log_probs.exp()).sum(dim=-1)


def full(width=8):
    """Random tokens (3, width) and a mask without padding."""
    return torch.randint(12, (3, width)), torch.ones(3, width) > 0


def padded(side, width):
    """Rows of 5, 3 and 1 tokens with padding on one side -> tokens and mask (3, width). In padding
    stand random tokens that are not even in the vocabulary."""
    lengths = torch.tensor([[5], [3], [1]])
    columns = torch.arange(width)
    mask = columns >= width - lengths if side == "left" else columns < lengths
    tokens = torch.randint(100, 1000, (3, width))
    tokens[mask] = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 5])
    return tokens, mask


every_padding = parametrize("side, width", [("left", 5), ("left", 16), ("right", 5), ("right", 16)])


def assert_distinct_experts(routes, E):
    in_order = routes.long().sort(dim=-1).values
    assert in_order.diff(dim=-1).all()
    assert in_order.min() >= 0
    assert in_order.max() < E


def test_unpad_lists_the_real_tokens_and_pad_puts_them_back():
    x = torch.tensor([[0, 3, 10, 7], [4, 5, 10, 0]])
    places = torch.tensor([1, 2, 3, 4, 5, 6])
    flat = moe.unpad(x, places)
    assert flat.tolist() == [3, 10, 7, 4, 5, 10]
    assert torch.equal(moe.pad(flat, places, (2, 4)), x)
    wide = torch.randn(6, 2, 5)
    assert torch.equal(moe.unpad(moe.pad(wide, places, (2, 4)), places), wide)


@every_padding
def test_padding_changes_neither_logits_nor_routes(side, width):
    model = tiny()
    tokens, mask = padded(side, width)
    out = model(tokens, mask)
    for row in range(3):
        real = mask[row]
        expected = alone(model, tokens[row, real])
        closely(out.logits[row, real], expected.logits[0])
        assert torch.equal(out.routes[:, row, real], expected.routes[:, 0])
    assert_distinct_experts(out.routes, 4)                  # in padding too


@every_padding
@parametrize("cast", [MoETransformer.float, MoETransformer.bfloat16])
def test_padding_brings_no_nan_into_the_output_or_a_gradient(side, width, cast):
    model = cast(tiny())
    out = model(*padded(side, width))
    assert all(x.isfinite().all() for x in out)
    out.logits.float().logsumexp(dim=-1).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@every_padding
@parametrize("columns", [1, 3])
def test_a_pass_with_a_cache_a_few_columns_at_a_time_is_like_one_without(side, width, columns):
    model = tiny()
    tokens, mask = padded(side, width)
    whole = model(tokens, mask)
    cache = moe.KVCache(2)
    pieces = zip(tokens.split(columns, dim=1), mask.split(columns, dim=1))
    parts = [model(new_tokens, new_mask, cache=cache) for new_tokens, new_mask in pieces]
    closely(torch.cat([part.logits for part in parts], dim=1)[mask], whole.logits[mask])
    assert torch.equal(torch.cat([part.routes for part in parts], dim=2), whole.routes)


def test_logits_to_keep_gives_those_of_the_last_columns():
    model = tiny()
    tokens, mask = padded("left", 8)
    whole = model(tokens, mask)
    last = model(tokens, mask, logits_to_keep=3)
    closely(last.logits, whole.logits[:, -3:])
    closely(last.hidden, whole.hidden[:, -3:])
    assert torch.equal(last.routes, whole.routes)


def norm_by_hand(x, norm):
    return x / (x.square().mean() + 1e-6).sqrt() * norm.weight


def rotate_by_hand(x, position):
    """Turn the pairs of neighbours in one head x (4,) by 1 and by 1/100 radian a position."""
    angle = position * torch.tensor([1.0, 0.01])
    left = x[0::2] * angle.cos() - x[1::2] * angle.sin()
    right = x[0::2] * angle.sin() + x[1::2] * angle.cos()
    return torch.stack((left, right), dim=1).flatten()


def test_attention_is_that_of_one_query_and_one_head_at_a_time():
    model = tiny()                                          # 4 query heads, 2 key/value heads
    attention = model.layers[0].attention
    torch.nn.init.normal_(attention.q_norm.weight)
    torch.nn.init.normal_(attention.k_norm.weight)
    x = torch.randn(5, 16)
    causal = torch.ones(1, 1, 5, 5).tril() > 0
    y = attention(x, model.freqs_cis[:5, None], causal, torch.arange(5))
    for t in range(5):
        heads = []
        for h in range(4):
            query = attention.q(x[t]).view(4, 4)[h]
            keys = attention.k(x[:t + 1]).view(t + 1, 2, 4)[:, h // 2]
            values = attention.v(x[:t + 1]).view(t + 1, 2, 4)[:, h // 2]
            query = rotate_by_hand(norm_by_hand(query, attention.q_norm), t)
            keys = [rotate_by_hand(norm_by_hand(keys[i], attention.k_norm), i)
                    for i in range(t + 1)]
            weights = (torch.stack(keys) @ query / 2).softmax(dim=0)        # 2 is sqrt(4)
            heads.append(weights @ values)
        closely(y[t], attention.o(torch.cat(heads)))


@parametrize("replayed", [None, [1, 3, 0], [2, 0, 1]], ids=str)
def test_experts_are_those_of_one_token_at_a_time(replayed):
    experts = tiny(n_active=3).layers[0].experts
    x = torch.randn(20, 16)
    y, routes, _ = experts(x, None if replayed is None else torch.tensor([replayed] * 20))
    for n, logits in enumerate(experts.router(x)):
        active = replayed or logits.argsort(descending=True)[:3].tolist()
        expected = torch.zeros(16)
        for gate, e in zip(logits[active].softmax(0), active):      # over the active ones
            left = experts.gate[e] @ x[n]
            right = experts.up[e] @ x[n]
            expected += gate * (experts.down[e] @ (left * left.sigmoid() * right))
        assert routes[n].tolist() == active
        closely(y[n], expected)


@cases("second, balance", {"even use": ([2, 3], 1), "all use the same": ([0, 1], 2)})
def test_balance_loss_is_1_for_even_use_and_E_over_K_if_all_tokens_use_the_same(second, balance):
    in_padding = [0, 3]
    routes = torch.tensor([[[[0, 1], second, in_padding]]])             # (L, B, T, K): 1, 1, 3, 2
    router_logits = torch.full((1, 1, 3, 4), -inf).scatter(-1, routes, 7.0)
    out = moe.Output(None, None, routes, router_logits)
    assert moe.balance_loss(out, torch.tensor([[True, True, False]])).item() == balance


def test_gradient_through_the_model_by_finite_differences():
    model = tiny().double()
    rollout = sample(model, max_new_tokens=4)
    A = torch.randn(12)
    logp_old = rollout.logp + 0.1 * torch.randn(rollout.logp.shape)
    arguments = (rollout.tokens, rollout.mask, rollout.routes)      # no gradient where routes flip
    names = dict(model.named_parameters())

    def loss(*weights):
        out = torch.func.functional_call(model, dict(zip(names, weights)), arguments)
        log_probs = out.logits[:, -5:-1].log_softmax(dim=-1)
        logp = log_probs.gather(2, rollout.response[..., None])[..., 0]
        return gspo.policy_loss("gspo", logp, logp_old, A, rollout.response_mask, 0.03, 0.04)[0]

    assert torch.autograd.gradcheck(loss, tuple(model.parameters()), fast_mode=True)


# ---------------------------------------------------------------------------- routing replay

def test_replay_takes_the_given_routes_and_the_router_still_learns():
    model = tiny()
    tokens, mask = full()
    free = model(tokens, mask)
    theirs = tiny(seed=1)(tokens, mask).routes
    replayed = model(tokens, mask, theirs)
    assert torch.equal(replayed.routes, theirs)
    assert not torch.allclose(replayed.logits, free.logits, atol=0.1)
    assert torch.equal(model(tokens, mask, free.routes).logits, free.logits)        # bit for bit
    replayed.logits.logsumexp(dim=-1).sum().backward()
    assert all(layer.experts.router.weight.grad.any() for layer in model.layers)


def test_a_router_whose_experts_are_all_active_has_nothing_to_choose():
    model = tiny(n_active=4)
    tokens, mask = full()
    any_order = torch.tensor([2, 0, 3, 1]).expand(2, 3, 8, 4)
    closely(model(tokens, mask, any_order).logits, model(tokens, mask).logits)


def test_a_router_of_one_active_expert_cannot_learn():
    model = tiny(n_active=1)        # its gate is 1, whatever the router says
    model(*full()).logits.logsumexp(dim=-1).sum().backward()
    assert not any(layer.experts.router.weight.grad.any() for layer in model.layers)


def largest_jump(replay, steps=200):
    """Walk from one model towards another -> how many times as large as the usual change of a
    log-prob in a step the largest one is."""
    rollout = sample(tiny().double())
    direction = list(tiny(seed=5).double().parameters())
    model = tiny().double()
    logps = []
    with torch.no_grad():
        for _ in range(steps):
            logps.append(gspo.score(model, rollout, replay=replay).logp)
            for p, towards in zip(model.parameters(), direction):
                p += 0.05 / steps * towards
    changes = torch.stack(logps).diff(dim=0).abs().flatten(1).amax(dim=1)
    return changes.max() / changes.median()


def test_replay_makes_the_log_probs_continuous_in_the_weights():
    assert largest_jump(replay=True) < 3
    assert largest_jump(replay=False) > 20      # where a router changes its mind


@parametrize("kind", ["r2", "r3"])
def test_replay_is_a_no_op_at_equal_weights(kind):
    model = tiny()
    rollout = sample(model)
    scores = gspo.score(model, rollout)
    if kind == "r2":
        rollout, _ = gspo.rescore(model, rollout, Settings(micro_tokens=50))
    else:
        # The sampler does not run the last token of a response, so the record of its experts is
        # arbitrary. No log-prob depends on them, but an expert with other rows may round otherwise.
        rows = torch.arange(len(rollout.tokens))
        last = rollout.tokens.shape[1] - rollout.logp.shape[1] + rollout.lengths - 1
        rollout.routes[:, rows, last] = scores.routes[:, rows, last].to(torch.uint8)
    replayed = gspo.score(model, rollout, replay=True)
    assert torch.equal(replayed.logp, scores.logp)      # bit for bit


def test_routing_metrics_compare_sets_and_count():
    old = torch.tensor([[[0, 1], [2, 3]], [[1, 0], [3, 1]]])            # (L, N, K): 2, 2, 2
    new = torch.tensor([[[1, 0], [1, 3]], [[2, 3], [0, 1]]])
    there = gspo.routing_metrics(old, new, torch.full((2, 2, 4), 7.0))
    back = gspo.routing_metrics(new, old, torch.full((2, 2, 4), 7.0))
    assert there["expert_change"] == back["expert_change"] == [0.25, 0.75]
    assert there["expert_load"] == [2, 1]                   # the busiest expert over the mean one
    assert there["router_entropy"] == approx([log(4)] * 2)


# ---------------------------------------------------------------------------- sampling and scoring

@parametrize("temperature", [1.0, 0.7])
def test_sampled_log_probs_are_those_of_scoring(temperature):
    model = tiny()
    rollout = sample(model, temperature=temperature).select(torch.randperm(12))
    scores = gspo.score(model, rollout, temperature)
    settings = Settings(temperature=temperature, micro_tokens=20)
    again, _ = gspo.rescore(model, rollout, settings)
    for row, n in enumerate(rollout.lengths.tolist()):
        logp, entropy = slow_scores(model, rollout, row, temperature)
        closely(rollout.logp[row, :n], logp)
        closely(scores.logp[row, :n], logp)
        closely(again.logp[row, :n], logp)
        closely(scores.entropy[row, :n], entropy)


@parametrize("E", [4, 256])
def test_sampled_routes_are_those_of_scoring(E):
    model = tiny(n_expert=E)
    rollout = sample(model)
    again, _ = gspo.rescore(model, rollout, Settings())
    goes_on = rollout.mask[:, :-1] & rollout.mask[:, 1:]    # the last token of a row has no routes
    assert torch.equal(rollout.routes[:, :, :-1][:, goes_on], again.routes[:, :, :-1][:, goes_on])
    assert_distinct_experts(rollout.routes, E)


def test_prompts_stand_to_the_left_of_a_line_and_responses_to_the_right():
    rollout = sample(tiny(), group_size=2, max_new_tokens=11, seed=23, eos_id=0, pad_id=11)
    T = rollout.lengths.max()                               # 6: all end before the limit
    assert T < 11
    assert rollout.tokens.shape == (6, 5 + T)
    for row, n in enumerate(rollout.lengths.tolist()):
        prompt = PROMPTS[row // 2]
        left = 5 - len(prompt)
        assert rollout.tokens[row, :5].tolist() == [11] * left + prompt
        real = [False] * left + [True] * (len(prompt) + n) + [False] * (T - n)
        assert rollout.mask[row].tolist() == real
        assert rollout.response_mask[row].tolist() == real[5:]
        assert (rollout.response[row, n:] == 11).all()
    assert not rollout.logp[~rollout.response_mask].any()


def test_a_response_ends_with_the_end_token_or_is_cut():
    rollout = sample(tiny(), group_size=20)
    for response, n in zip(rollout.response.tolist(), rollout.lengths.tolist()):
        assert n == (response.index(END) + 1 if END in response else 6)
    assert len(set(rollout.lengths.tolist())) > 2
    assert (sample(tiny(), eos_id=None).lengths == 6).all()


def test_demonstrations_have_the_same_layout():
    batch = [([3, 10], [7, 9]), ([4, 5, 10], [8, 9]), ([6], [9])]
    tokens, mask, T = demonstrations.collate(batch, 0, "cpu")
    assert tokens.tolist() == [[0, 3, 10, 7, 9], [4, 5, 10, 8, 9], [0, 0, 6, 9, 0]]
    assert torch.equal(mask, tokens > 0)
    assert T == 2


def test_samples_have_the_probabilities_of_the_model():
    model = tiny()
    n = 4000
    p = alone(model, torch.tensor(PROMPTS[0])).logits[0, -1].softmax(dim=-1)
    rollout = sample(model, PROMPTS[:1], group_size=n, max_new_tokens=1)
    share = rollout.response[:, 0].bincount(minlength=12) / n
    assert ((share - p).abs() < 4 * (p * (1 - p) / n).sqrt()).all()


@parametrize("total", [4, 3.9999998, 4.0000005])
def test_a_token_without_probability_is_never_chosen(total):
    luck = torch.tensor([0, 0.25, 0.26, 0.75, 1 - 2 ** -24, 1])
    probs = torch.tensor([1, 0, 2, 1, 0]) / total           # their sum may be off by a rounding
    assert moe.choose(probs.repeat(6, 1), luck).tolist() == [0, 2, 2, 3, 3, 3]


def test_the_same_generator_gives_the_same_rollout():
    one = sample(tiny())
    assert torch.equal(one.logp, sample(tiny()).logp)
    assert not torch.equal(one.logp, sample(tiny(), seed=1).logp)


def test_a_response_depends_on_its_prompt_and_its_luck_alone():
    one = sample(tiny())
    two = sample(tiny(), [[2, 8], [9], PROMPTS[2]])
    for row in range(8, 12):                                # the third prompt's responses
        n = one.lengths[row]
        assert torch.equal(one.tokens[row, :5 + n], two.tokens[row, two.mask[row]])
        closely(one.logp[row, :n], two.logp[row, :n])
        assert torch.equal(one.routes[:, row, :5 + n - 1], two.routes[:, row, :5 + n - 1])


@parametrize("replay", [False, True])
def test_joined_rollouts_keep_the_scores_of_their_rows(replay):
    model = tiny()
    wide = sample(model, max_new_tokens=3).select(torch.tensor([8, 9, 10, 11, 0, 1, 2, 3]))
    long = sample(model, [[2], [3]], max_new_tokens=6, seed=1)
    joined = Rollout.join([wide, long])
    assert joined.tokens.shape == (16, 5 + 6)
    assert_distinct_experts(joined.routes, 4)
    scores = gspo.score(model, joined, replay=replay)
    for row, n in enumerate(joined.lengths.tolist()):
        rollout = wide if row < 8 else long
        logp, _ = slow_scores(model, rollout, row % 8)
        closely(joined.logp[row, :n], logp)
        closely(scores.logp[row, :n], logp)
        assert torch.equal(joined.routes[:, row, joined.mask[row]],
                           rollout.routes[:, row % 8, rollout.mask[row % 8]])


def test_temperature_0_takes_the_likeliest_token_of_the_uncached_model():
    model = tiny()
    rollout = sample(model, group_size=2, temperature=0.0, eos_id=None)
    for row in range(6):
        logits = alone(model, rollout.tokens[row, rollout.mask[row]]).logits[0, -7:-1]
        assert torch.equal(rollout.response[row], logits.argmax(dim=-1))
        closely(rollout.logp[row], slow_scores(model, rollout, row)[0])


# ---------------------------------------------------------------------------- updates

@cases("settings, low, high, scale", {
    "gspo": (Settings(), 3e-3, 4e-3, "std"),
    "grpo, its lower range given": (Settings("grpo", clip_low=0.1), 0.1, 0.27, "std"),
    "dr_grpo": (Settings("dr_grpo"), 0.2, 0.2, "none"),
    "dapo, its scale given": (Settings("dapo", scale="none"), 0.2, 0.28, "none"),
    "sapo": (Settings("sapo"), None, None, "std"),
    "ppo": (Settings("ppo"), 0.2, 0.2, None)})
def test_settings_and_the_loss_fill_in_what_the_table_of_algorithms_has(settings, low, high, scale):
    assert (settings.clip_low, settings.clip_high, settings.scale) == (low, high, scale)
    d, A = random_batch(0)
    left_out = evaluate(settings.algorithm, d, A, low, None)
    assert left_out.loss == evaluate(settings.algorithm, d, A, low, high).loss


REWARDS = torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 1, 1], [0, 1, 1, 1]])


def drifted():
    """The policy a little after it sampled 4 groups, the second of which has no signal."""
    model = tiny()
    rollout = sample(model, PROMPTS + [[2, 2]])
    with torch.no_grad():
        for p in model.parameters():
            p += 0.01 * torch.randn_like(p)
    return model, Experience(rollout, gspo.group_advantages(REWARDS).flatten())


def slow_equation_5(model, experience, rows, low, high):
    terms = []
    for row in rows:
        logp, _ = slow_scores(model, experience.rollout, row)
        logp_old = experience.rollout.logp[row, :len(logp)]
        s = (logp - logp_old).mean().exp()
        A = experience.advantages[row]
        terms.append(torch.minimum(s * A, s.clamp(1 - low, 1 + high) * A))
    return mean(terms)


@cases("mini_batches, rows_of_steps", {
    "one mini-batch": (1, [range(16)]),
    "two": (2, [range(8), range(8, 16)]),
    "four, no step without a signal": (4, [range(4), range(8, 12), range(12, 16)])})
def test_update_is_gradient_ascent_on_equation_5(mini_batches, rows_of_steps):
    model, experience = drifted()
    slow, _ = drifted()
    settings = Settings(clip_low=0.01, clip_high=0.01, mini_batches=mini_batches, max_grad_norm=1e9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    steps = gspo.update(model, optimizer, experience, settings)
    for rows, step in zip(rows_of_steps, steps, strict=True):
        J = slow_equation_5(slow, experience, rows, 0.01, 0.01)
        assert step["loss"] == approx(-J.item(), abs=1e-6)
        gradient = torch.autograd.grad(J, list(slow.parameters()))
        with torch.no_grad():
            for p, g in zip(slow.parameters(), gradient):
                p += 0.1 * g
    assert_close(list(model.parameters()), list(slow.parameters()), atol=1e-6, rtol=1e-5)


def test_first_makes_only_so_many_steps():
    model, experience = drifted()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    steps = gspo.update(model, optimizer, experience, Settings(), first=3)
    assert [step["mini_batch"] for step in steps] == [0, 2]         # 1 has no signal


@parametrize("options", [
    {}, {"routing_replay": "r2"}, {"routing_replay": "r3"}, {"recompute_logp_old": True},
    {"temperature": 0.7}, {"algorithm": "grpo", "clip_low": 1e-3, "clip_high": 1e-3}], ids=str)
def test_the_ratio_is_1_in_the_first_mini_batch_and_drifts_from_then_on(options):
    model = tiny()
    settings = Settings(**options)
    rollout = sample(model, PROMPTS * 4, temperature=settings.temperature)
    experience, _ = gspo.prepare(model, rollout, torch.rand(12, 4), settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    first, *later = gspo.update(model, optimizer, experience, settings)
    assert first["clip_low"] == first["clip_high"] == 0
    assert first["log_w_mean"] == approx(0, abs=1e-6)
    assert first["log_w_std"] < 1e-6
    assert first["expert_change"] == [0, 0]
    assert len(later) == 3
    for step in later:
        assert step["log_s_std"] > 1e-3
        assert step["clip_low"] + step["clip_high"] > 0
        assert any(step["expert_change"]) == (settings.routing_replay == "none")


@parametrize("algorithm", ["gspo", "dapo", "dr_grpo", "ppo"])
def test_micro_tokens_change_no_result_of_an_update(algorithm):
    results = []
    for micro_tokens in (12, 10 ** 9):                      # one row at a time, and all at once
        settings = Settings(algorithm, kl_coef=0.1, micro_tokens=micro_tokens, mini_batches=2)
        model, experience = drifted()
        reference = tiny(seed=1)
        head = torch.nn.Linear(16, 1) if algorithm == "ppo" else None
        experience, _ = gspo.prepare(model, experience.rollout, REWARDS, settings, reference, head)
        parameters = [*model.parameters(), *(head.parameters() if head else ())]
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        results.append((parameters, gspo.update(model, optimizer, experience, settings)))
    (parameters, steps), (parameters_at_once, steps_at_once) = results
    closely(parameters, parameters_at_once)
    for step, step_at_once in zip(steps, steps_at_once, strict=True):
        for name, value in step_at_once.items():
            assert step[name] == approx(value, rel=1e-3, abs=1e-5)


def test_the_kl_term_alone_is_gradient_descent_on_the_kl_to_the_reference():
    model, experience = drifted()
    reference = tiny(seed=1)
    settings = Settings(kl_coef=0.5, mini_batches=1, max_grad_norm=1e9)
    no_signal = torch.ones(4, 4)
    experience, _ = gspo.prepare(model, experience.rollout, no_signal, settings, reference)
    gspo.update(model, torch.optim.SGD(model.parameters(), lr=0.0), experience, settings)
    slow, _ = drifted()
    terms = []
    for row in range(16):
        logp, _ = slow_scores(slow, experience.rollout, row)
        x = (slow_scores(reference, experience.rollout, row)[0] - logp).exp()
        terms.append((x - 1 - x.log()).mean())
    expected = torch.autograd.grad(0.5 * mean(terms), list(slow.parameters()))
    assert_close([p.grad for p in model.parameters()], list(expected), atol=1e-5, rtol=1e-4)


def test_the_critic_of_ppo_learns_what_responses_were_worth():
    model, experience = drifted()
    head = torch.nn.Linear(16, 1)
    for parameter in head.parameters():
        torch.nn.init.zeros_(parameter)                     # it guesses 0
    settings = Settings("ppo", gae_lambda=1.0, mini_batches=1, max_grad_norm=1e9)
    experience, _ = gspo.prepare(model, experience.rollout, REWARDS, settings, head=head)
    optimizer = torch.optim.SGD([*model.parameters(), *head.parameters()], lr=0.0)
    gspo.update(model, optimizer, experience, settings)
    assert head.bias.grad.item() == approx(0.1 * (0 - REWARDS.mean().item()))


def test_a_correction_weighs_tokens_by_how_far_off_the_sampler_was():
    model = tiny()
    rollout = sample(model, PROMPTS + [[2, 2]])
    too_high = replace(rollout, logp=rollout.logp + 0.5)
    experience, _ = gspo.prepare(model, too_high, REWARDS, Settings("grpo", correction="tis"))
    weighed = gspo.group_advantages(REWARDS).flatten()[:, None] * exp(-0.5)
    mask = rollout.response_mask
    closely(experience.advantages[mask], weighed.expand(mask.shape)[mask])
    closely(experience.rollout.logp, rollout.logp)


def step_of(settings):
    """How far one update moves the parameters at a learning rate of 1 -> one vector."""
    model, experience = drifted()
    before = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    gspo.update(model, torch.optim.SGD(model.parameters(), lr=1.0), experience, settings)
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach() - before


def test_a_long_gradient_is_shortened_to_max_grad_norm():
    whole = step_of(Settings(mini_batches=1, max_grad_norm=1e9))
    short = step_of(Settings(mini_batches=1, max_grad_norm=whole.norm().item() / 2))
    closely(short, whole / 2)


def test_dr_grpo_divides_by_the_longest_response_there_can_be():
    once = step_of(Settings("dr_grpo", mini_batches=1, max_grad_norm=1e9, max_new_tokens=10))
    twice = step_of(Settings("dr_grpo", mini_batches=1, max_grad_norm=1e9, max_new_tokens=20))
    closely(once, 2 * twice)


def test_rescoring_under_r3_replays_the_experts_of_the_sampler():
    model, experience = drifted()
    rollout = replace(experience.rollout, routes=experience.rollout.routes.flip(1))
    settings = Settings(routing_replay="r3", recompute_logp_old=True)
    rescored, _ = gspo.prepare(model, rollout, REWARDS, settings)
    assert torch.equal(rescored.rollout.logp, gspo.score(model, rollout, replay=True).logp)
    assert not torch.allclose(rescored.rollout.logp, gspo.score(model, rollout).logp)


def test_gamma_and_lambda_of_the_settings_reach_the_critic():
    rollout = sample(tiny())
    reward = torch.ones(12)
    settings = Settings("ppo", gamma=0.5, gae_lambda=1.0)
    _, critic = gspo.ppo_advantages(rollout, None, 0 * rollout.logp, reward, settings)
    from_the_end = rollout.response_mask.flip(1).cumsum(dim=1).flip(1) - 1
    expected = 0.5 ** from_the_end
    closely(critic.returns[rollout.response_mask], expected[rollout.response_mask])


def test_a_gradient_that_is_not_finite_never_reaches_the_weights():
    model, experience = drifted()
    experience = replace(experience, advantages=experience.advantages * nan)
    with pytest.raises(FloatingPointError):
        gspo.update(model, torch.optim.AdamW(model.parameters()), experience, Settings())
    untouched, _ = drifted()
    assert_close(list(model.parameters()), list(untouched.parameters()), atol=0, rtol=0)


# ---------------------------------------------------------------------------- what is impossible

def forward(width):
    return tiny()(*full(width))


def sample_tiny(**wrong):
    return sample(tiny(), **wrong)


def advantages_of(*rewards, scale="std"):
    return gspo.group_advantages(tensor([rewards]), scale)


def loss_of(algorithm, shape):
    logp = torch.zeros(2, 3)
    return gspo.policy_loss(algorithm, logp, logp, torch.ones(shape), torch.ones(2, 3))


def call_as_text(call):
    return f"{call.func.__name__} {call.args} {call.keywords}"


@parametrize("call", [
    partial(tiny, d_model=30), partial(tiny, n_kv_head=3), partial(tiny, n_active=9),
    partial(tiny, n_expert=257), partial(tiny, n_layer=0),
    partial(sample_tiny, prompts=[]), partial(sample_tiny, prompts=[[1], []]),
    partial(sample_tiny, prompts=[[12]]), partial(sample_tiny, prompts=[[-1]]),
    partial(sample_tiny, group_size=0), partial(sample_tiny, max_new_tokens=0),
    partial(sample_tiny, max_new_tokens=12), partial(sample_tiny, temperature=-1.0),
    partial(forward, 17), partial(advantages_of, 1, inf), partial(advantages_of, 1, nan),
    partial(advantages_of, 1, 0, scale="sd"), partial(loss_of, "unknown", [2]),
    partial(loss_of, "gspo", [2, 3]), partial(loss_of, "luspo", [2, 3]),
    partial(loss_of, "gmpo", [2, 3]), partial(Settings, "unknown"),
    partial(Settings, "sapo", clip_low=0.1),
    partial(Settings, "reinforce", clip_high=0.1), partial(Settings, "ppo", scale="std"),
    partial(Settings, "gspo", correction="tis")], ids=call_as_text)
def test_the_impossible_is_a_value_error(call):
    with pytest.raises(ValueError):
        call()


# ------------------------------------------------------------------------------------ precisions

def test_int3_has_seven_values_a_row_of_which_the_largest_stays():
    matrix = torch.tensor([[3.0, -1.4, 0.4, 1.6], [-0.3, 0.26, 0.0, 0.04]])
    assert_close(moe.rounded(matrix, "int3"),
                 torch.tensor([[3.0, -1.0, 0.0, 2.0], [-0.3, 0.3, 0.0, 0.0]]))


@parametrize("precision, largest_error", [
    ("int8", 1 / 254), ("int4", 1 / 14), ("int3", 1 / 6), ("float8", 1 / 16)])
def test_rounding_moves_no_number_further_than_half_a_level(precision, largest_error):
    torch.manual_seed(0)
    experts = torch.randn(3, 50, 40)                        # a stack of matrices
    moved = (moe.rounded(experts, precision) - experts).abs()
    size = experts.abs()
    if precision != "float8":                               # an integer's levels are equally wide
        size = size.amax(dim=-1, keepdim=True)
    # The smallest numbers of float8 have a fixed distance, 1/448/512 of the largest number.
    assert (moved <= size * largest_error * 1.0001 + experts.abs().max() / 448 / 512).all()
    assert moved.max() > 0
    assert_close(moe.rounded(moe.rounded(experts, precision), precision),
                 moe.rounded(experts, precision))


@parametrize("precision", ["float32", "bfloat16", "float16", "float8", "int8", "int4", "int3"])
def test_a_copy_in_another_precision_leaves_the_model_alone(precision):
    model = tiny()
    before = [p.clone() for p in model.parameters()]
    copy = moe.in_precision(model, precision)
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters()))
    assert copy.freqs_cis.dtype == torch.complex64          # positions stay exact
    assert torch.equal(copy.freqs_cis, model.freqs_cis)
    same = [torch.equal(p, q.float()) for p, q in zip(before, copy.parameters()) if p.dim() > 1]
    assert all(same) == (precision == "float32")
    assert any(same) == (precision == "float32")


@parametrize("dtype, n_tokens, smallest_log", [
    (torch.float16, 58, -17.33), (torch.float32, 347, -103.97)], ids=str)
def test_the_likelihood_of_a_response_vanishes_but_not_its_mean_per_token(
        dtype, n_tokens, smallest_log):
    """Tokens of 0.3 nats. So GSPO works with logs, and divides by the length before exp."""
    log_likelihood = torch.tensor(-0.3 * n_tokens)
    assert log_likelihood < smallest_log < -0.3 * (n_tokens - 1)
    assert log_likelihood.exp().to(dtype) == 0
    assert torch.tensor(smallest_log + 0.01).exp().to(dtype) > 0
    assert (log_likelihood / n_tokens).exp().to(dtype).item() == approx(exp(-0.3), abs=1e-3)


def test_log_probs_in_bfloat16_are_summed_in_fp32_or_they_leave_the_clip_range():
    """For 30 tokens of 0.3 nats in the mean, how often does log s move by more than GSPO's 3e-4?"""
    torch.manual_seed(0)
    logp = -0.3 * torch.empty(100_000, 30).exponential_()
    mask = torch.ones_like(logp, dtype=torch.bool)
    token_by_token = gspo.ratios(logp, logp.bfloat16(), mask).log_s[:, 0].abs() > 3e-4
    of_the_sum = (logp.sum(dim=1) - logp.sum(dim=1).bfloat16()).abs() / 30 > 3e-4
    assert token_by_token.float().mean().item() == approx(0.02, abs=0.01)
    assert of_the_sum.float().mean().item() == approx(0.63, abs=0.02)
