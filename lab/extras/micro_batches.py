"""--micro_tokens: compute a mini-batch in parts, which bounds the memory. In the model no row
influences another, and every token has its weight already: so the losses and gradients of the parts
add up to those of the whole, and their scores, one below the other, are its scores."""
import dataclasses

import torch

from gspo import Learned, Scores
from lab.options import option


@dataclasses.dataclass
class Options:
    """micro-batches"""
    micro_tokens: int = option(0, "rows times columns in a pass of an update, which bounds the "
                               "memory; 0: a whole mini-batch", 0)


def wanted(config) -> bool:
    return config.micro_tokens > 0


class Extra:
    def parts(self, batch):
        """The batch in parts of at most `micro_tokens` cells, at least one row each."""
        B, S = batch.tokens.shape
        return [batch.select(rows)
                for rows in torch.arange(B).split(max(1, self.config.micro_tokens // S))]

    def gradient(self, model, batch, *arguments):
        if len(batch.tokens) == 0:
            return None
        parts = []
        for part in self.parts(batch):
            parts.append(super().gradient(model, part, *arguments))
        scores = Scores(*map(torch.cat, zip(*(part.scores for part in parts))))
        return Learned(batch, scores, sum(part.loss for part in parts),
                       torch.cat([part.clipped for part in parts]))

    def score(self, model, rollout, replay=False):
        scores = []
        for part in self.parts(rollout):
            scores.append(super().score(model, part, replay))
        return Scores(*map(torch.cat, zip(*scores)))
