"""Runs that the command line of train.py cannot make: noise on the stored log-probs, and objectives
that mix the parts of GSPO and GRPO or leave out their 1/|y|. All other options are those of
train.py.

    python -m lab.study.instruments --noise 1 --algorithm grpo
    python -m lab.study.instruments --common_noise 1 --algorithm gspo
    python -m lab.study.instruments --noise 2 --algorithm grpo_dual_clip

The file has the form of one in lab/extras/, but is in no list there: train.py does not know it.

Noise of spread sigma changes the stored log-probs, so that each token's ratio w gets a factor
exp(sigma z - sigma^2 / 2), z normal. Its mean is 1, as that of a true ratio is over the tokens of a
sampler. So the mean of log w moves by -sigma^2 / 2, and log s with it, while the spread of log s
shrinks with the length: the longer a response, the surer is its s below 1. With --centred this
shift is left out: the mean of log w stays. With --noise every token has a z of its own, with
--common_noise all tokens of a response have the same.
"""
import dataclasses
import random
import sys

import torch
from torch import Tensor

import gspo
from gspo import Algorithm, LogRatios, to_ratio
from lab import extras
from lab.extras import relatives, rescoring
from lab.options import option

DUAL_CLIP = 3.0         # 1912.09729, as in verl


@dataclasses.dataclass
class Options:
    """noise on the stored log-probs"""
    noise: float = option(0.0, "spread, for each token", 0)
    common_noise: float = option(0.0, "spread, for each response", 0)
    centred: bool = option(False, "the mean of log w stays")


def wanted(config) -> bool:
    noisy = config.noise > 0 or config.common_noise > 0
    if noisy and rescoring.wanted(config):
        raise ValueError("recompute_logp_old, correction and routing_replay r2 would replace the "
                         "stored log-probs, noise and all; leave them out, or the noise")
    return noisy


def noise(logp: Tensor, sigma: float, common: float, centred: bool, rng: random.Random) -> Tensor:
    """What to subtract from stored log-probs (B, T): of spread sigma for each token, of spread
    common for each response."""
    generator = torch.Generator().manual_seed(rng.getrandbits(63))
    of_token = torch.randn(logp.shape, generator=generator)                 # (B, T)
    of_response = torch.randn(len(logp), 1, generator=generator)            # (B, 1)
    log_factor = sigma * of_token + common * of_response
    if not centred:
        log_factor -= (sigma ** 2 + common ** 2) / 2
    return log_factor.to(logp.device)


class Extra:
    """A sampler that reports log-probs with noise."""
    def collect(self, sampler, rng):
        rollout, responses = super().collect(sampler, rng)
        config = self.config
        noisy = rollout.logp_old - noise(rollout.logp_old, config.noise, config.common_noise,
                                         config.centred, rng)
        rollout.logp_old = torch.where(rollout.response_mask, noisy, 0)
        return rollout, responses


def grpo_dual_clip(logs: LogRatios, A: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """GRPO, but a bad token's weight is at most DUAL_CLIP: beyond that it has no gradient."""
    worth, clipped = gspo.grpo(logs, A, low, high)
    too_far = (A < 0) & (to_ratio(logs.log_w) > DUAL_CLIP)
    return torch.where(too_far, DUAL_CLIP * A, worth), clipped | too_far


# The two below have the gradient that they say. Their value means nothing where they are clipped.

def gspo_clip_grpo_weight(logs: LogRatios, A: Tensor, low: float,
                          high: float) -> tuple[Tensor, Tensor]:
    """A response is kept or clipped as in GSPO; if kept, its tokens have the weights w of GRPO,
    however large."""
    _, clipped = gspo.gspo(logs, A, low, high)
    return torch.where(clipped, A, to_ratio(logs.log_w) * A), clipped


def grpo_clip_gspo_weight(logs: LogRatios, A: Tensor, low: float,
                          high: float) -> tuple[Tensor, Tensor]:
    """A token is kept or clipped as in GRPO; if kept, it has the weight s of GSPO."""
    _, clipped = gspo.grpo(logs, A, low, high)
    zero = logs.logp - logs.logp.detach()       # but its gradient is not
    return torch.where(clipped, A, to_ratio(zero + logs.log_s.detach()) * A), clipped


OF_GSPO = gspo.ALGORITHMS["gspo"]
OF_GRPO = gspo.ALGORITHMS["grpo"]
INSTRUMENTS = {
    "grpo_dual_clip": Algorithm(grpo_dual_clip, OF_GRPO.clip_range),
    "gspo_clip_grpo_weight": Algorithm(gspo_clip_grpo_weight, OF_GSPO.clip_range),
    "grpo_clip_gspo_weight": Algorithm(grpo_clip_gspo_weight, OF_GRPO.clip_range),
    # Without 1/|y|: every token of a mini-batch counts the same.
    "gspo_token_mean": OF_GSPO._replace(token_weights=relatives.token_mean),
    "grpo_token_mean": OF_GRPO._replace(token_weights=relatives.token_mean),
}


def main():
    gspo.ALGORITHMS.update(INSTRUMENTS)
    extras.EXTRAS.append(sys.modules[__name__])         # innermost: noise is part of the sampling
    extras.OPTIONS.append(Options)
    import train        # which reads both lists, and makes flags of them
    train.main()


if __name__ == "__main__":
    main()
