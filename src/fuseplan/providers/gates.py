"""The limits of a library's kernels: sizes, ranks and layouts, as data, with the source they were read from."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fuseplan.dialect import QuantRounding
from fuseplan.distributed.groups import elsewhere
from fuseplan.graph.facts import dtype_text, equal_size, group_size, is_dense
from fuseplan.providers.declared import Cost, checked_cost
from fuseplan.record import Reason, Refusal

Accepts = Callable[[Any], Refusal | None]


def accept_all(m: Any) -> Refusal | None:
    """The check of an implementation without limits beyond those of its op."""
    return None


@dataclass(frozen=True, kw_only=True)
class Offer:
    """One fused op of a provider: the arguments it accepts, and the rounding of its kernel.

    Attributes:
        accepts: a check of the arguments, which returns a refusal or None.
        roundings: the conventions that its kernel computes; None: any requested one.
        leaves_out: a value that every graph rounds, under any convention, and its kernel doesn't; such a kernel is used
            only where `allow_rounding_changes` is set.
        most_rows: the most rows of the first tensor that its workspace or its counters hold, for given arguments; None:
            any number. Where a graph may have more, the op is no candidate, unless its kernel was registered with the
            same limit (`dialect.implement(..., most_rows=)`) and leaves such calls to the reference.
        cost: the cost of a call, where the cost model doesn't know the provider; see `Cost`. None: not declared; the op
            isn't applied until it is measured, unless it is forced.

    Raises:
        ConfigError: the cost isn't a `Cost`.
    """

    accepts: Accepts = accept_all
    roundings: frozenset[str] | None = None
    leaves_out: str | None = None
    most_rows: Callable[[Any], int] | None = None
    cost: Cost | None = None

    def __post_init__(self) -> None:
        checked_cost(self.cost)

    def limits(self) -> tuple[str, ...]:
        """Its limits, for a person; empty: none beyond those of its op."""
        limits: tuple[str, ...] = getattr(self.accepts, "limits", tuple)()
        return (*limits, f"doesn't round {self.leaves_out}") if self.leaves_out else limits


@dataclass(frozen=True, kw_only=True)
class Gate:
    """A check of a fused op's arguments: a function of `Bindings` that returns a refusal or None.

    Attributes:
        name: the library's name, for a person.
        source: the code that it was read from, with the version.
        dtypes: dtypes of the activations; empty: any.
        row_bytes: the bytes of a row are a multiple of this.
        least_row_bytes: the least bytes of a row.
        most_row_bytes: the most bytes of a row; None: any number.
        ranks: sizes of the process groups it serves; empty: any, or it doesn't reduce.
        dense: whether the activations must be stored row after row.
        quant_rounding: the one way in which it applies a scale; None: any.
        quant_dtypes: dtypes of the codes; empty: any.
        min_scale: the least scale of a row, if it is built into the kernel.
        bounds_largest: whether it takes a bound on the largest element of a row (`scale_ub`).
    """

    name: str
    source: str
    dtypes: frozenset[torch.dtype] = frozenset()
    row_bytes: int = 1
    least_row_bytes: int = 0
    most_row_bytes: int | None = None
    ranks: frozenset[int] = frozenset()
    dense: bool = False
    quant_rounding: QuantRounding | None = None
    quant_dtypes: frozenset[torch.dtype] = frozenset()
    min_scale: float | None = None
    bounds_largest: bool = False

    def __call__(self, m: Any) -> Refusal | None:
        """Why the arguments are refused, or None."""
        return (
            self._quant(m)
            or self._dtype(m.x)
            or self.check_width(m.x, m)
            or self._group(m.values.get("group_name"))
            or self._layout(m.x)
        )

    def limits(self) -> tuple[str, ...]:
        """Its limits, for a person."""
        sizes = [f"a multiple of {self.row_bytes}"] if self.row_bytes > 1 else []
        sizes += [f"from {self.least_row_bytes}"] if self.least_row_bytes else []
        sizes += [f"up to {self.most_row_bytes}"] if self.most_row_bytes is not None else []
        limits = (
            listed(sorted(map(dtype_text, self.dtypes))) if self.dtypes else None,
            f"bytes of a row {', '.join(sizes)}" if sizes else None,
            f"{listed(list(map(str, sorted(self.ranks))))} ranks" if self.ranks else None,
            "contiguous" if self.dense else None,
            f"codes in {listed(sorted(map(dtype_text, self.quant_dtypes)))}" if self.quant_dtypes else None,
            self.quant_rounding.text if self.quant_rounding is not None else None,
            f"least scale {self.min_scale:.4g}" if self.min_scale is not None else None,
        )
        return tuple(each for each in limits if each is not None)

    def _quant(self, m: Any) -> Refusal | None:
        rounding, least = m.values.get("quant_rounding"), m.values.get("min_scale")
        if self.quant_rounding is not None and rounding not in (None, self.quant_rounding.value):
            return Refusal(
                reason=Reason.ROUNDING,
                detail=f"the kernel {self.quant_rounding.text}; the graph {QuantRounding(rounding).text}",
                expected=self.quant_rounding.value,
                found=str(rounding),
            )
        bounded = [name for name in ("max_scale", "zero_scale") if m.values.get(name)]
        bounded += ["scale_ub"] if m.values.get("scale_ub") is not None and not self.bounds_largest else []
        if self.quant_rounding is not None and bounded:
            detail = f"{self.name} has no {bounded[0]}, and the graph's scales do"
            return Refusal(reason=Reason.ATTRIBUTE, detail=detail, expected=f"no {bounded[0]}", found=f"a {bounded[0]}")
        if self.min_scale is not None and least is not None and not _equal_in_float32(least, self.min_scale):
            detail = f"the least scale of {self.name} is {self.min_scale:.6g}, and the graph's is {least:.6g}"
            return Refusal(
                reason=Reason.ATTRIBUTE, detail=detail, expected=f"a least scale of {self.min_scale:.6g}",
                found=f"{least:.6g}",
            )  # fmt: skip
        codes = m.values.get("dtype")
        if self.quant_dtypes and codes is not None and codes not in self.quant_dtypes:
            return self._other_dtype("codes", codes, self.quant_dtypes)
        return None

    def _dtype(self, x: Tensor) -> Refusal | None:
        return (
            self._other_dtype("activations", x.dtype, self.dtypes)
            if self.dtypes and x.dtype not in self.dtypes
            else None
        )

    def _other_dtype(self, what: str, found: torch.dtype, taken: frozenset[torch.dtype]) -> Refusal:
        names = listed(sorted(map(dtype_text, taken)))
        detail = f"{self.name} takes {what} in {names}, not in {dtype_text(found)}"
        return Refusal(reason=Reason.DTYPE, detail=detail, expected=f"{what} in {names}", found=dtype_text(found))

    def check_width(self, x: Tensor, m: Any) -> Refusal | None:
        """Why the hidden size of x is refused, or None."""
        width, itemsize = x.shape[-1], x.dtype.itemsize
        step = max(1, self._row_bytes(m) // itemsize)
        if not equal_size(width % step, 0):
            return self._size(f"that are multiples of {step}", f"a multiple of {step}", x)
        if isinstance(width, int) and width * itemsize < self.least_row_bytes:
            least = self.least_row_bytes // itemsize
            return self._size(f"from {least}", f"at least {least}", x)
        if self.most_row_bytes is not None and isinstance(width, int) and width * itemsize > self.most_row_bytes:
            most = self.most_row_bytes // itemsize
            return self._size(f"up to {most}", f"at most {most}", x)
        return None

    def _row_bytes(self, m: Any) -> int:
        """The divisor of a row's bytes, for given arguments."""
        return self.row_bytes

    def _size(self, taken: str, expected: str, x: Tensor) -> Refusal:
        width = x.shape[-1]
        return Refusal(
            reason=Reason.SIZE,
            detail=f"{self.name} takes hidden sizes {taken} in {dtype_text(x.dtype)}, not {width}",
            expected=f"hidden size {expected}", found=f"hidden size {width}",
            fix="let another provider run it",
        )  # fmt: skip

    def _group(self, name: str | None) -> Refusal | None:
        ranks = group_size(name) if name is not None else None
        if not self.ranks or name is None or ranks is None:
            return None
        if ranks in self.ranks:
            return self._machine(name)
        served = f"{listed(list(map(str, sorted(self.ranks))))} ranks"
        return Refusal(
            reason=Reason.GROUP, detail=f"{self.name} serves groups of {served}; group {name!r} has {ranks}",
            expected=served, found=f"{ranks} ranks",
        )  # fmt: skip

    def _machine(self, name: str) -> Refusal | None:
        """The refusal of a group whose ranks can't write to each other's memory, or None."""
        others = elsewhere(name)
        if not others:
            return None
        return Refusal(
            reason=Reason.GROUP,
            detail=f"{self.name} serves ranks of one machine; of group {name!r}, rank "
            f"{', '.join(map(str, others))} is on another one",
            expected="ranks of one machine", found="ranks of several machines",
            fix="give tensor parallelism a group within a machine",
        )  # fmt: skip

    def _layout(self, x: Tensor) -> Refusal | None:
        if not self.dense or is_dense(x):
            return None
        strides = tuple(x.stride())
        return Refusal(
            reason=Reason.LAYOUT,
            detail=f"{self.name} takes activations that lie row after row in memory; their strides are {strides}",
            expected="contiguous activations",
            found="another order of dimensions",
            fix="make them contiguous before, or reduce before they are transposed",
        )


@dataclass(frozen=True, kw_only=True)
class Unshared:
    """The check of a kernel whose ranks tried to share memory and couldn't.

    Attributes:
        why: the reason they found.
    """

    why: str

    def __call__(self, m: Any) -> Refusal | None:
        """Why the arguments are refused, unless the rank is the only one."""
        name = m.values.get("group_name")
        if name is not None and group_size(name) == 1:
            return None
        return Refusal(
            reason=Reason.GROUP, detail=f"the ranks of group {name!r} can't share memory: {self.why}",
            expected="ranks that reach each other's memory",
            fix="run the ranks of a group where they reach each other's memory",
        )  # fmt: skip


def _equal_in_float32(left: float, right: float) -> bool:
    return torch.tensor(left, dtype=torch.float32).equal(torch.tensor(right, dtype=torch.float32))


def listed(words: list[str]) -> str:
    """`2, 4 or 8`"""
    *others, last = words
    return f"{', '.join(others)} or {last}" if others else last
