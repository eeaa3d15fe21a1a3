"""The code blocks of a page, in order, as they are tested and as pictures are made of them."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))


@dataclass(frozen=True, kw_only=True)
class Block:
    """One fenced block.

    Attributes:
        page: the file, from the root of the repository.
        line: of its opening fence.
        language: `python`, `sh`, `text`, or a directive such as `{figure}`.
        body: what stands in it.
        shows_output: whether nothing but space stands between it and the block before.
    """

    page: str
    line: int
    language: str
    body: str
    shows_output: bool

    @property
    def file(self) -> str | None:
        """The name under which a reader saves the block, if it opens with one: `# decoder.py`."""
        named = re.match(r"# (\w+\.py)\n", self.body) if self.language == "python" else None
        return named[1] if named else None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    """All fenced blocks of a page."""
    return list(_blocks(page.relative_to(ROOT).as_posix(), page.read_text(encoding="utf-8").splitlines()))


def _blocks(page: str, lines: Sequence[str]) -> Iterator[Block]:
    fence, language, start, body, space = "", "", 0, list[str](), False
    for number, line in enumerate(lines, start=1):
        opening = re.match(r"(`{3,})(\S*)", line)
        if fence:
            if line.strip() == fence:
                yield Block(
                    page=page, line=start, language=language, shows_output=space,
                    body="".join(f"{each}\n" for each in body),
                )  # fmt: skip
                fence, space = "", True
            else:
                body.append(line)
        elif opening:
            fence, language, start, body = opening[1], opening[2], number, []
        elif line.strip():
            space = False


def save_files(page: Path, folder: Path) -> None:
    """Writes the blocks of a page that open with a file's name, as its reader would; of several, the first. The
    examples of the repository are there too.
    """
    if not (folder / "examples").exists():
        (folder / "examples").symlink_to(ROOT / "examples")
    for block in reversed(blocks_of(page)):
        if block.file:
            (folder / block.file).write_text(block.body, encoding="utf-8")
