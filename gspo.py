"""Group Sequence Policy Optimization (GSPO, arXiv 2507.18071), and GRPO beside it.

For one problem x the old policy writes a group of G responses y_1 .. y_G, and a rule gives each a
reward r_i. The advantage A_i = (r_i - mean(r)) / std(r) says how much better y_i is than its
siblings (Eq. 6). The new policy moves towards the better ones, but not far from the old policy:

    GSPO  J = 1/G sum_i min( s_i A_i, clip(s_i, 1-low, 1+high) A_i ), averaged over x       (Eq. 5)
          s_i = ( pi_new(y_i|x) / pi_old(y_i|x) )^(1/|y_i|)                                 (Eq. 7)
              = exp( mean over t of [log pi_new(y_it) - log pi_old(y_it)] )
    GRPO  J = 1/G sum_i 1/|y_i| sum_t min( w_it A_i, clip(w_it, 1-low, 1+high) A_i )        (Eq. 2)
          w_it = pi_new(y_it) / pi_old(y_it)                                                (Eq. 3)

GSPO has one ratio for a whole response and keeps or clips the response as one. GRPO has a ratio for
every token and clips tokens. Apart from the clip their gradients differ in one thing: a token of
y_i counts s_i A_i / |y_i| in GSPO (Eq. 10), and w_it A_i / |y_i| of its own in GRPO (Eq. 12). When
the log-ratio of one token jumps, say because the router sent it to other experts, log s_i moves by
only 1/|y_i| of that jump.

The file is in the order of time: advantages, scores, ratios, clip, loss, gradient, optimiser step;
and at the end `update`, which makes the steps of a rollout. Look at the drawing of moe.Rollout
first: a row for each response, the last T of its S columns being the tokens of the response.

Letters as in moe.py: P prompts, G responses to each, B rows, P*G in all; L layers, E experts, K
active experts, D width of the model. A is an advantage.
"""
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moe import MoETransformer, Rollout, at_least_fp32


# ---------------------------------------------------------------------------- 1 advantages

def group_advantages(rewards: Tensor) -> Tensor:
    """Rewards (P, G) -> advantages (P, G): how far above its group's mean, in standard deviations.

    The paper (Eq. 6) does not say which standard deviation. This is the sample one (G - 1), as in
    TRL and verl but without their epsilon: [1, 0, 0, 0] -> [1.5, -0.5, -0.5, -0.5]. A group of
    equal rewards teaches nothing and gets exactly 0. ValueError for rewards that are not finite."""
    if rewards.dim() != 2 or not torch.isfinite(rewards).all():
        raise ValueError(f"rewards must be finite numbers (P, G); these are {rewards.tolist()}")
    # A large common part would round the differences away in fp32. So it goes first.
    if not rewards.is_floating_point():
        rewards = rewards.long() - rewards[:, :1].long()
    rewards = at_least_fp32(rewards) - at_least_fp32(rewards[:, :1])
    largest = rewards.abs().amax(dim=1, keepdim=True)                      # (P, 1)
    rewards = rewards / largest         # the squares of tiny differences would be 0
    advantages = rewards - rewards.mean(dim=1, keepdim=True)               # (P, G)
    advantages = advantages / rewards.std(dim=1, keepdim=True)
    return torch.where(largest == 0, 0.0, advantages)      # where all are equal that was 0/0


# ---------------------------------------------------------------------------- 2 scores

class Scores(NamedTuple):
    """Responses under the model as it is now."""
    logp: Tensor            # (B, T) log-prob of each token, 0 in padding
    entropy: Tensor         # (B, T) of the model's distribution there, in nats; not 0 in padding
    hidden: Tensor          # (B, T, D) what its logits are made of
    routes: Tensor          # (B, S, L, K), of prompt and response
    router_logits: Tensor   # (B, S, L, E)


def score(model: MoETransformer, rollout: Rollout, temperature: float = 1.0,
          replay: bool = False) -> Scores:
    """The log-probs of a rollout's responses under the model as it is now, and what else a pass
    over them gives. The temperature must be that of the sampler.

    With `replay` the model activates the experts that the rollout has on record, rollout.routes, in
    place of those that its router would choose today; their weights are today's."""
    routes = rollout.routes if replay else None
    T = rollout.response.shape[1]
    out = model(rollout.tokens, rollout.mask, routes, logits_to_keep=T + 1)
    # The logits of a column predict the token of the next one. So we ask for one column more, the
    # last of the prompt, and drop the last of all, from which nothing is predicted.
    logits = at_least_fp32(out.logits[:, :-1])
    log_probs = (logits / temperature).log_softmax(dim=-1)                 # (B, T, vocab_size)
    logp = log_probs.gather(2, rollout.response[..., None])[..., 0]        # (B, T)
    logp = torch.where(rollout.response_mask, logp, 0)
    entropy = -(log_probs.exp() * log_probs).sum(dim=-1)                   # (B, T)
    return Scores(logp, entropy, out.hidden[:, :-1], out.routes, out.router_logits)


# ---------------------------------------------------------------------------- 3 ratios

class LogRatios(NamedTuple):
    """How much likelier the responses are now than when they were sampled, all (B, T)."""
    log_w: Tensor       # of each token, the log of Eq. 3; 0 in padding
    log_s: Tensor       # its mean over the response, the log of Eq. 7, repeated along the whole row
    logp: Tensor        # of each token under the model as it is now; for lab/extras/relatives.py
    mask: Tensor        # True for tokens of a response; likewise


def response_mean(x: Tensor, mask: Tensor) -> Tensor:
    """The mean of x (B, T) over each response, repeated along its row: (B, T). x must be 0 outside
    the mask."""
    lengths = mask.sum(dim=1).clamp(min=1)
    return (x.sum(dim=1) / lengths)[:, None].expand_as(x)


def log_ratios(logp: Tensor, logp_old: Tensor, mask: Tensor) -> LogRatios:
    """From log-probs (B, T) now and when sampled, for the mask (B, T) of booleans. ValueError for
    other shapes, which could broadcast.

    Without the power 1/|y| of Eq. 7, log s would be a sum over the tokens and grow with the length,
    like |y| if all move alike: a range that clips few responses of 10 tokens would clip most of
    1000. A mean is of the size of one token's log w, or less where their moves cancel out."""
    if not logp.shape == logp_old.shape == mask.shape:
        raise ValueError(f"logp {tuple(logp.shape)}, logp_old {tuple(logp_old.shape)} and mask "
                         f"{tuple(mask.shape)} must have one shape, (B, T)")
    # GSPO's clip range, 3e-3, is finer than bf16, whose steps above 1 are 8e-3: at least fp32.
    logp = at_least_fp32(torch.where(mask, logp, 0))
    logp_old = torch.where(mask, logp_old.detach(), 0).to(logp.dtype)
    log_w = logp - logp_old
    return LogRatios(log_w, response_mean(log_w, mask), logp, mask)


# A ratio beyond exp(20) or below exp(-20) has no gradient. It could become infinite, and then its
# gradient would be infinity times 0, NaN, where the clip takes it away. A healthy run has none.
MAX_LOG_RATIO = 20.0


def to_ratio(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


# ---------------------------------------------------------------------------- 4 the objectives

def clip(log_ratio: Tensor, A: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """What each token is worth, min(ratio * A, clip(ratio) * A), and True where the clip takes its
    gradient away. (B, T) each, as are log_ratio and A.

                     ratio < 1 - low      in between      ratio > 1 + high
        A > 0           gradient          gradient             none
        A < 0             none            gradient            gradient

    What has moved far enough in the direction of its advantage has no gradient any more. What has
    moved against it keeps its gradient, up to MAX_LOG_RATIO."""
    ratio = to_ratio(log_ratio)
    clipped_ratio = ratio.clamp(1 - low, 1 + high)
    worth = torch.minimum(ratio * A, clipped_ratio * A)
    too_high = (A > 0) & (ratio > 1 + high)
    too_low = (A < 0) & (ratio < 1 - low)
    return worth, too_high | too_low


def gspo(logs: LogRatios, A: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """One ratio for a response: all its tokens are kept or clipped together."""
    return clip(logs.log_s, A, low, high)


def grpo(logs: LogRatios, A: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """A ratio for every token."""
    return clip(logs.log_w, A, low, high)


def mean_of_means(lengths: Tensor) -> Tensor:
    """The token weights of both, for the mean over responses of the mean over their tokens: lengths
    |y| (B,) -> 1 / (B |y|), for each token of a response (B,)."""
    return 1 / (len(lengths) * lengths)


class Algorithm(NamedTuple):
    objective: Callable                         # gspo or grpo
    clip_range: tuple                           # low, high
    per_token: bool = True                      # may tokens of one response differ in A?
    token_weights: Callable = mean_of_means


# The GSPO paper has the clip range 3e-4 and 4e-4, for responses of thousands of tokens. Ours have
# about 30 tokens, so that one token moves the mean much further. Ten times the range learned faster
# on all of five seeds. A rule is half the spread of log s, which a run logs as log_s_std;
# results/claims/clip.md has the figures. The range of GRPO is that of the GSPO paper.
ALGORITHMS = {      # lab/extras/relatives.py adds more
    "gspo": Algorithm(gspo, (3e-3, 4e-3), per_token=False),
    "grpo": Algorithm(grpo, (0.2, 0.27)),
}


# ---------------------------------------------------------------------------- 5 the loss

def policy_loss(algorithm: str, logp: Tensor, logp_old: Tensor, advantages: Tensor, mask: Tensor,
                clip_low: float | None = None, clip_high: float | None = None,
                token_weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The loss to minimise, a scalar, and which tokens are clipped, (B, T).

    logp (B, T)          log-probs of the response tokens under the policy being trained
    logp_old (B, T)      the same under the policy that sampled them
    advantages (B,)      one for each response; or (B, T), one for each token, if not gspo
    mask (B, T)          true (or 1) for response tokens, the end token included. What stands
                         elsewhere, be it NaN, is ignored. A row without tokens is worth 0, but
                         counts as a response.
    clip_low, clip_high  by default those of ALGORITHMS
    token_weights (B,)   how much each token of a response counts, if these rows are only a part of
                         a mini-batch; by default what ALGORITHMS has for a whole one

    Two responses, of 3 tokens and of 2. The first is good (A = 1) and has become likelier, beyond
    the clip range. The second is bad (A = -1) and has become likelier too: it keeps its gradient.

    >>> logp_old = torch.tensor([[-1.0, -2.0, -0.5], [-0.7, -0.3, 0.0]])
    >>> logp     = torch.tensor([[-0.9, -1.7, -0.6], [-0.6, -0.2, 0.0]])   # both: 0.1 on average
    >>> mask     = torch.tensor([[True, True, True], [True, True, False]])
    >>> loss, clipped = policy_loss("gspo", logp, logp_old, torch.tensor([1.0, -1.0]), mask,
    ...                             clip_low=0.05, clip_high=0.05)
    >>> round(loss.item(), 4)   # s = exp(0.1) = 1.1052 twice: -(min(1.1052, 1.05) - 1.1052) / 2
    0.0276
    >>> clipped.tolist()
    [[True, True, True], [False, False, False]]
    """
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm is {algorithm!r}; it can be one of {', '.join(ALGORITHMS)}")
    entry = ALGORITHMS[algorithm]
    low = entry.clip_range[0] if clip_low is None else clip_low
    high = entry.clip_range[1] if clip_high is None else clip_high
    if advantages.shape == mask.shape[:1]:
        advantages = advantages[:, None]                                   # (B, 1)
    elif advantages.shape != mask.shape or not entry.per_token:
        raise ValueError(f"advantages {tuple(advantages.shape)} do not fit {tuple(mask.shape)}")
    mask = mask > 0                                                        # of any dtype
    logs = log_ratios(logp, logp_old, mask)                                # (B, T) each
    A = torch.where(mask, advantages.detach().to(logs.logp.dtype), 0)      # (B, T)
    if token_weights is None:
        token_weights = entry.token_weights(mask.sum(dim=1).clamp(min=1).to(A.dtype))      # (B,)
    if token_weights.shape != mask.shape[:1]:
        raise ValueError(f"token_weights {tuple(token_weights.shape)} for mask {tuple(mask.shape)}")

    worth, clipped = entry.objective(logs, A, low, high)                   # (B, T) each
    # In GSPO all tokens of a response are worth the same, and each counts 1/(B |y|): their sum is
    # the one term for a response that Eq. 5 has.
    J = (torch.where(mask, worth, 0).sum(dim=1) * token_weights).sum()
    return -J, clipped


# ---------------------------------------------------------------------------- 6 gradient and step

@dataclass
class Learned:
    """What was learned from a mini-batch, for whoever measures it. No gradient flows from here."""
    batch: Rollout
    scores: Scores
    loss: float                 # the policy loss
    clipped: Tensor             # (B, T) True where the clip takes the gradient away
    grad_norm: float = 0.0      # what `optimizer_step` has returned
    mini_batch: int = 0         # its number, from 0, which continues through the epochs


def gradient(model: MoETransformer, batch: Rollout, config,
             loss_terms: Sequence[Callable] = ()) -> Learned | None:
    """Add the gradient of a mini-batch's loss to the parameters; None if it has no row.

    `loss_terms` are functions (batch, scores) -> a scalar that is added to the policy loss, a sum
    with batch.token_weights as the policy loss is."""
    if len(batch.tokens) == 0:
        return None
    # Whatever is replayed is rollout.routes: the kinds of replay differ in who has recorded them.
    scores = score(model, batch, config.temperature, replay=config.routing_replay != "none")
    loss, clipped = policy_loss(config.algorithm, scores.logp, batch.logp_old, batch.advantages,
                                batch.response_mask, config.clip_low, config.clip_high,
                                batch.token_weights)
    total = loss + sum(term(batch, scores) for term in loss_terms)
    total.backward()
    return Learned(batch, Scores(*(x.detach() for x in scores)), loss.item(), clipped)


def optimizer_step(parameters: list[nn.Parameter], optimizers: list[torch.optim.Optimizer],
                   max_grad_norm: float) -> float:
    """Shorten a gradient that is too long, and let the optimisers move the parameters -> the length
    that it had. FloatingPointError, before anything has moved, if that is not finite."""
    grad_norm = nn.utils.clip_grad_norm_(parameters, max_grad_norm).item()
    if not isfinite(grad_norm):
        raise FloatingPointError(f"the gradient has length {grad_norm}; lower the learning rate")
    for optimizer in optimizers:
        optimizer.step()
    return grad_norm


# ---------------------------------------------------------------------------- 7 the update

def update(model: MoETransformer, optimizer: torch.optim.Optimizer, rollout: Rollout, config,
           loss_terms: Sequence[Callable] = (), add_gradient: Callable = gradient,
           make_step: Callable = optimizer_step) -> list[Learned]:
    """One optimiser step for each mini-batch of whole groups, from the first group to the last, and
    again in each further epoch. None for one without advantages, if there are no loss_terms.

    The rollout has logp_old and advantages, and routes to be replayed; `config` is a
    train.RLOptions, with no more mini_batches than groups. train.py passes its own `add_gradient`
    and `make_step`: the two functions above, and more if an option asks for it."""
    parameters = []
    for param_group in optimizer.param_groups:
        parameters += param_group["params"]
    groups = torch.arange(len(rollout.tokens)).view(-1, config.group_size)         # (P, G)
    mini_batches = groups.tensor_split(config.mini_batches)
    weights_of = ALGORITHMS[config.algorithm].token_weights
    learned = []
    # logp_old was stored when the rollout was sampled. At the first mini-batch the model is still
    # the same: every ratio is 1, up to rounding, and nothing is clipped. The loss is then minus the
    # mean of A, which is 0 because the A of a group add up to 0. Its gradient is not 0: a ratio of
    # 1 has the derivative of log pi_new, so that log-probs rise where A > 0 and fall where A < 0.
    # Watch the reward, not the loss. Each step moves the model further away from what it was.
    for i in range(config.epochs * config.mini_batches):
        batch = rollout.select(mini_batches[i % config.mini_batches].flatten())
        # 1/(B |y|) for each token, with the B of the whole mini-batch: set here, before rows are
        # dropped, or computed in parts (lab/extras/micro_batches.py). The loss is a plain sum with
        # these weights, so that the losses and gradients of parts add up to those of the whole.
        batch.token_weights = weights_of(batch.lengths)
        if not loss_terms:      # a response with A = 0 has no gradient: it need not be computed
            has_signal = batch.advantages.view(len(batch.tokens), -1).any(dim=1)   # (B,)
            batch = batch.select(has_signal)
        optimizer.zero_grad()
        result = add_gradient(model, batch, config, loss_terms)
        if result is not None:
            result.mini_batch = i
            result.grad_norm = make_step(parameters, [optimizer], config.max_grad_norm)
            learned.append(result)
    return learned
