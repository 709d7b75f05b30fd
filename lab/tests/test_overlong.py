"""DAPO's penalty on responses that come near the longest there can be."""
import pytest
import torch

import gspo
from lab import report
from lab.extras.overlong import overlong_penalty
from lab.tests.tools import odd_trainer, sampled


def test_the_overlong_penalty_of_dapo():
    lengths = torch.tensor([80, 81, 90, 100, 101])
    penalty = overlong_penalty(lengths, 100, 20)
    assert penalty.tolist() == pytest.approx([0, -0.05, -0.5, -1, -1])


def test_advantages_are_those_of_the_rewards_with_the_penalty():
    trainer = odd_trainer(overlong=40)
    rollout = sampled(trainer)
    rewards = []
    for reward, length in zip(rollout.rewards.tolist(), rollout.lengths.tolist()):
        rewards.append(reward - min(1, max(0, length - 24) / 40))      # 64 is the longest
    assert rewards != rollout.rewards.tolist()
    by_hand = gspo.group_advantages(torch.tensor(rewards).view(-1, 4)).flatten()
    torch.testing.assert_close(rollout.advantages, by_hand)


def test_the_rewards_that_are_logged_and_dynamic_sampling_are_the_tasks():
    plain = odd_trainer()
    punished = odd_trainer(overlong=40)
    responses, _ = plain.rl_step(1)
    same_responses, _ = punished.rl_step(1)
    assert [r.reward for r in responses] == [r.reward for r in same_responses]
    assert (report.share_without_signal(responses, 4)
            == report.share_without_signal(same_responses, 4))
