"""Dynamic sampling in whole runs."""
import json
import random
from pathlib import Path

import pytest

from lab import report
from lab.tests.tools import SHORT, metrics, odd_trainer


def test_every_group_that_is_learned_from_has_a_signal_and_the_log_counts_all_that_were_sampled():
    trainer = odd_trainer(dynamic_sampling=True, sampling_rounds=99, group_size=2)
    rollout, responses = trainer.collect(trainer.model, random.Random(0))
    rewards = rollout.rewards.view(8, 2)
    assert (rewards[:, 0] != rewards[:, 1]).all()
    sampled = [response.reward for response in responses]
    assert len(sampled) > 16
    silent = sum(first == second for first, second in zip(sampled[::2], sampled[1::2]))
    assert report.share_without_signal(responses, 2) == pytest.approx(silent / (len(sampled) / 2))


def test_each_row_still_has_the_reward_of_its_own_response():
    trainer = odd_trainer(dynamic_sampling=True, sampling_rounds=99, group_size=2)
    rollout, responses = trainer.collect(trainer.model, random.Random(0))
    known = [(r.text, r.truncated, r.reward) for r in responses]
    rows = zip(rollout.response.tolist(), rollout.lengths.tolist(), rollout.rewards.tolist())
    for ids, n, reward in rows:
        truncated = ids[n - 1] != trainer.tokenizer.eos_id
        text = trainer.tokenizer.decode(ids[:n] if truncated else ids[:n - 1])
        assert (text, truncated, reward) in known


def test_when_it_gives_up_groups_without_a_signal_fill_the_gaps_and_it_says_how_many(capsys):
    trainer = odd_trainer(dynamic_sampling=True, sampling_rounds=1, group_size=2)
    rollout, responses = trainer.collect(trainer.model, random.Random(0))
    rewards = rollout.rewards.view(8, 2)
    silent = (rewards[:, 0] == rewards[:, 1]).sum().item()
    assert len(responses) == 16
    assert 0 < silent < 8
    assert f"{silent} of 8 groups have no signal" in capsys.readouterr().out


def test_the_update_has_all_groups_that_were_asked_for():
    trainer = odd_trainer(dynamic_sampling=True, sampling_rounds=99, group_size=2, mini_batches=4)
    _, learned = trainer.rl_step(1)
    assert [len(x.batch.tokens) for x in learned] == [4, 4, 4, 4]
    assert all((x.batch.advantages != 0).all() for x in learned)


def test_a_run_logs_more_responses_with_it_than_without(train, capsys):
    assert train(*SHORT, "2", "--out", "without") == 0
    assert train(*SHORT, "2", "--out", "with", "--dynamic_sampling", "--sampling_rounds", "3") == 0
    summaries = [json.loads(Path(f"{name}/summary.json").read_text())
                 for name in ("without", "with")]
    assert summaries[0]["responses"] == 2 * 16
    assert 2 * 16 < summaries[1]["responses"] <= 2 * 3 * 16
    assert summaries[1]["responses"] % 16 == 0
    for name in ("without", "with"):
        for share, in metrics(name, ["no_signal"]):
            assert 0 <= float(share) <= 1
    assert "groups have no signal; see --sampling_rounds" in capsys.readouterr().out


def test_the_page_of_an_update_samples_until_there_is_something_to_see(train, capsys):
    assert train(*SHORT, "0") == 0
    assert train("--inspect") == 0
    page = capsys.readouterr().out
    assert "No response has a signal" not in page
    assert "right, A = +" in page
