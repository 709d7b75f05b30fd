"""Score the rollout again before the update, with the trainer's own pass: for another logp_old than
the sampler's (--recompute_logp_old), for weights against its mismatch (--correction), or to record
the experts to replay (--routing_replay r2)."""
import dataclasses
import time

import torch
from torch import Tensor

import gspo
from lab.measures import mismatch_metrics
from lab.options import option

COLUMNS = ("seconds_rescoring",)
ROUTING_REPLAY = ("r2",)


@dataclasses.dataclass
class Options:
    """scoring again before the update"""
    recompute_logp_old: bool = option(False, "score again, do not trust the sampler's log-probs "
                                      "(--routing_replay r2 scores again too, to replay the "
                                      "experts of that pass)")
    correction: str = option("none", "score again and weigh tokens by how far off the sampler was",
                             choices=("none", "tis", "icepop"))


def wanted(config) -> bool:
    if config.correction != "none" and not gspo.ALGORITHMS[config.algorithm].per_token:
        raise ValueError(f"correction is {config.correction}, which weighs tokens, but "
                         f"{config.algorithm} weighs whole responses; take gspo_token")
    return (config.recompute_logp_old or config.correction != "none"
            or config.routing_replay == "r2")


def mismatch_weights(kind: str, logp_old: Tensor, logp_sampler: Tensor) -> Tensor:
    """What to multiply each token's advantage with if the sampler's policy mu, say one in lower
    precision, was not quite pi_old: pi_old / mu, at most 2 ("tis", truncated importance sampling)
    or 0 outside [0.5, 5] ("icepop"). All (B, T). Not to be confused with the objective's ratio."""
    ratio = (logp_old - logp_sampler).clamp(max=gspo.MAX_LOG_RATIO).exp()
    if kind == "tis":
        return ratio.clamp(max=2.0)
    return torch.where((ratio >= 0.5) & (ratio <= 5), ratio, 0)


class Extra:
    def advantages(self, rollout):
        config = self.config
        began = time.time()
        # r2 records the experts of this pass, r3 replays those of the sampler in it.
        scores = self.score(self.model, rollout, config.routing_replay == "r3")
        self.measured |= mismatch_metrics(rollout, scores)
        self.measured["seconds_rescoring"] = time.time() - began
        logp_sampler = rollout.logp_old
        rollout.logp_old = scores.logp
        rollout.routes = scores.routes.to(torch.uint8)
        advantages = super().advantages(rollout)
        if config.correction == "none":
            return advantages
        weights = mismatch_weights(config.correction, rollout.logp_old, logp_sampler)   # (B, T)
        return advantages.view(len(weights), -1) * weights
