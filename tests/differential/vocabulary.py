"""What random programs are written in: norms, all-reduces, quantisations and experts as real models spell them, and
their lookalikes, which are none and have to come out unharmed too.

Every function here can be called by a program's text.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch._higher_order_ops.while_loop import while_loop
from torch.distributed import _functional_collectives as collectives
from torch.distributed import distributed_c10d
from torch.nn import functional as F

from tests.differential.norms import NORMS, own_epsilon
from tests.helpers import all_reduce, llama, quantize, quantize_rows


def largest(x: Tensor, group: str) -> Tensor:
    """An all-reduce that doesn't sum."""
    reduced: Tensor = collectives.all_reduce(x, "max", group)  # type: ignore[arg-type]
    return reduced


def scattered(x: Tensor, group: str) -> Tensor:
    """A reduce-scatter and an all-gather, of which an all-reduce is made too."""
    part = collectives.reduce_scatter_tensor(x.contiguous(), "sum", 0, group)  # type: ignore[arg-type]
    gathered: Tensor = collectives.all_gather_tensor(part, 0, group)  # type: ignore[arg-type]
    return gathered


def summed_in_place(x: Tensor, group: str) -> Tensor:
    """What Dynamo makes a functional all-reduce and a copy of."""
    result = x.clone()
    dist.all_reduce(result, group=distributed_c10d._resolve_process_group(group))  # type: ignore[attr-defined,arg-type]
    return result


def deepened(x: Tensor, depth: int) -> Tensor:
    """x after so many ops."""
    for _ in range(depth):
        x = torch.tanh(x)
    return x


def relu_of_product(x: Tensor, y: Tensor) -> Tensor:
    return (x * y.sigmoid()).relu()


def turned(x: Tensor) -> Tensor:
    """x, with its last two dimensions the other way around in memory."""
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def padded_by_cat(x: Tensor, width: int) -> Tensor:
    return torch.cat([x, x.new_zeros(*x.shape[:-1], width)], -1)


def padded_by_copy(x: Tensor, width: int) -> Tensor:
    result = x.new_zeros(*x.shape[:-1], x.shape[-1] + width)
    result[..., : x.shape[-1]] = x
    return result


def codes(scaled: Tensor) -> Tensor:
    return scaled.clamp(-448.0, 448.0).to(torch.float8_e4m3fn)


RowQuant = Callable[[Tensor], tuple[Tensor, Tensor]]


def by_scale(scale_of: Callable[[Tensor], Tensor]) -> RowQuant:
    def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
        scale = scale_of(x)
        return codes(x.float() / scale), scale

    return quantise


def quantize_rows_rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """compressed-tensors': all is in x's own precision, and 0 is no scale."""
    low, high = torch.amin(x, -1, keepdim=True), torch.amax(x, -1, keepdim=True)
    low, high = torch.min(low, torch.zeros_like(low)), torch.max(high, torch.zeros_like(high))
    scale = torch.maximum(low.abs(), high.abs()) / 448.0
    scale = torch.where(scale == 0, 0.0078125, scale)
    return codes(x / scale), scale


def in_fours(x: Tensor) -> Tensor:
    """Groups of four where they divide a row."""
    groups: Tensor = x.unflatten(-1, (-1, 4 if x.shape[-1] % 4 == 0 else x.shape[-1]))
    return groups


def quantize_groups(x: Tensor) -> tuple[Tensor, Tensor]:
    groups = in_fours(x)
    scale = (groups.abs().amax(-1, keepdim=True).float() / 448.0).clamp(min=1e-6)
    return codes(groups.float() / scale).flatten(-2), scale.squeeze(-1)


def quantize_groups_columns(x: Tensor) -> tuple[Tensor, Tensor]:
    """Scales lie column by column where that is said of a matrix, each column padded."""
    values, scale = quantize_groups(x)
    if scale.dim() != 2:
        return values, turned(scale)
    rows = scale.shape[0]
    moved = scale.new_empty((scale.shape[1], (rows + 3) // 4 * 4)).t()
    moved[:rows] = scale
    return values, moved[:rows]


def quantize_groups_rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    values, scale = quantize_rows_rounded(in_fours(x))
    return values.flatten(-2), scale.squeeze(-1)


def microscaled(x: Tensor) -> Tensor:
    """MXFP8 and back, in groups of four where these divide a row: a scale alone would jump where it is rounded up."""
    groups = in_fours(x)
    wanted = groups.abs().amax(-1).unsqueeze(-1).float() / 448.0
    finite = (torch.ceil(torch.log2(wanted)).clamp(-127, 127) + 127).to(torch.uint8)
    exponent = torch.where(wanted.isnan(), 255, torch.where(wanted.isinf(), 254, finite))
    inverse = torch.where(exponent == 0, 1.0, torch.exp2(127 - exponent.float()))
    factor = torch.where(exponent == 255, wanted, torch.where(exponent == 254, 2.0**-127, inverse))
    codes = (groups.float() * factor).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
    restored: Tensor = codes.float() * torch.exp2(exponent.float() - 127)
    return restored.flatten(-2).to(x.dtype)


def dequantize(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    if scale.dim() == q.dim() and 1 < scale.shape[-1] < q.shape[-1]:
        groups = q.float().unflatten(-1, (scale.shape[-1], -1))
        restored: Tensor = groups * scale.unsqueeze(-1)
        return restored.flatten(-2).to(dtype)
    return (q.float() * scale).to(dtype)


ROW_QUANTS: dict[str, RowQuant] = {
    "quantize_rows": quantize_rows,
    "quantize_rows_divided": by_scale(lambda x: (x.float().abs().amax(-1, keepdim=True) / 448.0).clamp(min=1e-6)),
    "quantize_rows_max": by_scale(lambda x: (x.abs().max(-1, keepdim=True)[0].float() / 448.0).clamp(min=1e-6)),
    "quantize_rows_rounded": quantize_rows_rounded,
    "quantize_rows_bounded": by_scale(lambda x: x.abs().amax(-1, keepdim=True).float().clamp(1e-4, 2.0) / 448.0),
    "quantize_groups": quantize_groups,
    "quantize_groups_rounded": quantize_groups_rounded,
    "quantize_groups_columns": quantize_groups_columns,
    # Of half of the elements, for all of them; and one of all rows.
    "quantize_rows_by_others": by_scale(
        lambda x: (x[..., ::2].abs().amax(-1, keepdim=True).float() / 448.0).clamp(min=1e-6)
    ),
    "quantize_all": by_scale(lambda x: (x.abs().amax().float() / 448.0).clamp(min=1e-6)),
}
QUANTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "quantize": quantize,
    # Twice clamped: what is quantised is never negative, or less than fp8 holds, by bounds that are named.
    "quantize_with_bounds": lambda x, scale: codes((x.float() / scale).clamp(min=0.0)),
    "quantize_within": lambda x, scale: (
        (x.float() / scale).clamp(max=30.0).clamp(max=448.0).clamp(min=-448.0).to(torch.float8_e4m3fn)
    ),
    "quantize_scaled": lambda x, scale: codes(x.float() * scale.reciprocal() * 0.5),
    "quantize_fnuz": lambda x, scale: (x.float() / scale).clamp(-240.0, 240.0).to(torch.float8_e4m3fnuz),
    "quantize_narrow": lambda x, scale: codes(x / scale.to(x.dtype)),
}
GATED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu_llama": lambda gate, up: F.silu(gate) * up,
    "silu_swapped": lambda gate, up: up * (gate * torch.sigmoid(gate)),
    "silu_wide": lambda gate, up: (F.silu(gate.float()) * up.float()).to(gate.dtype),
    "silu_half_wide": lambda gate, up: F.silu(gate.float()).to(gate.dtype) * up,
    "silu_narrow": lambda gate, up: gate / (1 + torch.exp(-gate)) * up,  # with a reciprocal of its own, rounded
    "silu_scaled": lambda gate, up: gate / (torch.exp(-gate) + 2) * up,
    "silu_of_itself": lambda gate, up: F.silu(gate) * (gate + up.sin()),
    "quick_gelu": lambda gate, up: gate * torch.sigmoid(1.702 * gate) * up,
    "gelu": lambda gate, up: F.gelu(gate) * up,
}


def experts(y: Tensor, router: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """A mixture of experts that all run. y: [N, H], router: [E, H], first: [E, H, 2 I], second: [E, I, H]."""
    share = torch.softmax(F.linear(y, router).float(), -1).to(y.dtype)
    gate, up = torch.matmul(y, first).chunk(2, -1)
    return (torch.matmul(F.silu(gate) * up, second) * share.t().unsqueeze(-1)).sum(0)


def routed_experts(y: Tensor, ids: Tensor, router: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Each row goes to the expert that its number names: a choice that rounding can't turn."""
    chosen = ids.reshape(-1) % router.shape[0]
    share = (y * router[chosen]).sum(-1, keepdim=True).sigmoid()
    gate, up = torch.bmm(y.unsqueeze(1), first[chosen]).chunk(2, -1)
    return torch.bmm(F.silu(gate) * up, second[chosen]).squeeze(1) * share


def best_shares(y: Tensor, router: Tensor) -> Tensor:
    """The largest shares of a router without the next one, which is continuous where two are equal."""
    found = torch.softmax(F.linear(y, router).float(), -1).topk(2, -1).values
    return (found[..., :1] - found[..., 1:]).to(y.dtype)


def attend(y: Tensor) -> Tensor:
    """Each row sees the others. y: [..., S, H]."""
    scores = torch.matmul(y, y.transpose(-1, -2)).float() / y.shape[-1] ** 0.5
    return torch.matmul(torch.softmax(scores, -1).to(y.dtype), y)


# What programs do through higher-order ops of torch, and views of other dtypes. Outside of a compiled model each
# function does the same in plain Python, so that it can be computed without rounding.


def block(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(a norm's padded twin, the norm, the sum): what can be fused."""
    y, total = llama(x, residual, weight)
    return F.pad(y, (0, 8)), y, total


def padded_norm(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    y, _ = llama(x, None, weight)
    return F.pad(y, (0, 8)), y


def padded_half(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    y = x * 0.5
    return F.pad(y, (0, 8)), y


def either(ids: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """One of two branches, which the ids choose."""
    if not torch.compiler.is_compiling():
        return (padded_norm if bool(ids.sum() % 2 == 0) else padded_half)(x, weight)
    result: tuple[Tensor, Tensor] = torch.cond(ids.sum() % 2 == 0, padded_norm, padded_half, (x, weight))
    return result


def repeated(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Three norms, one after the other. x: dense."""
    padded = F.pad(x, (0, 8))
    if not torch.compiler.is_compiling():
        for _ in range(3):
            padded, x = padded_norm(x * 0.5, weight)
        return padded, x
    count = torch.zeros((), dtype=torch.int64)
    _, padded, x = while_loop(
        lambda i, padded, y: i < 3, lambda i, padded, y: (i + 1, *padded_norm(y * 0.5, weight)), (count, padded, x)
    )  # fmt: skip
    return padded, x


_nested = torch.compiler.nested_compile_region(block)


def region(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A block that is compiled once, however often it is called."""
    if not torch.compiler.is_compiling():
        return block(x, residual, weight)
    result: tuple[Tensor, Tensor, Tensor] = _nested(x, residual, weight)
    return result


_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def reversed_bits(x: Tensor) -> Tensor:
    """x from right to left, moved as whole numbers."""
    return x.view(_BITS[x.element_size()]).flip(-1).view(x.dtype)


def through_bytes(x: Tensor) -> Tensor:
    """A copy of x, byte by byte."""
    return x.view(torch.uint8).clone().view(x.dtype)


def cleared_bits_(x: Tensor) -> Tensor:
    """Zeroes the first column of x by a view of it as whole numbers."""
    x.view(_BITS[x.element_size()])[..., :1].zero_()
    return x + 1


# Ops of somebody's own that write to their arguments, or read them as they lie in memory.

_LIBRARY = torch.library.Library("differential", "FRAGMENT")
_LIBRARY.define("stamp(Tensor(a!) x, Tensor v) -> ()")
_LIBRARY.define("stamp_all(Tensor(a!)[] xs) -> ()")


def _stamp(x: Tensor, v: Tensor) -> None:
    x.add_(v)


def _stamp_all(xs: list[Tensor]) -> None:
    for x in xs:
        x.mul_(0.5)


_LIBRARY.impl("stamp", _stamp, "CompositeExplicitAutograd")
_LIBRARY.impl("stamp_all", _stamp_all, "CompositeExplicitAutograd")


@torch.library.custom_op("differential::mark", mutates_args=("x",))
def mark(x: Tensor) -> None:
    """Somebody's op that writes to what it is given."""
    x[..., 0].fill_(0.25)


@torch.library.custom_op("differential::move", mutates_args=("x", "y"))
def move(x: Tensor, y: Tensor) -> Tensor:
    """Writes to two arguments, and returns a third value."""
    x.mul_(0.5)
    y.add_(0.25)
    return x.clone(memory_format=torch.contiguous_format)


@move.register_fake
def _(x: Tensor, y: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("differential::read_memory", mutates_args=())
def read_memory(x: Tensor) -> Tensor:
    """-x, by a kernel that takes for granted that rows lie one after the other."""
    return -x.as_strided((x.numel(),), (1,)).reshape(x.shape)


@read_memory.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def marked_(x: Tensor) -> Tensor:
    mark(x)
    return x.clone()


def stamped_(x: Tensor, v: Tensor) -> None:
    torch.ops.differential.stamp(x, v)


def all_stamped_(*xs: Tensor) -> None:
    torch.ops.differential.stamp_all(list(xs))


def moved_(x: Tensor, y: Tensor) -> Tensor:
    result: Tensor = move(x, y)
    return result


def read_by_memory(x: Tensor) -> Tensor:
    """-x; only a dense tensor is handed to the kernel."""
    result: Tensor = read_memory(x if x.is_contiguous() else x.contiguous())
    return result


NAMES: dict[str, Callable[..., object]] = {
    **NORMS, **QUANTS, **ROW_QUANTS, **GATED,
    **{
        each.__name__: each
        for each in (
            marked_, stamped_, all_stamped_, moved_, read_by_memory, either, repeated, region, reversed_bits,
            through_bytes, cleared_bits_, turned, padded_by_cat, padded_by_copy, dequantize, microscaled, experts,
            routed_experts, best_shares, attend, relu_of_product, own_epsilon, deepened,
        )
    },
}  # fmt: skip
"""What a program's text may call beside torch and F."""

REDUCTIONS = (all_reduce, largest, scattered, summed_in_place)
COLLECTIVES: dict[str, Callable[..., Tensor]] = {each.__name__: each for each in REDUCTIONS}
"""The same, with the group bound."""
