"""Plant each mistake of lab/extras/mistakes.py in turn, and run test_gspo.py: which tests fail?

    python -m lab.tests.planted        prints {mistake: names of the tests} as JSON
"""
import contextlib
import json
import sys

import pytest

from lab.extras.mistakes import MISTAKES


class Failed:
    """A plugin of pytest that keeps the names of the tests that fail."""
    def __init__(self):
        self.names = []

    def pytest_runtest_logreport(self, report):
        if report.failed:
            name = report.nodeid.rpartition("::")[2].partition("[")[0]
            self.names.append(name)


def main():
    caught = {}
    for name, mistake in {"none": contextlib.nullcontext(), **MISTAKES}.items():
        failed = Failed()
        with mistake, contextlib.redirect_stdout(sys.stderr):
            pytest.main(["-q", "--tb=no", "-p", "no:cacheprovider", "test_gspo.py"], [failed])
        caught[name] = list(dict.fromkeys(failed.names))
    print(json.dumps(caught))


if __name__ == "__main__":
    main()
