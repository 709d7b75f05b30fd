"""Runs that the command line of train.py cannot make: noise on the stored log-probs, and objectives
that mix the parts of GSPO and GRPO or leave out their 1/|y|. All other options are those of
train.py.

    python -m lab.instruments --noise 1 --algorithm grpo
    python -m lab.instruments --common_noise 1 --algorithm gspo
    python -m lab.instruments --noise 2 --algorithm grpo_dual_clip

Noise of spread sigma changes the stored log-probs, so that each token's ratio w gets a factor
exp(sigma z - sigma^2 / 2), z normal. Its mean is 1, as that of a true ratio is over the tokens of a
sampler. So the mean of log w moves by -sigma^2 / 2, and log s with it, while the spread of log s
shrinks with the length: the longer a response, the surer is its s below 1. With --centred this
shift is left out: the mean of log w stays. With --noise every token has a z of its own, with
--common_noise all tokens of a response have the same. The noise is not in config.json: give it
again with --resume.
"""
import argparse
import random
import sys
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


# The two below have the gradient that they say. Their value means nothing where they are clipped.

def gspo_clip_grpo_weight(r: Ratios, A: Tensor, low: float,
                          high: float) -> tuple[Tensor, Tensor]:
    """A response is kept or clipped as in GSPO; if kept, its tokens have the weights w of GRPO,
    however large."""
    _, clipped = gspo.gspo(r, A, low, high)
    return torch.where(clipped, A, r.log_w.exp() * A), clipped


def grpo_clip_gspo_weight(r: Ratios, A: Tensor, low: float,
                          high: float) -> tuple[Tensor, Tensor]:
    """A token is kept or clipped as in GRPO; if kept, it has the weight s of GSPO."""
    _, clipped = gspo.grpo(r, A, low, high)
    log_s = (r.logp - r.logp.detach()) + r.log_s.detach()       # see gspo.gspo_token
    return torch.where(clipped, A, log_s.exp() * A), clipped


INSTRUMENTS = {
    "grpo_dual_clip": Algorithm(grpo_dual_clip, gspo.seq_mean_token_mean, (0.2, 0.27), "std"),
    "gspo_clip_grpo_weight": Algorithm(gspo_clip_grpo_weight, gspo.seq_mean_token_mean,
                                       (3e-3, 4e-3), "std"),
    "grpo_clip_gspo_weight": Algorithm(grpo_clip_gspo_weight, gspo.seq_mean_token_mean,
                                       (0.2, 0.27), "std"),
    # Without 1/|y|: every token of a mini-batch counts the same.
    "gspo_token_mean": Algorithm(gspo.gspo, gspo.token_mean, (3e-3, 4e-3), "std"),
    "grpo_token_mean": Algorithm(gspo.grpo, gspo.token_mean, (0.2, 0.27), "std"),
}
# What would replace the stored log-probs, or use them for more than the ratio.
NOT_WITH_NOISE = ("--recompute_logp_old", "--correction", "ppo", "r2")


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


def add_noise(train, sigma: float, common: float, centred: bool):
    """Make the sampler of the module train report log-probs with noise."""
    sample_and_reward = train.sample_and_reward

    def noisy(run, sampler, queries, rng):
        samples = sample_and_reward(run, sampler, queries, rng)
        rollout = samples.rollout
        logp = rollout.logp - noise(rollout.logp, sigma, common, centred, rng)
        logp = torch.where(rollout.response_mask, logp, 0)
        return samples._replace(rollout=replace(rollout, logp=logp))
    train.sample_and_reward = noisy


def main():
    parser = argparse.ArgumentParser(prog="python -m lab.instruments", allow_abbrev=False,
                                     description=__doc__.partition("\n\n")[0],
                                     epilog="All other options: python train.py --help. More for "
                                            f"--algorithm: {', '.join(INSTRUMENTS)}")
    parser.add_argument("--noise", type=float, default=0, help="spread, for each token")
    parser.add_argument("--common_noise", type=float, default=0, help="spread, for each response")
    parser.add_argument("--centred", action="store_true", help="the mean of log w stays")
    options, others = parser.parse_known_args()
    noisy = options.noise or options.common_noise
    words = " ".join(others).replace("=", " ").split()
    for word in NOT_WITH_NOISE:
        if noisy and word in words:
            sys.exit(f"instruments: {word} does not go together with noise; leave one out")
    gspo.ALGORITHMS.update(INSTRUMENTS)
    import train        # now its --algorithm can be each of them
    if noisy:
        add_noise(train, options.noise, options.common_noise, options.centred)
    train.main(others)


if __name__ == "__main__":
    main()
