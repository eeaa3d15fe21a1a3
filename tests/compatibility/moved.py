"""A torch of which one thing is gone, or takes other arguments, while torch itself goes on as it is."""

import importlib
import sys
from types import ModuleType
from typing import Any

import pytest

from fuseplan.compatibility import PrivateApi


class Altered(ModuleType):
    """A module, or another object, some of whose attributes are others; None: they are gone."""

    def __init__(self, original: Any, attributes: dict[str, Any]) -> None:
        super().__init__(getattr(original, "__name__", "altered"))
        self.__dict__["original"] = original
        self.__dict__["attributes"] = attributes

    def __getattr__(self, name: str) -> Any:
        if self.__dict__["attributes"].get(name, self) is None:
            raise AttributeError(f"there is no {name} any more")
        return self.__dict__["attributes"].get(name) or getattr(self.__dict__["original"], name)


def hide(monkeypatch: pytest.MonkeyPatch, api: PrivateApi) -> None:
    """Takes it away. What stands below a class goes with all that stands there."""
    first, *further = api.attributes
    put(monkeypatch, api.module, first, type(first, (), {}) if further else None)


def change(monkeypatch: pytest.MonkeyPatch, api: PrivateApi) -> None:
    """Lets it take other arguments than fuseplan passes."""

    def changed(*, renamed: Any) -> None: ...

    first, *further = api.attributes
    if not further:
        put(monkeypatch, api.module, first, changed)
        return
    owner = getattr(importlib.import_module(api.module), first)
    given = {further[0]: changed}
    altered = type(first, (owner,), given) if isinstance(owner, type) else Altered(owner, given)
    put(monkeypatch, api.module, first, altered)


def put(monkeypatch: pytest.MonkeyPatch, module: str, name: str, value: Any) -> None:
    """Puts a value, or nothing for None, in the place of what a module has."""
    original = importlib.import_module(module)
    getattr(original, name)
    monkeypatch.setitem(sys.modules, module, Altered(original, {name: value}))


AGAIN = {"", "compatibility", "compilation", "explanation", "frontend", "matching"}
"""What looks at torch when it is imported, and "", the package. Ops can't be registered again: the dialect stays."""


def import_anew(monkeypatch: pytest.MonkeyPatch) -> Any:
    """fuseplan as a new process would import it."""
    # So that what is imported in its place goes away afterwards.
    importlib.import_module("fuseplan.compatibility.fallback")
    for name in list(sys.modules):
        root, _, rest = name.partition(".")
        if root == "fuseplan" and rest.partition(".")[0] in AGAIN:
            monkeypatch.delitem(sys.modules, name)
    return importlib.import_module("fuseplan")
