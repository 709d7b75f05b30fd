"""What several of these tests use."""
import copy
import csv
import itertools
import random
import signal
from pathlib import Path

import pytest
import torch

import gspo
import train
from data import arithmetic, demonstrations
from lab import extras

HOUSE = Path(__file__).parent.parent.parent
LAST_WORDS = []         # lines that pytest prints at the end (conftest.py)
# The options of a run of seconds, up to the number of RL steps.
SHORT = ("--cold_steps", "30", "--cold_tokens", "400", "--prompts", "4", "--group_size", "4",
         "--max_digits", "1", "--max_new_tokens", "20", "--n_layer", "2", "--threads", "1",
         "--device", "cpu", "--steps")
NUMBERS = ("step", "reward", "loss", "grad_norm", "entropy", "accuracy")
# A smallest task.
PLAIN = """
class Problem:
    prompt = "1+1="

class Task:
    def sample(self, rng):
        return Problem()
    def demonstrate(self, problem, rng):
        return rng.choice("23")
    def reward(self, problem, response):
        return response == "2"
"""
# Another one, whose evaluations take no time.
BRIEF = PLAIN.replace('response == "2"', 'response.startswith("2")') + """
    def held_out(self):
        return [Problem()] * 20
"""
# The options of a trainer that makes a step in a moment.
TINY = {"threads": 1, "device": "cpu", "n_layer": 2, "d_model": 16, "n_expert": 4, "d_expert": 16,
        "prompts": 8, "group_size": 4, "mini_batches": 2, "max_new_tokens": 24, "out": "unused"}


def metrics(folder, names=NUMBERS):
    """The columns of these names in a run's metrics.csv, row by row."""
    with open(f"{folder}/metrics.csv") as file:
        return [[row[name] for name in names] for row in csv.DictReader(file)]


def signal_at(call, number, times=1, patch=None):
    """Send a signal, or several, when gspo.update is called for the `call`-th time."""
    update = gspo.update
    calls = itertools.count(1)

    def interrupted(*arguments, **options):
        if next(calls) == call:
            for _ in range(times):
                signal.raise_signal(number)
        return update(*arguments, **options)
    (patch or pytest.MonkeyPatch()).setattr(gspo, "update", interrupted)


def one_line(message):
    return isinstance(message, str) and message.startswith("train.py: ") and "\n" not in message


def do_nothing(*arguments):
    pass


def no_curves(folder):
    """A second saved: an empty curves.png."""
    path = Path(folder) / "curves.png"
    path.touch()
    return path


all_held_out = arithmetic.Task.held_out


def few_held_out(task):
    """Some of each kind: evaluations are most of a short run."""
    return all_held_out(task)[::5]


class Odd(arithmetic.Task):
    """A task in which an untrained model has something to learn: responses of odd length."""
    def reward(self, problem, response):
        return len(response) % 2


def odd_trainer(**options):
    """A trainer that has not learned anything, with the extras that the options ask for, and if one
    of them has a reference, it is not quite the model."""
    config = train.Config(**TINY | {"lr": 0.003, "max_new_tokens": 64} | options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demonstrations, "check", do_nothing)      # it takes most of the time
        trainer = extras.extend(train.Trainer, config)(config, Odd(max_digits=1))
    if hasattr(trainer, "reference"):
        trainer.reference = copy.deepcopy(trainer.model)
        nudge(trainer.reference, 1)
    return trainer


def nudge(module, seed, size=0.02):
    """Move all weights a little."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)


def sampled(trainer):
    """A rollout as in an RL step, with its advantages."""
    rollout, _ = trainer.collect(trainer.model, random.Random("a rollout"))
    rollout.advantages = trainer.advantages(rollout)
    return rollout


def gradients(trainer, rollout, n=1):
    """The gradients of the first n mini-batches, as the optimiser would get them, each (numbers,),
    those of the model first. The model does not move."""
    result = []

    def look(parameters, optimizers, max_grad_norm):
        zero = torch.zeros(1)
        flat = [(zero.expand_as(p) if p.grad is None else p.grad).flatten() for p in parameters]
        result.append(torch.cat(flat))
        return 0.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Trainer, "optimizer_step", staticmethod(look))
        gspo.update(trainer.model, trainer.optimizer, rollout, trainer.config, trainer.loss_terms,
                    trainer.gradient, trainer.optimizer_step)
    return result[:n]
