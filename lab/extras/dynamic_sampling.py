"""--dynamic_sampling: sample until every group has a signal (DAPO, 2503.14476)."""
import dataclasses

import torch
from torch.nn import functional as F

from lab.options import option
from moe import Rollout


@dataclasses.dataclass
class Options:
    """dynamic sampling"""
    dynamic_sampling: bool = option(False, "sample until every group has a signal (DAPO)")
    sampling_rounds: int = option(10, "with --dynamic_sampling: at most so often", 1, 1000)


def wanted(config) -> bool:
    return config.dynamic_sampling


def join(rollouts: list[Rollout]) -> Rollout:
    """One rollout of several, fresh from the sampler: pad them to common widths and concatenate."""
    W = max(r.prompt_width for r in rollouts)
    T = max(r.response.shape[1] for r in rollouts)
    padded = []
    for r in rollouts:
        left = W - r.prompt_width
        right = T - r.response.shape[1]
        padded.append((F.pad(r.tokens, (left, right)), F.pad(r.mask, (left, right)),
                       F.pad(r.logp_old, (0, right)),
                       F.pad(r.routes, (0, 0, 0, 0, left, right)), r.rewards))
    tokens, mask, logp_old, routes, rewards = map(torch.cat, zip(*padded))
    return Rollout(tokens, mask, W, logp_old, routes, rewards)


class Extra:
    def collect(self, model, rng):
        """Drop groups that are all right or all wrong and sample new problems until there are P
        groups. After the last round, dropped groups of that round fill the gaps. The responses are
        all that were sampled."""
        P = self.config.prompts
        rounds = self.config.sampling_rounds
        kept = []
        all_responses = []
        missing = P
        for i in range(1, rounds + 1):
            rollout, responses = super().collect(model, rng)
            all_responses += responses
            rewards = rollout.rewards.view(P, -1)                           # (P, G)
            has_signal = rewards.amax(dim=1) > rewards.amin(dim=1)          # (P,)
            groups = has_signal.nonzero()[:, 0][:missing]
            missing -= len(groups)
            if missing and i == rounds:
                print(f"  after {i} rounds of sampling {missing} of {P} groups have no signal; "
                      "see --sampling_rounds")
                spare = (~has_signal).nonzero()[:, 0][:missing]
                groups = torch.cat((groups, spare)).sort().values
            rows = torch.arange(len(rollout.tokens), device=groups.device).view(P, -1)[groups]
            kept.append(rollout.select(rows.flatten()))
            if missing == 0:
                break
        return join(kept), all_responses
