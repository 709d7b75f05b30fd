"""The KL term: exact on average, and its gradient through the model."""
from math import nan

import torch
from pytest import approx
from torch.testing import assert_close

from lab.extras import kl_term
from lab.tests import formulas
from test_gspo import (
    drifted, exactly, mean,
    one_thread_and_one_seed,        # noqa: F401 - a fixture of all tests here
    parametrize, slow_scores, tensor, tiny)


def test_the_kl_term_is_exact_on_average():
    policy = torch.randn(5).double().log_softmax(0)
    reference = torch.randn(5).double().log_softmax(0)
    exact = (policy.exp() * (policy - reference)).sum()
    everything = torch.ones(5, 1) > 0
    # Every token is a response of its own, which weighs as much as it is probable.
    exactly(kl_term.kl_loss(policy[:, None], reference[:, None], everything, policy.exp()), exact)


@parametrize("d, value, slope", [(0.1, 0.0048374180, 0.0951625820),
                                 (-0.1, 0.0051709181, -0.1051709181)])
def test_the_kl_term_of_one_token(d, value, slope):
    logp = tensor([[d - 1, 7]]).requires_grad_()
    reference = tensor([[-1, nan]])
    loss = kl_term.kl_loss(logp, reference, torch.tensor([[True, False]]), tensor([1]))
    loss.backward()
    assert loss.item() == approx(value)
    assert logp.grad.tolist() == [[approx(slope), 0]]


@parametrize("d", [-100.0, 100.0])
def test_a_huge_ratio_leaves_value_and_gradient_finite(d):
    logp = torch.full((1, 2), d, requires_grad=True)        # in float32, exp(100) is infinite
    loss = kl_term.kl_loss(logp, torch.zeros(1, 2), torch.ones(1, 2) > 0, torch.ones(1))
    loss.backward()
    assert loss.isfinite()
    assert logp.grad.isfinite().all()


def away_from_reference():
    """A trainer with the KL term and a reference of other weights, and a rollout."""
    model, rollout = drifted()
    trainer = formulas.trainer(model, kl_coef=0.5)
    trainer.reference = tiny(seed=1)
    return trainer, rollout


def slow_kl(model, rollout):
    """The mean over the responses of the mean over their tokens of k3."""
    reference = tiny(seed=1)
    terms = []
    for row in range(16):
        logp, _ = slow_scores(model, rollout, row)
        x = (slow_scores(reference, rollout, row)[0] - logp).exp()
        terms.append((x - 1 - x.log()).mean())
    return mean(terms)


def gradient_of(trainer, rollout):
    step, = formulas.update(trainer, rollout, lr=0.0)
    return step, [p.grad.clone() for p in trainer.model.parameters()]


def test_the_kl_term_alone_is_gradient_descent_on_the_kl_to_the_reference():
    trainer, rollout = away_from_reference()
    rollout.rewards = torch.ones(16)                        # no signal in any group
    step, gradient = gradient_of(trainer, rollout)
    assert step.loss == 0                           # that of the policy
    model, _ = drifted()
    kl = slow_kl(model, rollout)
    expected = torch.autograd.grad(0.5 * kl, list(model.parameters()))
    assert_close(gradient, list(expected), atol=1e-5, rtol=1e-4)
    assert trainer.measure([step])[0]["kl_ref"] == approx(kl.item(), rel=1e-4)


def test_the_kl_term_is_added_to_the_policy_loss_and_sees_rows_without_a_signal_too():
    trainer, rollout = away_from_reference()
    _, gradient = gradient_of(trainer, rollout)
    model, _ = drifted()
    of_kl = torch.autograd.grad(0.5 * slow_kl(model, rollout), list(model.parameters()))
    _, of_policy = gradient_of(formulas.trainer(model), rollout)
    expected = [one + two for one, two in zip(of_kl, of_policy)]
    assert_close(gradient, expected, atol=1e-5, rtol=1e-4)
