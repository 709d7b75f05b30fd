"""Batches of the teacher's demonstrations for the cold start."""
import itertools
import random

import torch
from torch.nn.utils.rnn import pad_sequence


def demonstrations(task, tokenizer, rng, n=3000):
    """n pairs (prompt, response) of token lists; ValueError if a character has no token."""
    examples = []
    for _ in range(n):
        problem = task.sample(rng)
        response = tokenizer.encode(task.demonstrate(problem, rng)) + [tokenizer.end]
        examples.append((tokenizer.encode(problem.prompt), response))
    return examples


def check(task, tokenizer, max_prompt, max_response):
    """ValueError if the model has no room for what the teacher says; RL could not sample it."""
    for prompt, response in demonstrations(task, tokenizer, random.Random("check")):
        if len(prompt) > max_prompt:
            raise ValueError(f"a prompt of {len(prompt)} tokens is too long, {max_prompt} are the "
                             f"limit: {tokenizer.decode(prompt)}")
        if len(response) > max_response:
            raise ValueError(f"--max_new_tokens {max_response} is too low for the teacher's "
                             f"{len(response)} at {tokenizer.decode(prompt)!r}; raise it")


def batches(task, tokenizer, seed, max_tokens):
    """Endless batches [(prompt, response), ...] of token lists, `<end>` included.

    Examples of similar length stand together, so that a batch of at most `max_tokens` is nearly
    free of padding."""
    for pool in itertools.count():
        rng = random.Random(f"{seed} demonstrations {pool}")
        examples = demonstrations(task, tokenizer, rng)
        examples.sort(key=lambda example: len(example[0] + example[1]))
        cut = [[]]
        for example in examples:
            # The newest example is the longest of its batch: all rows are padded to its length.
            if cut[-1] and (len(cut[-1]) + 1) * len(example[0] + example[1]) > max_tokens:
                cut.append([])
            cut[-1].append(example)
        rng.shuffle(cut)
        yield from cut


def collate(batch, device):
    """A batch of b examples -> tokens (b, T), keep (b, T), target (M,).

    `keep` is True where the *next* token belongs to the response, `target` holds those tokens:

        prompt 3 10, response 7 9      tokens  3 10 7 9      keep  0 1 1 0      target 7 9
    """
    tokens = [torch.tensor(prompt + response) for prompt, response in batch]
    keep = [torch.tensor([False] * (len(prompt) - 1) + [True] * len(response) + [False])
            for prompt, response in batch]
    target = torch.cat([torch.tensor(response) for _, response in batch])
    tokens, keep = (pad_sequence(rows, batch_first=True) for rows in (tokens, keep))
    return tokens.to(device), keep.to(device), target.to(device)
