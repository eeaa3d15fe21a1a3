"""A fusion-pass manager for `torch.compile`."""

import importlib as _importlib
import typing as _typing

if _typing.TYPE_CHECKING:
    from fuseplan.compilation.manager import PostGradPassManager
    from fuseplan.config import CompileRange, PassConfig, Policy
    from fuseplan.errors import FuseplanError, FuseplanWarning
    from fuseplan.frontend import compile, explain, inductor_options
    from fuseplan.matching import ExternalPass
    from fuseplan.record import Report

__version__ = "0.1.0"

_HOMES = {
    "CompileRange": "config",
    "ExternalPass": "matching",
    "FuseplanError": "errors",
    "FuseplanWarning": "errors",
    "PassConfig": "config",
    "Policy": "config",
    "PostGradPassManager": "compilation.manager",
    "Report": "record",
    "compile": "frontend",
    "explain": "frontend",
    "inductor_options": "frontend",
}
"""The module of each public name. They are imported at first access, so that importing fuseplan costs nothing and the
first access reports an unsuitable torch.
"""

_ON_PRIVATE_APIS = frozenset({"compilation.manager", "frontend", "matching"})
"""Modules that can't be imported with a torch whose private interfaces have moved; `compatibility.fallback` replaces
them.
"""

__all__ = [
    "CompileRange",
    "ExternalPass",
    "FuseplanError",
    "FuseplanWarning",
    "PassConfig",
    "Policy",
    "PostGradPassManager",
    "Report",
    "compile",
    "explain",
    "inductor_options",
]


def __getattr__(name: str) -> _typing.Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fuseplan' has no attribute {name!r}")
    return getattr(_importlib.import_module(f"fuseplan.{_home(name)}"), name)


def _home(name: str) -> str:
    if _HOMES[name] in _ON_PRIVATE_APIS and _importlib.import_module("fuseplan.compatibility").incompatibility():
        return "compatibility.fallback"
    return _HOMES[name]


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
