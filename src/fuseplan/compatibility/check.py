"""Checks private interfaces of torch: whether they exist, and take fuseplan's arguments."""

import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fuseplan.compatibility.private import PrivateApi
from fuseplan.record.text import one_line


@dataclass(frozen=True)
class Moved:
    """A private interface that doesn't fit fuseplan any more, and why."""

    api: PrivateApi
    what: str

    def __str__(self) -> str:
        return f"{self.api.dotted} {self.what}"


def find_moved(apis: Iterable[PrivateApi]) -> tuple[Moved, ...]:
    """The interfaces that don't fit in the installed torch, in their order."""
    return tuple(Moved(each, what) for each in apis if (what := _wrong(each)) is not None)


def _wrong(api: PrivateApi) -> str | None:
    owner: Any = None
    try:
        found: Any = importlib.import_module(api.module)
        for name in api.attributes:
            owner, found = found, _member(found, name)
    except ImportError as error:
        return f"can't be imported ({one_line(error, 200)})"
    except AttributeError:
        return "is gone"
    if api.args is None:
        return None
    is_static = isinstance(inspect.getattr_static(owner, api.attributes[-1], None), staticmethod)
    return _misfit(found, api, unbound=isinstance(owner, type) and not is_static)


def _member(owner: Any, name: str) -> Any:
    """An attribute of a module, object or class. A class only annotates some attributes of its instances, and others
    exist only on an instance.

    Raises:
        AttributeError: there is none, or no instance can be made any more.
    """
    # A class itself has more attributes than its instances: `__call__`, for one.
    if not isinstance(owner, type) or any(name in vars(base) for base in owner.__mro__):
        return getattr(owner, name)
    if any(name in vars(base).get("__annotations__", {}) for base in owner.__mro__):
        return None
    make = _EXAMPLES.get(owner.__name__)
    if make is None:
        raise AttributeError(name)
    try:
        example = make(owner)
    except Exception as error:
        raise AttributeError(name) from error
    if not isinstance(example, owner):
        raise AttributeError(name)
    return getattr(example, name)


_EXAMPLES: Mapping[str, Callable[[Any], object]] = {
    "CallFunction": lambda cls: cls(len),
    "Graph": lambda cls: cls(),
    "ListOf": lambda cls: cls(importlib.import_module(cls.__module__).KeywordArg("x")),
    "OpOverload": lambda cls: torch.ops.aten.relu.default,
    "PatternMatcherPass": lambda cls: cls(),
    "_Namespace": lambda cls: cls(),
    "_TorchCompileInductorWrapper": lambda cls: cls(None, None, None),
}
"""An instance of each class with attributes that only instances have."""


def _misfit(function: Any, api: PrivateApi, *, unbound: bool) -> str | None:
    """Why fuseplan's call doesn't fit; None if it does, or if the parameters can't be inspected."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return None if callable(function) else "can't be called any more"
    given = api.args or 0
    takes_self = unbound and inspect.isfunction(function)
    try:
        signature.bind(*[None] * (given + takes_self), **dict.fromkeys(api.keywords))
    except TypeError as error:
        return f"takes other arguments ({error})"
    return None
