"""Dynamic sampling: rollouts of different widths that are joined."""
import torch

import gspo
from lab.extras.dynamic_sampling import join
from test_gspo import (
    closely,
    one_thread_and_one_seed,        # noqa: F401 - a fixture of all tests here
    parametrize, sample, slow_scores, tiny)


def two_rollouts(model):
    """One with wide prompts and short responses, one with narrow prompts and long responses."""
    wide = sample(model, max_new_tokens=3)
    wide.rewards = torch.arange(12.0)
    long = sample(model, [[2], [3]], max_new_tokens=6, seed=1)
    long.rewards = torch.arange(20.0, 28)
    return wide.select(torch.tensor([8, 9, 10, 11, 0, 1, 2, 3])), long


@parametrize("replay", [False, True])
def test_joined_rollouts_keep_the_scores_of_their_rows(replay):
    model = tiny()
    wide, long = two_rollouts(model)
    joined = join([wide, long])
    scores = gspo.score(model, joined, replay=replay)
    for row, n in enumerate(joined.lengths.tolist()):
        logp, _ = slow_scores(model, (wide, long)[row // 8], row % 8)
        closely(joined.logp_old[row, :n], logp)
        closely(scores.logp[row, :n], logp)


def test_joined_rollouts_keep_what_is_known_of_their_rows():
    wide, long = two_rollouts(tiny())
    joined = join([wide, long])
    assert joined.tokens.shape == joined.mask.shape == (16, 5 + 6)
    assert joined.prompt_width == 5
    assert joined.rewards.tolist() == [8, 9, 10, 11, 0, 1, 2, 3, 20, 21, 22, 23, 24, 25, 26, 27]
    for row in range(16):
        rollout = (wide, long)[row // 8]
        mask = rollout.mask[row % 8]
        for name in ("tokens", "routes"):
            in_joined = getattr(joined, name)[row, joined.mask[row]]
            assert torch.equal(in_joined, getattr(rollout, name)[row % 8, mask])
    assert not joined.routes[~joined.mask].any()
    assert not joined.logp_old[~joined.response_mask].any()


def test_one_rollout_stays_as_it_is():
    _, long = two_rollouts(tiny())
    joined = join([long])
    for name in ("tokens", "mask", "logp_old", "routes", "rewards"):
        assert torch.equal(getattr(joined, name), getattr(long, name))
