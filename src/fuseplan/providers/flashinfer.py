"""FlashInfer's all-reduce fusion, and its RMSNorm with fp8 quantisation. Importing this needs no FlashInfer.

Read from flashinfer-python 0.6.11.post2, 0.6.18.post1 and 0.7.2.post1:

- `flashinfer.comm.allreduce_fusion`, backend `trtllm` (comm/trtllm_allreduce_fusion.cuh). The sum over ranks is taken
  in float32 (`fp32_acc`) and rounded to the activations' dtype, and so is the residual sum. Its norm is multiplied by
  the weight in float32 and rounded once: `gpt_oss`, and `gemma` with `weight_bias=1`. A static scale is applied by its
  reciprocal, a dynamic one by division; both quantise the rounded norm. The residual is only read; the sum is written
  elsewhere. Up to a size that the library chooses, every rank sends its rows to every other (one-shot); beyond it, each
  rank reduces its share and passes it on (two-shot).
- `flashinfer.norm.rmsnorm_quant` and `fused_add_rmsnorm_quant` (include/flashinfer/norm.cuh, and norm/kernels where
  nvidia-cutlass-dsl is installed): the norm isn't rounded before it is quantised, nor the residual sum before it is
  normalised. The sum is written over the residual, so the residual is copied first.

Not used: `rmsnorm`, `fused_add_rmsnorm` and the `gemma_` variants, since no fused op is a norm alone; the backend
`mnnvl`, which needs NVLink multicast; the patterns with fp4 or grouped scales, which no fused op has; attention, which
takes lengths, or bits for one row, where `grouped_attention` adds a mask to the scores.
"""

import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.torch_version import TorchVersion

from fuseplan.dialect import DialectOp, QuantRounding, Rounding, implement, ops
from fuseplan.distributed.shared import SHARED, Kind
from fuseplan.graph.facts import group_size
from fuseplan.providers.gates import Gate, Offer
from fuseplan.providers.operands import ACCESS_BYTES, aligned, by_names, rows_of
from fuseplan.providers.provider import Provider
from fuseplan.providers.timing import Timing
from fuseplan.record import Reason, Refusal

OLDEST = "0.6.11"
"""The oldest release that the calls are checked against; vLLM 0.22 pins 0.6.11.post2."""

WEIGHT_BIAS_FROM = "0.6.12"
"""The first release whose all-reduce fusion multiplies by 1 + weight."""

DYNAMIC_FROM = "0.6.15"
"""The first release with a scale a row, and whose all-reduce fusion reduces over warps of fewer than 32 threads."""

EARLY_LAUNCH_FROM = "0.7.1"
"""The first release whose all-reduce fusion waits for the preceding kernel before it reads the residual. In an older
one, a kernel launched early (programmatic dependent launch) can read a residual that isn't written yet.
"""

BLOCK_THREADS = 1024
CLUSTER_BLOCKS = 8
"""The most threads of a block, and the most blocks that share a row; a thread loads `kBytesPerAccess`, 16."""

LEAST_THREADS, WARP = 128, 32
"""The least threads of a block that shares a row with others, and the threads of a warp."""

COUNTED_BYTES = 2**30
"""The kernels compute twice the bytes of all ranks' messages in 32 bits, with a sign."""

MIN_SCALE = 1 / (448 * 512)
"""`kDynamicFP8MinScale`."""


def _release(workspace: Any) -> None:
    comm = importlib.import_module("flashinfer.comm")
    # `destroy` alone keeps the memory in the library's own list of workspaces.
    comm.trtllm_destroy_ipc_workspace_for_all_reduce_fusion(workspace.ipc_handles)
    workspace.destroy()


_WORKSPACES: Final[Kind[Any]] = Kind(name="FlashInfer's all-reduce fusion", release=_release)


def all_reduce_norm(m: Any) -> tuple[Tensor, Tensor]:
    """residual_out = sum_ranks(x) + residual;  y = rms_norm(residual_out) * weight        in one kernel

    Equals `ops.all_reduce_fused_add_rms_norm` under the roundings `gpt_oss` and `gemma`. The kernel's waits for other
    ranks have no deadline.

    Args:
        m: x [..., hidden], float16 or bfloat16, equal shapes on all ranks; residual of x's shape and dtype; weight
            [hidden] in x's dtype; group_name of a process group of 2, 4 or 8 ranks on one node.

    Returns:
        (y, residual_out), both [..., hidden], contiguous, in x's dtype.

    Raises:
        CollectiveError: more rows than the kernels can count, or no workspace when a CUDA graph is captured.
    """
    y, total = m.x.new_empty(m.x.shape), m.x.new_empty(m.x.shape)
    _all_reduce_fusion("kARResidualRMSNorm", m, total, norm_out=rows_of(y))
    return y, total


def all_reduce_static(m: Any) -> tuple[Tensor, Tensor]:
    """`all_reduce_norm`, and q = clamp(y * (1 / scale), -448, 448).to(float8_e4m3fn).

    Equals `ops.all_reduce_fused_add_rms_norm_static_fp8_quant` with multiplication by the scale, one float32 element.

    Args:
        m: as for `all_reduce_norm`; scale; quant_rounding `multiply`.

    Returns:
        (q, residual_out), both [..., hidden], contiguous.

    Raises:
        CollectiveError: as for `all_reduce_norm`.
    """
    q, total = m.x.new_empty(m.x.shape, dtype=m.dtype), m.x.new_empty(m.x.shape)
    _all_reduce_fusion("kARResidualRMSNormFP8Quant", m, total, quant_out=rows_of(q), scale_factor=m.scale)
    return q, total


def all_reduce_dynamic(m: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`all_reduce_norm`, and scale = max(amax(|y|, -1) / 448, min_scale)
    q = clamp(y / scale, -448, 448).to(float8_e4m3fn).

    Equals `ops.all_reduce_fused_add_rms_norm_dynamic_fp8_quant` with division by the scale.

    Args:
        m: as for `all_reduce_norm`; min_scale 1 / (448 * 512), which is built into the kernel; no other bound on
            scales; quant_rounding `divide`.

    Returns:
        (q, scale, residual_out): [..., hidden], [..., 1] in float32 and [..., hidden], contiguous.

    Raises:
        CollectiveError: as for `all_reduce_norm`.
    """
    q, total = m.x.new_empty(m.x.shape, dtype=m.dtype), m.x.new_empty(m.x.shape)
    scale = m.x.new_empty((*m.x.shape[:-1], 1), dtype=torch.float32)
    results = {"quant_out": rows_of(q), "scale_out": rows_of(scale)}
    _all_reduce_fusion("kARResidualRMSNormDynamicFP8Quant", m, total, **results)
    return q, scale, total


def _all_reduce_fusion(pattern: str, m: Any, residual_out: Tensor, **results: Any) -> None:
    x, group_name = m.x, m.group_name
    rows, hidden = x.shape[:-1].numel(), x.shape[-1]
    if rows == 0:
        return
    library = importlib.import_module("flashinfer")
    comm = importlib.import_module("flashinfer.comm")

    ranks = group_size(group_name)
    assert ranks is not None, group_name
    most = _most_rows(hidden, x.dtype, ranks)
    _WORKSPACES.require(rows, most, group_name)
    capacity = min(most, 1 << (rows - 1).bit_length())

    def make(group: dist.ProcessGroup) -> Any:
        with torch.cuda.device_of(x):
            return comm.create_allreduce_fusion_workspace(
                backend="trtllm", world_size=group.size(), rank=dist.get_rank(group), max_token_num=capacity,
                hidden_dim=hidden, dtype=x.dtype, group=group,
            )  # fmt: skip

    workspace = SHARED.get(
        _WORKSPACES, group_name, (x.device, x.dtype, hidden), rows=rows, capacity=capacity, make=make
    )
    comm.allreduce_fusion(
        input=aligned(rows_of(x)), workspace=workspace, pattern=getattr(comm.AllReduceFusionPattern, pattern),
        launch_with_pdl=TorchVersion(library.__version__) >= EARLY_LAUNCH_FROM, residual_out=rows_of(residual_out),
        residual_in=aligned(rows_of(m.residual)), rms_gamma=aligned(m.weight.contiguous()), rms_eps=m.eps,
        fp32_acc=True, **({"weight_bias": 1.0} if Rounding(m.rounding).adds_one else {}), **results,
    )  # fmt: skip


def norm_static(m: Any) -> Any:
    """[residual_out = x + residual]
    q = clamp(rms_norm(x [+ residual]) * weight * (1 / scale), -448, 448).to(float8_e4m3fn), without rounding before

    `ops.rms_norm_static_fp8_quant` under the rounding `gpt_oss` and `ops.fused_add_rms_norm_static_fp8_quant` under
    `fp32`, except for the rounding of the norm.

    Args:
        m: x [..., hidden], float16 or bfloat16; residual of x's shape and dtype, or none, copied since the kernel
            writes the sum over it; weight [hidden] in x's dtype; scale, one float32 element; quant_rounding `multiply`.

    Returns:
        q, or (q, residual_out), all [..., hidden], contiguous.
    """
    residual = vars(m).get("residual")
    q = m.x.new_empty(m.x.shape, dtype=m.dtype)
    total = None if residual is None else m.x.new_empty(m.x.shape).copy_(residual)
    if m.x.numel():
        norm = importlib.import_module("flashinfer.norm")
        run = norm.rmsnorm_quant if total is None else norm.fused_add_rmsnorm_quant
        written = () if total is None else (rows_of(total),)
        run(rows_of(q), aligned(rows_of(m.x)), *written, aligned(m.weight.contiguous()), m.scale, m.eps)
    return q if total is None else (q, total)


def _is_older(than: str) -> bool:
    """Whether an older release is installed. Without any, the plan is for another device, which will have a new one."""
    version = PROVIDER.version()
    return version is not None and TorchVersion(version) < than


@dataclass(frozen=True, kw_only=True)
class AllReduceGate(Gate):
    """A `Gate` with the launcher's rule for spreading a row over blocks, and with the gaps of older releases."""

    def __call__(self, m: Any) -> Refusal | None:
        """See `Gate.__call__`."""
        needs = {"1 + weight": WEIGHT_BIAS_FROM} if m.values.get("rounding") == Rounding.GEMMA else {}
        needs |= {"a scale a row": DYNAMIC_FROM} if self.min_scale is not None else {}
        for what, first in needs.items():
            if _is_older(first):
                here = f"flashinfer-python {PROVIDER.version()} is installed"
                detail = f"{here}, and {self.name} has {what} from {first} on"
                return Refusal(reason=Reason.PROVIDER, detail=detail, fix=PROVIDER.install)
        return super().__call__(m)

    def limits(self) -> tuple[str, ...]:
        """See `Gate.limits`."""
        return (*super().limits(), f"rows that split into up to {CLUSTER_BLOCKS} blocks of {BLOCK_THREADS} threads")

    def check_width(self, x: Tensor, m: Any) -> Refusal | None:
        """See `Gate.check_width`."""
        refusal = super().check_width(x, m)
        width = x.shape[-1]
        if refusal is not None or not isinstance(width, int):
            return refusal
        threads = width * x.dtype.itemsize // ACCESS_BYTES
        blocks = math.gcd(threads, CLUSTER_BLOCKS)
        if threads // blocks <= BLOCK_THREADS:
            while threads // blocks < LEAST_THREADS and blocks > 1:
                blocks //= 2
            if threads // blocks % WARP and _is_older(DYNAMIC_FROM):
                taken = f"that split into whole warps before flashinfer-python {DYNAMIC_FROM}"
                return self._size(taken, "that splits into whole warps", x)
            return None
        return self._size(f"that split into up to {CLUSTER_BLOCKS} blocks of {BLOCK_THREADS} threads", "that splits", x)


ALL_REDUCE = AllReduceGate(
    name="FlashInfer's all-reduce fusion",
    source="flashinfer-python 0.6.18.post1, include/flashinfer/comm/trtllm_allreduce_fusion.cuh: 16 bytes a thread, a "
    "row in up to 8 blocks of up to 1024 threads; comm/trtllm_ar.py: it chooses between one-shot and two-shot for 2, 4 "
    "and 8 ranks, and float32 messages of two ranks don't fit the buffer that it makes for two-shot",
    dtypes=frozenset({torch.float16, torch.bfloat16}),
    row_bytes=ACCESS_BYTES,
    most_row_bytes=CLUSTER_BLOCKS * BLOCK_THREADS * ACCESS_BYTES,
    ranks=frozenset({2, 4, 8}),
    dense=True,
)
NORM_QUANT = Gate(
    name="FlashInfer's norm and quantisation",
    source="flashinfer-python 0.6.18.post1, csrc/norm.cu: float16 and bfloat16, any hidden size",
    dtypes=frozenset({torch.float16, torch.bfloat16}),
    quant_rounding=QuantRounding.MULTIPLY,
    quant_dtypes=frozenset({torch.float8_e4m3fn}),
)
ALL_REDUCE_STATIC = replace(
    ALL_REDUCE, quant_rounding=QuantRounding.MULTIPLY, quant_dtypes=frozenset({torch.float8_e4m3fn})
)
ALL_REDUCE_DYNAMIC = replace(ALL_REDUCE_STATIC, quant_rounding=QuantRounding.DIVIDE, min_scale=MIN_SCALE)


def _most_rows(hidden: int, dtype: torch.dtype, ranks: int) -> int:
    return (COUNTED_BYTES - 1) // (hidden * dtype.itemsize * ranks)


def most_rows(m: Any) -> int:
    """The number of rows that the kernels can count, regardless of the workspace's memory."""
    return _most_rows(m.x.shape[-1], m.x.dtype, group_size(str(m.group_name)) or 1)


_CONVENTIONS = frozenset({Rounding.GPT_OSS.value, Rounding.GEMMA.value})
_UNROUNDED = "the norm before it is quantised"

KERNELS: Mapping[DialectOp, tuple[Callable[..., Any], Offer]] = {
    **{
        op: (kernel, Offer(accepts=gate, roundings=_CONVENTIONS, most_rows=most_rows))
        for op, kernel, gate in (
            (ops.all_reduce_fused_add_rms_norm, all_reduce_norm, ALL_REDUCE),
            (ops.all_reduce_fused_add_rms_norm_static_fp8_quant, all_reduce_static, ALL_REDUCE_STATIC),
            (ops.all_reduce_fused_add_rms_norm_dynamic_fp8_quant, all_reduce_dynamic, ALL_REDUCE_DYNAMIC),
        )
    },
    **{
        op: (norm_static, Offer(accepts=NORM_QUANT, roundings=frozenset({rounding.value}), leaves_out=_UNROUNDED))
        for op, rounding in (
            (ops.rms_norm_static_fp8_quant, Rounding.GPT_OSS),
            (ops.fused_add_rms_norm_static_fp8_quant, Rounding.FP32),
        )
    },
}
"""Kernels and their offers by fused op."""

PROVIDER: Final = Provider(
    name="flashinfer",
    description="FlashInfer's all-reduce fusion and norms",
    vendors=frozenset({"nvidia"}),
    package="flashinfer",
    distribution="flashinfer-python",
    oldest=OLDEST,
    install="pip install -U flashinfer-python",
    implements={op.name: offer for op, (_, offer) in KERNELS.items()},
    timing=Timing(exchange="flashinfer"),
)

for _op, (_kernel, _offer) in KERNELS.items():
    implement(_op, PROVIDER.name, by_names(_op, _kernel), most_rows=_offer.most_rows)
