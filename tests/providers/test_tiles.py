"""Thresholds are data: with them the launchers choose as they did when the numbers stood among the code."""

import pytest

from fuseplan.providers.triton import tuned
from tests.providers.stand_ins import snapshot
from tests.providers.tiles import table

FOUND = {
    **{name: value for name, value in vars(tuned).items() if isinstance(value, tuned.Found) and value.what},
    **{f"NORM_THREAD {name}": value for name, value in tuned.NORM_THREAD.items()},
}


def test_launchers_choose_what_was_recorded() -> None:
    recorded, chosen = snapshot("tiles"), table()
    assert chosen["choices"] == recorded["choices"]
    assert chosen["by_rows"] == recorded["by_rows"]


@pytest.mark.parametrize("name", FOUND)
def test_each_says_where_it_was_found(name: str) -> None:
    found = FOUND[name]
    assert found.what.endswith(".")
    assert found.device
    assert found.date in {"2026-11-27", "2026-11-29", "2026-11-30"}
    assert "benchmarks/" in found.command
    assert found.source
