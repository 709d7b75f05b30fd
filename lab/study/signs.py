"""Which number of the log shows a mistake, and from which step on: for results/claims/mistakes.md.

    python -m lab.study.signs       after the study `mistakes`: from out/study to results/signs.csv

A column of metrics.csv shows a mistake if, for ten steps in a row, all wrong runs lie on the same
side of all right ones. The first of these steps counts."""
from pathlib import Path

import pandas as pd

from lab.study.study import RESULTS

IN_A_ROW = 10
# What only an evaluation knows, and what depends on the machine.
NO_SIGN = ["accuracy", "accuracy_greedy", "tokens_per_second", "seconds"]


def logs(folder: Path, arm: str) -> dict[str, pd.DataFrame]:
    """{column of metrics.csv: a table with a row for each step, a column for each seed}"""
    runs = {path.parent.name: pd.read_csv(path, index_col="step").drop(columns=NO_SIGN)
            for path in sorted(folder.glob(f"mistakes-{arm}-*/metrics.csv"))}
    table = pd.concat(runs, axis=1).swaplevel(axis=1)
    return {column: table[column] for column in table.columns.levels[0]}


def first_step(wrong: pd.DataFrame, right: pd.DataFrame) -> int | None:
    """Where a column first shows the mistake."""
    above = wrong.min(axis=1, skipna=False) > right.max(axis=1, skipna=False)
    below = wrong.max(axis=1, skipna=False) < right.min(axis=1, skipna=False)
    steps = []
    for outside in (above, below):
        last = outside.rolling(IN_A_ROW).sum().eq(IN_A_ROW)
        steps += list(last.index[last] - IN_A_ROW + 1)
    return min(steps, default=None)


def signs(folder: Path, arms: list[str]) -> pd.DataFrame:
    """A row for each mistake and column that shows it, the earliest first: mean, lowest and highest
    value in these ten steps, of right and wrong runs."""
    right = logs(folder, "right")
    rows = []
    for arm in arms:
        for column, wrong in logs(folder, arm).items():
            step = first_step(wrong, right[column])
            if step is None:
                continue
            row = {"mistake": arm, "column": column, "step": step}
            for name, table in {"right": right[column], "wrong": wrong}.items():
                values = table.loc[step:step + IN_A_ROW - 1].stack()
                row |= {name: values.mean(), f"{name}_low": values.min(),
                        f"{name}_high": values.max()}
            rows.append(row)
    table = pd.DataFrame(rows)
    distance = (table.wrong - table.right).abs() / (table.right_high - table.right_low)
    return table.assign(distance=distance).sort_values(
        ["mistake", "step", "distance"], ascending=[True, True, False])


if __name__ == "__main__":
    studies = pd.read_csv(RESULTS / "studies.csv").query("study == 'mistakes' and arm != 'right'")
    found = signs(Path("out/study"), list(studies.arm))
    found.to_csv(RESULTS / "signs.csv", index=False, float_format="%.4g")
    print(found.groupby("mistake", sort=False).head(5).to_string())
