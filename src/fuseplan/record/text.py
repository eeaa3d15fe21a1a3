"""Text from outside on one line of a terminal, a log or an error: it can't move the cursor, colour the text after it,
or look like a line of its own.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar, cast

T = TypeVar("T")

LONGEST_QUOTE = 300
"""Characters of a text from outside that an error repeats."""


def printable(text: str) -> str:
    r"""The text with every character that isn't printable as Python writes it: `\n`, `\x1b`, `\u202e`, `\udce4`."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)


def one_line(value: object, longest: int = LONGEST_QUOTE) -> str:
    """The text of an error or of a file's content on one line, cut where it is long."""
    # The part beyond the limit isn't worth escaping; one character can become several.
    text = printable(" ".join(str(value)[: 8 * longest].split()))
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def shown(record: T) -> T:
    """A record whose texts are printable: itself where they are."""
    return cast(T, _shown(record))


def _shown(value: Any) -> Any:
    if isinstance(value, str):
        # Members of enumerations are texts of fuseplan's own.
        return value if type(value) is not str or value.isprintable() else printable(value)
    if isinstance(value, (tuple, list)):
        items = [_shown(item) for item in value]
        return value if all(new is old for new, old in zip(items, value, strict=True)) else type(value)(items)
    if isinstance(value, Mapping):
        pairs = [(key, _shown(key), item, _shown(item)) for key, item in value.items()]
        same = all(new is old and shown_item is item for old, new, item, shown_item in pairs)
        return value if same else {new: shown_item for _, new, _, shown_item in pairs}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changes = {
            field.name: new
            for field in dataclasses.fields(value)
            if (new := _shown(old := getattr(value, field.name))) is not old
        }
        return dataclasses.replace(value, **changes) if changes else value
    return value


def duration(seconds: float) -> str:
    """`40 s`, `3 min`, `1 h 20 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def count_of(number: int, noun: str) -> str:
    """`1 place`, `2 places`"""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
