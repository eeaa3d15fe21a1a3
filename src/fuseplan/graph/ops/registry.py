"""`DialectOp`: one operation of the dialect, with all facts about it in one place."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch.fx import Proxy

from fuseplan.errors import RuleError
from fuseplan.graph.ops.in_place import in_place, in_place_schema, parameters_of, without_last
from fuseplan.record.text import one_line

NAMESPACE = "fuseplan"
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
_KERNELS: dict[str, Callable[..., Any]] = {}
"""The kernels registered with `_LIBRARY`, which torch doesn't give back; as there, none is ever replaced or removed."""
_WITHIN: set[str] = set()
"""The kernels of `_KERNELS` that leave calls with more rows than they take to the reference."""
_INLINED: set[str] = set()
"""The kernels of `_KERNELS` that are a few aten calls, which graphs get inlined."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One set of arguments that an op accepts: `make(device, generator)` returns them, fresh and random.

    Attributes:
        name: for a person.
        make: makes them.
        width: of the first argument's rows, where it matters.
    """

    name: str
    make: Callable[[torch.device, torch.Generator], tuple[Any, ...]]
    width: int = 0


Draw = Callable[[tuple[int, ...], torch.device, torch.Generator], torch.Tensor]
"""Random values for an argument: `draw(shape, device, generator)` returns them in float32."""


@dataclass(frozen=True)
class Indices:
    """Distinct places along a dimension of another argument, in any order, as a draw of integers.

    Attributes:
        of: the argument's name.
        dim: the dimension.
    """

    of: str
    dim: int


def draw_activations(shape: tuple[int, ...], device: torch.device, generator: torch.Generator) -> torch.Tensor:
    """Normal values in rows of unlike magnitude, one in eight of them zeros: a kernel that mixes rows up, or whose sums
    overflow or divide by zero, shows.
    """
    values = torch.randn(shape, device=device, generator=generator)
    if len(shape) < 2:
        return values
    scales = torch.tensor(ROW_SCALES, device=device)
    rows = torch.arange(values.shape[:-1].numel(), device=device).view(*values.shape[:-1], 1)
    return values * scales[rows % len(ROW_SCALES)]


def draw_near_one(shape: tuple[int, ...], device: torch.device, generator: torch.Generator) -> torch.Tensor:
    """1 + normal / 10, as trained norms' weights are."""
    return 1 + 0.1 * torch.randn(shape, device=device, generator=generator)


def draw_positive(shape: tuple[int, ...], device: torch.device, generator: torch.Generator) -> torch.Tensor:
    """Uniform between 0.01 and 0.03, so that the largest of normal values stay within fp8 after the division."""
    return 0.01 + 0.02 * torch.rand(shape, device=device, generator=generator)


ROW_SCALES = (1.0, 1.0, 1.0, 0.001, 1.0, 30.0, 1.0, 0.0)
"""Small enough for an epsilon to count, large enough for the square of a sum not to fit a float16."""


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """The decoded results of a quantisation by steps.

    Attributes:
        scales: of the groups, [rows, groups] in float64.
        steps: the scales as integers in their order, one apart where they are neighbours.
        numbers: decodes the codes of some groups, [groups, size in codes' memory] to [groups, size] in float64.
        most: the largest number that a code stands for.
    """

    numbers: Callable[[torch.Tensor], torch.Tensor]
    scales: torch.Tensor
    steps: torch.Tensor
    most: float


Decode = Callable[..., Decoded | None]
"""`decode(codes, scales, *arguments)`, with all arguments of the op but the first; None where its scales are arbitrary
numbers, without steps.
"""


@dataclass(frozen=True, kw_only=True, eq=False)
class DialectOp:
    """An op that rules are written in.

    Calling it runs `torch.ops.fuseplan.<name>.default`, or, on `torch.fx.Proxy` arguments, records that call.

    Attributes:
        name: `fused_add_rms_norm`; the op is `torch.ops.fuseplan.<name>`.
        schema: the part of the schema after the name, e.g. `(Tensor x, float eps) -> Tensor`.
        reference: plain PyTorch, the semantics and the oracle for every provider. Run on float64 inputs it makes no
            casts at all, which is the exact value that errors are measured against.
        fake: shapes and dtypes alone; works with symbolic sizes.
        samples: arguments for tests, benchmarks and verification.
        error_factor: how many times the reference's own error against the exact value a provider may make (plus one
            unit in the last place of the output dtype).
        fused: whether rules put it into a graph; the other ops occur in their patterns.
        collective: whether it communicates, i.e. every rank of a group must run it in the same order.
        draws: how random values for an argument are drawn, by its name; others are drawn like activations, and integers
            are 0 or 1.
        writes: the arguments that kernels write to. The op itself writes to none: its last results are the new values
            of these. A kernel takes the same arguments, writes, and yields the other results alone.
        packed: places of the results whose bytes are two e2m1 codes each.
        decode: of a quantisation `(x, ...) -> (codes, scales)` with a scale for each group: decodes its results.
    """

    name: str
    schema: str
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    samples: tuple[Sample, ...]
    error_factor: float
    fused: bool = False
    collective: bool = False
    draws: Mapping[str, Draw | Indices] = field(default_factory=dict)
    writes: tuple[str, ...] = ()
    packed: tuple[int, ...] = ()
    decode: Decode | None = None

    def draw(self, argument: str) -> Draw | Indices:
        """How random values for an argument are drawn."""
        return self.draws.get(argument, draw_activations)

    @property
    def parameters(self) -> list[str]:
        """The arguments as in the schema: `Tensor x`, `float eps`."""
        return parameters_of(self.schema)

    @property
    def arguments(self) -> tuple[str, ...]:
        """The arguments' names, in the schema's order."""
        return tuple(argument.name for argument in self.overload._schema.arguments)

    @functools.cached_property
    def overload(self) -> "torch._ops.OpOverload":
        """The op as called in a graph."""
        return _overload(f"{self.name}.default")

    def implementation(self, provider: str) -> "torch._ops.OpOverload":
        """The overload that runs a provider's kernel, which writes in place if the op says so; the provider `torch` is
        the reference, `default`.

        Raises:
            AttributeError: no such provider has registered an implementation of this op.
        """
        return _overload(self._registered(provider))

    def runs_reference(self, provider: str) -> bool:
        """Whether a provider's kernel is the op's own reference."""
        return self.implementation(provider) is self.implementation("torch")

    def kernel(self, provider: str) -> Callable[..., Any]:
        """The Python function behind `implementation(provider)`, without its fallback for calls with more rows.

        Raises:
            KeyError: no such provider has registered an implementation of this op.
        """
        return _KERNELS[self._registered(provider)]

    def _registered(self, provider: str) -> str:
        return _registered(self.name, provider, in_place=bool(self.writes))

    def __call__(self, *args: Any) -> Any:
        """Runs the reference overload, or records the call on `torch.fx.Proxy` arguments."""
        for arg in args:
            if isinstance(arg, Proxy):
                return arg.tracer.create_proxy("call_function", self.overload, args, {})
        return self.overload(*args)

    def __repr__(self) -> str:
        return f"fuseplan::{self.name}"


class Dialect(Mapping[str, DialectOp]):
    """Ops by name, also as attributes: `ops.rms_norm`, `ops["rms_norm"]`. Iterates in order of name."""

    def __init__(self) -> None:
        self._ops: dict[str, DialectOp] = {}
        self._by_target: dict[object, DialectOp] = {}

    def add(self, *ops: DialectOp) -> None:
        """Takes ops in."""
        self._ops = {op.name: op for op in sorted((*self._ops.values(), *ops), key=lambda op: op.name)}
        self._by_target |= {op.overload: op for op in ops}

    def __getitem__(self, name: str) -> DialectOp:
        return self._ops[name]

    def __getattr__(self, name: str) -> DialectOp:
        try:
            return self.__dict__["_ops"][name]  # type: ignore[no-any-return]
        except KeyError:
            raise AttributeError(f"no dialect op named {name!r}; there are {', '.join(self)}") from None

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self._ops]

    def __iter__(self) -> Iterator[str]:
        return iter(self._ops)

    def __len__(self) -> int:
        return len(self._ops)

    def of(self, target: object) -> DialectOp | None:
        """The op whose reference overload is `target`, if any."""
        return self._by_target.get(target)


ops = Dialect()
"""The ops of fuseplan itself."""


def define(
    name: str,
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    samples: Sequence[Sample],
    error_factor: float = 2.0,
    fused: bool = False,
    collective: bool = False,
    draws: Mapping[str, Draw | Indices] | None = None,
    writes: Sequence[str] = (),
    packed: Sequence[int] = (),
    decode: Decode | None = None,
) -> DialectOp:
    """Registers `fuseplan::<name>` with torch and returns its record.

    Args:
        name: unique.
        schema: arguments and results as in a torch schema, without the name.
        reference: its computation, in plain PyTorch; the oracle for every provider's kernel.
        fake: shapes and dtypes of the results, symbolic sizes included.
        samples: arguments, for tests and verification.
        error_factor: how many times the reference's error a kernel may make.
        fused: whether it replaces several others.
        collective: whether all ranks of a group have to run it.
        draws: how random values for an argument are drawn, by its name, where normal ones won't do: a scale that has to
            be positive, say.
        writes: the arguments that kernels write to; `reference` and `fake` write to none, and yield the new values of
            these last, in this order.
        packed: places of the results whose bytes are two e2m1 codes each; verification allows a kernel the same
            difference as for fp8 codes.
        decode: of a quantisation whose groups have scales in steps: where a kernel's rows are that near to a scale's
            next step, verification allows that scale.

    Raises:
        RuleError: there is an op of that name already, or `writes` names no tensors among the arguments, or there is no
            result beside the written ones.
    """
    _register(name, schema, reference, fake)
    if writes:
        _register(
            f"{name}_", in_place_schema(name, schema, writes), in_place(reference, schema, writes),
            without_last(fake, len(writes)),
        )  # fmt: skip
    return DialectOp(
        name=name,
        schema=schema,
        reference=reference,
        fake=fake,
        samples=tuple(samples),
        error_factor=error_factor,
        fused=fused,
        collective=collective,
        draws=dict(draws or {}),
        writes=tuple(writes),
        packed=tuple(packed),
        decode=decode,
    )


def implement(
    op: DialectOp, provider: str, kernel: Callable[..., Any], *, most_rows: Callable[[Any], int] | None = None,
    inlined: bool = False,
) -> None:  # fmt: skip
    """Registers a provider's kernel as the overload `fuseplan::<op>.<provider>`, with the op's own schema and fake.

    Args:
        op: the fused op.
        provider: its name.
        kernel: by the op's own arguments; where the op `writes`, it does so, and yields the other results. Where it has
            an attribute `direct`, `direct(overload)` makes a function `(key, *arguments)` that Inductor's code calls
            instead of the overload, with equal keys for calls that differ only in addresses and tensor contents.
        most_rows: how many rows of its first tensor the kernel takes, for given arguments, as attributes by their
            names. A call with more runs the op's reference, on every rank of a group alike, since all have the same
            number of rows. None: any number.
        inlined: whether graphs get the aten calls that the kernel makes, and not the overload: Inductor then lowers
            them as it always does. Such a kernel calls overloads of aten alone, and reads shapes by `facts_of`.

    Raises:
        RuleError: the provider has a kernel of that op already.
    """
    name = _registered(op.name, provider, in_place=bool(op.writes))
    schema, fake = op.schema, op.fake
    if op.writes:
        schema, fake = in_place_schema(op.name, schema, op.writes), without_last(fake, len(op.writes))
    _register(name, schema, kernel if most_rows is None else _within(op, kernel, most_rows), fake)
    _KERNELS[name] = kernel
    if hasattr(kernel, "direct"):
        overload = _overload(name)
        overload.direct = kernel.direct(overload)  # type: ignore[attr-defined]
    if most_rows is not None:
        _WITHIN.add(name)
    if inlined:
        _INLINED.add(name)


def falls_back(op: str, provider: str) -> bool:
    """Whether a provider's kernel, by names, leaves a call of more rows than it takes to the op's reference."""
    return not _WITHIN.isdisjoint(_registrations(op, provider))


def _within(op: DialectOp, kernel: Callable[..., Any], most_rows: Callable[[Any], int]) -> Callable[..., Any]:
    names = op.arguments

    @functools.wraps(kernel)
    def kernel_or_reference(*args: Any) -> Any:
        rows = next(value.shape[:-1].numel() for value in args if isinstance(value, torch.Tensor))
        if rows > most_rows(SimpleNamespace(**dict(zip(names, args, strict=True)))):
            return op.kernel("torch")(*args)
        return kernel(*args)

    return kernel_or_reference


def is_inlined(op: DialectOp, provider: str) -> bool:
    """Whether graphs get the calls that a provider's kernel makes in place of one opaque op."""
    return f"{op.name}.{provider}" in _INLINED


def _registered(op: str, provider: str, *, in_place: bool) -> str:
    """The registered name of an op by a provider; as in torch, a name that ends in `_` writes in place."""
    return f"{op}{'_' if in_place else ''}.{'default' if provider == 'torch' else provider}"


def _registrations(op: str, provider: str) -> tuple[str, ...]:
    return tuple(_registered(op, provider, in_place=in_place) for in_place in (False, True))


def _overload(name: str) -> "torch._ops.OpOverload":
    op, _, provider = name.partition(".")
    overload: torch._ops.OpOverload = getattr(getattr(getattr(torch.ops, NAMESPACE), op), provider)
    return overload


def _register(name: str, schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    try:
        _LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    except RuntimeError as error:
        raise RuleError(f"{NAMESPACE}::{name}{schema} can't be defined: {one_line(error, 200)}") from error
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    _KERNELS[name if "." in name else f"{name}.default"] = kernel


def facts_of(value: Any) -> Any:
    """The object that an inlined kernel reads shapes and strides from: the tensor, or the fake tensor of its node in a
    graph.
    """
    return value.node.meta["val"] if isinstance(value, Proxy) else value


def registered_kernel(op: str, provider: str) -> Callable[..., Any] | None:
    """The Python function by which a provider runs an op, by their names; None where none is registered."""
    return next((_KERNELS[name] for name in _registrations(op, provider) if name in _KERNELS), None)


def kernel_of(target: object) -> Callable[..., Any] | None:
    """The Python function behind an overload of this namespace, None for others."""
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != NAMESPACE:
        return None
    return _KERNELS.get(str(target).removeprefix(f"{NAMESPACE}."))
