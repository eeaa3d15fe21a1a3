"""Traffic of quantisations at a site: the codes that they write, and the ops on these."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import fx

from fuseplan.graph.canonical import CanonicalGraph
from fuseplan.graph.facts import convert_element_type, is_call, item
from fuseplan.graph.ops import DialectOp
from fuseplan.rules.parts.base import OPAQUE, EngineReader, Kind, RowEpilogue, Stage
from fuseplan.rules.parts.traffic import Clock, Kernel, Middle, Region, Tail

CODE_BYTES = 1
SCALE_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class Codes(Tail):
    """A quantisation at a site.

    Attributes:
        restored: whether the graph casts the codes back to numbers, as in simulated quantisation: Inductor fuses the
            cast into the kernel of core and epilogue; behind a fused op it is a separate kernel.
        opaque: whether it is an engine's op, which Inductor fuses with nothing.
    """

    restored: bool = False
    opaque: bool = False

    kind = "quant"

    @classmethod
    def read(cls, node: fx.Node, core: fx.Node) -> Self:
        """The traffic of a dialect op, with codes as its first result or its only one."""
        several = len(node.target._schema.returns) > 1  # type: ignore[union-attr]
        codes = item(node, 0) if several else node
        return cls(restored=is_restored(codes), opaque=OPAQUE in node.meta)

    def stays_apart(self, core: Middle) -> bool:
        """True for an engine's op."""
        return self.opaque or super().stays_apart(core)

    def text(self, width: int) -> str:
        """`dynamic_fp8_quant`"""
        return f"{self.name}{' restored' * self.restored}{' opaque' * self.opaque}"

    def behind(self, clock: Clock, region: Region) -> tuple[Kernel, ...]:
        """The kernel that casts the codes back, if there is one."""
        nbytes = self.result_bytes(region) + region.row_bytes
        return (clock.local("dequantised", nbytes),) if self.restored else ()


@dataclass(frozen=True, kw_only=True)
class GroupCodes(Codes):
    """A quantisation with a scale of each group of elements of a row.

    Attributes:
        group_size: elements of a group.
    """

    group_size: int

    reduces_rows = True
    code_bits: ClassVar[int] = 8 * CODE_BYTES
    scale_bytes: ClassVar[int]

    @classmethod
    def read(cls, node: fx.Node, core: fx.Node) -> Self:
        """The traffic of a dialect op `(x, group_size, ...)`."""
        size = node.args[1]
        assert isinstance(size, int)
        return cls(group_size=size, restored=is_restored(item(node, 0)), opaque=OPAQUE in node.meta)

    @classmethod
    def stands_alone(cls, core: Middle) -> bool:
        """True behind a reduction over rows: a reduction over groups iterates differently."""
        return core.reduces_rows

    def text(self, width: int) -> str:
        """`group_fp8_quant 128`"""
        return f"{super().text(width)} {self.group_size}"

    def result_bytes(self, region: Region) -> int:
        """Bytes of the codes and of a scale a group."""
        return region.tokens * (region.width * self.code_bits // 8 + region.width // self.group_size * self.scale_bytes)


def quantisation(
    op: DialectOp, traffic: type[Codes], stage: Stage, raises: Callable[[CanonicalGraph], None],
    sample: Callable[[torch.device], tuple[Any, ...]], *, unit: int = 1,
    engine_ops: Mapping[str, EngineReader] | None = None,
) -> RowEpilogue:  # fmt: skip
    """The part of a quantisation, behind a norm or an activation.

    Args:
        op: `(x, ...) -> codes`, or `(x, ...) -> (codes, scales)`.
        traffic: the class of its traffic.
        stage: the stage in which `raises` runs.
        raises: raises its spellings.
        sample: values for all arguments except x.
        unit: see `RowEpilogue`.
        engine_ops: see `Part`.
    """
    return RowEpilogue(
        name=traffic.name,
        kind=Kind.QUANTISATION,
        ops=(op,),
        parameters=tuple(each.replace("str rounding", "str quant_rounding") for each in op.parameters[1:]),
        results=len(op.overload._schema.returns),
        sample=sample,
        unit=unit,
        cores=frozenset({"rms_norm", "silu_and_mul"}),
        raising=((stage, raises),),
        engine_ops=engine_ops or {},
        traffic=traffic,
        tail=traffic.read,
    )


def is_restored(codes: fx.Node | None) -> bool:
    """Whether the only ops on the codes are casts back to numbers."""
    return codes is not None and all(is_call(user, convert_element_type) for user in codes.users)
