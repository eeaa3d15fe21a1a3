"""Records to JSON and back: frozen dataclasses of plain values, nothing executed, unknown or ill-typed fields
refused.
"""

import dataclasses
import types
import typing
from collections.abc import Mapping
from enum import Enum
from typing import Any, TypeVar

T = TypeVar("T")


def to_json(value: Any) -> Any:
    """A record as what `json.dumps` takes: dataclasses become objects, tuples lists, enums their values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [to_json(item) for item in value]
    return value


def from_json(kind: type[T], data: Any) -> T:
    """The inverse of `to_json` for a dataclass `kind`.

    Raises:
        ValueError: a field is missing, unknown or of the wrong type; the text names it.
    """
    return typing.cast(T, _decode(kind, data, kind.__name__))


def _decode(kind: Any, data: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if data is None and type(None) in arguments:
            return None
        (kind,) = [argument for argument in arguments if argument is not type(None)]
        return _decode(kind, data, where)
    if origin is tuple:
        _expect(isinstance(data, list), where, "a list", data)
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(_decode(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(data))
        _expect(len(data) == len(arguments), where, f"a list of {len(arguments)}", data)
        return tuple(_decode(a, item, f"{where}[{i}]") for i, (a, item) in enumerate(zip(arguments, data, strict=True)))
    if origin in (dict, Mapping):
        _expect(isinstance(data, dict), where, "an object", data)
        return {str(key): _decode(arguments[1], item, f"{where}.{key}") for key, item in data.items()}
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(kind, data, where)
    if isinstance(kind, type) and issubclass(kind, Enum):
        _expect(data in [member.value for member in kind], where, f"one of {[m.value for m in kind]}", data)
        return kind(data)
    # A whole number is written without a point.
    kinds = (kind, int) if kind is float else (kind,)
    _expect(isinstance(data, kinds) and (kind is bool or not isinstance(data, bool)), where, kind.__name__, data)
    return data


def _decode_dataclass(kind: Any, data: Any, where: str) -> Any:
    _expect(isinstance(data, dict), where, "an object", data)
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for name in data:
        _expect(name in fields, f"{where}.{name}", f"one of the fields {sorted(fields)}", name)
    required = (dataclasses.MISSING, dataclasses.MISSING)
    for name, field in fields.items():
        _expect(
            name in data or (field.default, field.default_factory) != required, where, f"a field {name!r}", sorted(data)
        )
    return kind(**{name: _decode(hints[name], item, f"{where}.{name}") for name, item in data.items()})


def _expect(condition: bool, where: str, expected: str, found: Any) -> None:
    if not condition:
        raise ValueError(f"{where}: expected {expected}, found {str(found)[:80]!r}")
