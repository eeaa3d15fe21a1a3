"""A value's content as a hash that is equal for equal values: in another process, on another machine, in another order.
Cache keys are made of it, so it has no addresses.

The behaviour of a user's function or object isn't known: it may read the environment, a file, a module, a tensor. Only
its owner can say whether it has changed, by a `uuid()`.
"""

import dataclasses
import enum
import functools
import hashlib
import inspect
import json
import sys
import types
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any

import torch

from fuseplan.record.text import one_line

_PLAIN = (bool, int, str, type(None))
_BY_TEXT = (
    float, complex, bytes, PurePath, torch.dtype, torch.device, torch.layout, torch.memory_format, torch._ops.OpOverload
)  # fmt: skip
_KNOWN = frozenset({"builtins", "fuseplan", "torch", *sys.stdlib_module_names} - {"__main__"})
"""Packages whose classes count by their names: every key has the packages' versions."""


@dataclasses.dataclass(frozen=True, eq=False)
class Content:
    """The content of a value.

    Attributes:
        digest: a hash of the data in it, and of the names of fuseplan's own classes and functions.
        users: functions and objects of users in it, in the order in which they are met.
    """

    digest: str
    users: tuple[Any, ...] = ()

    @property
    def key(self) -> str | None:
        """A hash of all of it; None where a user's part has no `uuid()`."""
        keys = [own_key(each) for each in self.users]
        return None if None in keys else _hash([self.digest, keys])

    def is_same(self, other: "Content") -> bool:
        """Whether two values of this process are equal; an object without a `uuid()` only equals itself."""
        if self.digest != other.digest or len(self.users) != len(other.users):
            return False
        return all(map(_is_alike, self.users, other.users))


Known = dict[int, tuple[Any, str]]
"""Values that were read, beside their hashes, by id. It keeps them, so that no other value has their ids."""


def content_of(value: Any, known: Known | None = None) -> Content:
    """A value by content.

    Instances of fuseplan's classes count by their fields, its functions by their names, defaults and closures. Objects
    with a `uuid()` count by that.

    Args:
        value: the value to read.
        known: values that were just read; added to, so that shared parts aren't read again.
    """
    reader = _Reader({} if known is None else known)
    return Content(_hash(reader.read(value)), tuple(reader.users))


def own_key(thing: Any) -> str | None:
    """A hash of the result of an object's `uuid()`; None where it has none."""
    return None if isinstance(said := _said(thing), str) else said[0].hex()


def lacking(thing: Any) -> str | None:
    """The problem with an object's `uuid()`, one clause, or None."""
    return said if isinstance(said := _said(thing), str) else None


def _said(thing: Any) -> str | tuple[bytes]:
    """The hash of `thing.uuid()`'s result, or why there is none. The result may be a text, bytes, or plain JSON data; a
    false one counts as none.
    """
    try:
        if (uuid := _uuid(thing)) is None:
            return "it has no uuid()"
        value = uuid() if callable(uuid) else uuid
        data = value if isinstance(value, bytes) else json.dumps(value, sort_keys=True, default=bytes.hex).encode()
        return (hashlib.sha256(data).digest(),) if value else f"its uuid() is {value!r}"
    except Exception as error:  # noqa: BLE001 - a user's code; without a key the graph is compiled again
        return f"its uuid() fails: {type(error).__name__}: {one_line(error, 200)}"


def _uuid(thing: Any) -> Any:
    """A `uuid` of its own: not one that `functools.wraps` copied from the wrapped function."""
    found = getattr(thing, "uuid", None)
    wrapped = getattr(thing, "__wrapped__", None)
    return None if wrapped is not None and found is getattr(wrapped, "uuid", None) else found


def _is_alike(mine: Any, theirs: Any) -> bool:
    return mine is theirs or ((key := own_key(mine)) is not None and key == own_key(theirs))


class _Reader:
    """Reads one value and all that it leads to."""

    def __init__(self, known: Known) -> None:
        self.users: list[Any] = []
        self._known = known
        self._open: list[int] = []
        self._closed: Known = {}  # values that contain users' parts, which are identified by their numbers here
        self._cycles = self._uses = 0

    def read(self, value: Any) -> Any:
        """A value as input of `json.dumps`: plain ones as they are, others as a hash, since many share parts."""
        if isinstance(value, enum.Enum):
            return [_name(type(value)), value.name]
        if type(value) in _PLAIN:
            return value
        if isinstance(value, _BY_TEXT):
            return [type(value).__name__, str(value)]
        if found := self._known.get(id(value)) or self._closed.get(id(value)):
            return [found[1]]
        if id(value) in self._open:
            self._cycles += 1
            return ["within", self._open.index(id(value))]
        cycles, uses = self._cycles, self._uses
        self._open.append(id(value))
        digest = _hash([_name(type(value)), self._parts(value)])
        self._open.pop()
        if self._cycles == cycles:  # the hash of a value in a cycle depends on where reading began
            (self._known if self._uses == uses else self._closed)[id(value)] = value, digest
        return [digest]

    def _parts(self, value: Any) -> Any:
        if isinstance(value, type):
            return _name(value) if _is_known(value) else self._of_a_user(value)
        if not _is_known(type(value)) or _uuid(value) is not None:
            return self._of_a_user(value)
        match value:
            case Mapping():
                return sorted([json.dumps(self.read(key)), self.read(each)] for key, each in _in_order(value))
            case set() | frozenset():
                return sorted(json.dumps(self.read(each)) for each in value)
            case list() | tuple():
                return [self.read(each) for each in value]
            case functools.partial():
                return [self.read(each) for each in (value.func, value.args, value.keywords)]
            case types.FunctionType() if _defined_in(value) == "fuseplan":
                cells = [self._cell(cell) for cell in value.__closure__ or ()]
                return [_name(value), self.read(value.__defaults__), self.read(value.__kwdefaults__), cells]
            case types.MethodType():
                is_of_class = inspect.getattr_static(type(value.__self__), value.__name__, None) is value.__func__
                return [value.__name__ if is_of_class else self.read(value.__func__), self.read(value.__self__)]
        if type(value).__module__.partition(".")[0] != "fuseplan":
            return self._of_a_user(value)
        return [self.read(_fields(value)), [self.read(each) for each in _replaced(type(value))]]

    def _cell(self, cell: types.CellType) -> Any:
        try:
            return [self.read(cell.cell_contents)]
        except ValueError:  # nothing is in it yet
            return []

    def _of_a_user(self, value: Any) -> Any:
        self._uses += 1
        known = [index for index, each in enumerate(self.users) if each is value]
        if not known:
            self.users.append(value)
        return ["of a user", known[0] if known else len(self.users) - 1]


def _fields(value: Any) -> dict[str, Any]:
    """The fields of an instance, without cached properties."""
    slots = [name for kind in type(value).__mro__ for name in _slots(kind)]
    found = {name: getattr(value, name) for name in slots if hasattr(value, name)}
    found.update(getattr(value, "__dict__", {}))
    return {
        name: each
        for name, each in found.items()
        if not isinstance(getattr(type(value), name, None), functools.cached_property)
    }


def _replaced(kind: type) -> list[types.FunctionType]:
    """Methods of one of fuseplan's classes that were put there from outside."""
    ours = [each for each in kind.__mro__ if each.__module__.partition(".")[0] == "fuseplan"]
    members = [member for each in ours for member in vars(each).values()]
    return [each for each in members if isinstance(each, types.FunctionType) and _defined_in(each) not in _KNOWN]


def _slots(kind: type) -> Iterable[str]:
    slots = vars(kind).get("__slots__", ())
    names = (slots,) if isinstance(slots, str) else slots
    return [name for name in names if name not in ("__dict__", "__weakref__")]


def _in_order(mapping: Mapping[Any, Any]) -> list[tuple[Any, Any]]:
    """Items by key, as far as keys are text: the order of reading then only depends on content."""
    return sorted(mapping.items(), key=lambda item: item[0] if isinstance(item[0], str) else "")


def _is_known(kind: type) -> bool:
    return kind.__module__.partition(".")[0] in _KNOWN


def _defined_in(function: types.FunctionType) -> str:
    """The package that defines a function: `functools.wraps` copies names, and `__module__` with them."""
    return str(function.__globals__.get("__name__")).partition(".")[0]


def _name(thing: Any) -> str:
    return f"{getattr(thing, '__module__', None)}.{getattr(thing, '__qualname__', type(thing).__qualname__)}"


def _hash(read: Any) -> str:
    return hashlib.sha256(json.dumps(read).encode("utf-8", "surrogatepass")).hexdigest()
