"""--overlong: punish responses that come near the longest length there can be (DAPO)."""
import dataclasses

from torch import Tensor

from lab.options import option


@dataclasses.dataclass
class Options:
    """the overlong penalty of DAPO"""
    overlong: int = option(0, "so many tokens before --max_new_tokens the reward begins to fall, "
                           "to 1 less at the end (DAPO); 0: it does not", 0, 1000)


def wanted(config) -> bool:
    if config.overlong > config.max_new_tokens:
        raise ValueError(f"overlong is {config.overlong}; it must be at most --max_new_tokens, "
                         f"{config.max_new_tokens}")
    return config.overlong > 0


def overlong_penalty(lengths: Tensor, longest: int, margin: int) -> Tensor:
    """What DAPO (2503.14476, Eq. 13) adds to the reward: 0 for responses up to `longest - margin`
    tokens, then less with every token, -1 from `longest` on."""
    return ((longest - margin - lengths) / margin).clamp(-1, 0)


class Extra:
    def advantages(self, rollout):
        """Not in `collect`: whether a group has a signal, and how right a response is, is for the
        task's reward to say."""
        rewards = rollout.rewards
        rollout.rewards = rewards + overlong_penalty(rollout.lengths, self.config.max_new_tokens,
                                                     self.config.overlong)
        advantages = super().advantages(rollout)
        rollout.rewards = rewards
        return advantages
