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
    def measure(self, learned):
        rows = super().measure(learned)
        for row, x in zip(rows, learned):
            row |= ratio_metrics(x.scores.logp, x.batch.logp_old, x.batch.advantages, x.clipped,
                                 x.batch.response_mask)
            row |= routing_metrics(predicting(x.batch, x.batch.routes),
                                   predicting(x.batch, x.scores.routes),
                                   predicting(x.batch, x.scores.router_logits))
            if x.mini_batch == 0:       # the trainer has not moved yet
                row |= mismatch_metrics(x.batch, x.scores)
        return rows
