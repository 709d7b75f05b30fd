"""Batches of the teacher's demonstrations for the cold start."""
import itertools
import random
from collections.abc import Iterator

Example = tuple[list[int], list[int]]       # prompt and response


def demonstrations(task, tokenizer, rng: random.Random) -> Iterator[Example]:
    """Endless pairs (prompt, response) of lists of token ids, the response with its end token.
    ValueError, naming the character, for one that has no token."""
    while True:
        problem = task.sample(rng)
        prompt = tokenizer.encode(problem.prompt)
        response = tokenizer.encode(task.demonstrate(problem, rng)) + [tokenizer.eos_id]
        yield prompt, response


def check(task, tokenizer, max_prompt: int, max_response: int):
    """ValueError if the model has no room for what the task asks or the teacher says, in one of
    3000 examples."""
    examples = demonstrations(task, tokenizer, random.Random("check"))
    for prompt, response in itertools.islice(examples, 3000):
        if not prompt:
            raise ValueError("the task gave an empty prompt; it needs at least one character")
        if len(prompt) > max_prompt:
            raise ValueError(f"a prompt of {len(prompt)} tokens is too long, {max_prompt} are the "
                             "limit; ask for shorter ones, by an option of the task: "
                             f"{tokenizer.decode(prompt)}")
        if len(response) > max_response:
            raise ValueError(f"--max_new_tokens {max_response} is too low for the teacher's "
                             f"{len(response)} at {tokenizer.decode(prompt)!r}; raise it")


def batches(task, tokenizer, seed: int, max_tokens: int) -> Iterator[list[Example]]:
    """Endless batches of at most `max_tokens` real tokens: lists of pairs (prompt, response). An
    example that is longer makes a batch of its own.

    Long and short examples are mixed. Sorting them by length would save padding, but then each
    batch teaches something different: in equal time the model learned no more."""
    rng = random.Random(f"{seed} demonstrations")
    batch = []
    room = max_tokens
    for prompt, response in demonstrations(task, tokenizer, rng):
        length = len(prompt) + len(response)
        if batch and length > room:
            yield batch
            batch = []
            room = max_tokens
        batch.append((prompt, response))
        room -= length
