"""Places in a user's model, layers folded: 36 of them are one line, and the line can be read back."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from fuseplan.record.text import one_line

MOST_PLACES = 100_000
"""More than any model has: lines that unfold to more are a mistake, or meant to exhaust memory."""

NO_MODULE = "(no module)"
"""Stands for places that belong to no module of the user's model."""

_NUMBER = re.compile(r"(?<![0-9])(?:0|[1-9][0-9]{0,8})(?![0-9])")
_INDEX = re.compile(r"(?<![^.])(?:0|[1-9][0-9]{0,8})(?![^.])")
"""A component that is only a number: most likely a layer's."""
_RUNS = re.compile(r"(?<![0-9])[0-9]+(?:[-,][0-9]+)+")
_LINE = re.compile(r":[0-9]+$")
_COUNTED = re.compile(r"(.*) x([1-9][0-9]{0,8})", re.DOTALL)
_MISWRITTEN = re.compile(r"[0-9][-,]{2,}[0-9]|[0-9][-,](?=\.|$)|(?:^|\.)[-,][0-9]| x[0-9]+$")
"""Text that looks like a list of numbers or a count and is none: a slip, unless it is quoted."""
_LITERAL = "="


def places(sources: Iterable[str | None]) -> str:
    """Module paths with runs of layer numbers folded: `layers.0-35.mlp`. For display only: `fold` makes lines that can
    be read back.
    """
    known = dict.fromkeys(source for source in sources if source is not None)
    return ", ".join(text for text, _ in _folded(known))


def module_of(source: str | None) -> str | None:
    """The module path that a record's `source` or `site` is; None where it is a line of code or not known."""
    return None if source is None or _LINE.search(source) else source


def fold(counts: Mapping[str | None, int]) -> tuple[str, ...]:
    """Places as few lines, sorted, so that a place that goes missing changes one of them.

    Args:
        counts: how often each place occurs, by module path; None: the places without one.

    Returns:
        `layers.0-6,8-35.mlp`; ` x2` follows a place that occurs twice; `=` and a count enclose a path that would
        otherwise be misread.
    """
    by_count: dict[int, list[str]] = {}
    for place, count in counts.items():
        by_count.setdefault(count, []).append(_quoted(place))
    rows = []
    for count, texts in by_count.items():
        for text, template in _folded(texts):
            counted = count > 1 or text.startswith(_LITERAL)
            rows.append((template, count, f"{text} x{count}" if counted else text))
    return tuple(text for *_, text in sorted(rows))


def unfold(lines: Iterable[str], most: int = MOST_PLACES) -> Counter[str | None]:
    """The inverse of `fold`.

    Args:
        lines: as `fold` yields them.
        most: places left of `MOST_PLACES`.

    Raises:
        ValueError: a line isn't of that form, two of them have a place in common, or there are too many places.
    """
    counts: Counter[str | None] = Counter()
    total = 0
    for line in lines:
        found = _COUNTED.fullmatch(line)
        text, count = (found[1], int(found[2])) if found else (line, 1)
        is_literal = text.startswith(_LITERAL)
        if (is_literal and not found) or (not is_literal and (_MISWRITTEN.search(text) or (found and count == 1))):
            raise ValueError(f"{line[:80]!r} isn't a line of places such as layers.0-6,8.norm or layers.0-6,8.norm x2")
        for place in _unfolded(text, most - total):
            if place in counts:
                raise ValueError(f"{one_line(place or NO_MODULE, 80)} is there twice, the second time in {line[:80]!r}")
            counts[place] = count
            total += count
        if total > most:
            raise ValueError(f"{line[:80]!r} makes it more than {MOST_PLACES} places")
    return counts


def _quoted(place: str | None) -> str:
    if place is None:
        return NO_MODULE
    is_plain = not _RUNS.search(place) and not _MISWRITTEN.search(place) and place != NO_MODULE
    return place if is_plain and place and not place.startswith(_LITERAL) else _LITERAL + place


def _folded(texts: Iterable[str]) -> list[tuple[str, str]]:
    """(text, template) of places that differ in one number, in the order in which they are first met."""
    numbers: dict[tuple[str, str | None], list[int]] = {}
    for text in texts:
        is_read_as_it_is = text.startswith(_LITERAL) or _RUNS.search(text)
        found = None if is_read_as_it_is else _INDEX.search(text) or _NUMBER.search(text)
        # A name without a number isn't one with a number at its end: norm, norm1.
        ends = (text[: found.start()], text[found.end() :]) if found else (text, None)
        numbers.setdefault(ends, []).extend([int(found[0])] if found else [])
    return [
        (before, f"{before}{{}}")
        if after is None
        else (f"{before}{_runs(sorted(set(indices)))}{after}", f"{before}{{}}{after}")
        for (before, after), indices in numbers.items()
    ]


def _runs(indices: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _unfolded(text: str, most: int) -> list[str | None]:
    if text == NO_MODULE:
        return [None]
    if text.startswith(_LITERAL):
        return [text.removeprefix(_LITERAL)]
    found = list(_RUNS.finditer(text))
    if not found:
        return [text]
    if len(found) > 1:
        raise ValueError(f"{text[:80]!r} has two lists of numbers, {found[0][0]} and {found[1][0]}")
    before, after = text[: found[0].start()], text[found[0].end() :]
    return [f"{before}{number}{after}" for number in _numbers(found[0][0], text, most)]


def _numbers(runs: str, text: str, most: int) -> list[int]:
    numbers: list[int] = []
    for run in runs.split(","):
        ends = run.split("-")
        if len(ends) > 2 or any(str(int(end[:9])) != end for end in ends):
            raise ValueError(f"{run[:40]!r} in {text[:80]!r} isn't a run of numbers such as 0-35")
        first, last = int(ends[0]), int(ends[-1])
        if (len(ends) == 2 and first >= last) or (numbers and first <= numbers[-1] + 1):
            raise ValueError(
                f"the numbers {runs[:40]!r} in {text[:80]!r} don't ascend, or aren't in as few runs as can be"
            )
        if last - first + len(numbers) >= most:
            raise ValueError(f"{text[:80]!r} makes it more than {MOST_PLACES} places")
        numbers += range(first, last + 1)
    return numbers
