"""MXFP4, MXFP8 and NVFP4 as torchao leaves them: each spelling is one op, which computes what the graph does, bit for
bit. torchao's own code is run in `tests/integrations/test_torchao.py`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, fx

import fuseplan
from fuseplan.dialect import ops
from fuseplan.dialect.raising import canonicalize
from fuseplan.graph.ops import lay_out
from fuseplan.providers import provider_of
from fuseplan.rules.parts.fp4 import e2m1 as codes_of
from tests.helpers import llama, quickly_traced, randn
from tests.rules.parts import test_fp8_spellings as fp8_spellings
from tests.rules.parts import test_group_fp8 as group_fp8
from tests.rules.parts.microscaling import (
    CONFIG,
    E5M2,
    FP8,
    GROUP,
    LEAST,
    NV_GROUP,
    RULES,
    SCALINGS,
    WIDTH,
    W,
    bits,
    check_fused,
    cores,
    e2m1,
    inputs,
    mx_fp4,
    mx_fp8,
    nv_fp4,
    packed,
    to_blocked,
)

aten = torch.ops.aten
MX_FP4, MX_FP8, NV_FP4 = ops.per_token_mx_fp4_quant, ops.per_token_mx_fp8_quant, ops.per_token_nv_fp4_quant
Quantise = Callable[..., tuple[Tensor, Tensor]]
WHOLE = torch.tensor(0.02)
"""NVFP4's global scale."""
OF_ROWS = randn(5, 1, dtype=torch.float32, seed=3).abs()


class Spelling(NamedTuple):
    """Of rows: how they are quantised, with what other inputs, and the op's arguments ("input" for such an input)."""

    op: Any
    quantise: Quantise
    arguments: tuple[Any, ...]
    more: tuple[Tensor, ...] = ()


SPELLINGS = {
    **{f"mx_fp4 {each}": Spelling(MX_FP4, partial(mx_fp4, scaling=each), (GROUP, each, "rows")) for each in SCALINGS},
    **{
        f"mx_fp8 {kind} {each}": Spelling(
            MX_FP8, partial(mx_fp8, scaling=each, code=code), (GROUP, code, each, "rows")
        )
        for kind, code in (("e4m3", FP8), ("e5m2", E5M2)) for each in SCALINGS
    },
    **{
        f"nv_fp4 {least}": Spelling(NV_FP4, partial(nv_fp4, least=least), (NV_GROUP, None, least, "rows"))
        for least in (LEAST, 0.001)
    },
    **{
        f"nv_fp4 {least} global": Spelling(
            NV_FP4, partial(nv_fp4, least=least), (NV_GROUP, "input", least, "rows"), (WHOLE,)
        )
        for least in (LEAST, 0.001)
    },
}  # fmt: skip
FIRST = {"mx_fp4": "mx_fp4 floor", "mx_fp8": "mx_fp8 e4m3 floor", "nv_fp4": f"nv_fp4 {LEAST}"}
"""A spelling of each format."""
every_format = pytest.mark.parametrize("format_name", FIRST)


def behind_a_norm(quantise: Quantise) -> Quantise:
    return lambda x, *more: quantise(llama(x, None, W)[0], *more)


def runnable(graph: fx.Graph) -> fx.GraphModule:
    """With NaN for the constants that it names and doesn't read."""
    names = {str(node.target) for node in graph.find_nodes(op="get_attr")}
    return fx.GraphModule({name: torch.tensor(torch.nan) for name in names}, graph)


def check_equal(ours: fx.Graph, theirs: Callable[..., Any], *given: Any) -> None:
    """Bit for bit; sizes that `ours` asks for are the rows."""
    sizes = [given[0].shape[0]] * (len(ours.find_nodes(op="placeholder")) - len(given))
    for got, wanted in zip(runnable(ours)(*sizes, *given), theirs(*given), strict=True):
        assert (got.dtype, got.shape, got.stride()) == (wanted.dtype, wanted.shape, wanted.stride())
        assert torch.equal(bits(got), bits(wanted))


@pytest.mark.sampled
@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_spelling_is_an_op(name: str, dynamic: bool) -> None:
    op, quantise, arguments, more = SPELLINGS[name]
    graph = canonicalize(quickly_traced(behind_a_norm(quantise), randn(5, WIDTH), *more, dynamic=dynamic))
    assert graph.recognized() == {f"{op.name}[{WIDTH}]": 1, f"rms_norm[{WIDTH}]": 1}
    (node,) = graph.calls(op.overload)
    assert tuple("input" if isinstance(each, fx.Node) else each for each in node.args[1:]) == arguments
    assert not graph.refusals


@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_it_computes_what_the_graph_does(name: str, dtype: torch.dtype) -> None:
    _, quantise, _, more = SPELLINGS[name]
    graph = quickly_traced(quantise, randn(6, WIDTH).to(dtype), *more)
    raised = canonicalize(graph)
    is_refused = "rceil" in name and dtype is torch.float32
    assert len(raised.dialect_nodes) == (not is_refused)
    most = torch.finfo(dtype).max
    for value in inputs().values():
        x = value.clamp(-most, most) if dtype is torch.float16 else value
        check_equal(raised.graph, runnable(graph), x.to(dtype), *more)


def test_every_float_has_the_code_of_its_nearest_number() -> None:
    numbers = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    patterns = torch.arange(0, 2**31, 2**13 - 1).int()
    x = torch.cat([patterns.view(torch.float32), (patterns | -(2**31)).view(torch.float32)])
    x = torch.cat([x[x.isfinite()], *(numbers + eps for eps in (0.0, 0.25, -0.25, 0.5, 1.0))])
    away = (x.abs().clamp(max=6.0)[:, None] - numbers).abs()
    nearest = away.amin(-1, keepdim=True)
    codes = codes_of(x)
    even = torch.where(away == nearest, torch.arange(8) + 8 * (torch.arange(8) % 2), 99).argmin(-1)
    assert torch.equal(codes & 7, even.to(torch.uint8))
    assert torch.equal(codes >= 8, x.signbit())


@pytest.mark.parametrize("scaling", ["floor", "rceil"])
def test_what_is_clamped_is_the_same_op(scaling: str) -> None:
    raised = canonicalize(quickly_traced(partial(mx_fp8, scaling=scaling, clamped=True), randn(6, WIDTH)))
    assert len(raised.calls(MX_FP8.overload)) == 1
    assert not raised.graph.find_nodes(op="call_function", target=aten.clamp_max.default)


def laid_out(layout: Callable[[Tensor], Tensor], quantise: Quantise) -> Quantise:
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        codes, scale = quantise(x)
        return codes, layout(scale)

    return function


TILED = [name for name in SPELLINGS if "e5m2" not in name and name.endswith((*SCALINGS, f"nv_fp4 {LEAST}"))]


@pytest.mark.sampled
@pytest.mark.parametrize(("rows", "groups"), [(5, 12), (5, 9), (128, 8), (256, 9), (130, 5), (1, 3)])
@pytest.mark.parametrize("name", TILED)
@pytest.mark.parametrize("dynamic", [False, True])
def test_scales_in_tiles_are_the_ops_own(name: str, rows: int, groups: int, dynamic: bool) -> None:
    """What isn't there is zero, whose exponent no group has."""
    op, quantise, (size, *_), _ = SPELLINGS[name]
    function, given = laid_out(partial(to_blocked, flat=rows == 5), quantise), randn(rows, groups * size)
    raised = canonicalize(quickly_traced(function, given, dynamic=dynamic))
    (node,) = raised.calls(op.overload)
    assert node.args[-1] == "swizzled"
    assert not raised.calls(aten.permute.default, aten.amax.default)
    check_equal(raised.graph, function, given)


def in_tiles(scale: Tensor, rows: int = 128, first: int = 0, order: tuple[int, ...] = (0, 2, 1, 3)) -> Tensor:
    """Of five rows, from the `first` on, in zeros."""
    padded = torch.zeros((rows, 8), dtype=scale.dtype)
    padded[first : first + 5] = scale
    return padded.view(1, rows, 2, 4).permute(order).reshape(-1, rows // 32, 32, 4).transpose(1, 2).reshape(32, -1)


OTHER_TILES: dict[str, Callable[[Tensor], Tensor]] = {
    "of 64 rows": partial(in_tiles, rows=64),
    "down first": partial(in_tiles, order=(2, 0, 1, 3)),
    "from the second row": partial(in_tiles, first=1),
    "read twice": lambda scale: to_blocked(scale).view(torch.uint8) + scale.float().sum().to(torch.uint8),
}


@every_format
@pytest.mark.parametrize("layout", OTHER_TILES)
def test_other_tiles_are_left_to_a_copy(layout: str, format_name: str) -> None:
    op, quantise, (size, *_), _ = SPELLINGS[FIRST[format_name]]
    function, given = laid_out(OTHER_TILES[layout], quantise), randn(5, 8 * size)
    raised = canonicalize(quickly_traced(function, given))
    (node,) = raised.calls(op.overload)
    assert node.args[-1] == "rows" or layout == "read twice"
    check_equal(raised.graph, function, given)


def mx_tiles(x: Tensor, scaling: str) -> tuple[Tensor, Tensor]:
    return laid_out(lambda exponent: to_blocked(exponent.flatten(0, -2)), partial(mx_fp8, code=E5M2, scaling=scaling))(
        x
    )


def nv_of_all_kinds(x: Tensor, scaling: str) -> tuple[Tensor, Tensor]:
    """By a global scale and, of a sum, without one; of an activation, in tiles."""
    codes, scales = nv_fp4(x, None if scaling == "even" else WHOLE)
    return codes, to_blocked(scales.flatten(0, -2)) if scaling == "rceil" else scales


def groups_of_all_kinds(x: Tensor, scaling: str) -> tuple[Tensor, Tensor]:
    scale_of = {"ceil": group_fp8.power, "rceil": group_fp8.behind}.get(scaling, group_fp8.before)
    return group_fp8.quantize_groups(x, scale_of, multiplies=scaling == "rceil")


def e5m2_of_all_kinds(x: Tensor, scaling: str) -> tuple[Tensor, ...]:
    """By one scale, of rows and of groups."""
    if scaling == "rceil":
        return ((x.float() * WHOLE.reciprocal()).clamp(-57344.0, 57344.0).to(E5M2),)
    return fp8_spellings.SPELLINGS["groups in e5m2" if scaling == "ceil" else "rows in e5m2"].quantize(x)


KINDS = {
    "mx_fp4": cores(mx_fp4), "mx_fp8": cores(mx_fp8), "mx_fp8 in tiles": cores(mx_tiles),
    "nv_fp4": cores(nv_of_all_kinds), "group_fp8": cores(groups_of_all_kinds), "e5m2": cores(e5m2_of_all_kinds),
}  # fmt: skip


@pytest.mark.parametrize("core", RULES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(7, WIDTH), (2, 5, WIDTH)], ids=["matrix", "batch"])
def test_it_is_composed_with_every_core(kind: str, core: str, shape: tuple[int, ...], one_rank: str) -> None:
    check_fused(KINDS[kind][core], (randn(*shape), randn(*shape, seed=1)), one_rank, RULES[core])


@every_format
@pytest.mark.parametrize("on", [True, False])
def test_a_plan_for_b200_takes_it_unless_it_is_off(format_name: str, on: bool) -> None:
    function, config = behind_a_norm(SPELLINGS[FIRST[format_name]].quantise), fuseplan.PassConfig(fuse_norm_quant=on)
    report = fuseplan.explain(function, randn(64, WIDTH), device="b200", config=config)
    assert {rule for rule, count in report.fused.items() if count} == ({"norm_quant"} if on else set())
    assert (report.saved_us > 0) is on


# Near misses.


def swapped_in_bytes(codes: Tensor) -> Tensor:
    """The first of two in the high half."""
    flat = codes.contiguous().view(-1)
    return (flat[1::2] | flat[::2] << 4).view(*codes.shape[:-1], codes.shape[-1] // 2)


def of_halves(codes: Tensor) -> Tensor:
    """Neighbours are half a tensor apart."""
    flat = codes.contiguous().view(-1)
    count = flat.shape[0] // 2
    return (flat[:count] | flat[count:] << 4).view(*codes.shape[:-1], codes.shape[-1] // 2)


def of_signed(x: Tensor) -> tuple[Tensor, Tensor]:
    groups = x.reshape(-1, WIDTH // GROUP, GROUP)
    largest = groups.amax(-1).unsqueeze(-1).float()
    power = (torch.bitwise_right_shift(largest.view(torch.int32), 23) & 255) - 127
    exponent = torch.where(largest.isnan(), 255, ((power - 8).clamp(-127, 128) + 127).to(torch.uint8))
    scale = torch.bitwise_left_shift(exponent.to(torch.int32), 23).view(torch.float32)
    return (groups.float() / scale.clamp(min=torch.finfo(torch.float32).tiny)).to(FP8).reshape(x.shape), exponent


def truncated(x: Tensor) -> Tensor:
    """Without the rounding to the nearest."""
    bits = x.view(torch.int32)
    size = bits & 0x7FFFFFFF
    return (((size - (126 << 23)) >> 22).clamp(0, 7) | ((bits >> 28) & 8)).to(torch.uint8)


def exponents_alone(x: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    groups = x.view(-1, WIDTH // GROUP, GROUP)
    wanted = groups.abs().amax(-1).unsqueeze(-1).float() / largest
    finite = (torch.ceil(torch.log2(wanted)).clamp(-127, 127) + 127).to(torch.uint8)
    exponent = torch.where(wanted.isnan(), 255, torch.where(wanted.isinf(), 254, finite))
    scaled = groups.float() * torch.exp2(127 - exponent.float())
    return scaled.clamp(-largest, largest).view(x.shape), exponent.view(torch.float8_e8m0fnu)


def scaled_by(x: Tensor, scaled: Callable[[Tensor, Tensor], Tensor], kept: int = NV_GROUP) -> tuple[Tensor, Tensor]:
    """Of groups, or the first of each, and their scales."""
    groups = x.float().view(-1, WIDTH // NV_GROUP, NV_GROUP)[..., :kept]
    scale = (groups.abs().amax(-1) / 6.0).clamp(LEAST, 448.0).to(FP8)
    return packed(e2m1(scaled(groups, scale.float()).clamp(-6.0, 6.0).view(x.shape[0], -1))), scale


def divided(groups: Tensor, scale: Tensor) -> Tensor:
    """Not multiplied by the reciprocal."""
    return groups / scale.unsqueeze(-1)


def of_another_axis(groups: Tensor, scale: Tensor) -> Tensor:
    return groups * (1.0 / scale).view(scale.shape[0], 1, scale.shape[1])


SIX = "the codes are MXFP6 (e2m3), or e2m1 that is converted in another way"
E2M1 = "the codes are e2m1 that is converted in another way"
DIGIT = "the largest is rounded at another digit than the codes' last"
OTHERWISE = "codes in e2m1, or their scales, are computed in another way"
UNCLAMPED = "the value cast isn't clamped: beyond the range of float8_e5m2, torch yields infinity"
ONE_GROUP = f"a row is one group of {WIDTH}"
NEAR_MISSES: dict[str, tuple[Quantise, str]] = {
    "mx_fp4: a group a row": (partial(mx_fp4, scaling="floor", size=WIDTH), ONE_GROUP),
    "mx_fp4: the order in a byte": (partial(mx_fp4, scaling="floor", pack=swapped_in_bytes), SIX),
    "mx_fp4: halves of a tensor": (partial(mx_fp4, scaling="ceil", pack=of_halves), SIX),
    "mx_fp8: signed": (of_signed, "the scale is neither one number nor computed from the largest value it scales"),
    "mx_fp4: truncated": (partial(mx_fp4, scaling="ceil", convert=truncated), SIX),
    "mx_fp4: rounded as if to fp8": (partial(mx_fp4, scaling="even", half=1 << 19), DIGIT),
    "mx_fp4: divided by 6, truncated": (partial(mx_fp4, scaling="rceil", convert=truncated), E2M1),
    "mx_fp4: e3m2": (partial(mx_fp4, scaling="floor", top=4), "the codes are MXFP6 (e3m2)"),
    "mx_fp8: a group a row": (partial(mx_fp8, scaling="floor", size=WIDTH), ONE_GROUP),
    "mx_fp8: another exponent": (partial(mx_fp8, scaling="floor", top=7), "the scale"),
    "mx_fp8: e5m2 unclamped": (partial(mx_fp8, scaling="floor", code=E5M2, clamped=False), UNCLAMPED),
    "mx_fp8: e5m2 to even unclamped": (partial(mx_fp8, scaling="even", code=E5M2, clamped=False), UNCLAMPED),
    "mx_fp8: another exponent of e5m2": (partial(mx_fp8, scaling="ceil", code=E5M2, top=14), "the scale"),
    "mx_fp8: the exponent of e2m1": (partial(mx_fp8, scaling="even", top=2), SIX),
    "mx_fp8: up to 6": (partial(exponents_alone, largest=6.0), E2M1),
    "mx_fp8: up to 7.5": (partial(exponents_alone, largest=7.5), "the codes are MXFP6 (e2m3)"),
    "mx_fp8: up to 28": (partial(exponents_alone, largest=28.0), "the codes are MXFP6 (e3m2)"),
    "nv_fp4: a scale of all": (
        lambda x: nv_fp4(x, x.abs().amax().float() / 2688.0),
        "the global scale is computed from all rows at once, and the op is given it",
    ),
    "nv_fp4: a scale a row": (
        partial(nv_fp4, whole=OF_ROWS),
        "the global scale is float32[5, 1], and the op's is one element in float32",
    ),
    "nv_fp4: divided": (partial(scaled_by, scaled=divided), OTHERWISE),
    "nv_fp4: another axis": (partial(scaled_by, scaled=of_another_axis, kept=8), "the groups it scales"),
    "nv_fp4: truncated": (partial(nv_fp4, convert=lambda x: (x.abs() * 2).clamp(max=7).to(torch.uint8)), OTHERWISE),
    "nv_fp4: a scale of zero": (partial(nv_fp4, least=0.0), "the smallest scale is 0, and the op's is above 0"),
    "nv_fp4: a negative scale": (partial(nv_fp4, least=-1.0), "the smallest scale is -1, and the op's is above 0"),
    "nv_fp4: a group a row": (partial(nv_fp4, size=WIDTH), ONE_GROUP),
}  # fmt: skip


@pytest.mark.parametrize("case", NEAR_MISSES)
def test_what_it_does_not_compute_is_named(case: str) -> None:
    quantise, says = NEAR_MISSES[case]
    graph = canonicalize(quickly_traced(behind_a_norm(quantise), randn(5, WIDTH)))
    assert not graph.calls(MX_FP4.overload, MX_FP8.overload, NV_FP4.overload)
    report = fuseplan.explain(behind_a_norm(quantise), randn(5, WIDTH), device="b200")
    details = [refusal.detail for each in report.graphs for refusal in each.refusals]
    assert any(says in detail for detail in details), details
    assert not case.startswith("nv_fp4") or not any("fp8 quantisation" in detail for detail in details), details


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda x: MX_FP4.reference(x, GROUP, "nearest", "rows"), "'nearest' is not a valid MxScaling"),
        (lambda x: MX_FP8.reference(x, GROUP, FP8, "nearest", "rows"), "'nearest' is not a valid MxScaling"),
        (lambda x: MX_FP8.reference(x, GROUP, FP8, "floor", "columns"), "in 'rows' or 'swizzled', not in 'columns'"),
        (lambda x: NV_FP4.reference(x, NV_GROUP, None, LEAST, "columns"), "in 'rows' or 'swizzled', not in 'columns'"),
        (lambda x: lay_out(x.float(), "swizzled"), "in torch.float32 have no layout 'swizzled', which is of bytes"),
    ],
    ids=["mx_fp4 scaling", "mx_fp8 scaling", "mx_fp8 layout", "nv_fp4 layout", "a layout of bytes"],
)  # fmt: skip
def test_other_scalings_and_layouts_are_refused(call: Callable[[Tensor], Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        call(randn(3, WIDTH))


# Wrong kernels.


def right(op: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
    codes, scales = op.reference(*arguments)
    return codes, scales


def two_codes_off(op: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
    codes, scales = right(op, *arguments)
    return torch.where((codes & 7) < 6, codes + 2, codes), scales


def swapped(op: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
    codes, scales = right(op, *arguments)
    return codes << 4 | codes >> 4, scales


def another_exponent(op: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
    codes, exponents = right(op, *arguments)
    return codes, exponents + 1


def without_the_global_scale(op: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
    *rest, _, least, layout = arguments
    return right(op, *rest, None, least, layout)


def unwritten(op: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
    """The last of each row, of both."""
    found = right(op, *arguments)
    codes, scales = (torch.empty_like(each) for each in found)
    codes[:, :-1], scales[:, :-1] = (each[:, :-1] for each in found)
    return codes, scales


@pytest.mark.parametrize(
    ("format_name", "kernel"),
    [
        *(("mx_fp4", each) for each in (right, two_codes_off, swapped, another_exponent, unwritten)),
        *(("nv_fp4", each) for each in (right, two_codes_off, without_the_global_scale, unwritten)),
    ],
)
def test_a_wrong_kernel_is_found_before_it_is_used(format_name: str, kernel: Callable[..., Any]) -> None:
    op, name = ops[f"rms_norm_{format_name}_quant"], f"{format_name}_{kernel.__name__}"
    given = [WHOLE] if format_name == "nv_fp4" else []
    quantise = nv_fp4 if given else partial(mx_fp4, scaling="floor")
    graph = quickly_traced(behind_a_norm(quantise), randn(5, WIDTH), *given, dynamic=True)
    reports: list[fuseplan.Report] = []
    own = provider_of(name, {op: lambda *arguments: kernel(op, *arguments)}, cost=0.0, uuid=name)
    fuseplan.PostGradPassManager(CONFIG, providers=[own], on_report=reports.append)(graph)
    (verified,) = reports[0].graphs[0].verified
    assert verified.passed is (kernel is right)
    assert reports[0].fused["norm_quant"] == (kernel is right)
