"""What the options can add to the core: one file each, which a reader can skip and a forker delete,
together with its name below. metrics, cold_cache and interrupts are always at work.

A file has any of these:

    Options             a dataclass whose fields become flags, under its docstring as a title: each
                        is a lab.options.option(default, help, lowest, highest)
    wanted(config)      True if the options ask for the extra; ValueError for options that do not go
                        together
    Extra               a class that is put in front of train.Trainer. It overrides methods of the
                        list below, and gets what they do without it by super()
    COLUMNS             names of what it measures: each a column of metrics.csv. UPDATE_COLUMNS are
                        those of updates.csv, LAYER_COLUMNS those of which every layer has one
    ROUTING_REPLAY      names of more ways of --routing_replay

An Extra may override these methods of train.Trainer:

    collect(model, rng)         sample a rollout with the model -> it, with its rewards, and all
                                responses that were sampled for it
    advantages(rollout)         (B,) or (B, T), from rollout.rewards; the model has not moved yet
    gradient(model, batch, config, loss_terms)      gspo.gradient
    optimizer_step(parameters, optimizers, max_grad_norm)       gspo.optimizer_step; cold start too
    score(model, rollout, replay)                   gspo.score for extras, without a gradient
    measure(learned)            the rows of updates.csv, from what gspo.update returns
    cold_start(), evaluate(), rl_step(step), rl(), run(), state_dict(), load_state_dict(state)

and may add to two of its attributes in its own __init__(self, *arguments):

    loss_terms      functions of a moe.Rollout and its gspo.Scores -> a scalar, which is added to
                    the policy loss and minimised, but not logged as a part of it. A term is a sum
                    of tokens that count batch.token_weights (B,), as in the policy loss (1/(B |y|)
                    in gspo), and nothing else: micro_batches, precision and team rely on it.
                        def bonus(batch, scores):
                            entropy = (scores.entropy * batch.response_mask).sum(dim=1)
                            return -0.01 * (entropy * batch.token_weights).sum()
                    With a term, responses with A = 0 are learned from and measured too.
    measured        a dict {column: number} for the row of metrics.csv, new in each RL step
"""
import importlib
import inspect
import itertools

import torch

import gspo
from lab.options import check_options

# The first one is outermost: it is called first, and calls the next by super(). What encloses
# stands before what it encloses, what replaces a method behind all that call it.
NAMES = [
    "mistakes",             # around all that an RL step does
    "team",                 # averages the gradients before precision divides them by its scale
    "interrupts",
    "metrics",
    "kl_term",              # scores the reference for a whole mini-batch
    "precision",            # before micro_batches and all who score, whose types it sets
    "micro_batches",
    "rescoring",            # corrects whatever advantages there are, the penalty included
    "overlong",             # adds to the rewards that advantages are made of
    "other_sampler",        # one sampler for all rounds of dynamic_sampling
    "dynamic_sampling",
    "critic",               # replaces the advantages
    "relatives",
    "cold_cache",           # takes the place of the cold start, but not of what follows it
]
EXTRAS = [importlib.import_module(f"lab.extras.{name}") for name in NAMES]
OPTIONS = [extra.Options for extra in EXTRAS if hasattr(extra, "Options")]

def all_of(kind):
    return list(itertools.chain(*(getattr(extra, kind, ()) for extra in EXTRAS)))


COLUMNS = {"metrics": all_of("COLUMNS"),
           "updates": all_of("UPDATE_COLUMNS"), "layers": all_of("LAYER_COLUMNS")}
ROUTING_REPLAY = all_of("ROUTING_REPLAY")


class Scorer:       # stands between the extras and Trainer
    @torch.no_grad()
    def score(self, model, rollout, replay=False):
        return gspo.score(model, rollout, self.config.temperature, replay)


def extend(Trainer, config):
    """The class Trainer with the extras that the options ask for. ValueError if one of them would
    hide what another one does: a method that does not call super() ends the chain."""
    check_options(config)
    wanted = [extra.Extra for extra in EXTRAS if extra.wanted(config)]
    Trainer = type("Trainer", (Scorer, Trainer), {})
    replaced_by = {}            # name of a method -> the extra that ends its chain
    for Extra in wanted:
        for name, method in vars(Extra).items():
            if not inspect.isfunction(method) or not hasattr(Trainer, name):
                continue
            if name in replaced_by:
                raise ValueError(f"{replaced_by[name]} and {Extra.__module__} do not go together: "
                                 f"the {name} of the first would hide that of the second")
            if "super()" not in inspect.getsource(method):
                replaced_by[name] = Extra.__module__
    return type("Trainer", (*wanted, Trainer), {})
