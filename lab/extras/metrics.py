"""What ratios, routers and sampler look like in every optimiser step, for the tables of the run."""
from lab.measures import mismatch_metrics, predicting, ratio_metrics, routing_metrics

RATIO_COLUMNS = ("clip_low", "clip_high", "clip_low_seq", "clip_high_seq", "log_s_mean",
                 "log_s_std", "log_w_mean", "log_w_std", "outliers", "kl")
MISMATCH_COLUMNS = ("mismatch_mean", "mismatch_max", "mismatch_kl", "mismatch_experts")
LAYER_COLUMNS = ("expert_change", "expert_load", "router_entropy")
UPDATE_COLUMNS = RATIO_COLUMNS
COLUMNS = RATIO_COLUMNS + MISMATCH_COLUMNS + LAYER_COLUMNS


def wanted(config) -> bool:
    return True


class Extra:
    def measure(self, steps):
        rows = super().measure(steps)
        for row, step in zip(rows, steps):
            batch, scores, _, clipped = step.learned
            row |= ratio_metrics(scores.logp, batch.logp_old, batch.advantages, clipped,
                                 batch.response_mask)
            row |= routing_metrics(predicting(batch, batch.routes),
                                   predicting(batch, scores.routes),
                                   predicting(batch, scores.router_logits))
        if steps:       # before the first one the trainer has not moved
            rows[0] |= mismatch_metrics(steps[0].learned.batch, steps[0].learned.scores)
        return rows
