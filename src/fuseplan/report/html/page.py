"""The page: one file that needs nothing else, and may load nothing else."""

import base64
import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from fuseplan.errors import ReportError
from fuseplan.record import Comparison
from fuseplan.record.files import check_writable, write_whole, writing
from fuseplan.report.html.view import view_of

ASSETS = Path(__file__).with_name("assets")
STYLES = ("colours", "page", "tokens", "graph", "rows", "details", "media")
SCRIPTS = (
    "dom", "format", "view", "state", "theme", "layout", "figure", "layer", "layers", "focus", "flips", "chart",
    "tokens", "policies", "contests", "misses", "costs", "details", "fusion", "places", "search", "main",
)  # fmt: skip
"""Scripts in the order in which they are put into one function, so that they share names."""


def render_html(comparison: Comparison) -> str:
    """The report as one HTML file: no network, no other files, no code but its own.

    Args:
        comparison: its content; without evidence the page has no drawing, no slider and no rows behind its figures.
    """
    style, script = _style(), _script()
    text = _template().render(
        comparison=comparison,
        view=view_of(comparison),
        style=Markup(style),
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
        embedded=_embedded,
    )
    # A name from the command line may have bytes that aren't text.
    return text.encode("utf-8", "replace").decode("utf-8")


def save_html(comparison: Comparison, path: Path) -> None:
    """Writes the report: the whole file, or none.

    Raises:
        ReportError: the file can't be written.
    """
    with writing("report", path, ReportError):
        write_whole(path, render_html(comparison))


def check_html(path: Path) -> None:
    """Refuses a path that a report can't be written to, before there is one.

    Raises:
        ReportError: the text says why not.
    """
    with writing("report", path, ReportError):
        check_writable(path)


def _embedded(view: dict[str, Any]) -> Markup:
    """Data for a `<script type="application/json">`: ASCII, without characters that are special in HTML."""
    text = json.dumps(view, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _hash(text: str) -> str:
    """A source of a content security policy: this text and no other."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


@cache
def _style() -> str:
    return "\n".join((ASSETS / f"{name}.css").read_text(encoding="utf-8") for name in STYLES)


@cache
def _script() -> str:
    modules = [(ASSETS / f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS]
    return '(() => {\n"use strict";\n' + "\n".join(modules) + "})();\n"


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ASSETS), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template("report.html.jinja")
