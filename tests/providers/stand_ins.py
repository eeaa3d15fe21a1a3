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

from fuseplan.dialect import ops
from fuseplan.rules import Bindings
from fuseplan.verification.memory import Loopback, Poisoned
from tests.forks import Forks, Request
from tests.helpers import randn

DATA = Path(__file__).parent / "data"
FN = torch.float8_e4m3fn
MIN_SCALE = 1 / (448 * 512)
"""The least scale that FlashInfer and vLLM have for a row."""


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
def ranks(count: int, rank: int = 0) -> Iterator[str]:
    """The name of a process group of so many ranks, of which this is one and the others don't exist."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=count)
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


def fp8(y: Tensor, reciprocal: Tensor | float) -> Tensor:
    """Codes of rows, which are multiplied by the reciprocal of their scale."""
    return (y.float() * reciprocal).clamp(-448, 448).to(FN)


def arguments_of(name: str, dtype: torch.dtype, shape: tuple[int, ...], **more: Any) -> dict[str, Any]:
    """Of a fused op, by name; `rounding`, `group_name` and `right` have to be among `more` where it has them."""
    halves = randn(*shape[:-1], 2 * shape[-1], seed=3).to(dtype)
    values: dict[str, Any] = {
        "x": randn(*shape, seed=1).to(dtype),
        "residual": randn(*shape, seed=2).to(dtype) * 3,
        "weight": torch.linspace(0.5, 1.5, shape[-1]).to(dtype),
        "eps": 1e-5,
        "gate": halves[..., : shape[-1]],
        "up": halves[..., shape[-1] :],
        "scale": torch.tensor([0.02]),
        "dtype": FN,
        "min_scale": MIN_SCALE,
        **dict.fromkeys(("max_scale", "zero_scale", "min_power"), 0.0),
        "scale_ub": None,
        "ue8m0": False,
        "group_size": 64,
        "layout": "rows",
        "quant_rounding": "multiply" if "static" in name else "divide",
        **more,
    }
    return {argument: values[argument] for argument in ops[name].arguments}


def as_tuple(results: Any) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


def bits(value: Tensor) -> Tensor:
    return value.contiguous().view(torch.uint8)


def check_bits(provider: str, name: str, given: dict[str, Any]) -> None:
    """The kernel gives the reference's bits, in memory that was poisoned, and leaves its arguments as they are."""
    before = {key: value.clone() for key, value in given.items() if isinstance(value, Tensor)}
    with Loopback():
        expected = ops[name].reference(*given.values())
        with Poisoned():
            actual = ops[name].kernel(provider)(*given.values())
    for got, wanted in zip(*map(as_tuple, (actual, expected)), strict=True):
        assert (got.dtype, got.shape, got.stride()) == (wanted.dtype, wanted.shape, wanted.stride())
        assert torch.equal(bits(got), bits(wanted))
    assert all(torch.equal(bits(given[key]), bits(value)) for key, value in before.items())


def check_declined(gate: Any, detail: str | None, count: int = 2, /, **values: Any) -> None:
    """A gate declines arguments in a group of so many ranks, and says so; None: it takes them."""
    with ranks(count) as group:
        refusal = gate(Bindings("r", {"group_name": group, **values}))
    assert (refusal is None) if detail is None else detail in refusal.detail


def printed_by(forks: Forks, script: str, *arguments: str) -> Any:
    """The JSON that a script of this folder prints in its last line."""
    request = Request(module=f"tests.providers.{script}", processes=((arguments, {}),))
    (outcome,) = forks.outcomes(forks.start(request))
    assert outcome.status == 0, outcome.output
    return json.loads(outcome.output.splitlines()[-1])
