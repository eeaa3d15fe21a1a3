"""`Part`, the declaration of one building block of fusions. Each part has one file or folder of this package."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, IntEnum, auto
from typing import Any

import torch
from torch import fx

from fuseplan.devices.hardware import TORCH
from fuseplan.graph.canonical import CanonicalGraph
from fuseplan.graph.facts import hint, tensor_of
from fuseplan.graph.ops import DialectOp, Sample, ops, random_tensor
from fuseplan.record import Reason
from fuseplan.rules.parts.traffic import Middle, Tail


class Stage(IntEnum):
    """The stages of raising a graph, in the order in which they run. In each, parts look for their spellings; parts of
    one stage don't depend on each other. The first and the last stage have no parts.
    """

    NOOPS = auto()
    """Removes views and casts that do nothing, so that no spelling has to see through them."""
    COLLECTIVES = auto()
    """All-reduces. By these, norms tell the residual from the other addend."""
    ENGINES = auto()
    """Ops of an inference engine, wherever they stand: see `Part.engine_ops`."""
    VIEWS = auto()
    """Views between a prologue and its core."""
    CORES = auto()
    """Norms and activations."""
    MICROSCALED_EPILOGUES = auto()
    """Epilogues over groups of a row with exponents as scales. Later stages would report such scales as near misses."""
    GROUPED_EPILOGUES = auto()
    """Epilogues over groups of a row, which would pass for epilogues over whole rows in the next stage."""
    EPILOGUES = auto()
    """Epilogues over whole rows of a core's result."""
    PAIRS = auto()
    """Ops on the results of several cores."""
    CACHES = auto()
    """Writes of rotated keys and of values into caches."""
    ATTENTION = auto()
    """Attention to keys and values that are rotated, cached or repeated."""
    LINEARS = auto()
    """Linear layers, whose producers and consumers are raised by then."""
    RESHAPES = auto()
    """Moves reshapes between a core and its epilogue behind both, once all ops are raised."""


class Reported(Enum):
    """When a lookalike of a part is reported as a near miss although no rule asks for it."""

    ALWAYS = auto()
    NEAR_A_CORE = auto()
    BY_RULE = auto()
    """By the rule that has the part as its core."""
    NEVER = auto()


EngineReader = Callable[[CanonicalGraph, fx.Node, Mapping[str, Any], Mapping[object, str]], None]
"""Raises one op of an engine: `read(canonical, node, arguments by name, the engine's groups)`."""

Hint = Callable[[fx.Node, fx.Node, fx.Node], str | None]
"""`hint(obstacle, goal, consumer)`: advice on moving an obstacle from between two ops; None where no such move is known
to compute the same."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """A building block of fusions.

    Attributes:
        name: its name in signatures of sites and in cost tables.
        ops: its dialect ops in graphs; near misses of any of them are recorded under the name of the first.
        raising: functions that find its spellings in aten, each with its stage.
        engine_ops: readers of the inference engines' ops for it, by name.
        evaluated: names of engine ops that verification of a match runs as they are.
        reported: when lookalikes are reported as near misses.
        hint: advice on obstacles between it and its neighbour.
        opt_in: whether graphs are searched for it only if a rule about it was asked for.
    """

    name: str
    ops: tuple[DialectOp, ...]
    raising: tuple[tuple[Stage, Callable[[CanonicalGraph], None]], ...] = ()
    engine_ops: Mapping[str, EngineReader] = field(default_factory=dict)
    evaluated: tuple[str, ...] = ()
    reported: Reported = Reported.NEAR_A_CORE
    hint: Hint | None = None
    opt_in: bool = False

    @property
    def op(self) -> DialectOp:
        """The op under whose name near misses are recorded."""
        return self.ops[0]


REDUCER = "reducer"
"""The `meta` key of a raised all-reduce for the library that it came from, unless that is torch.distributed."""


OPAQUE = "opaque"
"""The `meta` key that marks a raised epilogue as an engine's own op in the graph, which Inductor fuses with nothing."""


def reducer_of(reduce: fx.Node) -> str:
    """The library of a raised all-reduce in the graph; see `TORCH`."""
    found: str = reduce.meta.get(REDUCER, TORCH)
    return found


@dataclass(frozen=True, kw_only=True)
class Blame:
    """The reason why an op is in the way.

    Attributes:
        reason: its kind.
        found: the op there.
        detail: for a person.
        fix: how to fix it, if known.
    """

    reason: Reason
    found: str
    detail: str
    fix: str | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Prologue(Part):
    """An op on a core's input, element by element: views of its result may be taken of its input instead.

    Attributes:
        parameters: the op's arguments after the first, in the syntax of a schema.
        sample: values for `parameters`.
        without: drops from the obstacles on a path, in either direction, the prologue's ops that a rule takes along and
            the casts around them: `without(obstacles, input)`; None: rules take none along.
        blame: (reason, explanation) for an op in the way, where the prologue has a better one; None: it has none.
        twice: the blame for two of it in a row before an op: `twice(first, second, op)`.
        added_twice: the blame for an op that adds two of it.
    """

    parameters: tuple[str, ...]
    sample: Callable[[], tuple[Any, ...]] = tuple
    without: Callable[[Sequence[fx.Node], fx.Node], list[fx.Node]] | None = None
    blame: Callable[[fx.Node], tuple[Reason, str] | None]
    twice: Callable[[fx.Node, fx.Node, str], Blame] | None = None
    added_twice: Callable[[str], Blame] | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Core(Part):
    """The op that a fusion is built around: each one in a graph is a site.

    Attributes:
        traffic: its traffic, for prices.
        residual_op: the same op behind a residual add; it also yields the sum.
        weight: the position of its weight among the arguments of `op`, counted from the last; None: it has none.
        several: the same op several times, on one input.
        result: the word for its result in names of fused ops that yield it beside the epilogue's result.
    """

    traffic: Middle
    residual_op: DialectOp | None = None
    weight: int | None = None
    several: tuple[DialectOp, ...] = ()
    result: str = "result"

    @property
    def cores(self) -> tuple[DialectOp, ...]:
        """The ops that sites are built around."""
        return (self.op, *([self.residual_op] if self.residual_op is not None else []), *self.several)


@dataclass(frozen=True, kw_only=True, eq=False)
class Epilogue(Part):
    """An op on the result of a core.

    Attributes:
        cores: names of the parts that it is fused with.
        traffic: the class of its traffic, for prices.
        tail: its traffic, from a node that calls it and its core.
        found: its nodes at a core; None: the calls of `op` on the core's result.
        beside: further nodes that a fusion with one of its nodes may take; None: none.
        taking: the part of a tail that a fusion takes, by the nodes it consumes; None: the whole tail.
    """

    cores: frozenset[str]
    traffic: type[Tail]
    tail: Callable[[fx.Node, fx.Node], Tail]
    found: Callable[[fx.Node], list[fx.Node]] | None = None
    beside: Callable[[fx.Node], list[fx.Node]] | None = None
    taking: Callable[[Tail, Collection[fx.Node]], Tail] | None = None


class Kind(Enum):
    """The purpose of an epilogue, after which rules and flags are named."""

    PADDING = auto()
    QUANTISATION = auto()


@dataclass(frozen=True, kw_only=True, eq=False)
class RowEpilogue(Epilogue):
    """An op on each row before it is stored: a reshape that keeps rows may stand before it or behind it.

    Attributes:
        kind: its purpose.
        parameters: the op's arguments after the first, in the syntax of a schema.
        results: the number of tensors it yields.
        sample: values for `parameters` on a device.
        unit: the width of rows must be a multiple of this for the sample.
        core_of: recovers the core's result from the op's first result and the parameters by name; None: impossible.
    """

    kind: Kind
    parameters: tuple[str, ...]
    results: int = 1
    sample: Callable[[torch.device], tuple[Any, ...]]
    unit: int = 1
    core_of: Callable[[Any, Mapping[str, Any]], Any] | None = None

    @property
    def suffix(self) -> str:
        """The suffix in names of fused ops."""
        return self.name


def width_of(core: fx.Node) -> int:
    """The size of a core's rows, as traced."""
    value = tensor_of(core.args[0])
    assert value is not None
    return hint(value.shape[-1])


def takes_residual(node: fx.Node) -> bool:
    """Whether a node calls an op that adds a residual."""
    op = ops.of(node.target)
    return op is not None and "residual" in op.arguments


def rows_of(shape: Sequence[int]) -> str:
    """A shape as `7x320`, for the name of a sample."""
    return "x".join(map(str, shape))


def sample_of(shape: tuple[int, ...], arguments: Callable[[torch.device], tuple[Any, ...]], more: str = "") -> Sample:
    """A sample of normal values in bfloat16 and an op's further arguments; `more`, about these, ends its name."""

    def make(device: torch.device, generator: torch.Generator) -> tuple[Any, ...]:
        return random_tensor(shape, torch.bfloat16, device, generator), *arguments(device)

    return Sample(name=rows_of(shape) + more, make=make)
