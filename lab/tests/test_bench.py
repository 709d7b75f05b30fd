"""The speed measurements, at tiny sizes."""
import json
import subprocess
import sys

import pytest

from lab.tests.tools import HOUSE


@pytest.mark.skipif(not (HOUSE / ".git").exists(), reason="the bench names the commit")
def test_every_side_has_a_row():
    pytest.importorskip("pandas")
    words = ("-m", "lab.study.bench", "--small", "--repeats", "1", "--threads", "1")
    output = subprocess.run([sys.executable, *words], cwd=HOUSE, check=True, text=True,
                            stdout=subprocess.PIPE).stdout
    rows = json.loads(output.splitlines()[-1])["rows"]
    whats = [row["what"] for row in rows]
    assert [whats.count(what) for what in dict.fromkeys(whats)] == [1, 5, 2, 1, 2, 1]
    for row in rows:
        assert row["rate"] > 0
        assert row["unit"] == ("responses/s" if row["what"].startswith("RL step") else "tokens/s")
        assert len(row["seconds"]) == 1
    assert rows[0]["side"] == "ours"
    assert rows[0]["first_is_faster"] == 1
