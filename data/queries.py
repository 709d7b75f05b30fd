"""Which problems to ask next: RL learns only from those that are sometimes right, sometimes wrong.

A group of responses that are all right or all wrong teaches nothing. If a response is right with
probability p, the variance of its reward is p(1 - p), which is largest at p = 1/2. So `Queries`
keeps an estimate of p for every kind of problem, and asks kinds in proportion to p(1 - p): what the
model knows gives way to what it is about to learn. The estimates start at 1/2, where a kind is
asked most. A little is added for every kind, so that none is forgotten. (p is an average over the
problems of a kind: good enough where these are about equally hard.)
"""
import random

HALF_LIFE = 100     # a response counts half as much after so many newer ones of its kind
LITTLE = 0.02       # is added to p(1 - p), which is at most 0.25


class Queries:
    """Draws the problems of an RL step. A task without `kinds` decides itself what is asked."""
    def __init__(self, task, adaptive: bool, success_rates: dict[str, float]):
        """`success_rates`, the estimate p of each kind, may be empty. `learn` changes this dict in
        place: whoever has it, such as a checkpoint, has all there is to go on from."""
        self.task = task
        self.kinds = list(getattr(task, "kinds", ()))
        self.adaptive = adaptive
        self.success_rates = success_rates
        for kind in self.kinds:
            success_rates.setdefault(kind, 0.5)

    def weights(self) -> list[float]:
        """How often each kind is asked, up to a factor."""
        if not self.adaptive:
            return [1.0] * len(self.kinds)
        estimates = [self.success_rates[kind] for kind in self.kinds]
        return [p * (1 - p) + LITTLE for p in estimates]

    def draw(self, n: int, rng: random.Random) -> list:
        """The next n problems."""
        if not self.kinds:
            return [self.task.sample(rng) for _ in range(n)]
        kinds = rng.choices(self.kinds, self.weights(), k=n)
        return [self.task.sample(rng, kind) for kind in kinds]

    def learn(self, responses: list):
        """Bring the estimates up to date with responses that have a `problem.kind` and a `reward`.
        Rewards are limited to the range from 0 to 1 first."""
        for kind in self.kinds:
            rewards = [min(1.0, max(0.0, response.reward)) for response in responses
                       if response.problem.kind == kind]
            if rewards:
                left = 0.5 ** (len(rewards) / HALF_LIFE)        # of the old responses' weight
                mean = sum(rewards) / len(rewards)
                self.success_rates[kind] = left * self.success_rates[kind] + (1 - left) * mean
