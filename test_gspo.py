"""GSPO as a list of its properties; run `pytest`. Equation numbers are those of arXiv 2507.18071.

Expected values come from closed forms, enumeration, finite differences or slow obvious versions."""
import csv
import random
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import fields
from fractions import Fraction
from functools import partial
from math import exp, inf, log, nan, sqrt
from pathlib import Path

import pytest
import torch
from pytest import approx
from torch.testing import assert_close

import gspo
import moe
import train as train_py
from data import arithmetic
from data.tokenizer import Tokenizer

ALGORITHMS = ("gspo", "gspo_token", "grpo")
every_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS)
tensor = partial(torch.tensor, dtype=torch.float64)

def objective(algorithm, d, A, low=0.2, high=0.2, T=7, padding=0.0):
    """-> loss, gradient (B, T), stats, of responses with the log-ratios d = log new - log old."""
    logp = tensor([row + [padding] * (T - len(row)) for row in d]).sub(1).requires_grad_()
    mask = torch.arange(T) < torch.tensor([len(row) for row in d])[:, None]
    A = tensor([a + [9.0] * (T - len(a)) if isinstance(a, list) else a for a in A]).requires_grad_()
    old = torch.full_like(logp, -1).requires_grad_()
    loss, stats = gspo.policy_loss(algorithm, logp, old, A, mask, low, high)
    loss.backward()
    assert old.grad is None and A.grad is None              # only the new policy is moved
    return loss.item(), logp.grad, stats

def by_hand(algorithm, d, A, low, high, T=7):
    """Eq. 5, 13 and 2 and their gradients, one number after the other."""
    loss, grad = 0.0, torch.zeros(len(d), T, dtype=torch.float64)
    for i, (row, a) in enumerate(zip(d, A)):
        for t, a in enumerate(a if isinstance(a, list) else [a] * len(row)):
            ratio = exp(row[t] if algorithm == "grpo" else sum(row) / len(row))
            clipped = ratio > 1 + high if a > 0 else ratio < 1 - low
            loss -= ((1 + high if a > 0 else 1 - low) if clipped else ratio) * a / len(row) / len(d)
            grad[i, t] = 0 if clipped else -ratio * a / len(row) / len(d)
    return loss, grad

def random_batch(seed, scale=0.1, token_advantages=False):
    draw = torch.Generator().manual_seed(seed)
    d, A = ([torch.randn(n, generator=draw).mul(size).tolist() for n in (1, 4, 2, 7, 3, 5)]
            for size in (scale, 1.0))
    return d, A if token_advantages else [row[0] for row in A]

# ------------------------------------------------------------------------------- the objective

@pytest.mark.parametrize("algorithm, d, A, loss, grad", [
    ("gspo", [[0.3, -0.1, 0.1]], [1], -1.1051709181, [[-0.3683903060] * 3]),        # e^mean(d)
    ("gspo", [[0.3, -0.1, 0.1], []], [1, 9], -0.5525854590, [[-0.1841951530] * 3, [0] * 3]),
    ("gspo", [[3, -3, 0.6]], [1], -1.2, [[0, 0, 0]]),                               # outliers
    ("gspo", [[3, -3, 0.6]], [-1], 1.2214027582, [[0.4071342527] * 3]),
    ("grpo", [[3, -3, 0.6]], [1], -0.8165956895, [[0, -0.0165956895, 0]]),
    ("grpo", [[3, -3, 0.6]], [-1], 7.5692185745, [[6.6951789744, 0, 0.6073729335]]),
    ("gspo_token", [[log(w) for w in (0.5, 1, 1.5)]], [[1, -1, 2]], -0.6057068643,  # A per token
     [[-0.3028534321, 0.3028534321, -0.6057068643]]),
    ("gspo_token", [[log(w) + plus for w in (0.5, 1, 1.5)] for plus in (0, 1)], [[1, -1, 2]] * 2,
     -0.4912329415, [[-0.1514267161, 0.1514267161, -0.3028534321], [0, 0.4116204900, 0]]),
    ("gspo_token", [[log(1.5)] * 2], [[1, -1]], 0.15, [[0, 0.75]]),                 # and clip
    *[(name, [[log(s)]], [A], loss, [[slope]]) for name in ALGORITHMS   # one token: all the same;
      for A, s, loss, slope in ((1, 1.5, -1.2, 0), (1, 0.5, -0.5, -0.5),  # the sign decides what
                                (-1, 0.5, 0.8, 0), (-1, 5, 5, 5))],                 # is clipped
    *[(name, [[0], [0, 0, 0]], [1, -1], 0, [[-1 / 2, 0, 0], [1 / 6] * 3])           # equal weights
      for name in ALGORITHMS]])
def test_values_known_in_advance(algorithm, d, A, loss, grad):
    value, gradient, _ = objective(algorithm, d, A, T=len(grad[0]))
    assert value == approx(loss, abs=1e-9)
    assert_close(gradient, tensor(grad), atol=1e-9, rtol=0)

def test_the_papers_clip_range_on_padded_responses():
    d = [[3e-4, -6e-4, 9e-4], [5e-4], [-2e-4, -6e-4]]       # inside, above, below
    loss, grad, stats = objective("gspo", d, [1, 0.5, -1.5], *gspo.CLIP["gspo"])
    assert loss == approx(-0.00028334, abs=1e-11) and (grad[1:] == 0).all()
    assert_close(grad[0, :3], tensor([-0.111133336] * 3), atol=1e-9, rtol=0)
    assert [stats["clip_high"], stats["clip_low"]] == approx([1 / 6, 2 / 6])
    assert [stats["clip_high_seq"], stats["clip_low_seq"]] == approx([1 / 3, 1 / 3])

@every_algorithm
@pytest.mark.parametrize("seed", range(3))
def test_value_and_gradient_on_random_batches(algorithm, seed):
    for token_advantages in {False, algorithm != "gspo"}:
        batch = *random_batch(seed, 0.1, token_advantages), 0.03, 0.04
        loss, grad, stats = objective(algorithm, *batch)
        expected, expected_grad = by_hand(algorithm, *batch)
        assert loss == approx(expected, abs=1e-12)
        assert_close(grad, expected_grad, atol=1e-12, rtol=0)
        n = sum(map(len, batch[0]))
        assert stats["clip_low"] + stats["clip_high"] == approx(1 - (expected_grad != 0).sum() / n)

@every_algorithm
def test_on_the_sampling_policy_every_algorithm_is_reinforce(algorithm):
    d, A = random_batch(0, scale=0)
    loss, grad, stats = objective(algorithm, d, A, 3e-4, 4e-4)
    assert loss == approx(-sum(A) / 6, abs=1e-12) and not any(stats.values())
    assert_close(grad, tensor([[-a / 6 / len(row)] * len(row) + [0] * (7 - len(row))
                               for row, a in zip(d, A)]), atol=1e-12, rtol=0)
    assert objective(algorithm, [[0]], [1], 0, 0, T=1)[1] == -1     # on the edge: not yet clipped

@every_algorithm
@pytest.mark.parametrize("padding", [123.0, -inf, nan])
def test_padding_and_the_order_of_responses_do_not_matter(algorithm, padding):
    d, A = random_batch(1)
    loss, grad, stats = objective(algorithm, d, A, 0.03, 0.04)
    loss2, grad2, stats2 = objective(algorithm, d[::-1], A[::-1], 0.03, 0.04, 9, padding)
    assert loss2 == approx(loss, abs=1e-15) and stats2 == approx(stats)
    assert_close(grad2.flip(0), torch.nn.functional.pad(grad, (0, 2)))

def test_gspo_sees_only_the_mean_of_the_log_ratios():
    d = [0.05, -0.02, 0.03]
    (s, grad, _), (w, _, _) = objective("gspo", [d], [-1]), objective("grpo", [d], [-1])
    assert w > s                                            # arithmetic above geometric mean
    for moved in ([0.02] * 3, [0.06, 0.0, 0.0], d[::-1]):
        s2, grad2, _ = objective("gspo", [moved], [-1])
        assert s2 == approx(s) and torch.allclose(grad2, grad)
        assert moved == d[::-1] or objective("grpo", [moved], [-1])[0] != approx(w)
    assert objective("gspo", [d + d], [-1])[0] == approx(s)                     # said twice
    assert objective("gspo", [[-x for x in d]], [-1])[0] == approx(1 / s)       # policies swapped

@every_algorithm
@pytest.mark.parametrize("d, A, expected", [(100., 1, -1.2), (-100., -1, 0.8), (100., -1, exp(20))])
def test_huge_ratios_leave_the_gradient_finite(algorithm, d, A, expected):
    logp = torch.full((1, 3), d, requires_grad=True)
    loss, _ = gspo.policy_loss(algorithm, logp, 0 * logp, tensor([A]), logp != 0, 0.2, 0.2)
    loss.backward()
    assert loss.item() == approx(expected) and logp.grad.isfinite().all()

@every_algorithm
@pytest.mark.parametrize("logp, dtype", [(-600.0, torch.float32), (-0.02, torch.bfloat16)])
def test_ratios_near_1_survive_coarse_log_probs(algorithm, logp, dtype):
    old = torch.full((1, 4), logp, dtype=dtype)
    new = torch.where(old.new_tensor([1, 0, 0, 0]) > 0, old.nextafter(0 * old), old)
    d = (new.double() - old.double()).mean().item()
    loss, _ = gspo.policy_loss(algorithm, new, old, torch.ones(1), old != 0, 0.2, 0.2)
    assert 1e-5 < d < 3e-4 and loss.item() == approx(-exp(d), abs=1e-7)

# ------------------------------------------------------------ advantages and exact expectations

@pytest.mark.parametrize("G, k", [(4, 1), (8, 1), (8, 5), (3, 2)])
def test_advantages_when_k_of_G_responses_succeed(G, k):
    rewards, p, unbiased = tensor([[1.0] * k + [0.0] * (G - k)]), k / G, sqrt((G - 1) / G)
    good, bad = unbiased * sqrt((1 - p) / p), -unbiased * sqrt(p / (1 - p))
    A = tensor([good] * k + [bad] * (G - k))
    rewards = torch.cat((rewards, 3 * rewards.flip(1) + 7, 0 * rewards + 0.1))
    expected = torch.stack((A, A.flip(0), 0 * A))
    assert_close(gspo.group_advantages(rewards), expected, atol=1e-12, rtol=0)
    assert_close(gspo.group_advantages(rewards[:1], "none"), rewards[:1] - p)
    assert (gspo.group_advantages(torch.full((2, G), 0.1)) == 0).all()      # exactly, in fp32 too

@pytest.mark.parametrize("G", [2, 3, 4])
def test_the_groups_own_mean_as_baseline_shrinks_the_policy_gradient_by_1_over_G(G):
    theta, reward = tensor([0.3, -0.5, 0.1]).requires_grad_(), tensor([1.0, 0.2, 0.0])
    log_pi, expected_loss = theta.log_softmax(0), 0
    true, = torch.autograd.grad(log_pi.exp() @ reward, theta, retain_graph=True)
    for group in torch.cartesian_prod(*[torch.arange(3)] * G):
        A, logp = gspo.group_advantages(reward[group][None], "none")[0], log_pi[group][:, None]
        loss, _ = gspo.policy_loss("gspo", logp, logp, A, logp < 0, 3e-4, 4e-4)
        expected_loss = expected_loss + log_pi[group].sum().exp().detach() * loss
    assert_close(torch.autograd.grad(-expected_loss, theta)[0], (1 - 1 / G) * true)

def test_kl_is_that_of_the_old_policy_to_the_new_one():
    old, new = tensor([0.5, 0.25, 0.25]), tensor([0.2, 0.5, 0.3])
    d = (new / old).log()[[0, 0, 1, 2], None].tolist()      # each token as often as `old` says
    assert objective("gspo", d, [1] * 4)[2]["kl"] == approx((old * (old / new).log()).sum().item())
    stats = objective("gspo", [[0.1, -0.3]], [1])[2]        # exp(d) - 1 - d is never negative
    assert stats["kl"] == approx((0.0051709181 + 0.0408182207) / 2) and stats["outliers"] == 0.5

# ----------------------------------------------------------------------------------- the model

PROMPTS, END = [[3, 4, 5], [6], [7, 2, 8, 9, 4]], 1

def tiny(seed=0, **changes):
    torch.manual_seed(seed)
    return moe.MoETransformer(moe.MoEConfig(**dict(
        vocab_size=12, max_length=16, n_layer=2, d_model=16, n_expert=4, d_expert=8) | changes))

def sample(model, prompts=PROMPTS, G=4, T=6, seed=0, eos_id=END, **options):
    generator = torch.Generator().manual_seed(seed)
    return moe.generate(model, prompts, G, T, eos_id=eos_id, generator=generator, **options)

def slow_logp(model, rollout, row, temperature=1.0):
    """Log-probs (|y|,) of one response: no batch, no padding, no cache."""
    prompt = rollout.prompts[row * len(rollout.prompts) // len(rollout.tokens)]
    response = rollout.tokens[row, rollout.mask[row]].tolist()
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1:-1]
    return (logits / temperature).log_softmax(-1)[range(len(response)), response]

@pytest.mark.parametrize("replayed", [None, [1, 3, 0]])
def test_experts_against_one_token_at_a_time(replayed):
    experts, x = tiny(n_active=3).layers[0].experts, torch.randn(20, 16)
    y, routes, _ = experts(x, replayed and torch.tensor([replayed] * 20))
    for n, logits in enumerate(experts.router(x)):
        active, expected = replayed or logits.argsort(descending=True)[:3].tolist(), 0
        for gate, e in zip(logits[active].softmax(0), active):      # softmax over the active ones
            left, right = (experts.gate_up[e] @ x[n]).chunk(2)
            expected = expected + gate * experts.down[e] @ (left * left.sigmoid() * right)
        assert routes[n].tolist() == active
        assert_close(y[n], expected, atol=1e-5, rtol=1e-5)

def test_balance_loss_is_1_for_even_use_and_E_over_K_if_all_tokens_use_the_same():
    experts, x = tiny().layers[0].experts, torch.eye(4, 16)         # E = 4, K = 2
    experts.router.weight.data = 100 * x
    assert experts(x[[0, 2]] + x[[1, 3]], None)[2].item() == 1
    assert experts(x[[0, 0]] + x[[1, 1]], None)[2].item() == 2

def test_gradient_through_the_model_by_finite_differences():
    model = tiny().double()
    r, A = sample(model, T=4), torch.randn(12)
    tokens, keep, mask, routes = r.select(torch.arange(12))     # no gradient where a route flips
    old, (names, weights) = r.logp + 0.1 * torch.randn(r.logp.shape), zip(*model.named_parameters())
    def loss(*weights):
        out = torch.func.functional_call(model, dict(zip(names, weights)), (tokens, routes, keep))
        new = out.logits.log_softmax(-1).gather(1, r.tokens[mask][:, None])
        logp = torch.zeros(mask.shape).double().masked_scatter(mask, new)
        return gspo.policy_loss("gspo", logp, old, A, mask, 0.03, 0.04)[0]
    assert torch.autograd.gradcheck(loss, weights, fast_mode=True)

def test_replay_takes_the_given_routes_and_the_router_still_learns():
    model, tokens = tiny(), torch.randint(12, (3, 8))
    plain, theirs = model(tokens), tiny(1)(tokens).routes
    assert torch.equal(model(tokens, plain.routes).logits, plain.logits)    # bit for bit
    replayed = model(tokens, theirs)
    assert torch.equal(replayed.routes, theirs) and not torch.equal(replayed.logits, plain.logits)
    replayed.logits.logsumexp(-1).sum().backward()
    assert all(layer.experts.router.weight.grad.abs().sum() > 0 for layer in model.layers)

def test_expert_change_compares_sets_where_responses_are_scored():
    old, new = torch.tensor([[[[[0, 1], [2, 3], [0, 1]]]], [[[[1, 0], [3, 1], [2, 3]]]]])
    keep = torch.tensor([[True, True, False]])              # (b, S); old, new (L, b, S, K)
    assert gspo.expert_change(old, new, keep) == gspo.expert_change(new, old, keep) == 0.25

def test_weights_travel_to_transformers_and_back():
    model, tokens = tiny(rope_theta=500.0, norm_eps=1e-3, n_active=3), torch.randint(12, (3, 16))
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)                 # no norm keeps its weight of 1
    logits, (config, state) = model(tokens).logits, moe.to_hf(model)
    split = {name: x for name, x in state.items() if "experts" not in name}
    for at, e in ((f"model.layers.{i}.mlp.experts.", e) for i in range(2) for e in range(4)):
        parts = *state[at + "gate_up_proj"][e].chunk(2), state[at + "down_proj"][e]
        split |= {f"{at}{e}.{k}_proj.weight": x for k, x in zip(("gate", "up", "down"), parts)}
    for back in (moe.from_hf(config, state), moe.from_hf(config, split)):
        assert back.config == model.config and torch.equal(back(tokens).logits, logits)
    hf = pytest.importorskip("transformers")
    theirs = hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**config))
    theirs.load_state_dict(state, strict=True)
    assert_close(theirs(tokens).logits, logits, atol=1e-4, rtol=1e-4)

# ------------------------------------------------------------------------ sampling and scoring

@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_log_probs_and_routes_are_those_of_scoring(temperature):
    model, rows = tiny(), torch.randperm(12)
    r = sample(model, temperature=temperature)
    scored, _, change = gspo.score(model, r, rows, temperature)
    for logp, row in zip(scored, rows.tolist()):
        expected = slow_logp(model, r, row, temperature)
        assert_close(torch.stack((logp, r.logp[row]))[:, r.mask[row]],
                     torch.stack((expected, expected)), atol=1e-5, rtol=0)
    assert change.sum() == 0
    assert_close(gspo.rescore(model, r, temperature, 20), r.logp, atol=1e-5, rtol=0)

def test_a_response_ends_with_the_end_token_or_is_cut():
    r = sample(tiny(), G=20)
    for row, mask, n in zip(r.tokens.tolist(), r.mask.tolist(), r.lengths.tolist()):
        assert mask == [t < n for t in range(6)] and n == (row + [END]).index(END) + (END in row)
    assert len(set(r.lengths.tolist())) > 2 and (r.logp[~r.mask] == 0).all()
    assert (sample(tiny(), eos_id=None).lengths == 6).all()

def test_samples_have_the_probabilities_of_the_model():
    model, n = tiny(), 4000
    p = model(torch.tensor(PROMPTS[:1])).logits[0, -1].softmax(-1)
    share = sample(model, PROMPTS[:1], n, 1).tokens[:, 0].bincount(minlength=12) / n
    assert ((share - p).abs() < 4 * (p * (1 - p) / n).sqrt()).all()

def test_a_response_depends_on_its_prompt_and_its_luck_alone():
    r, again, other = sample(tiny()), sample(tiny()), sample(tiny(), [[2, 8], [9], *PROMPTS[2:]])
    assert torch.equal(r.tokens, again.tokens) and torch.equal(r.routes, again.routes)
    assert torch.equal(r.tokens[8:] * r.mask[8:], other.tokens[8:] * other.mask[8:])
    assert_close(r.logp[8:], other.logp[8:])                        # the third prompt's responses
    assert torch.equal(r.routes[:, 8:], other.routes[:, 8:])
    assert not torch.equal(sample(tiny(), seed=1).logp, r.logp)

def test_greedy_takes_the_likeliest_token_of_the_uncached_model():
    r = sample(tiny(), G=2, eos_id=None, greedy=True)
    for response, line in zip(r.tokens.tolist(), [p for p in PROMPTS for _ in range(2)]):
        for token in response:
            assert token == tiny()(torch.tensor([line])).logits[0, -1].argmax()
            line = line + [token]

@pytest.mark.parametrize("call, wrong", [
    *[(tiny, {k: v}) for k, v in dict(d_model=30, n_kv_head=3, n_active=9, n_expert=256).items()],
    *[(lambda **wrong: sample(tiny(), **wrong), wrong) for wrong in (
        dict(prompts=[]), dict(prompts=[[1], []]), dict(prompts=[[12]]), dict(prompts=[[-1]]),
        dict(G=0), dict(T=0), dict(T=12), dict(temperature=0.0))],
    (lambda length: tiny()(torch.zeros(1, length, dtype=torch.long)), dict(length=17)),
    (lambda **wrong: moe.from_hf(moe.to_hf(tiny())[0] | wrong, {}), dict(norm_topk_prob=False))])
def test_the_impossible_is_a_value_error(call, wrong):
    with pytest.raises(ValueError):
        call(**wrong)

# -------------------------------------------------------------------------------------- updates

def drifted():
    """A rollout of 4 groups, the second without a lesson, and the policy a little later."""
    model = tiny()
    rollout = sample(model, PROMPTS + [[2, 2]])
    for p in model.parameters():
        p.data += 0.01 * torch.randn_like(p)
    rewards = torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 1, 1], [0, 1, 1, 1]])
    return model, rollout, gspo.group_advantages(rewards)

@pytest.mark.parametrize("mini_batches", [1, 3, 4])
def test_update_is_gradient_ascent_on_equation_5(mini_batches):
    (slow, r, A), results = drifted(), []
    for micro_tokens in (12, 10 ** 9):                      # many small parts, one part
        model = drifted()[0]
        results.append(gspo.update(model, torch.optim.SGD(model.parameters(), lr=0.1), r, A, "gspo",
                                   0.01, 0.01, mini_batches, 1.0, 1e9, micro_tokens))
    groups = torch.arange(4).tensor_split(mini_batches)     # no step for one without a lesson
    for group, parts, whole in zip([g for g in groups if g.tolist() != [1]], *results, strict=True):
        J = 0
        for row in [4 * g + i for g in group.tolist() for i in range(4)]:   # A = 0 included
            s = (slow_logp(slow, r, row) - r.logp[row, r.mask[row]]).mean().exp()
            a = A[row // 4, row % 4]
            J = J + torch.min(s * a, s.clamp(0.99, 1.01) * a) / 4 / len(group)
        assert whole["loss"] == approx(-J.item(), abs=1e-6)
        assert all(parts[name] == approx(whole[name], rel=1e-3, abs=1e-5) for name in whole)
        for p, g in zip(slow.parameters(), torch.autograd.grad(J, list(slow.parameters()))):
            p.data += 0.1 * g
    assert_close(list(model.parameters()), list(slow.parameters()), atol=1e-6, rtol=1e-5)

def test_the_ratio_is_1_in_the_first_mini_batch_and_drifts_from_then_on():
    model = tiny()
    r, A = sample(model, PROMPTS * 4), gspo.group_advantages(torch.rand(12, 4))
    first, *later = gspo.update(model, torch.optim.AdamW(model.parameters(), lr=1e-2), r, A, "gspo",
                                *gspo.CLIP["gspo"], mini_batches=4)
    assert first["clip_low"] == first["clip_high"] == 0 and first["log_s_std"] < 1e-6
    assert first["expert_change"] == 0 and 0 < first["entropy"] < log(12) and len(later) == 3
    assert all(m["log_s_std"] > 1e-3 and m["clip_low"] + m["clip_high"] > 0 for m in later)

def test_a_gradient_that_is_not_finite_never_reaches_the_weights():
    model, r, A = drifted()
    with pytest.raises(FloatingPointError):
        gspo.update(model, torch.optim.AdamW(model.parameters()), r, A * nan, "gspo", 0.1, 0.1)
    assert_close(list(model.parameters()), list(drifted()[0].parameters()), atol=0, rtol=0)

# ------------------------------------------------------------------------------------ the task

task, tokenizer = arithmetic.Task(), Tokenizer()

@pytest.mark.parametrize("response, right", [
    ("932", 1), ("<think>7+5+0=12</think>932", 1), ("<think></think>932", 1), ("932=", 0), ("", 0),
    ("0932", 0), ("+932", 0), ("-932", 0), ("9 32", 0), ("٩٣٢", 0), ("9**9**9", 0), ("93", 0),
    ("932</think>", 0), ("</think>932", 0), ("<think>932", 0), ("<think>932</think>", 0),
    ("<think><think></think>932", 0), ("<think></think></think>932", 0), ("1<think></think>932", 0),
    ("<think></think>932<think>", 0), ("<think></think>1</think>932", 0), ("932<pad>", 0),
    ("9" * 10 ** 6, 0), ("<think>" * 10 ** 5, 0), ("</think>" * 10 ** 5 + "932", 0)])
def test_the_reward_of_any_text_is_a_number(response, right):
    assert task.reward(arithmetic.Problem("347+585=", "932", "+3"), response) == right

def test_the_teacher_is_right_unless_it_slips_or_guesses():
    rng, careful = random.Random(0), arithmetic.Task(slip=0, guess=0, max_digits=5)
    for problem in [careful.sample(rng) for _ in range(3000)]:
        a, op, b = re.fullmatch(r"(\d+)([-+*/])(\d+)=", problem.prompt).groups()
        result = Fraction(a) / int(b) if op == "/" else dict(zip("+-*", (
            int(a) + int(b), int(a) - int(b), int(a) * int(b))))[op]
        assert problem.answer == str(result) and result >= 0
        for think in (False, True):
            assert careful.reward(problem, careful.demonstrate(problem, rng, think)) == 1
    problems = [task.sample(rng) for _ in range(5000)]
    right = [task.reward(p, task.demonstrate(p, rng)) for p in problems]
    assert 0.75 < sum(right) / 5000 < 0.85                          # the ceiling of imitation

def test_the_streams_of_training_never_yield_a_held_out_problem():
    unordered = lambda p: (p.kind[0], frozenset(re.findall(r"\d+", p.prompt)))
    held_out, rng = task.held_out(), random.Random(0)
    trained_on = {unordered(task.sample(rng)) for _ in range(50000)}
    assert trained_on.isdisjoint(map(unordered, held_out))
    assert Counter(p.kind for p in held_out) == {f"{op}{n}": 40 for op in "+-*/" for n in (1, 2, 3)}
    assert held_out == arithmetic.Task().held_out()

def test_every_digit_is_a_token_and_an_unknown_character_is_named():
    text = "347+585=<think>7+5+0=12</think>932<end>"
    assert len(tokenizer.encode(text)) == len(text) - len("<think></think><end>") + 3
    assert tokenizer.decode(tokenizer.encode(text)) == text and tokenizer.end != tokenizer.pad
    for wrong in "é", "٣", "x", "<", "<p<end>ad>", "<thi<end>nk>":
        with pytest.raises(ValueError, match=wrong[0]):
            tokenizer.encode("3" + wrong)

# ------------------------------------------------------------------------------- the whole job

SHORT = ("--cold_steps", "30", "--prompts", "4", "--group_size", "4", "--max_digits", "1",
         "--threads", "1", "--steps")

@pytest.fixture
def train(tmp_path, monkeypatch):
    """train.main in an empty folder -> exit code."""
    monkeypatch.chdir(tmp_path)
    def run(*arguments):
        try:
            return train_py.main(arguments) or 0
        except SystemExit as stop:
            return stop.code
    return run

def metrics(folder, names=("step", "reward", "loss", "grad_norm", "entropy", "accuracy")):
    with open(f"{folder}/metrics.csv") as file:
        return [[row[name] for name in names] for row in csv.DictReader(file)]

def test_a_run_that_was_interrupted_and_resumed_equals_one_that_was_not(train, monkeypatch):
    assert train(*SHORT, "6", "--out", "whole", "--eval_every", "4") == 0
    with monkeypatch.context() as patch:
        update, calls = gspo.update, []
        def interrupting(*args, **options):
            calls.append(len(calls) == 2 and signal.raise_signal(signal.SIGINT))
            return update(*args, **options)
        patch.setattr(gspo, "update", interrupting)
        assert train(*SHORT, "6", "--out", "parts", "--eval_every", "4", "--fresh") == 130
    assert len(metrics("parts")) == 3
    assert train("--resume", "--out", "parts", "--lr", "0.1") == 2      # not the same run
    assert train("--resume", "--out", "parts") == 0
    assert metrics("parts") == metrics("whole")
    assert train("--resume", "--out", "parts") == 2         # nothing left to do
    assert train("--resume", "--out", "parts", "--steps", "7") == 0 and len(metrics("parts")) == 7
    assert {"config.json", "metrics.csv", "summary.json", "samples.txt", "checkpoint.pt",
            "curves.png"} == {path.name for path in Path("parts").iterdir()}

def test_the_reward_rises_in_a_miniature_run_past_that_of_the_teacher(train):
    assert train("--max_digits", "1", "--think", "0", "--guess", "0.5", "--cold_steps", "250",
                 "--steps", "25", "--lr", "1e-3") == 0
    rewards = [float(reward) for reward, in metrics("out/run-1", ["reward"])]
    assert sum(rewards[:5]) / 5 < 0.6 and sum(rewards[-5:]) / 5 > 0.7

def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(train, monkeypatch):
    monkeypatch.setattr(gspo, "group_advantages", lambda rewards, scale: rewards * 0 + nan)
    message = train(*SHORT, "5")
    assert "step 1:" in message and "out/run-1/checkpoint.pt" in message
    assert train("--eval_only") == train("--ask", "4+4=") == 0

def bad_values():
    for field in (*fields(train_py.Config), *fields(arithmetic.Task)):
        if field.type is not bool and field.name != "out":
            yield f"--{field.name}", "-7" if field.type is not str else "nothing"
            yield f"--{field.name}", "nan" if field.type is not str else ""
    yield from (("--nothing",), ("--d_model", "30"), ("--max_new_tokens", "3"), ("--steps", "1.5"),
                ("--resume",), ("--ask", "1+1="), ("--eval_only",), ("--ste", "5"), ("--fresh=1",),
                ("--task", "tokenizer"), ("--seed", "9" * 400), ("--out", "."), ("--out", "full/x"),
                ("--device", "cuda"), ("--resume", "--out", "broken"))

@pytest.mark.parametrize("arguments", [*bad_values()], ids=" ".join)
def test_bad_input_gets_one_line_and_exit_code_2(train, capsys, arguments):
    Path("full").write_text("not a folder")
    Path("broken").mkdir()
    torch.save({"model": 1}, "broken/checkpoint.pt")
    if arguments == ("--device", "cuda") and torch.cuda.is_available():
        pytest.skip("it is no bad input here")
    assert train(*arguments) == 2
    error = capsys.readouterr().err
    named = arguments[0].split("=")[0] in error or arguments[-1] in error or "run in out/" in error
    assert error.count("\n") == 1 and named and not Path("out").exists()

def test_the_task_in_the_readme_runs(tmp_path):
    here = Path(__file__).parent
    code, = re.findall(r"```python\n(.*?)```", (here / "README.md").read_text(), re.DOTALL)
    for name in ("train.py", "gspo.py", "moe.py", "data", "results"):
        copy = shutil.copytree if (here / name).is_dir() else shutil.copy
        copy(here / name, tmp_path / name)
    (tmp_path / "data" / "reverse.py").write_text(code)
    command = ("train.py", "--task", "reverse", "--cold_steps", "20", "--steps", "2")
    subprocess.run([sys.executable, *command], cwd=tmp_path, check=True)
