"""The evidence behind a report: the graph as boxes, the rows behind its numbers, and how the choice changes with the
number of tokens. A comparison has it on request (`compare(..., evidence=True)`).
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Box:
    """One dialect op of a canonical graph, or all ops between two of them.

    Attributes:
        name: of the op's node, or of the first node of those between.
        op: the dialect op's name; None for a box of other ops.
        ops: the original graph's ops in it, counted, e.g. `{"aten.mm.default": 1}`.
        members: names of the canonical nodes in it.
        inputs: indices of the drawing's boxes that it reads, ascending.
        source: the module of the user's model that all of it belongs to, if known.
        line: `file.py:12`, the line of the user's model that it comes from, if there is one for all of it.
        value: dtype and shape of its first result, e.g. `bfloat16[s0, 2880]`.
    """

    name: str
    op: str | None
    ops: Mapping[str, int]
    members: tuple[str, ...]
    inputs: tuple[int, ...]
    source: str | None
    line: str | None
    value: str


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A graph as boxes, in topological order. It is the same in every compile range.

    Attributes:
        graph: its name in the report.
        boxes: in topological order.
    """

    graph: str
    boxes: tuple[Box, ...]


@dataclass(frozen=True, kw_only=True)
class KernelTime:
    """One kernel of a modelled time, term by term, in nanoseconds; see `planner.costs.model`.

    Attributes:
        name: of the kernel.
        launch: from its predecessor's end to its own with next to no work.
        signal: waiting for other ranks.
        staging: copying to where other ranks can read.
        memory: bytes through cache and memory.
        wire: bytes over links.
    """

    name: str
    launch: int
    signal: int
    staging: int
    memory: int
    wire: int


@dataclass(frozen=True, kw_only=True)
class CostRow:
    """The time of one alternative at one class of places and one size.

    Attributes:
        site: the class: the ops of a component's places, their widths, dtype and rounding.
        places: how many components of a step are of this class, in one graph and range.
        alternative: `unfused`, or the applied fusion: rule, fused op, provider.
        tokens: the size.
        time_ns: of all ops of the class, including those that the alternative leaves unfused.
        spread_ns: the interquartile range; 0 where modelled.
        low_ns: the lower end of the interval that holds the time in 80 of 100 cases; None where that isn't known.
        high_ns: its upper end.
        provenance: `measured`, `modelled`, `declared` or `assumed`.
        kernels: of a modelled time; they sum to `time_ns`.
        origin: of a measured time: device, topology, versions, date and command, one text each.
    """

    site: str
    places: int
    alternative: str
    tokens: int
    time_ns: int
    spread_ns: int
    provenance: str
    kernels: tuple[KernelTime, ...] = ()
    origin: tuple[str, ...] = ()
    low_ns: int | None = None
    high_ns: int | None = None


@dataclass(frozen=True, kw_only=True)
class DeviceConstant:
    """A constant of the cost model.

    Attributes:
        name: dotted, e.g. `triton.signal`.
        value: in `unit`.
        unit: `ns`, `GB/s` or `bytes`.
        source: where it comes from.
    """

    name: str
    value: float
    unit: str
    source: str


@dataclass(frozen=True, kw_only=True)
class PolicyAt:
    """The decision of one policy for a single size.

    Attributes:
        policy: as on the command line.
        saved_ns: its saving in a step.
        fused: its fusions, counted by rule and provider, e.g. `{"allreduce_rms triton": 73}`, zeros left out.
    """

    policy: str
    saved_ns: int
    fused: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class SizePoint:
    """All policies at one size, each choosing for that size alone: shows where the choice changes, and the better
    policy.

    Attributes:
        tokens: the size.
        unfused_ns: all contested places, as Inductor leaves them.
        step_ns: a whole step without fusions, estimated; None where that isn't known.
        policies: in the order of the comparison's reports.
    """

    tokens: int
    unfused_ns: int
    policies: tuple[PolicyAt, ...]
    step_ns: int | None = None


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """The evidence of one comparison.

    Attributes:
        drawings: one a graph.
        costs: the prices behind plans, by class, size and alternative.
        constants: of the device's cost model.
        sizes: in ascending order.
    """

    drawings: tuple[Drawing, ...]
    costs: tuple[CostRow, ...]
    constants: tuple[DeviceConstant, ...]
    sizes: tuple[SizePoint, ...]
