"""The objectives of gspo.py and of lab/extras/ against the code of TRL and of verl themselves, in
value and gradient.

    pip install -r lab/requirements.txt; python -m pytest lab/tests/test_peers.py

The tests skip a peer that is not installed. They call both, and copy neither: TRL's _compute_loss
on a stand-in for its trainer, verl's core_algos.py as it is. The batches are random, padded and in
float64, with clipping on both sides. All agree to nine digits with TRL 1.16.0 and verl 0.9.1."""
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

import gspo
from lab.extras import critic, kl_term, relatives

B = 32
T = 10
LOW = 0.05
HIGH = 0.08
seeds = pytest.mark.parametrize("seed", range(5))


@pytest.fixture
def batch(seed):
    generator = torch.Generator().manual_seed(seed)

    def randn():
        return torch.randn(B, T, generator=generator, dtype=torch.float64)

    def with_garbage(x):
        """x with other numbers in padding; finite ones, as the peers multiply with the mask."""
        return torch.where(mask, x, 5 * randn())

    lengths = torch.randint(1, T, (B,), generator=generator)    # the last column is all padding
    mask = torch.arange(T) < lengths[:, None]
    logp_old = randn() - 1
    logp = logp_old + 0.1 * (1 + seed) * randn()
    logp_ref = logp_old + 0.1 * (1 + seed) * randn()
    A = randn()
    A[0] = 0
    return SimpleNamespace(
        lengths=lengths, mask=mask, A=A, logp=with_garbage(logp).requires_grad_(),
        logp_old=with_garbage(logp_old), logp_ref=with_garbage(logp_ref),
        mean_weights=gspo.mean_of_means(lengths.double()))


def our_loss(algorithm, batch, A, low, high):
    if algorithm == "dr_grpo":
        A = A / T               # by the longest length, which is relatives.Extra's part
    loss, clipped = gspo.policy_loss(algorithm, batch.logp, batch.logp_old, A, batch.mask, low,
                                     high)
    if algorithm not in ("sapo", "reinforce"):
        # Without clipping, on both sides and not everywhere, the comparison would say little.
        A = A.view(B, -1)
        assert (clipped & (A > 0)).any()
        assert (clipped & (A < 0)).any()
        assert (clipped != batch.mask).any()
    return loss


def agree(ours, theirs, x):
    """Equal losses, and equal gradients with respect to x; padding, where it is 0, included."""
    assert_close(ours, theirs, rtol=1e-9, atol=0)
    our_gradient = torch.autograd.grad(ours, x, retain_graph=True)[0]
    their_gradient = torch.autograd.grad(theirs, x, retain_graph=True)[0]
    largest = their_gradient.abs().max().item()
    assert_close(our_gradient, their_gradient, rtol=0, atol=1e-9 * largest)


@pytest.mark.parametrize("seed", [0])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32, torch.float64])
@pytest.mark.parametrize("algorithm", gspo.ALGORITHMS)
def test_a_mask_of_any_dtype_means_the_same(batch, algorithm, dtype):
    """TRL and verl have masks of integers and of floats."""
    A = batch.A[:, 0]
    loss, clipped = gspo.policy_loss(algorithm, batch.logp, batch.logp_old, A, batch.mask)
    loss_of_dtype, clipped_of_dtype = gspo.policy_loss(
        algorithm, batch.logp, batch.logp_old, A, batch.mask.to(dtype))
    agree(loss_of_dtype, loss, batch.logp)
    assert (clipped_of_dtype == clipped).all()


# ---------------------------------------------------------------------------- TRL

@pytest.fixture
def float64_by_default():
    """TRL makes a tensor of SAPO's 1.05, which would round it to fp32."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Accelerator:
    num_processes = 1

    def gather(self, x):
        return x

    def reduce(self, x, **_):
        return x


def trl_loss(loss_type, level, batch, A, low, high, beta=0.0):
    """TRL's own method, given all that it reads of a trainer, and log-probs in place of a model."""
    trl = pytest.importorskip("trl")
    Trainer = trl.GRPOTrainer
    if loss_type == "gmpo":
        Trainer = pytest.importorskip("trl.experimental.gmpo").GMPOTrainer

    class Args(trl.GRPOConfig):
        """Its defaults, but for multiplying the KL with the ratio, which ours does not."""
        steps_per_generation = 1
        use_bias_correction_kl = False

    def log_probs(*_, **__):
        """Log-probs, entropies and an auxiliary loss."""
        return batch.logp, torch.zeros_like(batch.logp), None

    trainer = SimpleNamespace(
        loss_type=loss_type, importance_sampling_level=level, epsilon_low=low, epsilon_high=high,
        beta=beta, args=Args, max_completion_length=T, top_entropy_quantile=1.0, use_vllm=False,
        off_policy_mask_threshold=None, aux_loss_enabled=False, _entropy_bonus_enabled=False,
        current_gradient_accumulation_steps=1, model=SimpleNamespace(training=True),
        accelerator=Accelerator(), _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=log_probs)
    mask = batch.mask.long()
    empty = torch.zeros(B, 0, dtype=torch.long)
    return Trainer._compute_loss(trainer, None, {
        "prompt_ids": empty, "prompt_mask": empty, "completion_ids": mask, "completion_mask": mask,
        "advantages": A, "old_per_token_logps": batch.logp_old,
        "ref_per_token_logps": batch.logp_ref, "num_items_in_batch": mask.sum()})


@seeds
@pytest.mark.parametrize("algorithm, loss_type, level", [
    ("gspo", "grpo", "sequence"),
    ("gspo_token", "grpo", "sequence"),     # with one advantage per response; TRL has no other
    ("grpo", "grpo", "token"),
    ("ppo", "grpo", "token"),               # the loss alone: TRL 1.16 has no trainer with a critic
    ("dr_grpo", "dr_grpo", "token"),
    ("dapo", "dapo", "token"),
    ("cispo", "cispo", "token"),
    ("gmpo", "gmpo", None),
    ("sapo", "sapo", "token"),
    ("luspo", "luspo", "sequence"),
])
def test_trl(batch, float64_by_default, algorithm, loss_type, level):
    A = batch.A if algorithm == "ppo" else batch.A[:, 0]
    low = LOW
    their_high = HIGH
    if algorithm == "cispo":
        # TRL has no lower bound, and its epsilon_high is the upper one, not its distance from 1.
        low = 1.0
        their_high = 1 + HIGH
    ours = our_loss(algorithm, batch, A, low, HIGH)
    agree(ours, trl_loss(loss_type, level, batch, A, low, their_high), batch.logp)
    # TRL adds up the KL as it does the loss, which has these weights for some.
    if gspo.ALGORITHMS[algorithm].token_weights is gspo.mean_of_means:
        kl = kl_term.kl_loss(batch.logp, batch.logp_ref, batch.mask, batch.mean_weights)
        theirs = trl_loss(loss_type, level, batch, A, low, their_high, beta=0.5)
        agree(ours + 0.5 * kl, theirs, batch.logp)


# ---------------------------------------------------------------------------- verl

# The masks are of integers, as verl's own: floats of float64 would show the 1e-8 that it adds to
# lengths.

@pytest.fixture
def verl():
    return pytest.importorskip("verl.trainer.ppo.core_algos")


@seeds
@pytest.mark.parametrize("algorithm, loss_mode, aggregation", [
    ("gspo", "gspo", "seq-mean-token-mean"),
    ("gspo_token", "gspo", "seq-mean-token-mean"),
    ("grpo", "vanilla", "seq-mean-token-mean"),
    ("ppo", "vanilla", "seq-mean-token-mean"),
    ("dr_grpo", "vanilla", "seq-mean-token-sum-norm"),
    ("dapo", "vanilla", "token-mean"),
    ("cispo", "cispo", "token-mean"),
    ("gmpo", "geo_mean", None),             # this and the next have an aggregation of their own
    ("sapo", "sapo", None),
    ("luspo", "gspo", "seq-mean-token-sum"),
    ("reinforce", "gpg", "seq-mean-token-mean"),
])
def test_verl(batch, verl, algorithm, loss_mode, aggregation):
    # verl has advantages per token; all but these two are compared with equal ones in a response.
    per_token = algorithm in ("ppo", "gspo_token")
    their_A = batch.A if per_token else batch.A[:, :1].expand(B, T)
    our_A = batch.A if per_token else batch.A[:, 0]
    config = pytest.importorskip("verl.workers.config").ActorConfig(
        strategy="fsdp", rollout_n=1, use_dynamic_bsz=True, clip_ratio_low=LOW,
        clip_ratio_high=HIGH, clip_ratio_c=1e9)             # no dual clip: ours has none
    theirs, _ = verl.get_policy_loss_fn(loss_mode)(
        batch.logp_old, batch.logp, their_A, batch.mask.long(), aggregation, config)
    agree(our_loss(algorithm, batch, our_A, LOW, HIGH), theirs, batch.logp)


@seeds
def test_verl_kl(batch, verl):
    kl = verl.kl_penalty(batch.logp, batch.logp_ref, "low_var_kl")
    theirs = verl.agg_loss(kl, batch.mask.long(), "seq-mean-token-mean")
    ours = kl_term.kl_loss(batch.logp, batch.logp_ref, batch.mask, batch.mean_weights)
    agree(ours, theirs, batch.logp)


@seeds
def test_verl_value_loss(batch, verl):
    values = batch.logp                     # any numbers do
    values_old = batch.logp_old
    returns = batch.A
    moved = (values - values_old).abs()
    assert (moved > critic.VALUE_CLIP)[batch.mask].any()
    theirs, _ = verl.compute_value_loss(values, returns, values_old, batch.mask.long(),
                                        critic.VALUE_CLIP, "seq-mean-token-mean")
    ours = critic.value_loss(values, values_old, returns, batch.mask, batch.mean_weights)
    agree(ours, theirs, values)


@seeds
@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.8)])
def test_verl_gae(batch, verl, gamma, lam):
    mask = batch.mask
    values = batch.logp_ref                 # any numbers do
    rewards = batch.A[:, 0]
    at_end = torch.zeros_like(values)
    at_end[torch.arange(B), batch.lengths - 1] = rewards
    their_advantages, their_returns = verl.compute_gae_advantage_return(
        at_end, values, mask.long(), gamma, lam)
    rollout = SimpleNamespace(lengths=batch.lengths, response_mask=mask, rewards=rewards)

    class Critic(critic.Extra):
        """One without a model, that has these values."""
        config = SimpleNamespace(gamma=gamma, gae_lambda=lam, routing_replay="none")
        model = None

        def __init__(self):
            self.measured = {}

        def score(self, *_):
            return None

        def values(self, scores):
            return values
    advantages = Critic().advantages(rollout)
    assert_close(rollout.returns[mask], their_returns[mask], rtol=1e-9, atol=1e-12)
    # verl adds 1e-8 to the square of the deviation and rounds n / (n - 1) of n tokens to fp32.
    assert_close(advantages[mask], their_advantages[mask], rtol=1e-6, atol=0)


@pytest.mark.parametrize("scale", ["std", "none"])
def test_verl_group_advantages(verl, scale):
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randint(4, (5, 8), generator=generator).double()        # (P, G)
    rewards[2] = 1                          # a group that says nothing
    group_of_response = torch.arange(5).repeat_interleave(8).numpy()
    theirs, _ = verl.compute_grpo_outcome_advantage(
        rewards.view(40, 1), torch.ones(40, 1), group_of_response,
        epsilon=1e-30,                      # ours has none
        norm_adv_by_std_in_grpo=scale == "std")
    ours = gspo.group_advantages(rewards).flatten()
    if scale == "none":
        trainer = SimpleNamespace(config=SimpleNamespace(scale="none", group_size=8))
        rollout = SimpleNamespace(rewards=rewards.flatten())
        ours = relatives.Extra.advantages(trainer, rollout)
    assert_close(ours, theirs[:, 0], rtol=1e-9, atol=1e-12)
