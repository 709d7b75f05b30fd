"""Scoring again before the update: weights against the sampler's mismatch, and routing replay."""
from math import exp

import pytest
import torch

import gspo
from lab.extras import rescoring
from lab.tests import formulas
from test_gspo import (
    PROMPTS, REWARDS, closely, drifted, exactly,
    one_thread_and_one_seed,        # noqa: F401 - a fixture of all tests here
    parametrize, sample, tensor, tiny)


@parametrize("kind, expected", [("tis", [0.1, 0.6, 1, 2, 2]), ("icepop", [0, 0.6, 1, 3, 0])])
def test_weights_of_tokens_that_the_sampler_saw_otherwise(kind, expected):
    ratio = tensor([[0.1, 0.6, 1, 3, 9]])
    weights = rescoring.mismatch_weights(kind, ratio.log() - 2, torch.full((1, 5), -2.0))
    exactly(weights, tensor([expected]))


@parametrize("kind, weight", [("tis", exp(-0.5)), ("icepop", exp(-0.5)), ("none", 1)])
def test_a_correction_weighs_tokens_by_how_far_off_the_sampler_was(kind, weight):
    model = tiny()
    rollout = sample(model, PROMPTS + [[2, 2]])
    rollout.rewards = REWARDS.flatten()
    true = rollout.logp_old
    rollout.logp_old = true + 0.5                           # the sampler thought them likelier
    options = {"algorithm": "grpo", "correction": kind, "recompute_logp_old": True}
    advantages = formulas.trainer(model, **options).advantages(rollout)
    mask = rollout.response_mask
    expected = weight * gspo.group_advantages(REWARDS).flatten()[:, None]
    closely(advantages.view(16, -1).expand_as(mask)[mask], expected.expand_as(mask)[mask])
    closely(rollout.logp_old, true)


@parametrize("options", [
    {"recompute_logp_old": True}, {"routing_replay": "r2"},
    {"recompute_logp_old": True, "routing_replay": "r3"}], ids=str)
def test_ratios_start_at_1_though_the_model_has_moved_since_it_sampled(options):
    model, rollout = drifted()
    trainer = formulas.trainer(model, **options)
    step, = formulas.update(trainer, rollout, lr=0.0)
    closely(step.scores.logp, step.batch.logp_old)
    assert not step.clipped.any()


def test_without_rescoring_they_do_not():
    model, rollout = drifted()
    step, = formulas.update(formulas.trainer(model), rollout, lr=0.0)
    assert (step.scores.logp - step.batch.logp_old).abs().max() > 1e-3


def test_rescoring_under_r3_replays_the_experts_of_the_sampler():
    model, rollout = drifted()
    rollout.routes = rollout.routes.flip(0)                 # not what this router would choose
    expected = gspo.score(model, rollout, replay=True).logp
    own_choice = gspo.score(model, rollout).logp
    trainer = formulas.trainer(model, routing_replay="r3", recompute_logp_old=True)
    trainer.advantages(rollout)
    assert torch.equal(rollout.logp_old, expected)
    assert not torch.allclose(rollout.logp_old, own_choice)


def test_r2_replays_the_experts_of_the_trainers_pass():
    model, rollout = drifted()
    rollout.routes = rollout.routes.flip(0)
    scores = gspo.score(model, rollout)
    formulas.trainer(model, routing_replay="r2").advantages(rollout)
    assert torch.equal(rollout.routes, scores.routes)
    assert torch.equal(gspo.score(model, rollout, replay=True).logp, scores.logp)   # bit for bit


@parametrize("routing_replay", ["none", "r2", "r3"])
def test_with_replay_no_expert_changes_during_an_update(routing_replay):
    model = tiny()
    rollout = sample(model, PROMPTS * 4)
    rollout.rewards = torch.rand(48)
    trainer = formulas.trainer(model, mini_batches=4, routing_replay=routing_replay)
    first, *later = formulas.update(trainer, rollout, lr=0.3)
    change = [max(row["expert_change"]) for row in trainer.measure([first, *later])]
    assert change[0] == 0
    assert [x > 0 for x in change[1:]] == [routing_replay == "none"] * 3


def largest_jump(replay, steps=200):
    """Walk from one model towards another -> how many times as large as the usual change of a
    log-prob in a step the largest one is."""
    model = tiny().double()
    rollout = sample(model)
    direction = list(tiny(seed=5).double().parameters())
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


def test_weights_of_tokens_are_refused_where_a_response_is_weighed_as_a_whole():
    for algorithm in ("gspo", "luspo", "gmpo"):
        with pytest.raises(ValueError):
            formulas.trainer(algorithm=algorithm, correction="tis")
