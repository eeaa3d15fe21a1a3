"""What people see is what was recorded: `python -m tests.report.goldens` records it anew."""

import pytest

from tests.report.goldens import DATA, GOLDENS, golden


@pytest.mark.parametrize("name", GOLDENS)
def test_people_see_what_was_recorded(name: str) -> None:
    assert golden(name).splitlines() == (DATA / f"{name}.txt").read_text(encoding="utf-8").splitlines()


def test_every_file_is_of_a_renderer() -> None:
    assert {path.stem for path in DATA.iterdir()} == set(GOLDENS)
