"""Makes the pictures of the documentation anew, and the table of measured results in README.

    make pictures                                     # all of them; pages in a browser need chromium
    PYTHONPATH=src:. python docs/make_pictures.py measured.svg README.md

Terminals become SVG, from what the command that stands beside them prints; pages become PNG, taken by a browser; charts
and the table are drawn from `benchmarks/results`.
"""

import html
import os
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from rich.console import Console, RenderableType
from rich.segment import Segment
from typer.testing import CliRunner

from docs import diagram, measured
from docs.blocks import ROOT, save_files
from fuseplan.cli import app

PICTURES = ROOT / "docs/pictures"
COLUMNS = 110
CELL, LINE, SIZE, MARGIN = 7.2, 16, 12, 14
"""Of a character, of a line, of the font, around the text, in pixels."""

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Terminal:
    """What a command prints.

    Attributes:
        command: as a page has it.
        page: whose files it needs, if any.
    """

    command: str
    page: str | None = None


@dataclass(frozen=True, kw_only=True)
class Page:
    """A part of the page that a command writes with `--html`.

    Attributes:
        command: as a page has it; it writes `report.html`.
        page: whose files it needs, if any.
        first: selector of the topmost element of the part.
        last: of the lowest.
        width: of the window.
        height: at most this much of the part.
    """

    command: str
    first: str
    last: str
    page: str | None = None
    width: int = 1180
    height: int = 1000


_DECODER = "fuseplan explain decoder:decoder --tp 2 --range 1:64 --range 65:4096"
_READING = "docs/reading-a-report.md"

TERMINALS: Mapping[str, Terminal] = {
    "gpt-oss-120b.svg": Terminal(command="fuseplan explain gpt-oss-120b --tp 2"),
    "decoder.svg": Terminal(
        command=f"{_DECODER} --policy planned "
        '--policy "ordered(act_padding, allreduce_rms)" --policy "ordered(allreduce_rms, act_padding)" -v',
        page=_READING,
    ),
}
PAGES: Mapping[str, Page] = {
    "page.png": Page(command=f"{_DECODER} --html report.html", page=_READING, first="header", last="#control"),
    "page-graph.png": Page(command=f"{_DECODER} --html report.html", page=_READING, first="#graph", last="#graph"),
}
CHARTS: Mapping[str, Callable[[], str]] = {
    "measured.svg": measured.gains,
    "region.svg": measured.region,
    "kernels.svg": measured.kernels,
    "crossover.svg": measured.crossover,
    "planner.svg": diagram.planner,
}


# Terminals.


@contextmanager
def _in_folder_of(page: str | None) -> Iterator[Path]:
    """A folder with the files that a page tells its reader to save."""
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        if page is not None:
            save_files(ROOT / page, Path(folder))
        yield Path(folder)


def _run(command: str) -> None:
    program, *arguments = shlex.split(command)
    assert program == "fuseplan", command
    result = CliRunner().invoke(app, arguments)
    if result.exit_code:
        raise SystemExit(f"{command}\n{result.output}")


def lines_of(terminal: Terminal) -> list[list[Segment]]:
    """What a command prints, line by line, with its styles."""
    shown: list[RenderableType] = []
    with (
        _in_folder_of(terminal.page),
        mock.patch("fuseplan.cli.explain.show", lambda content, _: shown.append(content)),
    ):
        _run(terminal.command)
    with Path(os.devnull).open("w") as nowhere:
        console = Console(width=COLUMNS, force_terminal=True, highlight=False, file=nowhere)
        return [line for content in shown for line in console.render_lines(content, pad=False)]


STYLE = """
svg { --ground: #f7f8fa; --frame: #d4d9e0; --ink: #1f2733; --dim: #5c6773; --green: #14713a; --red: #b3261e;
--yellow: #8a5a00 }
@media (prefers-color-scheme: dark) { svg { --ground: #14181f; --frame: #2c3440; --ink: #d7dde5; --dim: #8b96a5;
--green: #5fc98a; --red: #ff8a80; --yellow: #e3b34c } }
rect { fill: var(--ground); stroke: var(--frame) }
text { font: SIZEpx ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; fill: var(--ink);
white-space: pre }
.bold { font-weight: 700 } .italic { font-style: italic }
.dim { fill: var(--dim) } .green { fill: var(--green) } .red { fill: var(--red) } .yellow { fill: var(--yellow) }
""".replace("SIZE", str(SIZE))


def svg_of(command: str, lines: Sequence[Sequence[Segment]]) -> str:
    """A terminal as SVG: text that can be selected, in the reader's own monospaced font, for light and dark pages."""
    typed = _wrapped(command)
    rows = [
        _text(number, f'<tspan class="dim">{prompt}</tspan>{html.escape(words)}', len(prompt + words))
        for number, (prompt, words) in enumerate(typed)
    ]
    for number, line in enumerate(lines, start=len(typed) + 1):
        plain = "".join(segment.text for segment in line).rstrip()
        if plain:
            rows.append(_text(number, "".join(map(_span, _trimmed(line, len(plain)))), len(plain)))
    width, height = COLUMNS * CELL + 2 * MARGIN, (len(typed) + 1 + len(lines)) * LINE + 2 * MARGIN
    body = "\n".join(rows)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" width="{width:.0f}" '
        f'height="{height}">\n<style>{STYLE}</style>\n'
        f'<rect x="0.5" y="0.5" width="{width - 1:.0f}" height="{height - 1}" rx="6"/>\n{body}\n</svg>\n'
    )


def _wrapped(command: str) -> list[tuple[str, str]]:
    """(prompt, text) of each line of a command that is typed on several."""
    lines = [""]
    for word in re.findall(r'--\S+ (?:"[^"]*"|[^-"\s]\S*)|"[^"]*"|\S+', command):
        if len(lines[-1]) + len(word) + 5 > COLUMNS:
            lines.append("")
        lines[-1] += f" {word}" if lines[-1] else word
    return [
        ("  " if number else "$ ", line if number == len(lines) - 1 else f"{line} \\")
        for number, line in enumerate(lines)
    ]


def _text(number: int, content: str, columns: int) -> str:
    y = MARGIN + LINE * (number + 0.75)
    return f'<text x="{MARGIN}" y="{y:g}" textLength="{columns * CELL:.1f}" xml:space="preserve">{content}</text>'


def _trimmed(line: Sequence[Segment], columns: int) -> Iterator[Segment]:
    for segment in line:
        text = segment.text[:columns]
        columns -= len(text)
        if text:
            yield Segment(text, segment.style)


def _span(segment: Segment) -> str:
    style, text = segment.style, html.escape(segment.text, quote=False)
    if style is None:
        return text
    names = [name for name in ("bold", "italic", "dim") if getattr(style, name)]
    if style.color is not None and "dim" not in names:
        names.append(style.color.name)
    return f'<tspan class="{" ".join(names)}">{text}</tspan>' if names else text


# Pages.


def shoot(page: Page, path: Path) -> None:
    """Takes a picture of a part of a page."""
    from playwright.sync_api import sync_playwright

    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        raise SystemExit(f"{path.name} needs a browser: none of {', '.join(BROWSERS)} is on PATH")
    with _in_folder_of(page.page) as folder, sync_playwright() as playwright:
        _run(page.command)
        launched = playwright.chromium.launch(executable_path=browser, args=ARGUMENTS)
        tab = launched.new_page(viewport={"width": page.width, "height": 1200}, color_scheme="light")
        tab.goto((folder / "report.html").as_uri())
        tab.locator("html[data-ready]").wait_for(state="attached")
        first, last = (tab.locator(selector).first.bounding_box() for selector in (page.first, page.last))
        assert first
        assert last
        height = min(last["y"] + last["height"] - first["y"], page.height)
        clip: Any = {"x": 0, "y": first["y"], "width": page.width, "height": height}
        tab.screenshot(path=path, full_page=True, clip=clip)
        launched.close()


def main(names: Sequence[str]) -> None:
    """Makes the named pictures and README's table, or all."""
    for name in names or (*TERMINALS, *CHARTS, *PAGES, measured.README.name):
        path = PICTURES / name
        if name == measured.README.name:
            path = measured.README
            path.write_text(measured.with_table(path.read_text(encoding="utf-8")), encoding="utf-8")
        elif name in TERMINALS:
            path.write_text(svg_of(TERMINALS[name].command, lines_of(TERMINALS[name])), encoding="utf-8")
        elif name in CHARTS:
            path.write_text(CHARTS[name](), encoding="utf-8")
        else:
            shoot(PAGES[name], path)
        print(f"{name}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
