"""What tables.py, figures.py, scatter.py and experiments.py in lab/study/ compute, beside numbers
worked out by hand and slow loops, and the runs that plan.py lists."""
import itertools
import math
import shutil
import statistics
import subprocess
from pathlib import Path

import pytest
import torch

from data import tasks
from lab.study import experiments, figures, instruments, plan, scatter, tables


def test_a_comparison_pairs_the_seeds():
    mine = {"0": 0.5, "1": 0.7, "2": 0.6, "7": 0.0}
    theirs = {"2": 0.3, "0": 0.4, "1": 0.5}
    c = tables.compare(mine, theirs)
    assert c.mean == pytest.approx(0.2)                     # of 0.1, 0.2 and 0.3
    assert c.error == pytest.approx(0.1 / 3 ** 0.5)
    assert (c.n_above, c.n_pairs) == (3, 3)
    # 0.2 / 0.0577 = 3.46 is less than the 4.303 that three pairs need.
    assert not c.significant
    # 2.5 % of 27 resamples is less than one: the bounds are the least and the greatest mean.
    assert (c.low, c.high) == pytest.approx((0.1, 0.3))


def test_five_differences_of_one_sign_are_significant_and_of_both_signs_are_not():
    ours = {str(seed): 0.1 * seed for seed in range(5)}
    above = {seed: accuracy + 0.1 + 0.01 * int(seed) for seed, accuracy in ours.items()}
    around = {seed: accuracy + 0.1 * (-1) ** int(seed) for seed, accuracy in ours.items()}
    assert tables.compare(above, ours).significant
    assert not tables.compare(around, ours).significant


def test_every_arm_has_a_command_and_a_folder_of_its_own():
    folders = []
    for name, experiment in plan.EXPERIMENTS.items():
        folders += [plan.folder_of("evidence", name, arm, 0) for arm in experiment.arms]
        commands = [" ".join(plan.command(name, arm, 0)) for arm in experiment.arms]
        assert len(set(commands)) == len(commands)
    assert len(set(folders)) == len(folders)


def test_the_instruments_run_what_train_py_does_not_know():
    for name, experiment in plan.EXPERIMENTS.items():
        for arm in experiment.arms:
            program = plan.command(name, arm, 0)
            algorithm = program[program.index("--algorithm") + 1]
            needed = "noise" in arm or algorithm in instruments.INSTRUMENTS
            assert (program[0] == "-m") == needed, (name, arm)


@pytest.mark.parametrize("method, best", list(zip(("gspo", "grpo"), plan.BEST)))
def test_the_best_cells_are_those_of_the_committed_search(method, best):
    scores = {}
    for arm in plan.SEARCHED:
        if arm.startswith(method):
            scores[arm] = tables.search_score("stale-search", arm) or 0
    assert max(scores, key=scores.get) == best


def test_the_pairs_that_are_compared_exist():
    for name, *arms in tables.PAIRS:
        assert set(arms) <= set(plan.EXPERIMENTS[name].arms)


def test_the_committed_rows_are_of_arms_that_exist():
    for row in plan.read(plan.EVIDENCE):
        assert row["arm"] in plan.EXPERIMENTS[row["experiment"]].arms


def test_a_run_is_missing_until_it_has_a_row(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "EVIDENCE", tmp_path / "evidence.csv")
    assert len(experiments.missing_runs("fresh")) == 15
    row = {"experiment": "fresh", "arm": "grpo", "seed": 3}
    experiments.append(experiments.EVIDENCE, [row])
    assert len(experiments.missing_runs("fresh")) == 14
    assert ("fresh", "grpo", 3) not in experiments.missing_runs("fresh")


def test_a_row_replaces_that_of_the_same_run(tmp_path):
    path = tmp_path / "table.csv"
    curve = {"experiment": "fresh", "arm": "gspo", "seed": 0}
    experiments.append(path, [curve | {"step": 0}, curve | {"step": 50}])
    experiments.append(path, [curve | {"seed": 1, "step": 0, "entropy": 0.5}])
    experiments.append(path, [curve | {"step": 25}])
    rows = [(row["seed"], row["step"], row["entropy"]) for row in plan.read(path)]
    assert rows == [("1", "0", "0.5"), ("0", "25", "")]


# In place of train.py: leaves some of a run's files.
LEAVE = """
import pathlib, sys
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
out.mkdir(exist_ok=True)
for name in sys.argv[1].split(","):
    (out / name).touch()
sys.exit("summary.json" not in sys.argv[1])
"""


def test_a_row_names_the_commits_that_made_its_run(tmp_path, monkeypatch):
    out = tmp_path / "runs" / "one"

    def made_by(commit, files):
        monkeypatch.setattr(experiments, "commit_of_code", lambda: commit)
        try:
            return experiments.make_run(["-c", LEAVE, files], out)
        except subprocess.CalledProcessError:
            return "killed"
    # Killed before its first checkpoint, then after it; what a later commit makes goes on there.
    assert made_by("abc", "lock") == "killed"
    assert made_by("def", "checkpoint.pt") == "killed"
    assert made_by("ghi", "checkpoint.pt,summary.json") == "def+ghi"
    # A run that is complete is not made again.
    assert made_by("jkl", "checkpoint.pt,summary.json") == "def+ghi"
    # Its folder is removed, to repeat it.
    shutil.rmtree(out)
    assert made_by("mno", "checkpoint.pt,summary.json") == "mno"


@pytest.mark.parametrize("arm, spread, low, high, share", [
    # A normal variable is below -1 or above 1 standard deviation with a probability of 0.1587 each.
    ("gspo", 0.01, 1 - math.exp(-0.01), math.exp(0.01) - 1, 0.1587),
    ("grpo", 0.2, 1 - math.exp(-0.2), 100, 0.1587 / 2),
    ("grpo", 0.2, 1, 100, 0.0),
])
def test_a_gaussian_is_clipped_in_its_tails(arm, spread, low, high, share):
    row = {"arm": arm, "log_s_mean": "0", "log_s_std": str(spread), "log_w_std": str(spread),
           "command": f"train.py --algorithm {arm} --clip_low {low} --clip_high {high}"}
    assert figures.clipped_if_normal(row) == pytest.approx(share, abs=1e-4)


@pytest.mark.parametrize("lengths", [(4, 2, 3), (5, 1, 5)])
def test_the_correlation_is_the_mean_over_all_pairs_of_tokens(lengths):
    log_w = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    tokens = [[log_w[i, t].item() for t in range(n)] for i, n in enumerate(lengths)]
    all_tokens = list(itertools.chain(*tokens))
    mean = statistics.fmean(all_tokens)
    products = []
    for response in tokens:
        products += [(x - mean) * (y - mean) for x, y in itertools.combinations(response, 2)]
    expected = statistics.fmean(products) / statistics.pvariance(all_tokens)
    assert scatter.correlation(log_w, mask) == pytest.approx(expected, rel=1e-5)


def test_a_common_part_gives_the_correlation_and_the_spread_of_log_s_that_it_should():
    """Tokens with variance 1, of which a quarter is common to a response of 16 tokens."""
    generator = torch.Generator().manual_seed(0)
    own = torch.randn(20_000, 16, generator=generator) * 0.75 ** 0.5
    common = torch.randn(20_000, 1, generator=generator) * 0.25 ** 0.5
    found = scatter.spreads(own + common, torch.ones(20_000, 16, dtype=torch.bool))
    assert found["log_w_std"] == pytest.approx(1, abs=0.02)
    assert found["correlation"] == pytest.approx(0.25, abs=0.02)
    # sigma sqrt((1 + (L-1) rho) / L)
    assert found["log_s_std"] == pytest.approx(((1 + 15 * 0.25) / 16) ** 0.5, abs=0.02)


def test_buckets_go_from_short_to_long_responses():
    mask = torch.arange(8) < torch.tensor([7, 1, 8, 2, 4, 3, 6, 5])[:, None]
    buckets = scatter.by_length(torch.ones(8, 8), mask)
    assert [bucket["length"] for bucket in buckets] == [1.5, 3.5, 5.5, 7.5]
    # Every log w is 1: the sum is the length, the mean is 1.
    assert [bucket["sum_std"] for bucket in buckets] == [0.5] * 4
    assert [bucket["log_s_std"] for bucket in buckets] == [0] * 4


def test_replay_takes_the_part_of_the_router_away(tmp_path, monkeypatch):
    """A short run, its rollout scored with the old experts and with today's."""
    monkeypatch.chdir(tmp_path)
    # A few held-out problems, to be quick.
    monkeypatch.setattr(tasks, "held_out_problems", lambda task: task.held_out()[::40])
    options = ("--cold_steps 30 --cold_tokens 400 --max_digits 1 --steps 1 --threads 1 "
               "--device cpu --lr 0.01 --out run")
    scatter.train.main(options.split())
    row, lengths = scatter.measure_scatter(Path("run"))
    layers = [row[f"expert_change_{layer}"] for layer in range(3)]
    assert 0 < max(layers) < 1
    assert row["changed"] >= max(layers)
    assert 0 < row["log_w_std_routing"] < row["log_w_std"]
    assert row["log_w_std_replayed"] > 0
    assert [bucket["bucket"] for bucket in lengths] == [0, 1, 2, 3]


def test_every_figure_can_be_drawn_from_the_committed_tables(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    figures.draw_all()
    drawn = {path.name for path in tmp_path.glob("*.png")}
    assert drawn == {"stale.png", "stale-search.png", "noise.png", "samplers.png", "clip.png",
                     "scatter.png", "models.png", "length.png", "queries.png"}
