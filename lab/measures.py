"""What ratios, routers and sampler look like in an update. lab/README.md explains each."""
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from gspo import MAX_LOG_RATIO, Scores, log_ratios, response_mean
from moe import Rollout


def predicting(rollout: Rollout, x: Tensor) -> Tensor:
    """Of x (B, S, L, ...), the columns whose logits predict a token of a response: (L, N, ...)."""
    return x[:, rollout.prompt_width - 1:-1][rollout.response_mask].transpose(0, 1).contiguous()


def ratio_metrics(logp: Tensor, logp_old: Tensor, advantages: Tensor, clipped: Tensor,
                  mask: Tensor) -> dict[str, float]:
    """What the ratios look like; arguments as for policy_loss, with a mask of booleans, and
    `clipped` from it."""
    A = advantages if advantages.dim() == 2 else advantages[:, None]
    clipped_low = (clipped & (A < 0)).float()                              # (B, T)
    clipped_high = (clipped & (A > 0)).float()
    logs = log_ratios(logp, logp_old, mask)
    log_s = logs.log_s[:, 0].clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)          # (B,)
    log_w = logs.log_w[mask].clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)          # (N,)
    return {
        "clip_low": clipped_low[mask].mean().item(),
        "clip_high": clipped_high[mask].mean().item(),
        "clip_low_seq": response_mean(clipped_low, mask)[:, 0].mean().item(),
        "clip_high_seq": response_mean(clipped_high, mask)[:, 0].mean().item(),
        "log_s_mean": log_s.mean().item(),
        "log_s_std": log_s.std(correction=0).item(),
        "log_w_mean": log_w.mean().item(),
        "log_w_std": log_w.std(correction=0).item(),
        "outliers": ((log_w.exp() - 1).abs() > 0.2).float().mean().item(),
        # KL(old || new) per token, estimated by w - 1 - log w, which is never negative.
        "kl": (log_w.expm1() - log_w).mean().item(),
    }


def gradient_weights(ratio: Tensor, advantages: Tensor, clipped: Tensor,
                     token_weights: Tensor) -> Tensor:
    """What the log-prob of each token counts in the gradient of J, (B, T): ratio * A / (B |y|), and
    0 where clipped. `ratio` (B, T) is s in GSPO (Eq. 10) and w in GRPO (Eq. 12), advantages (B,),
    clipped (B, T) is that of policy_loss, token_weights (B,) are 1 / (B |y|). For ratios within
    MAX_LOG_RATIO; beyond it there is no gradient."""
    return torch.where(clipped, 0, ratio * (advantages * token_weights)[:, None])


def expert_change(old: Tensor, new: Tensor) -> Tensor:
    """Active experts (L, N, K), before and after, as sets -> the share that changed (L,)."""
    changed = (old[..., :, None] != new[..., None, :]).all(dim=-1)         # (L, N, K)
    return changed.float().mean(dim=(1, 2))


def routing_metrics(old: Tensor, new: Tensor, router_logits: Tensor) -> dict[str, list[float]]:
    """What the router of each layer does: experts on record and of this pass, (L, N, K) each, and
    its logits now (L, N, E) -> L floats for each metric."""
    pairs = one_hot(new.long(), router_logits.shape[-1]).sum(dim=(1, 2)).float()       # (L, E)
    probs = router_logits.softmax(dim=-1)                                  # (L, N, E)
    return {
        "expert_change": expert_change(old, new).tolist(),
        "expert_load": (pairs.amax(dim=1) / pairs.mean(dim=1)).tolist(),
        "router_entropy": torch.special.entr(probs).sum(dim=-1).mean(dim=1).tolist(),
    }


def mismatch_metrics(rollout: Rollout, scores: Scores) -> dict[str, float]:
    """How far the sampler, as the rollout has it, is from the trainer that has not moved yet."""
    mask = rollout.response_mask
    log_w = (scores.logp - rollout.logp_old)[mask]                         # (N,)
    old = predicting(rollout, rollout.routes)                              # (L, N, K)
    new = predicting(rollout, scores.routes)
    return {
        "mismatch_mean": log_w.abs().mean().item(),
        "mismatch_max": log_w.abs().max().item(),
        # KL(sampler || trainer) per token, estimated as `kl` is.
        "mismatch_kl": (log_w.expm1() - log_w).mean().item(),
        "mismatch_experts": expert_change(old, new).mean().item(),
    }
