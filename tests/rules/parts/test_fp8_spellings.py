"""fp8 as engines and libraries write it in plain torch: each spelling is one op, which computes what the graph does,
bit for bit; what no op computes is named for what it is.

vLLM's own code is run in `tests/integrations/vllm/test_fp8.py`.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional as F

import fuseplan
from fuseplan.dialect import NORM_FAMILY, ops
from fuseplan.dialect.raising import canonicalize
from fuseplan.graph.facts import convert_element_type
from fuseplan.providers import BUILT_IN_PROVIDERS
from fuseplan.rules import Bindings
from tests.helpers import llama, post_grad, quickly_traced, randn, written
from tests.rules.parts import test_group_fp8 as group_fp8
from tests.rules.planning import compiled_and_eager

FP8, MOST = torch.float8_e4m3fn, 448.0
E5M2, WIDE, WIDE_LEAST = torch.float8_e5m2, 57344.0, 1e-12
WIDTH, GROUP = 256, 64
LEAST = 1 / (MOST * 512.0)
W = 1 + randn(WIDTH, seed=9) / 10
Quantize = Callable[[Tensor], tuple[Tensor, Tensor]]


def codes(scaled: Tensor) -> Tensor:
    return scaled.clamp(-MOST, MOST).to(FP8)


def up_to_a_power(scale: Tensor) -> Tensor:
    return torch.exp2(torch.ceil(torch.log2(scale)))


def largest(x: Tensor) -> Tensor:
    return x.abs().amax(-1, keepdim=True)


def first_largest(x: Tensor) -> Tensor:
    """By `max`, as vLLM's `QuantFP8` has it."""
    return x.abs().max(dim=-1)[0].unsqueeze(-1)


def divided(x: Tensor, scale: Tensor) -> Tensor:
    return codes(x.float() / scale)


def multiplied(x: Tensor, scale: Tensor) -> Tensor:
    return codes(x.float() * scale.reciprocal())


def by_rows(
    scale_of: Callable[[Tensor], Tensor], codes_of: Callable[[Tensor, Tensor], Tensor] = divided
) -> Quantize:  # fmt: skip
    """By a scale of rows."""

    def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
        scale = scale_of(x)
        return codes_of(x, scale), scale

    return quantize


def by_groups(
    scale_of: Callable[[Tensor], Tensor], codes_of: Callable[[Tensor, Tensor], Tensor] = divided
) -> Quantize:  # fmt: skip
    """By a scale of each group."""

    def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
        groups = x.view(-1, x.shape[-1] // GROUP, GROUP)
        scale = scale_of(groups)
        return codes_of(groups, scale).view(x.shape), scale.reshape(*x.shape[:-1], x.shape[-1] // GROUP)

    return quantize


def of_flat_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Scales are looked at as one dimension meanwhile."""
    flat = x.reshape(-1, x.shape[-1])
    scale = flat.abs().amax(-1).clamp(min=1e-4).float() / MOST
    return codes(flat * (1.0 / scale)[:, None]).view(x.shape), scale.view(*x.shape[:-1], 1)


def of_groups_by_max(x: Tensor) -> tuple[Tensor, Tensor]:
    """vLLM's `QuantFP8` by groups."""
    return by_groups(lambda groups: (first_largest(groups).float() / MOST).clamp(min=LEAST))(x)


def of_groups_by_columns(x: Tensor) -> tuple[Tensor, Tensor]:
    """The same with scales that lie column after column."""
    q, scale = of_groups_by_max(x)
    return q, scale.transpose(-2, -1).contiguous().transpose(-1, -2)


def of_groups_by_powers(x: Tensor) -> tuple[Tensor, Tensor]:
    """The same with `use_ue8m0`: the least scale comes last, and is no power of two."""
    return by_groups(lambda groups: up_to_a_power(first_largest(groups).float() / MOST).clamp(min=LEAST))(x)


def of_rows_of_groups(x: Tensor) -> tuple[Tensor, Tensor]:
    """SGLang's and vLLM's native one: all groups of all rows as rows, and a least largest element in x's own dtype."""
    groups = x.reshape(x.numel() // GROUP, GROUP)
    scale = groups.abs().max(dim=-1, keepdim=True)[0].clamp(min=1e-10).to(torch.float32) / MOST
    return codes(groups / scale).reshape(x.shape), scale.reshape(*x.shape[:-1], x.shape[-1] // GROUP)


def of_groups_unclamped(x: Tensor) -> tuple[Tensor, Tensor]:
    """DeepGEMM's: nothing is clamped, and nothing has to be."""
    groups = x.view(*x.shape[:-1], x.shape[-1] // GROUP, GROUP)
    scale = groups.abs().float().amax(dim=-1).clamp(1e-4) / MOST
    return (groups * (1.0 / scale.unsqueeze(-1))).to(FP8).view(x.shape), scale


def of_groups_in_float32(x: Tensor) -> tuple[Tensor, Tensor]:
    """x is cast before it is viewed."""
    groups = x.float().view(-1, GROUP)
    scale = groups.abs().amax(dim=-1).clamp(1e-4) / MOST
    return codes(groups / scale.unsqueeze(-1)).view(x.shape), scale.view(*x.shape[:-1], -1)


def of_groups_repeated(x: Tensor) -> tuple[Tensor, Tensor]:
    """Scales are repeated along rows, as torchao and vLLM's `group_broadcast` do it."""
    scale = x.view(*x.shape[:-1], -1, GROUP).abs().amax(-1).float() / MOST
    repeated = scale.unsqueeze(-1).expand(*scale.shape, GROUP).flatten(-2)
    return codes(x.float() / repeated), scale


def of_rows_all_rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """compressed-tensors 0.20: all is in the precision of x, and 0 is no scale."""
    low, high = torch.amin(x, -1, keepdim=True), torch.amax(x, -1, keepdim=True)
    low, high = torch.min(low, torch.zeros_like(low)), torch.max(high, torch.zeros_like(high))
    scale = torch.maximum(low.abs(), high.abs()) / torch.full((), MOST, dtype=x.dtype)
    scale = torch.where(scale == 0, torch.full((), EPSILON, dtype=x.dtype), scale)
    return (x / scale).clamp(torch.full((), -MOST), torch.full((), MOST)).to(FP8), scale


EPSILON = 0.0078125
DIVIDE, MULTIPLY, BY_ROUNDED, ROUNDS = "divide", "multiply", "divide_by_rounded", "divide_rounded"
ROUNDED = float(torch.tensor(1e-10, dtype=torch.bfloat16).float() / MOST)
TENTH = float(torch.tensor(1e-4) / MOST)
ROUNDED_TENTH = float(torch.tensor(1e-4, dtype=torch.bfloat16).float() / MOST)
TWICE_ROUNDED = float((torch.tensor(1e-4).bfloat16() / MOST).float())
UPPER = float(torch.tensor(1.5) / MOST)
ROUNDED_UPPER = float(torch.tensor(1.3).bfloat16() / MOST)
ROWS, GROUPS = ops.dynamic_per_token_scaled_fp8_quant, ops.per_token_group_fp8_quant
OF_ROWS: dict[str, tuple[Quantize, tuple[Any, ...]]] = {
    "by max, as vLLM's": (
        by_rows(lambda x: (first_largest(x).float() / MOST).clamp(min=LEAST), multiplied),
        (LEAST, 0.0, 0.0, None, MULTIPLY),
    ),
    "without zeros, as AITER's": (
        by_rows(lambda x: torch.where((scale := largest(x.float()) / MOST) == 0, 1.0, scale)),
        (0.0, 0.0, 1.0, None, DIVIDE),
    ),
    "flat": (of_flat_rows, (ROUNDED_TENTH, 0.0, 0.0, None, MULTIPLY)),
    "by a least in its tensor's dtype": (
        by_rows(lambda x: torch.maximum(largest(x).float(), torch.full((1,), 1e-4, dtype=torch.bfloat16)) / MOST),
        (ROUNDED_TENTH, 0.0, 0.0, None, DIVIDE),
    ),
    "in low precision, as torchao's": (
        by_rows(lambda x: (largest(x) / MOST).float()), (0.0, 0.0, 0.0, None, BY_ROUNDED)
    ),
    "bounded on both sides of the rounding": (
        by_rows(lambda x: (largest(x.float()) / MOST).to(x.dtype).clamp(min=1e-4).float().clamp(min=LEAST)),
        (float(torch.tensor(1e-4).bfloat16()), 0.0, 0.0, None, BY_ROUNDED),
    ),
    "up to a number, as FBGEMM's": (
        by_rows(lambda x: largest(x).float().clamp(1e-4, 1.5) / MOST), (TENTH, UPPER, 0.0, None, DIVIDE)
    ),
    "up to a rounded number, as torchao's": (
        by_rows(lambda x: (largest(x).clamp(1e-4, 1.3) / MOST).float()),
        (TWICE_ROUNDED, ROUNDED_UPPER, 0.0, None, BY_ROUNDED),
    ),
    "all rounded, as compressed-tensors'": (of_rows_all_rounded, (0.0, 0.0, EPSILON, None, ROUNDS)),
    "in e5m2": (
        by_rows(lambda x: (largest(x).float() / WIDE).clamp(min=WIDE_LEAST), lambda x, scale: (x / scale).to(E5M2)),
        (WIDE_LEAST, 0.0, 0.0, None, DIVIDE),
    ),
}  # fmt: skip
OF_GROUPS: dict[str, tuple[Quantize, tuple[Any, ...]]] = {
    "in low precision": (
        by_groups(lambda groups: (largest(groups).clamp(1e-4) / MOST).float()),
        (TWICE_ROUNDED, 0.0, False, 0.0, 0.0, None, BY_ROUNDED, "rows"),
    ),
    "by max": (of_groups_by_max, (LEAST, 0.0, False, 0.0, 0.0, None, DIVIDE, "rows")),
    "by columns": (of_groups_by_columns, (LEAST, 0.0, False, 0.0, 0.0, None, DIVIDE, "columns")),
    "by powers": (of_groups_by_powers, (0.0, 0.0, True, LEAST, 0.0, None, DIVIDE, "rows")),
    "as rows": (of_rows_of_groups, (ROUNDED, 0.0, False, 0.0, 0.0, None, DIVIDE, "rows")),
    "unclamped": (of_groups_unclamped, (TENTH, 0.0, False, 0.0, 0.0, None, MULTIPLY, "rows")),
    "in float32": (of_groups_in_float32, (TENTH, 0.0, False, 0.0, 0.0, None, DIVIDE, "rows")),
    "up to a number": (
        by_groups(lambda groups: (largest(groups).float() / MOST).clamp(max=torch.full((1,), 0.003)).clamp(min=LEAST)),
        (LEAST, 0.003, False, 0.0, 0.0, None, DIVIDE, "rows"),
    ),
    "all rounded": (
        by_groups(
            lambda groups: torch.where((scale := largest(groups) / MOST) == 0, EPSILON, scale),
            lambda groups, scale: codes(groups / scale),
        ),
        (0.0, 0.0, False, 0.0, EPSILON, None, ROUNDS, "rows"),
    ),
    "repeated": (of_groups_repeated, (0.0, 0.0, False, 0.0, 0.0, None, DIVIDE, "rows")),
    "in e5m2": (
        by_groups(
            lambda groups: (largest(groups.float()) / WIDE).clamp(min=WIDE_LEAST),
            lambda groups, scale: (groups.float() / scale).clamp(-WIDE, WIDE).to(E5M2),
        ),
        (WIDE_LEAST, 0.0, False, 0.0, 0.0, None, DIVIDE, "rows"),
    ),
    **{
        f"by a scale {name}": (partial(group_fp8.quantize_groups, scale_of=scale_of), (*bounds, DIVIDE, "rows"))
        for name, (scale_of, *bounds) in group_fp8.SCALES.items()
    },
}  # fmt: skip


class Spelling(NamedTuple):
    """How rows are quantised, by what op, and its arguments."""

    quantize: Quantize
    op: Any
    arguments: tuple[Any, ...]


def code_of(name: str) -> torch.dtype:
    return E5M2 if name == "in e5m2" else FP8


SPELLINGS = {
    **{f"rows {name}": Spelling(each, ROWS, (code_of(name), *rest)) for name, (each, rest) in OF_ROWS.items()},
    **{
        f"groups {name}": Spelling(each, GROUPS, (GROUP, code_of(name), *rest))
        for name, (each, rest) in OF_GROUPS.items()
    },
}
CODED = ("rows by max, as vLLM's", "rows up to a number, as FBGEMM's", "groups by max", "groups in float32")
"""What code is made of; graphs of others are interpreted."""
TRACERS = (post_grad, quickly_traced)
every_spelling = pytest.mark.parametrize("name", SPELLINGS)


def behind_a_norm(quantize: Quantize) -> Quantize:
    return lambda x: quantize(llama(x, None, W)[0])


def bits(value: Tensor) -> Tensor:
    """NaN being one NaN."""
    is_code = value.dtype.itemsize == 1
    return value.float().nan_to_num(nan=torch.inf).add(0.0) if is_code else value.nan_to_num(nan=-1.0)


def inputs(dtype: torch.dtype) -> dict[str, Tensor]:
    """Random, tiny, huge and mixed values, and what isn't finite."""
    x = randn(6, WIDTH, seed=3, dtype=torch.float32)
    mixed = x * torch.tensor([1e-30, 1e-9, 1.0, 3e4, 0.0, 1e3])[:, None]
    mixed[5, GROUP:] = 0.0
    odd = x.clone()
    odd[0, 3], odd[1, 200], odd[2, 0] = torch.inf, torch.nan, -torch.inf
    edges = MOST * torch.exp2(torch.arange(-24.0, 24.0)).repeat(6, WIDTH)[:, :WIDTH]
    most = torch.finfo(dtype).max
    found = {"random": x, "tiny": x * 1e-38, "huge": (x * most).clamp(-most, most), "mixed": mixed, "odd": odd}
    return {kind: value.to(dtype) for kind, value in {**found, "edges": edges}.items()}


@pytest.mark.parametrize(("rows", "dynamic"), [(5, True), (5, False), (1, False)])
@every_spelling
def test_a_spelling_is_an_op(name: str, rows: int, dynamic: bool) -> None:
    quantize, op, arguments = SPELLINGS[name]
    if rows == 1 and quantize is of_groups_by_columns:
        return  # one row lies in columns, too
    graph = canonicalize(quickly_traced(behind_a_norm(quantize), randn(rows, WIDTH), dynamic=dynamic))
    assert graph.recognized() == {f"{op.name}[{WIDTH}]": 1, f"rms_norm[{WIDTH}]": 1}
    (node,) = graph.calls(op.overload)
    assert node.args[1:] == arguments
    assert node.args[0].target is ops.rms_norm.overload
    graph.graph.lint()


@pytest.mark.parametrize("name", CODED)
def test_graphs_traced_quickly_are_those_of_dynamo(name: str) -> None:
    """And stand for them here."""
    given = behind_a_norm(SPELLINGS[name].quantize), randn(5, WIDTH)
    targets = [[node.target for node in trace(*given).nodes if node.op == "call_function"] for trace in TRACERS]
    assert targets[0] == targets[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@every_spelling
def test_it_computes_what_the_graph_does(name: str, dtype: torch.dtype) -> None:
    quantize, _, arguments = SPELLINGS[name]
    graph = quickly_traced(quantize, randn(6, WIDTH).to(dtype))
    raised = canonicalize(graph)
    is_refused = dtype is torch.float32 and any(each is True for each in arguments)  # powers of two
    assert len(raised.dialect_nodes) == (not is_refused)
    ours, theirs = fx.GraphModule({}, raised.graph), fx.GraphModule({}, graph)
    for kind, value in inputs(dtype).items():
        for got, wanted in zip(ours(value), theirs(value), strict=True):
            assert got.dtype is wanted.dtype
            assert torch.equal(bits(got), bits(wanted)), kind


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("shape", "dynamic"), [((2, 3, WIDTH), (0, 1)), pytest.param((1, WIDTH), (), marks=pytest.mark.nightly)]
)
@every_spelling
def test_batches_of_any_shape_are_fused(name: str, shape: tuple[int, ...], dynamic: tuple[int, ...]) -> None:
    x, coded = randn(*shape), bool(dynamic) and name in CODED
    torch._dynamo.mark_dynamic(x, dynamic)
    function = behind_a_norm(SPELLINGS[name].quantize)
    report, pairs = compiled_and_eager(function, x, policy="ordered(norm_quant)", coded=coded)
    assert report.fused["norm_quant"] == 1
    for got, wanted in pairs:
        assert torch.equal(bits(got), bits(wanted))
        assert got.stride() == wanted.stride()


JUST_ABOVE = 2.0**-20 * (1 + 2.0**-23)


def by_the_most(x: Tensor) -> tuple[Tensor, Tensor]:
    groups = x.view(-1, WIDTH // GROUP, GROUP)
    largest = groups.abs().float().amax(dim=2).clamp(1e-4)
    return (groups * (MOST / largest.unsqueeze(2))).to(FP8).view(x.shape), largest / MOST


def rounded_by_bits(scale: Tensor) -> Tensor:
    held = scale.view(torch.int)
    exponent = ((held >> 23) & 0xFF) + (held & 0x7FFFFF).bool().int()
    return (exponent.clamp(1, 254) << 23).view(torch.float)


def with_indices(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    largest, index = x.abs().max(dim=-1, keepdim=True)
    scale = largest.float() / MOST
    return codes(x.float() / scale), scale, index


def over_columns(x: Tensor) -> tuple[Tensor, Tensor]:
    squares = x.view(-1, 16, 16)
    scale = squares.abs().amax(1).unsqueeze(-1).float() / MOST
    return codes(squares / scale), scale


def unclamped(x: Tensor, scale: Tensor) -> Tensor:
    return (x.float() / scale).to(FP8)


UNCLAMPED = "the value cast isn't clamped to +-448"
LOW = "the scale is computed in bfloat16, and the op computes it in float32"
NEAR_MISSES: dict[str, tuple[Callable[[Tensor], tuple[Tensor, ...]], str]] = {
    "by the most": (by_the_most, "x is multiplied by 448 / amax, which rounds otherwise than by 1 / (amax / 448)"),
    "by bits": (
        by_groups(lambda groups: rounded_by_bits((largest(groups).float() / MOST).clamp(1e-4 / MOST))),
        "the scale is rounded by its bits, which makes an infinite one finite",
    ),
    "powers in low precision": (by_rows(lambda x: up_to_a_power((largest(x) / MOST).float())), LOW),
    "multiplied in low precision": (
        by_rows(lambda x: (largest(x) / MOST).float(), multiplied), LOW,
    ),
    "a narrow scale": (by_rows(lambda x: largest(x) / MOST), "the scale is bfloat16, and the op takes float32"),
    "a bound a row": (
        by_rows(
            lambda x: (torch.minimum(largest(x).float(), x.float().mean(-1, True).exp()) / MOST).clamp(min=LEAST)
        ),
        "the upper bound of the largest (aten.minimum.default) isn't one element in its dtype",
    ),
    "a bound below its least": (
        by_rows(lambda x: (largest(x).float().clamp(max=1e-4) / MOST).clamp(min=0.1)),
        "the scale has a least bound above its upper one",
    ),
    "a power with a bound": (
        by_groups(lambda groups: up_to_a_power(largest(groups).float() / MOST).clamp(max=2.0)),
        "the power of two has an upper bound"
    ),
    "chosen": (
        by_rows(lambda x: torch.where((scale := largest(x).float() / MOST) < 1e-6, 1.0, scale)),
        "the scale is computed by aten.where.self",
    ),
    "with indices": (with_indices, "the indices of the largest are read, too"),
    "unclamped": (by_rows(lambda x: largest(x).float() / MOST, unclamped), UNCLAMPED),
    "rows by powers": (
        by_rows(lambda x: up_to_a_power(largest(x).float() / MOST)),
        "the scale is rounded up to a power of two, and the op's of whole rows isn't",
    ),
    "over columns": (over_columns, "not by amax over the last dimension"),
    "at least NaN": (
        by_rows(lambda x: (largest(x).float() / MOST).clamp(min=math.nan)), "the scale is computed by aten.clamp"
    ),
    "powers from just above one": (
        by_groups(lambda groups: up_to_a_power((largest(groups).float() / MOST).clamp(min=JUST_ABOVE))),
        "log2 rounds the smallest scale, 9.53674e-07, down to a power of two",
    ),
    "a dimension of the scale": (
        by_rows(lambda x: torch.full((1,), 0.02).reshape(1, 1, 1), lambda x, scale: codes(x / scale)),
        "the scale has the shape [1, 1, 1], which makes [1, 5, 256] of [5, 256]",
    ),
    "of all": (
        by_rows(lambda x: x.abs().max().unsqueeze(-1).to(torch.float32) / MOST),
        "the scale is computed from all rows at once",
    ),
    "signed": (
        by_rows(lambda x: x.amax(-1, keepdim=True).float().abs() / MOST),
        "neither one number nor computed from the largest value it scales",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", NEAR_MISSES)
def test_what_no_op_computes_is_named(case: str) -> None:
    quantize, says = NEAR_MISSES[case]
    graph = canonicalize(quickly_traced(lambda x: quantize(llama(x, None, W)[0]), randn(5, WIDTH)))
    assert not [found for found in graph.recognized() if "fp8" in found]
    (refusal,) = graph.refusals
    assert says in refusal.detail


def test_powers_of_two_of_float32_rows_are_left_alone() -> None:
    """Where log2 rounds to a whole number, which no quotient of low precision comes near to."""
    graph = post_grad(of_groups_by_powers, randn(5, WIDTH, dtype=torch.float32))
    (refusal,) = canonicalize(graph).refusals
    assert "log2 rounds a scale just above a power of two down to it" in refusal.detail
    x = torch.full((1, WIDTH), torch.nextafter(torch.tensor(MOST * 1024), torch.tensor(torch.inf)).item())
    _, scale = of_groups_by_powers(x)
    _, exact = GROUPS.reference(x, *SPELLINGS["groups by powers"].arguments)
    assert (scale.max().item(), exact.min().item()) == (1024.0, 2048.0)


@pytest.mark.parametrize(
    ("quantize", "says"),
    [
        (
            by_rows(lambda x: largest(x.bfloat16()).float() / MOST, lambda x, scale: codes(x / scale)),
            "the scale is computed from values rounded to bfloat16, and the scaled ones aren't",
        ),
        (
            by_rows(lambda x: largest(x) / MOST, lambda x, scale: codes(x.bfloat16() / scale)),
            "the scaled value is rounded to bfloat16, and the scale is computed from unrounded values",
        ),
    ],
    ids=["the scale", "the rows"],
)
def test_what_is_rounded_between_is_named(quantize: Quantize, says: str) -> None:
    graph = canonicalize(post_grad(lambda x: quantize(F.silu(x) * x), randn(5, WIDTH, dtype=torch.float32)))
    assert [says in refusal.detail for refusal in graph.refusals if "fp8" in refusal.detail] == [True]


def of_rows_up_to(x: Tensor, bound: Tensor) -> tuple[Tensor, Tensor]:
    """vLLM's `QuantFP8` with `scale_ub`."""
    largest = x.abs().max(dim=-1)[0].unsqueeze(-1).to(torch.float32).clamp(max=bound)
    scale = (largest / MOST).clamp(min=LEAST)
    return codes(x.to(torch.float32) * scale.reciprocal()), scale


def of_groups_up_to(x: Tensor, bound: Tensor) -> tuple[Tensor, Tensor]:
    groups = x.view(-1, x.shape[-1] // GROUP, GROUP)
    scale = torch.minimum(groups.abs().amax(-1, keepdim=True).float(), bound) / MOST
    return codes(groups / scale).view(x.shape), scale.squeeze(-1)


@pytest.mark.parametrize("shape", [(1,), ()])
@pytest.mark.parametrize(("quantize", "op"), [(of_rows_up_to, ROWS), (of_groups_up_to, GROUPS)])
def test_the_largest_may_be_bounded_by_a_tensor(quantize: Any, op: Any, shape: tuple[int, ...]) -> None:
    graph = post_grad(quantize, randn(6, WIDTH), torch.ones(shape))
    raised = canonicalize(graph)
    (node,) = raised.calls(op.overload)
    assert node.args[op.arguments.index("scale_ub")].op == "placeholder"
    ours, theirs = fx.GraphModule({}, raised.graph), fx.GraphModule({}, graph)
    for bound in (0.5, 1.7, math.inf, math.nan):
        for value in inputs(torch.bfloat16).values():
            pairs = zip(ours(value, torch.full(shape, bound)), theirs(value, torch.full(shape, bound)), strict=True)
            assert all(torch.equal(bits(got), bits(wanted)) for got, wanted in pairs)
    fused = fuseplan.explain(
        lambda x, bound: quantize(llama(x, None, W)[0], bound), randn(5, WIDTH), torch.ones(shape), device="h200",
        config=fuseplan.PassConfig(policy="ordered(norm_quant)"),
    )  # fmt: skip
    assert fused.fused["norm_quant"] == 1


def test_a_given_scale_may_be_viewed_and_promote() -> None:
    def quantize(x: Tensor, scale: Tensor) -> Tensor:
        return codes(x / scale.reshape(1, 1))

    graph = canonicalize(post_grad(quantize, randn(5, WIDTH), torch.tensor([0.02])))
    (node,) = graph.calls(ops.static_scaled_fp8_quant.overload)
    assert node.args[2:] == (FP8, DIVIDE)
    assert [argument.op for argument in node.args[:2]] == ["placeholder", "placeholder"]


def test_a_given_scale_on_another_device_is_left_alone() -> None:
    def quantize(x: Any, scale: Any) -> Any:
        scaled = torch.ops.aten.div.Tensor(x, scale)
        return convert_element_type(torch.ops.aten.clamp.default(scaled, -MOST, MOST), FP8)

    x = torch.empty(5, WIDTH, device="meta")
    (refusal,) = canonicalize(written(quantize, {"x": x, "scale": torch.tensor(0.02)})).refusals
    assert "the scale is on cpu, and the tensor it scales on meta" in refusal.detail


# Quantisations that differ from an op's in one thing, on which their numbers depend: each is left as it is, or its op
# computes the same.


def up_to(bound: Callable[..., Tensor], *, powers: bool = False) -> Callable[..., tuple[Tensor, Tensor]]:
    """Rows, or groups by powers of two, whose largest element is bounded so."""

    def quantize(x: Tensor, *bounds: Tensor) -> tuple[Tensor, Tensor]:
        groups = x.view(-1, WIDTH // GROUP, GROUP) if powers else x
        scale = bound(largest(groups).float(), *bounds) / MOST
        scale = up_to_a_power(scale) if powers else scale
        return codes(groups.float() / scale).view(x.shape), scale

    return quantize


def microscaled(
    spread: Callable[[Tensor], Tensor] = lambda scale: scale, alpha: int = 1
) -> Callable[..., tuple[Tensor, Tensor]]:
    def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
        groups = x.reshape(-1, x.shape[-1] // 32, 32)
        most = largest(groups).float()
        power = torch.sub((torch.bitwise_right_shift(most.view(torch.int32), 23) & 255) - 127, 8, alpha=alpha)
        exponent = torch.where(most.isnan(), 255, (power.clamp(-127, 128) + 127).to(torch.uint8))
        scale = torch.bitwise_left_shift(exponent.to(torch.int32), 23).view(torch.float32)
        scale = scale.clamp(min=torch.finfo(torch.float32).tiny)
        return (groups.float() / spread(scale)).to(FP8), exponent.squeeze(-1)

    return quantize


def every_second(x: Tensor) -> tuple[Tensor, Tensor]:
    """Scales lie in every second column of zeros."""
    q, scale = of_groups_unclamped(x)
    rows, count = scale.shape
    laid_out = torch.zeros((2 * count, rows)).t()
    laid_out[:, ::2] = scale
    return q, laid_out[:, :count]


ABOVE_A_POWER = torch.nextafter(torch.tensor(MOST * 2**-9), torch.tensor(math.inf)).item()
"""Whose quotient by 448 log2 takes for a power of two."""
UNEVEN = randn(6, 1024) * torch.exp2(torch.linspace(-6, 6, 6 * 1024).round().roll(999).view(6, 1024)).bfloat16()
CLOSE: dict[str, tuple[Callable[..., tuple[Tensor, Tensor]], tuple[Tensor, ...]]] = {
    "two tensors as bounds": (
        up_to(lambda most, first, second: torch.minimum(torch.minimum(most, first), second)),
        (randn(6, WIDTH), torch.tensor([0.5]), torch.tensor([2.0])),
    ),
    "a tensor below 0 as bound": (up_to(torch.minimum), (randn(6, WIDTH), torch.tensor([-1.0]))),
    "a bound of 0": (up_to(lambda most: most.clamp(max=0.0)), (randn(6, WIDTH),)),
    "a bound whose quotient is 0": (up_to(lambda most: most.clamp(max=1e-43)), (randn(6, WIDTH),)),
    "powers up to a number": (up_to(lambda most: most.clamp(max=ABOVE_A_POWER), powers=True), (randn(6, WIDTH),)),
    "powers up to a tensor": (
        up_to(torch.minimum, powers=True), (randn(6, WIDTH), torch.tensor([ABOVE_A_POWER])),
    ),
    "scales of another axis": (
        microscaled(lambda scale: scale.view(scale.shape[0], 1, scale.shape[1])), (UNEVEN,)
    ),
    "scales with a dimension more": (microscaled(lambda scale: scale.view(3, 1, 8, 1)), (randn(3, 256),)),
    "exponents less 2 * 8": (microscaled(alpha=2), (randn(6, WIDTH),)),
    "every second column": (every_second, (randn(4, WIDTH),)),
}  # fmt: skip


@pytest.mark.parametrize("case", CLOSE)
def test_codes_and_scales_that_are_close_stay(case: str) -> None:
    function, given = CLOSE[case]
    graph = quickly_traced(function, *given)
    ours, theirs = (fx.GraphModule({}, each) for each in (canonicalize(graph).graph, graph))
    for got, wanted in zip(ours(*given), theirs(*given), strict=True):
        assert torch.equal(bits(got.float()), bits(wanted.float()))


def test_kernels_that_have_the_largest_of_e4m3_built_in_refuse_e5m2() -> None:
    """Each provider that serves the op but ours."""
    op = NORM_FAMILY[True, True, "static_fp8_quant"]
    x, weight = torch.empty(4, 4096, dtype=torch.bfloat16), torch.empty(4096, dtype=torch.bfloat16)
    values = {"x": x, "residual": x, "weight": weight, "eps": 1e-5, "rounding": "gpt_oss", "scale": torch.ones(1),
              "quant_rounding": "multiply", "group_name": "0", "dtype": E5M2}  # fmt: skip
    offers = {
        each.name: each.offers().get(op.name) for each in BUILT_IN_PROVIDERS if each.name not in ("triton", "torch")
    }
    refused = {name: offer.accepts(Bindings("r", values)) for name, offer in offers.items() if offer is not None}
    assert refused
    for name, refusal in refused.items():
        assert refusal is not None, name
        assert "float8_e5m2" in refusal.detail, name
