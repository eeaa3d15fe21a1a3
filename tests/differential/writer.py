"""`Writer`: writes a program line by line. Each line is tried as it is written, on small tensors, so that the shapes,
dtypes and magnitudes of all values are known.
"""

import random
import re
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fuseplan.dialect import FP8_DTYPES
from tests.differential.program import ATTRIBUTES, Program, Spec
from tests.differential.vocabulary import COLLECTIVES, NAMES

TRIED = {"B": 3, "S": 5}
"""Sizes at which lines are tried."""
WIDTHS = (2, 8, 16, 24, 33, 48, 64)
STATIC = ((1, 1), (1, 4), (2, 3), (7, 1), (3, 5))
SEVERAL = ((3, 5), (2, 2), (6, 4), (5, 9))
"""Of which two are taken where a program runs at several sizes."""
LARGEST = 64.0
"""Values stay below, so that no line overflows float16."""


class Writer:
    """One program that is being written.

    Attributes:
        rng: whose choices follow from the seed.
        dtype: of most values.
        hidden: width of its inputs.
        leading: the letters of their other sizes.
        tensors: the values so far, by name.
        specs: what the program is given.
        lines: of its body.
        read: names that some line reads.
        kept: names that are returned in any case.
    """

    def __init__(self, seed: int, attempt: int) -> None:
        self.seed = seed
        self.rng = random.Random(f"{seed} {attempt}")
        self.dtype = self.rng.choices(("bfloat16", "float16", "float32"), (6, 2, 2))[0]
        self.hidden = self.rng.choice(WIDTHS)
        self.leading = ("B", "S") if self.rng.random() < 0.7 else ("B",)
        self.specs: list[Spec] = []
        self.lines: list[str] = []
        self.tensors: dict[str, Tensor] = {}
        self.read: set[str] = set()
        self.kept: set[str] = set()
        self._made = 0
        self._state = SimpleNamespace(**ATTRIBUTES)
        alone = dict.fromkeys(COLLECTIVES, torch.clone)
        self._namespace: dict[str, Any] = {"torch": torch, "F": F, **NAMES, **alone, "self": self._state}
        self._namespace.update({name: TRIED[name] for name in self.leading})
        self._begin()

    def _begin(self) -> None:
        self._argument("ids", self.leading, "int64", "ids")
        if self.rng.random() < 0.3:
            table = self.given((7, self.hidden), "normal", self.dtype)
            self.write(f"x = {table}[ids]")
        else:
            self._argument("x", (*self.leading, self.hidden), self.dtype, "normal")
        wide = self.rng.random() < 0.15
        self._argument("r", (*self.leading, self.hidden), "float32" if wide else self.dtype, "normal")
        self.lines.append(f"({', '.join(self.leading)},) = ids.shape")

    def _argument(self, name: str, shape: tuple[int | str, ...], dtype: str, kind: str) -> None:
        self.specs.append(Spec(name=name, shape=shape, dtype=dtype, kind=kind))
        self._namespace[name] = self.specs[-1].make(TRIED, self.seed)
        if kind != "ids":
            self.tensors[name] = self._namespace[name]

    def given(self, shape: tuple[int, ...], kind: str, dtype: str | None = None) -> str:
        """A buffer of the module, as it is written; for weights maybe one that is there already."""
        known = [spec for spec in self.specs if (spec.shape, spec.kind, spec.dtype) == (shape, "weight", dtype)]
        if kind == "weight" and known and self.rng.random() < 0.4:
            return f"self.{known[-1].name}"
        spec = Spec(
            name=f"{kind}_{len(self.specs)}", shape=shape, dtype=dtype or self.dtype, kind=kind, state=True
        )  # fmt: skip
        self.specs.append(spec)
        setattr(self._state, spec.name, spec.make({}, self.seed))
        return f"self.{spec.name}"

    def write(self, line: str) -> None:
        """Adds a line; what it assigns has to be finite.

        Raises:
            RuntimeError: torch refuses it, or a value isn't finite.
        """
        names = line.split(" = ", maxsplit=1)[0].split(", ") if re.match(r"\w+(, \w+)* = ", line) else []
        exec(line, self._namespace)
        values = {name: self._namespace[name] for name in names}
        if not all(bool(value.float().isfinite().all()) for value in values.values()):
            raise RuntimeError(f"{line} isn't finite")
        self.lines.append(line)
        self.read.update(re.findall(r"\b[a-z]\w*\b", line.split(" = ", 1)[-1]) if names else ())
        self.tensors.update(values)

    def new(self, expression: str, count: int = 1) -> list[str]:
        """Names of what an expression yields."""
        names = [f"v{self._made + index}" for index in range(count)]
        self._made += count
        self.write(f"{', '.join(names)} = {expression}")
        for name in names:
            value = self.tensors[name]
            if value.dtype not in FP8_DTYPES and float(value.abs().amax()) > LARGEST:
                self.write(f"{name} = {name} * 0.01")
        return names

    def one_of(self, forms: Sequence[tuple[str, float]], name: str) -> str:
        """A value from one of several expressions of `{}`, each of which is taken as often as its number says."""
        form = self.rng.choices([text for text, _ in forms], [often for _, often in forms])[0]
        return self.new(form.replace("{}", name))[0]

    def pick(self, accept: Callable[[Tensor], bool] = lambda value: True) -> str | None:
        """One of the values that are no fp8 and are acceptable, a late one more often than an early one."""
        found = [name for name, each in self.tensors.items() if each.dtype not in FP8_DTYPES and accept(each)]
        return found[-1 - min(int(self.rng.expovariate(0.4)), len(found) - 1)] if found else None

    def some(self) -> str:
        """Any value, mostly of the usual dtype and of several rows."""
        usual = None
        if self.rng.random() < 0.9:
            usual = self.pick(lambda value: str(value.dtype).endswith(self.dtype) and value.dim() > 1)
        name = usual or self.pick()
        assert name is not None
        return name

    def twin(self, name: str, *, any_dtype: bool = False) -> str | None:
        """A value of the same shape, maybe the same."""
        value = self.tensors[name]
        return self.pick(lambda other: other.shape == value.shape and (any_dtype or other.dtype is value.dtype))

    def width(self, name: str) -> int:
        return self.tensors[name].shape[-1]

    def dtype_of(self, name: str) -> str:
        return str(self.tensors[name].dtype).removeprefix("torch.")

    def rows(self, name: str) -> str | None:
        """The leading sizes of a value for any sizes, as they are written; None where they aren't known."""
        known = {tuple(TRIED[size] for size in self.leading): ", ".join(self.leading), (15,): "B * S", (5, 3): "S, B"}
        return known.get(tuple(self.tensors[name].shape[:-1]))

    def linear(self, name: str, width: int) -> str:
        matrix = self.given((width, self.width(name)), "matrix", self.dtype_of(name))
        return self.new(f"F.linear({name}, {matrix})")[0]

    def finish(self) -> Program:
        """The program. Some of what nobody reads is returned, and the rest is dead."""
        names = list(self.tensors)
        ends = [name for name in names if name not in self.read]
        chosen = [name for name in ends if name in self.kept or self.rng.random() < 0.8] or names[-1:]
        chosen += sorted(self.kept & set(names) - set(chosen))
        chosen += self.rng.sample(names, min(self.rng.choice((0, 0, 1, 2)), len(names)))
        chosen += ["B"] if self.rng.random() < 0.05 else []
        self.rng.shuffle(chosen)
        marked = self.rng.choices(("static", "dynamic", "unbacked"), (5, 4, 1))[0]
        # Dynamo resumes after a break with sizes that it guards in vain.
        marked = "static" if any("graph_break" in line for line in self.lines) else marked
        runs = [self.rng.choice(STATIC)] if marked == "static" else self.rng.sample(SEVERAL, 2)
        if marked == "unbacked":
            runs = [(batch, runs[0][1]) for batch, _ in runs]
        return Program(
            seed=self.seed, specs=tuple(self.specs), lines=tuple(self.lines), results=tuple(chosen),
            sizes=tuple({"B": batch, "S": length} for batch, length in runs), marked=marked,
        )  # fmt: skip
