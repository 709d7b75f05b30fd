"""Group Sequence Policy Optimization (GSPO, arXiv 2507.18071) and its relatives, one flag apart.

For one question x the old policy writes a group of G responses y_1 .. y_G; a rule gives each a
reward r_i. A_i = (r_i - mean(r)) / std(r) says how much better y_i is than its siblings (Eq. 6).
The new policy is moved towards the better ones, but not far from the policy that wrote them:

    GSPO  J = E[ 1/G sum_i min( s_i A_i, clip(s_i, 1-low, 1+high) A_i ) ]                   (Eq. 5)
          s_i = ( pi_new(y_i|x) / pi_old(y_i|x) )^(1/|y_i|)                                 (Eq. 7)
              = exp( mean over t of [log pi_new(y_it) - log pi_old(y_it)] )
    GRPO  J = E[ 1/G sum_i 1/|y_i| sum_t min( w_it A_i, clip(w_it, 1-low, 1+high) A_i ) ]   (Eq. 2)
          w_it = pi_new(y_it) / pi_old(y_it)                                                (Eq. 3)

GSPO has one ratio for a whole response and keeps or clips the response as one; GRPO has a ratio for
every token and clips tokens. Clipping aside, this is the one difference in the gradient: every
token of y_i gets the weight s_i A_i / |y_i| (Eq. 10), or its own, w_it A_i / |y_i| (Eq. 12). If the
log-ratio of a token jumps, say because other experts worked on it, log s_i moves by a |y_i|-th of
that jump.

The relatives change the ratio, the clip, how the tokens' terms are added up, or the advantages. The
table ALGORITHMS has a row for each of them.

`group_advantages` compares the rewards of a rollout; `update` makes the optimiser's steps and calls
`policy_loss`, a pure function of tensors, for each.
Letters: P prompts, G group size, B = P*G responses, T tokens, L layers, E experts, K active, D
width, V vocabulary; b rows and M response tokens of a micro-batch, as much as is computed at once.
"""
from dataclasses import replace
from math import isfinite
from typing import Callable, NamedTuple

import torch
from torch.nn.functional import one_hot

# exp(20) is finite in fp32; unbounded, inf * 0 would be a NaN gradient. No healthy run comes near.
MAX_LOG_RATIO = 20.0
SAPO_TAU = 1.0, 1.05        # the gate for A < 0 closes a little faster than that for A > 0
VALUE_CLIP, VALUE_COEF = 0.2, 0.1       # PPO: how far a value may move; weight of its loss


def group_advantages(rewards, scale="std"):
    """Rewards (P, G) -> advantages (P, G): how far above its group's mean, in standard deviations.

    The paper (Eq. 6) does not say which standard deviation. This is the sample one (G - 1), as in
    TRL and verl but without their epsilon: [1, 0, 0, 0] -> [1.5, -0.5, -0.5, -0.5]. A group whose
    rewards are all equal says nothing and gets exactly 0. `scale="none"` leaves the division out
    (Dr. GRPO, 2503.20783). ValueError for rewards that are not finite."""
    if not torch.isfinite(rewards).all():
        raise ValueError(f"rewards must be finite numbers; these are {rewards.tolist()}")
    centred = rewards - rewards.mean(dim=1, keepdim=True)                  # (P, G)
    if scale == "std":
        centred = centred / rewards.std(dim=1, keepdim=True)
    elif scale != "none":
        raise ValueError(f"scale is {scale!r}; it can be 'std' or 'none'")
    differ = rewards.amax(dim=1, keepdim=True) > rewards.amin(dim=1, keepdim=True)   # (P, 1)
    return torch.where(differ, centred, 0.0)     # exact: rounding could leave 1e-8 / 1e-8


def mismatch_weights(kind, logp_old, logp_sampler):
    """What to multiply each token's advantage with if the sampler's policy mu, say one in lower
    precision, was not quite pi_old: pi_old / mu, cut at 2 ("tis", truncated importance sampling) or
    0 outside [0.5, 5] ("icepop"). All (B, T). Not to be confused with the objective's own ratio."""
    ratio = (logp_old - logp_sampler).clamp(max=MAX_LOG_RATIO).exp()
    if kind == "tis":
        return ratio.clamp(max=2.0)
    return torch.where((ratio >= 0.5) & (ratio <= 5), ratio, 0)


# ---------------------------------------------------------------------------- the objectives

class Ratios(NamedTuple):
    """What an objective is made of; all (B, T)."""
    logp: torch.Tensor          # under the policy being trained, where all gradient comes from
    log_w: torch.Tensor         # logp - logp_old, the log of Eq. 3; 0 outside the responses
    log_s: torch.Tensor         # its mean over the response, the log of Eq. 7, in all of the row
    mask: torch.Tensor


def response_mean(x, mask):
    """The mean of x (B, T), 0 outside the mask, over each response, all along its row (B, T)."""
    return (x.sum(dim=1) / mask.sum(dim=1).clamp(min=1))[:, None].expand_as(x)


def ratios(logp, logp_old, mask):
    # GSPO's clip range, 3e-4, is below the resolution of bf16 at 1, 8e-3: use fp32 at the least.
    dtype = torch.promote_types(logp.dtype, torch.float32)
    logp, logp_old = (torch.where(mask, x, 0).to(dtype) for x in (logp, logp_old.detach()))
    log_w = logp - logp_old
    # Bounded after the mean, not before: a bound on single tokens would change s.
    log_s = response_mean(log_w, mask)
    bound = lambda x: x.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return Ratios(logp, bound(log_w), bound(log_s), mask)


# Each gives a token's term of the objective and where the clip holds, (B, T) both. A is (B, T).

def clip(ratio, A, low, high):
    """The smaller of the two: past the clip range there is nothing more to gain, but a ratio that
    has moved against A (up and A < 0, down and A > 0) keeps its gradient."""
    term = torch.minimum(ratio * A, ratio.clamp(1 - low, 1 + high) * A)
    return term, torch.where(A > 0, ratio > 1 + high, ratio < 1 - low)


def gspo(r, A, low, high):
    return clip(r.log_s.exp(), A, low, high)                               # Eq. 5 and 7


def gspo_token(r, A, low, high):
    # Eq. 13-14: worth s_i, with the gradient of the token alone. The bracket is exactly 0 and must
    # be formed first: s_i is so near 1 that adding it to logp would lose it to rounding.
    return clip(((r.logp - r.logp.detach()) + r.log_s.detach()).exp(), A, low, high)


def grpo(r, A, low, high):
    return clip(r.log_w.exp(), A, low, high)                               # Eq. 2 and 3


def cispo(r, A, low, high):
    # The weight is clipped, not the gradient: every token keeps one.
    w = r.log_w.exp().detach()
    return w.clamp(1 - low, 1 + high) * A * r.logp, (w < 1 - low) | (w > 1 + high)


def gmpo(r, A, low, high):
    # Tokens are clipped (in log w, on the side that A asks for), and then their geometric mean is
    # taken. Without the clip this is GSPO.
    log_w = torch.where(A > 0, r.log_w.clamp(max=high), r.log_w.clamp(min=-low))
    return response_mean(log_w, r.mask).exp() * A, log_w != r.log_w


def sapo(r, A, low, high):
    # No clip but a gate: its slope, sech^2(tau/2 (w - 1)), falls from 1 at w = 1 to 0, smoothly.
    tau = torch.where(A > 0, *A.new_tensor(SAPO_TAU))
    return 4 / tau * torch.sigmoid(tau * (r.log_w.exp() - 1)) * A, torch.zeros_like(r.mask)


def reinforce(r, A, low, high):
    # No ratio: unbiased in the first mini-batch only, where the policy is still the sampler's.
    return r.logp * A, torch.zeros_like(r.mask)


# How much a token's term counts in the objective: lengths n (B,) of the responses, and Y, that of
# the longest there can be -> (B,). The names are verl's.
seq_mean_token_mean = lambda n, Y: 1 / (len(n) * n)                 # 1/B sum_i 1/|y_i| sum_t
token_mean = lambda n, Y: torch.ones_like(n) / n.sum()              # 1/sum_i |y_i|  sum_i sum_t
seq_mean_token_sum = lambda n, Y: torch.ones_like(n) / len(n)       # 1/B sum_i sum_t
seq_mean_token_sum_norm = lambda n, Y: torch.ones_like(n) / (len(n) * Y)    # 1/(B Y) sum_i sum_t


class Algorithm(NamedTuple):
    term: Callable      # a token's term
    weight: Callable    # and how much it counts
    clip: tuple         # low, high: of s for gspo and luspo, of log w for gmpo, of w for the others
    scale: str | None   # of group_advantages; None for PPO, whose advantages come from a critic


ALGORITHMS = {
    "gspo": Algorithm(gspo, seq_mean_token_mean, (3e-4, 4e-4), "std"),              # 2507.18071
    # For an advantage per token; with one per response it equals gspo in value and gradient.
    "gspo_token": Algorithm(gspo_token, seq_mean_token_mean, (3e-4, 4e-4), "std"),  # 2507.18071
    # The range is that of the GSPO paper's GRPO.
    "grpo": Algorithm(grpo, seq_mean_token_mean, (0.2, 0.27), "std"),               # 2402.03300
    "ppo": Algorithm(grpo, seq_mean_token_mean, (0.2, 0.2), None),                  # 1707.06347
    # No std and no 1/|y|: both, it argues, are biases, to easy or hard questions and to length.
    "dr_grpo": Algorithm(grpo, seq_mean_token_sum_norm, (0.2, 0.2), "none"),        # 2503.20783
    # More room upwards, for rare tokens; long responses count more.
    "dapo": Algorithm(grpo, token_mean, (0.2, 0.28), "std"),                        # 2503.14476
    # Weights from 0 to 5: no lower bound, as in the paper; the upper one is what TRL recommends.
    "cispo": Algorithm(cispo, token_mean, (1.0, 4.0), "std"),                       # 2506.13585
    "gmpo": Algorithm(gmpo, seq_mean_token_mean, (0.4, 0.4), "std"),                # 2507.20673
    "sapo": Algorithm(sapo, seq_mean_token_mean, (None, None), "std"),              # 2511.20347
    # GSPO times |y|: its 1/|y|, it argues, makes responses shrink.
    "luspo": Algorithm(gspo, seq_mean_token_sum, (2e-3, 2.5e-3), "std"),            # 2602.05261
    "reinforce": Algorithm(reinforce, seq_mean_token_mean, (None, None), "none"),
}


PER_RESPONSE = gspo, gmpo       # terms with one advantage for all tokens of a response


def policy_loss(algorithm, logp, logp_old, advantages, mask, clip_low, clip_high, weights=None):
    """The loss to minimise, and the tokens that the clip holds. A pure function of tensors.

    logp (B, T)        log-probs of the response tokens under the policy being trained
    logp_old (B, T)    the same under the policy that sampled them
    advantages (B,)    one per response; or (B, T), one per token, if not gspo, luspo or gmpo
    mask (B, T)        True for response tokens, the end token included; what stands elsewhere,
                       be it NaN, is ignored. A row without any token is worth 0 but counts in B.
    clip_low, clip_high   see ALGORITHMS; sapo and reinforce have none and ignore them
    weights (B,)       how much a token's term counts, if the rows are but a part of the mini-batch;
                       else as in ALGORITHMS, with T as the longest length there can be
    Returns the loss, a scalar, and `clipped` (B, T): True where the clip removes the gradient (for
    cispo: where it limits the weight)."""
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm is {algorithm!r}; it can be one of {', '.join(ALGORITHMS)}")
    term_of, weight_of, _, _ = ALGORITHMS[algorithm]
    if term_of in PER_RESPONSE and advantages.dim() == 2:
        raise ValueError(f"{algorithm} has one advantage per response, not per token: (B,)")
    r = ratios(logp, logp_old, mask)                                       # (B, T) each
    A = advantages.detach().to(r.logp.dtype)
    A = torch.where(mask, A if A.dim() == 2 else A[:, None], 0)            # (B, T)
    if weights is None:
        weights = weight_of(mask.sum(dim=1).clamp(min=1).to(A.dtype), mask.shape[1])    # (B,)

    # For GSPO all terms of a response are equal, so their mean is the one term that Eq. 5 has.
    term, clipped = term_of(r, A, clip_low, clip_high)                     # (B, T) each
    objective = (torch.where(mask, term, 0).sum(dim=1) * weights).sum()
    return -objective, clipped & (A != 0)


def kl_loss(logp, logp_ref, mask, weights):
    """KL(policy || reference), a scalar: the sum of weights (B,) times k3 = x - 1 - log x of every
    token, x = pi_ref / pi, which is never negative and, over tokens sampled from the policy,
    unbiased. logp, logp_ref, mask (B, T)."""
    log_x = -ratios(logp, logp_ref, mask).log_w
    return ((log_x.expm1() - log_x).sum(dim=1) * weights).sum()


# ---------------------------------------------------------------------------- PPO's critic

class Critic(NamedTuple):
    """What PPO has in place of a group: a learned guess, at every token, of the reward to come."""
    head: torch.nn.Module       # the model's final hidden state (M, D) -> (M, 1)
    values: torch.Tensor        # (B, T) its guesses before the update
    returns: torch.Tensor       # (B, T) what it should have guessed


def gae(rewards, values, gamma, lam):
    """Generalised advantage estimation (1506.02438, Eq. 16) of rewards and values (B, T), both 0
    after the end -> (B, T): the sum over l of (gamma lam)^l (r_t+l + gamma v_t+l+1 - v_t+l)."""
    advantages, later, next_value = torch.zeros_like(values), 0.0, 0.0
    for t in reversed(range(values.shape[1])):
        later = rewards[:, t] + gamma * next_value - values[:, t] + gamma * lam * later
        advantages[:, t], next_value = later, values[:, t]
    return advantages


def ppo_advantages(rollout, head, values, rewards, gamma, lam):
    """Rewards (B,), earned by the last tokens, and values (B, T) -> advantages (B, T), the Critic.
    The advantages are brought to mean 0 and deviation 1 over all tokens, as in verl."""
    at_end = torch.zeros_like(values)
    at_end[range(len(rewards)), rollout.lengths - 1] = rewards
    advantages = gae(at_end, values, gamma, lam)                           # (B, T)
    std, mean = torch.std_mean(advantages[rollout.mask])
    return (advantages - mean) / (std + 1e-8), Critic(head, values, advantages + values)


def value_loss(values, values_old, returns, mask, weights):
    """Half the squared error, summed to a scalar; a move beyond VALUE_CLIP gains nothing."""
    near = values_old + (values - values_old).clamp(-VALUE_CLIP, VALUE_CLIP)
    error = torch.maximum((values - returns) ** 2, (near - returns) ** 2) / 2
    return (torch.where(mask, error, 0).sum(dim=1) * weights).sum()


# ---------------------------------------------------------------------------- the metrics

def ratio_stats(logp, logp_old, advantages, clipped, mask):
    """What the ratios look like; arguments as for and from policy_loss, results floats. The README
    explains each. `kl` is the mean of w - 1 - log w: KL(old || new) per token, never negative."""
    A = advantages if advantages.dim() == 2 else advantages[:, None]
    low, high = clipped & (A < 0), clipped & (A > 0)                       # (B, T)
    share = lambda x: response_mean(x.float(), mask)[:, 0].mean().item()
    r = ratios(logp, logp_old, mask)
    w, s = r.log_w[mask], r.log_s[:, 0]                                    # (M,), (B,)
    return {
        "clip_low": low[mask].float().mean().item(), "clip_low_seq": share(low),
        "clip_high": high[mask].float().mean().item(), "clip_high_seq": share(high),
        "log_s_mean": s.mean().item(), "log_s_std": s.std(correction=0).item(),
        "log_w_mean": w.mean().item(), "log_w_std": w.std(correction=0).item(),
        "outliers": ((w.exp() - 1).abs() > 0.2).float().mean().item(),
        "kl": (w.expm1() - w).mean().item(),
    }


def routing_stats(old, new, logits):
    """What the router of each layer does: active experts at the rollout and now (M, L, K), compared
    as sets, and the router's logits (M, L, E) -> a dict of lists of L floats."""
    stayed = (old[..., :, None] == new[..., None, :]).any(dim=-1)          # (M, L, K)
    counts = one_hot(new.long(), logits.shape[-1]).sum(dim=(0, 2)).float() # (L, E)
    probs = logits.softmax(dim=-1)                                         # (M, L, E)
    return {"expert_change": (1 - stayed.float().mean(dim=(0, 2))).tolist(),
            "expert_load": (counts.amax(dim=1) / counts.mean(dim=1)).tolist(),
            "router_entropy": torch.special.entr(probs).sum(dim=-1).mean(dim=0).tolist()}


# ---------------------------------------------------------------------------- the update

def spread(x, mask):
    """x (M,), one for every True in mask (b, T) -> (b, T), 0 elsewhere."""
    return torch.zeros(mask.shape, device=x.device, dtype=x.dtype).masked_scatter(mask, x)


def score(model, rollout, rows, temperature=1.0, replay=False):
    """The chosen rows' responses under the model as it is now, on the distribution that they were
    sampled from -> their log-probs (b, T); the model's Output, whose hidden states (M, D) are those
    that predict a response token; there, the entropies (M,) and the tensors for routing_stats."""
    tokens, keep, mask, routes, source = rollout.select(rows)
    out = model(tokens, routes if replay else None, keep, source=source)
    log_probs = (out.logits / temperature).log_softmax(dim=-1)             # (M, V)
    target = rollout.tokens[rows][mask]                                    # (M,)
    logp = spread(log_probs.gather(1, target[:, None])[:, 0], mask)        # (b, T)
    with torch.no_grad():
        entropy = -(log_probs.exp() * log_probs).sum(dim=-1)               # (M,)
        routing = [x[:, keep].transpose(0, 1) for x in (routes, out.routes, out.router)]
    return logp, out, entropy, routing


def micro_batches(rollout, rows, max_tokens):
    """Cut the rows (b,), in their order, into parts of about `max_tokens` each. Only a group that
    is cut has its prompt computed twice."""
    prompt_lengths = torch.tensor([len(prompt) for prompt in rollout.prompts], device=rows.device)
    group_size = len(rollout.tokens) // len(rollout.prompts)
    lengths = prompt_lengths[rows // group_size] + rollout.lengths[rows]   # (b,)
    sizes = ((lengths.cumsum(dim=0) - 1) // max_tokens).bincount().tolist()
    return [part for part in rows.split(sizes) if len(part)]


@torch.no_grad()
def rescore(model, rollout, temperature=1.0, replay=False, head=None, micro_tokens=4096):
    """The rollout with the log-probs and routes that a pass of the trainer gives, in place of the
    sampler's, and the values (B, T) of a critic's `head`, 0 without one."""
    logp, routes = rollout.logp.clone(), rollout.routes.clone()
    values = torch.zeros_like(logp)
    for rows in micro_batches(rollout, torch.arange(len(logp), device=logp.device), micro_tokens):
        logp[rows], out, _, _ = score(model, rollout, rows, temperature, replay)
        routes[:, rows, :out.routes.shape[2]] = out.routes.to(routes.dtype)
        if head:
            values[rows] = spread(head(out.hidden)[:, 0], rollout.mask[rows])
    return replace(rollout, logp=logp, routes=routes), values


def update(model, optimizer, rollout, advantages, algorithm, clip_low, clip_high, mini_batches=4,
           temperature=1.0, max_grad_norm=1.0, micro_tokens=4096, max_length=None, replay=False,
           kl_coef=0.0, logp_ref=None, critic=None, steps=None):
    """One optimiser step per mini-batch of whole groups; returns one dict of metrics per step.

    advantages (B,) or (B, T)
    max_length      the longest response there can be, by which dr_grpo divides; else the width T
    replay          activate the rollout's experts, not those that the router would choose now
    kl_coef         weight of the KL to a reference, whose log-probs are `logp_ref` (B, T)
    critic          PPO's Critic; the parameters of its head must be in the optimizer
    steps           only the first so many of the `mini_batches`
    The rollout stays as it is: in the first mini-batch every ratio is 1, later ones have drifted.
    One without any signal has no step; responses with A = 0 are not in the metrics. Raises
    FloatingPointError, before the step, if the loss or the gradient is not finite."""
    (B, T), device, metrics = rollout.logp.shape, rollout.logp.device, []
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    # A = 0 has no gradient: such rows are not computed, though the weights take them in.
    computed = advantages.view(B, -1).any(dim=1) | bool(kl_coef or critic)         # (B,)
    groups_rows = torch.arange(B, device=device).view(len(rollout.prompts), -1)     # (P, G)
    for index, groups in enumerate(groups_rows.tensor_split(mini_batches)[:steps]):
        rows, weights = groups.flatten(), torch.zeros(B, device=device)             # (b,), (B,)
        weights[rows] = ALGORITHMS[algorithm].weight(rollout.lengths[rows].float(), max_length or T)
        rows = rows[computed[rows]]
        if len(rows) == 0:
            continue
        optimizer.zero_grad()
        losses, parts = [], []
        for part in micro_batches(rollout, rows, micro_tokens):
            logp, out, entropy, routing = score(model, rollout, part, temperature, replay)
            mask, mean_weight = rollout.mask[part], 1 / (groups.numel() * rollout.lengths[part])
            loss, clipped = policy_loss(algorithm, logp, rollout.logp[part], advantages[part], mask,
                                        clip_low, clip_high, weights[part])
            losses.append(loss.detach())
            if kl_coef:
                loss = loss + kl_coef * kl_loss(logp, logp_ref[part], mask, mean_weight)
            if critic:
                values = spread(critic.head(out.hidden)[:, 0], mask)                # (b, T)
                loss = loss + VALUE_COEF * value_loss(values, critic.values[part],
                                                      critic.returns[part], mask, mean_weight)
            loss.backward()
            parts.append((part, logp.detach(), clipped, entropy, *routing))
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm).item()
        loss = sum(losses).item()
        if not (isfinite(loss) and isfinite(grad_norm)):
            raise FloatingPointError(f"loss {loss}, gradient norm {grad_norm}")
        optimizer.step()
        part, logp, clipped, entropy, *routing = map(torch.cat, zip(*parts))
        metrics.append(
            ratio_stats(logp, rollout.logp[part], advantages[part], clipped, rollout.mask[part])
            | routing_stats(*routing) | {"mini_batch": index, "loss": loss,
                                         "grad_norm": grad_norm, "entropy": entropy.mean().item()})
    return metrics
