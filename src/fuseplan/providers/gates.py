"""What a library's kernel takes: sizes, ranks and layouts, as data with the source they were read from."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from fuseplan.dialect import QuantRounding
from fuseplan.graph.facts import equal_size, group_size, is_dense
from fuseplan.record import Reason, Refusal

Accepts = Callable[[Any], Refusal | None]


@dataclass(frozen=True, kw_only=True)
class Gate:
    """A check of a fused op's arguments. As a function of `Bindings` it yields None, or why it refuses them.

    Attributes:
        name: of the library, for a person.
        source: which version of which code says so.
        row_bytes: a row's bytes are a multiple of this.
        most_row_bytes: and at most this.
        ranks: sizes of the process groups it serves; empty: any, or it doesn't reduce.
        dense: whether the activations must lie in memory row after row.
        multiplies_scale: whether it multiplies by the reciprocal of a static scale, in place of dividing by it.
    """

    name: str
    source: str
    row_bytes: int = 1
    most_row_bytes: int | None = None
    ranks: frozenset[int] = frozenset()
    dense: bool = False
    multiplies_scale: bool = False

    def __call__(self, m: Any) -> Refusal | None:
        """Why the arguments are refused, or None."""
        return (
            self._scale(m.values.get("quant_rounding"))
            or self._width(m.x)
            or self._group(m.values.get("group_name"))
            or self._layout(m.x)
        )

    def accept_rows(self, x: Tensor) -> Refusal | None:
        """Why rows of that width are refused, or None."""
        return self._width(x)

    def _scale(self, rounding: str | None) -> Refusal | None:
        if not self.multiplies_scale or rounding in (None, QuantRounding.MULTIPLY.value):
            return None
        return Refusal(
            reason=Reason.ROUNDING,
            detail="the kernel multiplies by the reciprocal of the scale; the graph divides by it",
            expected=QuantRounding.MULTIPLY.value,
            found=rounding,
        )

    def _width(self, x: Tensor) -> Refusal | None:
        width, itemsize = x.shape[-1], x.dtype.itemsize
        dtype = str(x.dtype).removeprefix("torch.")
        step, most = max(1, self.row_bytes // itemsize), self.most_row_bytes
        if not equal_size(width % step, 0):
            detail = f"{self.name} takes hidden sizes that are multiples of {step} in {dtype}, not {width}"
            return _size(detail, f"a multiple of {step}", width)
        if most is not None and isinstance(width, int) and width * itemsize > most:
            detail = f"{self.name} takes hidden sizes up to {most // itemsize} in {dtype}, not {width}"
            return _size(detail, f"at most {most // itemsize}", width)
        return None

    def _group(self, name: str | None) -> Refusal | None:
        ranks = group_size(name) if name is not None else None
        if not self.ranks or ranks is None or ranks in self.ranks:
            return None
        *others, last = map(str, sorted(self.ranks))
        detail = f"{self.name} serves groups of {', '.join(others)} or {last} ranks; group {name!r} has {ranks}"
        return Refusal(
            reason=Reason.GROUP, detail=detail, expected=f"{', '.join(others)} or {last} ranks", found=f"{ranks} ranks"
        )

    def _layout(self, x: Tensor) -> Refusal | None:
        if not self.dense or is_dense(x):
            return None
        strides = tuple(x.stride())
        return Refusal(
            reason=Reason.LAYOUT,
            detail=f"{self.name} takes activations that lie row after row in memory; their strides are {strides}",
            expected="contiguous activations",
            found="another order of dimensions",
            mend="make them contiguous before, or reduce before they are transposed",
        )


def _size(detail: str, expected: str, width: Any) -> Refusal:
    return Refusal(
        reason=Reason.SIZE, detail=detail, expected=f"hidden size {expected}", found=f"hidden size {width}",
        mend="pad the hidden size, or let another provider run it",
    )  # fmt: skip


def accept_all(m: Any) -> Refusal | None:
    """The check of an implementation that takes whatever its op takes."""
    return None


FLASHINFER_ALL_REDUCE = Gate(
    name="FlashInfer's all-reduce fusion",
    source="FlashInfer fb28d724 (2026-08-22), include/flashinfer/comm/trtllm_allreduce_fusion.cuh: hidden_dim is a "
    "multiple of 16 bytes, a token takes at most 8 blocks of 1024 threads of 16 bytes, nranks is 2, 4, 8 or 16",
    row_bytes=16,
    most_row_bytes=8 * 1024 * 16,
    ranks=frozenset({2, 4, 8, 16}),
    dense=True,
)
FLASHINFER_ALL_REDUCE_QUANT = replace(FLASHINFER_ALL_REDUCE, multiplies_scale=True)
