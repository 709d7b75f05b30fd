"""Runs in an empty folder, and tasks of one's own, for the tests here."""
import shutil

import pytest

import train as train_py
from data import arithmetic
from lab import preflight, report
from lab.tests.tools import LAST_WORDS, SHORT, do_nothing, few_held_out, no_curves


def pytest_terminal_summary(terminalreporter):
    for line in LAST_WORDS:
        terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def cold_starts(tmp_path_factory):
    """A folder with the cold start of SHORT, which most runs here begin with."""
    folder = tmp_path_factory.mktemp("short")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(report, "curves", no_curves)
        train_py.main([*SHORT, "0", "--out", "run"])
    return folder / "out"


@pytest.fixture
def train(tmp_path, monkeypatch, cold_starts):
    """A function that calls train.main in an empty folder -> its exit code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "curves", no_curves)
    monkeypatch.setattr(arithmetic.Task, "held_out", few_held_out)

    def run(*arguments):
        with monkeypatch.context() as patch:
            if arguments[:len(SHORT)] == SHORT:
                shutil.copytree(cold_starts, "out", dirs_exist_ok=True)
                patch.setattr(preflight, "check", do_nothing)
            try:
                return train_py.main(arguments) or 0
            except SystemExit as stop:
                return stop.code
    return run


@pytest.fixture
def task_file(monkeypatch, tmp_path):
    """A function that writes a task of one's own. (data/ is a namespace package, so it may lie in
    another folder.)"""
    import data
    (tmp_path / "data").mkdir()
    monkeypatch.setattr(data, "__path__", [*data.__path__, str(tmp_path / "data")])

    def write(name, text):
        (tmp_path / "data" / f"{name}.py").write_text(text)
    return write
