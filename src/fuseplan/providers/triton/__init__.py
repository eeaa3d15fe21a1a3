"""fuseplan's own Triton kernels, a file a family with its launcher, and their epilogues, a file each. Importing this
needs no Triton; running kernels does.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from torch import Tensor

from fuseplan.dialect import (
    ACTIVATION_FAMILY,
    KEPT_ACTIVATION_FAMILY,
    KEPT_NORM_FAMILY,
    LINEAR_FAMILY,
    NORM_FAMILY,
    SCALED_LINEAR_FAMILY,
    DialectOp,
    Rounding,
    ScaledLayers,
    implement,
    ops,
    split_arguments,
)
from fuseplan.distributed.workspace import Workspace, workspace_of
from fuseplan.providers.attention import ROUNDINGS
from fuseplan.providers.gates import Accepts, Offer
from fuseplan.providers.operands import by_names
from fuseplan.providers.provider import Provider
from fuseplan.providers.timing import Timing
from fuseplan.providers.triton.checks import (
    FewNormedRows,
    FewQueries,
    FewRows,
    FewScaledRows,
    WrittenToken,
    accept_activation,
    accept_cached_rotary,
    accept_qk_norm_rope,
    collective_kernel,
    most_linear_rows,
    row_kernel,
)
from fuseplan.providers.triton.epilogues import SUFFIXES, epilogue_of
from fuseplan.providers.triton.replay import Direct, compile_ahead, needed_code, replayed


def rotated(m: Any) -> Any:
    """`ops.qk_norm_rope.reference` in one kernel, or, with caches, the reference of `ops.qk_norm_rope_cache` or
    `ops.rope_cache`, which writes the caches and yields the queries.
    """
    from fuseplan.providers.triton import cached_rotary, qk_norm_rope

    return (cached_rotary if "k_cache" in vars(m) else qk_norm_rope).launch(m)


def attended(m: Any) -> Tensor:
    """`parts.attention.op.attention_reference` or `parts.eager_attention.op.eager_attention_reference` with the keys
    split among programs. With caches, it first writes the key and the value of one token, as in
    `families.cached_attention`. `is_causal` is False; `rounding` of spelled-out attention is `float32`.
    """
    from fuseplan.providers.triton.attention import launch
    from fuseplan.providers.triton.cached_attention import Token

    own = vars(m)
    how = {"sinks": own.get("sinks"), "softcap": own.get("softcap")}
    if "k_cache" not in own:
        return launch(m.q, m.k, m.v, m.mask, m.scale, own.get("kernel"), **how)
    return launch(m.q, m.k_cache, m.v_cache, m.mask, m.scale, own.get("kernel"), **how, written=Token.of(m))


def linears(*arguments: Any) -> Any:
    """`parts.linear.linears_reference` in one kernel."""
    from fuseplan.providers.triton.linear import launch

    results = launch(*split_arguments(arguments))
    return results if len(results) > 1 else results[0]


def gated_linears(*arguments: Any) -> Tensor:
    """`families.linear.gated_reference` in one kernel."""
    from fuseplan.providers.triton.linear import launch

    return launch(*split_arguments(arguments[:-1]), arguments[-1])[0]


def halved_linear(x: Tensor, weight: Tensor, bias: Tensor | None, rounding: str) -> Tensor:
    """`families.linear.halved_reference` in one kernel."""
    from fuseplan.providers.triton.linear import launch

    biases = (None, None) if bias is None else bias.chunk(2)
    return launch(x, weight.chunk(2), biases, rounding)[0]


def linear_add_rms_norm(m: Any) -> tuple[Tensor, ...]:
    """`families.linear_norm.linear_add_rms_norm_reference` in two kernels. The second sums the parts that several
    programs computed of each tile of the layer.
    """
    from fuseplan.providers.triton.launching import Norm
    from fuseplan.providers.triton.linear import launch_normed

    norm = Norm(weight=m.norm_weight, eps=m.eps, rounding=Rounding(m.rounding))
    return launch_normed(m.x, m.weight0, m.bias0, m.residual, norm)


def scaled_linears(*arguments: Any) -> Any:
    """`parts.scaled_linear.scaled_linears_reference` in one kernel, or two."""
    from fuseplan.providers.triton.scaled_linear import launch

    results = launch(ScaledLayers.of(arguments))
    return results if len(results) > 1 else results[0]


def norm_kernel(op: DialectOp, suffix: str | None) -> Callable[..., Any]:
    """The kernel of a member of the norm family, with the member's own arguments."""
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
    """Turns a kernel with its group's workspace as last argument into one without, which looks the workspace up."""
    group, activations = names.index("group_name"), names.index("x")

    def its_workspace(*arguments: Any) -> Workspace:
        x = arguments[activations]
        return workspace_of(arguments[group], x.device, x.dtype)

    def run(*arguments: Any) -> Any:
        workspace = its_workspace(*arguments)
        with workspace.held():
            return kernel(*arguments, workspace)

    run.direct = functools.partial(Direct, workspace=its_workspace)  # type: ignore[attr-defined]
    return run


def activation_kernel(op: DialectOp, suffix: str) -> Callable[..., Any]:
    """The kernel of a member of the activation family, with the member's own arguments."""
    names, keeps = op.arguments, op in _KEPT_ACTIVATIONS

    def run(*arguments: Any) -> Any:
        from fuseplan.providers.triton.activation import launch

        own = dict(zip(names, arguments, strict=True))
        gate, up, rounding = own.pop("gate"), own.pop("up"), own.pop("rounding")
        results = launch(gate, up, rounding, epilogue_of(suffix)(**own), keeps=keeps)
        return results if len(results) > 1 else results[0]

    return replayed(run)


_ATTENTIONS = (
    ops.grouped_attention, ops.fused_attention, ops.rope_cached_attention, ops.rope_cached_eager_attention,
    ops.qk_norm_rope_cached_attention,
)  # fmt: skip
_EAGER_ATTENTIONS = (ops.fused_attention, ops.rope_cached_eager_attention)
_LINEARS = (*LINEAR_FAMILY, ops.merged_linear_silu_and_mul, ops.linear_silu_and_mul)
_FEW_ROWS = (*_LINEARS, *SCALED_LINEAR_FAMILY, ops.skinny_linear_add_rms_norm)
_PLAIN_NORMS, _KEPT_NORMS = (
    {op: suffix for (_, _, suffix), op in family.items() if suffix in SUFFIXES}
    for family in (NORM_FAMILY, KEPT_NORM_FAMILY)
)
_NORMS = {**_PLAIN_NORMS, **_KEPT_NORMS}
_PLAIN_ACTIVATIONS, _KEPT_ACTIVATIONS = (
    {op: suffix for suffix, op in family.items() if suffix in SUFFIXES}
    for family in (ACTIVATION_FAMILY, KEPT_ACTIVATION_FAMILY)
)
_ACTIVATIONS = {**_PLAIN_ACTIVATIONS, **_KEPT_ACTIVATIONS}

for _op in (ops.qk_norm_rope, ops.rope_cache, ops.qk_norm_rope_cache):
    implement(_op, "triton", replayed(by_names(_op, rotated)))
for _op in _ATTENTIONS:
    implement(_op, "triton", replayed(by_names(_op, attended)))
for _op in LINEAR_FAMILY:
    implement(_op, "triton", replayed(linears))
implement(ops.merged_linear_silu_and_mul, "triton", replayed(gated_linears))
implement(ops.linear_silu_and_mul, "triton", replayed(halved_linear))
_op = ops.skinny_linear_add_rms_norm
implement(_op, "triton", replayed(by_names(_op, linear_add_rms_norm)))
for _op in SCALED_LINEAR_FAMILY:
    implement(_op, "triton", replayed(scaled_linears))
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
    **{op.name: FewScaledRows() for op in SCALED_LINEAR_FAMILY},
    **{op.name: (collective_kernel if op.collective else row_kernel)(suffix) for op, suffix in _NORMS.items()},
    **{op.name: accept_activation(suffix) for op, suffix in _ACTIVATIONS.items()},
}
"""The check of each kernel's arguments, for all fused ops that this package implements."""

PROVIDER: Final = Provider(
    name="triton",
    description="fuseplan's own Triton kernels",
    vendors=frozenset({"nvidia", "amd"}),
    package="triton",
    install="pip install triton",
    implements={
        name: Offer(
            accepts=accepts,
            most_rows=most_linear_rows if ops[name] in _FEW_ROWS else None,
            roundings=ROUNDINGS if ops[name] in _EAGER_ATTENTIONS else None,
        )
        for name, accepts in ACCEPTS.items()
    },
    runs_alone=True,
    needs=needed_code,
    compile_ahead=compile_ahead,
    timing=Timing(heads="split"),
    untested="not run on AMD's GPUs so far, and its all-reduces on no more than four GPUs",
)
