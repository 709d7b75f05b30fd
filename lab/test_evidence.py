"""The comparisons of lab/evidence.py, with numbers worked out by hand, and its commands."""
import pytest

from lab import evidence


def test_a_comparison_pairs_the_seeds():
    mine = {"0": 0.5, "1": 0.7, "2": 0.6, "7": 0.0}
    theirs = {"2": 0.3, "0": 0.4, "1": 0.5}
    c = evidence.compare(mine, theirs)
    assert c.mean == pytest.approx(0.2)                     # of 0.1, 0.2 and 0.3
    assert c.error == pytest.approx(0.1 / 3 ** 0.5)
    assert (c.n_above, c.n_pairs) == (3, 3)
    # 0.2 / 0.0577 = 3.46 is less than the 4.303 that three pairs need.
    assert not c.significant
    # 27 resamples: no more than 2.5 % of them lie outside their least and greatest mean.
    assert (c.low, c.high) == pytest.approx((0.1, 0.3))


def test_five_equal_differences_are_significant_and_a_change_of_sign_is_not():
    ours = {str(seed): 0.1 * seed for seed in range(5)}
    above = {seed: accuracy + 0.1 + 0.01 * int(seed) for seed, accuracy in ours.items()}
    around = {seed: accuracy + 0.1 * (-1) ** int(seed) for seed, accuracy in ours.items()}
    assert evidence.compare(above, ours).significant
    assert not evidence.compare(around, ours).significant


def test_every_arm_has_a_command_and_a_folder_of_its_own():
    folders = []
    for name, experiment in evidence.EXPERIMENTS.items():
        folders += [evidence.folder(name, arm, 0) for arm in experiment.arms]
        commands = [" ".join(evidence.command(name, arm, 0)) for arm in experiment.arms]
        assert len(set(commands)) == len(commands)
    assert len(set(folders)) == len(folders)


def test_the_pairs_that_are_compared_exist():
    for name, *arms in evidence.PAIRS:
        assert set(arms) <= set(evidence.EXPERIMENTS[name].arms)
