"""Responses of a model to the problems of a task, and what they are worth.

The letters are those of gspo.py: P problems, G responses to each, B = P*G rows."""
import copy
import random
from typing import NamedTuple

import torch

import moe
from data.rollout import Rollout


class Response(NamedTuple):
    problem: object
    text: str | None    # without `<end>`; None if it was cut before it, which is worth 0
    reward: float
    length: int         # tokens


def respond(config, task, tokenizer, model, problems, n, generator=None):
    """Sample n responses to each problem, or the greedy one if there is no generator, and reward
    them -> the rollout and, row by row, a list of Response."""
    rollout = moe.generate(model, [tokenizer.encode(problem.prompt) for problem in problems], n,
                           config.max_new_tokens, config.temperature, tokenizer.end, tokenizer.pad,
                           generator, greedy=generator is None)
    responses = []
    for i, length in enumerate(rollout.lengths.tolist()):
        problem, row = problems[i // n], rollout.tokens[i, :length].tolist()
        text = tokenizer.decode(row[:-1]) if row[-1] == tokenizer.end else None
        reward = 0.0 if text is None else float(task.reward(problem, text))
        responses.append(Response(problem, text, reward, length))
    return rollout, responses


def held_out_problems(task):
    """The task's held-out set; if it has none, problems as in training, of which some may occur."""
    return task.held_out() if hasattr(task, "held_out") else \
        [task.sample(random.Random(f"held out {i}")) for i in range(400)]


def overlong_penalty(lengths, longest, margin):
    """What DAPO (2503.14476, Eq. 13) adds to the reward: 0 for responses up to `longest - margin`
    tokens, then less with every token, -1 from `longest` on. No `margin`, no penalty."""
    return ((longest - margin - lengths) / margin).clamp(-1, 0) if margin else 0.0 * lengths


def explore(config, task, tokenizer, model, step):
    """Sample P groups of G responses and reward them -> rollout, rewards (P, G) with the overlong
    penalty, and the Responses of all that was sampled, without it.

    With --dynamic_sampling, groups that are all right or all wrong are dropped and new problems
    drawn. If the last round leaves gaps, dropped groups of that round fill them."""
    rng, P, G = random.Random(f"{config.seed} rl {step}"), config.prompts, config.group_size
    sampler = copy.deepcopy(model).bfloat16() if config.sampler == "bfloat16" else model
    rollouts, groups, rewards, responses, missing = [], [], [], [], P
    for rounds_left in reversed(range(config.sampling_rounds if config.dynamic_sampling else 1)):
        problems = [task.sample(rng) for _ in range(P)]
        rollout, new = respond(config, task, tokenizer, sampler, problems, G,
                               torch.Generator().manual_seed(rng.getrandbits(63)))
        reward = torch.tensor([response.reward for response in new]).view(P, G)
        silent = reward.amax(dim=1) == reward.amin(dim=1)                   # (P,)
        with_signal_first = silent.int().argsort(stable=True)
        n_signal = int((~silent).sum())
        take = with_signal_first[:min(missing, n_signal if rounds_left else P)].sort().values
        if config.dynamic_sampling and not rounds_left and n_signal < missing:
            print(f"  step {step}: after {config.sampling_rounds} rounds of sampling "
                  f"{missing - n_signal} of {P} groups have no signal; see --sampling_rounds")
        penalty = overlong_penalty(rollout.lengths, config.max_new_tokens, config.overlong)
        rewards.append((reward + penalty.view(P, G).cpu())[take])
        rollouts.append(rollout), groups.append(take.tolist()), responses.extend(new)
        missing -= len(take)
        if not missing:
            break
    return Rollout.join(rollouts, groups), torch.cat(rewards), responses
