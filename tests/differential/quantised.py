"""Random blocks that quantise: a norm, maybe gated, of a sum or of a reduced sum, or an activation, whose result one or
more layers quantise, each by itself, and others read as it is.

The oracle is the block in float64 without rounding. A value may be off it by a few times of what the block itself is,
relative to the value. A scale has to be one that the format gives to such values, and a code that of the exact value
over its scale, but where the value is within that of the middle between two.
"""

import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from fuseplan.compilation.manager import PostGradPassManager
from fuseplan.config import PassConfig
from fuseplan.devices import device_profile
from fuseplan.record import Reason, Report
from fuseplan.verification.compare import unit_in_the_last_place
from tests.differential.errors import FACTOR, exactly
from tests.differential.layout import strides_of
from tests.differential.recording import Recorded, record
from tests.differential.vocabulary import ROW_QUANTS
from tests.helpers import SPELLINGS, all_reduce, quantize, quantize_rows
from tests.rules.parts import test_group_fp8 as groups_fp8
from tests.rules.parts import test_scale_layouts as layouts
from tests.rules.parts.microscaling import E5M2, FP8, LEAST, SCALINGS, mx_fp4, mx_fp8, nv_fp4, to_blocked

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64)
POLICY = "ordered(allreduce_rms_quant, norm_quant, act_quant)"
ALONE = "ordered(norm_quant, act_quant)"
"""Kernels that reduce take several ranks."""
POWERS = ("power", "deep_gemm")
UPPER = torch.tensor([1.5])
READERS = ("product", "numbers", "returned")
Quantise = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Format:
    """A quantisation as a library spells it.

    Attributes:
        name: what tells it from others.
        kind: what it is counted by.
        quantise: rows [..., W] to codes and scales.
        group: elements with one scale; 0 for all.
        bits: of a code.
        lies: how scales lie that aren't in rows: packed or swizzled.
        whole: the scale of all scales.
        code: the dtype of codes of 8 bits.
    """

    name: str
    kind: str
    quantise: Quantise
    group: int
    bits: int = 8
    lies: str = "rows"
    whole: float = 1.0
    code: torch.dtype = FP8

    def restored(self, codes: Tensor, scales: Tensor, rows: int, width: int) -> tuple[Tensor, Tensor]:
        """(what codes stand for, the scale of each of them), [rows, width] in float64."""
        if self.bits == 4:
            steps = torch.stack((codes & 15, codes >> 4), -1).reshape(rows, width).long()
            values = torch.where(steps >= 8, -E2M1[steps & 7], E2M1[steps & 7])
        else:
            values = codes.double().reshape(rows, width)
        group = self.group or width
        count = width // group
        if self.lies == "packed":
            scales = torch.stack([scales >> shift & 255 for shift in (0, 8, 16, 24)], -1).flatten(-2)[:, :count]
            wide = torch.exp2(scales.double() - 127)
        elif self.lies == "swizzled":
            places = to_blocked(torch.arange(1, rows * count + 1).reshape(rows, count)).flatten()
            wide = torch.empty(rows * count, dtype=torch.float64)
            wide[places[places > 0] - 1] = scales.flatten()[places > 0].double()
            if not bool((scales.flatten()[places == 0].view(torch.uint8) == 0).all()):
                wide.fill_(math.nan)  # what isn't there is no zero
        else:
            wide = scales.double()
        wide = wide.reshape(-1, 1) if wide.numel() == 1 else wide.reshape(rows, count).repeat_interleave(group, 1)
        scale = (wide * self.whole).expand(rows, width)
        return values * scale, scale

    def nearest(self, values: Tensor, scale: Tensor) -> Tensor:
        """What the code nearest to each value stands for."""
        if self.bits == 8:
            most = torch.finfo(self.code).max
            return (values / scale).clamp(-most, most).to(self.code).double() * scale
        steps = (values / scale).abs().unsqueeze(-1)
        best = E2M1[(steps - E2M1).abs().argmin(-1)]
        return torch.where(values < 0, -best, best) * scale


def _in_rows(rng: random.Random, scale: Tensor) -> Format:
    name = rng.choice(list(ROWS))
    kind = "row bounded above" if name in ("quantize_rows_bounded", "bounded_by_tensor") else "row"
    return Format(name=name, kind=kind, quantise=ROWS[name], group=0, code=E5M2 if name == "in_e5m2" else FP8)


def in_e5m2(x: Tensor) -> tuple[Tensor, Tensor]:
    """A scale a row, for codes with a wider range."""
    scale = (x.abs().amax(-1, keepdim=True).float() / 57344.0).clamp(min=1e-12)
    return (x.float() / scale).clamp(-57344.0, 57344.0).to(E5M2), scale


def torchao(x: Tensor) -> tuple[Tensor, Tensor]:
    """Its rows: nothing bounds a scale, which is rounded."""
    scale = (x.abs().amax(-1, keepdim=True) / 448.0).float()
    return (x.float() / scale).clamp(-448.0, 448.0).to(FP8), scale


def bounded_by_tensor(x: Tensor) -> tuple[Tensor, Tensor]:
    """As vLLM's `QuantFP8` does by its `scale_ub`."""
    scale = torch.minimum(x.abs().amax(-1, keepdim=True).float(), UPPER.to(x.device)) / 448.0
    scale = scale.clamp(min=1 / (448.0 * 512.0))
    return (x.float() / scale).clamp(-448.0, 448.0).to(FP8), scale


ROWS: dict[str, Quantise] = {
    "quantize_rows": quantize_rows,
    **{f"quantize_rows_{how}": ROW_QUANTS[f"quantize_rows_{how}"] for how in ("divided", "rounded", "bounded")},
    **{each.__name__: each for each in (torchao, in_e5m2, bounded_by_tensor)},
}


def _of_all(rng: random.Random, scale: Tensor) -> Format:
    """One scale of all rows, which no op has."""
    return Format(name="of all rows", kind="tensor", quantise=ROW_QUANTS["quantize_all"], group=0)


def by_number(scale_of: groups_fp8.Scale, amax: Tensor) -> Tensor:
    return scale_of(amax.clamp(max=1.5))


def by_tensor(scale_of: groups_fp8.Scale, amax: Tensor) -> Tensor:
    return scale_of(torch.minimum(amax, UPPER.to(amax.device)))


def behind(scale_of: groups_fp8.Scale, amax: Tensor) -> Tensor:
    return scale_of(amax).clamp(max=2.0**-7)


GROUPS = (*sorted(groups_fp8.SCALES), *POWERS, *POWERS)


def _in_groups(rng: random.Random, scale: Tensor) -> Format:
    group, name, multiplies = rng.choice((64, 128)), rng.choice(GROUPS), rng.random() < 0.5
    if rng.random() < 0.15:
        quantise = partial(in_groups, ROWS["quantize_rows_rounded"], group)
        return Format(name=f"rounded {group}", kind=f"group {group}", quantise=quantise, group=group)
    scale_of, bound = groups_fp8.SCALES[name][0], rng.choice((None, None, None, by_number, by_tensor, behind))
    how = partial(
        groups_fp8.quantize_groups, scale_of=scale_of if bound is None else partial(bound, scale_of), group=group,
        multiplies=multiplies, wide=rng.random() < 0.3,
    )  # fmt: skip
    laid = [layouts.columns, layouts.aligned, layouts.aligned_in_zeros, *([layouts.packed] * 2 * (name in POWERS))]
    above = f" bounded above {bound.__name__}" if bound is not None else ""
    text = f"group {group} {name}{above}{' reciprocal' * multiplies}"
    kind = f"group {group}{' powers' * (name in (*POWERS, 'lifted'))}{' bounded above' * (bound is not None)}"
    if rng.random() < 0.4:
        return Format(name=text, kind=kind, quantise=how, group=group)
    lay = rng.choice(laid)
    lies = "packed" if lay is layouts.packed else "rows"
    quantise = partial(laid_out, how, lay)
    text, kind = f"{text} {lay.__name__}", f"{kind} {lay.__name__.removesuffix('_in_zeros')}"
    return Format(name=text, kind=kind, quantise=quantise, group=group, lies=lies)


def in_groups(quantise: Quantise, group: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """A quantisation of rows, of groups of them."""
    codes, scale = quantise(x.unflatten(-1, (-1, group)))
    return codes.flatten(-2), scale.squeeze(-1)


def laid_out(quantise: Quantise, lay: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """With scales that lie otherwise, as those of a matrix."""
    codes, scale = quantise(x)
    return codes, lay(scale.reshape(-1, scale.shape[-1]))


def _by_one(rng: random.Random, scale: Tensor) -> Format:
    reciprocal = rng.random() < 0.5

    def static(x: Tensor) -> tuple[Tensor, Tensor]:
        return quantize(x, scale, reciprocal=reciprocal), scale.clone()

    return Format(name=f"static{' reciprocal' * reciprocal}", kind="given scale", quantise=static, group=0)


def _microscaled(rng: random.Random, scale: Tensor) -> Format:
    bits = rng.choice((8, 4))
    scaling, code = rng.choice(SCALINGS), rng.choice((FP8, FP8, E5M2)) if bits == 8 else FP8
    quantise = partial(mx_fp8, scaling=scaling, code=code) if bits == 8 else partial(mx_fp4, scaling=scaling)
    swizzles = rng.random() < 0.4
    given = partial(laid_out, quantise, to_blocked) if swizzles else quantise
    lies = "swizzled" if swizzles else "rows"
    return Format(
        name=f"mx_fp{bits} {code} {scaling} {lies}", kind=f"mx_fp{bits}{' swizzled' * swizzles}", quantise=given,
        group=32, bits=bits, lies=lies, code=code,
    )  # fmt: skip


def _nv_fp4(rng: random.Random, scale: Tensor) -> Format:
    whole, swizzles = rng.choice((None, 0.02)), rng.random() < 0.5
    least = rng.choice((LEAST, 0.001))
    quantise = partial(nv_fp4, whole=None if whole is None else torch.tensor(whole), least=least)
    given = partial(laid_out, quantise, to_blocked) if swizzles else quantise
    lies = "swizzled" if swizzles else "rows"
    return Format(
        name=f"nv_fp4 {whole} {least} {lies}", kind=f"nv_fp4{' swizzled' * swizzles}", quantise=given, group=16,
        bits=4, lies=lies, whole=whole or 1.0,
    )  # fmt: skip


DRAWN = {_in_rows: 4, _in_groups: 8, _by_one: 2, _of_all: 1, _microscaled: 6, _nv_fp4: 4}
KINDS = (
    "given scale", "row", "row bounded above", "group 64", "group 64 powers", "group 128", "group 128 powers",
    "bounded above columns", "aligned", "packed", "mx_fp8", "mx_fp8 swizzled", "mx_fp4", "mx_fp4 swizzled", "nv_fp4",
    "nv_fp4 swizzled", "silu", "norm", "norm of a sum", "gated before", "gated behind", "unquantised too",
)  # fmt: skip
"""Of each of them, as a part of their kinds, many blocks have some that are fused."""


@torch.library.custom_op("differential::product", mutates_args=())
def product(codes: Tensor, scales: Tensor) -> list[Tensor]:
    """Stands for a product of a library's own, which reads both."""
    return [codes.clone(), scales.clone()]


@product.register_fake
def _(codes: Tensor, scales: Tensor) -> list[Tensor]:
    return [torch.empty_like(codes), torch.empty_like(scales)]


class Block:
    """One of a seed.

    Attributes:
        calls: the arguments of each call, of which the first has the sizes that the block is traced with.
    """

    def __init__(self, seed: int, group: str) -> None:
        self.seed, self.group = seed, group
        rng = random.Random(seed)
        self.dtype = rng.choices((torch.bfloat16, torch.float16, torch.float32), (6, 2, 1))[0]
        self.source = rng.choices((*SPELLINGS, "silu", "gelu"), (3, 2, 1, 1, 2, 4, 1))[0]
        self.is_norm = self.source in SPELLINGS
        self.adds, self.reduces = rng.random() < 0.6, self.is_norm and rng.random() < 0.3
        self.gate = rng.choice(("before", "behind")) if self.is_norm and rng.random() < 0.15 else ""
        self.scale = torch.tensor([0.02])
        count = rng.choices((1, 2, 3), (5, 3, 2))[0]
        first = self._draw(rng)
        self.formats = [first, *(first if rng.random() < 0.8 else self._draw(rng) for _ in range(count - 1))]
        # What is returned has memory of its own, so that layers that return their codes share none.
        self.readers = [rng.choice(READERS[: 2 if count > 1 and rng.random() < 0.8 else 3]) for _ in range(count)]
        self.also = rng.choices(("", "itself", "product", "pointwise"), (7, 1, 1, 1))[0]
        self.width = rng.choice((128, 256, 384, 640))
        leading = rng.choice(((1,), (5,), (7,), (2, 3), (7, 1), (130,)))
        self.dynamic = rng.random() < 0.3 and leading[0] > 1
        generator = torch.Generator().manual_seed(seed)
        self.weight = (1 + torch.randn(self.width, generator=generator) / 10).to(self.dtype)
        self.matrix = (torch.randn(self.width, 16, generator=generator) / 10).to(self.dtype)
        self.calls = [self._inputs((first, *leading[1:]), rng, generator) for first in self._sizes(leading[0])]

    def _draw(self, rng: random.Random) -> Format:
        return rng.choices(list(DRAWN), list(DRAWN.values()))[0](rng, self.scale)

    def _sizes(self, first: int) -> Sequence[int]:
        return (first, first + 4) if self.dynamic else (first,)

    def _inputs(self, leading: Sequence[int], rng: random.Random, generator: torch.Generator) -> list[Tensor]:
        spread = torch.exp2(torch.linspace(*rng.choice(((0, 0), (-3, 3), (-8, 6))), math.prod(leading)))
        rows = spread.reshape(*leading, 1)
        found = [(torch.randn(*leading, self.width, generator=generator) * rows).to(self.dtype) for _ in range(2)]
        if rng.random() < 0.3 and len(spread) > 1:
            for each in found:
                each.reshape(-1, self.width)[0] = 0.0
        for each in found if self.dynamic else ():
            torch._dynamo.maybe_mark_dynamic(each, 0)
        return found

    def __str__(self) -> str:
        parts = [f"seed {self.seed}", str(self.dtype), self.source, *(["of a sum"] if self.adds else [])]
        parts += [f"gated {self.gate}"] if self.gate else []
        parts += ["reduced"] * self.reduces + ["dynamic"] * self.dynamic
        parts += [f"{[*call[0].shape]}" for call in self.calls]
        parts += [f"{each.name} {reader}" for each, reader in zip(self.formats, self.readers, strict=True)]
        return ", ".join([*parts, *([f"{self.also} too"] if self.also else [])])

    def value(self, x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        """(what is quantised, the sum)"""
        if not self.is_norm:
            return (F.silu(x) if self.source == "silu" else F.gelu(x)) * r, r
        gate, norm = F.silu(r.float()), SPELLINGS[self.source]
        x = all_reduce(x, self.group) if self.reduces else x
        if self.gate == "before":
            x = (x * gate).to(self.dtype)
        y, total = norm(x, r if self.adds else None, self.weight)
        return (y * gate).to(self.dtype) if self.gate == "behind" else y, total

    @property
    def kinds(self) -> set[str]:
        """What it is counted by; of several formats, none is."""
        formats = {each.kind for each in self.formats}
        core = f"{'reduced ' * self.reduces}norm{' of a sum' * self.adds}" if self.is_norm else self.source
        gated = {f"gated {self.gate}"} if self.gate else set()
        return (
            {core} | gated | ({"unquantised too"} if self.also else set()) | (formats if len(formats) == 1 else set())
        )

    def __call__(self, x: Tensor, r: Tensor) -> list[Tensor]:
        """Codes and scales of each layer, and what others read."""
        y, total = self.value(x, r)
        found: list[Tensor] = []
        for form, reader in zip(self.formats, self.readers, strict=True):
            codes, scales = form.quantise(y)
            if reader == "product":
                found += product(codes, scales)
            else:
                found += [codes.float() if reader == "numbers" and form.bits == 8 else codes, scales]
        if self.also == "itself":
            found.append(y)
        elif self.also:
            found.append(y.relu() if self.also == "pointwise" else y @ self.matrix)
        return [*found, *([total * 2] if self.adds and self.is_norm else [])]


def fused(recorded: Recorded, policy: str, device: str | None, verify: str) -> tuple[fx.GraphModule, Report]:
    """A recorded graph after the passes."""
    reports, graph = list[Report](), recorded.copy()
    config = PassConfig(policy=policy, verify=verify, costs="modelled")
    profile = device_profile(device) if device is not None else None
    PostGradPassManager(config, on_report=reports.append, device=profile)(graph)
    assert graph.owning_module is not None
    graph.owning_module.recompile()
    return graph.owning_module, reports[0]


def tried(block: Block, *, kernels: bool = False) -> tuple[Counter[str], list[str]]:
    """(applied fusions by op, what is wrong) of a block, by references, or by Triton's kernels in its interpreter."""
    rng = random.Random(block.seed + 1)
    applied, problems = Counter[str](), list[str]()
    for recorded in record(block, block.calls):
        device = rng.choice(("h200", "b200")) if kernels else None
        verify = "always" if not kernels and rng.random() < 0.2 else "off"
        module, report = fused(recorded, ALONE if kernels else POLICY, device, verify)
        applied.update(f"{one.op} {one.provider}" for each in report.graphs for one in each.applied)
        problems += [
            f"{each.reason}: {each.detail}" for graph in report.graphs for each in graph.refusals
            if each.reason in (Reason.FAULT, Reason.VERIFICATION)
        ]  # fmt: skip
        for given, (x, r) in zip(recorded.calls, block.calls, strict=True):
            with torch.no_grad():
                before = torch.utils._pytree.tree_leaves(fx.Interpreter(recorded.graph).run(*given))
                after = torch.utils._pytree.tree_leaves(fx.Interpreter(module).run(*given))
            is_exact = not kernels and block.source != "silu" and not block.gate
            problems += differences(block, before, after, x, r, is_exact=is_exact)
    return applied, [f"{block}: {problem}" for problem in problems]


def differences(
    block: Block, before: Sequence[Tensor], after: Sequence[Tensor], x: Tensor, r: Tensor, *, is_exact: bool
) -> Iterator[str]:
    """What is wrong with results of a block.

    Args:
        block: it.
        before: the results of its graph.
        after: those of the fused graph.
        x: its first argument.
        r: the second one.
        is_exact: whether both have to be the same, bit for bit.
    """
    for index, (result, wanted) in enumerate(zip(after, before, strict=True)):
        if (result.dtype, result.shape, strides_of(result)) != (wanted.dtype, wanted.shape, strides_of(wanted)):
            yield f"result {index} is {result.dtype} {[*result.shape]} with strides {result.stride()}, not as before"
        elif is_exact and not _same(result, wanted):
            yield f"result {index} has other bits in {int((result.double() != wanted.double()).sum())} places"
    truth: Tensor = exactly(block.value, (x, r))[0][0]
    own = block.value(x, r)[0]
    rows, width = own.numel() // block.width, block.width
    exact, rounded = truth.reshape(rows, width), own.double().reshape(rows, width)
    error, size = (rounded - exact).abs(), exact.abs()
    relative = (error / torch.where(size == 0, 1.0, size)).amax(-1, keepdim=True)
    relative = relative.clamp(max=2 * torch.finfo(own.dtype).eps)  # more is of what was too small for its dtype
    off = torch.maximum(error, relative * size) * FACTOR + unit_in_the_last_place(exact, own.dtype)
    for number, form in enumerate(block.formats):
        at = 2 * number
        got, plain = (form.restored(side[at], side[at + 1], rows, width) for side in (after, before))
        counts = got[1].isfinite() & (got[1] > 0) & got[0].isfinite()
        if not torch.equal(counts, plain[1].isfinite() & (plain[1] > 0) & plain[0].isfinite()):
            yield f"{form.name}: other codes than before are no numbers"
            continue
        scale = torch.where(counts, got[1], 1.0)
        allowed = (form.nearest(exact, scale) - exact).abs() * (1 + 1e-5) + 2 * off
        wrong = counts & ((got[0] - exact).abs() > allowed)
        if wrong.any():
            row, column = (int(each) for each in wrong.nonzero()[0])
            yield (
                f"{form.name}: {int(wrong.sum())} codes aren't next to the exact values: [{row}, {column}] is "
                f"{float(got[0][row, column])} for {float(exact[row, column])}, before {float(plain[0][row, column])}"
            )
        ends = [((exact.abs() + side * off).clamp(min=0) * exact.sign()).to(own.dtype) for side in (-1, 1)]
        bounds = [plain[1], *(form.restored(*form.quantise(end.reshape(own.shape)), rows, width)[1] for end in ends)]
        least, most = torch.stack(bounds).aminmax(dim=0)
        wrong = counts & ((got[1] < least * (1 - 1e-6)) | (got[1] > most * (1 + 1e-6)))
        if wrong.any():
            row, column = (int(each) for each in wrong.nonzero()[0])
            yield (
                f"{form.name}: the scale of [{row}, {column}] is {float(got[1][row, column])}, and those of the exact "
                f"values are from {float(least[row, column])} to {float(most[row, column])}"
            )


def _same(got: Tensor, wanted: Tensor) -> bool:
    left, right = got.double(), wanted.double()
    return torch.equal(left.isnan(), right.isnan()) and torch.equal(left.nan_to_num(), right.nan_to_num())


def all_of(seeds: range, group: str, *, kernels: bool = False) -> dict[str, Any]:
    """Of the blocks of some seeds: how many have a fusion, of which kinds these are, fusions by op and provider, and
    all that is wrong.
    """
    applied, kinds, problems, fused_blocks = Counter[str](), Counter[str](), list[str](), 0
    for seed in seeds:
        block = Block(seed, group)
        more, wrong = tried(block, kernels=kernels)
        applied += more
        problems += wrong
        fused_blocks += bool(more)
        kinds.update(block.kinds if more else ())
    return {"fused": fused_blocks, "kinds": dict(kinds), "applied": dict(applied), "problems": problems}
