"""--kl_coef: keep the policy near the model after the cold start, by a term in the loss."""
import copy
import dataclasses

from torch import Tensor

import gspo
from lab.options import option

COLUMNS = ("kl_ref",)


@dataclasses.dataclass
class Options:
    """the KL term"""
    kl_coef: float = option(0.0, "weight of the KL to the cold start's policy, off in GSPO", 0, 99)


def wanted(config) -> bool:
    return config.kl_coef > 0


def kl_loss(logp: Tensor, logp_ref: Tensor, mask: Tensor, weights: Tensor) -> Tensor:
    """KL(policy || reference), a scalar: the sum over all tokens of weights (B,) times
    k3 = x - 1 - log x with x = pi_ref / pi, as in GRPO. Its value is never negative and unbiased
    over tokens of the policy. Its gradient, with the tokens held fixed, is in expectation that of
    KL(reference || policy). logp, logp_ref and mask are (B, T)."""
    log_x = -gspo.log_ratios(logp, logp_ref, mask).log_w                   # (B, T)
    log_x = log_x.clamp(-gspo.MAX_LOG_RATIO, gspo.MAX_LOG_RATIO)
    return ((log_x.expm1() - log_x).sum(dim=1) * weights).sum()


class Extra:
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.reference = None           # until there is a cold start
        self.loss_terms.append(self.kl_term)

    def kl_term(self, batch, scores):
        """The tokens have the weights that they have in the objective, as in TRL and verl."""
        return self.config.kl_coef * kl_loss(scores.logp, batch.logp_ref, batch.response_mask,
                                             batch.token_weights)

    def gradient(self, model, batch, *arguments):
        batch.logp_ref = self.score(self.reference, batch).logp
        return super().gradient(model, batch, *arguments)

    def measure(self, learned):
        rows = super().measure(learned)
        for row, x in zip(rows, learned):
            mask = x.batch.response_mask
            row["kl_ref"] = kl_loss(x.scores.logp, x.batch.logp_ref, mask,
                                    gspo.mean_of_means(x.batch.lengths)).item()
        return rows

    def cold_start(self):
        super().cold_start()
        self.reference = copy.deepcopy(self.model)

    def state_dict(self):
        return super().state_dict() | {"reference": self.reference.state_dict()}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.reference = copy.deepcopy(self.model)
        self.reference.load_state_dict(state["reference"])
