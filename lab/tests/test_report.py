"""What a run reports: its numbers and curves."""
from types import SimpleNamespace

import pytest

from lab import report


def test_the_curves_have_a_line_for_the_kinds_that_end_alike():
    rows = [("0", "+1", "0.5"), ("0", "-1", "0.7"), ("0", "+2", "0.1"),
            ("9", "+1", "0.9"), ("9", "-1", "1.0"), ("9", "+2", "0.3")]
    table = [dict(zip(report.EVALUATION_COLUMNS, row)) for row in rows]
    lines = report.kind_lines(table)
    assert list(lines) == ["+1 -1", "+2"]
    assert lines["+1 -1"] == [(0, pytest.approx(0.6)), (9, pytest.approx(0.95))]
    assert lines["+2"] == [(0, 0.1), (9, 0.3)]


def test_the_share_without_a_signal_is_that_of_all_groups():
    rewards = [1, 1, 1, 0, 0, 0, 0, 1]
    responses = [SimpleNamespace(reward=reward) for reward in rewards]
    assert report.share_without_signal(responses, 2) == 0.5         # 11 and 00, not 10 and 01
    assert report.share_without_signal(responses, 4) == 0.0
    assert report.share_without_signal(responses[:3], 3) == 1.0


def test_a_metric_is_the_mean_over_the_steps_that_have_it_and_over_the_layers():
    updates = [{"loss": 1.0, "expert_change": [0.0, 1.0]}, {"loss": 3.0, "clip": 0.5}]
    assert report.means(updates) == {"loss": 2.0, "expert_change": 0.5, "clip": 0.5}


def test_a_response_that_was_truncated_neither_thinks_nor_answers_at_once():
    def response(truncated, thinks, reward, length):
        return SimpleNamespace(truncated=truncated, thinks=thinks, reward=reward, length=length,
                               measures={"trials": length})
    numbers = report.response_metrics([
        response(True, False, 0.0, 9), response(False, True, 1.0, 6),
        response(False, False, 0.0, 2), response(False, False, 1.0, 3)])
    assert numbers["truncated"] == numbers["think"] == 0.25
    assert numbers["reward"] == numbers["reward_direct"] == 0.5
    assert numbers["reward_thinking"] == 1.0
    assert numbers["length"] == numbers["trials"] == 5
    assert numbers["length_direct"] == 2.5
    assert numbers["length_right"] == 4.5
    assert numbers["length_wrong"] == 5.5
