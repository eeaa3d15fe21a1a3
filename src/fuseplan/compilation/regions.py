"""Regions: which entries in Dynamo's caches belong to which backends.

Dynamo compiles a code object at most `recompile_limit` (eight) times and runs it uncompiled afterwards, no matter which
backend caused the entries. Compile ranges, several callbacks for reports, and norms whose epsilon is made a constant
make more entries than the user's model needs. So equal backends share a region, and each region has the limit to
itself.
"""

import functools
import inspect
import types
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch._dynamo import config as dynamo_config

ISOLATE = "isolate_recompiles"
ISOLATED = "_isolate_recompiles_id"
"""How torch 2.13 and newer keep entries apart: an argument of `torch.compile`, and the attribute that it sets. Older
releases count all entries of a code object together, and get a higher limit instead.
"""


class CacheRegion:
    """The entries that equal backends have in Dynamo's caches.

    Attributes:
        further: how many of them are there only because fuseplan made a float a constant.
    """

    def __init__(self) -> None:
        self.further = 0
        self._id: int | None = None

    def compile(self, function: Callable[..., Any], arguments: Mapping[str, Any]) -> Callable[..., Any]:
        """`torch.compile(function, **arguments)`, with its entries in this region.

        Args:
            function: a function, bound method or module.
            arguments: of `torch.compile`.
        """
        separate = ISOLATE in inspect.signature(torch.compile).parameters
        compiled = torch.compile(function, **{**arguments, **({ISOLATE: True} if separate else {})})
        context = _context_of(compiled)
        if compiled is function or context is None:
            return compiled
        if separate and not arguments.get(ISOLATE):
            self._id = getattr(context, ISOLATED) if self._id is None else self._id
            setattr(context, ISOLATED, self._id)
        context.callback = _Callback(context.callback, functools.partial(self._limits, separate=separate))
        return context(function)  # type: ignore[no-any-return]

    def _limits(self, *, separate: bool) -> dict[str, int]:
        regions = len(_REGIONS)
        limit = dynamo_config.recompile_limit * (1 if separate else regions)
        return {
            "recompile_limit": limit + self.further,
            # This limit counts every region, in every release.
            "accumulated_recompile_limit": dynamo_config.accumulated_recompile_limit * regions + self.further,
        }


_REGIONS: WeakValueDictionary[Hashable, CacheRegion] = WeakValueDictionary()


def region_of(*key: Hashable) -> CacheRegion:
    """The region of all backends that have an equal key."""
    return _REGIONS.setdefault(key, CacheRegion())


class _Callback:
    """The compiler that Dynamo calls where no entry fits, with the limits of a region."""

    def __init__(self, callback: Callable[..., Any], limits: Callable[[], dict[str, int]]) -> None:
        self._torchdynamo_orig_backend = callback  # by which Dynamo finds the backend of an entry
        self._limits = limits

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with dynamo_config.patch(self._limits()):
            return self._torchdynamo_orig_backend(*args, **kwargs)


def _context_of(compiled: Any) -> Any:
    """Dynamo's context behind a compiled function or module; None where nothing was compiled."""
    if isinstance(compiled, torch._dynamo.OptimizedModule):
        return compiled.dynamo_ctx
    if not inspect.isfunction(compiled) or not hasattr(compiled, "get_compiler_config"):
        return None
    return inspect.getclosurevars(compiled).nonlocals.get("self")


def values_of(options: Mapping[str, object]) -> Hashable:
    """Equal for equal options; functions and other objects among them count by `identity_of`."""
    return frozenset((name, identity_of(value)) for name, value in options.items())


def identity_of(value: object) -> Hashable:
    """Equal for callables that do the same to the same objects, and for equal numbers and texts: a bound method is
    another object each time that it is named, and so is a lambda in a loop. Other objects count by identity.
    """
    if isinstance(value, str | int | float | None):
        return type(value), value
    if isinstance(value, types.MethodType):
        return _Same(value.__self__), identity_of(value.__func__)
    if isinstance(value, types.BuiltinMethodType):
        return _Same(value.__self__), value.__name__
    if type(value) is functools.partial:
        return "partial", identity_of(value.func), tuple(map(identity_of, value.args)), values_of(value.keywords)
    if isinstance(value, types.FunctionType) and not value.__dict__:
        bound = (*map(_content, value.__closure__ or ()), *(value.__defaults__ or ()))
        named = values_of(value.__kwdefaults__ or {})
        return value.__code__, _Same(value.__globals__), tuple(map(identity_of, bound)), named
    return _Same(value)


def _content(cell: types.CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # nothing is in it yet
        return cell


@dataclass(frozen=True, eq=False)
class _Same:
    """An object by identity. It is kept alive, so that no other object gets its id."""

    value: object

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)
