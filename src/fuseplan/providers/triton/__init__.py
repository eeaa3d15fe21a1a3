"""fuseplan's own Triton kernels, a file a family with its launcher, and their epilogues, a file each. Importing this
needs no Triton, running them does.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from fuseplan.dialect import (
    ACTIVATION_FAMILY,
    KEPT_NORM_FAMILY,
    LINEAR_FAMILY,
    NORM_FAMILY,
    DialectOp,
    RotaryRounding,
    Rounding,
    implement,
    ops,
    split_arguments,
)
from fuseplan.distributed.workspace import workspace_of
from fuseplan.graph.facts import dtype_text, equal_size
from fuseplan.providers.attention import ROUNDINGS
from fuseplan.providers.gates import Accepts, Gate, Offer, listed
from fuseplan.providers.provider import Provider
from fuseplan.providers.timing import Timing
from fuseplan.providers.triton.epilogues import SUFFIXES, epilogue_of
from fuseplan.providers.triton.replay import replayed
from fuseplan.record import Reason, Refusal

MOST_LEADING = 2
"""Dimensions before the heads that the kernel of `qk_norm_rope` steps through: [B, S] or [tokens]."""

MOST_ROW_BYTES = 2**17
"""Of a row that a program holds in registers: 128 elements of two bytes for each of 512 threads."""

MOST_QUERIES = 16
"""Query tokens that the attention kernel takes: beyond, it is no longer keys and values alone that cost."""

MOST_HEAD_DIM = 256
MOST_SOFTCAP = 10_000
NARROW_DTYPES = (torch.bfloat16, torch.float16)
_DTYPE_TEXTS = [*map(dtype_text, NARROW_DTYPES)]

MOST_LINEAR_ROWS = 32
"""Of the input of a linear layer: beyond, it is no longer weights alone that cost."""


@dataclass(frozen=True, kw_only=True)
class RowGate(Gate):
    """The check of a kernel that holds rows, and of its epilogue.

    Attributes:
        suffix: of the epilogue; None: there is none.
    """

    suffix: str | None

    def __call__(self, m: Any) -> Refusal | None:
        """Why the arguments are refused, or None."""
        return super().__call__(m) or epilogue_of(self.suffix).refuse(m.x, m)


def row_kernel(suffix: str | None) -> RowGate:
    """What the kernels of single ranks take, with that epilogue."""
    return RowGate(
        name="fuseplan's Triton kernel", source="fuseplan.providers.triton.launching", most_row_bytes=MOST_ROW_BYTES,
        suffix=suffix,
    )  # fmt: skip


def collective_kernel(suffix: str | None) -> RowGate:
    """What the all-reduces take, with that epilogue."""
    return RowGate(
        name="fuseplan's Triton all-reduce", source="fuseplan.providers.triton.all_reduce_norm",
        most_row_bytes=MOST_ROW_BYTES, ranks=frozenset(range(1, 9)), suffix=suffix,
    )  # fmt: skip


def qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float, rounding: str,
    rotary_rounding: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`families.rotary.qk_norm_rope_reference` in one kernel."""
    from fuseplan.providers.triton.qk_norm_rope import launch

    return launch(q, k, q_weight, k_weight, cos, sin, eps, rounding, rotary_rounding)


def accept_qk_norm_rope(m: Any) -> Refusal | None:
    """Why the kernel doesn't take the arguments, or None."""
    leading = m.q.dim() - 2
    if leading <= MOST_LEADING:
        return None
    detail = f"the kernel takes up to {MOST_LEADING} dimensions before the heads; q has {leading}"
    return m.refuse(Reason.SIZE, "q", detail, mend="flatten them")  # type: ignore[no-any-return]


def rope_cache(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, cos: Tensor, sin: Tensor, positions: Tensor,
    rotary_rounding: str,
) -> Tensor:  # fmt: skip
    """`parts.cached_rotary.op.rope_cache_reference` in one kernel, which writes the caches and yields the queries."""
    from fuseplan.providers.triton.cached_rotary import launch

    return launch(q, k, v, k_cache, v_cache, cos, sin, positions, rotary_rounding)


def qk_norm_rope_cache(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor,
    sin: Tensor, positions: Tensor, eps: float, rounding: str, rotary_rounding: str,
) -> Tensor:  # fmt: skip
    """`families.cached_rotary.qk_norm_rope_cache_reference` in one kernel, which writes the caches and yields the
    queries.
    """
    from fuseplan.providers.triton.cached_rotary import QkNorm, launch

    norm = QkNorm(q_weight=q_weight, k_weight=k_weight, eps=eps, rounding=Rounding(rounding))
    return launch(q, k, v, k_cache, v_cache, cos, sin, positions, rotary_rounding, norm)


def accept_cached_rotary(m: Any) -> Refusal | None:
    """Why the kernel doesn't take the arguments, or None."""
    most = MOST_ROW_BYTES // m.q.dtype.itemsize
    if max(m.q.shape[-1], m.v.shape[-1]) <= most:
        return None
    detail = f"the kernel takes heads of up to {most} elements; those of q have {m.q.shape[-1]}, of v {m.v.shape[-1]}"
    return m.refuse(Reason.SIZE, "q", detail)  # type: ignore[no-any-return]


def grouped_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, is_causal: bool, kernel: str
) -> Tensor:  # fmt: skip
    """`parts.attention.op.attention_reference` with the keys split among programs; `is_causal` is False."""
    from fuseplan.providers.triton.attention import launch

    return launch(q, k, v, mask, scale, kernel)


def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None, scale: float, softcap: float | None,
    rounding: str,
) -> Tensor:  # fmt: skip
    """`parts.eager_attention.op.eager_attention_reference`, keys split among programs; `rounding` is `float32`."""
    from fuseplan.providers.triton.attention import launch

    return launch(q, k, v, mask, scale, None, sinks=sinks, softcap=softcap)


def rope_cached_attention(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, cos: Tensor, sin: Tensor, positions: Tensor,
    rotary_rounding: str, mask: Tensor | None, scale: float, is_causal: bool, kernel: str,
) -> Tensor:  # fmt: skip
    """`families.cached_attention.rope_cached_attention_reference` of one token, which writes the caches and yields what
    is attended; `is_causal` is False.
    """
    from fuseplan.providers.triton.attention import launch
    from fuseplan.providers.triton.cached_attention import Token

    rounding = RotaryRounding(rotary_rounding)
    token = Token(k=k, v=v, cos=cos, sin=sin, positions=positions, rotary_rounding=rounding)
    return launch(q, k_cache, v_cache, mask, scale, kernel, written=token)


def rope_cached_eager_attention(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, cos: Tensor, sin: Tensor, positions: Tensor,
    rotary_rounding: str, mask: Tensor | None, sinks: Tensor | None, scale: float, softcap: float | None, rounding: str,
) -> Tensor:  # fmt: skip
    """`families.cached_attention.rope_cached_eager_attention_reference`, likewise; `rounding` is `float32`."""
    from fuseplan.providers.triton.attention import launch
    from fuseplan.providers.triton.cached_attention import Token

    how = RotaryRounding(rotary_rounding)
    token = Token(k=k, v=v, cos=cos, sin=sin, positions=positions, rotary_rounding=how)
    return launch(q, k_cache, v_cache, mask, scale, None, sinks=sinks, softcap=softcap, written=token)


def qk_norm_rope_cached_attention(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor,
    sin: Tensor, positions: Tensor, eps: float, rounding: str, rotary_rounding: str, mask: Tensor | None, scale: float,
    is_causal: bool, kernel: str,
) -> Tensor:  # fmt: skip
    """`families.cached_attention.qk_norm_rope_cached_attention_reference`, likewise."""
    from fuseplan.providers.triton.attention import launch
    from fuseplan.providers.triton.cached_attention import Token
    from fuseplan.providers.triton.cached_rotary import QkNorm

    norm = QkNorm(q_weight=q_weight, k_weight=k_weight, eps=eps, rounding=Rounding(rounding))
    token = Token(
        k=k, v=v, cos=cos, sin=sin, positions=positions, rotary_rounding=RotaryRounding(rotary_rounding), norm=norm
    )
    return launch(q, k_cache, v_cache, mask, scale, kernel, written=token)


def linears(*arguments: Any) -> Any:
    """`parts.linear.linears_reference` in one kernel."""
    from fuseplan.providers.triton.linear import launch

    results = launch(*split_arguments(arguments))
    return results if len(results) > 1 else results[0]


def gated_linears(*arguments: Any) -> Tensor:
    """`families.linear.gated_reference` in one kernel."""
    from fuseplan.providers.triton.linear import launch

    return launch(*split_arguments(arguments[:-1]), arguments[-1])[0]


def linear_add_rms_norm(
    x: Tensor, weight0: Tensor, bias0: Tensor | None, residual: Tensor, norm_weight: Tensor, eps: float, rounding: str
) -> tuple[Tensor, ...]:
    """`families.linear_norm.linear_add_rms_norm_reference` in two kernels, of which the second adds up what several
    programs made of each tile of the layer.
    """
    from fuseplan.providers.triton.launching import Norm
    from fuseplan.providers.triton.linear import launch_normed

    norm = Norm(weight=norm_weight, eps=eps, rounding=Rounding(rounding))
    return launch_normed(x, weight0, bias0, residual, norm)


def most_linear_rows(m: Any) -> int:
    """Rows that the kernel of linear layers takes."""
    return MOST_LINEAR_ROWS


@dataclass(frozen=True)
class FewRows:
    """The check of linear layers of few rows."""

    def __call__(self, m: Any) -> Refusal | None:
        """Why the kernel doesn't take the arguments, or None."""
        if m.x.dtype not in NARROW_DTYPES:
            detail = f"the kernel takes {' and '.join(_DTYPE_TEXTS)}; x is {dtype_text(m.x.dtype)}"
            return m.refuse(Reason.DTYPE, "x", detail)  # type: ignore[no-any-return]
        weights = [name for name in m.values if name.startswith("weight")]
        for name in weights:
            weight = getattr(m, name)
            if weight.stride(1) != 1 and not equal_size(weight.shape[1], 1):
                detail = f"the kernel reads rows of weights; those of {name} lie apart: strides {weight.stride()}"
                return m.refuse(Reason.LAYOUT, name, detail, mend="make the weight contiguous")  # type: ignore[no-any-return]
            if not all(isinstance(size, int) for size in weight.shape):
                detail = f"the size of {name} isn't known when the graph is compiled"
                return m.refuse(Reason.SIZE, name, detail)  # type: ignore[no-any-return]
        return None

    def limits(self) -> tuple[str, ...]:
        """What it takes, for a person."""
        return listed(_DTYPE_TEXTS), f"up to {MOST_LINEAR_ROWS} rows"


class FewNormedRows(FewRows):
    """The same with a norm behind it, whose kernel holds rows."""

    def __call__(self, m: Any) -> Refusal | None:
        """Why the kernels don't take the arguments, or None."""
        return super().__call__(m) or row_kernel(None).check_width(m.residual, m)


@dataclass(frozen=True)
class FewQueries:
    """The check of attention whose keys are split.

    Attributes:
        names_kernel: whether the op names a kernel of torch's, as whose its result lies in memory.
        most: query tokens.
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
            return m.refuse(Reason.ATTRIBUTE, "is_causal", detail, mend="hand over a mask")  # type: ignore[no-any-return]
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
        """What it takes, for a person."""
        return listed(_DTYPE_TEXTS), self._most, f"heads of up to {MOST_HEAD_DIM} elements"


class WrittenToken(FewQueries):
    """The check of attention that writes the token that asks into the caches first: `q` may be tokens before heads."""

    def _queries(self, m: Any) -> Any:
        return m.positions.shape[0]


def accept_activation(suffix: str) -> Accepts:
    """What the kernel of a member of the activation family takes: programs share a row, unless its epilogue forbids."""
    gate = row_kernel(suffix)

    def accept(m: Any) -> Refusal | None:
        epilogue = epilogue_of(suffix)
        refusal = gate.check_width(m.gate, m) if epilogue.whole_row else None
        return refusal or epilogue.refuse(m.gate, m)

    return accept


def norm_kernel(op: DialectOp, suffix: str | None) -> Callable[..., Any]:
    """The kernel of a member of the norm family, by the member's own arguments."""
    names, keeps = op.arguments, op in _KEPT_NORMS

    def run(*arguments: Any) -> Any:
        from fuseplan.providers.triton import all_reduce_norm, norm
        from fuseplan.providers.triton.launching import Norm

        own = dict(zip(names, arguments, strict=False))
        x, residual = own.pop("x"), own.pop("residual", None)
        how = Norm(weight=own.pop("weight"), eps=own.pop("eps"), rounding=Rounding(own.pop("rounding")))
        if own.pop("group_name", None) is None:
            results = norm.launch(x, residual, how, epilogue_of(suffix)(**own), keeps=keeps)
        else:
            epilogue = epilogue_of(suffix)(**own)
            results = all_reduce_norm.launch(x, residual, how, epilogue, arguments[-1], keeps=keeps)
        return results if len(results) > 1 else results[0]

    kernel = replayed(run)
    return in_workspace(kernel, names) if op.collective else kernel


def in_workspace(kernel: Callable[..., Any], names: Sequence[str]) -> Callable[..., Any]:
    """A kernel that takes the workspace of its group behind its other arguments, as one that takes these alone."""
    group, activations = names.index("group_name"), names.index("x")

    def run(*arguments: Any) -> Any:
        x = arguments[activations]
        workspace = workspace_of(arguments[group], x.device, x.dtype)
        with workspace.held():
            return kernel(*arguments, workspace)

    return run


def activation_kernel(op: DialectOp, suffix: str) -> Callable[..., Any]:
    """The kernel of a member of the activation family, by the member's own arguments."""
    names = op.arguments

    def run(*arguments: Any) -> Any:
        from fuseplan.providers.triton.activation import launch

        own = dict(zip(names, arguments, strict=True))
        gate, up, rounding = own.pop("gate"), own.pop("up"), own.pop("rounding")
        results = launch(gate, up, rounding, epilogue_of(suffix)(**own))
        return results if len(results) > 1 else results[0]

    return replayed(run)


_EAGER_ATTENTIONS = (ops.fused_attention, ops.rope_cached_eager_attention)
_LINEARS = (*LINEAR_FAMILY, ops.merged_linear_silu_and_mul)
_FEW_ROWS = (*_LINEARS, ops.skinny_linear_add_rms_norm)
_PLAIN_NORMS, _KEPT_NORMS = (
    {op: suffix for (_, _, suffix), op in family.items() if suffix in SUFFIXES}
    for family in (NORM_FAMILY, KEPT_NORM_FAMILY)
)
_NORMS = {**_PLAIN_NORMS, **_KEPT_NORMS}
_ACTIVATIONS = {op: suffix for suffix, op in ACTIVATION_FAMILY.items() if suffix in SUFFIXES}

implement(ops.qk_norm_rope, "triton", replayed(qk_norm_rope))
implement(ops.rope_cache, "triton", replayed(rope_cache))
implement(ops.qk_norm_rope_cache, "triton", replayed(qk_norm_rope_cache))
implement(ops.grouped_attention, "triton", replayed(grouped_attention))
implement(ops.fused_attention, "triton", replayed(fused_attention))
implement(ops.rope_cached_attention, "triton", replayed(rope_cached_attention))
implement(ops.rope_cached_eager_attention, "triton", replayed(rope_cached_eager_attention))
implement(ops.qk_norm_rope_cached_attention, "triton", replayed(qk_norm_rope_cached_attention))
for _op in LINEAR_FAMILY:
    implement(_op, "triton", replayed(linears))
implement(ops.merged_linear_silu_and_mul, "triton", replayed(gated_linears))
implement(ops.skinny_linear_add_rms_norm, "triton", replayed(linear_add_rms_norm))
for _op, _suffix in _NORMS.items():
    implement(_op, "triton", norm_kernel(_op, _suffix))
for _op, _own_suffix in _ACTIVATIONS.items():
    implement(_op, "triton", activation_kernel(_op, _own_suffix))

ACCEPTS: Mapping[str, Accepts] = {
    ops.qk_norm_rope.name: accept_qk_norm_rope,
    ops.rope_cache.name: accept_cached_rotary,
    ops.qk_norm_rope_cache.name: accept_cached_rotary,
    ops.grouped_attention.name: FewQueries(),
    ops.fused_attention.name: FewQueries(names_kernel=False),
    ops.rope_cached_attention.name: WrittenToken(most=1),
    ops.rope_cached_eager_attention.name: WrittenToken(names_kernel=False, most=1),
    ops.qk_norm_rope_cached_attention.name: WrittenToken(most=1),
    **{op.name: FewRows() for op in _LINEARS},
    ops.skinny_linear_add_rms_norm.name: FewNormedRows(),
    **{op.name: (collective_kernel if op.collective else row_kernel)(suffix) for op, suffix in _NORMS.items()},
    **{op.name: accept_activation(suffix) for op, suffix in _ACTIVATIONS.items()},
}
"""What each kernel takes, by fused op: all that this package implements."""

PROVIDER: Final = Provider(
    name="triton",
    description="fuseplan's own Triton kernels",
    vendors=frozenset({"nvidia", "amd"}),
    package="triton",
    install="pip install fuseplan[triton]",
    implements={
        name: Offer(
            accepts=accepts,
            most_rows=most_linear_rows if ops[name] in _FEW_ROWS else None,
            roundings=ROUNDINGS if ops[name] in _EAGER_ATTENTIONS else None,
        )
        for name, accepts in ACCEPTS.items()
    },
    runs_alone=True,
    timing=Timing(heads="split"),
    untested="not run on AMD's GPUs so far, and its all-reduces on no more than four GPUs",
)
