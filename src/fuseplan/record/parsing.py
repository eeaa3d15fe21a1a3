"""JSON from outside, as data: whatever the bytes are, the result is plain values in bounds, or a ValueError."""

import json
import math
import re
from itertools import accumulate
from typing import Any

MOST_DEPTH = 64
"""Objects and lists inside each other; fuseplan's own files have up to 8, and configurations of models a few more."""

MOST_DIGITS = 40
"""The most digits of a whole number: more than any size or time has, and few enough for a float, too."""

_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
"""A string, or the rest of the content where it doesn't end: each byte is looked at once."""
_NO_BRACKET = bytes(set(range(256)) - set(b"[]{}"))
_OPENING = frozenset(b"[{")


def parse_json(content: bytes, *, most_bytes: int, finite: bool = True) -> Any:
    """The value of `json.loads`.

    Args:
        content: JSON in UTF-8.
        most_bytes: of it.
        finite: whether NaN and Infinity, which aren't JSON, are refused.

    Raises:
        ValueError: it is too large or nested too deeply, isn't JSON, has a name twice in one object, or a number that
            no size, time or count needs.
    """
    if len(content) > most_bytes:
        raise ValueError(f"it has more than {most_bytes} bytes")
    # Before parsing, which takes a frame of the stack for each level.
    if _depth(content) > MOST_DEPTH:
        raise ValueError(f"it is nested more than {MOST_DEPTH} deep")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("it isn't UTF-8") from None
    try:
        return json.loads(
            text,
            object_pairs_hook=_object,
            parse_int=_int,
            parse_float=_finite_float if finite else None,
            parse_constant=_refuse_constant if finite else None,
        )
    except json.JSONDecodeError as error:
        raise ValueError(f"it isn't JSON: {error}") from None


def parse_object(content: bytes, *, most_bytes: int, schema: int) -> dict[str, Any]:
    """The JSON object in a file of fuseplan's own.

    Args:
        content: of the file.
        most_bytes: of it.
        schema: the required one.

    Raises:
        ValueError: as `parse_json`; or it is no object, or one of another schema.
    """
    data = parse_json(content, most_bytes=most_bytes)
    if not isinstance(data, dict):
        raise ValueError("it isn't a JSON object")
    found = data.get("schema")
    if type(found) is not int or found != schema:
        raise ValueError(f"it has schema {str(found)[:40]}; this version reads {schema}")
    return data


def _depth(content: bytes) -> int:
    brackets = _STRING.sub(b"", content).translate(None, _NO_BRACKET)
    return max(accumulate(1 if each in _OPENING else -1 for each in brackets), default=0)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Merging two versions of a file can leave a name twice, and the last one would win."""
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"{name[:80]!r} is there twice in one object")
        result[name] = value
    return result


def _int(text: str) -> int:
    if len(text) > MOST_DIGITS:
        raise ValueError(f"the number {text[:20]}... has more than {MOST_DIGITS} digits")
    return int(text)


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:40]} is larger than any float")
    return value


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} isn't a number of JSON")
