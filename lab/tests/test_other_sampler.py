"""Another sampler: rounded weights, old weights, and what low precision does to a ratio."""
from math import exp

import torch
from pytest import approx
from torch.testing import assert_close

import gspo
from lab.extras.other_sampler import in_precision, rounded
from lab.tests import formulas
from test_gspo import (
    inputs_and_output,
    one_thread_and_one_seed,        # noqa: F401 - a fixture of all tests here
    parametrize, tiny)


def test_int3_has_seven_values_a_row_of_which_the_largest_stays():
    matrix = torch.tensor([[3.0, -1.4, 0.4, 1.6], [-0.3, 0.26, 0.0, 0.04]])
    assert_close(rounded(matrix, "int3"),
                 torch.tensor([[3.0, -1.0, 0.0, 2.0], [-0.3, 0.3, 0.0, 0.0]]))


@parametrize("precision, largest_error", [
    ("int8", 1 / 254), ("int4", 1 / 14), ("int3", 1 / 6), ("float8", 1 / 16)])
def test_rounding_moves_no_number_further_than_half_a_level(precision, largest_error):
    experts = torch.randn(3, 50, 40)                        # a stack of matrices
    moved = (rounded(experts, precision) - experts).abs()
    size = experts.abs()
    if precision != "float8":                               # an integer's levels are equally wide
        size = size.amax(dim=-1, keepdim=True)
    # The smallest numbers of float8 have a fixed distance, 1/448/512 of the largest number.
    assert (moved <= size * largest_error * 1.0001 + experts.abs().max() / 448 / 512).all()
    assert moved.max() > 0


@parametrize("precision", ["int8", "int4", "int3", "float8"])
def test_what_is_rounded_already_stays(precision):
    once = rounded(torch.randn(3, 50, 40), precision)
    assert_close(rounded(once, precision), once)


@parametrize("precision", ["float32", "bfloat16", "float16", "float8", "int8", "int4", "int3"])
def test_a_copy_in_another_precision_leaves_the_model_alone(precision):
    model = tiny()
    before = [p.clone() for p in model.parameters()]
    copy = in_precision(model, precision)
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters()))
    same = [torch.equal(p, q.float()) for p, q in zip(before, copy.parameters()) if p.dim() > 1]
    assert all(same) == (precision == "float32")
    assert any(same) == (precision == "float32")


@parametrize("precision", ["float32", "bfloat16", "float16", "int3"])
def test_positions_stay_exact_in_another_precision(precision):
    turns = []
    for model in (tiny(), in_precision(tiny(), precision)):
        inputs, _ = inputs_and_output(model.layers[0].attention, model, torch.tensor([3, 1, 4, 1]))
        turns.append(inputs[1])
    assert turns[1].dtype == torch.complex64
    assert torch.equal(turns[0], turns[1])


@parametrize("lag, expected", [(0, [0, 1, 2, 3, 4]), (1, [0, 0, 1, 2, 3]), (3, [0, 0, 0, 0, 1])])
def test_the_sampler_has_the_weights_of_so_many_rollouts_ago(lag, expected):
    trainer = formulas.trainer(sampler="float32", lag=lag)
    weight = trainer.model.embed.weight
    seen = []
    for update in range(5):
        torch.nn.init.constant_(weight, update)
        sampler = trainer.collect(trainer.model, None)
        assert (weight == update).all()                     # the trainer's own stay
        torch.nn.init.constant_(weight, 99)                 # and an update does not reach a sampler
        seen.append(sampler.embed.weight.mean().item())
    assert seen == expected


@parametrize("lag", [0, 2])
def test_the_sampler_is_rounded(lag):
    trainer = formulas.trainer(sampler="int4", lag=lag)
    sampler = trainer.collect(trainer.model, None)
    expected = in_precision(trainer.model, "int4")
    assert_close(list(sampler.parameters()), list(expected.parameters()), atol=0, rtol=0)


@parametrize("algorithm", ["gspo", "gspo_token", "grpo"])
@parametrize("logp, dtype", [(-600.0, torch.float32), (-0.02, torch.bfloat16)], ids=str)
def test_ratios_near_1_survive_coarse_log_probs(algorithm, logp, dtype):
    old = torch.full((1, 4), logp, dtype=dtype)
    new = old.clone()
    new[0, 0] = new[0, 0].nextafter(torch.zeros((), dtype=dtype))       # the smallest step up
    d = (new.double() - old.double()).mean().item()
    loss, _ = gspo.policy_loss(algorithm, new, old, torch.ones(1), torch.ones(1, 4))
    assert 1e-5 < d < 3e-4
    assert loss.item() == approx(-exp(d), abs=1e-7)


@parametrize("dtype, n_tokens, smallest_log", [
    (torch.float16, 58, -17.33), (torch.float32, 347, -103.97)], ids=str)
def test_the_likelihood_of_a_response_vanishes_but_not_its_mean_per_token(
        dtype, n_tokens, smallest_log):
    """Tokens of 0.3 nats. So GSPO works with logs, and divides by the length before exp."""
    log_likelihood = torch.tensor(-0.3 * n_tokens)
    assert log_likelihood < smallest_log < -0.3 * (n_tokens - 1)
    assert log_likelihood.exp().to(dtype) == 0
    assert torch.tensor(smallest_log + 0.01).exp().to(dtype) > 0
    everything = torch.ones(1, n_tokens) > 0
    now = torch.full((1, n_tokens), -0.3)
    log_s = gspo.log_ratios(now, torch.zeros(1, n_tokens), everything).log_s[0, 0]
    assert log_s.exp().to(dtype).item() == approx(exp(-0.3), abs=1e-3)


def test_log_probs_in_bfloat16_are_summed_in_fp32_or_they_leave_the_clip_range():
    """For 30 tokens of 0.3 nats in the mean, how often does log s move by more than GSPO's 3e-4?"""
    logp = -0.3 * torch.empty(100_000, 30).exponential_()
    mask = torch.ones_like(logp, dtype=torch.bool)
    token_by_token = gspo.log_ratios(logp, logp.bfloat16(), mask).log_s[:, 0].abs() > 3e-4
    of_the_sum = (logp.sum(dim=1) - logp.sum(dim=1).bfloat16()).abs() / 30 > 3e-4
    assert token_by_token.float().mean().item() == approx(0.02, abs=0.01)
    assert of_the_sum.float().mean().item() == approx(0.63, abs=0.02)
