"""The extras beside each other: every two that can be combined make the gradient that is written
out below, response by response and token by token; or they are refused."""
import copy
import itertools
import random
from typing import NamedTuple

import pytest
import torch

import gspo
import train
from lab import extras
from lab.extras.other_sampler import in_precision
from lab.tests.tools import gradients, nudge, odd_trainer

SMALL = {"prompts": 4, "group_size": 3, "max_new_tokens": 12, "clip_low": 0.05, "clip_high": 0.05}
WIDE = {"clip_low": 0.5, "clip_high": 0.5}      # rounding moves no ratio out of this range
OPTIONS = [
    {"kl_coef": 1.0},
    {"dtype": "bfloat16"} | WIDE,
    {"dtype": "float16"} | WIDE,
    {"micro_tokens": 40},
    {"recompute_logp_old": True},
    {"correction": "tis", "algorithm": "gspo_token"},
    {"correction": "icepop", "algorithm": "grpo"},
    {"routing_replay": "r2"},
    {"routing_replay": "r3"},
    {"overlong": 8},
    {"dynamic_sampling": True, "sampling_rounds": 99},
    {"sampler": "int4"},
    {"lag": 1},
    {"algorithm": "ppo"},
    {"algorithm": "dapo"},
    {"algorithm": "dr_grpo"},
    {"scale": "none"},
]
REFUSED = [{"algorithm": "ppo", "scale": "none"}]
ROUNDING = {"float32": 1e-4, "float16": 0.02, "bfloat16": 0.15}


def pairs():
    """All that can be given together, one option by itself included."""
    for a, b in itertools.combinations_with_replacement(OPTIONS, 2):
        same = (a.keys() & b.keys()) - WIDE.keys()
        both = a | b
        if a is not b and same and not (same == {"algorithm"} and "correction" in a):
            continue            # two values of one flag
        if both not in REFUSED:
            yield both


def text(options):
    return " ".join(f"{name}={value}" for name, value in options.items() if name not in WIDE)


def small_trainer(**options):
    trainer = odd_trainer(**SMALL | options)
    if hasattr(trainer, "head"):            # a critic that knows nothing would be all zeros
        nudge(trainer.head, 2, size=0.3)
    return trainer


# ------------------------------------------------------------------------------------ by hand

class Alone(NamedTuple):
    """A response of n tokens that has gone through the model alone, without padding."""
    logp: torch.Tensor          # (n,)
    values: torch.Tensor        # (n,) what the critic says
    routes: torch.Tensor        # of prompt and response (1, tokens, L, K)


def alone(model, head, rollout, i, routes=None):
    tokens = rollout.tokens[i][rollout.mask[i]][None]
    n = rollout.lengths[i]
    out = model(tokens, torch.ones_like(tokens, dtype=torch.bool), routes)
    logp = out.logits[0].log_softmax(dim=-1)[:-1].gather(1, tokens[0, 1:, None])[:, 0]
    values = head(out.hidden[0])[:-1, 0] if head else logp * 0
    return Alone(logp[-n:], values[-n:], out.routes)


def advantages_by_gae(rewards, values, lam):
    """A_t = sum over l of lam^l (r_t+l + v_t+l+1 - v_t+l), the reward at the last token."""
    result = []
    for reward, v in zip(rewards, values):
        n = len(v)
        surprises = [v[t + 1] - v[t] if t < n - 1 else reward - v[t] for t in range(n)]
        result.append(torch.stack([
            sum(lam ** (later - t) * surprises[later] for later in range(t, n))
            for t in range(n)]))
    return result


def advantages_by_group(rewards, lengths, config):
    result = []
    for i, n in enumerate(lengths):
        first = i - i % config.group_size
        group = torch.tensor(rewards[first:first + config.group_size])
        A = rewards[i] - group.mean()
        if config.algorithm != "dr_grpo" and config.scale != "none":
            A = A / group.std() if group.std() > 0 else torch.tensor(0.0)
        result.append(A.expand(n))
    return result


class Past(NamedTuple):
    """What is known of each response before the update, in lists of tensors (n,)."""
    logp_old: list
    replayed: list              # routes, or None
    A: list
    values: list
    returns: list


@torch.no_grad()
def past_by_hand(trainer, rollout):
    """From a rollout as the sampler has left it."""
    config = trainer.config
    head = getattr(trainer, "head", None)
    rows = range(len(rollout.tokens))
    lengths = rollout.lengths.tolist()
    mask = rollout.mask
    replayed = [None for _ in rows]
    if config.routing_replay == "r3":
        replayed = [rollout.routes[i][mask[i]][None] for i in rows]
    logp_sampler = [rollout.logp_old[i, :lengths[i]] for i in rows]
    now = [alone(trainer.model, head, rollout, i, replayed[i]) for i in rows]
    if config.routing_replay == "r2":
        replayed = [each.routes for each in now]
    scored_again = (config.recompute_logp_old or config.correction != "none"
                    or config.routing_replay == "r2")
    logp_old = [each.logp for each in now] if scored_again else logp_sampler

    rewards = rollout.rewards.tolist()
    if config.overlong:
        start = config.max_new_tokens - config.overlong
        rewards = [r - max(0, n - start) / config.overlong for r, n in zip(rewards, lengths)]
    values = [each.values for each in now]
    returns = values
    if head:
        A = advantages_by_gae(rewards, values, config.gae_lambda)
        returns = [a + v for a, v in zip(A, values)]
        A = [(a - torch.cat(A).mean()) / torch.cat(A).std() for a in A]
    else:
        A = advantages_by_group(rewards, lengths, config)
    ratios = [(old - sampler).exp() for old, sampler in zip(logp_old, logp_sampler)]
    if config.correction == "tis":
        A = [a * ratio.clamp(max=2) for a, ratio in zip(A, ratios)]
    if config.correction == "icepop":
        A = [a * ratio * ((ratio >= 0.5) & (ratio <= 5)) for a, ratio in zip(A, ratios)]
    return Past(logp_old, replayed, A, values, returns)


def loss_by_hand(trainer, rollout, past):
    """The loss of the first mini-batch."""
    config = trainer.config
    head = getattr(trainer, "head", None)
    B = len(rollout.tokens) // config.mini_batches
    lengths = rollout.lengths[:B].tolist()
    total = 0.0
    for i, n in enumerate(lengths):
        now = alone(trainer.model, head, rollout, i, past.replayed[i])
        weight = {"dapo": 1 / sum(lengths), "dr_grpo": 1 / (B * config.max_new_tokens)}.get(
            config.algorithm, 1 / (B * n))
        log_w = now.logp - past.logp_old[i]
        ratio = log_w.exp()
        if config.algorithm == "gspo":
            ratio = log_w.mean().exp()
        if config.algorithm == "gspo_token":
            ratio = log_w.mean().exp().detach() * (now.logp - now.logp.detach()).exp()
        A = past.A[i]
        clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
        total = total - weight * torch.minimum(ratio * A, clipped * A).sum()
        if config.kl_coef:
            with torch.no_grad():
                logp_ref = alone(trainer.reference, None, rollout, i).logp
            x = (logp_ref - now.logp).exp()
            total = total + config.kl_coef * weight * (x - 1 - x.log()).sum()
        if head:
            v = now.values
            near = v.clamp(past.values[i] - 0.2, past.values[i] + 0.2)
            error = torch.maximum((v - past.returns[i]) ** 2, (near - past.returns[i]) ** 2)
            total = total + 0.1 * weight * error.sum() / 2
    return total


def gradient_by_hand(trainer, rollout, past):
    parameters = list(trainer.model.parameters())
    if hasattr(trainer, "head"):
        parameters += list(trainer.head.parameters())
    found = torch.autograd.grad(loss_by_hand(trainer, rollout, past), parameters,
                                allow_unused=True)
    flat = []
    for gradient, parameter in zip(found, parameters):
        flat.append(torch.zeros_like(parameter) if gradient is None else gradient)
    return torch.cat([gradient.flatten() for gradient in flat])


def sampler_by_hand(trainer, old_model):
    """The model that should have sampled."""
    config = trainer.config
    model = old_model if config.lag else trainer.model
    return model if config.sampler == "same" else in_precision(model, config.sampler)


# ------------------------------------------------------------------------------------ pairs

@pytest.mark.parametrize("options", list(pairs()), ids=text)
def test_any_two_make_the_gradient_that_is_written_out_by_hand(options):
    trainer = small_trainer(**options)
    config = trainer.config
    old_model = copy.deepcopy(trainer.model)
    trainer.collect(trainer.model, random.Random("one rollout ago"))
    nudge(trainer.model, 3, size=0.01)
    rollout, _ = trainer.collect(trainer.model, random.Random("a rollout"))
    with torch.no_grad():
        sampled_by = gspo.score(sampler_by_hand(trainer, old_model), rollout).logp
    far = 0.03 if config.dtype != "float32" and config.sampler == "same" else 1e-6
    assert (sampled_by - rollout.logp_old).abs().mean() < far
    rewards = rollout.rewards.view(4, 3)
    if config.dynamic_sampling:
        assert (rewards.amax(dim=1) > rewards.amin(dim=1)).all()
    assert rollout.rewards.any()

    past = past_by_hand(trainer, rollout)
    rollout.advantages = trainer.advantages(rollout)
    nudge(trainer.model, 4)                 # as if some steps had been made
    if hasattr(trainer, "head"):
        nudge(trainer.head, 5)
    by_hand = gradient_by_hand(trainer, rollout, past)
    gradient, = gradients(trainer, rollout)
    assert by_hand.norm() > 0.01
    assert (gradient - by_hand).norm() < ROUNDING[config.dtype] * by_hand.norm()


def test_the_gradients_of_loss_terms_add_up():
    """What two terms add is what each of them adds, in whichever order they stand."""
    trainer = small_trainer(algorithm="ppo", kl_coef=1.0)
    rollout, _ = trainer.collect(trainer.model, random.Random(0))
    rollout.advantages = trainer.advantages(rollout)
    kl, critic = trainer.loss_terms
    found = []
    for terms in ([no_term], [kl], [critic], [kl, critic], [critic, kl]):
        trainer.loss_terms = terms
        found.append(gradients(trainer, rollout)[0])
    neither, with_kl, with_critic, both, turned = found
    torch.testing.assert_close(both, with_kl + with_critic - neither, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(turned, both, rtol=1e-4, atol=1e-6)


def no_term(batch, scores):
    return 0.0


def test_an_entropy_bonus_is_a_term_of_the_loss():
    def bonus(batch, scores):
        return -((scores.entropy * batch.response_mask).sum(dim=1) * batch.token_weights).sum()
    trainer = small_trainer()
    rollout, _ = trainer.collect(trainer.model, random.Random(0))
    rollout.advantages = trainer.advantages(rollout)
    trainer.loss_terms = [no_term]
    without, = gradients(trainer, rollout)
    trainer.loss_terms = [bonus]
    gradient, = gradients(trainer, rollout)
    total = 0.0
    for i, n in enumerate(rollout.lengths[:6].tolist()):
        tokens = rollout.tokens[i][rollout.mask[i]][None]
        logits = trainer.model(tokens, torch.ones_like(tokens, dtype=torch.bool)).logits[0]
        entropy = torch.distributions.Categorical(logits=logits[-1 - n:-1]).entropy()
        total = total - entropy.mean() / 6
    by_hand = torch.autograd.grad(total, list(trainer.model.parameters()))
    flat = torch.cat([part.flatten() for part in by_hand])
    torch.testing.assert_close(gradient - without, flat, rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------------------ order

def swapped(first, second):
    """The list of extras with these two at each other's places."""
    order = list(extras.EXTRAS)
    i = extras.NAMES.index(first)
    j = extras.NAMES.index(second)
    order[i] = extras.EXTRAS[j]
    order[j] = extras.EXTRAS[i]
    return order


@pytest.mark.parametrize("first, second, options", [
    ("interrupts", "metrics", {}),
    ("metrics", "kl_term", {"kl_coef": 1.0}),
    ("metrics", "micro_batches", {"micro_tokens": 40}),
    ("kl_term", "precision", {"kl_coef": 1.0, "dtype": "bfloat16"}),
    ("precision", "micro_batches", {"dtype": "float16", "micro_tokens": 40}),
    ("precision", "dynamic_sampling", {"dtype": "bfloat16", "dynamic_sampling": True}),
    ("micro_batches", "rescoring", {"micro_tokens": 40, "recompute_logp_old": True}),
    ("rescoring", "overlong", {"recompute_logp_old": True, "overlong": 8}),
    ("rescoring", "overlong", {"correction": "tis", "algorithm": "grpo", "overlong": 8}),
    ("overlong", "dynamic_sampling", {"overlong": 8, "dynamic_sampling": True}),
    ("dynamic_sampling", "other_sampler", {"dynamic_sampling": True, "sampler": "int4"}),
], ids=str)
def test_the_order_of_these_does_not_matter(monkeypatch, first, second, options):
    found = []
    for order in (extras.EXTRAS, swapped(first, second)):
        monkeypatch.setattr(extras, "EXTRAS", order)
        trainer = small_trainer(**{"prompts": 8} | options)
        _, learned = trainer.rl_step(1)
        weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
        trainer.measured.pop("seconds_rescoring", None)
        found.append((weights, trainer.measure(learned), trainer.measured))
    (weights, rows, measured), (other_weights, other_rows, other_measured) = found
    assert len(rows) == 2
    assert torch.equal(weights, other_weights)
    assert rows == other_rows
    assert measured == other_measured


@pytest.mark.parametrize("options", REFUSED, ids=text)
def test_options_that_do_not_go_together_are_refused(options):
    with pytest.raises(ValueError, match="but the advantages of ppo are a critic's"):
        small_trainer(**options)


@pytest.mark.parametrize("first, second, options", [
    ("overlong", "critic", {"algorithm": "ppo", "overlong": 8}),
    ("rescoring", "critic", {"algorithm": "ppo", "recompute_logp_old": True}),
    ("overlong", "relatives", {"algorithm": "dr_grpo", "overlong": 8}),
    ("rescoring", "relatives", {"scale": "none", "routing_replay": "r2"}),
])
def test_an_extra_that_would_hide_another_is_refused(monkeypatch, first, second, options):
    small_trainer(**options)
    monkeypatch.setattr(extras, "EXTRAS", swapped(first, second))
    says = f"lab.extras.{second} and lab.extras.{first} do not go together: the advantages"
    with pytest.raises(ValueError, match=says):
        small_trainer(**options)


def test_with_the_default_options_nothing_runs_but_metrics_interrupts_and_the_cache():
    classes = extras.extend(train.Trainer, train.Config()).__mro__
    names = [one.__module__ for one in classes if one.__module__.startswith("lab.extras.")]
    assert names == ["lab.extras.interrupts", "lab.extras.metrics", "lab.extras.cold_cache"]


# ------------------------------------------------------------------------------------ training

@pytest.mark.parametrize("options", [
    *[{"algorithm": name} for name in gspo.ALGORITHMS],
    {"recompute_logp_old": True, "overlong": 9},
    {"routing_replay": "r2"},
    {"routing_replay": "r3"},
    {"sampler": "float16", "recompute_logp_old": True},
    {"lag": 1, "epochs": 2},
    {"dtype": "bfloat16", "algorithm": "ppo", "routing_replay": "r2"},
    {"dtype": "float16", "kl_coef": 0.1, "micro_tokens": 200},
    {"sampler": "int8", "algorithm": "gspo_token", "correction": "icepop"},
], ids=text)
def test_every_algorithm_and_every_way_of_routing_trains(options):
    trainer = odd_trainer(**options)
    before = [p.clone() for p in trainer.optimizer.param_groups[-1]["params"]]
    for step in (1, 2):
        _, learned = trainer.rl_step(step)
        rows = trainer.measure(learned)
        assert 0 < rows[0]["grad_norm"] < 1000
        # In the first mini-batch all ratios are 1, unless another model has sampled. The rounding
        # of autocast depends a little on what else is in the batch.
        far = step == 2 and "lag" in options
        rounding = 2e-2 if "dtype" in options else 1e-5
        assert (rows[0]["log_w_std"] > rounding) == far
        assert rows[-1]["log_w_std"] > 1e-5
        assert (rows[-1]["expert_change"] == [0.0, 0.0]) == ("routing_replay" in options)
    assert all((p != q).any() for p, q in zip(before, trainer.optimizer.param_groups[-1]["params"]))


def test_the_coarser_the_sampler_the_further_it_is_from_the_trainer():
    means = []
    for precision in ("float32", "int8", "int4", "int3"):
        trainer = odd_trainer(sampler=precision)
        _, learned = trainer.rl_step(1)
        row = trainer.measure(learned)[0]
        assert 0 <= row["mismatch_mean"] <= row["mismatch_max"]
        assert 0 <= row["mismatch_experts"] <= 1
        means.append(row["mismatch_mean"])
    assert means[0] < 1e-5
    assert means == sorted(means)
