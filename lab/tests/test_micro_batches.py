"""Micro-batches: the same gradient, in parts that bound the memory."""
import random

import pytest
import torch

from lab.tests.tools import gradients, odd_trainer, sampled


@pytest.mark.parametrize("options", [
    {}, {"algorithm": "dapo"}, {"algorithm": "ppo"}, {"kl_coef": 1.0}, {"routing_replay": "r3"},
    {"algorithm": "gspo_token", "correction": "tis", "sampler": "int8"}], ids=str)
def test_the_parts_add_up_to_the_whole(options):
    whole = odd_trainer(**options)
    parts = odd_trainer(micro_tokens=100, **options)
    gradient, = gradients(whole, sampled(whole))
    of_parts, = gradients(parts, sampled(parts))
    torch.testing.assert_close(of_parts, gradient, rtol=1e-4, atol=1e-5 * gradient.norm().item())


def test_the_log_has_the_same_numbers():
    numbers = []
    for micro_tokens in (0, 100):
        trainer = odd_trainer(micro_tokens=micro_tokens, kl_coef=1.0, lr=1e-9)
        _, learned = trainer.rl_step(1)
        numbers.append(trainer.measure(learned))
    for whole, parts in zip(*numbers):
        assert whole.keys() == parts.keys()
        for name in whole:
            assert parts[name] == pytest.approx(whole[name], rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize("options", [
    {}, {"algorithm": "ppo"}, {"recompute_logp_old": True, "kl_coef": 1.0}], ids=str)
def test_no_pass_over_a_rollout_has_more_cells_than_asked_for_or_more_than_a_row(options):
    trainer = odd_trainer(micro_tokens=150, **options)
    rollout, _ = trainer.collect(trainer.model, random.Random(0))
    sizes = []

    def look(module, inputs):
        sizes.append(inputs[0].shape)
    for model in (trainer.model, getattr(trainer, "reference", trainer.model)):
        model.register_forward_pre_hook(look)
    rollout.advantages = trainer.advantages(rollout)
    gradients(trainer, rollout)
    assert len(sizes) > 8
    for rows, columns in sizes:
        assert rows * columns <= 150 or rows == 1
    assert max(rows for rows, _ in sizes) > 1
