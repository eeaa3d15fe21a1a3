"""A busy machine is named."""

import os

import pytest

from fuseplan.measurement.tuning import busy


@pytest.mark.parametrize(("load", "processors", "expected"), [(9.3, 2, True), (0.4, 2, False), (20.0, 128, False)])
def test_a_busy_machine_is_named(load: float, processors: int, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (load, load, load))
    monkeypatch.setattr(os, "cpu_count", lambda: processors)
    notes = busy()
    assert bool(notes) == expected
    if expected:
        assert notes == ["this machine is busy (load 9.3 on 2 processors): other work changes the times"]
