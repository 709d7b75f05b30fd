"""The studies and what is made of them: statistics beside numbers worked out by hand, and the pages
of results/, whose numbers must be printed by one command."""
import re
import shlex
from pathlib import Path

import pytest

pd = pytest.importorskip("pandas")          # lab/requirements.txt
for package in ("seaborn", "statsmodels", "tabulate"):
    pytest.importorskip(package)
from lab.study import evidence, study  # noqa: E402

HOUSE = Path(__file__).parent.parent.parent


def table_of(values):
    """{arm: {seed: accuracy}} -> runs of a study "s"."""
    rows = [("s", arm, seed, x) for arm, seeds in values.items() for seed, x in seeds.items()]
    return pd.DataFrame(rows, columns=["study", "arm", "seed", "accuracy"])


RUNS = table_of({"a, wide": {0: 0.5, 1: 0.7, 2: 0.6, 7: 0.0}, "b": {2: 0.3, 0: 0.4, 1: 0.5},
                 "c": {0: 0.1, 1: 0.1, 2: 0.1}})


def test_a_contrast_pairs_the_seeds():
    found = evidence.differences(RUNS, "s/a, wide - s/b", "accuracy")
    assert found.to_dict() == pytest.approx({0: 0.1, 1: 0.2, 2: 0.3})
    # How much larger one difference is than another: (a - b) - (a - c) = c - b.
    found = evidence.differences(RUNS, "s/a, wide - s/b - s/a, wide + s/c", "accuracy")
    assert found.to_dict() == pytest.approx({0: -0.3, 1: -0.4, 2: -0.2})


def test_intervals_are_students_and_p_values_are_corrected_by_holm(tmp_path, monkeypatch):
    pd.DataFrame([("t", "a - b", "s/a, wide - s/b"), ("t", "b - c", "s/b - s/c"),
                  ("u", "a - b", "s/a, wide - s/b"), ("t", "not run", "s/a, wide - s/d")],
                 columns=["table", "difference", "contrast"]).to_csv(tmp_path / "c.csv")
    monkeypatch.setattr(evidence, "CONTRASTS", tmp_path / "c.csv")
    table = evidence.tests(RUNS, "t", "accuracy").set_index("difference")
    assert list(table.index) == ["a - b", "b - c"]
    x = table.loc["a - b"]
    # Differences 0.1, 0.2, 0.3: standard error 0.1 / sqrt(3), and t(2) is 4.303 at 95 %.
    assert (x["mean"], x.ahead, x.n) == (pytest.approx(0.2), 3, 3)
    assert x.high - x["mean"] == pytest.approx(4.303 * 0.1 / 3 ** 0.5, abs=1e-4)
    # t(2) = 3.464: p = 1 - t / sqrt(t^2 + 2) = 0.0742. b - c is 0.3, 0.4, 0.2: t = 5.196, p 0.0351.
    # Holm: the smallest p times 2, the other as it is, but not below the first.
    assert table.p.to_list() == pytest.approx([0.0742, 0.0701], abs=1e-4)
    assert evidence.tests(RUNS, "u", "accuracy").p[0] == pytest.approx(0.0742, abs=1e-4)


def test_the_best_arm_is_chosen_by_the_other_seeds():
    rewards = {"gspo, lr 1e-4": (0.5, 0.5, 0.1), "gspo, lr 2e-4": (0.1, 0.4, 0.9),
               "grpo, lr 1e-4": (0.3, 0.3, 0.3), "grpo, lr 2e-4": (0.0, 0.0, 0.8)}
    rows = [("rates", arm, seed, x, 1 - x) for arm, values in rewards.items()
            for seed, x in enumerate(values)]
    rows.append(("rates", "grpo, lr 1e-4", 3, 0.3, 0.7))        # seed 3 lacks the other arms
    runs = pd.DataFrame(rows, columns=["study", "arm", "seed", "primary", "accuracy"])
    chosen = evidence.best_of(runs, "rates").set_index(["arm", "seed"])
    # Without seed 2, gspo has means 0.5 and 0.25: the lower rate, which seed 2 likes least.
    assert chosen.primary["gspo"].to_list() == [0.1, 0.4, 0.1]
    assert chosen.primary["grpo"].to_list() == [0.0, 0.0, 0.3]
    assert chosen.accuracy["grpo"].to_list() == [1.0, 1.0, 0.7]
    assert set(chosen.study) == {"best of rates"}


def test_every_arm_has_a_command_of_its_own_and_instruments_where_train_py_lacks_them():
    studies = pd.read_csv(study.STUDIES)
    assert not studies.duplicated(["study", "arm"]).any()
    assert not studies.duplicated(["study", "command"]).any()
    for command in studies.command:
        needed = re.search("noise|final_samples|token_mean|_weight|dual", command)
        program = "-m lab.study.instruments" if needed else "train.py"
        assert command.startswith(program), command


def test_the_committed_runs_and_contrasts_are_of_arms_that_exist():
    listed = pd.read_csv(study.STUDIES)[["study", "arm"]].agg("/".join, axis=1)
    runs = evidence.load()
    made = runs[["study", "arm"]].agg("/".join, axis=1)
    assert set(pd.read_csv(study.RUNS)[["study", "arm"]].agg("/".join, axis=1)) <= set(listed)
    for contrast in pd.read_csv(evidence.CONTRASTS).contrast:
        assert {place for _, place in evidence.TERM.findall(contrast)} <= set(made), contrast
        assert len(evidence.differences(runs, contrast, "primary")) == 5, contrast


def test_a_run_is_missing_until_it_has_a_row(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "RUNS", tmp_path / "runs.csv")
    assert len(study.missing("4 updates")) == 15
    for seed in (3, 4):
        row = {"study": "4 updates", "arm": "grpo", "seed": seed, f"only_{seed}": 1.0}
        study.add(study.RUNS, pd.DataFrame([row]))
    missing = study.missing("4 updates")
    assert len(missing) == 13
    assert missing[0] == ("4 updates", "gspo", 0, "train.py --task countdown --queries uniform "
                          "--steps 100 --eval_every 25 --algorithm gspo --threads 1")
    assert ("4 updates", "grpo", 3) not in [run[:3] for run in missing]
    assert not list(tmp_path.glob("*.part"))


def test_every_figure_can_be_drawn_from_the_committed_tables(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(evidence, "save", lambda figure, name: drawn.append(name))
    monkeypatch.setattr("sys.argv", ["evidence", "--draw"])
    evidence.main()
    assert sorted(drawn) == sorted(evidence.TITLES)


# ------------------------------------------------------------------------------------ the pages

NUMBER = re.compile(r"(?<![\w.])(\d+\.\d+(?:e-\d+)?)( %)?(?![\w]|\.\d)|(?<![\w.])(\d+) %")
# Code, numbers of papers, and what others claim and found.
NOT_MEASURED = re.compile(r"```.*?```|`[^`]*`|\d{4}\.\d{5}|\*\*C\d+, the paper.*?\n\n|"
                          r"\*\*What others found.*?\n\n", re.DOTALL)
PAGES = [HOUSE / "README.md", *sorted((HOUSE / "results").glob("**/*.md"))]


@pytest.fixture(scope="module")
def tables():
    return evidence.tables(evidence.load())


def printed_for(text, tables):
    """The numbers of the tables that a page names, of all if it names none: a line "Tables: `name`,
    ..." at its end. Of the table of all arms, the rows of the studies that its command makes."""
    named = re.findall(r"`([^`]+)`", text.partition("\nTables:")[2]) or list(tables)
    studies = shlex.split(" ".join(re.findall(r"lab\.study\.study ([^`]*)`", text)))
    words = [tables[name].reset_index().to_csv(index=False) for name in named]
    arms = tables["arms"].reset_index()
    words.append(arms[arms.study.isin(studies)].to_csv(index=False))
    return [float(x) for x in re.findall(r"\d+(?:\.\d+)?(?:e-\d+)?", " ".join(words))]


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(HOUSE)) for page in PAGES])
def test_every_number_of_a_page_is_in_the_tables_that_it_names(page, tables):
    text = page.read_text(encoding="utf-8")
    if page == HOUSE / "README.md":
        text = text.partition("## What was found")[2].partition("\n## ")[0]
    printed = printed_for(text, tables)
    missing = []
    for number, percent, whole in NUMBER.findall(NOT_MEASURED.sub("", text)):
        written = number or whole
        scale = 100 if percent or whole else 1
        digits = len(written.partition("e")[0].partition(".")[2])
        form = f".{digits}e" if "e" in written else f".{digits}f"
        if not any(float(f"{scale * x:{form}}") == float(written) for x in printed):
            missing.append(written)
    assert not missing
