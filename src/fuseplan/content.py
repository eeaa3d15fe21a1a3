"""What a function, class or value is, as a hash that is equal wherever it is equal: in another process, on another
machine, in another order. Cache keys are made of it, so it has no addresses.

The text of a function would not do. Two functions of one text differ in what they close over, two lambdas on a line
have one text, and what is typed into a prompt has none.
"""

import dataclasses
import enum
import functools
import hashlib
import json
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

MOST_VALUES = 20_000
MOST_DEPTH = 100
"""Beyond these a value is known by its type alone: what decides on a fusion is small, a model that it holds isn't."""

_PLAIN = (bool, int, str, type(None))
_BY_TEXT = (float, complex, bytes, torch.dtype, torch.device, torch.layout, torch.memory_format, torch._ops.OpOverload)
_COLLECTIONS = (Mapping, set, frozenset, list, tuple)


def content_of(value: Any) -> str:
    """A hash of a value by content.

    Functions count by their code, their defaults, what they close over and what they name in their module; classes by
    their members; instances by their fields; tensors by dtype, shape and device. What an installed package defines
    counts by its name and the package's version, but for the package that the value itself is of.
    """
    text = json.dumps(_Reader().read(value))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


class _Reader:
    """Reads one value and all that it leads to, each once."""

    def __init__(self) -> None:
        self.known: dict[int, Any] = {}
        self.open: list[Any] = []
        self.held: list[Any] = []  # an id is only unique while its object lives

    def read(self, value: Any) -> Any:
        """A value as what `json.dumps` takes, the same wherever objects are shared."""
        if isinstance(value, enum.Enum):
            return [_name(type(value)), value.name]
        if type(value) in _PLAIN:
            return value
        if isinstance(value, _BY_TEXT):
            return [type(value).__name__, str(value)]
        if id(value) in self.known:
            return self.known[id(value)]
        if len(self.held) >= MOST_VALUES or len(self.open) >= MOST_DEPTH or any(each is value for each in self.open):
            return ["a", _name(type(value))]
        self.held.append(value)
        self.open.append(value)
        text = json.dumps(self._read_new(value))
        self.open.pop()
        self.known[id(value)] = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        return self.known[id(value)]

    def _read_new(self, value: Any) -> Any:
        for kind, read in self._readers:
            if isinstance(value, kind):
                return [_name(type(value)), read(self, value)]
        inner = _wrapped(value)
        return [_name(type(value)), self.read(inner)] if inner is not None else self._instance(value)

    def _function(self, function: types.FunctionType) -> Any:
        parts = [
            _name(function),
            self.read(function.__defaults__),
            self.read(function.__kwdefaults__),
            [self._cell(cell) for cell in function.__closure__ or ()],
        ]
        if _is_versioned(function):
            return parts
        named = sorted(_names(function.__code__) & function.__globals__.keys())
        values = [[name, self._named(function.__globals__[name], _package(function))] for name in named]
        return [*parts, self.read(function.__code__), values]

    def _cell(self, cell: types.CellType) -> Any:
        try:
            return [self.read(cell.cell_contents)]
        except ValueError:  # nothing is in it yet
            return []

    def _code(self, code: types.CodeType) -> Any:
        """Without names of files and numbers of lines."""
        names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
        counts = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags)
        return [code.co_code.hex(), *counts, *map(list, names), [self.read(constant) for constant in code.co_consts]]

    def _named(self, value: Any, package: str) -> Any:
        """What a function of some package names in its module. Instances may change while the program runs, and count
        by their type unless they are data.
        """
        if isinstance(value, types.ModuleType):
            return [value.__name__, _version_or_source(value, package)]
        inner = value if isinstance(value, (types.FunctionType, type)) else _wrapped(value)
        if inner is not None:
            is_near = _package(inner) == package or not _is_installed(_package(inner))
            return self.read(value) if is_near else [_name(inner), _version(_package(inner))]
        is_data = isinstance(value, (*_PLAIN, *_BY_TEXT, *_COLLECTIONS, enum.Enum)) or dataclasses.is_dataclass(value)
        return self.read(value) if is_data else _name(type(value))

    def _class(self, kind: type) -> Any:
        if _is_versioned(kind):
            return _name(kind)
        members = {name: self.read(member) for name, member in vars(kind).items() if name not in _OF_NO_CONSEQUENCE}
        return [_name(kind), [self.read(base) for base in kind.__bases__], sorted(members.items())]

    def _instance(self, value: Any) -> Any:
        kind = type(value)
        if dataclasses.is_dataclass(value):
            fields = [[field.name, self.read(getattr(value, field.name, None))] for field in dataclasses.fields(value)]
            return [self.read(kind), fields]
        is_opaque = _is_versioned(kind) and _package(kind) != "fuseplan"
        if is_opaque or not hasattr(value, "__dict__"):
            text = repr(value)
            return [_name(kind), None if " at 0x" in text else text]
        cached = {name for name in vars(value) if isinstance(getattr(kind, name, None), functools.cached_property)}
        return [self.read(kind), self._mapping({k: v for k, v in vars(value).items() if k not in cached})]

    def _mapping(self, mapping: Mapping[Any, Any]) -> Any:
        return [[self.read(key), self.read(mapping[key])] for key in _in_order(mapping)]

    def _sequence(self, items: Iterable[Any]) -> Any:
        return [self.read(item) for item in items]

    _readers: tuple[tuple[Any, Callable[["_Reader", Any], Any]], ...] = (
        (types.FunctionType, _function),
        (types.CodeType, _code),
        (types.MethodType, lambda self, method: [self.read(method.__func__), self.read(method.__self__)]),
        ((staticmethod, classmethod), lambda self, member: self.read(member.__func__)),
        (property, lambda self, member: [self.read(member.fget), self.read(member.fset)]),
        (functools.cached_property, lambda self, member: self.read(member.func)),
        (functools.partial, lambda self, each: [self.read(part) for part in (each.func, each.args, each.keywords)]),
        (type, _class),
        (torch.Tensor, lambda self, each: [str(each.dtype), [str(size) for size in each.shape], str(each.device)]),
        (types.ModuleType, lambda self, module: [module.__name__, _version_or_source(module, "")]),
        (Mapping, _mapping),
        ((set, frozenset), lambda self, items: self._sequence(_in_order(items))),
        ((list, tuple), _sequence),
    )


_OF_NO_CONSEQUENCE = frozenset(
    {
        "__dict__",
        "__weakref__",
        "__module__",
        "__doc__",
        "__firstlineno__",
        "__static_attributes__",
        "__annotations__",
        "__annotate_func__",
        "__annotations_cache__",
        "__slotnames__",
        "_abc_impl",
    }
)
"""Members of a class that what it does can't depend on, or that Python adds to it while it is used."""


def _in_order(items: Iterable[Any]) -> list[Any]:
    """Items of a set, or keys, in an order that is the same in every process."""

    def order(item: Any) -> tuple[str, str]:
        text = repr(item)
        return _name(type(item)), _name(item) if " at 0x" in text else text

    return sorted(items, key=order)


def _names(code: types.CodeType) -> set[str]:
    """Every name that code may look up, in the functions inside it too."""
    inner = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return set(code.co_names).union(*map(_names, inner))


def _wrapped(value: Any) -> Any:
    """The Python function in something that can be called like it: what caches it, a Triton kernel, a custom op."""
    state = getattr(value, "__dict__", {})
    inner = next((state[name] for name in ("__wrapped__", "fn", "_init_fn") if name in state), None)
    return inner if isinstance(inner, types.FunctionType) else None


def _name(thing: Any) -> str:
    return f"{getattr(thing, '__module__', None)}.{getattr(thing, '__qualname__', type(thing).__qualname__)}"


def _package(thing: Any) -> str:
    return str(getattr(thing, "__module__", None)).partition(".")[0]


_VERSIONED = frozenset({"torch", "fuseplan", *sys.stdlib_module_names} - {"__main__"})


def _is_versioned(thing: Any) -> bool:
    """Whether every key has the version of what defines a function or class."""
    return _package(thing) in _VERSIONED


def _is_installed(package: str) -> bool:
    file = getattr(sys.modules.get(package), "__file__", None) or ""
    return package in _VERSIONED or not {"site-packages", "dist-packages"}.isdisjoint(Path(file).parts)


def _version(package: str) -> str | None:
    version = getattr(sys.modules.get(package), "__version__", None)
    return version if isinstance(version, str) else None


def _version_or_source(module: types.ModuleType, package: str) -> str | None:
    """The version of an installed module; of one's own, i.e. one that isn't installed or is of `package`, its file."""
    root = module.__name__.partition(".")[0]
    if root != package and _is_installed(root):
        return _version(root)
    with suppress(OSError, TypeError):
        return hashlib.sha256(Path(module.__file__ or "").read_bytes()).hexdigest()
    return None
