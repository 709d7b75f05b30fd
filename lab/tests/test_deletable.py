"""Each extra can be deleted, with its name in the list: what is left runs as before."""
import csv
import json
import os
import shutil
import subprocess
import sys

import pytest

from lab import extras, report
from lab.tests.tools import BRIEF, HOUSE

# In one process, which saves the imports of torch: a run in each copy of the house.
SCRIPT = """
import json
import os
import sys
import torch

OURS = ("train", "gspo", "moe", "lab", "data")
OPTIONS = ("--task", "brief", "--cold_steps", "5", "--cold_tokens", "400", "--steps", "2",
           "--prompts", "4", "--group_size", "4", "--mini_batches", "2", "--max_new_tokens", "9",
           "--threads", "1", "--device", "cpu", "--out", "run")


def no_curves(folder):
    return folder

for copy in sys.argv[1:]:
    for name in list(sys.modules):
        if name.split(".")[0] in OURS:
            del sys.modules[name]
    os.chdir(copy)
    sys.path[0] = copy
    import train
    from lab import report
    assert train.__file__.startswith(copy)
    report.curves = no_curves
    train.main(OPTIONS)
"""


def copy_without(folder, names):
    """A copy of the house without these extras."""
    folder.mkdir()
    for name in ("train.py", "gspo.py", "moe.py", "test_gspo.py"):
        shutil.copy(HOUSE / name, folder / name)
    for name in ("data", "lab"):
        shutil.copytree(HOUSE / name, folder / name,
                        ignore=shutil.ignore_patterns("__pycache__", "tests", "study"))
    (folder / "data" / "brief.py").write_text(BRIEF)
    path = folder / "lab/extras/__init__.py"
    lines = path.read_text().splitlines(keepends=True)
    for name in names:
        (folder / f"lab/extras/{name}.py").unlink()
        line, = [line for line in lines if line.startswith(f'    "{name}",')]
        lines.remove(line)
    path.write_text("".join(lines))
    return str(folder)


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """The folders of the copies: whole, without each of the extras, and without any."""
    folder = tmp_path_factory.mktemp("copies")
    without = {"nothing": [], **{name: [name] for name in extras.NAMES}, "all": extras.NAMES}
    result = {name: copy_without(folder / name, deleted) for name, deleted in without.items()}
    run = subprocess.run([sys.executable, "-c", SCRIPT, *result.values()], text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert run.returncode == 0, run.stdout
    return result


def core_columns(folder):
    with open(f"{folder}/run/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2
    names = [name for name in report.COLUMNS if name not in ("seconds", "tokens_per_second")]
    return [[row[name] for name in names] for row in rows]


@pytest.mark.parametrize("name", [*extras.NAMES, "all"])
def test_without_an_extra_a_run_has_the_same_numbers(copies, name):
    assert core_columns(copies[name]) == core_columns(copies["nothing"])


def test_with_an_extra_its_options_and_columns_go(copies):
    with open(f"{copies['nothing']}/run/metrics.csv") as file:
        assert set(extras.COLUMNS["metrics"]) < set(file.readline().strip().split(","))
    with open(f"{copies['all']}/run/metrics.csv") as file:
        assert tuple(file.readline().strip().split(",")) == report.COLUMNS
    with open(f"{copies['all']}/run/config.json") as file:
        assert "kl_coef" not in json.load(file)


def test_the_tests_of_the_core_pass_without_any_extra(copies):
    result = subprocess.run([sys.executable, "-m", "pytest", "-q", "test_gspo.py"], text=True,
                            cwd=copies["all"], env=os.environ | {"OMP_NUM_THREADS": "1"},
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert result.returncode == 0, result.stdout[-3000:]
