"""`Program`: a model as text, with the tensors it needs. All of it follows from a seed."""

import linecache
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.differential.vocabulary import COLLECTIVES, NAMES

Sizes = Mapping[str, int]
ATTRIBUTES = {"epsilon": 1e-5, "scale": 0.5}
"""Plain numbers that a module keeps."""


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A tensor that a program is given.

    Attributes:
        name: in the program's text.
        shape: numbers, and letters for sizes that differ from run to run.
        dtype: `bfloat16`.
        kind: `normal`: standard normal values, `weight`: values about 1, `matrix`: normal, divided by the root of the
            last but one size, `scale`: positive and small, `ids`: whole numbers below 7, `zeros`.
        state: whether it is a buffer of the module and no argument.
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: str
    kind: str
    state: bool = False

    def make(self, sizes: Sizes, seed: int) -> Tensor:
        """Its values, which follow from the seed and its name."""
        shape = [sizes[size] if isinstance(size, str) else size for size in self.shape]
        generator = torch.Generator().manual_seed(seed * 1009 + sum(map(ord, self.name)) * 31 + len(self.name))
        dtype: torch.dtype = getattr(torch, self.dtype)
        if self.kind == "ids":
            return torch.randint(7, shape, generator=generator)
        if self.kind == "zeros":
            return torch.zeros(shape, dtype=dtype)
        values = torch.randn(shape, generator=generator)
        if self.kind == "weight":
            values = 1 + 0.2 * values
        elif self.kind == "matrix":
            values = values / shape[-1] ** 0.5
        elif self.kind == "scale":
            values = 0.02 + 0.01 * values.abs()
        return values.to(dtype)

    def __str__(self) -> str:
        return f"{self.name}: {self.kind}[{', '.join(map(str, self.shape))}] {self.dtype}"


@dataclass(frozen=True, kw_only=True, eq=False)
class Program:
    """A model.

    Attributes:
        seed: that it, and the values of its tensors, follow from.
        specs: what it is given: its arguments in their order, and its buffers.
        lines: the body of its `forward`, up to the return.
        results: what it returns.
        sizes: of each run, in their order; the model is traced at the first.
        marked: how the sizes of its arguments are marked, `static`, `dynamic` or `unbacked`: the first of them so.
    """

    seed: int
    specs: tuple[Spec, ...]
    lines: tuple[str, ...]
    results: tuple[str, ...]
    sizes: tuple[Sizes, ...] = field(default=({"B": 3, "S": 5},))
    marked: str = "static"

    @property
    def arguments(self) -> tuple[Spec, ...]:
        """What `forward` takes."""
        return tuple(spec for spec in self.specs if not spec.state)

    @property
    def leading(self) -> tuple[int | str, ...]:
        """The sizes of its first argument, the ids."""
        return self.specs[0].shape

    @property
    def source(self) -> str:
        """`forward` as Python."""
        names = ", ".join(("self", *(spec.name for spec in self.arguments)))
        lines = (*self.lines, f"return {', '.join(self.results)},")
        return "\n    ".join((f"def forward({names}):", *lines)) + "\n"

    def __str__(self) -> str:
        state = [f"# self.{spec}" for spec in self.specs if spec.state]
        state += [f"# self.{name} = {value}" for name, value in ATTRIBUTES.items() if f"self.{name}" in self.source]
        runs = ", ".join(" ".join(f"{name}={size}" for name, size in sizes.items()) for sizes in self.sizes)
        head = f"# seed {self.seed}, {self.marked} sizes: {runs}"
        return "\n".join((head, *(f"# {spec}" for spec in self.arguments), *state, self.source))

    def module(self, group: str | None) -> nn.Module:
        """A fresh module: its buffers have the values that they start with.

        Args:
            group: the name of a process group of one rank; None: collectives do nothing.
        """
        module = self._kind(group)()
        vars(module).update(ATTRIBUTES)
        for spec in self.specs:
            if spec.state:
                module.register_buffer(spec.name, spec.make({}, self.seed))
        return module

    def _kind(self, group: str | None) -> type[nn.Module]:
        """The class of its modules, which is one and the same however many are made: Dynamo remembers by code."""
        kinds = _KINDS.setdefault(self, {})
        if group not in kinds:
            kinds[group] = type("Model", (nn.Module,), {"forward": self._forward(group)})
        return kinds[group]

    def _forward(self, group: str | None) -> FunctionType:
        filename = f"program_{self.seed}.py"
        # Stack traces, and with them places in reports, are read from there.
        linecache.cache[filename] = (len(self.source), None, self.source.splitlines(keepends=True), filename)
        reductions: dict[str, Any] = dict.fromkeys(COLLECTIVES, torch.clone)
        if group is not None:
            reductions = {name: partial(function, group=group) for name, function in COLLECTIVES.items()}
        namespace: dict[str, Any] = {"torch": torch, "F": F, **NAMES, **reductions}
        exec(compile(self.source, filename, "exec"), namespace)
        forward: FunctionType = namespace["forward"]
        return forward

    def runs(self, sizes: Sizes) -> bool:
        """Whether it runs at these sizes: its lines were tried at others."""
        try:
            self.module(None)(*(spec.make(sizes, self.seed) for spec in self.arguments))
        except (RuntimeError, IndexError):
            return False
        return True

    def inputs(self, run: int) -> list[Tensor]:
        """Fresh arguments of a run, marked as dynamic where they are."""
        values = [spec.make(self.sizes[run], self.seed + run) for spec in self.arguments]
        for value in values:
            if self.marked == "unbacked":
                torch._dynamo.decorators.mark_unbacked(value, 0)
            elif self.marked == "dynamic":
                for dim in range(len(self.leading)):
                    torch._dynamo.maybe_mark_dynamic(value, dim)
        return values


_KINDS: weakref.WeakKeyDictionary["Program", dict[str | None, type[nn.Module]]] = weakref.WeakKeyDictionary()
