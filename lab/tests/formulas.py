"""A trainer of the tiny model of test_gspo.py, with extras but without a task."""
import torch

import gspo
import train
from lab import extras
from test_gspo import tiny


class Tiny(train.Trainer):
    """Without a task there is nothing to sample or to evaluate; a rollout comes from the test."""
    def __init__(self, config, task):
        self.config = config
        self.model = tiny()
        self.device = torch.device("cpu")
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.loss_terms = []
        self.measured = {}

    def collect(self, model, rng):
        """The model that is to sample, in place of a rollout."""
        return model


def trainer(model=None, **options):
    """A trainer with the extras that the options ask for, whose model begins as the given one. By
    default it makes one step per update, and no gradient is too long."""
    small = {"d_model": 16, "group_size": 4, "mini_batches": 1, "max_new_tokens": 6,
             "max_grad_norm": 1e9}
    config = train.Config(**small | options)
    result = extras.extend(Tiny, config)(config, None)
    if model:
        result.model.load_state_dict(model.state_dict())
    return result


def update(trainer, rollout, lr=0.1):
    """The second half of an RL step -> its optimiser steps."""
    for group in trainer.optimizer.param_groups:
        group["lr"] = lr
    rollout.advantages = trainer.advantages(rollout)
    return gspo.update(trainer.model, trainer.optimizer, rollout, trainer.config,
                       trainer.loss_terms, trainer.gradient, trainer.optimizer_step)
