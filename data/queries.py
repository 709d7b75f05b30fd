"""Which problems to ask next: in RL only those teach that are sometimes answered right.

A group of responses that are all right or all wrong teaches nothing. If a response is right with
the chance p, the variance of its reward is p(1 - p), which is largest at p = 1/2. So `Queries`
keeps an estimate of p for every kind of problem, and asks kinds in proportion to p(1 - p): what the
model knows gives way to what it is about to learn. The estimates start at 1/2, where a kind is
asked most. A little is added for every kind, so that none is forgotten.
"""
import random

HALF_LIFE = 100     # responses of a kind, after which an old one counts half as much
LITTLE = 0.02       # the weight of a kind that is always right, beside 0.25 at p = 1/2


class Queries:
    """Draws the problems of an RL step. A task without `kinds` decides itself what is asked."""
    def __init__(self, task, adaptive: bool, rates: dict[str, float]):
        """`rates`, the estimate p of each kind, may be empty; `learn` changes it in place, so that
        whoever keeps it, such as a checkpoint, has all there is to go on from."""
        self.task = task
        self.kinds = list(getattr(task, "kinds", ()))
        self.adaptive = adaptive
        self.rates = rates
        for kind in self.kinds:
            rates.setdefault(kind, 0.5)

    def weights(self) -> list[float]:
        """How often each kind is asked, up to a factor."""
        if not self.adaptive:
            return [1.0] * len(self.kinds)
        return [self.rates[kind] * (1 - self.rates[kind]) + LITTLE for kind in self.kinds]

    def draw(self, n: int, rng: random.Random) -> list:
        """The next n problems."""
        if not self.kinds:
            return [self.task.sample(rng) for _ in range(n)]
        kinds = rng.choices(self.kinds, self.weights(), k=n)
        return [self.task.sample(rng, kind) for kind in kinds]

    def learn(self, responses: list):
        """Bring the estimates up to date with responses that have a `problem.kind` and a `reward`,
        which counts as 0 below 0 and as 1 above 1.

        n new responses of a kind, with the mean reward m: p becomes f p + (1 - f) m, in which
        f = 1/2 to the power of n / HALF_LIFE is what is left of the old ones."""
        for kind in self.kinds:
            rewards = [min(1.0, max(0.0, response.reward)) for response in responses
                       if response.problem.kind == kind]
            if rewards:
                left = 0.5 ** (len(rewards) / HALF_LIFE)
                mean = sum(rewards) / len(rewards)
                self.rates[kind] = left * self.rates[kind] + (1 - left) * mean
