"""Attention over shared heads by torch's own kernels, in two forms, each a few aten calls in the graph.

`sdpa`         the graph's own kernel on unrepeated keys and values, where it takes fewer heads of these than of queries
`sdpa_packed`  one query token a row: the queries that share a head are stacked as if they were tokens, so the kernel
               sees as many heads of queries as of keys

    q [B, heads, 1, D] -> [B, kv_heads, heads / kv_heads, D],   mask [B, 1, 1, S] -> [B, 1, heads / kv_heads, S]

Spelled-out attention names no kernel; on a CPU it gets the CPU's.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from fuseplan.devices import VENDOR_NAMES, DeviceProfile
from fuseplan.dialect import ATTENTION_KERNELS, AttentionRounding, facts_of, implement, ops
from fuseplan.graph.facts import equal_size
from fuseplan.providers.gates import Offer
from fuseplan.providers.provider import Provider
from fuseplan.providers.timing import Timing
from fuseplan.record import Reason, Refusal
from fuseplan.rules import Bindings
from fuseplan.rules.parts.attention.kernels import target_kernel

aten = torch.ops.aten
_UNTESTED: Final = "not run on AMD's GPUs so far"
CPU: Final = "cpu"
SHARED: Final = "sdpa"
PACKED: Final = "sdpa_packed"
EFFICIENT_SHARES: Final = "2.14"
"""The first torch whose memory-efficient attention takes fewer heads of keys than of queries, on NVIDIA."""


def shared_attention(
    q: Any, k: Any, v: Any, mask: Any, scale: float, is_causal: bool, kernel: str
) -> Any:  # fmt: skip
    """The named kernel on unrepeated keys and values; arguments as for `attention_reference`."""
    return ATTENTION_KERNELS[kernel].run(q, k, v, mask, scale, is_causal)[0]


def packed_attention(
    q: Any, k: Any, v: Any, mask: Any, scale: float, is_causal: bool, kernel: str
) -> Any:  # fmt: skip
    """The named kernel with the queries of a group as its tokens; arguments as for `attention_reference`."""
    heads, width = facts_of(q).shape[1], facts_of(q).shape[3]
    shared = facts_of(k).shape[1]
    rows = heads // shared
    packed = aten.reshape.default(q, [-1, shared, rows, width])
    result = ATTENTION_KERNELS[kernel].run(packed, k, v, _packed_mask(mask, shared, rows, kernel), scale, False)[0]
    return aten.reshape.default(result, [-1, heads, 1, facts_of(v).shape[3]])


def shared_eager_attention(
    q: Any, k: Any, v: Any, mask: Any, sinks: None, scale: float, softcap: None, rounding: str
) -> Any:  # fmt: skip
    """The CPU's kernel on unrepeated keys and values; arguments as for `eager_attention_reference`."""
    result = shared_attention(q, k, v, mask, scale, False, CPU)
    if equal_size(facts_of(q).shape[2], 1):
        return result
    return aten.clone.default(result, memory_format=torch.contiguous_format)


def packed_eager_attention(
    q: Any, k: Any, v: Any, mask: Any, sinks: None, scale: float, softcap: None, rounding: str
) -> Any:  # fmt: skip
    """The CPU's kernel on packed queries; arguments as for `eager_attention_reference`."""
    return packed_attention(q, k, v, mask, scale, False, CPU)


def _packed_mask(mask: Any, shared: int, rows: int, kernel: str) -> Any:
    """A mask [B, 1 or heads, 1, S], or [1, S], for heads packed as rows."""
    if mask is None:
        return None
    facts: Tensor = facts_of(mask)
    if facts.dim() == 2:
        return aten.expand.default(mask, [rows, -1])
    if _is_one_head(facts):
        if not equal_size(facts.shape[1], 1):
            mask = aten.slice.Tensor(mask, 1, 0, 1)
        # Memory-efficient attention requires a mask for all heads, which may share memory.
        mask = aten.expand.default(mask, [-1, shared if kernel == "efficient" else -1, rows, -1])
        # cuDNN reads a mask whose heads share memory, but not one whose tokens do.
        return aten.clone.default(mask, memory_format=torch.contiguous_format) if kernel == "cudnn" else mask
    batch, keys = facts.shape[0], facts.shape[3]
    return aten.reshape.default(mask, [batch if isinstance(batch, int) else -1, shared, rows, keys])


def _is_one_head(mask: Tensor) -> bool:
    return equal_size(mask.shape[1], 1) or equal_size(mask.stride(1), 0)


def _apart(m: Any) -> Refusal | None:
    """The refusal of heads whose elements aren't contiguous, or None: torch's kernels assume that they are."""
    for name in ("q", "k", "v"):
        value = getattr(m, name)
        if not equal_size(value.stride(-1), 1) and not equal_size(value.shape[-1], 1):
            strides = tuple(value.stride())
            detail = f"torch's kernels take heads whose elements lie side by side; strides of {name} are {strides}"
            return Refusal(reason=Reason.LAYOUT, detail=detail, fix=f"make {name} contiguous")
    return None


@dataclass(frozen=True)
class Shared:
    """Whether a kernel takes fewer heads of keys and values than of queries.

    Attributes:
        vendor: the vendor of the plan's device, if that isn't this machine's; None: the graph's kernel counts.
        torch_version: the version in use.
        is_rocm: whether torch was built for AMD's GPUs.
    """

    vendor: str | None = None
    torch_version: str = str(torch.__version__)
    is_rocm: bool = torch.version.hip is not None

    def __call__(self, m: Any) -> Refusal | None:
        """Why the arguments are refused, or None."""
        kernel = target_kernel(m.kernel, self.vendor or "cpu", m.q, m.mask)
        if kernel == "overrideable":
            return _unknown_kernel()
        if (apart := _apart(m)) is not None:
            return apart
        is_rocm = self.is_rocm if self.vendor is None else self.vendor == "amd"
        if kernel == "efficient" and (is_rocm or TorchVersion(self.torch_version) < EFFICIENT_SHARES):
            where = "on ROCm" if is_rocm else f"before torch {EFFICIENT_SHARES}; this is {self.torch_version}"
            return Refusal(
                reason=Reason.PROVIDER,
                detail=f"memory-efficient attention takes as many heads of keys as of queries {where}",
                expected=f"{m.k.shape[1]} query heads", found=f"{m.q.shape[1]} query heads",
            )  # fmt: skip
        return None

    def limits(self) -> tuple[str, ...]:
        """Its limits, for a person."""
        return (f"memory-efficient attention from torch {EFFICIENT_SHARES} on, and not on ROCm",)


@dataclass(frozen=True)
class Packs:
    """Whether queries can be stacked: one token a row, and a mask that heads share or with a row for each head."""

    def __call__(self, m: Any) -> Refusal | None:
        """Why the arguments are refused, or None."""
        if m.kernel == "overrideable":
            return _unknown_kernel()
        if (apart := _apart(m)) is not None:
            return apart
        if not equal_size(m.q.shape[2], 1):
            return Refusal(
                reason=Reason.SIZE, detail=f"heads are packed where there is one query token, not {m.q.shape[2]}",
                expected="1 query token", found=f"{m.q.shape[2]} query tokens",
            )  # fmt: skip
        if m.is_causal:
            return Refusal(
                reason=Reason.ATTRIBUTE, detail="a causal kernel would take packed heads for tokens in a row",
                expected="is_causal=False", found="is_causal=True",
            )  # fmt: skip
        return self._mask(m.mask)

    def _mask(self, mask: Tensor | None) -> Refusal | None:
        if mask is None or (mask.dim() == 2 and equal_size(mask.shape[0], 1)):
            return None
        shape = list(mask.shape)
        fits = mask.dim() == 4 and equal_size(shape[2], 1)
        if fits and (_is_one_head(mask) or (isinstance(shape[1], int) and isinstance(shape[3], int))):
            return None
        return Refusal(
            reason=Reason.SIZE, detail=f"a mask {shape} can't be laid over packed heads", expected="[B, 1, 1, S]",
            found=str(shape),
        )  # fmt: skip

    def limits(self) -> tuple[str, ...]:
        """Its limits, for a person."""
        return ("one query token a row",)


@dataclass(frozen=True)
class Spelled:
    """Whether torch's kernel for CPUs takes attention that a model spells out.

    Attributes:
        packed: the check for packed heads, if it is to run on these.
        vendor: the vendor of the plan's device, if that isn't this machine's.
    """

    packed: Packs | None = None
    vendor: str | None = None

    def __call__(self, m: Any) -> Refusal | None:
        """Why the arguments are refused, or None."""
        vendor = self.vendor or m.q.device.type
        if vendor != "cpu":
            detail = "which of torch's kernels runs attention that a model spells out is known on CPUs alone"
            return Refusal(reason=Reason.PROVIDER, detail=detail, expected="a CPU", found=vendor)
        for name, what in (("softcap", "soft-cap"), ("sinks", "sinks")):
            if m.values[name] is not None:
                detail = f"torch's attention kernels have no {what}"
                return Refusal(reason=Reason.ATTRIBUTE, detail=detail, expected=f"no {what}", found=what)
        if not equal_size(m.q.shape[3], m.v.shape[3]):
            detail = (
                f"heads of q have {m.q.shape[3]} elements, of v {m.v.shape[3]}, and the CPU's kernel takes one size"
            )
            return Refusal(reason=Reason.SIZE, detail=detail, expected="heads of one size")
        mask: Tensor | None = m.mask
        if mask is not None and mask.dim() not in (2, 4):
            detail = f"the CPU's kernel takes masks of 2 or 4 dimensions, not {mask.dim()}"
            return Refusal(reason=Reason.SIZE, detail=detail, expected="[B, 1, 1, S]", found=str(list(mask.shape)))
        if self.packed is None:
            return _apart(m)
        return self.packed(Bindings(m.rule, {**m.values, "is_causal": False, "kernel": CPU}))

    def limits(self) -> tuple[str, ...]:
        """Its limits, for a person."""
        return ("a CPU", "no soft-cap, no sinks", *(self.packed.limits() if self.packed else ()))


ROUNDINGS: Final = frozenset({AttentionRounding.FLOAT32.value})
"""The rounding conventions of spelled-out attention that each kernel computes."""


def _unknown_kernel() -> Refusal:
    detail = "a kernel of a device outside of torch: its inputs aren't known"
    return Refusal(reason=Reason.PROVIDER, detail=detail, expected="one of torch's kernels", found="overrideable")


def shared_offers(vendor: str | None) -> dict[str, Offer]:
    """The offers of `sdpa`, on this machine or for a plan on a vendor's devices."""
    return {
        ops.grouped_attention.name: Offer(accepts=Shared(vendor)),
        ops.fused_attention.name: Offer(accepts=Spelled(vendor=vendor), roundings=ROUNDINGS),
    }


def packed_offers(vendor: str | None) -> dict[str, Offer]:
    """The offers of `sdpa_packed`, on this machine or for a plan on a vendor's devices."""
    return {
        ops.grouped_attention.name: Offer(accepts=Packs()),
        ops.fused_attention.name: Offer(accepts=Spelled(Packs(), vendor), roundings=ROUNDINGS),
    }


@dataclass(frozen=True, kw_only=True)
class TorchAttention(Provider):
    """torch's attention on keys and values with fewer heads than queries. Its kernels' limits depend on the vendor of
    the device.

    Attributes:
        offered: the offers for a vendor's devices; for None, the offers on this machine.
    """

    offered: Callable[[str | None], dict[str, Offer]]

    def offers(self, device: DeviceProfile | None = None) -> Mapping[str, Offer]:
        """See `Provider.offers`; for a device other than this machine's, by the kernel that torch runs there."""
        return self.offered(device.vendor if device else None)


PROVIDERS: Final = tuple(
    TorchAttention(
        name=name,
        description=f"torch's attention kernels, on {description}",
        vendors=frozenset(VENDOR_NAMES),
        package=None,
        install="",
        implements=offered(None),
        offered=offered,
        timing=timing,
        untested=_UNTESTED,
    )
    for name, description, offered, timing in (
        (SHARED, "heads that queries share", shared_offers, Timing(heads="shared")),
        (PACKED, "one query token's heads stacked as tokens", packed_offers, Timing(heads="packed")),
    )
)

implement(ops.grouped_attention, SHARED, shared_attention, inlined=True)
implement(ops.grouped_attention, PACKED, packed_attention, inlined=True)
implement(ops.fused_attention, SHARED, shared_eager_attention, inlined=True)
implement(ops.fused_attention, PACKED, packed_eager_attention, inlined=True)
