"""Modules that stand in for libraries that aren't installed: the signatures of the real ones, read from their source,
and in each function what the real kernel computes, with its rounding points.
"""

import ast
import importlib.metadata
import inspect
import json
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

DATA = Path(__file__).parent / "data"


def snapshot(name: str) -> dict[str, Any]:
    """A file of tests/providers/data."""
    read: dict[str, Any] = json.loads((DATA / f"{name}.json").read_text())
    return read


def signature(text: str) -> inspect.Signature:
    """Of the text of a parameter list."""
    arguments = ast.parse(f"lambda {text.removeprefix('(').removesuffix(')')}: None", mode="eval").body
    assert isinstance(arguments, ast.Lambda)
    return inspect.signature(eval(compile(ast.Expression(arguments), "signature", "eval")))


def bound(text: str, behave: Callable[..., Any]) -> Callable[..., Any]:
    """A function of that signature: its arguments are bound by it and handed on by name with all defaults, the instance
    of a method as `own`.
    """
    expected = signature(text)

    def call(*args: Any, **kwargs: Any) -> Any:
        arguments = expected.bind(*args, **kwargs)
        arguments.apply_defaults()
        return behave(**{"own" if name == "self" else name: value for name, value in arguments.arguments.items()})

    return call


class Library:
    """The modules of a library, built from a snapshot.

    Args:
        name: of the snapshot.
        behaviours: what each function does, by its dotted name.
    """

    def __init__(self, name: str, behaviours: dict[str, Callable[..., Any]]) -> None:
        self.snapshot = snapshot(name)
        self.modules: dict[str, types.ModuleType] = {}
        functions = self.snapshot["functions"]
        assert behaviours.keys() == functions.keys(), "a function of the snapshot that nobody stands in for"
        for dotted, text in functions.items():
            self._place(dotted, bound(text, behaviours[dotted]))
        for dotted, values in self.snapshot["constants"].items():
            self._place(dotted, type(dotted.rpartition(".")[2], (), dict(values)))

    def _place(self, dotted: str, value: Any) -> None:
        owner, _, name = dotted.rpartition(".")
        holder, _, kind = owner.rpartition(".")
        if kind[:1].isupper():  # a method
            module = self.module(holder)
            if not hasattr(module, kind):
                setattr(module, kind, type(kind, (), {}))
            setattr(getattr(module, kind), name, _method(value))
        else:
            setattr(self.module(owner), name, value)

    def module(self, dotted: str) -> types.ModuleType:
        """The module of that name, and those above it."""
        parts = dotted.split(".")
        for count in range(1, len(parts) + 1):
            self.modules.setdefault(".".join(parts[:count]), types.ModuleType(".".join(parts[:count])))
        return self.modules[dotted]

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Makes the modules importable for a test."""
        self.module(self.snapshot["library"]).__dict__["__version__"] = self.snapshot["version"]
        for name, module in self.modules.items():
            monkeypatch.setitem(sys.modules, name, module)


def _method(function: Callable[..., Any]) -> Callable[..., Any]:
    """What Python binds to an instance."""

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return function(self, *args, **kwargs)

    return method


def installed(
    monkeypatch: pytest.MonkeyPatch, package: str, version: str | None, distribution: str | None = None
) -> None:
    """A package is there on NVIDIA's GPUs, of this version of its distribution; None: it is another distribution's."""

    def version_of(name: str) -> str:
        assert distribution in (None, name)
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr("fuseplan.providers.provider.local_vendor", lambda: "nvidia")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == package)
    monkeypatch.setattr("importlib.metadata.version", version_of)


@contextmanager
def ranks(count: int) -> Iterator[str]:
    """The name of a process group of so many ranks, of which this is the first and the others don't exist."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    assert dist.group.WORLD is not None
    try:
        yield dist.group.WORLD.group_name
    finally:
        dist.destroy_process_group()


def is_aligned(*tensors: Tensor | None) -> bool:
    """Whether loads of 16 bytes may start at each."""
    return all(each is None or each.data_ptr() % 16 == 0 for each in tensors)


def normed(total: Tensor, weight: Tensor, eps: float, bias: float = 0.0) -> Tensor:
    """The norm of a float32 sum, not rounded."""
    return total * torch.rsqrt(total.square().mean(-1, keepdim=True) + eps) * (bias + weight.float())
