"""Whose entries in Dynamo's caches are whose.

Dynamo compiles a code object at most `recompile_limit` (eight) times and runs it uncompiled afterwards, whoever asked
for the entries. Compile ranges, several callbacks for reports, and norms whose epsilon is made a constant make more
entries than the user's model needs. So equal backends share a region, and each region has the limit to itself.
"""

import functools
import inspect
import types
from collections.abc import Callable, Hashable, Mapping
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch._dynamo import config as dynamo_config

ISOLATE = "isolate_recompiles"
ISOLATED = "_isolate_recompiles_id"
"""How torch 2.13 and newer keep entries apart: an argument of `torch.compile`, and what becomes of it. Older releases
count all entries of a code object together, and get a higher limit instead."""


class Region:
    """The entries that equal backends have in Dynamo's caches.

    Attributes:
        further: how many of them are there only because fuseplan made a float a constant.
    """

    def __init__(self) -> None:
        self.further = 0
        self._id: int | None = None

    def compile(self, function: Callable[..., Any], arguments: Mapping[str, Any]) -> Callable[..., Any]:
        """`torch.compile(function, **arguments)`, whose entries are those of this region.

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
            # It counts every region, in every release.
            "accumulated_recompile_limit": dynamo_config.accumulated_recompile_limit * regions + self.further,
        }


_REGIONS: WeakValueDictionary[Hashable, Region] = WeakValueDictionary()


def region_of(*key: Hashable) -> Region:
    """The region of all backends that have an equal key."""
    return _REGIONS.setdefault(key, Region())


class _Callback:
    """What Dynamo calls where no entry fits, with the limits of a region."""

    def __init__(self, callback: Callable[..., Any], limits: Callable[[], dict[str, int]]) -> None:
        self._torchdynamo_orig_backend = callback  # by which Dynamo finds the backend of an entry
        self._limits = limits

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with dynamo_config.patch(self._limits()):
            return self._torchdynamo_orig_backend(*args, **kwargs)


def _context_of(compiled: Any) -> Any:
    """The context of Dynamo's behind a compiled function, or a module; None where nothing was compiled."""
    if isinstance(compiled, torch._dynamo.OptimizedModule):
        return compiled.dynamo_ctx
    if not inspect.isfunction(compiled) or not hasattr(compiled, "get_compiler_config"):
        return None
    return inspect.getclosurevars(compiled).nonlocals.get("self")


def values_of(options: Mapping[str, object]) -> Hashable:
    """Equal for equal options; functions and other objects among them count as `identity_of` has them."""
    plain = (str, int, float, type(None))
    return frozenset(
        (name, type(value), value if isinstance(value, plain) else identity_of(value))
        for name, value in options.items()
    )


def identity_of(callback: object) -> Hashable:
    """Equal for callables that do the same to the same objects: a bound method is another object each time that it is
    named, and so is a lambda in a loop. What they are bound to counts by identity.
    """
    if isinstance(callback, types.MethodType):
        return "method", id(callback.__self__), identity_of(callback.__func__)
    if isinstance(callback, types.BuiltinMethodType):
        return "built-in", id(callback.__self__), callback.__name__
    if type(callback) is functools.partial:
        named = sorted((name, id(value)) for name, value in callback.keywords.items())
        return "partial", identity_of(callback.func), tuple(map(id, callback.args)), tuple(named)
    if isinstance(callback, types.FunctionType) and not callback.__dict__:
        bound = (*(callback.__closure__ or ()), *(callback.__defaults__ or ()))
        named = sorted((name, id(value)) for name, value in (callback.__kwdefaults__ or {}).items())
        return callback.__code__, id(callback.__globals__), tuple(map(id, bound)), tuple(named)
    return id(callback)
