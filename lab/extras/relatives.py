"""More objectives: rows of gspo.ALGORITHMS, each from the paper that stands beside it."""
import dataclasses

import torch
from torch import Tensor

from gspo import (
    ALGORITHMS, Algorithm, LogRatios, clip, group_advantages, grpo, gspo, response_mean, to_ratio)
from lab.options import option


@dataclasses.dataclass
class Options:
    """for GSPO's relatives only"""
    scale: str = option(None, "divide advantages by their group's std, or not (default: as the "
                        "algorithm's paper does)", choices=("std", "none"))


# Each has the arguments and the results of gspo.clip, with all that LogRatios knows.

def gspo_token(logs: LogRatios, A: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    # Eq. 13-14: the value is s, the gradient that of the token alone.
    zero = (logs.logp - logs.logp.detach()).nan_to_num()    # but its gradient is not
    return clip(zero + logs.log_s.detach(), A, low, high)


def cispo(logs: LogRatios, A: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    # The weight is clipped, not the gradient: every token keeps one.
    w = to_ratio(logs.log_w).detach()
    return w.clamp(1 - low, 1 + high) * A * logs.logp, (A != 0) & ((w < 1 - low) | (w > 1 + high))


def gmpo(logs: LogRatios, A: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    # Tokens are clipped first (in log w, on the side that A asks for), then averaged as in GSPO.
    clipped = torch.where(A > 0, logs.log_w.clamp(max=high), logs.log_w.clamp(min=-low))
    return to_ratio(response_mean(clipped, logs.mask)) * A, (A != 0) & (clipped != logs.log_w)


def sapo(logs: LogRatios, A: Tensor, low: None, high: None) -> tuple[Tensor, Tensor]:
    # A gate in place of the clip: its slope, sech^2(tau/2 (w - 1)), falls smoothly from 1 at w = 1.
    tau = torch.full_like(A, 1.05).masked_fill(A > 0, 1.0)      # A < 0: it closes a little faster
    gate = 4 / tau * torch.sigmoid(tau * (to_ratio(logs.log_w) - 1))
    return gate * A, torch.zeros_like(logs.mask)


def reinforce(logs: LogRatios, A: Tensor, low: None, high: None) -> tuple[Tensor, Tensor]:
    # No ratio: unbiased in the first mini-batch only, where the policy is still the sampler's.
    return logs.logp * A, torch.zeros_like(logs.mask)


# How much each token counts: lengths (B,) -> token weights (B,). The names are verl's.

def token_mean(lengths: Tensor) -> Tensor:
    return torch.ones_like(lengths) / lengths.sum()     # 1/(sum_i |y_i|) sum_i sum_t


def seq_mean_token_sum(lengths: Tensor) -> Tensor:
    return torch.ones_like(lengths) / len(lengths)      # 1/B sum_i sum_t


# A clip range is that of the cited paper unless a comment says otherwise. It bounds s for luspo,
# log w for gmpo, else w.
ALGORITHMS |= {
    # GSPO for advantages per token; with one per response it equals gspo in value and gradient.
    "gspo_token": Algorithm(gspo_token, ALGORITHMS["gspo"].clip_range),             # 2507.18071
    # No std, and a constant for |y| (see Extra): it argues that both are biases.
    "dr_grpo": Algorithm(grpo, (0.2, 0.2), token_weights=seq_mean_token_sum),       # 2503.20783
    # More room upwards, for rare tokens; long responses count more.
    "dapo": Algorithm(grpo, (0.2, 0.28), token_weights=token_mean),                 # 2503.14476
    # Weights from 0 to 5: no lower bound, as in the paper; the upper one is what TRL recommends.
    "cispo": Algorithm(cispo, (1.0, 4.0), token_weights=token_mean),                # 2506.13585
    "gmpo": Algorithm(gmpo, (0.4, 0.4), per_token=False),                           # 2507.20673
    "sapo": Algorithm(sapo, (None, None)),                                          # 2511.20347
    # GSPO times |y|: it argues that GSPO's 1/|y| makes responses shrink.
    "luspo": Algorithm(gspo, (2e-3, 2.5e-3), False, seq_mean_token_sum),            # 2602.05261
    "reinforce": Algorithm(reinforce, (None, None)),
}


def wanted(config) -> bool:
    for name, default in zip(("clip_low", "clip_high"), ALGORITHMS[config.algorithm].clip_range):
        if default is None and getattr(config, name) is not None:
            raise ValueError(f"{name} is given, but {config.algorithm} has none; leave it out")
    if config.scale and config.algorithm == "ppo":
        raise ValueError("scale is given, but the advantages of ppo are a critic's; leave it out")
    return config.scale == "none" or config.algorithm in ("dr_grpo", "reinforce")


class Extra:
    def advantages(self, rollout):
        rewards = rollout.rewards.view(-1, self.config.group_size)         # (P, G)
        A = group_advantages(rewards)
        if self.config.scale != "std":
            A = torch.where(A != 0, rewards - rewards.mean(dim=1, keepdim=True), 0.0)
        return A.flatten()

    def gradient(self, model, batch, *arguments):
        if self.config.algorithm == "dr_grpo":      # 1/(B * the longest there can be)
            batch.token_weights = batch.token_weights / self.config.max_new_tokens
        return super().gradient(model, batch, *arguments)
