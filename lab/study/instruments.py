"""What studies need and train.py cannot do: noise on the stored log-probs, rewards drawn at random,
a last evaluation with more samples, which responses the clip silences, and objectives that mix the
parts of GSPO and GRPO or leave out their 1/|y|. The form is that of a file in lab/extras/.

    python -m lab.study.instruments --noise 1 --algorithm grpo         and all options of train.py

Noise gives each token's ratio w a factor exp(sigma z - sigma^2 / 2), z normal. Its mean is 1, as
that of a true ratio is over the tokens of a sampler; so the mean of log w, and log s with it, moves
by -sigma^2 / 2. With --centred it stays.
"""
import dataclasses
import random
import sys
from itertools import product

import torch
from torch import Tensor

import gspo
from data import tasks
from gspo import Algorithm, LogRatios, response_mean, to_ratio
from lab import extras, report
from lab.extras import relatives, rescoring
from lab.options import option

DUAL_CLIP = 3.0                         # 1912.09729, as in verl
LENGTHS = (4, 16, 32, 64, 128)          # cells of responses: of at most so many tokens
COLUMNS = ["_".join(words) for words in product(
    ("responses", "clipped"), ("good", "bad"), map(str, LENGTHS))]


@dataclasses.dataclass
class Options:
    """instruments"""
    noise: float = option(0.0, "spread, for each token", 0)
    common_noise: float = option(0.0, "spread, for each response", 0)
    centred: bool = option(False, "the mean of log w stays")
    random_rewards: bool = option(False, "0 or 1, whatever the response is")
    final_samples: int = option(0, "responses to a problem in a last evaluation, in fours", 0)


def wanted(config) -> bool:
    if (config.noise > 0 or config.common_noise > 0) and rescoring.wanted(config):
        raise ValueError("recompute_logp_old, correction and routing_replay r2 would replace the "
                         "stored log-probs, noise and all; leave them out, or the noise")
    return True


def noise(logp: Tensor, config: Options, generator: torch.Generator) -> Tensor:
    """What to subtract from stored log-probs (B, T)."""
    of_token = torch.randn(logp.shape, generator=generator)                 # (B, T)
    of_response = torch.randn(len(logp), 1, generator=generator)            # (B, 1)
    log_factor = config.noise * of_token + config.common_noise * of_response
    if not config.centred:
        log_factor -= (config.noise ** 2 + config.common_noise ** 2) / 2
    return log_factor.to(logp.device)


def clipped_by_length(learned: list[gspo.Learned]) -> dict[str, float]:
    """Of an RL step, after its first mini-batch: how many responses of each length and sign of A
    there were, and the sum of the shares of their tokens that the clip takes the gradient from."""
    found = dict.fromkeys(COLUMNS, 0.0)
    for x in learned:
        if x.mini_batch == 0:
            continue
        shares = response_mean(x.clipped.float(), x.batch.response_mask)[:, 0]          # (B,)
        for length, A, share in zip(x.batch.lengths, x.batch.advantages, shares):
            cell = next((most for most in LENGTHS if length <= most), LENGTHS[-1])
            sign = "good" if A > 0 else "bad"
            found[f"responses_{sign}_{cell}"] += 1
            found[f"clipped_{sign}_{cell}"] += share.item()
    return found


class Extra:
    def collect(self, model, rng: random.Random):
        rollout, responses = super().collect(model, rng)
        config = self.config
        generator = torch.Generator().manual_seed(rng.getrandbits(63))
        noisy = rollout.logp_old - noise(rollout.logp_old, config, generator)
        rollout.logp_old = torch.where(rollout.response_mask, noisy, 0)
        if config.random_rewards:
            drawn = torch.randint(2, rollout.rewards.shape, generator=generator)
            rollout.rewards = drawn.to(rollout.rewards)
        return rollout, responses

    def measure(self, learned):
        self.measured |= clipped_by_length(learned)
        return super().measure(learned)

    def rl(self):
        super().rl()
        problems = tasks.held_out_problems(self.task)
        generator = torch.Generator().manual_seed(self.config.seed)
        responses = []
        for _ in range(self.config.final_samples // 4):
            rollout = self.sample(self.model, problems, 4, self.config.temperature, generator)
            responses += self.judge(problems, rollout)
        if responses:
            self.progress["evaluation"]["accuracy"] = report.share_right(responses)


def grpo_dual_clip(logs: LogRatios, A: Tensor, low: float, high: float):
    """GRPO, but a bad token's weight is at most DUAL_CLIP: beyond that it has no gradient."""
    worth, clipped = gspo.grpo(logs, A, low, high)
    too_far = (A < 0) & (to_ratio(logs.log_w) > DUAL_CLIP)
    return torch.where(too_far, DUAL_CLIP * A, worth), clipped | too_far


# The two below have the gradient that they say. Their value means nothing where they are clipped.

def gspo_clip_grpo_weight(logs: LogRatios, A: Tensor, low: float, high: float):
    """A response is kept or clipped as in GSPO; if kept, its tokens have GRPO's weights w."""
    _, clipped = gspo.gspo(logs, A, low, high)
    return torch.where(clipped, A, to_ratio(logs.log_w) * A), clipped


def grpo_clip_gspo_weight(logs: LogRatios, A: Tensor, low: float, high: float):
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
    extras.COLUMNS["metrics"] += COLUMNS
    import train        # which reads these lists, and makes flags and columns of them
    train.main()


if __name__ == "__main__":
    main()
