"""What scatter.py computes, beside a slow loop and numbers worked out by hand, and of a run."""
import itertools
import statistics
from math import nan

import pytest
import torch

import train
from data import arithmetic
from lab.tests.tools import few_held_out

pd = pytest.importorskip("pandas")          # lab/requirements.txt
from lab.study import scatter  # noqa: E402


@pytest.mark.parametrize("lengths", [(4, 2, 3), (5, 1, 5)])
def test_the_correlation_is_the_mean_over_all_pairs_of_tokens(lengths):
    log_w = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    responses = [log_w[i, :n].tolist() for i, n in enumerate(lengths)]
    tokens = list(itertools.chain(*responses))
    mean = statistics.fmean(tokens)
    products = []
    for response in responses:
        products += [(x - mean) * (y - mean) for x, y in itertools.combinations(response, 2)]
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    found = scatter.spreads(pd.DataFrame(log_w).where(mask.numpy()), "_part")
    assert found["correlation_part"] == pytest.approx(
        statistics.fmean(products) / statistics.pvariance(tokens))
    assert found["log_w_std_part"] == pytest.approx(statistics.pstdev(tokens))
    log_s = list(map(statistics.fmean, responses))
    assert found["log_s_std_part"] == pytest.approx(statistics.pstdev(log_s))


def test_a_common_part_gives_the_correlation_and_the_spread_of_log_s_that_it_should():
    """Tokens with variance 1, of which a quarter is common to a response of 16 tokens."""
    generator = torch.Generator().manual_seed(0)
    own = torch.randn(20_000, 16, generator=generator) * 0.75 ** 0.5
    common = torch.randn(20_000, 1, generator=generator) * 0.25 ** 0.5
    found = scatter.spreads(pd.DataFrame(own + common))
    assert found["log_w_std"] == pytest.approx(1, abs=0.02)
    assert found["correlation"] == pytest.approx(0.25, abs=0.02)
    # sigma sqrt((1 + (L-1) rho) / L)
    assert found["log_s_std"] == pytest.approx(((1 + 15 * 0.25) / 16) ** 0.5, abs=0.02)


def test_prefixes_are_of_the_same_responses_the_longer_half():
    # The second response is left out, and so is a fifth token.
    table = scatter.prefixes(pd.DataFrame([
        [1, 3, 2, 2, 9], [50, 60, nan, nan, nan], [2, 2, 0, 4, nan], [3, 7, 2, 8, nan]]))
    assert list(zip(table.tokens, table.responses)) == [(2, 3), (4, 3)]
    # Squares around 3: 4 0, 1 1 and 0 16 of the first two tokens, 1 1, 9 1 and 1 25 of the others.
    assert list(table.log_w_std ** 2) == pytest.approx([22 / 6, 60 / 12])
    # The sums are 4, 4 and 10, then 8, 8 and 20.
    assert list(table.sum_std ** 2) == pytest.approx([8, 32])
    assert list(table.log_s_std ** 2) == pytest.approx([8 / 2 ** 2, 32 / 4 ** 2])
    assert list(table.independent ** 2) == pytest.approx([22 / 6 / 2, 60 / 12 / 4])


def test_replay_takes_the_part_of_the_router_away(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(scatter, "REGIMES", {"tiny, a run": ""})
    monkeypatch.setattr(scatter, "commit", str)         # says nothing
    options = ("--cold_steps 30 --cold_tokens 400 --max_digits 1 --steps 1 --threads 1 "
               "--device cpu --lr 0.01 --out out/scatter/tiny-a-run-7")
    monkeypatch.setattr(arithmetic.Task, "held_out", few_held_out)
    train.main(options.split())
    rows, of_prefixes = scatter.measure("tiny, a run", 7)
    row = rows.iloc[0]
    assert (row["regime"], row["seed"], row["responses"]) == ("tiny, a run", 7, 256)
    layers = [row[f"expert_change_{layer}"] for layer in range(3)]
    assert 0 < max(layers) <= row["changed"] < 1
    assert 0 < row["log_w_std_routing"] < row["log_w_std"]
    assert row["log_w_std_replayed"] > 0
    assert list(of_prefixes)[:4] == ["regime", "seed", "tokens", "responses"]
    assert of_prefixes.responses.min() >= 128
