"""Checks of arguments to the entry points: one of another type is refused in one line."""

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from fuseplan.errors import ConfigError

T = TypeVar("T")


def called(name: str, given: T, *, optional: bool = False) -> T:
    """Checks a model or callback.

    Args:
        name: of the argument.
        given: its value.
        optional: whether it may be None.

    Raises:
        ConfigError: it can't be called.
    """
    if not callable(given) and not (optional and given is None):
        raise ConfigError(f"{name}={given!r}: allowed are {'None' if optional else 'modules'} and functions")
    return given


def instance(name: str, given: T) -> T:
    """Checks a model that is explained: `torch.compile` would wrap what a class calls, for the rest of the process.

    Args:
        name: of the argument.
        given: its value.

    Raises:
        ConfigError: it can't be called, or is a class.
    """
    if isinstance(given, type):
        raise ConfigError(f"{name} is the class {given.__name__}: explain an instance of it, {given.__name__}(...)")
    return called(name, given)


def mapping(name: str, given: Any) -> dict[str, Any]:
    """Checks a dictionary; empty where it is None.

    Args:
        name: of the argument.
        given: its value.

    Raises:
        ConfigError: it is no dictionary.
    """
    if not isinstance(given, Mapping | None):
        raise ConfigError(f"{name}={given!r}: allowed are None and dictionaries")
    return dict(given or {})


def instances(name: str, given: Any, kind: type[T]) -> tuple[T, ...]:
    """Checks additions to the built-in objects.

    Args:
        name: of the argument.
        given: its value; a single instance needs no sequence.
        kind: of each.

    Raises:
        ConfigError: something else than a sequence of these.
    """
    found = tuple(given) if isinstance(given, Iterable) else (given,)
    if not all(isinstance(each, kind) for each in found):
        raise ConfigError(f"{name}={given!r}: allowed are sequences of instances of {kind.__name__}")
    return found
