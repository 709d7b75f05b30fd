"""What the runs say: the numbers of the pages in results/, and their figures.

    python -m lab.study.evidence             print the numbers, table by table
    python -m lab.study.evidence --draw      draw the figures

results/contrasts.csv says what is compared. The rule for verdicts: the primary outcome is the mean
training reward over the run, where all arms of a study get the same uniform queries; elsewhere it
is the mean of the held-out accuracies on the way. The held-out accuracy at the end comes second.
Differences are paired by seed, an interval is Student's t at 95 %, and the p values of an outcome
are corrected by Holm within a table. A claim that one difference is larger than another tests the
difference of the two.
"""
import re
import sys

import matplotlib.pyplot as plt
import pandas as pd
import seaborn
from scipy import stats
from statsmodels.stats.multitest import multipletests

from lab.study.instruments import LENGTHS
from lab.study.study import CURVES, KEYS, RESULTS, RUNS

CONTRASTS = RESULTS / "contrasts.csv"
OUTCOMES = {"primary": "mean reward over the run", "accuracy": "held-out accuracy at the end"}
TERM = re.compile(r"(?:^|([+-]) )(.+?)(?= [+-] |$)")        # of "study/arm - study/arm"
COLUMNS = ["reward", "accuracy", "accuracy_greedy", "log_w_std", "log_s_std", "clipped",
           "expert_change", "collapsed"]
COLOURS = {"gspo": "#1f5fa8", "grpo": "#d9822b"}
TITLES = {
    "forest": "GSPO - GRPO by setting: behind in arithmetic, ahead on Countdown",
    "rates": "rates", "experts": "experts", "noise": "noise", "clip": "clip",
    "samplers": "samplers", "length": "length",
}


# ---------------------------------------------------------------------------- numbers

def load() -> pd.DataFrame:
    """RUNS with more columns: the primary outcome, the share of tokens clipped, whether the run
    ended below its cold start, and the accuracies at the end by number of digits."""
    runs = pd.read_csv(RUNS)
    curves = pd.read_csv(CURVES)
    on_the_way = curves[(curves.kind == "all") & (curves.step > 0)].groupby(KEYS).accuracy.mean()
    held_out = runs.merge(on_the_way.rename("held_out"), how="left", on=KEYS).held_out
    uniform = runs.command.str.contains("--queries uniform").groupby(runs.study).transform("all")
    at_end = curves[curves.step == curves.groupby(KEYS).step.transform("max")]
    digits = at_end[at_end.kind.str[1:].str.isdigit()]
    by_digits = digits.groupby([*KEYS, "accuracy_" + digits.kind.str[1:]]).accuracy.mean().unstack()
    by_digits = runs[KEYS].merge(by_digits.reset_index(), how="left", on=KEYS).drop(columns=KEYS)
    runs = runs.assign(
        primary=runs.reward.where(uniform, held_out), clipped=runs.clip_low + runs.clip_high,
        collapsed=runs.accuracy < runs.accuracy_cold_start).combine_first(by_digits)
    return pd.concat([runs, best_rates(runs)])


def differences(runs: pd.DataFrame, contrast: str, outcome: str) -> pd.Series:
    """The value of a contrast for each seed that all of its terms have."""
    total = 0
    for sign, term in TERM.findall(contrast):
        study, arm = term.split("/")
        of_arm = runs[(runs.study == study) & (runs.arm == arm)].set_index("seed")[outcome]
        total = total - of_arm if sign == "-" else total + of_arm
    return total.dropna()


def tests(runs: pd.DataFrame, name: str, outcome: str) -> pd.DataFrame:
    """A row for each contrast of a table whose runs are there: difference, contrast, mean, low,
    high, p, ahead, n."""
    rows = []
    for row in pd.read_csv(CONTRASTS).query("table == @name").itertuples():
        found = differences(runs, row.contrast, outcome)
        if len(found) < 2:
            continue
        t = stats.ttest_1samp(found, 0)
        interval = t.confidence_interval(0.95)
        rows.append((row.difference, row.contrast, found.mean(), *interval, t.pvalue,
                     (found > 0).sum(), len(found)))
    table = pd.DataFrame(rows, columns=["difference", "contrast", "mean", "low", "high", "p",
                                        "ahead", "n"])
    if len(table):
        table["p"] = multipletests(table.p, method="holm")[1]
    return table


def best_rates(runs: pd.DataFrame) -> pd.DataFrame:
    """For each seed of the study "rates", the primary outcome of both methods at the rate that the
    other seeds chose for each."""
    rates = runs[runs.study == "rates"].copy()
    rates["method"] = rates.arm.str[:4]
    chosen = []
    for seed in rates.seed.unique():
        others = rates[rates.seed != seed]
        for method, of_method in others.groupby("method"):
            arm = of_method.groupby("arm").primary.mean().idxmax()
            row = rates[(rates.seed == seed) & (rates.arm == arm)].iloc[0]
            chosen.append({"study": "best rates", "arm": method, "seed": seed,
                           "primary": row.primary, "accuracy": row.accuracy, "chosen": arm})
    return pd.DataFrame(chosen)


def silenced(runs: pd.DataFrame) -> pd.DataFrame:
    """The share of the tokens of a response that the clip takes the gradient from: a row for each
    run, length of response (at most so many tokens) and sign of A."""
    rows = []
    for sign in ("good", "bad"):
        for length in LENGTHS:
            n = runs[f"responses_{sign}_{length}"]
            share = runs[f"clipped_{sign}_{length}"] / n
            rows.append(runs[KEYS].assign(sign=sign, length=length, n=n, share=share))
    return pd.concat(rows)[lambda table: table.n > 1]


# ---------------------------------------------------------------------------- words

def cell(x: float) -> str:
    return "" if pd.isna(x) else f"{x:.3f}" if abs(x) >= 0.01 or x == 0 else f"{x:.1e}"


def with_interval(x) -> str:
    p = "p < 0.001" if x.p < 0.001 else f"p {x.p:.3f}"
    return f"{x.mean:+.3f} ({x.low:+.3f} to {x.high:+.3f}), {p}"


def show(title: str, table: pd.DataFrame):
    print(f"\n# {title}\n\n{table.to_markdown(index=False, disable_numparse=True)}")


def comparison(runs: pd.DataFrame, name: str) -> pd.DataFrame:
    """A table of contrasts in words."""
    primary, accuracy = (tests(runs, name, outcome) for outcome in OUTCOMES)
    return pd.DataFrame({
        "difference": primary.difference,
        OUTCOMES["primary"]: [with_interval(x) for x in primary.itertuples()],
        "ahead on": [f"{x.ahead} of {x.n}" for x in primary.itertuples()],
        OUTCOMES["accuracy"]: [with_interval(x) for x in accuracy.itertuples()]})


def main():
    runs = load()
    if "--draw" in sys.argv:
        return draw(runs)
    for name in pd.read_csv(CONTRASTS).table.unique():
        show(name, comparison(runs, name))
    arms = runs.groupby(["study", "arm"], sort=False)
    show("all arms, means", arms[COLUMNS].mean().map(cell).assign(seeds=arms.size()).reset_index())
    digits = ["primary", *(f"accuracy_{n}" for n in range(1, 6)), "kl", "length_right", "length_wrong"]
    show("arithmetic by digits", arms[digits].mean().dropna(subset="accuracy_3").map(cell).reset_index())
    last = ["accuracy_teacher", "accuracy_cold_start", "accuracy", "accuracy_greedy", "think_share",
            "seconds", "peak_memory_mib", "trials", "random_search", "gave_up", "false_hits"]


if __name__ == "__main__":
    main()
