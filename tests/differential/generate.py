"""Random programs. Lines are tried as they are written, on small tensors, so that shapes and dtypes are known."""

import random
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fuseplan.dialect import FP8_DTYPES
from tests.differential.norms import NORMS
from tests.differential.program import Program, Spec
from tests.differential.vocabulary import COLLECTIVES, GATED, NAMES, QUANTS, ROW_QUANTS
from tests.helpers import SPELLINGS

TRIED = {"B": 3, "S": 5}
"""Sizes at which lines are tried."""
WIDTHS = (8, 16, 24, 33, 48, 64)
STATIC = ((1, 1), (1, 4), (2, 3), (7, 1), (3, 5))
DYNAMIC = ((3, 5), (2, 2), (6, 4), (5, 9))
LARGEST = 64.0
"""Values stay below, so that no line overflows float16."""


def generate(seed: int, *, most: int = 9) -> Program:
    """The program of a seed.

    Args:
        seed: any.
        most: statements; each writes a few lines.
    """
    writer = Writer(seed)
    rng = writer.rng
    count = rng.randint(2, most)
    statements = [writer.layer, *rng.choices(list(writer.statements), list(writer.statements.values()), k=count - 1)]
    rng.shuffle(statements)
    for statement in statements:
        statement()
    return writer.finish()


class Writer:
    """Writes one program.

    Attributes:
        rng: whose choices follow from the seed.
        tensors: the values so far, by name.
        specs: what the program is given.
        lines: of its body.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.dtype = self.rng.choices(("bfloat16", "float16", "float32"), (6, 2, 2))[0]
        self.hidden = self.rng.choice(WIDTHS)
        self.specs: list[Spec] = []
        self.lines: list[str] = []
        self.tensors: dict[str, Tensor] = {}
        self.read: set[str] = set()
        self.made = 0
        self.state = SimpleNamespace()
        alone = dict.fromkeys(COLLECTIVES, torch.clone)
        self.namespace: dict[str, Any] = {"torch": torch, "F": F, **NAMES, **alone, "self": self.state}
        self.statements: dict[Callable[[], None], float] = {
            self.layer: 8, self.mlp: 2, self.quantisation: 2, self.pads_and_slices: 2, self.cast: 1, self.pointwise: 2,
            self.combination: 2, self.in_place: 2, self.rearrangement: 2, self.buffer: 1, self.mixture: 1,
            self.attention: 0.5,
        }  # fmt: skip
        self._begin()

    def _begin(self) -> None:
        leading = ("B", "S") if self.rng.random() < 0.7 else ("B",)
        self.argument("ids", leading, "int64", "ids")
        if self.rng.random() < 0.3:
            table = self.given((7, self.hidden), "normal", self.dtype)
            self.write(f"x = {table}[ids]")
        else:
            self.argument("x", (*leading, self.hidden), self.dtype, "normal")
        wide = self.rng.random() < 0.15
        self.argument("r", (*leading, self.hidden), "float32" if wide else self.dtype, "normal")
        self.lines.append(f"({', '.join(leading)},) = ids.shape")
        self.namespace.update({name: TRIED[name] for name in leading})
        self.leading = leading

    # What statements are made of.

    def argument(self, name: str, shape: tuple[int | str, ...], dtype: str, kind: str) -> None:
        self.specs.append(Spec(name=name, shape=shape, dtype=dtype, kind=kind))
        value = self.specs[-1].make(TRIED, self.seed)
        self.namespace[name] = value
        if kind != "ids":
            self.tensors[name] = value

    def given(self, shape: tuple[int, ...], kind: str, dtype: str | None = None) -> str:
        """A new buffer of the module, as it is written."""
        name = f"{kind}_{len(self.specs)}"
        spec = Spec(name=name, shape=shape, dtype=dtype or self.dtype, kind=kind, state=True)
        self.specs.append(spec)
        setattr(self.state, name, spec.make({}, self.seed))
        return f"self.{name}"

    def write(self, line: str) -> None:
        """Adds a line, if what it assigns is finite and of the usual size."""
        names = line.split(" = ", maxsplit=1)[0].split(", ") if re.match(r"\w+(, \w+)* = ", line) else []
        exec(line, self.namespace)
        values = {name: self.namespace[name] for name in names}
        touched = [value for value in (*values.values(), *self.tensors.values()) if value.dtype.is_floating_point]
        assert all(bool(value.float().isfinite().all()) for value in touched), line
        self.lines.append(line)
        self.read.update(re.findall(r"\b[a-z]\w*\b", line.split(" = ", 1)[-1]) if names else ())
        self.tensors.update(values)

    def new(self, expression: str, count: int = 1) -> list[str]:
        """Names of what an expression yields."""
        names = [f"v{self.made + index}" for index in range(count)]
        self.made += count
        self.write(f"{', '.join(names)} = {expression}")
        for name in names:
            value = self.tensors[name]
            if value.dtype not in FP8_DTYPES and float(value.abs().amax()) > LARGEST:
                self.write(f"{name} = {name} * 0.01")
        return names

    def pick(self, accept: Callable[[Tensor], bool] = lambda value: True) -> str | None:
        """One of the values that are no fp8 and are acceptable, a late one more often than an early one."""
        found = [
            name for name, value in self.tensors.items()
            if value.dtype not in FP8_DTYPES and value.dim() > 1 and accept(value)
        ]  # fmt: skip
        return found[-1 - min(int(self.rng.expovariate(0.4)), len(found) - 1)] if found else None

    def some(self) -> str:
        """Any value, mostly of the usual dtype."""
        usual = None if self.rng.random() < 0.1 else self.pick(lambda v: str(v.dtype).endswith(self.dtype))
        name = usual or self.pick()
        assert name is not None
        return name

    def width(self, name: str) -> int:
        return self.tensors[name].shape[-1]

    def dtype_of(self, name: str) -> str:
        return str(self.tensors[name].dtype).removeprefix("torch.")

    def twin(self, name: str, *, any_dtype: bool = False) -> str | None:
        """A value of the same shape, maybe the same."""
        value = self.tensors[name]
        return self.pick(lambda v: v.shape == value.shape and (any_dtype or v.dtype is value.dtype))

    def shape_text(self, name: str) -> str | None:
        """The shape of a value for any sizes, None where it isn't known."""
        leading = self.tensors[name].shape[:-1]
        known = {tuple(TRIED[size] for size in self.leading): ", ".join(self.leading), (15,): "B * S", (5, 3): "S, B"}
        return f"{known[leading]}, {self.width(name)}" if leading in known else None

    def linear(self, name: str, width: int) -> str:
        matrix = self.given((width, self.width(name)), "matrix", self.dtype_of(name))
        return self.new(f"F.linear({name}, {matrix})")[0]

    # Statements.

    def layer(self) -> None:
        """(A block, an all-reduce,) a norm, and what reads it."""
        name = self.some()
        if self.rng.random() < 0.6:
            name = self.linear(name, self.rng.choice((self.hidden, self.width(name))))
        else:
            name = self.new(f"torch.{self.rng.choice(('sin', 'sigmoid', 'tanh'))}({name})")[0]
        if self.rng.random() < 0.7:
            name = self.all_reduce(name)
        y, total = self.norm(name)
        for _ in range(self.rng.choice((0, 1, 1, 1, 2, 3))):
            self.reader(y)
        if self.rng.random() < 0.5:
            self.new(f"{total} * 0.5")

    def all_reduce(self, name: str) -> str:
        """An all-reduce and what may stand around it."""
        width, shape = self.width(name), self.shape_text(name)
        forms = [
            ("all_reduce({})", 8),
            (f"all_reduce(F.pad({{}}, (0, 8)))[..., :{width}]", 2), ("all_reduce(turned({}))", 0.7),
            ("turned(all_reduce({}))", 0.7), ("all_reduce({}.unsqueeze(0)).squeeze(0)", 1),
            ("all_reduce({}.float()).to({}.dtype)", 0.7), ("largest({})", 0.5), ("scattered({})", 0.5),
            ("all_reduce(all_reduce({}))", 0.5), ("all_reduce({}.transpose(0, 1)).transpose(0, 1)", 0.7),
            ("all_reduce({})[:, -1:]", 0.4), ("all_reduce({}).clone().mul_(0.5)", 0.5),
        ]  # fmt: skip
        if shape is not None:
            forms.append((f"all_reduce({{}}.reshape(-1, {width})).reshape({shape})", 2))
            forms.append((f"all_reduce({{}}).reshape(-1, {width})", 1))
        if width > 4:
            forms += [("all_reduce({}[..., :-4])", 1), ("all_reduce({})[..., :-4]", 1)]
        if width % 2 == 0:
            forms.append((f"all_reduce({{}}).chunk(2, -1)[{self.rng.randrange(2)}]", 0.5))
        form = self.rng.choices([text for text, _ in forms], [often for _, often in forms])[0]
        if "[:, -1:]" in form and self.tensors[name].dim() < 3:
            form = "all_reduce({})"
        return self.new(form.replace("{}", name))[0]

    def norm(self, name: str) -> tuple[str, str]:
        spelling = self.rng.choice(list(SPELLINGS if self.rng.random() < 0.65 else NORMS))
        dtype = "float32" if self.rng.random() < 0.1 else self.dtype_of(name)
        weight = self.given((self.width(name),), "weight", dtype)
        residual = self.twin(name, any_dtype=self.rng.random() < 0.2) if self.rng.random() < 0.75 else None
        y, total = self.new(f"{spelling}({name}, {residual}, {weight})", 2)
        return y, total

    def reader(self, y: str) -> None:
        """One more reader of a norm."""
        width, shape = self.width(y), self.shape_text(y)
        right = self.rng.choice((1, 8, 16))
        forms = [f"F.pad({y}, (0, {right}))"] * 4 + [f"F.pad({y}.reshape(-1, {width}), (0, {right}))"]
        forms += [f"padded_by_cat({y}, {right})", f"F.pad({y}, ({right}, 0))", f"{y}.relu()", f"{y} * 2"]
        forms += [f"F.pad({y}, (0, {right}), value=1.0)", f"F.pad({y}[..., :-1], (0, {right}))"]
        if shape is not None:
            forms.append(f"F.pad({y}.reshape(-1, {width}), (0, {right})).reshape({shape[: shape.rindex(',')]}, -1)")
        choice = self.rng.random()
        if choice < 0.35:
            self.quantised(y)
        elif choice < 0.85:
            self.new(self.rng.choice(forms))
        else:
            self.linear(y, self.rng.choice(WIDTHS))

    def quantised(self, y: str) -> None:
        if self.rng.random() < 0.5:
            function = self.rng.choice(("quantize", "quantize", "quantize", *QUANTS))
            scale = self.given(self.rng.choice(((1,), (1,), (), (1, 1))), "scale", "float32")
            reciprocal = ", reciprocal=True" if function == "quantize" and self.rng.random() < 0.5 else ""
            (q,) = self.new(f"{function}({y}, {scale}{reciprocal})")
        else:
            source = f"{y}.reshape(-1, {self.width(y)})" if self.rng.random() < 0.2 else y
            function = self.rng.choice(("quantize_rows", "quantize_rows", *ROW_QUANTS))
            q, scale = self.new(f"{function}({source})", 2)
        if self.rng.random() < 0.7:
            self.new(f"dequantize({q}, {scale}, torch.{self.dtype})")

    def quantisation(self) -> None:
        self.quantised(self.some())

    def mlp(self) -> None:
        name = self.some()
        inner = self.rng.choice((8, 24, 32))
        matrix = self.given((2 * inner, self.width(name)), "matrix", self.dtype_of(name))
        gate, up = self.new(f"F.linear({name}, {matrix}).chunk(2, -1)", 2)
        (y,) = self.new(f"{self.rng.choice(('silu_llama', 'silu_llama', *GATED))}({gate}, {up})")
        if self.rng.random() < 0.6:
            self.quantised(y)
        if self.rng.random() < 0.6:
            self.linear(y, self.width(name))

    def mixture(self) -> None:
        name = self.some()
        width, inner, kinds = self.width(name), 8, 3
        router, first, second = (
            self.given(shape, "matrix", self.dtype_of(name))
            for shape in ((kinds, width), (kinds, width, 2 * inner), (kinds, inner, width))
        )
        flat = f"{name}.reshape(-1, {width})"
        if self.rng.random() < 0.3:
            self.new(f"{name} * best_shares({name}, {router})")
        elif self.rng.random() < 0.5 or self.tensors[name].numel() // width != self.namespace["ids"].numel():
            self.new(f"experts({flat}, {router}, {first}, {second})")
        else:
            self.new(f"routed_experts({flat}, ids, {router}, {first}, {second})")

    def attention(self) -> None:
        if (name := self.pick(lambda v: v.dim() == 3)) is not None:
            self.new(f"attend({name})")

    def pads_and_slices(self) -> None:
        name = self.some()
        width = self.width(name)
        forms = ["F.pad({}, (0, 8))", "padded_by_cat({}, 4)", "padded_by_copy({}, 4)", "{}[..., ::2]", "{}[..., 3:]"]
        forms += [f"{{}}[..., :{max(1, width - 8)}]", f"{{}}[..., :{width}]", "F.pad({}, (0, 0, 0, 1))[..., :-1, :]"]
        if width > 3:
            self.new(self.rng.choice(forms).replace("{}", name))

    def cast(self) -> None:
        self.new(f"{self.some()}.to(torch.{self.rng.choice(('bfloat16', 'float16', 'float32'))})")

    def pointwise(self) -> None:
        forms = ("{}.relu()", "-{}", "{} * 0.5", "{} + 1", "{}.clone()", "{} * 1", "torch.cos({})", "{} / 3", "{} - {}")
        self.new(self.rng.choice(forms).replace("{}", self.some()))

    def combination(self) -> None:
        name = self.some()
        other = self.twin(name, any_dtype=self.rng.random() < 0.3)
        self.new(self.rng.choice((f"{name} + {other}", f"{name} * torch.sigmoid({other})", f"{name} - {other}")))

    def rearrangement(self) -> None:
        name = self.some()
        width, shape, dims = self.width(name), self.shape_text(name), self.tensors[name].dim()
        forms = [f"{name}.reshape(-1, {width})", f"turned({name})", f"{name}.unsqueeze(0)[0]", f"{name}.contiguous()"]
        forms += [f"{name}.transpose(0, 1)", f"{name}[:, -1]", f"{name}[:, :1]"] if dims == 3 else []
        if self.leading == ("B", "S") and dims == 2 and shape == f"B * S, {width}":
            forms += [f"{name}.reshape(B, S, {width})"] * 3
        self.new(self.rng.choice(forms))

    def in_place(self) -> None:
        name = self.some()
        other = self.twin(name)
        forms = [f"{name}.add_({other})", f"{name}.mul_(0.5)", f"{name} += {other}", f"{name}[..., :1] = 0.5"]
        forms += [f"{name}.transpose(0, 1).mul_(0.5)", f"{name}.copy_({other}.sin())"]
        if name not in ("x", "r"):
            forms.append(f"{name}.relu_()")
        line = self.rng.choice(forms)
        if self.tensors[name].dim() > 1 and 0 not in self.tensors[name].stride():
            self.write(line)

    def buffer(self) -> None:
        """A cache that the model writes to, and may read."""
        name = self.some()
        width = self.width(name)
        cache = self.given((6, width), "zeros", self.dtype_of(name))
        row = f"{name}.reshape(-1, {width})[:1]"
        self.write(f"{cache}.index_copy_(0, ids.reshape(-1)[:1] % 6, {row})")
        if self.rng.random() < 0.5:
            self.new(f"{name} + {cache}[2]")
        if self.rng.random() < 0.3:
            self.write(f"{cache}[1].add_({row}[0])")

    def finish(self) -> Program:
        """The program. Some of what nobody reads is returned, and the rest is dead."""
        names = list(self.tensors)
        ends = [name for name in names if name not in self.read]
        chosen = [name for name in ends if self.rng.random() < 0.8] or names[-1:]
        chosen += self.rng.sample(names, min(self.rng.choice((0, 0, 1, 2)), len(names)))
        self.rng.shuffle(chosen)
        marked = self.rng.choices(("static", "dynamic", "unbacked"), (5, 4, 1))[0]
        runs = [self.rng.choice(STATIC)] if marked == "static" else self.rng.sample(DYNAMIC, 2)
        if marked == "unbacked":
            runs = [(b, runs[0][1]) for b, _ in runs]
        return Program(
            seed=self.seed,
            specs=tuple(self.specs),
            lines=tuple(self.lines),
            results=tuple(chosen),
            sizes=tuple({"B": b, "S": s} for b, s in runs),
            marked=marked,
        )
