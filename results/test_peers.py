"""The objectives of gspo.py against the code of TRL and of verl themselves, in value and gradient.

    pip install trl verl; python -m pytest results/test_peers.py

A peer that is not installed is skipped. Both are called, not copied: TRL's _compute_loss on a
stand-in for the trainer, verl's core_algos.py as it is. Random padded batches in float64, with
clipping on both sides; they agree to nine digits with TRL 1.16.0 and verl 0.9.1."""
from collections import defaultdict
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

import gspo

B, T, LOW, HIGH = 32, 10, 0.05, 0.08
seeds = pytest.mark.parametrize("seed", range(5))

@pytest.fixture
def batch(seed):
    draw = torch.Generator().manual_seed(seed)
    randn = partial(torch.randn, B, T, generator=draw, dtype=torch.float64)
    lengths = torch.randint(1, T, (B,), generator=draw)     # one column at least is all padding
    mask = torch.arange(T) < lengths[:, None]
    garbage = lambda x: torch.where(mask, x, 5 * randn())   # finite: the peers multiply by the mask
    old, A = randn() - 1, randn()
    new, ref = (garbage(old + 0.1 * (1 + seed) * randn()) for _ in range(2))
    A[0] = 0
    return SimpleNamespace(lengths=lengths, mask=mask, logp=new.requires_grad_(), ref=ref, A=A,
                           logp_old=garbage(old), even=1 / (B * lengths.double()))

def ours(algorithm, batch, A, *clip):
    loss, clipped = gspo.policy_loss(algorithm, batch.logp, batch.logp_old, A, batch.mask, *clip)
    if algorithm not in ("sapo", "reinforce"):              # else the comparison would say little
        A = A if A.dim() == 2 else A[:, None]
        assert (clipped & (A > 0)).any() and (clipped & (A < 0)).any()
        assert (clipped != batch.mask).any()
    return loss

def agree(ours, peers, x):
    """Equal losses, and equal gradients with respect to x; padding, where it is 0, included."""
    assert_close(ours, peers, rtol=1e-9, atol=0)
    ours, peers = (torch.autograd.grad(loss, x, retain_graph=True)[0] for loss in (ours, peers))
    assert_close(ours, peers, rtol=0, atol=1e-9 * peers.abs().max().item())

# ---------------------------------------------------------------------------- TRL

def trl_loss(loss_type, level, batch, A, low, high, beta=0.0):
    """The real method, given all that it reads of a trainer, and log-probs in place of a model."""
    trl, same = pytest.importorskip("trl"), lambda x, **_: x
    Trainer = (pytest.importorskip("trl.experimental.gmpo").GMPOTrainer if loss_type == "gmpo"
               else trl.GRPOTrainer)
    mask, empty = batch.mask.long(), torch.zeros(B, 0, dtype=torch.long)
    # The defaults, but for TRL's multiplying the KL by the ratio, which ours does not.
    args = type("Args", (trl.GRPOConfig,), dict(steps_per_generation=1,
                                                use_bias_correction_kl=False))
    trainer = SimpleNamespace(
        loss_type=loss_type, importance_sampling_level=level, epsilon_low=low, epsilon_high=high,
        beta=beta, args=args, max_completion_length=T, top_entropy_quantile=1.0, use_vllm=False,
        off_policy_mask_threshold=None, aux_loss_enabled=False, _entropy_bonus_enabled=False,
        current_gradient_accumulation_steps=1, model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(num_processes=1, gather=same, reduce=same),
        _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (batch.logp, 0 * batch.logp, None))
    return Trainer._compute_loss(trainer, None, dict(
        prompt_ids=empty, prompt_mask=empty, completion_ids=mask, completion_mask=mask,
        advantages=A, old_per_token_logps=batch.logp_old, ref_per_token_logps=batch.ref,
        num_items_in_batch=mask.sum()))

@seeds
@pytest.mark.parametrize("algorithm, loss_type, level", [
    ("gspo_token", "grpo", "sequence"),     # equal for one advantage per response; TRL has no other
    ("ppo", "grpo", "token"),               # the loss alone: TRL 1.16 has no trainer with a critic
    ("gspo", "grpo", "sequence"), ("grpo", "grpo", "token"), ("dr_grpo", "dr_grpo", "token"),
    ("dapo", "dapo", "token"), ("cispo", "cispo", "token"), ("sapo", "sapo", "token"),
    ("luspo", "luspo", "sequence"), ("gmpo", "gmpo", None)])
def test_trl(batch, monkeypatch, algorithm, loss_type, level):
    A = batch.A if algorithm == "ppo" else batch.A[:, 0]
    # CISPO: TRL's epsilon_high is the bound itself, not its distance from 1; there is no lower one.
    low, high = (1.0, 1 + HIGH) if algorithm == "cispo" else (LOW, HIGH)
    # SAPO: TRL rounds 1.05 to fp32, whatever the log-probs are.
    monkeypatch.setattr(gspo, "SAPO_TAU", torch.tensor(gspo.SAPO_TAU).tolist())
    theirs = partial(trl_loss, loss_type, level, batch, A, low, high)
    loss = ours(algorithm, batch, A, low, HIGH)
    agree(loss, theirs(), batch.logp)
    # TRL adds up the KL as it does the loss, gspo.update as a mean of means: equal for these.
    if gspo.ALGORITHMS[algorithm].weight is gspo.seq_mean_token_mean:
        kl = gspo.kl_loss(batch.logp, batch.ref, batch.mask, batch.even)
        agree(loss + 0.5 * kl, theirs(beta=0.5), batch.logp)

# ---------------------------------------------------------------------------- verl

# Masks of integers, as verl's own: those of float64 would show the 1e-8 that it adds to lengths.

@pytest.fixture
def verl():
    return pytest.importorskip("verl.trainer.ppo.core_algos")

@seeds
@pytest.mark.parametrize("algorithm, loss_mode, aggregation", [
    ("gspo", "gspo", "seq-mean-token-mean"), ("gspo_token", "gspo", "seq-mean-token-mean"),
    ("grpo", "vanilla", "seq-mean-token-mean"), ("ppo", "vanilla", "seq-mean-token-mean"),
    ("dr_grpo", "vanilla", "seq-mean-token-sum-norm"), ("dapo", "vanilla", "token-mean"),
    ("cispo", "cispo", "token-mean"), ("luspo", "gspo", "seq-mean-token-sum"),
    ("reinforce", "gpg", "seq-mean-token-mean"),
    ("gmpo", "geo_mean", None), ("sapo", "sapo", None)])    # they have an aggregation of their own
def test_verl(batch, verl, algorithm, loss_mode, aggregation):
    per_token = algorithm in ("ppo", "gspo_token")          # the others' are equal along a response
    A = batch.A if per_token else batch.A[:, :1].expand(B, T)
    config = pytest.importorskip("verl.workers.config").ActorConfig(
        strategy="fsdp", rollout_n=1, use_dynamic_bsz=True, clip_ratio_low=LOW,
        clip_ratio_high=HIGH, clip_ratio_c=1e9)             # no dual clip, which ours does not have
    theirs, _ = verl.get_policy_loss_fn(loss_mode)(
        batch.logp_old, batch.logp, A, batch.mask.long(), aggregation, config)
    agree(ours(algorithm, batch, A if per_token else A[:, 0], LOW, HIGH), theirs, batch.logp)

@seeds
def test_verl_kl_and_value_loss(batch, verl):
    theirs = verl.agg_loss(verl.kl_penalty(batch.logp, batch.ref, "low_var_kl"),
                           batch.mask.long(), "seq-mean-token-mean")
    agree(gspo.kl_loss(batch.logp, batch.ref, batch.mask, batch.even), theirs, batch.logp)
    new, old, returns = batch.logp, batch.logp_old, batch.A         # any numbers do for values
    assert ((new - old).abs() > gspo.VALUE_CLIP)[batch.mask].any()
    theirs, _ = verl.compute_value_loss(new, returns, old, batch.mask.long(), gspo.VALUE_CLIP,
                                        "seq-mean-token-mean")
    agree(gspo.value_loss(new, old, returns, batch.mask, batch.even), theirs, new)

@seeds
@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.8)])
def test_verl_gae(batch, verl, gamma, lam):
    values, mask, rewards = batch.ref * batch.mask, batch.mask, batch.A[:, 0]
    at_end = torch.zeros_like(values)
    at_end[range(B), batch.lengths - 1] = rewards
    theirs, returns = verl.compute_gae_advantage_return(at_end, batch.ref, mask.long(), gamma, lam)
    advantages, critic = gspo.ppo_advantages(batch, None, values, rewards, gamma, lam)
    for x in critic.returns, gspo.gae(at_end, values, gamma, lam) + values:
        assert_close(x[mask], returns[mask], rtol=1e-9, atol=1e-12)
    # verl adds 1e-8 to the square of the deviation and rounds n / (n - 1) of n tokens to fp32.
    assert_close(advantages[mask], theirs[mask], rtol=1e-6, atol=0)

@pytest.mark.parametrize("scale", ["std", "none"])
def test_verl_group_advantages(verl, scale):
    rewards = torch.randint(4, (5, 8), generator=torch.Generator().manual_seed(0)).double()
    rewards[2] = 1                                          # a group that says nothing
    theirs, _ = verl.compute_grpo_outcome_advantage(        # ours has no epsilon
        rewards.view(40, 1), torch.ones(40, 1), torch.arange(40).numpy() // 8, epsilon=1e-30,
        norm_adv_by_std_in_grpo=scale == "std")
    assert_close(gspo.group_advantages(rewards, scale), theirs.view(5, 8), rtol=1e-9, atol=1e-12)
