"""Signals, and errors in a step: both leave a checkpoint, and a line that says where."""
import signal
from math import nan
from pathlib import Path

import pytest
import torch

import gspo
import moe
from data import arithmetic
from lab import preflight
from lab.tests.tools import SHORT, do_nothing, metrics, signal_at


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_stops(train, monkeypatch, capsys, number):
    with monkeypatch.context() as patch:
        signal_at(2, number, patch=patch)
        assert train(*SHORT, "4", "--out", "run") == 130
    assert "python train.py --resume --out run" in capsys.readouterr().out
    assert len(metrics("run")) == 2
    assert torch.load("run/checkpoint.pt", weights_only=True)["progress"]["step"] == 2
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    assert train("--resume", "--out", "run") == 0


def test_a_second_ctrl_c_does_not_wait_and_the_last_checkpoint_stays(train, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        signal_at(3, signal.SIGINT, times=2, patch=patch)
        assert train(*SHORT, "4", "--save_every", "1", "--out", "run") == 130
    assert "stopped at once" in capsys.readouterr().out
    assert torch.load("run/checkpoint.pt", weights_only=True)["progress"]["step"] == 2
    assert train("--resume", "--out", "run") == 0


def test_a_signal_in_the_last_step_stops_nothing(train, monkeypatch):
    with monkeypatch.context() as patch:
        signal_at(2, signal.SIGINT, patch=patch)
        assert train(*SHORT, "2", "--out", "run") == 0
    assert Path("run/summary.json").exists()


def nan_advantages(rewards):
    return rewards * nan


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(train, monkeypatch):
    monkeypatch.setattr(gspo, "group_advantages", nan_advantages)
    message = train(*SHORT, "5")
    assert "step 1:" in message
    assert "out/run-1/checkpoint.pt has the model as it was after step 0" in message
    assert train("--eval_only") == 0
    assert train("--ask", "4+4=") == 0


def test_a_reward_that_is_no_number_stops_the_run_and_keeps_the_checkpoint(train, monkeypatch):
    assert train(*SHORT, "2") == 0

    def no_number(self, problem, response):
        return nan
    monkeypatch.setattr(arithmetic.Task, "reward", no_number)
    monkeypatch.setattr(preflight, "check", do_nothing)         # which would see it
    message = train("--resume", "--steps", "5")
    assert "step 3: rewards must be finite" in message
    assert "out/run-1/checkpoint.pt has the model as it was after step 2" in message


def test_a_cold_start_that_is_not_finite_says_so(train, monkeypatch):
    def no_number(routes, router_logits, mask):
        return router_logits.sum() * nan
    monkeypatch.setattr(moe, "balance_loss", no_number)
    message = train(*SHORT, "1", "--fresh")
    assert "cold start: the gradient has length nan" in message
    assert "there is no checkpoint yet" in message
