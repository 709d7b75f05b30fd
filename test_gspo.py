"""GSPO as a list of its properties. To check them all, run `python -m pytest test_gspo.py`.

Equation numbers are those of arXiv 2507.18071. What a test expects comes from a closed form, an
enumeration, finite differences, or a slow and obvious version of the same thing. lab/tests/ has the
tests of the other objectives and of all else that options can add.
"""
import copy
import doctest
from functools import partial
from math import exp, inf, log, nan, sqrt
from types import SimpleNamespace

import pytest
import torch
from pytest import approx
from torch.nn import functional as F
from torch.testing import assert_close

import gspo
import moe
from moe import MoEConfig, MoETransformer, Rollout

tensor = partial(torch.tensor, dtype=torch.float64)
exactly = partial(assert_close, atol=1e-12, rtol=0)     # for float64
closely = partial(assert_close, atol=1e-5, rtol=0)      # for float32
parametrize = pytest.mark.parametrize
both = parametrize("algorithm", ["gspo", "grpo"])
three_seeds = parametrize("seed", range(3))


def cases(names, table):
    """Parametrize a test with the rows of a table, a dict from what a row is called to the row."""
    return parametrize(names, list(table.values()), ids=list(table))


@pytest.fixture(autouse=True)
def one_thread_and_one_seed():
    """The models are so small that a second thread only costs time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


# ---------------------------------------------------------------------------- the objectives

OLD_LOGP = -1.0     # of every token, unless a test says otherwise


def filled(rows, width, filler=0.0):
    """Lists of different lengths -> a tensor (B, width), filled up on the right."""
    return tensor([row + [filler] * (width - len(row)) for row in rows])


def mask_of(rows, width):
    return filled([[1.0] * len(row) for row in rows], width) > 0


def evaluate(algorithm, d, A, low=0.2, high=0.2, width=None, filler=0.0, dtype=torch.bool):
    """The loss of responses whose tokens have the log-ratios d, which are log new - log old; its
    gradient for the new log-probs; and which tokens are clipped. A has one advantage for each
    response, or a list with one for each token."""
    width = width or max(map(len, d))
    mask = mask_of(d, width)
    A = filled(A, width, filler) if isinstance(A[0], list) else tensor(A)
    logp_old = torch.full(mask.shape, OLD_LOGP).double()
    logp = logp_old + filled(d, width, filler)
    for x in (logp, logp_old, A):
        x.requires_grad_()
    loss, clipped = gspo.policy_loss(algorithm, logp, logp_old, A, mask.to(dtype), low, high)
    loss.backward()
    assert logp_old.grad is None and A.grad is None         # only the new policy is moved
    return SimpleNamespace(loss=loss.item(), grad=logp.grad, clipped=clipped)


def random_batch(seed, scale=0.1):
    """Log-ratios of six responses, of 1 to 7 tokens, and their advantages."""
    draw = torch.Generator().manual_seed(seed)
    d = [torch.randn(n, generator=draw).mul(scale).tolist() for n in (1, 4, 2, 7, 3, 5)]
    return d, torch.randn(6, generator=draw).tolist()


def mean(numbers):
    return sum(numbers) / len(numbers)


def clip_by_hand(ratio, a, low, high):
    return min(ratio * a, max(1 - low, min(1 + high, ratio)) * a)


def loss_by_hand(algorithm, A, low, high, d):
    """Eq. 5 and Eq. 2, one number after the other; A has a list of advantages per response."""
    J = 0.0
    for row, a in zip(d, A):
        for t in range(len(row)):
            ratio = exp(mean(row)) if algorithm == "gspo" else exp(row[t])
            J += clip_by_hand(ratio, a[t], low, high) / len(d) / len(row)
    return -J


def assert_value_and_gradient(result, loss, d, h=1e-6):
    """The result is loss(d) and its slopes, by finite differences; the slope of padding is 0."""
    assert result.loss == approx(loss(d), abs=1e-12)
    for i, row in enumerate(d):
        for t in range(len(row)):
            up = copy.deepcopy(d)
            down = copy.deepcopy(d)
            up[i][t] += h
            down[i][t] -= h
            slope = (loss(up) - loss(down)) / (2 * h)
            assert result.grad[i, t].item() == approx(slope, abs=1e-8)
    assert not result.grad[~mask_of(d, result.grad.shape[1])].any()


@three_seeds
@parametrize("algorithm, per_token", [("gspo", False), ("grpo", False), ("grpo", True)])
def test_value_and_gradient_are_those_of_the_paper(algorithm, per_token, seed):
    d, A = random_batch(seed)
    A_of_tokens = [[a] * len(row) for a, row in zip(A, d)]
    if per_token:
        A_of_tokens, _ = random_batch(seed + 10, scale=1.0)
        A = A_of_tokens
    loss = partial(loss_by_hand, algorithm, A_of_tokens, 0.03, 0.04)
    assert_value_and_gradient(evaluate(algorithm, d, A, 0.03, 0.04), loss, d)


OUTLIERS = [[3.0, -3.0, 0.6]]       # their mean is 0.2, the clip range


@cases("algorithm, d, A, loss, grad", {
    "gspo": ("gspo", [[0.3, -0.1, 0.1]], [1.0], -exp(0.1), [[-exp(0.1) / 3] * 3]),
    "gspo, a response without tokens is worth 0 but counts":
        ("gspo", [[0.3, -0.1, 0.1], []], [1.0, 9.0], -exp(0.1) / 2, [[-exp(0.1) / 6] * 3, [0] * 3]),
    "gspo, good": ("gspo", OUTLIERS, [1.0], -1.2, [[0, 0, 0]]),
    "gspo, bad": ("gspo", OUTLIERS, [-1.0], exp(0.2), [[exp(0.2) / 3] * 3]),
    "grpo, good": ("grpo", OUTLIERS, [1.0], -0.8165956895, [[0, -0.0165956895, 0]]),
    "grpo, bad": ("grpo", OUTLIERS, [-1.0], 7.5692185745, [[6.6951789744, 0, 0.6073729335]])})
def test_values_known_in_advance(algorithm, d, A, loss, grad):
    result = evaluate(algorithm, d, A)
    assert result.loss == approx(loss, abs=1e-9)
    assert_close(result.grad, tensor(grad), atol=1e-7, rtol=0)


both_signs_and_sides = cases("A, ratio, loss, slope", {
    "good and likelier: clipped": (1.0, 1.5, -1.2, 0),
    "good and less likely: kept": (1.0, 0.5, -0.5, -0.5),
    "bad and less likely: clipped": (-1.0, 0.5, 0.8, 0),
    "bad and likelier: kept, however far": (-1.0, 5.0, 5, 5)})


@both
@both_signs_and_sides
def test_the_sign_of_the_advantage_decides_which_side_is_clipped(algorithm, A, ratio, loss, slope):
    result = evaluate(algorithm, [[log(ratio)]], [A])
    assert result.loss == approx(loss)
    assert result.grad.item() == approx(slope)
    assert result.clipped.item() == (slope == 0)


@both
def test_a_ratio_on_the_edge_of_its_range_is_not_clipped(algorithm):
    result = evaluate(algorithm, [[0.0]], [1.0], 0.0, 0.0)
    assert result.grad.item() == -1
    assert not result.clipped.item()


@both
def test_clipped_tokens_are_those_without_gradient(algorithm):
    d, A = random_batch(0)
    result = evaluate(algorithm, d, A, 0.03, 0.04)
    assert torch.equal(result.clipped, mask_of(d, 7) & (result.grad == 0))
    assert result.clipped.any()


@parametrize("algorithm, low, high", [("gspo", 3e-3, 4e-3), ("grpo", 0.2, 0.27)])
def test_a_clip_range_that_is_left_out_is_that_of_the_algorithm(algorithm, low, high):
    d, A = random_batch(0)
    given = evaluate(algorithm, d, A, low, high).loss
    assert evaluate(algorithm, d, A, None, high).loss == given
    assert evaluate(algorithm, d, A, low, None).loss == given


SAME_MEANS = [[0.02], [0.02, 0.02, 0.02], [0.06, 0.0, 0.0], [0.05, -0.02, 0.03] * 2]


@parametrize("d", SAME_MEANS, ids=str)
def test_gspo_sees_only_the_mean_of_the_log_ratios(d):
    result = evaluate("gspo", [d], [-1.0])
    assert result.loss == approx(exp(0.02))
    exactly(result.grad, tensor([[exp(0.02) / len(d)] * len(d)]))


def test_grpo_sees_the_mean_of_the_ratios_which_is_larger():
    one, even, *uneven = [evaluate("grpo", [d], [-1.0]).loss for d in SAME_MEANS]
    assert one == approx(exp(0.02))
    assert even == approx(exp(0.02))
    assert min(uneven) > exp(0.02) + 1e-4


@both
@parametrize("filler, dtype", [(123.0, torch.bool), (-inf, torch.long), (nan, torch.float)])
def test_neither_padding_nor_order_nor_the_type_of_the_mask_matters(algorithm, filler, dtype):
    d, A = random_batch(1)
    one = evaluate(algorithm, d, A, 0.03, 0.04)
    two = evaluate(algorithm, d[::-1], A[::-1], 0.03, 0.04, 9, filler, dtype)
    assert two.loss == approx(one.loss, abs=1e-15)
    exactly(two.grad.flip(0), F.pad(one.grad, (0, 2)))
    assert torch.equal(two.clipped.flip(0), F.pad(one.clipped, (0, 2)))


@both
@parametrize("d, A, loss", [(999.0, 1.0, -1.2), (-999.0, -1.0, 0.8), (999.0, -1.0, exp(20))])
def test_a_huge_ratio_has_no_gradient(algorithm, d, A, loss):
    result = evaluate(algorithm, [[d] * 3], [A])            # exp(999) is infinite
    assert result.loss == approx(loss)
    assert result.grad.tolist() == [[0, 0, 0]]


@parametrize("module, examples", [(gspo, 5), (moe, 0)], ids=["gspo", "moe"])
def test_the_examples_in_the_docstrings(module, examples):
    result = doctest.testmod(module)
    assert result.failed == 0
    assert result.attempted >= examples


# ---------------------------------------------------------------------------- advantages

@parametrize("G, k", [(4, 1), (8, 1), (8, 5), (3, 2)])
def test_advantages_when_k_of_G_responses_succeed(G, k):
    rewards = tensor([[1.0] * k + [0.0] * (G - k)])
    p = k / G
    good = sqrt((G - 1) / G) * sqrt((1 - p) / p)
    bad = sqrt((G - 1) / G) * -sqrt(p / (1 - p))
    expected = tensor([[good] * k + [bad] * (G - k)])
    exactly(gspo.group_advantages(rewards), expected)
    exactly(gspo.group_advantages(3 * rewards + 7), expected)


def test_the_smallest_difference_of_rewards_is_one():
    advantages = gspo.group_advantages(torch.tensor([[0, 1e-45, 0, 0]]))
    closely(advantages, torch.tensor([[-0.5, 1.5, -0.5, -0.5]]))


def test_the_advantages_of_a_group_come_from_its_own_rewards():
    rewards = tensor([[1, 0, 0, 0], [9, 5, 5, 9], [2, 2, 2, 2], [0, 0, 0, 1]])
    high = sqrt(3) / 2
    exactly(gspo.group_advantages(rewards), tensor([
        [1.5, -0.5, -0.5, -0.5], [high, -high, -high, high], [0] * 4, [-0.5, -0.5, -0.5, 1.5]]))


@parametrize("dtype", [torch.long, torch.bool, torch.bfloat16], ids=str)
def test_rewards_may_have_any_type(dtype):
    advantages = gspo.group_advantages(torch.tensor([[1, 0, 0, 1]], dtype=dtype))
    closely(advantages, torch.tensor([[1, -1, -1, 1]]) * sqrt(3) / 2)


def test_a_group_of_equal_rewards_has_advantages_of_exactly_0():
    assert not gspo.group_advantages(torch.full((2, 8), 0.1)).any()


# ---------------------------------------------------------------------------- the model

PROMPTS = [[3, 4, 5], [6], [7, 2, 8, 9, 4]]
END = 1


def tiny(seed=0, **sizes):
    torch.manual_seed(seed)
    small = {"vocab_size": 12, "max_length": 16, "n_layer": 2, "d_model": 16, "n_expert": 4,
             "d_expert": 8}
    return MoETransformer(MoEConfig(**small | sizes))


def sample(model, prompts=PROMPTS, group_size=4, max_new_tokens=6, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(len(prompts) * group_size, max_new_tokens, generator=generator)
    options = {"eos_id": END, "uniform": uniform} | options
    return moe.generate(model, prompts, group_size, max_new_tokens, **options)


def alone(model, tokens):
    """A forward pass for one row of tokens (n,) without padding."""
    return model(tokens[None], torch.ones(1, len(tokens)) > 0)


def slow_scores(model, rollout, row, temperature=1.0):
    """Log-probs (n,) and entropies (n,) of one response: no batch, no padding, no cache."""
    tokens = rollout.tokens[row, rollout.mask[row]]
    n = rollout.lengths[row]
    log_probs = (alone(model, tokens).logits[0, -n - 1:-1] / temperature).log_softmax(dim=-1)
    return log_probs[range(n), tokens[-n:]], torch.special.entr(log_probs.exp()).sum(dim=-1)


def full(width=8):
    """Random tokens (3, width) and a mask without padding."""
    return torch.randint(12, (3, width)), torch.ones(3, width) > 0


def padded(side, width):
    """Rows of 5, 3 and 1 tokens with padding on one side -> tokens and mask (3, width). In padding
    stand random tokens that are not even in the vocabulary."""
    lengths = torch.tensor([[5], [3], [1]])
    columns = torch.arange(width)
    mask = columns >= width - lengths if side == "left" else columns < lengths
    tokens = torch.randint(100, 1000, (3, width))
    tokens[mask] = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 5])
    return tokens, mask


every_padding = parametrize("side, width", [("left", 5), ("left", 16), ("right", 5), ("right", 16)])


def test_unpad_lists_the_real_tokens_and_pad_puts_them_back():
    x = torch.tensor([[0, 3, 10, 7], [4, 5, 10, 0]])
    places = torch.tensor([1, 2, 3, 4, 5, 6])
    flat = moe.unpad(x, places)
    assert flat.tolist() == [3, 10, 7, 4, 5, 10]
    assert torch.equal(moe.pad(flat, places, (2, 4)), x)
    wide = torch.randn(6, 2, 5)
    assert torch.equal(moe.unpad(moe.pad(wide, places, (2, 4)), places), wide)


@every_padding
def test_padding_changes_no_real_token_and_is_0_itself(side, width):
    model = tiny()
    tokens, mask = padded(side, width)
    out = model(tokens, mask)
    for row, real in enumerate(mask):
        expected = alone(model, tokens[row, real])
        closely(out.logits[row, real], expected.logits[0])
        assert torch.equal(out.routes[row, real], expected.routes[0])
    assert not any(x[~mask].any() for x in out)


@every_padding
@parametrize("cast", [MoETransformer.float, MoETransformer.bfloat16])
def test_padding_brings_no_nan_into_the_output_or_a_gradient(side, width, cast):
    model = cast(tiny())
    out = model(*padded(side, width))
    assert all(x.isfinite().all() for x in out)
    out.logits.float().logsumexp(dim=-1).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@every_padding
@parametrize("columns", [1, 3])
def test_a_pass_with_a_cache_a_few_columns_at_a_time_is_like_one_without(side, width, columns):
    model = tiny()
    tokens, mask = padded(side, width)
    whole = model(tokens, mask)
    cache = moe.KVCache()
    pieces = zip(tokens.split(columns, dim=1), mask.split(columns, dim=1))
    parts = [model(new_tokens, new_mask, cache=cache) for new_tokens, new_mask in pieces]
    closely(torch.cat([part.logits for part in parts], dim=1), whole.logits)
    assert torch.equal(torch.cat([part.routes for part in parts], dim=1), whole.routes)


def test_logits_to_keep_gives_those_of_the_last_columns():
    model = tiny()
    tokens, mask = padded("left", 8)
    whole = model(tokens, mask)
    last = model(tokens, mask, logits_to_keep=3)
    closely(last.logits, whole.logits[:, -3:])
    closely(last.hidden, whole.hidden[:, -3:])
    assert torch.equal(last.routes, whole.routes)


def rotate_by_hand(x, position):
    """Turn the pairs of neighbours in one head x (4,) by 1 and by 1/100 radian a position."""
    angle = position * torch.tensor([1.0, 0.01])
    left = x[0::2] * angle.cos() - x[1::2] * angle.sin()
    right = x[0::2] * angle.sin() + x[1::2] * angle.cos()
    return torch.stack((left, right), dim=1).flatten()


def inputs_and_output(module, model, tokens):
    """What a module of the model gets and gives in a pass for one row of tokens."""
    seen = []

    def look(module, inputs, output):
        seen.append((inputs, output))
    with module.register_forward_hook(look):
        alone(model, tokens)
    return seen[0]


def test_attention_is_that_of_one_query_and_one_head_at_a_time():
    model = tiny()                                          # 4 query heads, 2 key/value heads
    attention = model.layers[1].attention
    torch.nn.init.normal_(attention.q_norm.weight)
    torch.nn.init.normal_(attention.k_norm.weight)
    (x, *_), y = inputs_and_output(attention, model, torch.tensor([3, 1, 4, 1, 5]))
    for t in range(5):
        heads = []
        for h in range(4):
            query = attention.q(x[t]).view(4, 4)[h]
            keys = attention.k(x[:t + 1]).view(t + 1, 2, 4)[:, h // 2]
            values = attention.v(x[:t + 1]).view(t + 1, 2, 4)[:, h // 2]
            query = rotate_by_hand(attention.q_norm(query), t)
            keys = [rotate_by_hand(attention.k_norm(key), i) for i, key in enumerate(keys)]
            weights = (torch.stack(keys) @ query / 2).softmax(dim=0)        # 2 is sqrt(4)
            heads.append(weights @ values)
        closely(y[t], attention.o(torch.cat(heads)))


@parametrize("replayed", [None, [1, 3, 0], [2, 0, 1]], ids=str)
def test_experts_are_those_of_one_token_at_a_time(replayed):
    experts = tiny(n_active=3).layers[0].experts
    x = torch.randn(20, 16)
    y, routes, _ = experts(x, None if replayed is None else torch.tensor([replayed] * 20))
    for n, logits in enumerate(experts.router(x)):
        active = replayed or logits.argsort(descending=True)[:3].tolist()
        expected = torch.zeros(16)
        for weight, e in zip(logits[active].softmax(0), active):        # over the active ones
            left = experts.gate[e] @ x[n]
            right = experts.up[e] @ x[n]
            expected += weight * (experts.down[e] @ (left * left.sigmoid() * right))
        assert routes[n].tolist() == active
        closely(y[n], expected)


@cases("second, balance", {"even use": ([2, 3], 1), "all use the same": ([0, 1], 2)})
def test_balance_loss_is_1_for_even_use_and_E_over_K_if_all_tokens_use_the_same(second, balance):
    in_padding = [0, 3]
    routes = torch.tensor([[[[0, 1]], [second], [in_padding]]])         # (B, S, L, K): 1, 3, 1, 2
    router_logits = torch.full((1, 3, 1, 4), -inf).scatter(-1, routes, 7.0)
    mask = torch.tensor([[True, True, False]])
    assert moe.balance_loss(routes, router_logits, mask).item() == balance


def test_gradient_through_the_model_by_finite_differences():
    model = tiny().double()
    rollout = sample(model, max_new_tokens=4)
    A = torch.randn(12)
    logp_old = rollout.logp_old + 0.1 * torch.randn(rollout.logp_old.shape)
    names = dict(model.named_parameters())

    def loss(*weights):
        with_weights = dict(zip(names, weights))

        def forward(*inputs, **options):
            return torch.func.functional_call(model, with_weights, inputs, options)
        logp = gspo.score(forward, rollout, replay=True).logp       # no gradient where routes flip
        return gspo.policy_loss("gspo", logp, logp_old, A, rollout.response_mask, 0.03, 0.04)[0]

    assert torch.autograd.gradcheck(loss, tuple(model.parameters()), fast_mode=True)


# ---------------------------------------------------------------------------- routing replay

def test_replay_takes_the_given_routes_and_the_router_still_learns():
    model = tiny()
    tokens, mask = full()
    free = model(tokens, mask)
    theirs = tiny(seed=1)(tokens, mask).routes
    replayed = model(tokens, mask, theirs)
    assert torch.equal(replayed.routes, theirs)
    assert not torch.allclose(replayed.logits, free.logits, atol=0.1)
    assert torch.equal(model(tokens, mask, free.routes).logits, free.logits)        # bit for bit
    replayed.logits.logsumexp(dim=-1).sum().backward()
    assert all(layer.experts.router.weight.grad.any() for layer in model.layers)


def test_a_router_whose_experts_are_all_active_has_nothing_to_choose():
    model = tiny(n_active=4)
    tokens, mask = full()
    any_order = torch.tensor([2, 0, 3, 1]).expand(3, 8, 2, 4)
    closely(model(tokens, mask, any_order).logits, model(tokens, mask).logits)


def test_a_router_of_one_active_expert_cannot_learn():
    model = tiny(n_active=1)        # its weight is 1, whatever the router says
    model(*full()).logits.logsumexp(dim=-1).sum().backward()
    assert not any(layer.experts.router.weight.grad.any() for layer in model.layers)


def test_replay_changes_nothing_at_equal_weights():
    model = tiny()
    rollout = sample(model)
    scores = gspo.score(model, rollout)
    # On record for the last token of a response is 0. No log-prob depends on its experts, but one
    # that has other rows may round otherwise.
    rows = torch.arange(12)
    last = 5 + rollout.lengths - 1
    rollout.routes[rows, last] = scores.routes[rows, last].to(torch.uint8)
    assert torch.equal(gspo.score(model, rollout, replay=True).logp, scores.logp)   # bit for bit


# ---------------------------------------------------------------------------- sampling and scoring

@parametrize("temperature", [1.0, 0.7])
def test_sampled_log_probs_are_those_of_scoring(temperature):
    model = tiny()
    rollout = sample(model, temperature=temperature).select(torch.randperm(12))
    scores = gspo.score(model, rollout, temperature)
    for row, n in enumerate(rollout.lengths.tolist()):
        logp, entropy = slow_scores(model, rollout, row, temperature)
        closely(rollout.logp_old[row, :n], logp)
        closely(scores.logp[row, :n], logp)
        closely(scores.entropy[row, :n], entropy)


@parametrize("E", [4, 256])
def test_sampled_routes_are_those_of_scoring_and_0_where_no_pass_was_made(E):
    model = tiny(n_expert=E)
    rollout = sample(model)
    goes_on = rollout.mask & F.pad(rollout.mask[:, 1:], (0, 1))     # all but the last of a row
    assert torch.equal(rollout.routes[goes_on], gspo.score(model, rollout).routes[goes_on])
    assert not rollout.routes[~goes_on].any()


def test_prompts_stand_to_the_left_of_a_line_and_responses_to_the_right():
    rollout = sample(tiny(), group_size=2, max_new_tokens=11, seed=23, eos_id=0, pad_id=11)
    T = rollout.lengths.max()                               # 6: all end before the limit
    assert T < 11
    assert rollout.tokens.shape == (6, 5 + T)
    for row, n in enumerate(rollout.lengths.tolist()):
        prompt = PROMPTS[row // 2]
        left = 5 - len(prompt)
        assert rollout.tokens[row, :5].tolist() == [11] * left + prompt
        real = [False] * left + [True] * (len(prompt) + n) + [False] * (T - n)
        assert rollout.mask[row].tolist() == real
        assert rollout.response_mask[row].tolist() == real[5:]
        assert (rollout.response[row, n:] == 11).all()
    assert not rollout.logp_old[~rollout.response_mask].any()


def test_demonstrations_are_laid_out_alike():
    prompts, responses = zip(([3, 10], [7, 9]), ([4, 5, 10], [8, 9]), ([6], [9]))
    rollout = moe.lay_out(prompts, responses, pad_id=0, device=torch.device("cpu"))
    assert rollout.tokens.tolist() == [[0, 3, 10, 7, 9], [4, 5, 10, 8, 9], [0, 0, 6, 9, 0]]
    assert torch.equal(rollout.mask, rollout.tokens > 0)
    assert rollout.response.tolist() == [[7, 9], [8, 9], [9, 0]]


def test_a_response_ends_with_the_end_token_or_is_truncated():
    rollout = sample(tiny(), group_size=20)
    for response, n in zip(rollout.response.tolist(), rollout.lengths.tolist()):
        assert n == (response.index(END) + 1 if END in response else 6)
    assert len(set(rollout.lengths.tolist())) > 2
    assert (sample(tiny(), eos_id=-1).lengths == 6).all()


def test_selected_rows_take_along_what_is_known_of_them():
    rollout = Rollout(torch.arange(12).view(4, 3), torch.ones(4, 3) > 0, 1)
    rollout.of_an_extra = torch.arange(4)
    for rows in ([0, 3], [True, False, False, True]):
        part = rollout.select(torch.tensor(rows))
        assert part.response.tolist() == [[1, 2], [10, 11]]
        assert part.of_an_extra.tolist() == [0, 3]


def test_samples_have_the_probabilities_of_the_model():
    model = tiny()
    n = 4000
    p = alone(model, torch.tensor(PROMPTS[0])).logits[0, -1].softmax(dim=-1)
    rollout = sample(model, PROMPTS[:1], group_size=n, max_new_tokens=1)
    share = rollout.response[:, 0].bincount(minlength=12) / n
    assert ((share - p).abs() < 4 * (p * (1 - p) / n).sqrt()).all()


@parametrize("shift", [0.0, 1.3, -7.7])
def test_a_token_without_probability_is_never_chosen(shift):
    uniform = torch.tensor([0, 0.24, 0.26, 0.74, 1 - 2 ** -24])
    logits = torch.tensor([0.0, 1, 0, 2, 1, 0]).log() + shift
    chosen, logp = moe.choose(logits.repeat(5, 1), 1.0, uniform)
    assert chosen.tolist() == [1, 1, 3, 3, 4]
    closely(logp.exp(), torch.tensor([0.25, 0.25, 0.5, 0.5, 0.25]))

def test_the_same_randomness_gives_the_same_rollout():
    one = sample(tiny())
    assert torch.equal(one.logp_old, sample(tiny()).logp_old)
    assert not torch.equal(one.logp_old, sample(tiny(), seed=1).logp_old)


def test_a_response_depends_on_its_prompt_and_its_randomness_alone():
    one = sample(tiny())
    two = sample(tiny(), [[2, 8], [9], PROMPTS[2]])
    for row in range(8, 12):                                # the third prompt's responses
        n = one.lengths[row]
        assert torch.equal(one.tokens[row, :5 + n], two.tokens[row, two.mask[row]])
        closely(one.logp_old[row, :n], two.logp_old[row, :n])
        assert torch.equal(one.routes[row, :5 + n], two.routes[row, :5 + n])


def test_temperature_0_takes_the_likeliest_token_of_the_uncached_model():
    model = tiny()
    rollout = sample(model, group_size=2, temperature=0.0, eos_id=-1)
    for row in range(6):
        logits = alone(model, rollout.tokens[row, rollout.mask[row]]).logits[0, -7:-1]
        assert torch.equal(rollout.response[row], logits.argmax(dim=-1))
        closely(rollout.logp_old[row], slow_scores(model, rollout, row)[0])


# ---------------------------------------------------------------------------- updates

REWARDS = torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 1, 1], [0, 1, 1, 1]])
DEFAULTS = {"algorithm": "gspo", "clip_low": None, "clip_high": None, "group_size": 4,
            "mini_batches": 1, "epochs": 1, "temperature": 1.0, "max_new_tokens": 6,
            "max_grad_norm": 1e9, "routing_replay": "none"}


def drifted():
    """The policy a little after it sampled 4 groups, the second of which has no signal."""
    model = tiny()
    rollout = sample(model, PROMPTS + [[2, 2]])
    rollout.rewards = REWARDS.flatten()
    rollout.advantages = gspo.group_advantages(REWARDS).flatten()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.01 * torch.randn_like(p)
    return model, rollout


def update(model, rollout, lr=0.0, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr)
    return gspo.update(model, optimizer, rollout, SimpleNamespace(**DEFAULTS | options))


def slow_equation_5(model, rollout, rows, low, high):
    terms = []
    for row in rows:
        logp, _ = slow_scores(model, rollout, row)
        s = (logp - rollout.logp_old[row, :len(logp)]).mean().exp()
        A = rollout.advantages[row]
        terms.append(torch.minimum(s * A, s.clamp(1 - low, 1 + high) * A))
    return mean(terms)


@cases("mini_batches, epochs, rows_of_steps", {
    "one mini-batch": (1, 1, {0: range(16)}),
    "two, and two epochs": (2, 2, {0: range(8), 1: range(8, 16), 2: range(8), 3: range(8, 16)}),
    "four, no step without a signal": (4, 1, {0: range(4), 2: range(8, 12), 3: range(12, 16)})})
def test_update_is_gradient_ascent_on_equation_5(mini_batches, epochs, rows_of_steps):
    model, rollout = drifted()
    slow, _ = drifted()
    steps = update(model, rollout, lr=0.1, clip_low=0.01, clip_high=0.01,
                   mini_batches=mini_batches, epochs=epochs)
    assert [step.mini_batch for step in steps] == list(rows_of_steps)
    for rows, step in zip(rows_of_steps.values(), steps):
        J = slow_equation_5(slow, rollout, rows, 0.01, 0.01)
        assert step.loss == approx(-J.item(), abs=1e-6)
        gradient = torch.autograd.grad(J, list(slow.parameters()))
        with torch.no_grad():
            for p, g in zip(slow.parameters(), gradient):
                p += 0.1 * g
    assert_close(list(model.parameters()), list(slow.parameters()), atol=1e-6, rtol=1e-5)


@parametrize("options", [
    {}, {"routing_replay": "r3"}, {"temperature": 0.7},
    {"algorithm": "grpo", "clip_low": 1e-3, "clip_high": 1e-3}], ids=str)
def test_the_ratio_is_1_in_the_first_mini_batch_and_drifts_from_then_on(options):
    model = tiny()
    rollout = sample(model, PROMPTS * 4, temperature=options.get("temperature", 1.0))
    rollout.advantages = gspo.group_advantages(torch.rand(12, 4)).flatten()
    for step in update(model, rollout, lr=0.3, mini_batches=4, **options):
        batch = step.batch
        drift = (step.scores.logp - batch.logp_old).abs().max()
        goes_on = batch.mask[:, :-1] & batch.mask[:, 1:]
        experts_change = (step.scores.routes != batch.routes)[:, :-1][goes_on].any()
        later = step.mini_batch > 0
        assert drift > 1e-2 if later else drift < 1e-5
        assert step.clipped.any() == later
        assert experts_change == (later and options.get("routing_replay") != "r3")


def test_a_long_gradient_is_shortened_to_max_grad_norm():
    long, rollout = drifted()
    norm = update(long, rollout)[0].grad_norm
    short, _ = drifted()
    assert update(short, rollout, max_grad_norm=norm / 2)[0].grad_norm == approx(norm)
    closely([p.grad for p in short.parameters()], [p.grad / 2 for p in long.parameters()])


def test_a_gradient_that_is_not_finite_never_reaches_the_weights():
    model, rollout = drifted()
    rollout.advantages = rollout.advantages * nan
    with pytest.raises(FloatingPointError):
        update(model, rollout, lr=0.1)
    untouched, _ = drifted()
    assert_close(list(model.parameters()), list(untouched.parameters()), atol=0, rtol=0)


# ---------------------------------------------------------------------------- what is impossible

def loss_of(algorithm, advantages):
    logp = torch.zeros(2, 3)
    return gspo.policy_loss(algorithm, logp, logp, advantages, torch.ones(2, 3))


@parametrize("call", [
    lambda: tiny(d_model=30),
    lambda: tiny(n_kv_head=3),
    lambda: tiny(n_active=9),
    lambda: tiny(n_expert=257),
    lambda: tiny(n_layer=0),
    lambda: tiny()(*full(width=17)),
    lambda: sample(tiny(), prompts=[]),
    lambda: sample(tiny(), prompts=[[1], []]),
    lambda: sample(tiny(), prompts=[[12]]),
    lambda: sample(tiny(), prompts=[[-1]]),
    lambda: sample(tiny(), max_new_tokens=13),
    lambda: sample(tiny(), max_new_tokens=0),
    lambda: sample(tiny(), temperature=-1.0),
    lambda: gspo.group_advantages(tensor([[1, inf]])),
    lambda: gspo.group_advantages(tensor([[1, nan]])),
    lambda: loss_of("unknown", torch.ones(2)),
    lambda: loss_of("gspo", torch.ones(2, 3)),
])
def test_the_impossible_is_a_value_error(call):
    with pytest.raises(ValueError):
        call()
