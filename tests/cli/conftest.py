import os

import pytest


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """One process on a machine that does nothing else, with a terminal that is wide enough for temporary folders."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "FUSEPLAN_COSTS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
