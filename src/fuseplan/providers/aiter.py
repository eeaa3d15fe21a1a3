"""AITER's Triton add + RMSNorm + pad, and its custom all-reduce with a norm. Importing this needs no AITER.

Read from ROCm/aiter at e4048607 (2026-08-22, 46 commits after v0.1.20):

- `aiter.ops.triton.normalization.fused_add_rmsnorm_pad`: the sum stays in float32 and is rounded only for the residual
  stream; the norm is multiplied by the weight in float32 and rounded once: `fp32`, or `gpt_oss` without a residual.
- `aiter.dist.device_communicators.custom_all_reduce.CustomAllreduce`: `custom_fused_ar_rms`
  (`fused_allreduce_rmsnorm` and, for a wider result, `fused_allreduce_rmsnorm_pad`) and `custom_fused_ar_rms_quant`
  (`fused_allreduce_rmsnorm_quant`), with their kernels in csrc/include/custom_all_reduce.cuh: the sum over ranks is
  taken in float32 and rounded, then as above. The norm isn't rounded before quantisation, and a row of zeros has the
  scale 1. The input is copied into memory that the ranks share, so that a CUDA graph may be captured and replayed.
  Nothing is written in place.

None of this has been run on ROCm hardware.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor

from fuseplan.dialect import DialectOp, QuantRounding, Rounding, implement, ops
from fuseplan.distributed.shared import SHARED, Kind
from fuseplan.errors import CollectiveError
from fuseplan.graph.facts import equal_size, group_size
from fuseplan.providers.gates import Gate, Offer, listed
from fuseplan.providers.operands import ACCESS_BYTES, by_names
from fuseplan.providers.provider import Provider
from fuseplan.providers.timing import Timing
from fuseplan.record import Reason, Refusal

OLDEST = "0.1.20"
"""The first release whose one-stage kernel waits for all readers before the shared memory is written again."""

POOL_BYTES = 2**26
"""Bytes of the memory that a group shares. AITER's own dispatch takes only smaller messages."""

ONE_STAGE_BYTES = 128 * 7168 * 2
"""Up to this size, divided by the ranks, AITER's own dispatch reduces in one kernel: `fused_allreduce_rmsnorm` of
aiter/dist/device_communicators/communicator_cuda.py.
"""

ONE_STAGE_QUANT_BYTES = 128 * 1024
"""The same limit with quantisation (`fused_allreduce_rmsnorm_quant`)."""

QUANT_WIDTHS = frozenset({512, 1024, 2048, 4096, 6144, 7168})
"""Hidden sizes that AITER's own dispatch quantises in the same kernel."""

_COMMUNICATORS: Final[Kind[Any]] = Kind(
    name="AITER's custom all-reduce", release=lambda communicator: communicator.close()
)


def norm_pad(m: Any) -> Any:
    """[residual_out = x + residual];  y = pad(rms_norm(x [+ residual]) * weight, (0, right))      in one Triton kernel

    Equals `ops.rms_norm_pad` under the rounding `gpt_oss` and `ops.fused_add_rms_norm_pad` under `fp32`.

    Args:
        m: x [..., hidden], floating point; residual of x's shape and dtype, or none; weight [hidden]; right, the zeros
            to append to each row of y.

    Returns:
        y or (y, residual_out): [..., hidden + right] and [..., hidden], contiguous, in x's dtype.
    """
    x, residual, width = m.x, vars(m).get("residual"), m.x.shape[-1] + m.right
    if x.numel() == 0:
        y, total = x.new_empty((*x.shape[:-1], width)), x.new_empty(x.shape)
    else:
        module = importlib.import_module("aiter.ops.triton.normalization.fused_add_rmsnorm_pad")
        added = None if residual is None else _flat(residual)
        with torch.cuda.device_of(x):
            # It pads to the next multiple of `width`, which is `width` itself.
            found = module.fused_add_rmsnorm_pad(
                _flat(x), m.weight.contiguous(), m.eps, res=added, x_pad_to_multiple=width
            )
        y, total = (found, x) if residual is None else found
    y = y.view(*x.shape[:-1], width)
    return y if residual is None else (y, total.view(x.shape))


def all_reduce_norm(m: Any) -> tuple[Tensor, Tensor]:
    """residual_out = sum_ranks(x) + residual;  y = pad(rms_norm(sum_ranks(x) + residual) * weight, (0, right))

    Equals `ops.all_reduce_fused_add_rms_norm` and, with `right`, `ops.all_reduce_fused_add_rms_norm_pad` under the
    rounding `fp32`. The kernels' waits for other ranks have no deadline.

    Args:
        m: x [..., hidden], float16 or bfloat16, equal shapes on all ranks; residual of x's shape and dtype; weight
            [hidden] in x's dtype; right, the zeros to append to each row of y, a multiple of 8, or none; group_name of
            a process group of 2, 4 or 8 ranks on one node.

    Returns:
        (y, residual_out): [..., hidden + right] and [..., hidden], contiguous, in x's dtype.

    Raises:
        CollectiveError: a message of 64 MiB or more, a group that AITER doesn't serve, or a graph capture before its
            memory is allocated.
    """
    x, width = m.x, m.x.shape[-1] + vars(m).get("right", 0)
    if x.numel() == 0:
        return x.new_empty((*x.shape[:-1], width)), x.new_empty(x.shape)
    communicator = _communicator(x, m.group_name)
    results = communicator.custom_fused_ar_rms(
        x.contiguous(), m.residual.contiguous(), m.weight.contiguous(), m.eps,
        x.nbytes <= ONE_STAGE_BYTES // communicator.world_size, out_hidden_dim=width,
    )  # fmt: skip
    y, total = _served(results, x, m.group_name)
    return y, total


def all_reduce_dynamic(m: Any) -> tuple[Tensor, Tensor, Tensor]:
    """residual_out = sum_ranks(x) + residual;  y = rms_norm(sum_ranks(x) + residual) * weight, not rounded;
    scale = amax(|y|, -1) / fp8_max;  q = (y / scale).to(fp8)

    `ops.all_reduce_fused_add_rms_norm_dynamic_fp8_quant` under the rounding `fp32`, except that y isn't rounded, and
    that scales below `min_scale` stay as computed; a row of zeros has the scale 1.

    Args:
        m: as for `all_reduce_norm`; dtype, the fp8 format of the device: fnuz on CDNA3, fn on CDNA4; min_scale, which
            has no effect; no other bound on scales; quant_rounding `divide`.

    Returns:
        (q, scale, residual_out): [..., hidden], [..., 1] in float32 and [..., hidden], contiguous.

    Raises:
        CollectiveError: as for `all_reduce_norm`, or another fp8 format than the device's.
    """
    x = m.x
    if x.numel() == 0:
        scale = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
        return x.new_empty(x.shape, dtype=m.dtype), scale, x.new_empty(x.shape)
    communicator = _communicator(x, m.group_name)
    results = communicator.custom_fused_ar_rms_quant(
        x.contiguous(), m.residual.contiguous(), m.weight.contiguous(), m.eps, x.nbytes <= ONE_STAGE_QUANT_BYTES
    )
    q, total, scale = _served(results, x, m.group_name)
    if q.dtype is not m.dtype:
        raise CollectiveError(
            f"AITER quantises to {q.dtype} on this device, and the graph to {m.dtype}: forbid the provider"
        )
    return q, scale, total


def _communicator(x: Tensor, group_name: str) -> Any:
    """The group's communicator, for all sizes."""
    _COMMUNICATORS.require(x.shape[:-1].numel(), _most_rows(x.shape[-1], x.dtype), group_name)

    def make(group: dist.ProcessGroup) -> Any:
        module = importlib.import_module("aiter.dist.device_communicators.custom_all_reduce")
        ranks = dist.get_process_group_ranks(group)
        # AITER refuses an NCCL group for exchanging addresses.
        own = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
        communicator = module.CustomAllreduce(group=own, device=x.device, max_size=POOL_BYTES)
        if communicator.disabled:
            raise CollectiveError(
                f"AITER's custom all-reduce doesn't serve group {group_name!r} of {len(ranks)} ranks: it takes 2, 4 or "
                "8 on one node; forbid the provider"
            )
        return communicator

    return SHARED.get(_COMMUNICATORS, group_name, x.device, rows=0, capacity=0, make=make)


def _served(results: Any, x: Tensor, group_name: str) -> Any:
    if results is None:
        raise CollectiveError(
            f"AITER's custom all-reduce takes no {list(x.shape)} in {x.dtype} over group {group_name!r}: see "
            "AITER_CUSTOM_AR_MAX_SIZE and AITER_CUSTOM_AR_MIN_SIZE, or forbid the provider"
        )
    return results


def _flat(x: Tensor) -> Tensor:
    """[rows, width], with any strides."""
    return x.reshape(-1, x.shape[-1])


@dataclass(frozen=True, kw_only=True)
class AllReduceGate(Gate):
    """A `Gate` with the limits of the two-stage kernels.

    Attributes:
        widths: hidden sizes; empty: any.
    """

    widths: frozenset[int] = frozenset()

    def limits(self) -> tuple[str, ...]:
        """See `Gate.limits`."""
        split = f"rows that split into packs of {ACCESS_BYTES} bytes for each rank"
        sizes = (f"hidden size {listed(list(map(str, sorted(self.widths))))}",) if self.widths else ()
        return (*super().limits(), split, *sizes)

    def _row_bytes(self, m: Any) -> int:
        # Rows are shared out in packs of 16 bytes, and a remainder that not all ranks have is dropped.
        return ACCESS_BYTES * (group_size(str(m.group_name)) or 1)

    def check_width(self, x: Tensor, m: Any) -> Refusal | None:
        """See `Gate.check_width`."""
        refusal = super().check_width(x, m)
        if refusal is not None:
            return refusal
        if self.widths and x.shape[-1] not in self.widths:
            sizes = listed(list(map(str, sorted(self.widths))))
            return self._size(sizes, sizes, x)
        step, right = ACCESS_BYTES // x.dtype.itemsize, m.values.get("right", 0)
        if equal_size(right % step, 0):
            return None
        return Refusal(
            reason=Reason.SIZE, detail=f"{self.name} pads by multiples of {step} in this dtype, not by {right}",
            expected=f"a pad by a multiple of {step}", found=f"a pad by {right}", fix="let another provider run it",
        )  # fmt: skip


ALL_REDUCE = AllReduceGate(
    name="AITER's all-reduce and norm",
    source="ROCm/aiter e4048607, csrc/include/custom_all_reduce.cuh: `dispatchFusedAllReduceRMSNorm` takes 64 to 2048 "
    "packs of 16 bytes a row and 2, 4 or 8 ranks, `reduce_scatter_cross_device_store` shares packs out evenly",
    dtypes=frozenset({torch.float16, torch.bfloat16}),
    least_row_bytes=64 * ACCESS_BYTES,
    most_row_bytes=2048 * ACCESS_BYTES,
    ranks=frozenset({2, 4, 8}),
    dense=True,
)
ALL_REDUCE_QUANT = replace(
    ALL_REDUCE,
    source=f"{ALL_REDUCE.source}; aiter/dist/device_communicators/communicator_cuda.py: for which hidden sizes",
    widths=QUANT_WIDTHS,
    quant_rounding=QuantRounding.DIVIDE,
    quant_dtypes=frozenset({torch.float8_e4m3fn, torch.float8_e4m3fnuz}),
)


def _most_rows(width: int, dtype: torch.dtype) -> int:
    return (POOL_BYTES - 1) // (width * dtype.itemsize)


def most_rows(m: Any) -> int:
    """The number of rows that fit into the memory that a group shares."""
    return _most_rows(m.x.shape[-1], m.x.dtype)


def most_padded_rows(m: Any) -> int:
    """The number of rows that the Triton kernel can address: it computes addresses in 32 bits."""
    width: int = m.x.shape[-1] + m.right
    return (2**31 - 1) // width


_FP32, _GPT_OSS = frozenset({Rounding.FP32.value}), frozenset({Rounding.GPT_OSS.value})

KERNELS: Mapping[DialectOp, tuple[Callable[..., Any], Offer]] = {
    ops.rms_norm_pad: (norm_pad, Offer(roundings=_GPT_OSS, most_rows=most_padded_rows)),
    ops.fused_add_rms_norm_pad: (norm_pad, Offer(roundings=_FP32, most_rows=most_padded_rows)),
    ops.all_reduce_fused_add_rms_norm: (
        all_reduce_norm, Offer(accepts=ALL_REDUCE, roundings=_FP32, most_rows=most_rows)
    ),
    ops.all_reduce_fused_add_rms_norm_pad: (
        all_reduce_norm, Offer(accepts=ALL_REDUCE, roundings=_FP32, most_rows=most_rows)
    ),
    ops.all_reduce_fused_add_rms_norm_dynamic_fp8_quant: (
        all_reduce_dynamic,
        Offer(
            accepts=ALL_REDUCE_QUANT, roundings=_FP32, most_rows=most_rows,
            leaves_out="the norm before it is quantised, and the least scale of a row",
        ),
    ),
}  # fmt: skip
"""Kernels and their offers by fused op."""

PROVIDER: Final = Provider(
    name="aiter",
    description="AITER's Triton add + RMSNorm + pad and custom all-reduce (ROCm)",
    vendors=frozenset({"amd"}),
    package="aiter",
    distribution="amd-aiter",
    oldest=OLDEST,
    install=f"install AITER {OLDEST} or newer from its ROCm release",
    implements={op.name: offer for op, (_, offer) in KERNELS.items()},
    timing=Timing(exchange="aiter"),
    untested="not run on ROCm hardware so far: its calls are held against AITER's signatures alone",
)

for _op, (_kernel, _offer) in KERNELS.items():
    implement(_op, PROVIDER.name, by_names(_op, _kernel), most_rows=_offer.most_rows)
