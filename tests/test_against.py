"""`benchmarks/planning.py --against`: two revisions plan side by side."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMPARE = """
import json
from benchmarks.against import compared
print(json.dumps(compared(".", "gpt-oss-20b-tiny", 2)))
"""


@pytest.mark.nightly
def test_a_revision_beside_itself_has_the_same_rules_and_every_stage() -> None:
    printed = subprocess.run([sys.executable, "-c", COMPARE], cwd=ROOT, check=True, capture_output=True, text=True)
    found = json.loads(printed.stdout)
    assert found["rules"]["theirs"] == found["rules"]["shared"] == found["rules"]["ours"] > 0
    assert list(found["cpu_ms"]) == list(found["peak_bytes_per_node"])
    for stages in found["cpu_ms"].values():
        assert {"canonical", "matching", "pricing", "planned", "rewriting", "total"} <= stages.keys()
        assert 0 < stages["planned"]["least"] <= stages["planned"]["median"] <= stages["total"]["median"]
    peaks = found["peak_bytes_per_node"].values()
    assert max(peaks) < 1.2 * min(peaks)
