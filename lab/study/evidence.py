"""What the runs say: the numbers of the pages in results/, and their figures.

    python -m lab.study.evidence             print the numbers, table by table
    python -m lab.study.evidence --draw      draw the figures

results/contrasts.csv says what is compared. The primary outcome is the mean training reward over
the run, where all arms of a study get the same uniform queries; elsewhere it is the mean of the
held-out accuracies on the way. Held-out accuracy at the end comes second. Differences are paired by
seed, intervals are Student's t at 95 %, p values of an outcome are corrected by Holm within a
table. That one difference is larger than another is tested as the difference of the two.
"""
import itertools
import json
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
COLUMNS = ["reward", "primary", "accuracy_cold_start", "accuracy", "accuracy_greedy", "log_w_std",
           "log_s_std", "clipped", "kl", "expert_change", "length_right", "length_wrong",
           "collapsed", *(f"accuracy_{digits}" for digits in range(1, 6))]
GYM = ["accuracy_teacher", "accuracy_cold_start", "accuracy", "accuracy_greedy", "rise", "reward",
       "length", "minutes"]
RUN_TABLE = ["main job", "a minute", "long run", "queries", "Countdown", "precision"]
COLOURS = {"gspo": "#1f5fa8", "grpo": "#d9822b", "arithmetic": "#7d4f9e", "Countdown": "#2a9d8f"}
TITLES = {
    "settings": "GSPO - GRPO: behind in arithmetic with 4 updates, ahead on Countdown with many",
    "rates": "With 32 updates GSPO's lead over GRPO grows with the learning rate",
    "experts": "GSPO is ahead with a dense model too, and replay adds nothing that shows",
    "noise": "GSPO bears noise of single tokens, unless it lowers log w on average",
    "clip": "GSPO's clip silences bad responses, the shorter the more; GRPO's hardly any",
    "samplers": "GSPO with an old sampler: ahead on Countdown, not in arithmetic",
    "mistakes": "What ten known mistakes cost in 100 steps of arithmetic",
    "length": "Without 1/|y| both methods gain at the default rate, not at twice the rate",
}


# ---------------------------------------------------------------------------- numbers

def load() -> pd.DataFrame:
    """RUNS with more columns: the primary outcome, the share of tokens clipped, whether the run
    ended below its cold start, and the accuracies at the end by number of digits."""
    runs = pd.read_csv(RUNS)
    curves = pd.read_csv(CURVES)
    on_the_way = curves.query("kind == 'all' and step > 0").groupby(KEYS).accuracy.mean()
    held_out = runs.merge(on_the_way.rename("held_out"), how="left", on=KEYS).held_out
    uniform = runs.command.str.contains("--queries uniform").groupby(runs.study).transform("all")
    at_end = curves[curves.step == curves.groupby(KEYS).step.transform("max")]
    digits = at_end.query("kind.str[1:].str.isdigit()")
    by_digits = digits.groupby([*KEYS, "accuracy_" + digits.kind.str[1:]]).accuracy.mean().unstack()
    by_digits = runs[KEYS].merge(by_digits.reset_index(), how="left", on=KEYS).drop(columns=KEYS)
    runs = runs.assign(
        primary=runs.reward.where(uniform, held_out), clipped=runs.clip_low + runs.clip_high,
        collapsed=runs.accuracy < runs.accuracy_cold_start).combine_first(by_digits)
    scatter = pd.read_csv(RESULTS / "scatter.csv").drop(columns=["command", "commit", "machine"])
    scatter = scatter.melt(["regime", "seed"], None, "arm", "primary")
    scatter = scatter.rename(columns={"regime": "study"})
    return pd.concat([runs, scatter, *(best_of(runs, name) for name in ("rates", "int4, ranges"))])


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
    return table.assign(p=multipletests(table.p, method="holm")[1]) if len(table) else table


def best_of(runs: pd.DataFrame, study: str) -> pd.DataFrame:
    """Runs of a study "best of ...": for each seed and method, the run of the arm that has the best
    primary outcome on the other seeds. Only seeds that all arms have."""
    of_study = runs[runs.study == study].set_index(["arm", "seed"])
    outcomes = of_study.primary.unstack("arm").dropna()                     # a row for each seed
    chosen = []
    for method, seed in itertools.product(("gspo", "grpo"), outcomes.index):
        others = outcomes.filter(like=method).drop(index=seed)
        run = of_study.loc[(others.mean().idxmax(), seed)]
        chosen.append(run.to_dict() | {"study": f"best of {study}", "arm": method, "seed": seed})
    return pd.DataFrame(chosen)


def silenced(runs: pd.DataFrame) -> pd.DataFrame:
    """The share of the tokens of a response that the clip takes the gradient from: a row for each
    run, sign of A and length of response (at most so many tokens)."""
    rows = []
    for sign, length in itertools.product(("good", "bad"), LENGTHS):
        n = runs[f"responses_{sign}_{length}"]
        share = (runs[f"clipped_{sign}_{length}"] / n).where(n > 1)
        rows.append(runs[KEYS].assign(sign=sign, length=length, share=share))
    return pd.concat(rows).dropna()


# ---------------------------------------------------------------------------- words

def cell(x: float) -> str:
    if pd.isna(x):
        return ""
    if abs(x) >= 100:
        return f"{x:.0f}"
    return f"{x:.3f}" if abs(x) >= 0.01 or x == 0 else f"{x:.1e}"


def with_range(x: pd.Series) -> str:
    return f"{cell(x.mean())} ({cell(x.min())} to {cell(x.max())})" if x.notna().any() else ""


def with_interval(x) -> str:
    p = "p < 0.001" if x.p < 0.001 else f"p {x.p:.3f}"
    return f"{x.mean:+.3f} ({x.low:+.3f} to {x.high:+.3f}), {p}"


def comparison(runs: pd.DataFrame, name: str) -> pd.DataFrame:
    """A table of contrasts in words."""
    words = {}
    for outcome in OUTCOMES:
        table = tests(runs, name, outcome).set_index("difference")
        words[outcome] = pd.Series(map(with_interval, table.itertuples()), table.index, dtype=str)
        words[f"{outcome}, ahead"] = table.ahead.astype(str) + " of " + table.n.astype(str)
    return pd.DataFrame(words, words["primary"].index).fillna("")


def tables(runs: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """{title: a table in words}"""
    found = {name: comparison(runs, name) for name in pd.read_csv(CONTRASTS).table.unique()}
    arms = runs[runs.reward.notna() | runs.accuracy.notna()].groupby(["study", "arm"], sort=False)
    found["arms"] = arms[COLUMNS].mean().map(cell).assign(seeds=arms.size())
    of_runs = runs[runs.study.isin(RUN_TABLE)].drop(columns=["command", "commit", "machine"])
    found["runs"] = of_runs.groupby(["study", "arm"]).agg(with_range).T
    curves = pd.read_csv(CURVES).query("kind == 'all' and study in @RUN_TABLE")
    found["steps"] = curves.pivot_table(
        "accuracy", "step", ["study", "arm"], aggfunc=with_range).fillna("")
    clipped = silenced(runs).pivot_table("share", ["study", "arm", "sign"], "length", sort=False)
    found["clipped by length"] = clipped.map(cell)
    for name, keys in {"scatter": ["regime"], "scatter-prefixes": ["regime", "tokens"]}.items():
        of_regime = pd.read_csv(RESULTS / f"{name}.csv").drop(columns="seed").groupby(keys)
        found[name] = of_regime.mean(numeric_only=True).map(cell)
    gym = runs[runs.study == "gym"]
    gym = gym.assign(rise=gym.accuracy - gym.accuracy_cold_start, minutes=gym.seconds / 60)
    found["gym"] = gym.groupby("arm", sort=False)[GYM].agg(with_range)
    for name in ("bench", "bench-gpu"):
        rows = pd.DataFrame(json.loads((RESULTS / f"{name}.json").read_text())["rows"])
        rows["rate"] = rows.rate.round().astype(int)
        rows["first_is_faster"] = rows.first_is_faster.map("{:.2f}".format)
        found[name] = rows[["what", "side", "rate", "unit", "first_is_faster"]].set_index("what")
    signs = pd.read_csv(RESULTS / "signs.csv").groupby("mistake", sort=False).head(8)
    found["signs"] = signs.set_index(["mistake", "column"]).map(cell).reset_index("column")
    found["processes"] = pd.read_csv(RESULTS / "processes.csv").set_index("processes")
    return found


# ---------------------------------------------------------------------------- figures

def save(figure, name: str):
    figure.suptitle(TITLES[name])
    figure.savefig(RESULTS / f"{name}.png", dpi=110)
    plt.close(figure)


def draw_forest(runs: pd.DataFrame, name: str):
    """The contrasts of a table, with their intervals; every seed is a tick."""
    on_countdown = runs.command.str.contains("countdown", na=True).groupby(runs.study).all()
    task_of = on_countdown.map({True: "Countdown", False: "arithmetic"})
    figure, axes = plt.subplots(1, 2, figsize=(11, 5), sharey=True, layout="constrained")
    for axis, (outcome, meaning) in zip(axes, OUTCOMES.items()):
        table = tests(runs, name, outcome)
        if outcome == "primary" and name == "mistakes":
            meaning = "held-out accuracy over the run"
        for i, row in table.iterrows():
            colour = COLOURS[task_of[row.contrast.partition("/")[0]]]
            axis.plot([row.low, row.high], [i, i], color=colour, linewidth=2)
            axis.plot(row["mean"], i, "o", color=colour)
            seeds = differences(runs, row.contrast, outcome)
            axis.plot(seeds, [i] * len(seeds), "|", color=colour, alpha=0.6, markersize=9)
        axis.set_yticks(range(len(table)), table.difference)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_xlabel(f"{meaning}: difference, 95 %, seeds")
        axis.grid(axis="x", alpha=0.3)
    axes[0].invert_yaxis()
    save(figure, name)


def interval(x: pd.Series):
    return stats.ttest_1samp(x, 0).confidence_interval(0.95)


def draw_lines(axis, table: pd.DataFrame, x: str, y: str):
    """The mean of y over x for both methods, and its interval."""
    table = table[table.method.isin(COLOURS)]
    seaborn.lineplot(table, x=x, y=y, hue="method", style="method", markers=True, palette=COLOURS,
                     errorbar=interval, ax=axis)
    axis.set_ylabel(OUTCOMES[y])
    axis.grid(alpha=0.3)


def draw_rates(runs: pd.DataFrame):
    table = runs[runs.study == "rates"]
    table = table.assign(method=table.arm.str[:4], rate=table.arm.str[9:].astype(float))
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, outcome in zip(axes, OUTCOMES):
        draw_lines(axis, table, "rate", outcome)
        axis.set(xscale="log", xlabel="learning rate", ylim=(0, None))
        axis.set_xticks(table.rate.unique(), table.arm.str[9:].unique())
        axis.minorticks_off()
    save(figure, "rates")


def draw_noise(runs: pd.DataFrame):
    figure, axes = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    titles = {"centred noise": "noise of mean 0 on log w", "noise": "noise of mean 1 on w"}
    for axis, (study, title) in zip(axes, titles.items()):
        table = runs[(runs.study == study) | ((runs.study == "noise") & runs.arm.isin(COLOURS))]
        table = table.assign(method=table.arm.str.split(", noise ").str[0],
                             sigma=table.arm.str[-1].where(table.arm.str.contains("noise"), 0))
        draw_lines(axis, table.astype({"sigma": int}), "sigma", "primary")
        axis.set(title=title, xlabel="sigma of the noise", xticks=(0, 1, 2, 4), ylim=(0.4, 1))
    prefixes = pd.read_csv(RESULTS / "scatter-prefixes.csv").query("regime.str.contains('4 up')")
    prefixes = prefixes.rename(columns={"log_s_std": "as it is", "independent": "if independent"})
    prefixes = prefixes.melt(["regime", "tokens"], ["as it is", "if independent"], "tokens scatter")
    seaborn.lineplot(prefixes, x="tokens", y="value", hue="regime", style="tokens scatter",
                     errorbar=None, ax=axes[2])
    axes[2].set(yscale="log", ylim=(1e-4, 3e-2), title="without noise", ylabel="spread of log s",
                xlabel="first tokens of the same responses")
    axes[2].set_xscale("log", base=2)
    axes[2].legend(loc="lower left", fontsize=8)
    save(figure, "noise")


def draw_clip(runs: pd.DataFrame):
    places = {"arithmetic, 4 updates": ("ranges", ["gspo, 3e-3", "grpo, 0.2"]),
              "Countdown, 32 updates": ("rates", ["gspo, lr 8e-5", "grpo, lr 8e-5"])}
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained", sharey=True)
    for axis, (title, (study, arms)) in zip(axes, places.items()):
        table = silenced(runs[(runs.study == study) & runs.arm.isin(arms)])
        table["who"] = table.arm.str[:4] + ", " + table.sign + " response"
        seaborn.barplot(table, x="length", y="share", hue="who", errorbar=interval, ax=axis)
        axis.set(title=title, xlabel="tokens in the response, at most", ylabel="share silenced")
    save(figure, "clip")


def main():
    runs = load()
    if "--draw" in sys.argv:
        for name in ("settings", "experts", "samplers", "length", "mistakes"):
            draw_forest(runs, name)
        for draw in (draw_rates, draw_noise, draw_clip):
            draw(runs)
    else:
        for title, table in tables(runs).items():
            print(f"\n# {title}\n\n{table.to_markdown(disable_numparse=True)}")


if __name__ == "__main__":
    main()
