"""Whole runs: they repeat themselves, go on after whatever stopped them, and lose nothing."""
import errno
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gspo
from lab import report, runs
from lab.tests.tools import (
    BRIEF, HOUSE, SHORT, metrics, odd_trainer, one_line, sampled, signal_at)

RUN_FILES = {"config.json", "metrics.csv", "updates.csv", "evaluations.csv", "summary.json",
             "samples.txt", "cold_start.pt", "checkpoint.pt", "curves.png", "lock"}


real_curves = report.curves


def kill_at(call, module, name, monkeypatch):
    """Stop the run, so that it saves nothing, when a function is called for the `call`-th time."""
    function = getattr(module, name)
    calls = itertools.count(1)

    def killed(*arguments, **options):
        if next(calls) == call:
            raise KeyboardInterrupt
        return function(*arguments, **options)
    monkeypatch.setattr(module, name, killed)


# ------------------------------------------------------------------------------------ a run

@pytest.mark.parametrize("options", [
    (),
    ("--algorithm", "ppo"),
    ("--kl_coef", "0.1", "--routing_replay", "r2"),
    ("--queries", "uniform"),
    ("--queries", "adaptive", "--dynamic_sampling", "--sampling_rounds", "2"),
    ("--lag", "2", "--epochs", "2", "--sampler", "int8"),
    ("--dtype", "float16"),
], ids=" ".join)
def test_a_resumed_run_equals_one_that_was_never_interrupted(train, monkeypatch, options):
    whole = (*SHORT, "6", "--out", "whole", "--eval_every", "4", *options)
    parts = (*SHORT, "6", "--out", "parts", "--eval_every", "4", *options)
    if not options:
        parts += ("--fresh",)           # a cold start repeats itself too
    assert train(*whole) == 0
    with monkeypatch.context() as patch:
        signal_at(3, signal.SIGINT, patch=patch)
        assert train(*parts) == 130
    assert len(metrics("parts")) == 3
    assert train("--resume", "--out", "parts") == 0
    assert metrics("parts") == metrics("whole")
    for table in ("updates.csv", "evaluations.csv"):
        assert Path(f"parts/{table}").read_text() == Path(f"whole/{table}").read_text()
    expected = torch.load("whole/checkpoint.pt", weights_only=True)
    resumed = torch.load("parts/checkpoint.pt", weights_only=True)
    assert set(expected) == set(resumed)
    for name, weights in expected["model"].items():
        assert torch.equal(resumed["model"][name], weights)
    assert resumed["success_rates"] == expected["success_rates"]
    assert set(resumed["success_rates"]) == {"+1", "-1", "*1", "/1"}
    assert {path.name for path in Path("parts").iterdir()} == RUN_FILES


def test_resume_makes_more_steps_but_no_other_run(train):
    assert train(*SHORT, "2") == 0
    assert train("--resume", "--lr", "0.1") == 2            # another run
    assert train("--resume") == 2                           # nothing left to do
    assert train("--resume", "--steps", "3") == 0
    assert len(metrics("out/run-1")) == 3


def test_the_reward_rises_in_a_miniature_run_past_that_of_the_teacher(train):
    assert train("--max_digits", "1", "--think", "0", "--guess", "0.5", "--max_new_tokens", "12",
                 "--n_layer", "2", "--cold_steps", "200", "--cold_tokens", "1280",
                 "--prompts", "16", "--steps", "20", "--lr", "1e-3", "--threads", "1",
                 "--device", "cpu") == 0
    rewards = [float(reward) for reward, in metrics("out/run-1", ["reward"])]
    assert sum(rewards[:5]) / 5 < 0.6
    assert sum(rewards[-5:]) / 5 > 0.65
    assert real_curves("out/run-1").stat().st_size > 10_000


def test_a_second_epoch_goes_on_where_the_first_one_ended():
    losses = []
    for epochs in (1, 2):
        trainer = odd_trainer(epochs=epochs, mini_batches=4)
        _, learned = trainer.rl_step(1)
        losses.append([x.loss for x in learned])
    assert len(losses[1]) == 2 * len(losses[0]) == 8
    assert losses[1][:4] == losses[0]
    assert losses[1][4] != losses[0][0]


def test_with_one_seed_there_is_one_rollout_and_with_another_another():
    first = sampled(odd_trainer(seed=0))
    again = sampled(odd_trainer(seed=0))
    other = sampled(odd_trainer(seed=1))
    assert torch.equal(first.tokens, again.tokens)
    assert torch.equal(first.logp_old, again.logp_old)
    assert first.tokens.shape != other.tokens.shape or (first.tokens != other.tokens).any()


# ------------------------------------------------------------------------------------ killed

def test_a_run_that_was_killed_before_its_first_checkpoint_leaves_a_folder_to_use(
        train, monkeypatch):
    for folder in ((), ("--out", "mine")):
        with monkeypatch.context() as patch:
            kill_at(1, runs, "save", patch)
            assert train(*SHORT, "2", *folder) == 130
    assert Path("out/run-1/samples.txt").exists()
    assert train(*SHORT, "2") == 0
    assert train(*SHORT, "2", "--out", "mine") == 0
    assert metrics("out/run-1") == metrics("mine")
    assert Path("mine/samples.txt").read_text().count("after the cold start") == 1
    assert not Path("out/run-2").exists()


def test_a_run_that_was_killed_between_its_last_step_and_its_report_makes_the_report(
        train, monkeypatch):
    assert train(*SHORT, "1") == 0
    with monkeypatch.context() as patch:        # the report of step 1 is there already
        kill_at(1, report, "finish", patch)
        assert train("--resume", "--steps", "2") == 130
    assert train("--resume") == 0
    assert json.loads(Path("out/run-1/summary.json").read_text())["steps"] == 2
    assert len(metrics("out/run-1")) == 2
    assert train("--resume") == 2               # nothing left to do


def test_a_run_may_be_killed_at_any_file_that_it_writes(train, monkeypatch, task_file):
    """Before the file is renamed, so that its .part remains, as kill -9 leaves it."""
    task_file("brief", BRIEF)
    options = ("--task", "brief", "--cold_steps", "20", "--cold_tokens", "64", "--max_new_tokens",
               "9", "--prompts", "4", "--steps", "2", "--save_every", "1", "--threads", "1")
    assert train(*options, "--out", "whole") == 0
    kills = 0
    for call in itertools.count(1):
        folder = f"killed-at-{call}"
        with monkeypatch.context() as patch:
            kill_at(call, os, "replace", patch)
            patch.setattr(Path, "unlink", os.unlink)        # a dead process removes nothing
            code = train(*options, "--out", folder)
        if code == 0:
            break
        assert code == 130
        kills += 1
        if Path(f"{folder}/checkpoint.pt").exists():
            assert train("--resume", "--out", folder) == 0
        else:
            assert train(*options, "--out", folder) == 0
        assert metrics(folder) == metrics("whole")
        assert Path(f"{folder}/updates.csv").read_text() == Path("whole/updates.csv").read_text()
    assert kills == 9       # 2 checkpoints, config, 3 tables, 2 checkpoints, summary


KILLED = """
import itertools
import os
import signal
import sys
import gspo
import train
update = gspo.update
calls = itertools.count(1)

def killed(*arguments, **options):
    if next(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return update(*arguments, **options)
gspo.update = killed
train.main(sys.argv[1:])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_a_run_that_is_killed_by_kill_9_goes_on_from_its_last_checkpoint(train):
    assert train(*SHORT, "4", "--out", "whole") == 0
    options = (*SHORT, "4", "--save_every", "1", "--out", "run")
    result = subprocess.run([sys.executable, "-c", KILLED, *options], capture_output=True,
                            env=os.environ | {"PYTHONPATH": str(HOUSE)})
    assert result.returncode == -signal.SIGKILL
    assert len(metrics("run")) == 2
    assert train("--resume", "--out", "run") == 0
    assert metrics("run") == metrics("whole")


# ------------------------------------------------------------------------------------ disks

def no_room(*arguments):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_disk_that_is_full_when_a_checkpoint_is_saved_costs_no_checkpoint(train, monkeypatch):
    assert train(*SHORT, "4", "--eval_every", "2", "--out", "whole") == 0
    assert train(*SHORT, "2", "--eval_every", "2", "--out", "run") == 0
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_room)
        message = train("--resume", "--out", "run", "--steps", "4")
    assert one_line(message)
    assert "No space left" in message
    assert not list(Path("run").glob("*.part"))
    assert train("--resume", "--out", "run", "--steps", "4") == 0
    assert metrics("run") == metrics("whole")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux only")
@pytest.mark.parametrize("table", ["metrics.csv", "updates.csv", "evaluations.csv"])
def test_a_disk_that_is_full_when_a_table_grows_costs_no_checkpoint(train, monkeypatch, table):
    def open_full(path, *arguments, **options):
        return open("/dev/full" if str(path).endswith(table) else path, *arguments, **options)
    with monkeypatch.context() as patch:
        patch.setattr(report, "open", open_full, raising=False)
        assert one_line(train(*SHORT, "4", "--eval_every", "2", "--out", "run"))
    assert train("--resume", "--out", "run", "--steps", "4") == 0
    assert len(metrics("run")) == 4


def test_a_folder_that_is_removed_in_mid_run_stops_it_and_stays_removed(train, monkeypatch):
    update = gspo.update

    def remove(*arguments, **options):
        shutil.rmtree("run")
        return update(*arguments, **options)
    with monkeypatch.context() as patch:
        patch.setattr(gspo, "update", remove)
        assert one_line(train(*SHORT, "1", "--out", "run"))
    assert not Path("run").exists()


def test_a_table_that_ends_in_mid_line_is_mended_by_resume(train, monkeypatch):
    assert train(*SHORT, "4", "--out", "whole") == 0
    assert train(*SHORT, "2", "--out", "run") == 0
    for table in ("metrics.csv", "updates.csv"):
        whole = Path(f"whole/{table}").read_text()
        Path(f"run/{table}").write_text(whole[:-len(whole.splitlines()[-1]) // 2])
    assert train("--resume", "--steps", "4", "--out", "run") == 0
    assert metrics("run") == metrics("whole")
    assert Path("run/updates.csv").read_text() == Path("whole/updates.csv").read_text()


@pytest.mark.parametrize("damage", ["half", "foreign", "empty", "older", "other sizes"])
def test_a_checkpoint_that_cannot_be_read_gets_one_line(train, capsys, damage):
    assert train(*SHORT, "1", "--out", "run") == 0
    path = Path("run/checkpoint.pt")
    content = torch.load(path, weights_only=True)
    if damage == "half":
        path.write_bytes(path.read_bytes()[:5000])
    elif damage == "foreign":
        path.write_bytes(b"PK" + bytes(3000))
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "older":
        torch.save(content | {"layout": 1}, path)
    else:
        torch.save(content | {"options": content["options"] | {"d_expert": 8}}, path)
    capsys.readouterr()
    for command in (["--resume", "--steps", "2"], ["--eval_only"], ["--ask", "1+1="]):
        assert train(*command, "--out", "run") == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_the_second_of_two_runs_in_one_folder_is_refused(train, capsys):
    pytest.importorskip("fcntl")
    Path("run").mkdir()
    with runs.lock(Path("run")):
        assert train(*SHORT, "1", "--out", "run") == 2
        assert "another run is using run" in capsys.readouterr().err
    assert train(*SHORT, "1", "--out", "run") == 0              # let go, and the folder is free


@pytest.mark.skipif(sys.platform == "win32", reason="head and pipes of a POSIX shell")
@pytest.mark.parametrize("command", ["-u train.py --help", "data/arithmetic.py"])
def test_a_reader_that_stops_early_sees_no_traceback(command):
    read, write = os.pipe()
    os.close(read)                  # nobody reads
    with os.fdopen(write, "w") as closed_pipe:
        result = subprocess.run([sys.executable, *command.split()], cwd=HOUSE, text=True,
                                stdout=closed_pipe, stderr=subprocess.PIPE)
    assert result.stderr == ""


def test_evaluating_again_gives_the_same_numbers_and_changes_nothing(train, capsys):
    assert train(*SHORT, "1", "--out", "run") == 0
    before = {path: path.read_bytes() for path in Path("run").iterdir()}
    last = Path("run/samples.txt").read_text().rstrip().split("\n\n")[-1].splitlines()[1:]
    capsys.readouterr()
    assert train("--eval_only", "--out", "run") == 0
    assert capsys.readouterr().out.splitlines() == last
    assert {path: path.read_bytes() for path in Path("run").iterdir()} == before
