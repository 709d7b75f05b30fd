"""--mistake NAME plants a known mistake. What does it look like in the log of a run?

    python train.py --mistake "?"               one of them at random, not named: find it,
    python -m lab.extras.mistakes out/run-1     then ask which it was, and what shows it

A wrong function takes the place of a right one, but only in RL steps: the cold start, evaluations
and --inspect stay right. Each docstring says what is wrong, and how it comes about."""
import dataclasses
import random
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch.nn import functional as F

import gspo
import moe
from gspo import clip, group_advantages, policy_loss, score, update       # the right ones
from lab import runs
from lab.options import option
from moe import choose

experts_forward = moe.Experts.forward


def mask_shifted(algorithm, logp, logp_old, A, mask, *rest):
    """Padding stands in place of the first token: labels were shifted, but not their mask."""
    return policy_loss(algorithm, logp, logp_old, A, F.pad(mask, (1, -1)), *rest)


def end_left_out(algorithm, logp, logp_old, A, mask, *rest):
    """The last token is not learned: padding is the end token, and all padding was masked."""
    return policy_loss(algorithm, logp, logp_old, A, mask & F.pad(mask[:, 1:], (0, 1)), *rest)


def sum_for_mean(x, mask):
    """s has no power 1/|y|: the ratios of tokens were multiplied, as in importance sampling."""
    return x.sum(dim=1, keepdim=True).expand_as(x)


def old_is_new(model, rollout, *rest, **options):
    """Every ratio is 1: old log-probs are computed in the update, by a detach() of the new ones."""
    scores = score(model, rollout, *rest, **options)
    rollout.logp_old = scores.logp.detach()
    return scores


def one_update(model, optimizer, rollout, config, *rest):
    """Every ratio is 1: there is one optimiser step for a rollout, from all of it."""
    config = SimpleNamespace(**vars(config) | {"mini_batches": 1, "epochs": 1})
    return update(model, optimizer, rollout, config, *rest)


def max_for_min(log_ratio, A, low, high):
    """The larger of the two terms: the sign of the loss was turned, but min was not."""
    ratio = gspo.to_ratio(log_ratio)
    worth = torch.maximum(ratio * A, ratio.clamp(1 - low, 1 + high) * A)
    return worth, clip(log_ratio, A, low, high)[1]


def range_of_grpo(algorithm, logp, logp_old, A, mask, low=None, high=None, weights=None):
    """GSPO has the clip range of GRPO: it was added as an option to a trainer for GRPO."""
    return policy_loss(algorithm, logp, logp_old, A, mask, low or 0.2, high or 0.27, weights)


def rewards_out_of_order(rewards):
    """Rewards go ABAB, responses AABB: one list repeats each prompt, the other all of them."""
    return group_advantages(rewards.T.reshape(rewards.shape))


def sampled_colder(logits, temperature, uniform):
    """Sampled at 0.7 times the temperature of scoring: only the engine divides the logits by it."""
    return choose(logits, 0.7 * temperature, uniform)


def capacity(experts, x, routes=None):
    """An expert serves 1.25 times its share of a pass, as in Switch: rows depend on each other."""
    y, routes, router_logits = experts_forward(experts, x, routes)
    places = F.one_hot(routes, router_logits.shape[1]).sum(dim=1).cumsum(dim=0)        # (N, E)
    most = max(1, 1.25 * routes.numel() / router_logits.shape[1])
    served = (places.gather(1, routes) <= most).all(dim=1, keepdim=True)   # (N, 1)
    return y * served, routes, router_logits


PLACES = {              # what each takes the place of
    mask_shifted: (gspo, "policy_loss"), end_left_out: (gspo, "policy_loss"),
    sum_for_mean: (gspo, "response_mean"), old_is_new: (gspo, "score"),
    one_update: (gspo, "update"), max_for_min: (gspo, "clip"),
    range_of_grpo: (gspo, "policy_loss"), rewards_out_of_order: (gspo, "group_advantages"),
    sampled_colder: (moe, "choose"), capacity: (moe.Experts, "forward")}
MISTAKES = {wrong.__name__: patch.object(*place, wrong) for wrong, place in PLACES.items()}


@dataclasses.dataclass
class Options:
    """a mistake, planted on purpose"""
    mistake: str = option("none", "make this mistake in GSPO; ? is one of them, at random, for you "
                          "to find", choices=("none", "?", *MISTAKES))


def wanted(config) -> bool:
    if config.mistake != "none" and config.algorithm != "gspo":
        raise ValueError(f"mistake is one in gspo; leave it out, or algorithm {config.algorithm}")
    return config.mistake != "none"


class Extra:
    def __init__(self, config, task):
        if config.mistake == "?":
            config.mistake = random.Random(str(config)).choice(list(MISTAKES))
        super().__init__(config, task)

    def rl_step(self, step):
        with MISTAKES[self.config.mistake]:
            return super().rl_step(step)

    def measure(self, learned):
        with MISTAKES[self.config.mistake]:
            return super().measure(learned)


# `python -m` warns of a file that its package imports.
warnings.filterwarnings("ignore", "'lab.extras.mistakes' found", RuntimeWarning)
if __name__ == "__main__":
    run = runs.load(Path(*sys.argv[1:2]) / "checkpoint.pt", "name the folder of a run")
    name = run["options"].get("mistake", "none")
    page = Path(__file__).parents[2] / "results/claims/mistakes.md"
    rows = [row for row in page.read_text(encoding="utf-8").splitlines() if f"| `{name}` |" in row]
    print(*rows or ["no mistake was planted"])
