"""Runs that the command line of train.py cannot make: noise on the stored log-probs, and objectives
that mix the parts of GSPO and GRPO. All other options are those of train.py.

    python -m lab.instruments --noise 1 --algorithm grpo
    python -m lab.instruments --common_noise 1 --algorithm gspo
    python -m lab.instruments --noise 2 --algorithm grpo_dual_clip

Noise of spread sigma changes the stored log-probs, so that each token's ratio gets a factor
exp(sigma z - sigma^2 / 2), z normal: its mean is 1. With --noise every token has a z of its own,
with --common_noise all tokens of a response have the same. What was sampled and how it is rewarded
do not change. Such a run cannot be resumed by train.py.
"""
import argparse
import random
from dataclasses import replace

import torch
from torch import Tensor

import gspo
from gspo import Algorithm, Ratios

DUAL_CLIP = 3.0         # 1912.09729, as in verl


def grpo_dual_clip(r: Ratios, A: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """GRPO, but a bad token's weight is at most DUAL_CLIP: beyond that it has no gradient."""
    contribution, clipped = gspo.grpo(r, A, low, high)
    too_far = (A < 0) & (r.log_w.exp() > DUAL_CLIP)
    return torch.where(too_far, DUAL_CLIP * A, contribution), clipped | too_far


def gate_of_gspo(r: Ratios, A: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """A response is kept or clipped as in GSPO; its tokens have the weights of GRPO."""
    _, clipped = gspo.gspo(r, A, low, high)
    return torch.where(clipped, A, r.log_w.exp() * A), clipped


def gate_of_grpo(r: Ratios, A: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """A token is kept or clipped as in GRPO; all tokens of a response have the weight of GSPO."""
    _, clipped = gspo.grpo(r, A, low, high)
    of_token = (r.logp - r.logp.detach()) + r.log_s.detach()    # see gspo.gspo_token
    return torch.where(clipped, A, of_token.exp() * A), clipped


INSTRUMENTS = {
    "grpo_dual_clip": Algorithm(grpo_dual_clip, gspo.seq_mean_token_mean, (0.2, 0.27), "std"),
    "gate_of_gspo": Algorithm(gate_of_gspo, gspo.seq_mean_token_mean, (3e-3, 4e-3), "std"),
    "gate_of_grpo": Algorithm(gate_of_grpo, gspo.seq_mean_token_mean, (0.2, 0.27), "std"),
}
gspo.ALGORITHMS.update(INSTRUMENTS)

import train        # noqa: E402    its --algorithm can be what the table has by now


def noise(logp: Tensor, sigma: float, common: float, rng: random.Random) -> Tensor:
    """What to subtract from stored log-probs (B, T): of spread sigma for each token, of spread
    common for each response."""
    generator = torch.Generator().manual_seed(rng.getrandbits(63))
    of_token = torch.randn(logp.shape, generator=generator)                 # (B, T)
    of_response = torch.randn(len(logp), 1, generator=generator)            # (B, 1)
    log_factor = (sigma * of_token - sigma ** 2 / 2) + (common * of_response - common ** 2 / 2)
    return log_factor.to(logp.device)


def add_noise(sigma: float, common: float):
    """Make the sampler of train.py report log-probs with noise."""
    sample_and_reward = train.sample_and_reward

    def noisy(run, sampler, queries, rng):
        samples = sample_and_reward(run, sampler, queries, rng)
        rollout = samples.rollout
        logp = rollout.logp - noise(rollout.logp, sigma, common, rng)
        logp = torch.where(rollout.response_mask, logp, 0)
        return samples._replace(rollout=replace(rollout, logp=logp))
    train.sample_and_reward = noisy


def main():
    parser = argparse.ArgumentParser(prog="python -m lab.instruments", allow_abbrev=False,
                                     description=__doc__.partition("\n\n")[0])
    parser.add_argument("--noise", type=float, default=0, help="spread, for each token")
    parser.add_argument("--common_noise", type=float, default=0, help="spread, for each response")
    options, others = parser.parse_known_args()
    if options.noise or options.common_noise:
        add_noise(options.noise, options.common_noise)
    train.main(others)


if __name__ == "__main__":
    main()
