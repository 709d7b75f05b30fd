"""Many processes make the update of one. Two processes on this machine, by gloo."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lab.report import curves, read_table
from lab.tests import dealt
from lab.tests.tools import HOUSE, SHORT

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
            "--master_port=0", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
PIPES = {"env": os.environ | {"PYTHONPATH": str(HOUSE), "OMP_NUM_THREADS": "1"}, "text": True,
         "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    """A folder with all that dealt.py leaves: updates, and two runs alike."""
    folder = tmp_path_factory.mktemp("team")
    rollout = dealt.whole_rollout()
    torch.save(rollout, folder / "rollout.pt")
    result = subprocess.run([*TORCHRUN, str(HOUSE / "lab/tests/dealt.py"), str(folder)],
                            timeout=200, **PIPES)
    assert result.returncode == 0, result.stdout
    (folder / "output.txt").write_text(result.stdout)
    return folder


def test_two_processes_make_the_update_of_one(of_two):
    expected = dealt.results(torch.load(of_two / "rollout.pt", weights_only=False))
    found = torch.load(of_two / "two.pt", weights_only=True)
    assert len(expected) == len(found) == len(dealt.OPTIONS) + 1
    for options, (x, rows), (y, rows_of_two) in zip([*dealt.OPTIONS, {}], expected, found):
        far = 1e-2 if "dtype" in options else 1e-5
        assert (x - y).abs().max() < far * max(1, x.abs().max()), options
        assert len(rows) == len(rows_of_two)
        for row, row_of_two in zip(rows, rows_of_two):
            assert row_of_two == pytest.approx(row, rel=10 * far, abs=10 * far), options
    # The first of four mini-batches has a signal in process 1 only, and the last one has none.
    assert [row[0] for row in found[1][1]] == [0, 1, 2]
    assert all(row[2] > 0.01 for row in found[1][1])


def test_a_run_of_two_processes_logs_once_repeats_itself_and_may_be_resumed_by_one(of_two, train):
    assert (of_two / "output.txt").read_text().count("3 RL: gspo") == 3         # of three runs
    for table in ("updates.csv", "evaluations.csv"):
        first = (of_two / f"first/{table}").read_text()
        assert first == (of_two / f"second/{table}").read_text()
    folder = of_two / "first"
    rows = read_table(folder / "metrics.csv")
    assert [row["step"] for row in rows] == ["1", "2", "3"]
    assert json.loads((folder / "config.json").read_text())["prompts"] == 4
    assert json.loads((folder / "summary.json").read_text())["responses"] == 3 * 4 * 4
    assert curves(folder).exists()
    assert train("--resume", "--steps", "4", "--out", str(folder)) == 0
    assert len(read_table(folder / "metrics.csv")) == 4


def test_a_signal_to_one_process_lets_all_of_them_finish_the_step(of_two):
    output = (of_two / "output.txt").read_text()
    assert output.count("stopped; to go on") == 1
    assert output.rstrip().endswith("exit code 130")
    assert len(read_table(of_two / "stopped/metrics.csv")) == 2
    assert torch.load(of_two / "stopped/checkpoint.pt")["progress"]["step"] == 2


def test_what_cannot_be_shared_out_evenly_is_refused(train, monkeypatch, capsys):
    for n, mini_batches in (("3", "1"), ("2", "3")):
        monkeypatch.setenv("WORLD_SIZE", n)
        assert train(*SHORT, "1", "--mini_batches", mini_batches) == 2
        error = capsys.readouterr().err
        assert f"{n} processes: prompts and cold_tokens must be multiples of it" in error


@pytest.mark.skipif(not Path("/proc").exists(), reason="finds the processes in /proc")
def test_a_process_that_is_killed_is_missed_by_the_other_within_a_minute(tmp_path):
    command = [*TORCHRUN, str(HOUSE / "train.py"), "--mini_batches", "2", *SHORT, "100000"]
    process = subprocess.Popen([*command, "--out", "run"], cwd=tmp_path, **PIPES)
    metrics = tmp_path / "run/metrics.csv"
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.time() + 100
    while not metrics.exists() or len(read_table(metrics)) < 2:
        assert time.time() < deadline
        assert process.poll() is None
        time.sleep(0.2)
    os.kill(int(workers.read_text().split()[-1]), signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert (tmp_path / "run/checkpoint.pt").exists()
    assert output.count("train.py: another process is gone") == 1
