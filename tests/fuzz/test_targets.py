"""Readers of files survive what hypothesis and atheris make of valid ones."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.targets import TARGETS

ROOT = Path(__file__).parents[2]
SECONDS = 60
"""For which atheris tries each reader."""

HOSTILE = ["", "\x1b[31m", "a\nb", "\ud800", "x" * 500, "1-2", "=", "layers.0-999999999.x", "a b c", "9" * 30]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(HOSTILE),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(HOSTILE), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def changed(draw: st.DrawFn, seed: bytes) -> bytes:
    """A valid content with a few values replaced, given twice, renamed or dropped, or with bytes changed."""
    if not seed.startswith(b"{") or draw(st.integers(0, 3)) == 0:
        content = bytearray(seed)
        for _ in range(draw(st.integers(0, 4))):
            at = draw(st.integers(0, len(content)))
            content[at : at + draw(st.integers(0, 3))] = draw(st.binary(max_size=6))
        return bytes(content)
    data = json.loads(seed)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.sampled_from(_places(data)))
        name = draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        change = draw(st.sampled_from(["replace", "rename", "drop"]))
        if change == "replace":
            place[name] = draw(VALUES)
        elif change == "rename" and isinstance(place, dict):
            place[draw(st.sampled_from(HOSTILE) | st.text(max_size=5))] = place.pop(name)
        else:
            del place[name]
    return json.dumps(data).encode()


def _places(data: Any) -> list[Any]:
    """Every object and list in which something can be changed."""
    inner = data.values() if isinstance(data, dict) else data if isinstance(data, list) else ()
    found = [place for value in inner for place in _places(value)]
    return [data, *found] if isinstance(data, (dict, list)) and data else found


@pytest.mark.parametrize("name", TARGETS)
def test_valid_files_are_taken(name: str) -> None:
    assert [seed for seed in TARGETS[name].seeds if not TARGETS[name](seed)] == []


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=60)
@given(data=st.data())
def test_files_that_were_changed_end_in_a_value_or_one_line(name: str, data: st.DataObject) -> None:
    target = TARGETS[name]
    target(data.draw(st.sampled_from(target.seeds).flatmap(changed)))


@pytest.mark.nightly
@pytest.mark.parametrize("name", TARGETS)
def test_atheris_finds_nothing(name: str, tmp_path: Path) -> None:
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("atheris is not installed: it has wheels for Linux on x86-64 alone")
    command = [sys.executable, "-m", "tests.fuzz.run", name, str(tmp_path), f"-max_total_time={SECONDS}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
