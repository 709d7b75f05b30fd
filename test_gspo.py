"""GSPO as a list of its properties; run `python -m pytest`.

Equation numbers are those of arXiv 2507.18071. Expected values come from closed forms, enumeration,
finite differences or slow obvious versions."""
from functools import partial
from math import exp, inf, log, nan, sqrt

import pytest
import torch
from pytest import approx
from torch.testing import assert_close

import gspo
import moe
from data.rollout import Rollout
from results import hf

ALGORITHMS = tuple(gspo.ALGORITHMS)
every_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS)
tensor = partial(torch.tensor, dtype=torch.float64)

def objective(algorithm, d, A, low=0.2, high=0.2, T=7, padding=0.0, old=-1.0):
    """-> loss, gradient (B, T), stats, of responses with the log-ratios d = log new - log old."""
    mask = torch.arange(T) < torch.tensor([len(row) for row in d])[:, None]
    old = torch.full(mask.shape, -1.0).double() if old == -1 else tensor(old)
    logp = tensor([row + [padding] * (T - len(row)) for row in d]).add(old).requires_grad_()
    A = tensor([a + [9.0] * (T - len(a)) if isinstance(a, list) else a for a in A]).requires_grad_()
    old.requires_grad_()
    loss, clipped = gspo.policy_loss(algorithm, logp, old, A, mask, low, high)
    loss.backward()
    assert old.grad is None and A.grad is None              # only the new policy is moved
    stats = gspo.ratio_stats(logp.detach(), old.detach(), A.detach(), clipped, mask)
    return loss.item(), logp.grad, stats

def by_hand(algorithm, d, A, low, high, T=7):
    """The papers' objectives one number after the other; gradients by central differences."""
    B, N = len(d), sum(map(len, d))
    def term(row, still, t, a):         # `still` stands where a paper stops the gradient
        s, w, mean = exp(sum(row) / len(row)), exp(row[t]), lambda x: sum(x) / len(x)
        clip = lambda x: min(x * a, max(1 - low, min(1 + high, x)) * a)
        tau = 1.0 if a > 0 else 1.05
        return {"gspo": lambda: clip(s), "luspo": lambda: clip(s),
                "gspo_token": lambda: clip(exp(mean(still)) * exp(row[t]) / exp(still[t])),
                "cispo": lambda: max(1 - low, min(1 + high, exp(still[t]))) * a * (row[t] - 1),
                "gmpo": lambda: a * exp(mean([min(x, high) if a > 0 else max(x, -low)
                                              for x in row])),
                "sapo": lambda: 4 / tau / (1 + exp(-tau * (w - 1))) * a,
                "reinforce": lambda: a * (row[t] - 1)}.get(algorithm, lambda: clip(w))()
    def loss(new):
        weight = {"dapo": lambda n: 1 / N, "cispo": lambda n: 1 / N, "luspo": lambda n: 1 / B,
                  "dr_grpo": lambda n: 1 / B / T}.get(algorithm, lambda n: 1 / B / n)
        return -sum(weight(len(row)) * term(row, d[i], t, a[t] if isinstance(a, list) else a)
                    for i, (row, a) in enumerate(zip(new, A)) for t in range(len(row)))
    grad, h = torch.zeros(B, T, dtype=torch.float64), 1e-6
    for i, row in enumerate(d):
        for t in range(len(row)):
            moved = [d[:i] + [row[:t] + [row[t] + x] + row[t + 1:]] + d[i + 1:] for x in (h, -h)]
            grad[i, t] = (loss(moved[0]) - loss(moved[1])) / 2 / h
    return loss(d), grad

def random_batch(seed, scale=0.1, token_advantages=False):
    draw = torch.Generator().manual_seed(seed)
    d, A = ([torch.randn(n, generator=draw).mul(size).tolist() for n in (1, 4, 2, 7, 3, 5)]
            for size in (scale, 1.0))
    return d, A if token_advantages else [row[0] for row in A]

# ------------------------------------------------------------------------------- the objective

FAMILY = "gspo", "gspo_token", "grpo"

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
    *[(name, [[log(s)]], [A], loss, [[slope]]) for name in FAMILY   # one token: all the same;
      for A, s, loss, slope in ((1, 1.5, -1.2, 0), (1, 0.5, -0.5, -0.5),  # the sign decides what
                                (-1, 0.5, 0.8, 0), (-1, 5, 5, 5))],                 # is clipped
    *[(name, [[0], [0, 0, 0]], [1, -1], loss, [[-one, 0, 0], [three] * 3])    # how terms add up
      for loss, one, three, names in (
          (0, 1 / 2, 1 / 6, FAMILY + ("ppo",)), (1 / 2, 1 / 4, 1 / 4, ["dapo"]),
          (1 / 3, 1 / 6, 1 / 6, ["dr_grpo"]), (1, 1 / 2, 1 / 2, ["luspo"])) for name in names],
    ("gmpo", [[3, -3, 0.6]], [1], -exp(-2.2 / 3), [[0, -0.1601017668, 0]]),         # clip 0.4
    ("gmpo", [[3, -3, 0.6]], [-1], exp(3.2 / 3), [[0.9685592490, 0, 0.9685592490]]),
    ("sapo", [[3, -3, 0.6]], [1], -2.631370543, [None]),
    ("sapo", [[3, -3, 0.6]], [-1], 2.505045301, [None]),
    *[("sapo", [[log(w)]], [A], -A * value, [[-A * w * slope]]) for A, w, value, slope in (
        (1, 1, 2, 1), (-1, 1, 2 / 1.05, 1),                 # f(1) = 2 / tau, f'(1) = 1
        (1, 2, 4 / (1 + exp(-1)), 0.7864477), (-1, 2, 4 / 1.05 / (1 + exp(-1.05)), 0.7681097))]])
def test_values_known_in_advance(algorithm, d, A, loss, grad):
    value, gradient, _ = objective(algorithm, d, A, *[0.4, 0.4] * (algorithm == "gmpo"),
                                   T=max(map(len, d)))
    assert value == approx(loss, abs=2e-8)
    assert grad == [None] or torch.allclose(gradient, tensor(grad), atol=1e-7)

def test_cispo_clips_the_weight_and_keeps_the_gradient():
    loss, grad, _ = objective("cispo", [[3, -3, 0.6]], [1], 0.2, 0.28, T=3, old=[[-1, -4, -2]])
    assert loss == approx(1.610666667)
    assert_close(grad, tensor([[-0.426666667, -0.266666667, -0.426666667]]), atol=1e-9, rtol=0)

def test_the_papers_clip_range_on_padded_responses():
    d = [[3e-4, -6e-4, 9e-4], [5e-4], [-2e-4, -6e-4]]       # inside, above, below
    loss, grad, stats = objective("gspo", d, [1, 0.5, -1.5], *gspo.ALGORITHMS["gspo"].clip)
    assert loss == approx(-0.00028334, abs=1e-11) and (grad[1:] == 0).all()
    assert_close(grad[0, :3], tensor([-0.111133336] * 3), atol=1e-9, rtol=0)
    assert [stats["clip_high"], stats["clip_low"]] == approx([1 / 6, 2 / 6])
    assert [stats["clip_high_seq"], stats["clip_low_seq"]] == approx([1 / 3, 1 / 3])

@every_algorithm
@pytest.mark.parametrize("seed", range(3))
def test_value_and_gradient_on_random_batches(algorithm, seed):
    for token_advantages in {False, algorithm not in ("gspo", "luspo", "gmpo")}:
        batch = *random_batch(seed, 0.1, token_advantages), 0.03, 0.04
        loss, grad, stats = objective(algorithm, *batch)
        expected, expected_grad = by_hand(algorithm, *batch)
        assert loss == approx(expected, abs=1e-12)
        assert_close(grad, expected_grad, atol=1e-8, rtol=0)
        share = (grad != 0).sum() / sum(map(len, batch[0]))
        assert stats["clip_low"] + stats["clip_high"] == approx(1 - share) or \
            algorithm == "cispo" and share == 1

@every_algorithm
def test_on_the_sampling_policy_every_algorithm_is_reinforce(algorithm):
    d, A = random_batch(0, scale=0)
    loss, grad, stats = objective(algorithm, d, A, 3e-4, 4e-4)
    assert not any(stats.values())
    weight = {"dapo": lambda n: 1 / 22, "cispo": lambda n: 1 / 22, "luspo": lambda n: 1 / 6,
              "dr_grpo": lambda n: 1 / 6 / 7}.get(algorithm, lambda n: 1 / 6 / n)
    assert_close(grad, tensor([[-a * weight(len(row))] * len(row) + [0] * (7 - len(row))
                               for row, a in zip(d, A)]), atol=1e-12, rtol=0)
    assert objective(algorithm, [[0]], [1], 0, 0, T=1)[1] == -1     # on the edge: not yet clipped

@pytest.mark.parametrize("seed", range(3))
def test_relations_between_objectives(seed):
    def same(one, other, *batch):
        (loss, grad, _), (loss2, grad2, _) = (objective(*x, *batch) for x in (one, other))
        return loss == approx(loss2, abs=1e-12) and torch.allclose(grad, grad2, atol=1e-12)
    d, A = random_batch(seed)
    short = [row[:1] for row in d]
    assert same(["gspo"], ["gspo_token"], d, A, 0.03, 0.04)
    assert same(["gspo"], ["grpo"], short, A, 0.03, 0.04)           # one token: no difference
    assert same(["gspo"], ["gmpo"], d, A, 9, 9)                     # only the clip differs
    assert not same(["gspo"], ["gmpo"], d, A, 0.03, 0.04) and not same(["gspo"], ["grpo"], d, A)
    # DeepSeek-V3.2's off-policy mask: drop a response if A < 0 and mean log(old / new) > delta.
    delta = 0.02
    _, grad, _ = objective("gspo", d, A, 1 - exp(-delta), 99)
    for row, a, slopes in zip(d, A, grad):
        dropped = a < 0 and -sum(row) / len(row) > delta
        assert (slopes[:len(row)] == 0).all() == dropped

@every_algorithm
@pytest.mark.parametrize("padding", [123.0, -inf, nan])
def test_padding_and_the_order_of_responses_do_not_matter(algorithm, padding):
    d, A = random_batch(1)
    loss, grad, stats = objective(algorithm, d, A, 0.03, 0.04)
    loss2, grad2, stats2 = objective(algorithm, d[::-1], A[::-1], 0.03, 0.04, 9, padding)
    longer = 9 / 7 if algorithm == "dr_grpo" else 1         # it divides by the longest length
    assert loss2 * longer == approx(loss, abs=1e-15) and stats2 == approx(stats)
    assert_close(grad2.flip(0) * longer, torch.nn.functional.pad(grad, (0, 2)))

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
    assert logp.grad.isfinite().all()
    assert algorithm not in FAMILY or loss.item() == approx(expected)

@pytest.mark.parametrize("algorithm", FAMILY)
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

@pytest.mark.parametrize("algorithm, true", [("gspo", False), ("luspo", True)])
def test_gspo_prefers_short_responses_and_luspo_is_the_true_gradient(algorithm, true):
    theta = tensor([0.3, -0.2]).requires_grad_()            # logits of going on at step 1 and 2
    go, stop = torch.nn.functional.logsigmoid(theta), torch.nn.functional.logsigmoid(-theta)
    outcomes = [(stop[:1], 1), (torch.stack((go[0], stop[1])), 0), (go, 1)]
    J = sum(logp.sum().exp() * reward for logp, reward in outcomes)
    gradient = 0
    for logp, reward in outcomes:
        loss, _ = gspo.policy_loss(algorithm, logp[None], logp[None], reward - J[None],
                                   torch.ones(1, len(logp)) > 0, 3e-4, 4e-4)
        gradient = gradient - logp.sum().exp().detach() * torch.autograd.grad(
            loss, theta, retain_graph=True)[0]
    exact, = torch.autograd.grad(J, theta)
    assert_close(exact, tensor([-0.134411, 0.142184]), atol=1e-6, rtol=0)
    expected = exact if true else tensor([-0.105812, 0.071092])
    assert_close(gradient, expected, atol=1e-6, rtol=0)

def test_kl_to_the_reference_is_exact_on_average_and_one_golden_value():
    logits, reference = torch.randn(2, 5, dtype=torch.float64)
    policy, reference = logits.log_softmax(0), reference.log_softmax(0)
    each, everything = policy[:, None], torch.ones(5, 1) > 0        # every token, ...
    k3 = gspo.kl_loss(each, reference[:, None], everything, policy.exp())   # ... as often as it is
    assert k3 == approx((policy.exp() * (policy - reference)).sum().item()) and k3 > 0
    for d, value, slope in (0.1, 0.0048374180, 0.0951625820), (-0.1, 0.0051709181, -0.1051709181):
        logp = tensor([[d - 1, 7]]).requires_grad_()
        loss = gspo.kl_loss(logp, tensor([[-1, nan]]), logp < 5, tensor([1]))
        assert loss.item() == approx(value) and torch.autograd.grad(
            loss, logp)[0].tolist() == [[approx(slope), 0]]

def test_generalised_advantages_by_their_definition():
    rewards, values, gamma, lam = *torch.randn(2, 3, 7, dtype=torch.float64), 0.9, 0.8
    ends = [7, 1, 4]                                        # after its end a row is 0
    rewards, values = ([[x * (t < n) for t, x in enumerate(row)]
                        for row, n in zip(xs.tolist(), ends)] for xs in (rewards, values))
    delta = lambda b, t: rewards[b][t] + gamma * (values[b] + [0])[t + 1] - values[b][t]
    expected = [[sum((gamma * lam) ** (k - t) * delta(b, k) for k in range(t, 7)) for t in range(7)]
                for b in range(3)]
    assert_close(gspo.gae(tensor(rewards), tensor(values), gamma, lam), tensor(expected))

def test_ppo_pays_the_last_token_and_clips_the_values():
    r, reward = sample(tiny()), torch.arange(12.0)
    A, critic = gspo.ppo_advantages(r, None, 0 * r.logp, reward, 1.0, 1.0)
    assert (critic.returns[r.mask] == reward[:, None].expand_as(A)[r.mask]).all()
    assert A[r.mask].mean().abs() < 1e-6 and A[r.mask].std() == approx(1, rel=1e-5)
    for value, loss, slope in (0.1, 0.405, -0.9), (0.5, 0.32, 0), (-0.5, 1.125, -1.5):
        value = tensor([[value]]).requires_grad_()          # before 0, return 1, clip 0.2
        error = gspo.value_loss(value, tensor([[0]]), tensor([[1]]), value < 9, tensor([1]))
        assert error.item() == approx(loss)
        assert torch.autograd.grad(error, value)[0].item() == approx(slope)

def test_weights_of_tokens_that_the_sampler_saw_otherwise():
    ratio = tensor([[0.1, 0.6, 1, 3, 9]])
    for kind, expected in ("tis", [0.1, 0.6, 1, 2, 2]), ("icepop", [0, 0.6, 1, 3, 0]):
        weights = gspo.mismatch_weights(kind, ratio.log() - 2, 0 * ratio - 2)
        assert_close(weights, tensor([expected]))

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

@pytest.mark.parametrize("replayed, N, width", [
    (None, 20, 8), (None, 300, 8), (None, 300, 7), ([1, 3, 0], 20, 8), ([2], 200, 8)])
def test_experts_against_one_token_at_a_time(replayed, N, width):
    """Few tokens go through the experts in one padded batch, many, or uneven ones, do not."""
    experts, x = tiny(n_active=3, d_expert=width).layers[0].experts, torch.randn(N, 16)
    token, y, routes, _ = experts(x, replayed and torch.tensor([replayed] * N))
    y = torch.stack([y[token == n].sum(0) for n in range(N)])
    for n, logits in enumerate(experts.router(x)):
        active, expected = replayed or logits.argsort(descending=True)[:3].tolist(), 0
        for gate, e in zip(logits[active].softmax(0), active):      # softmax over the active ones
            left, right = experts.gate[e] @ x[n], experts.up[e] @ x[n]
            expected = expected + gate * experts.down[e] @ (left * left.sigmoid() * right)
        assert routes[n].tolist() == active
        assert_close(y[n], expected, atol=1e-5, rtol=1e-5)

@pytest.mark.parametrize("shape", [(5, 16), (5, 3, 4)])
def test_rms_norm_and_its_gradient(shape):
    x, weight = torch.randn(shape).double().requires_grad_(), torch.randn(shape[1:]).double()
    norm = lambda x, weight: moe.rms_norm(x, weight, 0.1)
    assert torch.autograd.gradcheck(norm, (x, weight.requires_grad_()))
    expected = x / (x.pow(2).sum(-1, keepdim=True) / shape[-1] + 0.1).sqrt() * weight
    assert_close(norm(x, weight), expected)
    with torch.no_grad():                                   # the sampler's way
        assert_close(norm(x, weight), expected)

def test_the_prompt_of_a_group_is_computed_once_and_nothing_else_changes():
    r, computed, results = sample(tiny()), [], []
    tokens, keep, _, _, source = r.select(torch.randperm(12))
    for once in (source, None):
        model = tiny()
        model.layers[0].experts.register_forward_hook(lambda _, x, y: computed.append(len(x[0])))
        out = model(tokens, keep=keep, source=once)
        (out.logits.cos().sum() + out.router.cos().sum()).backward()
        results.append([*out, *(p.grad for p in model.parameters())])
    assert computed[1] - computed[0] == 3 * sum(map(len, PROMPTS))          # G = 4
    assert_close(*results, atol=1e-4, rtol=1e-4)

def test_balance_loss_is_1_for_even_use_and_E_over_K_if_all_tokens_use_the_same():
    for second, balance in ([2, 3], 1), ([0, 1], 2):
        routes = torch.tensor([[[[0, 1], second]]])                     # (L, B, T, K): 1, 1, 2, 2
        logits = torch.full((1, 1, 2, 4), -inf).scatter(-1, routes, 7.0)
        assert moe.balance_loss(moe.Output(None, None, routes, logits)).item() == balance

def test_gradient_through_the_model_by_finite_differences():
    model = tiny().double()
    r, A = sample(model, T=4), torch.randn(12)
    tokens, keep, mask, routes, _ = r.select(torch.arange(12))  # no gradient where a route flips
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

def test_replay_makes_the_log_probs_continuous_in_the_weights():
    """Without it they jump where a router changes its mind."""
    model = tiny().double()
    r, moved = sample(model), tiny(5).double()
    def jumps(replay, n=300):
        logps = []
        for h in torch.linspace(0, 0.05, n, dtype=torch.float64):
            now = tiny().double()
            for p, q in zip(now.parameters(), moved.parameters()):
                p.data += h * q.data
            with torch.no_grad():
                logps.append(gspo.score(now, r, torch.arange(12), replay=replay)[0])
        steps = torch.stack(logps).diff(dim=0).abs().flatten(1).amax(dim=1)
        return (steps.max() / steps.median()).item()
    assert jumps(replay=True) < 3 and jumps(replay=False) > 30

def test_replay_where_there_is_nothing_to_choose():
    everyone, tokens = tiny(n_active=4), torch.randint(12, (3, 8))      # K = E
    assert torch.equal(everyone(tokens, everyone(tokens).routes).logits, everyone(tokens).logits)
    alone = tiny(n_active=1)        # a gate of 1, whatever the router says: it cannot learn
    alone(tokens).logits.logsumexp(-1).sum().backward()
    assert all(layer.experts.router.weight.grad.abs().max() < 1e-6 for layer in alone.layers)

@pytest.mark.parametrize("kind", ["r2", "r3"])
def test_replay_is_a_no_op_at_equal_weights(kind):
    model, rows = tiny(), torch.arange(12)
    r = sample(model) if kind == "r3" else gspo.rescore(model, sample(model), micro_tokens=50)[0]
    free, replayed = (gspo.score(model, r, rows, replay=replay) for replay in (False, True))
    assert torch.equal(free[0], replayed[0]) and torch.equal(free[1].logits, replayed[1].logits)

def test_routing_stats_compare_sets_and_count():
    old = torch.tensor([[[0, 1], [1, 0]], [[2, 3], [3, 1]]])        # (M, L, K): M = L = K = 2
    new, logits = torch.tensor([[[1, 0], [2, 3]], [[1, 3], [0, 1]]]), torch.full((2, 2, 4), 7.0)
    there, back = gspo.routing_stats(old, new, logits), gspo.routing_stats(new, old, logits)
    assert there["expert_change"] == back["expert_change"] == [0.25, 0.75]
    assert there["expert_load"] == [2, 1] and there["router_entropy"] == approx([log(4)] * 2)

def test_weights_travel_to_transformers_and_back():
    model, tokens = tiny(rope_theta=500.0, norm_eps=1e-3, n_active=3), torch.randint(12, (3, 16))
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)                 # no norm keeps its weight of 1
    logits, (config, state) = model(tokens).logits, hf.to_hf(model)
    split = {name: x for name, x in state.items() if "experts" not in name}
    for at, e in ((f"model.layers.{i}.mlp.experts.", e) for i in range(2) for e in range(4)):
        parts = *state[at + "gate_up_proj"][e].chunk(2), state[at + "down_proj"][e]
        split |= {f"{at}{e}.{k}_proj.weight": x for k, x in zip(("gate", "up", "down"), parts)}
    for back in (hf.from_hf(config, state), hf.from_hf(config, split)):
        assert back.config == model.config and torch.equal(back(tokens).logits, logits)
    peer = pytest.importorskip("transformers")
    theirs = peer.Qwen3MoeForCausalLM(peer.Qwen3MoeConfig(**config))
    theirs.load_state_dict(state, strict=True)
    assert_close(theirs(tokens).logits, logits, atol=1e-4, rtol=1e-4)

# ------------------------------------------------------------------------ sampling and scoring

@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_log_probs_and_routes_are_those_of_scoring(temperature):
    model, rows = tiny(), torch.randperm(12)
    r = sample(model, temperature=temperature)
    scored, _, _, routing = gspo.score(model, r, rows, temperature)
    for logp, row in zip(scored, rows.tolist()):
        expected = slow_logp(model, r, row, temperature)
        assert_close(torch.stack((logp, r.logp[row]))[:, r.mask[row]],
                     torch.stack((expected, expected)), atol=1e-5, rtol=0)
    assert gspo.routing_stats(*routing)["expert_change"] == [0, 0]
    again, _ = gspo.rescore(model, r, temperature, micro_tokens=20)
    assert_close(again.logp, r.logp, atol=1e-5, rtol=0)
    (_, keep, _, routes, _), sampled = again.select(rows), r.select(rows)[3]
    assert torch.equal(routes[:, keep], sampled[:, keep])

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

def test_a_token_without_probability_is_never_chosen():
    luck, p = torch.tensor([0, 0.25, 0.26, 0.75, 1 - 2 ** -24, 1]), torch.tensor([1, 0, 2, 1, 0])
    for total in (4, 3.9999998, 4.0000005):                 # the sum of p may be off by a rounding
        assert moe.choose((p / total).repeat(6, 1), luck).tolist() == [0, 2, 2, 3, 3, 3]

def test_a_response_depends_on_its_prompt_and_its_luck_alone():
    r, again, other = sample(tiny()), sample(tiny()), sample(tiny(), [[2, 8], [9], *PROMPTS[2:]])
    assert torch.equal(r.tokens, again.tokens) and torch.equal(r.routes, again.routes)
    assert torch.equal(r.tokens[8:] * r.mask[8:], other.tokens[8:] * other.mask[8:])
    assert_close(r.logp[8:], other.logp[8:])                        # the third prompt's responses
    for row, n in enumerate(r.lengths[8:].tolist(), start=8):           # the last token has none
        assert torch.equal(*(x.routes[:, row, :5 + n - 1] for x in (r, other)))
    assert not torch.equal(sample(tiny(), seed=1).logp, r.logp)

def test_joined_rollouts_keep_their_rows():
    one, two = sample(tiny(), T=3), sample(tiny(), [[2], [3]], seed=1)
    both = Rollout.join([one, two], [[2, 0], [1]])
    assert both.prompts == [PROMPTS[2], PROMPTS[0], [3]]
    for row, (r, old) in enumerate([(one, i) for i in (8, 9, 10, 11, 0, 1, 2, 3)]
                                   + [(two, i) for i in (4, 5, 6, 7)]):
        assert_close(gspo.score(tiny(), both, torch.tensor([row]))[0][both.mask[[row]]],
                     r.logp[old][r.mask[old]], atol=1e-5, rtol=0)
        width = r.routes.shape[2]
        assert both.lengths[row] == r.lengths[old]
        assert torch.equal(both.routes[:, row, :width], r.routes[:, old])

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
    (lambda **wrong: hf.from_hf(hf.to_hf(tiny())[0] | wrong, {}), dict(norm_topk_prob=False))])
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
    return model, rollout, gspo.group_advantages(rewards).flatten()

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
            J = J + torch.min(s * A[row], s.clamp(0.99, 1.01) * A[row]) / 4 / len(group)
        assert whole["loss"] == approx(-J.item(), abs=1e-6)
        assert all(parts[name] == approx(whole[name], rel=1e-3, abs=1e-5) for name in whole)
        for p, g in zip(slow.parameters(), torch.autograd.grad(J, list(slow.parameters()))):
            p.data += 0.1 * g
    assert_close(list(model.parameters()), list(slow.parameters()), atol=1e-6, rtol=1e-5)

def test_the_ratio_is_1_in_the_first_mini_batch_and_drifts_from_then_on():
    model = tiny()
    r, A = sample(model, PROMPTS * 4), gspo.group_advantages(torch.rand(12, 4)).flatten()
    first, *later = gspo.update(model, torch.optim.AdamW(model.parameters(), lr=1e-2), r, A, "gspo",
                                *gspo.ALGORITHMS["gspo"].clip, mini_batches=4)
    assert first["clip_low"] == first["clip_high"] == 0 and first["log_s_std"] < 1e-6
    assert first["expert_change"] == [0, 0] and 0 < first["entropy"] < log(12) and len(later) == 3
    assert all(m["log_s_std"] > 1e-3 and m["clip_low"] + m["clip_high"] > 0 for m in later)

def test_a_gradient_that_is_not_finite_never_reaches_the_weights():
    model, r, A = drifted()
    with pytest.raises(FloatingPointError):
        gspo.update(model, torch.optim.AdamW(model.parameters()), r, A * nan, "gspo", 0.1, 0.1)
    assert_close(list(model.parameters()), list(drifted()[0].parameters()), atol=0, rtol=0)
