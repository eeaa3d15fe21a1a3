"""`Part`: what is known of one building block of fusions, all in one file of this package."""

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
    """What raises a graph, in the order in which it has to run: parts look for their spellings, and those of one stage
    don't depend on each other; the first stage and the last have no parts.
    """

    NOOPS = auto()
    """Views and casts that do nothing are taken out: no spelling has to see through them."""
    COLLECTIVES = auto()
    """All-reduces, which norms ask for to tell the residual from what is added to it."""
    ENGINES = auto()
    """Ops of an inference engine, wherever they stand: see `Part.engine_ops`."""
    VIEWS = auto()
    """Views between a prologue and its core."""
    CORES = auto()
    """What normalises and what activates."""
    MICROSCALED_EPILOGUES = auto()
    """Epilogues of parts of a row, whose scales are exponents: others would be told that theirs are none."""
    GROUPED_EPILOGUES = auto()
    """Epilogues of parts of a row, which would pass for others' of whole ones."""
    EPILOGUES = auto()
    """What is done to the result of a core."""
    PAIRS = auto()
    """What takes the results of several cores."""
    CACHES = auto()
    """What keeps what has been rotated."""
    ATTENTION = auto()
    """What takes what has been rotated, kept and repeated."""
    LINEARS = auto()
    """Layers, whose inputs and results are others' by then."""
    RESHAPES = auto()
    """Reshapes between a core and its epilogue are moved behind both, once all of them are there."""


class Reported(Enum):
    """When something that looks like a part, isn't one, and that no rule asks for, is a near miss all the same."""

    ALWAYS = auto()
    NEAR_A_CORE = auto()
    BY_RULE = auto()
    """Of the rule whose core it is."""
    NEVER = auto()


EngineReader = Callable[[CanonicalGraph, fx.Node, Mapping[str, Any], Mapping[object, str]], None]
"""Raises one op of an engine: `read(canonical, node, arguments by name, the engine's groups)`."""

Hint = Callable[[fx.Node, fx.Node, fx.Node], str | None]
"""`hint(obstacle, goal, consumer)`: what puts an obstacle between two ops elsewhere; None where nothing is known that
computes the same."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """A building block of fusions.

    Attributes:
        name: in signatures of sites and in cost tables.
        ops: the dialect ops of it that stand in graphs; near misses of any are noted by the name of the first.
        raising: how it finds its spellings in aten, and when.
        engine_ops: how it reads the ops that inference engines have for it, by name.
        evaluated: such ops, by name, that are run as they stand where a match of it is verified.
        reported: when what only looks like it is a near miss.
        hint: what may be moved away between it and its neighbour.
        opt_in: whether graphs are read for it only where a rule about it was asked for.
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
        """The op by whose name near misses are noted."""
        return self.ops[0]


REDUCER = "reducer"
"""The key in `meta` of a raised all-reduce under which it has whose it was, where that isn't torch.distributed's."""


OPAQUE = "opaque"
"""The key in `meta` of a raised epilogue that is an engine's own op in the graph, which Inductor joins with nothing."""


def reducer_of(reduce: fx.Node) -> str:
    """Whose a raised all-reduce was in the graph; see `TORCH`."""
    found: str = reduce.meta.get(REDUCER, TORCH)
    return found


@dataclass(frozen=True, kw_only=True)
class Blame:
    """What is said of something that is in the way.

    Attributes:
        reason: its kind.
        found: what is there.
        detail: for a person.
        mend: how to fix it, if known.
    """

    reason: Reason
    found: str
    detail: str
    mend: str | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Prologue(Part):
    """What is done to a core's input, element by element: views of its result may be taken of its input instead.

    Attributes:
        parameters: the op's arguments after the first, as they stand in a schema.
        sample: values for `parameters`.
        without: the obstacles on a way, in either direction, but for those of it that a rule takes along, and the casts
            around these: `without(obstacles, what it reads)`; None: rules take none along.
        blame: (reason, what explains it) of an op in the way that it knows more of than others; None: it doesn't.
        twice: what is said of two of it in a row before an op: `twice(first, second, op)`.
        added_twice: what is said where an op adds two of it.
    """

    parameters: tuple[str, ...]
    sample: Callable[[], tuple[Any, ...]] = tuple
    without: Callable[[Sequence[fx.Node], fx.Node], list[fx.Node]] | None = None
    blame: Callable[[fx.Node], tuple[Reason, str] | None]
    twice: Callable[[fx.Node, fx.Node, str], Blame] | None = None
    added_twice: Callable[[str], Blame] | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Core(Part):
    """What a fusion is built around: each one in a graph is a site.

    Attributes:
        traffic: what prices need.
        residual_op: the same op behind a residual add, which it yields, too.
        weight: the place of its weight among the arguments of `op`, counted from the last; None: it has none.
        several: the same op several times, on one input.
        result: what it yields, in names of fused ops that yield it beside what an epilogue makes of it.
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
    """What is done to the result of a core.

    Attributes:
        cores: names of the parts that it is fused with.
        traffic: what prices need.
        tail: its `traffic`, of a node of it and its core.
        found: the nodes of it at a core; None: those that call `op` on the core's result.
        beside: what else a fusion may take that takes a node of it; None: nothing.
        taking: the tail as a fusion takes it that consumes some nodes; None: as it is.
    """

    cores: frozenset[str]
    traffic: type[Tail]
    tail: Callable[[fx.Node, fx.Node], Tail]
    found: Callable[[fx.Node], list[fx.Node]] | None = None
    beside: Callable[[fx.Node], list[fx.Node]] | None = None
    taking: Callable[[Tail, Collection[fx.Node]], Tail] | None = None


class Kind(Enum):
    """What an epilogue is for, by which rules and flags are called."""

    PADDING = auto()
    QUANTISATION = auto()


@dataclass(frozen=True, kw_only=True, eq=False)
class RowEpilogue(Epilogue):
    """What is done to each row before it is stored: a reshape that keeps rows may stand before it or behind it.

    Attributes:
        kind: what it is for.
        parameters: the op's arguments after the first, as they stand in a schema.
        results: how many tensors it yields.
        sample: values for `parameters` on a device.
        unit: what the width of rows has to be a multiple of, for these.
        core_of: how the core's result is got back from the op's first one and the parameters by name; None: it isn't.
    """

    kind: Kind
    parameters: tuple[str, ...]
    results: int = 1
    sample: Callable[[torch.device], tuple[Any, ...]]
    unit: int = 1
    core_of: Callable[[Any, Mapping[str, Any]], Any] | None = None

    @property
    def suffix(self) -> str:
        """Of the names of fused ops."""
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
    """`7x320`, for the name of a sample."""
    return "x".join(map(str, shape))


def sample_of(shape: tuple[int, ...], arguments: Callable[[torch.device], tuple[Any, ...]], more: str = "") -> Sample:
    """Normal values in rows, in bfloat16, and an op's further arguments on a device; `more` of them is in its name."""

    def make(device: torch.device, generator: torch.Generator) -> tuple[Any, ...]:
        return random_tensor(shape, torch.bfloat16, device, generator), *arguments(device)

    return Sample(name=rows_of(shape) + more, make=make)
