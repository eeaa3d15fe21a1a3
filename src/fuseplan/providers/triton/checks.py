"""Checks of the kernels' arguments: dtypes, sizes and layouts."""

from dataclasses import dataclass
from typing import Any

import torch

from fuseplan.graph.facts import dtype_text, equal_size
from fuseplan.providers.gates import Accepts, Gate, listed
from fuseplan.providers.triton.epilogues import epilogue_of
from fuseplan.record import Reason, Refusal

MOST_LEADING = 2
"""Dimensions before the heads that the kernel of `qk_norm_rope` steps through: [B, S] or [tokens]."""

MOST_ROW_BYTES = 2**17
"""The most bytes of a row that a program holds in registers: 128 elements of two bytes for each of 512 threads."""

MOST_QUERIES = 16
"""The most query tokens of the attention kernel: beyond, keys and values are no longer the only cost."""

MOST_HEAD_DIM = 256
MOST_SOFTCAP = 10_000
NARROW_DTYPES = (torch.bfloat16, torch.float16)
_DTYPE_TEXTS = [*map(dtype_text, NARROW_DTYPES)]

MOST_LINEAR_ROWS = 32
"""The most input rows of a linear layer: beyond, weights are no longer the only cost."""
SCALED_UNIT = 16
"""Codes of a row that are read together."""
LEAST_CAPABILITY = (9, 0)
"""The compute capability from which tensor cores take fp8 from shared memory."""
_SINCE = "of compute capability {}.{} and newer".format(*LEAST_CAPABILITY)


@dataclass(frozen=True, kw_only=True)
class RowGate(Gate):
    """The check of a kernel that holds rows, and of its epilogue.

    Attributes:
        suffix: the epilogue's suffix; None: no epilogue.
    """

    suffix: str | None

    def __call__(self, m: Any) -> Refusal | None:
        """Why the arguments are refused, or None."""
        return super().__call__(m) or epilogue_of(self.suffix).refuse(m.x, m)


def row_kernel(suffix: str | None) -> RowGate:
    """The check of kernels on single ranks, with this epilogue."""
    return RowGate(
        name="fuseplan's Triton kernel", source="fuseplan.providers.triton.launching", most_row_bytes=MOST_ROW_BYTES,
        suffix=suffix,
    )  # fmt: skip


def collective_kernel(suffix: str | None) -> RowGate:
    """The check of the all-reduces, with this epilogue."""
    return RowGate(
        name="fuseplan's Triton all-reduce", source="fuseplan.providers.triton.all_reduce_norm",
        most_row_bytes=MOST_ROW_BYTES, ranks=frozenset(range(1, 9)), suffix=suffix,
    )  # fmt: skip


def accept_qk_norm_rope(m: Any) -> Refusal | None:
    """Why the kernel doesn't take the arguments, or None."""
    leading = m.q.dim() - 2
    if leading <= MOST_LEADING:
        return None
    detail = f"the kernel takes up to {MOST_LEADING} dimensions before the heads; q has {leading}"
    return m.refuse(Reason.SIZE, "q", detail, fix="flatten them")  # type: ignore[no-any-return]


def accept_cached_rotary(m: Any) -> Refusal | None:
    """Why the kernel doesn't take the arguments, or None."""
    most = MOST_ROW_BYTES // m.q.dtype.itemsize
    if max(m.q.shape[-1], m.v.shape[-1]) <= most:
        return None
    detail = f"the kernel takes heads of up to {most} elements; those of q have {m.q.shape[-1]}, of v {m.v.shape[-1]}"
    return m.refuse(Reason.SIZE, "q", detail)  # type: ignore[no-any-return]


def most_linear_rows(m: Any) -> int:
    """The most rows of the kernel of linear layers."""
    return MOST_LINEAR_ROWS


@dataclass(frozen=True)
class FewRows:
    """The check of linear layers of few rows.

    Attributes:
        dtypes: supported dtypes of x.
    """

    dtypes: tuple[torch.dtype, ...] = NARROW_DTYPES

    def __call__(self, m: Any) -> Refusal | None:
        """Why the kernel doesn't take the arguments, or None."""
        if m.x.dtype not in self.dtypes:
            detail = f"the kernel takes {' and '.join(map(dtype_text, self.dtypes))}; x is {dtype_text(m.x.dtype)}"
            return m.refuse(Reason.DTYPE, "x", detail)  # type: ignore[no-any-return]
        weights = [name for name in m.values if name.startswith("weight")]
        for name in weights:
            weight = getattr(m, name)
            if weight.stride(1) != 1 and not equal_size(weight.shape[1], 1):
                detail = f"the kernel reads rows of weights; those of {name} lie apart: strides {weight.stride()}"
                return m.refuse(Reason.LAYOUT, name, detail, fix="make the weight contiguous")  # type: ignore[no-any-return]
            if not all(isinstance(size, int) for size in weight.shape):
                detail = f"the size of {name} isn't known when the graph is compiled"
                return m.refuse(Reason.SIZE, name, detail)  # type: ignore[no-any-return]
        return None

    def limits(self) -> tuple[str, ...]:
        """Its limits, for a person."""
        return listed([*map(dtype_text, self.dtypes)]), f"up to {MOST_LINEAR_ROWS} rows"


class FewNormedRows(FewRows):
    """The check of such layers with a norm behind them; the norm's kernel holds rows."""

    def __call__(self, m: Any) -> Refusal | None:
        """Why the kernels don't take the arguments, or None."""
        return super().__call__(m) or row_kernel(None).check_width(m.residual, m)


class FewScaledRows(FewRows):
    """The check of linear layers in fp8 with row-wise scales."""

    def __init__(self) -> None:
        super().__init__(dtypes=(torch.float8_e4m3fn,))

    def __call__(self, m: Any) -> Refusal | None:
        """Why the kernel doesn't take the arguments, or None."""
        return super().__call__(m) or self._device(m) or self._width(m)

    def limits(self) -> tuple[str, ...]:
        """Its limits, for a person."""
        return *super().limits(), f"widths that are multiples of {SCALED_UNIT}", f"NVIDIA's GPUs {_SINCE}"

    def _device(self, m: Any) -> Refusal | None:
        if m.x.device.type != "cuda" or not torch.cuda.is_available():
            return None  # interpreted, or planned for a device that isn't here
        if torch.version.hip is not None:
            found = "this is one of AMD's"
        elif torch.cuda.get_device_capability(m.x.device) < LEAST_CAPABILITY:
            found = "this one has {}.{}".format(*torch.cuda.get_device_capability(m.x.device))
        else:
            return None
        detail = f"the kernel is for the tensor cores of NVIDIA's GPUs {_SINCE}; {found}"
        return m.refuse(Reason.PROVIDER, "x", detail)  # type: ignore[no-any-return]

    def _width(self, m: Any) -> Refusal | None:
        width = m.x.shape[-1]
        if equal_size(width % SCALED_UNIT, 0):
            return None
        detail = f"the kernel takes widths that are multiples of {SCALED_UNIT}, as tensor cores do; x has {width}"
        return m.refuse(Reason.SIZE, "x", detail)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class FewQueries:
    """The check of attention with split keys.

    Attributes:
        names_kernel: whether the op names a kernel of torch that determines the layout of its result.
        most: the most query tokens.
    """

    names_kernel: bool = True
    most: int = MOST_QUERIES

    def __call__(self, m: Any) -> Refusal | None:
        """Why the kernel doesn't take the arguments, or None."""
        queries, widths = self._queries(m), (m.q.shape[3], m.v.shape[3])
        if m.q.dtype not in NARROW_DTYPES:
            detail = f"the kernel takes {' and '.join(_DTYPE_TEXTS)}; q is {dtype_text(m.q.dtype)}"
            return m.refuse(Reason.DTYPE, "q", detail)  # type: ignore[no-any-return]
        if not isinstance(queries, int) or queries > self.most:
            found = queries if isinstance(queries, int) else "a number of them that isn't known when it is compiled"
            detail = f"the kernel takes {self._most}; q has {found}"
            return m.refuse(Reason.SIZE, "q", detail)  # type: ignore[no-any-return]
        if any(not isinstance(width, int) or width > MOST_HEAD_DIM for width in widths):
            found = f"those of q have {widths[0]}, of v {widths[1]}"
            detail = f"the kernel takes heads of up to {MOST_HEAD_DIM} elements; {found}"
            return m.refuse(Reason.SIZE, "q", detail)  # type: ignore[no-any-return]
        softcap = m.values.get("softcap")
        if softcap is not None and softcap > MOST_SOFTCAP:
            detail = (
                f"beyond a cap of {MOST_SOFTCAP:,} the kernel's float32 doesn't tell scores apart; it is {softcap:g}"
            )
            return m.refuse(Reason.ATTRIBUTE, "softcap", detail)  # type: ignore[no-any-return]
        return self._kernel(m, widths) if self.names_kernel else None

    def _kernel(self, m: Any, widths: tuple[Any, Any]) -> Refusal | None:
        if m.is_causal:
            detail = "the kernel takes a mask, or none, and is_causal=False"
            return m.refuse(Reason.ATTRIBUTE, "is_causal", detail, fix="hand over a mask")  # type: ignore[no-any-return]
        if widths[0] != widths[1] and m.kernel != "efficient":
            detail = (
                f"heads of q have {widths[0]} elements, of v {widths[1]}: of torch's kernels memory-efficient "
                "attention alone says how such a result lies in memory"
            )
            return m.refuse(Reason.SIZE, "v", detail)  # type: ignore[no-any-return]
        if m.kernel == "overrideable":
            detail = "the kernel of a device outside of torch: how its result lies in memory isn't known"
            return m.refuse(Reason.PROVIDER, "kernel", detail)  # type: ignore[no-any-return]
        return None

    @property
    def _most(self) -> str:
        return f"up to {self.most} query tokens" if self.most > 1 else "one query token"

    def _queries(self, m: Any) -> Any:
        return m.q.shape[2]

    def limits(self) -> tuple[str, ...]:
        """Its limits, for a person."""
        return listed(_DTYPE_TEXTS), self._most, f"heads of up to {MOST_HEAD_DIM} elements"


class WrittenToken(FewQueries):
    """The check of attention that first writes the query's token into the caches: `q` may have tokens before heads."""

    def _queries(self, m: Any) -> Any:
        return m.positions.shape[0]


def accept_activation(suffix: str) -> Accepts:
    """The check of a member of the activation family: programs share a row, unless its epilogue requires whole rows."""
    gate = row_kernel(suffix)

    def accept(m: Any) -> Refusal | None:
        epilogue = epilogue_of(suffix)
        refusal = gate.check_width(m.gate, m) if epilogue.whole_row else None
        return refusal or epilogue.refuse(m.gate, m)

    return accept
