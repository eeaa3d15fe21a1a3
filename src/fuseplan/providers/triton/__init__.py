"""fuseplan's own Triton kernels, a file a family with its launcher. Importing this needs no Triton, running them
does.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final

from torch import Tensor

from fuseplan.dialect import ACTIVATION_FAMILY, NORM_FAMILY, Rounding, implement, ops
from fuseplan.distributed.workspace import workspace_of
from fuseplan.providers.gates import Accepts, Gate, Offer, accept_all
from fuseplan.providers.provider import Provider
from fuseplan.providers.timing import ONE_KERNEL
from fuseplan.record import Reason, Refusal

MOST_LEADING = 2
"""Dimensions before the heads that the kernel of `qk_norm_rope` steps through: [B, S] or [tokens]."""

MOST_ROW_BYTES = 2**17
"""Of a row that a program holds in registers: 128 elements of two bytes for each of 512 threads."""

ROW_KERNEL = Gate(
    name="fuseplan's Triton kernel", source="fuseplan.providers.triton.launching", most_row_bytes=MOST_ROW_BYTES
)
COLLECTIVE_KERNEL = Gate(
    name="fuseplan's Triton all-reduce", source="fuseplan.providers.triton.all_reduce_norm",
    most_row_bytes=MOST_ROW_BYTES, ranks=frozenset(range(1, 9)),
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


def accept_activation(m: Any) -> Refusal | None:
    """Why the kernel doesn't take the arguments, or None."""
    return accept_all(m) if "min_scale" not in m.values else ROW_KERNEL.check_width(m.gate, m)


def norm_kernel(reduce: bool, residual: bool, suffix: str | None) -> Callable[..., Any]:
    """The kernel of a member of the norm family, by the member's own arguments."""

    def kernel(x: Tensor, *arguments: Any) -> Any:
        from fuseplan.providers.triton import all_reduce_norm, norm
        from fuseplan.providers.triton.launching import Finish, Norm

        added = arguments[0] if residual else None
        weight, eps, rounding, *own = arguments[residual:]
        how = Norm(weight=weight, eps=eps, rounding=Rounding(rounding))
        if reduce:
            workspace = workspace_of(own.pop(), x.device, x.dtype)
            results = all_reduce_norm.launch(x, added, how, Finish.of(suffix, tuple(own)), workspace)
        else:
            results = norm.launch(x, added, how, Finish.of(suffix, tuple(own)))
        return results if len(results) > 1 else results[0]

    return kernel


def activation_kernel(suffix: str) -> Callable[..., Any]:
    """The kernel of a member of the activation family."""

    def kernel(gate: Tensor, up: Tensor, rounding: str, *own: Any) -> Any:
        from fuseplan.providers.triton.activation import launch
        from fuseplan.providers.triton.launching import Finish

        results = launch(gate, up, rounding, Finish.of(suffix, own))
        return results if len(results) > 1 else results[0]

    return kernel


implement(ops.qk_norm_rope, "triton", qk_norm_rope)
for _parts, _op in NORM_FAMILY.items():
    implement(_op, "triton", norm_kernel(*_parts))
for _suffix, _op in ACTIVATION_FAMILY.items():
    implement(_op, "triton", activation_kernel(_suffix))

ACCEPTS: Mapping[str, Accepts] = {
    ops.qk_norm_rope.name: accept_qk_norm_rope,
    **{op.name: COLLECTIVE_KERNEL if op.collective else ROW_KERNEL for op in NORM_FAMILY.values()},
    **{op.name: accept_activation for op in ACTIVATION_FAMILY.values()},
}
"""What each kernel takes, by fused op: all that this package implements."""

PROVIDER: Final = Provider(
    name="triton",
    description="fuseplan's own Triton kernels",
    vendors=frozenset({"nvidia", "amd"}),
    package="triton",
    install="pip install fuseplan[triton]",
    implements={name: Offer(accepts=accepts) for name, accepts in ACCEPTS.items()},
    runs_alone=True,
    timing=ONE_KERNEL,
    untested="not run on AMD's GPUs so far, and its all-reduces on no more than four GPUs",
)
