"""Group Sequence Policy Optimization (GSPO, arXiv 2507.18071) and, beside it, GRPO (2402.03300).

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

    GSPO-token (Eq. 13-14) is GSPO when A is the same for all tokens of a response, in value and in
    gradient, and takes a different A_it for every token where that is wanted.

What is left out: the KL term to a reference model (the paper omits it as well) and a value network
(the group's mean is the baseline).

Three steps: group_advantages -> policy_loss (a pure function of tensors) -> update.
Letters: P prompts, G group size, B = P*G responses, T tokens; b rows and M response tokens of a
micro-batch, which is as much of a mini-batch as is computed at once.
"""
import torch

# Paper, section 5.1: the two kinds of ratio live on scales three orders of magnitude apart.
CLIP = {"gspo": (3e-4, 4e-4), "gspo_token": (3e-4, 4e-4), "grpo": (0.2, 0.27)}
# exp(20) is finite in fp32; unbounded, inf * 0 would be a NaN gradient. Past it, where no healthy
# run ever comes, gspo and grpo have no gradient and gspo_token has that of the bound.
MAX_LOG_RATIO = 20.0


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


def policy_loss(algorithm, logp, logp_old, advantages, mask, clip_low, clip_high):
    """The loss to minimise, and what there is to know about the ratios. A pure function of tensors.

    logp (B, T)        log-probs of the response tokens under the policy being trained
    logp_old (B, T)    the same under the policy that sampled them
    advantages (B,)    one per response; (B, T), one per token, for gspo_token and grpo
    mask (B, T)        True for response tokens, the end token included; what stands elsewhere,
                       be it NaN, is ignored. A row without any token is worth 0 but counts in B.
    Returns the loss (scalar) and a dict of floats (see `ratio_stats`)."""
    if algorithm not in CLIP:
        raise ValueError(f"algorithm is {algorithm!r}; it can be one of {', '.join(CLIP)}")
    if algorithm == "gspo" and advantages.dim() == 2:
        raise ValueError("gspo has one advantage per response, (B,); gspo_token takes (B, T)")
    # 3e-4 is below the resolution of bf16 at 1 (8e-3): ratios need fp32 at the least.
    dtype = torch.promote_types(logp.dtype, torch.float32)
    logp, logp_old = (torch.where(mask, x, 0).to(dtype) for x in (logp, logp_old.detach()))
    A = advantages.detach().to(dtype)
    A = torch.where(mask, A if A.dim() == 2 else A[:, None], 0)            # (B, T)
    n = mask.sum(dim=1).clamp(min=1)                                       # (B,) = |y_i|

    log_w = logp - logp_old                                                # (B, T)
    # Bounded after the mean, not before: a bound on single tokens would change s.
    log_s = (log_w.sum(dim=1) / n).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)    # (B,)  log of Eq. 7
    log_s = log_s[:, None].expand_as(log_w)                                # (B, T)

    if algorithm == "gspo":
        ratio = log_s.exp()                                                # Eq. 7, same for all t
    elif algorithm == "gspo_token":
        # Eq. 14: worth s_i, with the gradient of the token alone. The bracket is exactly 0 and must
        # be formed first: s_i is so near 1 that adding it to logp would round its news away.
        ratio = ((logp - logp.detach()) + log_s.detach()).exp()
    elif algorithm == "grpo":
        ratio = log_w.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()           # Eq. 3

    # The smaller of the two: past the clip range there is nothing more to gain, but a wrong move
    # (A < 0 and the ratio up, A > 0 and the ratio down) is never clipped.
    term = torch.minimum(ratio * A, ratio.clamp(1 - clip_low, 1 + clip_high) * A)      # (B, T)
    objective = (torch.where(mask, term, 0).sum(dim=1) / n).mean()         # Eq. 5 / Eq. 2
    # For GSPO all terms of a response are equal, so their mean is the one term that Eq. 5 has.

    with torch.no_grad():
        low = mask & (A < 0) & (ratio < 1 - clip_low)                      # (B, T)
        high = mask & (A > 0) & (ratio > 1 + clip_high)                    # (B, T)
        stats = ratio_stats(log_w, log_s, low, high, mask)
    return -objective, stats


def ratio_stats(log_w, log_s, low, high, mask):
    """What the ratios look like; all arguments (B, T), all results floats. `update` asks about the
    responses with A != 0, the only ones that it computes.

    clip_low, clip_high          share of tokens whose gradient the clip removes (as in Fig. 2)
    clip_low_seq, clip_high_seq  the same, averaged within each response first
    log_s_*, log_w_*             mean and standard deviation over responses / over tokens
    outliers                     share of tokens with |w - 1| > 0.2, GRPO's usual range
    kl                           mean of w - 1 - log w: KL(old || new) per token, never negative"""
    n = mask.sum(dim=1)                                                    # (B,)
    some = n > 0
    if not some.any():
        return {}
    share = lambda x: (x.sum(dim=1)[some] / n[some]).mean().item()
    w, s = log_w[mask], log_s[some, 0]                                     # (M,), (B,)
    return {
        "clip_low": low[mask].float().mean().item(), "clip_low_seq": share(low),
        "clip_high": high[mask].float().mean().item(), "clip_high_seq": share(high),
        "log_s_mean": s.mean().item(), "log_s_std": s.std(correction=0).item(),
        "log_w_mean": w.mean().item(), "log_w_std": w.std(correction=0).item(),
        "outliers": ((w.exp() - 1).abs() > 0.2).float().mean().item(),
        "kl": (w.expm1() - w).mean().item(),
    }


def expert_change(old, new, keep):
    """Share of active experts in `old` that are not in `new`, both (L, b, S, K) -> (L,).

    Sets are compared, not order; only the positions in `keep` (b, S), whose outputs score a
    response token, count."""
    stayed = (old[..., :, None] == new[..., None, :]).any(dim=-1)          # (L, b, S, K)
    return 1 - stayed[:, keep].float().mean(dim=(1, 2))


def score(model, rollout, rows, temperature=1.0):
    """Log-probs (b, T) of the chosen rows' responses under the model as it is now, on the same
    distribution that they were sampled from; the mean entropy; the share of experts changed."""
    tokens, keep, mask, routes = rollout.select(rows)
    out = model(tokens, keep=keep)
    log_probs = (out.logits.float() / temperature).log_softmax(dim=-1)     # (M, V)
    target = rollout.tokens[rows, :mask.shape[1]][mask]                    # (M,)
    chosen = log_probs.gather(1, target[:, None])[:, 0]                    # (M,)
    logp = torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, chosen)
    with torch.no_grad():
        entropy = -(log_probs.exp() * log_probs).sum(dim=-1).mean()
        change = expert_change(routes, out.routes, keep)                   # (L,)
    return logp, entropy, change


def micro_batches(rollout, rows, max_tokens):
    """Cut the rows (b,) into parts of similar length, each of at most `max_tokens`, padding
    included, or of one row."""
    prompt_lengths = torch.tensor([len(prompt) for prompt in rollout.prompts], device=rows.device)
    group_size = len(rollout.tokens) // len(rollout.prompts)
    lengths = prompt_lengths[rows // group_size] + rollout.lengths[rows]   # (b,)
    order = lengths.argsort(stable=True)
    sizes = [0]
    for length in lengths[order].tolist():      # growing: the newest row sets the padded width
        if sizes[-1] and (sizes[-1] + 1) * length > max_tokens:
            sizes.append(0)
        sizes[-1] += 1
    return rows[order].split(sizes)


@torch.no_grad()
def rescore(model, rollout, temperature=1.0, micro_tokens=2048):
    """Log-probs (B, T) of all responses under the model as it is now: what `update` can take as
    `logp_old` instead of the sampler's own, if sampler and trainer might differ."""
    logp_old = torch.zeros_like(rollout.logp)
    all_rows = torch.arange(len(rollout.tokens), device=rollout.tokens.device)
    for rows in micro_batches(rollout, all_rows, micro_tokens):
        logp, _, _ = score(model, rollout, rows, temperature)
        logp_old[rows, :logp.shape[1]] = logp
    return logp_old


def update(model, optimizer, rollout, advantages, algorithm, clip_low, clip_high, mini_batches=4,
           temperature=1.0, max_grad_norm=1.0, micro_tokens=2048, logp_old=None):
    """One optimiser step per mini-batch of whole groups; returns one dict of metrics per step.

    `advantages` is (P, G). `logp_old` (B, T) stays what it was when the responses were sampled: in
    the first mini-batch every ratio is 1 and nothing is clipped, later ones have drifted. One
    without any signal has no step. Raises FloatingPointError, before the optimiser's step, if the
    loss or the gradient of a mini-batch is not finite."""
    P, G = advantages.shape
    A = advantages.flatten()                                               # (B,)
    logp_old = rollout.logp if logp_old is None else logp_old
    metrics = []
    for groups in torch.arange(P, device=A.device).tensor_split(mini_batches):
        rows = (groups[:, None] * G + torch.arange(G, device=A.device)).flatten()
        n_rows = len(rows)
        rows = rows[A[rows] != 0]   # A = 0 has no gradient: not computed, but counted in n_rows
        if len(rows) == 0:
            continue
        optimizer.zero_grad()
        logps, entropies, changes, order = [], [], [], []
        for part in micro_batches(rollout, rows, micro_tokens):
            logp, entropy, change = score(model, rollout, part, temperature)
            T = logp.shape[1]
            loss, _ = policy_loss(algorithm, logp, logp_old[part, :T], A[part],
                                  rollout.mask[part, :T], clip_low, clip_high)
            # The mean over the part, times its share, adds up to the mean over the mini-batch.
            (loss * len(part) / n_rows).backward()
            logps.append(torch.nn.functional.pad(logp.detach(), (0, logp_old.shape[1] - T)))
            share = rollout.lengths[part].sum() / rollout.lengths[rows].sum()      # of the tokens
            entropies.append(entropy * share), changes.append(change * share), order.append(part)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        order = torch.cat(order)
        loss, stats = policy_loss(algorithm, torch.cat(logps), logp_old[order], A[order],
                                  rollout.mask[order], clip_low, clip_high)
        loss = loss.item() * len(order) / n_rows
        if not (torch.isfinite(grad_norm) and abs(loss) < float("inf")):
            raise FloatingPointError(f"loss {loss}, gradient norm {grad_norm.item()}")
        optimizer.step()
        metrics.append(stats | {"loss": loss, "grad_norm": grad_norm.item(),
                                "entropy": torch.stack(entropies).sum().item(),
                                "expert_change": torch.stack(changes).sum(dim=0).mean().item()})
    return metrics
