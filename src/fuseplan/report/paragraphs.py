"""Drift and its causes as labelled lines, one paragraph a cause: in colour on a terminal, plain in a failed test."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.text import Text

from fuseplan.record.text import count_of, printable
from fuseplan.report.absence import Absence
from fuseplan.report.drift import Drift, Where
from fuseplan.report.lock import Applied
from fuseplan.report.text import entry

MOST_LINES = 6
"""Folded places that are listed; beyond these the rest are counted."""

STYLES = {
    "lost": "bold red", "wrong": "bold red", "moved": "bold yellow", "missed": "bold yellow", "gained": "bold green",
    "fix": "dim", "break": "dim", "": "dim",
}  # fmt: skip


@dataclass(frozen=True)
class Line:
    """One line of a paragraph.

    Attributes:
        label: the kind of line; empty for one that continues the line before.
        text: its text, made printable: names of models can be anything.
    """

    label: str
    text: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", printable(self.text))


def drift_paragraphs(drifts: Sequence[Drift], ranges: int) -> list[list[Line]]:
    """One paragraph a cause: the change, its places, and the reason. Two rules with the same obstacle have one cause.

    Args:
        drifts: as `drifts` yields them.
        ranges: how many compile ranges there are.
    """
    by_reason: dict[tuple[Line, ...], list[Line]] = {}
    for each in drifts:
        why = tuple(cause_lines(each.cause)) if each.cause is not None else ()
        line = Line(each.change.value, f"{_title(each)}, {where_text(each.where, ranges)}")
        by_reason.setdefault(why, []).append(line)
    return [[*lines, *why] for why, lines in by_reason.items()]


def cause_lines(cause: Absence) -> list[Line]:
    """Why, on which line of the model, and how to fix it."""
    why = f"near miss: {cause.detail}" if cause.near_miss is not None else cause.detail
    lines = [Line("why", why)]
    if cause.line is not None:
        lines.append(Line("", f"{cause.line}: {cause.code}" if cause.code else cause.line))
    if cause.fix is not None:
        lines.append(Line("fix", cause.fix))
    return lines


def break_paragraphs(breaks: Iterable[str]) -> list[list[Line]]:
    """One paragraph of all graph breaks, none where there are none."""
    lines = [Line("break", text) for text in breaks]
    return [lines] if lines else []


def where_text(where: Sequence[Where], ranges: int) -> str:
    """`36 places: layers.0-35.norm`, and in which ranges if there are several.

    Args:
        where: the places.
        ranges: how many compile ranges there are.
    """
    return "; ".join(_places_in(each, ranges) for each in where)


def _places_in(where: Where, ranges: int) -> str:
    count = where.count // len(where.ranges)
    shown, more = where.places[:MOST_LINES], len(where.places) - MOST_LINES
    listed = ", ".join(shown) + (f" and {more} more like these" if more > 0 else "")
    sizes = "" if ranges == 1 else f" at {' and '.join(where.ranges)} tokens"
    sizes = " in every range" if sizes and len(where.ranges) == ranges else sizes
    return f"{count_of(count, 'place')}{sizes}: {listed}"


def plain(paragraphs: Iterable[Sequence[Line]]) -> str:
    """Paragraphs as text: labels in a column of their own, a blank line between paragraphs."""
    return "\n\n".join("\n".join(f"{line.label:<8}{line.text}" for line in lines) for lines in paragraphs)


def render_paragraphs(paragraphs: Iterable[Sequence[Line]]) -> RenderableType:
    """Paragraphs for a terminal, wrapped beside their labels."""
    parts: list[RenderableType] = []
    for lines in paragraphs:
        parts += [Text(), *(entry(line.label, line.text, STYLES.get(line.label, "")) for line in lines)]
    return Group(*parts[1:])


def _title(drift: Drift) -> str:
    """The fusion before and after; one of them where both are the same, at a place with another name."""
    kernels = [Applied.parse(text) for text in dict.fromkeys((drift.before, drift.after)) if text is not None]
    tells_apart = len({(kernel.rule, kernel.provider) for kernel in kernels}) == len(kernels)
    names = [f"{each.rule}{'' if tells_apart else f' ({each.op})'} by {each.provider}" for each in kernels]
    return " -> ".join(names)
