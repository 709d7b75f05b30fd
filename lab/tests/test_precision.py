"""RL in bfloat16 and float16: what is rounded and what is not, and the scale of the loss."""
import random
from pathlib import Path

import pytest
import torch
from torch import nn

import gspo
from lab.extras import precision
from lab.tests.tools import SHORT, gradients, metrics, odd_trainer, sampled

WIDE = {"clip_low": 0.5, "clip_high": 0.5}      # rounded ratios clip nothing


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a, b, dim=0).item()


@pytest.mark.parametrize("dtype, far", [("bfloat16", 0.05), ("float16", 0.01)])
def test_the_gradient_is_that_of_float32_but_for_rounding(dtype, far):
    exact = odd_trainer(**WIDE)
    rollout = sampled(exact)
    gradient, = gradients(exact, rollout)
    rounded, = gradients(odd_trainer(dtype=dtype, **WIDE), rollout)
    assert 0 < (rounded - gradient).norm() < far * gradient.norm()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_products_are_rounded_but_norms_routers_and_sums_stay_in_float32(dtype):
    trainer = odd_trainer(dtype=dtype)
    types = {}

    def look(name):
        def hook(module, inputs, output):
            output = output[0] if isinstance(output, tuple) else output
            types.setdefault(name, output.dtype)
        return hook
    for name, module in trainer.model.named_modules():
        if isinstance(module, (nn.Linear, nn.RMSNorm)) or name in ("layers.0", "layers.1"):
            module.register_forward_hook(look(name))
    rollout, _ = trainer.collect(trainer.model, random.Random(0))
    assert types["layers.0.attention.q"] == types["unembed"] == getattr(torch, dtype)
    for name in ("norm", "layers.0.experts_norm", "layers.0.experts.router", "layers.1",
                 "layers.1.attention.q_norm"):
        assert types[name] == torch.float32, name
    assert rollout.logp_old.dtype == torch.float32
    types.clear()
    assert trainer.score(trainer.model, rollout).logp.dtype == torch.float32
    assert types["unembed"] == getattr(torch, dtype)


def test_the_first_ratios_are_1_up_to_rounding_because_the_sampler_rounds_too():
    trainer = odd_trainer(dtype="bfloat16")
    rollout = sampled(trainer)
    _, learned = trainer.rl_step(1)
    row = trainer.measure(learned)[0]
    assert row["mismatch_mean"] < 2e-2
    exact = gspo.score(trainer.model, rollout).logp
    assert (exact - rollout.logp_old).abs().max() > 1e-4


@pytest.mark.parametrize("algorithm", ["gspo", "ppo"])
def test_the_scale_of_the_loss_changes_neither_gradient_nor_log(algorithm):
    found = []
    for scale in (1.0, 2.0 ** 10):
        trainer = odd_trainer(dtype="float16", algorithm=algorithm)
        trainer.scale = scale
        rollout = sampled(trainer)
        gradient, = gradients(trainer, rollout)
        _, learned = trainer.rl_step(1)
        found.append((gradient, trainer.measure(learned)[0]["loss"]))
    (gradient, loss), (gradient_of_scaled, loss_of_scaled) = found
    assert cosine(gradient, gradient_of_scaled) > 0.999
    assert gradient_of_scaled.norm() == pytest.approx(gradient.norm().item(), rel=0.01)
    assert loss_of_scaled == pytest.approx(loss, abs=1e-4)


def test_a_step_whose_scaled_gradient_overflows_is_skipped_and_the_next_has_half_the_scale():
    trainer = odd_trainer(dtype="float16")
    trainer.scale = 2.0 ** 60
    before = [p.clone() for p in trainer.model.parameters()]
    _, learned = trainer.rl_step(1)
    assert len(learned) == trainer.measured["skipped"] == 2
    assert [x.grad_norm for x in learned] == [0.0, 0.0]
    assert all(torch.equal(p, q) for p, q in zip(before, trainer.model.parameters()))
    assert trainer.scale == 2.0 ** 58


def test_a_scale_below_1_that_still_overflows_is_an_error():
    trainer = odd_trainer(dtype="float16")
    parameters = list(trainer.model.parameters())
    trainer.scale = 4.0
    scales = []
    with pytest.raises(FloatingPointError, match="bfloat16 has a wider range"):
        while True:
            for parameter in parameters:
                parameter.grad = torch.full_like(parameter, torch.inf)
            trainer.optimizer_step(parameters, [trainer.optimizer], 1.0)
            scales.append(trainer.scale)
    assert scales == [2.0, 1.0, 0.5]


def test_after_long_without_an_overflow_the_scale_is_doubled(monkeypatch):
    monkeypatch.setattr(precision, "DOUBLE_AFTER", 3)
    trainer = odd_trainer(dtype="float16")
    scale = trainer.scale
    for step in (1, 2):
        trainer.rl_step(step)
    assert trainer.scale == 2 * scale
    assert trainer.steps_at_scale == 1


def test_a_checkpoint_has_the_scale():
    trainer = odd_trainer(dtype="float16")
    trainer.scale = 8.0
    trainer.steps_at_scale = 3
    other = odd_trainer(dtype="float16")
    other.load_state_dict(trainer.state_dict())
    assert (other.scale, other.steps_at_scale) == (8.0, 3)


def test_the_cold_start_and_the_evaluation_are_in_float32(train):
    for dtype in ("float32", "float16"):
        assert train(*SHORT, "0", "--fresh", "--dtype", dtype, "--out", dtype) == 0
    weights = [torch.load(f"{dtype}/cold_start.pt", weights_only=True)["model"]
               for dtype in ("float32", "float16")]
    for name in weights[0]:
        assert torch.equal(weights[0][name], weights[1][name])
    evaluations = [Path(f"{dtype}/evaluations.csv").read_text() for dtype in ("float32", "float16")]
    assert evaluations[0] == evaluations[1]


def test_a_run_logs_what_it_skipped(train):
    assert train(*SHORT, "1", "--dtype", "float16", "--out", "run") == 0
    assert metrics("run", ["skipped"]) == [["0.0"]]
    assert train(*SHORT, "1", "--out", "other") == 0
    assert metrics("other", ["skipped"]) == [[""]]
