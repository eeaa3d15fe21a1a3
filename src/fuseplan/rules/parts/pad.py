"""Zero padding of the last dimension, which kernels for experts require of their activations."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fuseplan.graph.canonical import CanonicalGraph
from fuseplan.graph.facts import aten, convert_element_type, is_call
from fuseplan.graph.ops import define, empty
from fuseplan.record import Reason
from fuseplan.rules.parts.base import Kind, RowEpilogue, Stage, sample_of, width_of
from fuseplan.rules.parts.traffic import Clock, Kernel, Middle, Region, Tail
from fuseplan.rules.parts.views import SCALES


def reference(x: Tensor, right: int) -> Tensor:
    """y = torch.nn.functional.pad(x, (0, right))

    Args:
        x: [..., hidden].
        right: zeros to append to the last dimension, at least 1.

    Returns:
        [..., hidden + right] in x's dtype, contiguous.
    """
    return torch.nn.functional.pad(x, (0, right)).contiguous()


def fake(x: Tensor, right: int) -> Tensor:
    """Shape and dtype of `reference`."""
    return empty(x, (*x.shape[:-1], x.shape[-1] + right))


pad = define(
    "pad",
    "(Tensor x, int right) -> Tensor",
    reference=reference,
    fake=fake,
    samples=[sample_of((7, 320), lambda device: (192,), "+192"), sample_of((2, 3, 64), lambda device: (1,), "+1")],
)


def raise_pads(canonical: CanonicalGraph) -> None:
    """`constant_pad_nd(x, [0, n], 0)` -> `pad(x, n)`."""
    for node in canonical.calls(aten.constant_pad_nd.default):
        x, amounts, value = (*node.args, 0.0)[:3]
        if (
            str(value) in ("0", "0.0")  # minus zero is another value
            and list(amounts[:1]) == [0]
            and isinstance(amounts[1], int)
            and amounts[1] > 0
            and not any(amounts[2:])
        ):
            canonical.raise_op(pad, (x, amounts[1]), (node,))
        else:
            canonical.refuse(
                pad, [node], Reason.ATTRIBUTE,
                f"pad not recognised: it pads {list(amounts)} with {value}; fused ops append zeros to each row",
                node=node, place=node, expected="[0, n] with 0", found=f"{list(amounts)} with {value}",
            )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Padding(Tail):
    """A pad at a site. Eager PyTorch fills the whole output, then copies into a part of it.

    Attributes:
        padded: width after the pad.
    """

    padded: int

    name, yields_core = "pad", True

    @classmethod
    def stands_alone(cls, core: Middle) -> bool:
        """True behind any core."""
        return True

    def text(self, width: int) -> str:
        """`pad 2880:3072`"""
        return f"{self.name} {width}:{self.padded}"

    def fits(self, width: int) -> bool:
        """Whether rows get no narrower."""
        return self.padded >= width

    def result_bytes(self, region: Region) -> int:
        """Bytes of the padded rows."""
        return region.tokens * self.padded * region.itemsize

    def alone(self, clock: Clock, region: Region) -> tuple[Kernel, ...]:
        """One kernel, or two in eager PyTorch."""
        if not clock.is_eager:
            return super().alone(clock, region)
        return (clock.local("fill_", region.result_bytes), clock.strided_copy(2 * region.row_bytes))

    def eager(self, clock: Clock, region: Region) -> tuple[Kernel, ...]:
        """The same two kernels."""
        return self.alone(clock, region)


def _tail(node: fx.Node, core: fx.Node) -> Padding:
    right = node.args[1]
    assert isinstance(right, int)
    return Padding(padded=width_of(core) + right)


def _unpadded(padded: Any, arguments: Mapping[str, Any]) -> Any:
    return aten.slice.Tensor(padded, -1, 0, -arguments["right"])


KEEPS_ZERO = (
    *SCALES, convert_element_type, aten.abs.default, aten.gelu.default, aten.neg.default, aten.relu.default,
    aten.sign.default, aten.silu.default, aten.sin.default, aten.sqrt.default, aten.tanh.default,
)  # fmt: skip
"""Ops on one tensor and at most one number that map zero to zero, so they commute with a pad by zeros."""


def _hint(node: fx.Node, goal: fx.Node, consumer: fx.Node) -> str | None:
    if not is_call(node, *KEEPS_ZERO) or len(node.all_input_nodes) != 1:
        return None
    return f"do it after {pad.name}" if len(node.users) == 1 else None


PART = RowEpilogue(
    name="pad",
    kind=Kind.PADDING,
    ops=(pad,),
    parameters=("int right",),
    sample=lambda device: (192,),
    cores=frozenset({"rms_norm"}),
    raising=((Stage.EPILOGUES, raise_pads),),
    traffic=Padding,
    tail=_tail,
    core_of=_unpadded,
    hint=_hint,
)
