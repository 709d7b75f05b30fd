"""Whole runs and the command line, as executable statements."""
import csv
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import fields
from math import nan
from pathlib import Path

import pytest
import torch

import gspo
import moe
import train as train_py
from data import arithmetic
from data.queries import Queries
from lab import report

HOUSE = Path(__file__).parent.parent
SHORT = ("--cold_steps", "30", "--cold_tokens", "400", "--prompts", "4", "--group_size", "4",
         "--max_digits", "1", "--threads", "1", "--device", "cpu", "--steps")
RUN_FILES = {"config.json", "metrics.csv", "updates.csv", "evaluations.csv", "summary.json",
             "samples.txt", "cold_start.pt", "checkpoint.pt", "curves.png", "lock"}


real_curves = report.curves


def no_curves(folder):
    """A second saved: an empty curves.png."""
    path = Path(folder) / "curves.png"
    path.touch()
    return path


@pytest.fixture(scope="session")
def cold_starts(tmp_path_factory):
    """A folder with the cold start of SHORT, which most runs here begin with: two seconds saved."""
    folder = tmp_path_factory.mktemp("short")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train_py.main([*SHORT, "0", "--out", "run"])
    return folder / "out"


@pytest.fixture
def train(tmp_path, monkeypatch, cold_starts):
    """A function that calls train.main in an empty folder -> its exit code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "curves", no_curves)

    def run(*arguments):
        if arguments[:len(SHORT)] == SHORT:
            shutil.copytree(cold_starts, "out", dirs_exist_ok=True)
        try:
            return train_py.main(arguments) or 0
        except SystemExit as stop:
            return stop.code
    return run


def metrics(folder, names=("step", "reward", "loss", "grad_norm", "entropy", "accuracy")):
    with open(f"{folder}/metrics.csv") as file:
        return [[row[name] for name in names] for row in csv.DictReader(file)]


def interrupt_at(call, monkeypatch, number=signal.SIGINT):
    """Press Ctrl-C while gspo.update runs for the `call`-th time, or send another signal."""
    update = gspo.update
    calls = []

    def interrupted(*arguments, **options):
        calls.append(arguments)
        if len(calls) == call:
            signal.raise_signal(number)
        return update(*arguments, **options)
    monkeypatch.setattr(gspo, "update", interrupted)


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
        interrupt_at(3, patch)
        assert train(*parts) == 130
    assert len(metrics("parts")) == 3
    assert train("--resume", "--out", "parts") == 0
    assert metrics("parts") == metrics("whole")
    for table in ("updates.csv", "evaluations.csv"):
        assert Path(f"parts/{table}").read_text() == Path(f"whole/{table}").read_text()
    expected = torch.load("whole/checkpoint.pt", weights_only=True)
    resumed = torch.load("parts/checkpoint.pt", weights_only=True)
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


def test_a_run_that_was_killed_before_its_first_checkpoint_leaves_a_folder_to_use(
        train, monkeypatch):
    def killed(*arguments):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(train_py, "rl", killed)
        assert train(*SHORT, "2") == 130
        assert train(*SHORT, "2", "--out", "mine") == 130
    assert Path("out/run-1/samples.txt").exists()
    assert train(*SHORT, "2") == 0
    assert train(*SHORT, "2", "--out", "mine") == 0
    assert metrics("out/run-1") == metrics("mine")
    assert not Path("out/run-2").exists()


def test_a_run_that_was_killed_between_its_last_step_and_its_report_makes_the_report(
        train, monkeypatch):
    def killed(*arguments):
        raise KeyboardInterrupt
    assert train(*SHORT, "1") == 0
    with monkeypatch.context() as patch:        # the report of step 1 is there already
        patch.setattr(train_py, "finish", killed)
        assert train("--resume", "--steps", "2") == 130
    assert train("--resume") == 0
    assert json.loads(Path("out/run-1/summary.json").read_text())["steps"] == 2
    assert len(metrics("out/run-1")) == 2
    assert train("--resume") == 2               # nothing left to do


def test_the_reward_rises_in_a_miniature_run_past_that_of_the_teacher(train):
    assert train("--max_digits", "1", "--think", "0", "--guess", "0.5", "--cold_steps", "200",
                 "--cold_tokens", "1280", "--steps", "25", "--lr", "1e-3", "--threads", "1") == 0
    rewards = [float(reward) for reward, in metrics("out/run-1", ["reward"])]
    assert sum(rewards[:5]) / 5 < 0.6
    assert sum(rewards[-5:]) / 5 > 0.8
    assert real_curves("out/run-1").stat().st_size > 10_000


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(train, monkeypatch):
    monkeypatch.setattr(gspo, "group_advantages", lambda rewards, scale: rewards * 0 + nan)
    message = train(*SHORT, "5")
    assert "step 1:" in message
    assert "out/run-1/checkpoint.pt" in message
    assert train("--eval_only") == 0
    assert train("--ask", "4+4=") == 0


def test_a_reward_that_is_no_number_stops_the_run_and_keeps_the_checkpoint(train, monkeypatch):
    monkeypatch.setattr(arithmetic.Task, "reward", lambda self, problem, response: nan)
    message = train(*SHORT, "5")
    assert "rewards must be finite" in message
    assert "out/run-1/checkpoint.pt" in message


# ------------------------------------------------------------------------------------ faults

def no_room(*arguments):
    raise OSError(errno.ENOSPC, "No space left on device")


def one_line(message):
    return isinstance(message, str) and message.startswith("train.py: ") and "\n" not in message


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


def test_a_table_that_was_cut_in_mid_line_is_mended_by_resume(train, monkeypatch):
    assert train(*SHORT, "4", "--out", "whole") == 0
    with monkeypatch.context() as patch:
        interrupt_at(3, patch)
        assert train(*SHORT, "4", "--out", "run") == 130
    for table in ("metrics.csv", "updates.csv"):
        whole = Path(f"whole/{table}").read_text()
        Path(f"run/{table}").write_text(whole[:-len(whole.splitlines()[-1]) // 2])
    assert train("--resume", "--out", "run") == 0
    assert metrics("run") == metrics("whole")
    assert Path("run/updates.csv").read_text() == Path("whole/updates.csv").read_text()


@pytest.mark.parametrize("damage", ["cut", "foreign", "empty", "older", "other sizes"])
def test_a_checkpoint_that_cannot_be_read_gets_one_line(train, capsys, damage):
    assert train(*SHORT, "1", "--out", "run") == 0
    path = Path("run/checkpoint.pt")
    content = torch.load(path, weights_only=True)
    if damage == "cut":
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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_stops(train, monkeypatch, number):
    with monkeypatch.context() as patch:
        interrupt_at(2, patch, number)
        assert train(*SHORT, "4", "--out", "run") == 130
    assert len(metrics("run")) == 2
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert train("--resume", "--out", "run") == 0


def test_the_second_of_two_runs_in_one_folder_is_refused(train, capsys):
    pytest.importorskip("fcntl")
    Path("run").mkdir()
    with train_py.lock(Path("run")):
        assert train(*SHORT, "1", "--out", "run") == 2
        assert "another run is using run" in capsys.readouterr().err
    assert train(*SHORT, "1", "--out", "run") == 0              # let go, and the folder is free


def test_two_runs_may_make_the_same_cold_start_at_once(train, monkeypatch):
    replace = os.replace

    def another_saves_first(part, path):
        if Path(path).name.startswith("cold-"):
            other = Path(f"{path}.1.part")
            other.write_bytes(Path(part).read_bytes())
            replace(other, path)
        replace(part, path)
    monkeypatch.setattr(os, "replace", another_saves_first)
    assert train(*SHORT, "1", "--fresh", "--out", "run") == 0
    assert train(*SHORT, "1", "--out", "again") == 0
    assert metrics("run") == metrics("again")


# ------------------------------------------------------------------------------------ one RL step

class Odd(arithmetic.Task):
    """A task in which an untrained model has something to learn: responses of odd length."""
    def reward(self, problem, response):
        return len(response) % 2


def odd_run(**options):
    config = train_py.Config(**{"threads": 1, "lr": 0.003} | options)
    return train_py.build(config, Odd())


PRECISIONS = ["float32", "bfloat16", "float16", "float8", "int8", "int4", "int3"]


def queries_of(run):
    return Queries(run.task, run.config.queries == "adaptive", {})


@pytest.mark.parametrize("options", [
    *[{"algorithm": name} for name in gspo.ALGORITHMS],
    {"recompute_logp_old": True, "overlong": 9},
    {"routing_replay": "r2"},
    {"routing_replay": "r3"},
    {"prompts": 3, "algorithm": "dr_grpo"},
    *[{"sampler": precision} for precision in PRECISIONS],
    {"sampler": "bfloat16", "recompute_logp_old": True},
    {"lag": 1, "epochs": 2, "mini_batches": 2},
    {"dtype": "bfloat16"},
    {"dtype": "float16"},
    {"dtype": "bfloat16", "algorithm": "ppo", "routing_replay": "r2"},
    {"sampler": "bfloat16", "algorithm": "gspo_token", "correction": "icepop"},
], ids=str)
def test_every_algorithm_and_every_way_of_routing_trains(options):
    run = odd_run(**{"prompts": 8, "group_size": 4} | options)
    learner = train_py.new_learner(run, {})
    before = [p.clone() for p in run.model.parameters()]
    for step in (1, 2):
        row, updates = train_py.rl_step(run, learner, queries_of(run), step)
        assert 0 < row["grad_norm"] < 1000
        first = updates[0]
        # In the first mini-batch all ratios are 1, unless the sampler computed otherwise. The
        # rounding of autocast depends a little on what else is in the batch.
        coarse = options in [{"sampler": precision} for precision in PRECISIONS[1:]]
        coarse |= step == 2 and "lag" in options
        rounding = 2e-2 if "dtype" in options else 1e-5
        assert first["mini_batch"] > 0 or (first["log_w_std"] > rounding) == coarse
    assert all((p != q).any() for p, q in zip(before, run.model.parameters()))
    assert (row["expert_change"] == 0) == ("routing_replay" in options)
    assert learner.head is None or (learner.head.weight != 0).any()


def test_the_coarser_the_sampler_the_further_it_is_from_the_trainer():
    means = []
    for precision in ("float32", "int8", "int4", "int3"):
        run = odd_run(sampler=precision, prompts=8, group_size=4)
        row, _ = train_py.rl_step(run, train_py.new_learner(run, {}), queries_of(run), 1)
        assert 0 <= row["mismatch_mean"] <= row["mismatch_max"]
        assert 0 <= row["mismatch_experts"] <= 1
        means.append(row["mismatch_mean"])
    assert means[0] < 1e-5
    assert means == sorted(means)


@pytest.mark.parametrize("options", [{}, {"recompute_logp_old": True}], ids=str)
def test_the_log_says_how_far_the_sampler_is_only_if_it_is_not_the_trainer(options):
    run = odd_run(prompts=8, group_size=4, **options)
    row, _ = train_py.rl_step(run, train_py.new_learner(run, {}), queries_of(run), 1)
    assert row["mismatch_mean"] is None
    run = odd_run(prompts=8, group_size=4, sampler="int4", **options)
    row, updates = train_py.rl_step(run, train_py.new_learner(run, {}), queries_of(run), 1)
    assert row["mismatch_mean"] > 1e-3
    assert (updates[0]["log_w_std"] < 1e-5) == bool(options)        # recomputed: ratios of 1


def test_a_lag_of_two_samples_with_the_weights_of_two_rollouts_ago():
    run = odd_run(lag=2)
    learner = train_py.new_learner(run, {})
    sampled_with = []
    for step in range(6):
        with torch.no_grad():
            run.model.embed.weight.fill_(step)
        sampler = train_py.sampling_model(run, learner)
        sampled_with.append(sampler.embed.weight[0, 0].item())
        assert run.model.embed.weight[0, 0] == step                 # the trainer's are not touched
    assert sampled_with == [0, 0, 0, 1, 2, 3]


def test_a_second_epoch_goes_on_where_the_first_one_ended():
    losses = []
    for epochs in (1, 2):
        run = odd_run(prompts=8, group_size=4, epochs=epochs)
        _, updates = train_py.rl_step(run, train_py.new_learner(run, {}), queries_of(run), 1)
        losses.append([update["loss"] for update in updates])
    assert len(losses[1]) == 2 * len(losses[0]) == 8
    assert losses[1][:4] == losses[0]
    assert losses[1][4] != losses[0][0]


def test_float16_skips_a_step_whose_scaled_gradient_overflows_and_goes_on_with_half_the_scale():
    run = odd_run(prompts=8, group_size=4, dtype="float16")
    learner = train_py.new_learner(run, {})
    learner.scaler.load_state_dict(learner.scaler.state_dict() | {"scale": 2.0 ** 60})
    before = [p.clone() for p in run.model.parameters()]
    _, updates = train_py.rl_step(run, learner, queries_of(run), 1)
    assert [update["skipped"] for update in updates] == [1.0] * len(updates)
    assert all(torch.equal(p, q) for p, q in zip(before, run.model.parameters()))
    assert learner.scaler.get_scale() == 2.0 ** (60 - len(updates))


def test_twenty_skipped_steps_running_are_an_error():
    state = {}
    train_py.count_skipped(state, [{"skipped": 1.0}] * 19 + [{"skipped": 0.0}])
    train_py.count_skipped(state, [{"skipped": 1.0}] * 19)
    with pytest.raises(FloatingPointError, match="20 optimiser steps running"):
        train_py.count_skipped(state, [{"skipped": 1.0}])


def test_the_overlong_penalty_of_dapo():
    lengths = torch.tensor([80, 81, 90, 100, 101])
    penalty = train_py.overlong_penalty(lengths, 100, 20)
    assert penalty.tolist() == pytest.approx([0, -0.05, -0.5, -1, -1])
    assert train_py.overlong_penalty(lengths, 100, 0).tolist() == [0] * 5


def test_dynamic_sampling_goes_on_until_every_group_has_a_signal():
    run = odd_run(dynamic_sampling=True, sampling_rounds=99, group_size=2)
    samples = train_py.sample_until_signal(run, run.model, queries_of(run),
                                           train_py.random.Random(0))
    assert (samples.rewards[:, 0] != samples.rewards[:, 1]).all()
    assert samples.rewards.shape == (32, 2)
    assert len(samples.all_responses) > 64
    # Each row still has the reward of its own response.
    texts = [(r.text, r.cut, r.reward) for r in samples.all_responses]
    for ids, n, reward in zip(samples.rollout.response.tolist(), samples.rollout.lengths,
                              samples.rewards.flatten().tolist()):
        ended = ids[n - 1] == run.tokenizer.eos_id
        text = run.tokenizer.decode(ids[:n - 1] if ended else ids[:n])
        assert (text, not ended, reward) in texts


def test_dynamic_sampling_says_so_when_it_gives_up(capsys):
    run = odd_run(dynamic_sampling=True, sampling_rounds=1, group_size=2)
    samples = train_py.sample_until_signal(run, run.model, queries_of(run),
                                           train_py.random.Random(0))
    silent = (samples.rewards[:, 0] == samples.rewards[:, 1]).sum()
    assert 0 < silent == (~samples.has_signal).sum()
    assert f"{silent} of 32 groups have no signal" in capsys.readouterr().out
    assert samples.rewards.shape == (32, 2)


# ------------------------------------------------------------------------------------ cold start

def test_the_cold_start_is_kept_for_runs_that_would_make_the_same(train, capsys):
    assert train(*SHORT, "1", "--seed", "1") == 0
    assert "taken from" not in capsys.readouterr().out
    assert train(*SHORT, "1", "--seed", "1", "--algorithm", "grpo", "--lr", "0.01") == 0
    assert "taken from out/cold-" in capsys.readouterr().out
    assert train(*SHORT, "1", "--seed", "1", "--cold_lr", "0.001") == 0
    assert "taken from" not in capsys.readouterr().out


def test_editing_a_comment_or_a_docstring_keeps_the_cold_start(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    codes = []
    for i, text in enumerate((
            'def f(x):\n    return x + 1\n',
            '"""A module."""\n# A comment.\ndef f(x):\n    """Adds 1."""\n    return x + 1\n',
            'def f(x):\n    return x + 2\n')):
        (tmp_path / f"code_{i}.py").write_text(text)
        codes.append(train_py.code_of(__import__(f"code_{i}")))
    assert codes[0] == codes[1] != codes[2]


@pytest.mark.parametrize("shape", [(4, 4), (6, 3), (3, 6), (5, 3, 4)], ids=str)
def test_a_step_of_muon_has_the_singular_vectors_of_the_gradient_and_singular_values_near_1(shape):
    torch.manual_seed(0)
    matrix = torch.nn.Parameter(torch.randn(shape))
    before = matrix.detach().clone()
    optimizer = train_py.Muon([matrix], lr=0.1, weight_decay=0.0)
    average = torch.zeros(shape)
    for gradient in torch.randn(2, *shape):
        matrix.grad = gradient
        optimizer.step()
        change = (before - matrix.detach()) / (0.1 * max(1, shape[-2] / shape[-1]) ** 0.5)
        before = matrix.detach().clone()
        average = 0.95 * average + gradient
        ahead = gradient + 0.95 * average               # Nesterov's momentum
        U, _, Vh = torch.linalg.svd(ahead, full_matrices=False)
        in_its_vectors = U.mT @ change @ Vh.mT
        values = in_its_vectors.diagonal(dim1=-2, dim2=-1)
        torch.testing.assert_close(in_its_vectors, torch.diag_embed(values), atol=1e-4, rtol=0)
        torch.testing.assert_close(change, U @ torch.diag_embed(values) @ Vh, atol=1e-4, rtol=0)
        assert values.min() > 0.6
        assert values.max() < 1.3


def test_muon_shrinks_the_weights_by_their_decay():
    matrix = torch.nn.Parameter(torch.eye(3))
    matrix.grad = torch.zeros(3, 3)
    train_py.Muon([matrix], lr=0.1, weight_decay=0.5).step()
    torch.testing.assert_close(matrix.detach(), 0.95 * torch.eye(3))


# ------------------------------------------------------------------------------------ looking on

@pytest.mark.parametrize("when, options", [
    ("cold_start", ()),
    ("last", ("--algorithm", "ppo", "--routing_replay", "r3")),
    ("cold_start", ("--kl_coef", "0.1")),
])
def test_the_page_of_an_update_fits_the_terminal_and_changes_nothing(
        train, capsys, when, options):
    assert train(*SHORT, "2", "--prompts", "16", "--save_every", "1", *options) == 0
    before = Path("out/run-1/checkpoint.pt").read_bytes()
    capsys.readouterr()
    assert train("--inspect", when) == 0
    page = capsys.readouterr().out
    assert page.startswith("Look at")
    assert ("after the cold start" if when == "cold_start" else "after RL step 2") in page
    assert "right, A = +" in page
    assert "wrong, A = -" in page
    assert "\033" not in page
    assert max(map(len, page.splitlines())) <= 120
    assert Path("out/run-1/checkpoint.pt").read_bytes() == before


def test_the_curves_have_a_line_for_the_kinds_that_end_alike():
    rows = [("0", "+1", "0.5"), ("0", "-1", "0.7"), ("0", "+2", "0.1"),
            ("9", "+1", "0.9"), ("9", "-1", "1.0"), ("9", "+2", "0.3")]
    table = [dict(zip(report.EVALUATION_COLUMNS, row)) for row in rows]
    lines = report.kind_lines(table)
    assert list(lines) == ["+1 -1", "+2"]
    assert lines["+1 -1"] == [(0, pytest.approx(0.6)), (9, pytest.approx(0.95))]
    assert lines["+2"] == [(0, 0.1), (9, 0.3)]


def test_an_answer_into_a_pipe_is_the_prompt_and_the_bare_response(train, capsys):
    assert train(*SHORT, "1") == 0
    capsys.readouterr()
    assert train("--ask", "4+4=") == 0
    line, = capsys.readouterr().out.splitlines()
    assert line.startswith("4+4=")
    assert "<end>" not in line


@pytest.mark.skipif(sys.platform == "win32", reason="head and pipes of a POSIX shell")
@pytest.mark.parametrize("command", ["-u train.py --help", "data/arithmetic.py"])
def test_a_reader_that_stops_early_sees_no_traceback(command):
    read, write = os.pipe()
    os.close(read)                  # nobody reads
    with os.fdopen(write, "w") as closed_pipe:
        result = subprocess.run([sys.executable, *command.split()], cwd=HOUSE, text=True,
                                stdout=closed_pipe, stderr=subprocess.PIPE)
    assert result.stderr == ""


# ------------------------------------------------------------------------------------ bad input

def bad_values():
    for field in (*fields(train_py.Config), *fields(arithmetic.Task)):
        if field.type is bool or field.name == "out":
            continue
        yield f"--{field.name}", "nothing" if field.type is str else "-7"
        yield f"--{field.name}", "" if field.type is str else "nan"
    yield "--nothing",
    yield "--d_model", "30"
    yield "--max_new_tokens", "3"
    yield "--steps", "1.5"
    yield "--ste", "5"
    yield "--fresh=1",
    yield "--resume",
    yield "--ask", "1+1="
    yield "--eval_only",
    yield "--inspect",
    yield "--inspect", "never"
    yield "--task", "tokenizer"
    yield "--seed", "9" * 400
    yield "--out", "."
    yield "--out", "full/x"
    yield "--device", "cuda"
    yield "--resume", "--out", "broken"
    yield "--resume", "--out", "older"
    yield "--clip_low", "0.1", "--algorithm", "sapo"
    yield "--correction", "tis"
    yield "--overlong", "65"
    yield "--scale", "std", "--algorithm", "ppo"


@pytest.mark.parametrize("arguments", [*bad_values()], ids=" ".join)
def test_bad_input_gets_one_line_and_exit_code_2(train, capsys, arguments):
    Path("full").write_text("not a folder")
    Path("broken").mkdir()
    torch.save({"model": 1}, "broken/checkpoint.pt")
    Path("older").mkdir()
    torch.save({"model": {}}, "older/checkpoint.pt")
    if arguments == ("--device", "cuda") and torch.cuda.is_available():
        pytest.skip("it is no bad input here")
    assert train(*arguments) == 2
    error = capsys.readouterr().err
    name = arguments[0].split("=")[0]
    assert name in error or arguments[-1] in error or "run in out/" in error
    assert error.count("\n") == 1
    assert not Path("out").exists()


@pytest.mark.parametrize("prompt", ["", "x", "1" * 65], ids=["empty", "unknown", "long"])
def test_a_prompt_that_cannot_be_asked_gets_one_line(train, capsys, prompt):
    assert train(*SHORT, "1") == 0
    capsys.readouterr()
    assert train("--ask", prompt) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--ask" in error or "'x'" in error


# ------------------------------------------------------------------------------------ own tasks

PLAIN = """
class Problem:
    prompt = "1+1="

class Task:
    def sample(self, rng):
        return Problem()
    def demonstrate(self, problem, rng):
        return rng.choice("23")
    def reward(self, problem, response):
        return response == "2"
"""


@pytest.fixture
def task_file(monkeypatch, tmp_path):
    """Write a task of one's own; data/ is a namespace package, so it may lie in another folder."""
    import data
    (tmp_path / "data").mkdir()
    monkeypatch.setattr(data, "__path__", [*data.__path__, str(tmp_path / "data")])

    def write(name, text):
        (tmp_path / "data" / f"{name}.py").write_text(text)
    return write


def test_a_task_is_any_class_with_three_methods(train, task_file):
    task_file("plain", PLAIN)
    assert train("--task", "plain", "--cold_steps", "5", "--cold_tokens", "400", "--steps", "1",
                 "--max_new_tokens", "9", "--threads", "1") == 0
    assert train("--ask", "1+1=") == 0


SPELLING = """
class Problem:
    prompt = "cat:"

class Task:
    defaults = {"cold_steps": 5, "steps": 2, "threads": 1, "max_new_tokens": 9}

    def sample(self, rng):
        return Problem()
    def demonstrate(self, problem, rng):
        return rng.choice(["tac", "act"])
    def reward(self, problem, response):
        return response == "tac"
    def thinks(self, response):
        return True
    def measure(self, problem, response, cut):
        return {"letters": len(response), "was_cut": float(cut)}
"""


@pytest.fixture
def spelling(task_file, tmp_path):
    task_file("spelling", SPELLING)
    (tmp_path / "data" / "spelling.txt").write_text("<pad> <end> a c t :")


def test_a_task_may_have_a_vocabulary_defaults_and_measures_of_its_own(train, capsys, spelling):
    assert train("--task", "spelling", "--out", "run") == 0
    assert json.loads(Path("run/config.json").read_text())["max_new_tokens"] == 9
    rows = report.read_table("run/metrics.csv")
    assert len(rows) == 2
    for row in rows:
        assert 0 < float(row["letters"]) <= 7 * 9           # <pad> and <end> are five characters
        assert float(row["was_cut"]) == float(row["truncated"])
        assert float(row["think"]) == 1 - float(row["truncated"])
    summary = json.loads(Path("run/summary.json").read_text())
    assert list(summary["measures"]) == list(summary["measures_cold_start"])
    assert "letters" in capsys.readouterr().out
    assert train("--ask", "cat:", "--out", "run") == 0
    assert train("--ask", "1+1=", "--out", "run") == 2


def test_an_option_that_is_given_counts_more_than_the_tasks_default(train, capsys, spelling):
    assert train("--task", "spelling", "--out", "run", "--steps", "1") == 0
    assert train("--out", "run", "--resume", "--steps", "3") == 0
    assert [row["step"] for row in report.read_table("run/metrics.csv")] == ["1", "2", "3"]
    assert train("--task", "spelling", "--help") == 0
    described = " ".join(capsys.readouterr().out.split())
    assert "(default for this task: 9)" in described
    assert "query heads (default: 4)" in described


@pytest.mark.parametrize("name, old, new, says", [
    ("no_class", "class Task", "class Other", "has no class Task"),
    ("no_reward", "def reward", "def rewards", "lacks reward"),
    ("letters", '"1+1="', '"what?"', "'w' in 'what?' is not in the vocabulary"),
    ("long", '"1+1="', '"1" * 65', "a prompt of 65 tokens is too long"),
    ("empty", '"1+1="', '""', "empty prompt"),
    ("speaks", '"23"', '"xyz"', "is not in the vocabulary"),
    ("wishes", "    def sample", "    defaults = {'stepps': 3}\n    def sample",
     "name 'stepps', which is no option"),
    ("repeats", "    def sample", "    def measure(self, *_):\n        return {'length': 1}\n"
     "    def sample", "'length', a column that metrics.csv has already"),
])
def test_a_task_that_cannot_work_gets_one_line(train, capsys, task_file, name, old, new, says):
    assert old in PLAIN
    task_file(name, PLAIN.replace(old, new))
    assert train("--task", name) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not Path("out").exists()
