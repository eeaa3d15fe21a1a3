"""The examples are short, and each is on a page: there it runs as its readers run it."""

from pathlib import Path

import pytest

from docs.blocks import PAGES, ROOT, blocks_of
from tests.docs.commands import commands_of
from tests.examples.printed import FUSED

EXAMPLES = sorted(path.relative_to(ROOT) for path in (ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_short(path: Path) -> None:
    assert len((ROOT / path).read_text(encoding="utf-8").splitlines()) < 40


def test_a_page_runs_each_and_what_it_prints_is_checked() -> None:
    scripts = (block.body for page in PAGES for block in blocks_of(page) if block.language == "sh")
    ran = {argument for script in scripts for command in commands_of(script) for argument in command.arguments}
    names = [path.as_posix() for path in EXAMPLES]
    assert ran.issuperset(names)
    assert sorted(FUSED) == names
