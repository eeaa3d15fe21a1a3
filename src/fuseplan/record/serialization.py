"""Records to JSON and back: frozen dataclasses of plain values, nothing executed, unknown or ill-typed fields
refused.
"""

import dataclasses
import types
import typing
from collections.abc import Mapping
from enum import Enum
from functools import cache
from typing import Any, TypeVar

from fuseplan.record.text import one_line, printable

T = TypeVar("T")


def to_json(value: Any) -> Any:
    """A record as input of `json.dumps`: dataclasses become objects, tuples lists, enums their values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {json_name(field): to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [to_json(item) for item in value]
    return value


def json_name(field: "dataclasses.Field[Any]") -> str:
    """The name of a dataclass field in JSON: its own, or the one in its metadata, which JSON keeps where the attribute
    is renamed.
    """
    return str(field.metadata.get(JSON_NAME, field.name))


def from_json(kind: type[T], data: Any) -> T:
    """The inverse of `to_json` for a dataclass `kind`.

    Raises:
        ValueError: a field is missing, unknown or of the wrong type; the text names it.
    """
    try:
        return typing.cast(T, _decode(kind, data))
    except _MisfitError as misfit:
        where = printable("".join([kind.__name__, *reversed(misfit.steps)]))
        # Names in the data can be of any length.
        where = where if len(where) <= LONGEST_WHERE else f"...{where[-LONGEST_WHERE:]}"
        raise ValueError(f"{where}: expected {misfit.expected}, found '{one_line(misfit.found, 80)}'") from None


LONGEST_WHERE = 120
JSON_NAME = "json"
"""The key in a dataclass field's metadata."""


class _MisfitError(Exception):
    """Data that doesn't fit a field's type. Its path is collected from the inside out, and only on errors: carrying it
    along would copy every name for each value below it.
    """

    def __init__(self, expected: str, found: Any) -> None:
        super().__init__(expected)
        self.expected, self.found = expected, found
        self.steps: list[str] = []


def _decode(kind: Any, data: Any) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if data is None and type(None) in arguments:
            return None
        (kind,) = [argument for argument in arguments if argument is not type(None)]
        return _decode(kind, data)
    if origin is tuple:
        return _decode_tuple(arguments, data)
    if origin in (dict, Mapping):
        if not isinstance(data, dict):
            raise _MisfitError("an object", data)
        return {str(key): _within(f".{key}", arguments[1], item) for key, item in data.items()}
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(kind, data)
    if isinstance(kind, type) and issubclass(kind, Enum):
        if data not in [member.value for member in kind]:
            raise _MisfitError(f"one of {[member.value for member in kind]}", data)
        return kind(data)
    # A whole number is written without a point.
    kinds = (kind, int) if kind is float else (kind,)
    if not isinstance(data, kinds) or (kind is not bool and isinstance(data, bool)):
        raise _MisfitError(kind.__name__, data)
    return data


def _decode_tuple(arguments: tuple[Any, ...], data: Any) -> tuple[Any, ...]:
    if not isinstance(data, list):
        raise _MisfitError("a list", data)
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return tuple(_within(index, arguments[0], item) for index, item in enumerate(data))
    if len(data) != len(arguments):
        raise _MisfitError(f"a list of {len(arguments)}", data)
    return tuple(_within(i, kind, item) for i, (kind, item) in enumerate(zip(arguments, data, strict=True)))


def _decode_dataclass(kind: Any, data: Any) -> Any:
    if not isinstance(data, dict):
        raise _MisfitError("an object", data)
    fields = _fields(kind)
    for name in data:
        if name not in fields:
            misfit = _MisfitError(f"one of the fields {sorted(fields)}", name)
            misfit.steps.append(f".{name}")
            raise misfit
    for name, (_, _, is_required) in fields.items():
        if is_required and name not in data:
            raise _MisfitError(f"a field {name!r}", sorted(data))
    return kind(**{fields[name][0]: _within(f".{name}", fields[name][1], item) for name, item in data.items()})


@cache
def _fields(kind: Any) -> Mapping[str, tuple[str, Any, bool]]:
    """By the name of each field of a dataclass in JSON: its attribute, its type, and whether data must have it."""
    hints = typing.get_type_hints(kind)
    missing = (dataclasses.MISSING, dataclasses.MISSING)
    return {
        json_name(field): (field.name, hints[field.name], (field.default, field.default_factory) == missing)
        for field in dataclasses.fields(kind)
    }


def _within(step: str | int, kind: Any, data: Any) -> Any:
    """Decodes a value one level further inside."""
    try:
        return _decode(kind, data)
    except _MisfitError as misfit:
        misfit.steps.append(f"[{step}]" if isinstance(step, int) else step)
        raise
