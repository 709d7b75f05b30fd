"""Many processes: the update of one process. Two processes on this machine, by gloo."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train
from lab.report import read_table

HOUSE = Path(__file__).parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
            "--master_port=0", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
SHORT = ["--cold_steps", "30", "--cold_tokens", "400", "--prompts", "5", "--group_size", "4",
         "--max_digits", "1", "--threads", "1", "--device", "cpu"]

OPTIONS = [
    {}, {"algorithm": "grpo", "mini_batches": 5}, {"algorithm": "dapo", "micro_tokens": 20},
    {"routing_replay": "r3", "mini_batches": 2}, {"recompute_logp_old": True, "epochs": 2}]
# For each of these options: an update of a model on a rollout that all processes make alike; then
# its parameters and the metrics.
UPDATE = """
import json
import sys
import torch
import torch.distributed as dist
import gspo
import moe
if "torchrun" in sys.argv:
    dist.init_process_group("gloo")
torch.set_num_threads(1)
results = []
for options in json.loads(sys.argv[2]):
    torch.manual_seed(0)
    model = moe.MoETransformer(moe.MoEConfig(12, max_length=16, n_layer=2, d_model=16, n_expert=4,
                                             d_expert=8))
    uniform = torch.rand(15, 6)
    rollout = moe.generate(model, [[2, 5], [3], [7, 8, 9], [4], [6, 2]], 3, 6, 1.0, 1, 0, uniform)
    rewards = torch.tensor([[1.0, 0, 0], [0, 1, 1], [0, 0, 0], [1, 0, 1], [1, 1, 0]])
    settings = gspo.Settings(**options)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    experience, _ = gspo.prepare(model, rollout, rewards, settings)
    metrics = gspo.update(model, optimizer, experience, settings)
    results.append([[p.detach() for p in model.parameters()], metrics])
if gspo.team()[0] == 0:
    torch.save(results, sys.argv[1])
"""


def test_two_processes_make_the_update_of_one(tmp_path):
    script = tmp_path / "update.py"
    script.write_text(UPDATE)
    environment = os.environ | {"PYTHONPATH": str(HOUSE), "OMP_NUM_THREADS": "1"}
    for command, name, more in (([sys.executable], "one", []), (TORCHRUN, "two", ["torchrun"])):
        subprocess.run([*command, str(script), str(tmp_path / name), json.dumps(OPTIONS), *more],
                       env=environment, check=True, capture_output=True, timeout=120)
    of_one = torch.load(tmp_path / "one", weights_only=True)
    of_two = torch.load(tmp_path / "two", weights_only=True)
    assert len(of_one) == len(of_two) == len(OPTIONS)
    for (one, metrics_of_one), (two, metrics_of_two) in zip(of_one, of_two):
        for p, q in zip(one, two):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        assert len(metrics_of_one) == len(metrics_of_two) > 1
        for x, y in zip(metrics_of_one, metrics_of_two):
            for name in x:
                assert y[name] == pytest.approx(x[name], rel=1e-3, abs=1e-5), name


def torchrun(folder, *arguments, **options):
    return subprocess.Popen([*TORCHRUN, str(HOUSE / "train.py"), *SHORT, *arguments], cwd=folder,
                            env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)


def test_a_run_of_two_processes_logs_once_repeats_itself_and_may_be_resumed_by_one(
        tmp_path, monkeypatch):
    runs = [torchrun(tmp_path, "--steps", "3", "--fresh", "--out", name) for name in ("one", "two")]
    for process in runs:
        output, _ = process.communicate(timeout=200)
        assert process.returncode == 0, output
        assert output.count("1 cold start") == 1
    for table in ("updates.csv", "evaluations.csv"):
        assert (tmp_path / f"one/{table}").read_text() == (tmp_path / f"two/{table}").read_text()
    assert len(read_table(tmp_path / "one/metrics.csv")) == 3
    monkeypatch.chdir(tmp_path)
    train.main(["--resume", "--steps", "4", "--out", "one"])
    assert len(read_table(tmp_path / "one/metrics.csv")) == 4


@pytest.mark.skipif(not Path("/proc").exists(), reason="finds the processes in /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_process_that_dies_ends_the_others_within_a_minute(tmp_path, number):
    process = torchrun(tmp_path, "--steps", "100000", "--out", "run")
    metrics = tmp_path / "run/metrics.csv"
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.time() + 100
    while not metrics.exists() or len(read_table(metrics)) < 2:
        assert time.time() < deadline
        assert process.poll() is None
        time.sleep(0.2)
    os.kill(int(workers.read_text().split()[-1]), number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert (tmp_path / "run/checkpoint.pt").exists()
    # A signal lets all of them finish the step. A process that is killed is missed by the other.
    says = {signal.SIGINT: "stopped; to go on", signal.SIGKILL: "train.py: another process is gone"}
    assert output.count(says[number]) == 1
