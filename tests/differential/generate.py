"""Random programs: what models do, one statement after the other, with what may stand in a fusion's way."""

import contextlib
import itertools
from collections.abc import Callable

from tests.differential.norms import NORMS
from tests.differential.program import Program
from tests.differential.vocabulary import GATED, QUANTS, ROW_QUANTS
from tests.differential.writer import WIDTHS, Writer
from tests.helpers import SPELLINGS

THEMES = ("written", "returned", "interrupted", "viewed", "nested", "coupled")
"""What models do to a norm that may be fused: see the methods of `Model`."""


def generate(seed: int, *, most: int = 9, theme: str | None = None) -> Program:
    """The program of a seed.

    Args:
        seed: any.
        most: statements; each writes a few lines.
        theme: what it does at its end, one of `THEMES`; None: mostly nothing.
    """
    attempts = (_attempt(seed, attempt, most, theme) for attempt in itertools.count())
    return next(program for program in attempts if all(map(program.runs, program.sizes)))


def _attempt(seed: int, attempt: int, most: int, theme: str | None) -> Program:
    model = Model(seed, attempt)
    rng = model.rng
    if theme is None and rng.random() < 0.4:
        theme = rng.choice(THEMES)
    others = rng.choices(list(model.statements), list(model.statements.values()), k=rng.randint(1, most - 1))
    statements = [model.layer, *others]
    rng.shuffle(statements)
    for statement in statements:
        # Not every form suits every value: a statement ends where torch refuses its line.
        with contextlib.suppress(RuntimeError, IndexError, TypeError):
            statement()
    if theme is not None:
        with contextlib.suppress(RuntimeError, IndexError, TypeError):
            model.end(theme)
    return model.finish()


class Model(Writer):
    """The statements that a program may have."""

    @property
    def statements(self) -> dict[Callable[[], None], float]:
        """All of them, and how often each is written."""
        return {
            self.layer: 8, self.mlp: 2, self.quantisation: 2, self.pads_and_slices: 2, self.cast: 1, self.pointwise: 2,
            self.combination: 2, self.in_place: 2, self.rearrangement: 2, self.buffer: 1, self.mixture: 1,
            self.attention: 0.5, self.graph_break: 0.1,
        }  # fmt: skip

    def layer(self) -> None:
        """(A block, an all-reduce,) a norm, and what reads it."""
        name = self.some()
        if self.rng.random() < 0.6:
            name = self.linear(name, self.rng.choice((self.hidden, self.width(name))))
        else:
            name = self.one_of([("torch.sin({})", 1), ("torch.sigmoid({})", 1), ("torch.tanh({})", 1)], name)
        if self.rng.random() < 0.7:
            name = self.all_reduce(name)
        y, total = self.norm(name)
        for _ in range(self.rng.choice((0, 1, 1, 1, 2, 3))):
            self.reader(y)
        if self.rng.random() < 0.5:
            self.new(f"{total} * 0.5")

    def all_reduce(self, name: str) -> str:
        """An all-reduce and what may stand around it."""
        width, rows = self.width(name), self.rows(name)
        forms = [
            ("all_reduce({})", 8), (f"all_reduce(F.pad({{}}, (0, 8)))[..., :{width}]", 2),
            ("all_reduce(turned({}))", 0.7), ("turned(all_reduce({}))", 0.7), ("all_reduce({}[None])[0]", 0.5),
            ("all_reduce({}.unsqueeze(0)).squeeze(0)", 1), ("all_reduce({}.float()).to({}.dtype)", 0.7),
            ("largest({})", 0.5), ("scattered({})", 0.5), ("summed_in_place({})", 0.5),
            ("all_reduce(all_reduce({}))", 0.5), ("all_reduce({}.transpose(0, 1)).transpose(0, 1)", 0.7),
            ("all_reduce({}).clone().mul_(0.5)", 0.5), (f"all_reduce({{}}).reshape(-1, {width})", 1),
            ("all_reduce({}[..., 1:])", 1), ("all_reduce({})[..., 1:]", 1),
            ("all_reduce({}).chunk(2, -1)[1]", 0.5),
        ]  # fmt: skip
        if rows is not None:
            forms.append((f"all_reduce({{}}.reshape(-1, {width})).reshape({rows}, {width})", 2))
        if self.tensors[name].dim() > 2:
            forms.append(("all_reduce({})[:, -1:]", 0.5))
        return self.one_of(forms, name)

    def norm(self, name: str) -> tuple[str, str]:
        """(the norm, the sum that it normalised)."""
        spelling = self.rng.choice(list(SPELLINGS if self.rng.random() < 0.65 else NORMS))
        epsilon = ""
        if self.rng.random() < 0.15:
            spelling, epsilon = "own_epsilon", ", self.epsilon"
        dtype = "float32" if self.rng.random() < 0.1 else self.dtype_of(name)
        weight = self.given((self.width(name),), "weight", dtype)
        residual = self.twin(name, any_dtype=self.rng.random() < 0.2) if self.rng.random() < 0.75 else None
        if residual is not None and residual != name and self.rng.random() < 0.1:
            self.write(f"{residual}.add_({name})")
            name, residual = residual, None
        if residual is not None and self.rng.random() < 0.15:
            (residual,) = self.new(f"deepened({residual}, {self.rng.choice((1, 2, 6))})")
        if residual is not None and self.dtype_of(residual) == self.dtype_of(name) and self.rng.random() < 0.3:
            name, residual = residual, name
        y, total = self.new(f"{spelling}({name}, {residual}, {weight}{epsilon})", 2)
        return y, total

    def reader(self, y: str) -> None:
        """One more reader of a norm."""
        width, rows = self.width(y), self.rows(y)
        right = self.rng.choice((1, 8, 16))
        forms = [
            (f"F.pad({{}}, (0, {right}))", 4), (f"F.pad({{}}.reshape(-1, {width}), (0, {right}))", 1),
            (f"padded_by_cat({{}}, {right})", 1), (f"F.pad({{}}, ({right}, 0))", 1), ("{}.relu()", 1.5),
            ("{} * 2", 1), (f"F.pad({{}}, (0, {right}), value=1.0)", 1), (f"F.pad({{}}[..., :-1], (0, {right}))", 1),
            ("{}[:, -1]", 0.5), ("{} * {}", 0.5), ("marked_({})", 0.3), ("{}.as_strided((2, 3), (1, 1))", 0.3),
        ]  # fmt: skip
        if rows is not None:
            forms.append((f"F.pad({{}}.reshape(-1, {width}), (0, {right})).reshape({rows}, -1)", 2))
        choice = self.rng.random()
        if choice < 0.35:
            self.quantised(y)
        elif choice < 0.85:
            self.one_of(forms, y)
        else:
            self.linear(y, self.rng.choice(WIDTHS))

    def quantised(self, y: str) -> None:
        """A quantisation to fp8, mostly with its inverse."""
        if self.rng.random() < 0.1:
            self.new(f"microscaled({y})")
            return
        if self.rng.random() < 0.5:
            function = self.rng.choice(("quantize", "quantize", "quantize", *QUANTS))
            shape = self.rng.choice(((1,), (1,), (1,), (), (1, 1), (self.width(y),)))
            scale = self.given(shape, "scale", "float32")
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
        if self.rng.random() < 0.7:
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
        forms = [
            (f"{{}} * best_shares({{}}, {router})", 1), (f"experts({flat}, {router}, {first}, {second})", 1),
            (f"routed_experts({flat}, ids, {router}, {first}, {second})", 1),
        ]  # fmt: skip
        self.one_of(forms, name)

    def attention(self) -> None:
        self.new(f"attend({self.some()})")

    def pads_and_slices(self) -> None:
        name = self.some()
        forms = [
            "F.pad({}, (0, 8))", "padded_by_cat({}, 4)", "padded_by_copy({}, 4)", "{}[..., ::2]", "{}[..., 1:]",
            f"{{}}[..., :{max(1, self.width(name) - 8)}]", f"{{}}[..., :{self.width(name)}]",
            "F.pad({}, (0, 0, 0, 1))[..., :-1, :]",
        ]  # fmt: skip
        self.one_of([(form, 1) for form in forms], name)

    def cast(self) -> None:
        dtypes = (("bfloat16", 3), ("float16", 3), ("float32", 3), ("float64", 1))
        self.one_of([(f"{{}}.to(torch.{dtype})", often) for dtype, often in dtypes], self.some())

    def pointwise(self) -> None:
        forms = (
            "{}.relu()", "-{}", "{} * 0.5", "{} + 1", "{}.clone()", "{} * 1", "torch.cos({})", "{} / 3", "{} - {}",
            "{} * self.scale",
        )  # fmt: skip
        self.one_of([(form, 1) for form in forms], self.some())

    def combination(self) -> None:
        name = self.some()
        other = self.twin(name, any_dtype=self.rng.random() < 0.3)
        forms = ("{} + OTHER", "{} * torch.sigmoid(OTHER)", "{} - OTHER", "relu_of_product({}, OTHER)")
        self.one_of([(form.replace("OTHER", str(other)), 1) for form in forms], name)

    def rearrangement(self) -> None:
        name = self.some()
        width, dims = self.width(name), self.tensors[name].dim()
        forms = [
            (f"{{}}.reshape(-1, {width})", 1), ("turned({})", 1), ("{}.unsqueeze(0)[0]", 1), ("{}.contiguous()", 1),
            ("{}.transpose(0, 1)", 1), ("{}.unfold(-1, 4, 2)[..., 0]", 0.3), (f"{{}}.reshape(-1, {width})[0]", 0.3),
        ]  # fmt: skip
        forms += [("{}[:, -1]", 1), ("{}[:, :1]", 1)] if dims == 3 else []
        forms += [(f"{{}}.reshape(B, S, {width})", 4)] if self.leading == ("B", "S") and dims == 2 else []
        self.one_of(forms, name)

    def in_place(self) -> None:
        name = self.some()
        other = self.twin(name)
        forms = [
            f"{name}.add_({other})", f"{name}.mul_(0.5)", f"{name} += {other}", f"{name}[..., :1] = 0.5",
            f"{name}.transpose(0, 1).mul_(0.5)", f"{name}.copy_({other}.sin())", f"marked_({name})",
            f"stamped_({name}, {other})",
        ]  # fmt: skip
        if 0 not in self.tensors[name].stride():
            self.write(self.rng.choice(forms))

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

    def graph_break(self) -> None:
        self.write("torch._dynamo.graph_break()")

    def end(self, theme: str) -> None:
        """A norm, mostly with a padded twin, what a theme does to one of these, and all of it returned."""
        name = self.some()
        if self.rng.random() < 0.4:
            name = self.all_reduce(name)
        if theme in ("nested", "coupled"):
            getattr(self, theme)(name)
            return
        y, total = self.norm(name)
        width = self.width(y)
        values = [y, y, total]
        choice = self.rng.random()
        if choice < 0.7:
            values += self.new(f"F.pad({y}, (0, {self.rng.choice((1, 8, 16))}))")
        elif choice < 0.8:
            values += self.new(f"F.pad({y}.reshape(-1, {width}), (0, 8))")
        elif choice < 0.9:
            scale = self.given((1,), "scale", "float32")
            values += self.new(f"quantize({y}, {scale}).to(torch.float32)")
        self.kept.update(name for name in values if self.rng.random() < 0.7)
        for _ in range(self.rng.choice((1, 1, 2))):
            getattr(self, theme)(self.rng.choice(values))

    def written(self, name: str) -> None:
        """An op of somebody's own writes to a value or to a view of it, or reads it as it lies in memory."""
        width = self.width(name)
        other = self.twin(name)
        self.kept.add(name)
        forms = [
            f"stamped_({name}, {other})", f"stamped_({name}[..., :1], {other}[..., :1])", f"marked_({name})",
            f"marked_({name}[..., 1:])", f"stamped_({name}.reshape(-1, {width}), {other}.reshape(-1, {width}))",
            f"all_stamped_({name})", f"stamped_({name}.transpose(0, 1), {other}.transpose(0, 1))",
        ]  # fmt: skip
        if other != name:
            forms += [f"all_stamped_({name}, {other})"]
        if self.rng.random() < 0.7:
            self.write(self.rng.choice(forms))
        else:
            reading = [("read_by_memory({})", 1.0), ("marked_({})", 1)]
            if other != name:
                reading += [(f"moved_({{}}, {other})", 2)]
            self.kept.add(self.one_of(reading, name))

    def returned(self, name: str) -> None:
        """A value is returned, and maybe a view of it."""
        width = self.width(name)
        self.kept.add(name)
        forms = [
            "{}[..., 1:]", f"{{}}.reshape(-1, {width})", "{}.chunk(2, -1)[0]", "{}.transpose(0, 1)", "{}[:, -1]",
            "{}.unsqueeze(0)", "{}[..., ::2]", "{}.clone()", "{}.contiguous()", "{}.detach()", f"{{}}[..., :{width}]",
            "{}.view_as({})",
        ]  # fmt: skip
        if self.rng.random() < 0.7:
            self.kept.add(self.one_of([(form, 1) for form in forms], name))

    def interrupted(self, name: str) -> None:
        """The graph ends, and the next one writes to a value of it."""
        self.graph_break()
        self.kept.add(name)
        other = self.twin(name)
        forms = [f"{name}.mul_(0.5)", f"{name}.add_({other})", f"{name}[..., :1] = 0.5", f"marked_({name})",
                 f"stamped_({name}, {other})"]  # fmt: skip
        self.write(self.rng.choice(forms))

    def viewed(self, name: str) -> None:
        """A value is read, or written, by a view of another dtype or by strides."""
        width = self.width(name)
        forms = [
            ("reversed_bits({})", 2.0), ("through_bytes({})", 2), ("cleared_bits_({})", 2),
            (f"{{}}.as_strided(({width + 1},), (1,))", 1), (f"{{}}.as_strided((2, {width}), (1, 1))", 1),
            (f"{{}}.as_strided((2, {width // 2}), ({width}, 1), 1)", 1),
        ]  # fmt: skip
        self.kept.add(name)
        if self.rng.random() < 0.2:
            self.write(f"{name}.as_strided(({width + 1},), (1,)).mul_(0.5)")
        else:
            self.kept.add(self.one_of(forms, name))

    def nested(self, name: str) -> None:
        """Norms in the graphs of higher-order ops, and of what a graph around them fuses."""
        if self.rng.random() < 0.6:
            y, _ = self.norm(name)
            if self.rng.random() < 0.8:
                self.kept.update(self.new(f"F.pad({y}, (0, 8))"))
            name = y
        weight = self.given((self.width(name),), "weight", self.dtype_of(name))
        other = self.twin(name)
        kind = self.rng.choice(("either", "repeated", "region", "region"))
        if kind == "region":
            for residual in (other, other, name):
                self.kept.update(self.new(f"region({name}, {residual} * 0.5, {weight})", 3))
        else:
            given = f"ids, {name}" if kind == "either" else f"{name}.clone(memory_format=torch.contiguous_format)"
            self.kept.update(self.new(f"{kind}({given}, {weight})", 2))

    def coupled(self, name: str) -> None:
        """Norms that read what became of others: fusions of the one may ask for those of the other."""
        for _ in range(self.rng.choice((1, 2, 2))):
            weight = self.given((self.width(name),), "weight", self.dtype_of(name))
            y, _ = self.new(f"{self.rng.choice(('llama', 'gpt_oss'))}({name}, None, {weight})", 2)
            (name,) = self.new(f"{y}.relu()")
        y, _ = self.norm(name)
        self.kept.update((name, *self.new(f"F.pad({y}, (0, 8))")))
