"""fp8 as engines and libraries write it in plain torch: each spelling is one op, which computes what the graph does,
bit for bit; what no op computes is named for what it is.

vLLM's own code is run in `tests/integrations/vllm/test_fp8.py`.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional as F

import fuseplan
from fuseplan.dialect import ops
from fuseplan.dialect.raising import canonicalize
from fuseplan.graph.facts import convert_element_type
from tests.helpers import llama, post_grad, quantize_rows, quickly_traced, randn, written
from tests.interpreted import no_code

FP8, MOST = torch.float8_e4m3fn, 448.0
WIDTH, GROUP = 256, 64
LEAST = 1 / (MOST * 512.0)
W = 1 + randn(WIDTH, seed=9) / 10
Quantize = Callable[[Tensor], tuple[Tensor, Tensor]]


def codes(scaled: Tensor) -> Tensor:
    return scaled.clamp(-MOST, MOST).to(FP8)


def of_rows_by_max(x: Tensor) -> tuple[Tensor, Tensor]:
    """vLLM 0.22's `QuantFP8`."""
    largest, _ = x.abs().max(dim=-1)
    scale = (largest.unsqueeze(-1).to(torch.float32) / MOST).clamp(min=LEAST)
    return codes(x.to(torch.float32) * scale.reciprocal()), scale


def of_rows_by_amax(x: Tensor) -> tuple[Tensor, Tensor]:
    """vLLM 0.32's."""
    scale = (x.abs().amax(dim=-1).unsqueeze(-1).to(torch.float32) / MOST).clamp(min=LEAST)
    return codes(x.to(torch.float32) * scale.reciprocal()), scale


def of_rows_without_a_least(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.float().abs().amax(-1, keepdim=True) / MOST
    return codes(x / scale), scale


def of_flat_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Scales are looked at as one dimension meanwhile."""
    flat = x.reshape(-1, x.shape[-1])
    scale = flat.abs().amax(-1).clamp(min=1e-4).float() / MOST
    return codes(flat * (1.0 / scale)[:, None]).view(x.shape), scale.view(*x.shape[:-1], 1)


def of_rows_without_zeros(x: Tensor) -> tuple[Tensor, Tensor]:
    """AITER's: a row of zeros has a scale of 1."""
    scale = x.float().abs().amax(-1, keepdim=True) / MOST
    scale = torch.where(scale == 0, 1.0, scale)
    return codes(x.float() / scale), scale


def of_rows_by_a_narrow_least(x: Tensor) -> tuple[Tensor, Tensor]:
    """A number counts as the dtype of its tensor holds it."""
    least = torch.full((1,), 1e-4, dtype=torch.bfloat16)
    scale = torch.maximum(x.abs().amax(-1, keepdim=True).float(), least) / MOST
    return codes(x.float() / scale), scale


def of_groups_by_max(x: Tensor) -> tuple[Tensor, Tensor]:
    """vLLM's `QuantFP8` by groups."""
    groups = x.view(-1, x.shape[-1] // GROUP, GROUP)
    scale = (groups.abs().max(dim=-1, keepdim=True)[0].float() / MOST).clamp(min=LEAST)
    return codes(groups / scale).view(x.shape), scale.squeeze(-1).reshape(*x.shape[:-1], x.shape[-1] // GROUP)


def of_groups_by_columns(x: Tensor) -> tuple[Tensor, Tensor]:
    """The same with scales that lie column after column."""
    q, scale = of_groups_by_max(x)
    return q, scale.transpose(-2, -1).contiguous().transpose(-1, -2)


def of_groups_by_powers(x: Tensor) -> tuple[Tensor, Tensor]:
    """The same with `use_ue8m0`: the least scale comes last, and is no power of two."""
    groups = x.view(-1, x.shape[-1] // GROUP, GROUP)
    scale = torch.exp2(torch.ceil(torch.log2(groups.abs().max(dim=-1, keepdim=True)[0].float() / MOST)))
    scale = scale.clamp(min=LEAST)
    return codes(groups / scale).view(x.shape), scale.squeeze(-1).reshape(*x.shape[:-1], x.shape[-1] // GROUP)


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


def of_rows_in_low_precision(x: Tensor) -> tuple[Tensor, Tensor]:
    """torchao 0.18: the largest is divided in the precision of x."""
    scale = (x.abs().amax(-1, keepdim=True) / MOST).float()
    return codes(x.float() / scale), scale


def of_rows_rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """Divided in float32, and bounded on both sides of the rounding."""
    scale = (x.float().abs().amax(-1, keepdim=True) / MOST).to(x.dtype).clamp(min=1e-4).float().clamp(min=LEAST)
    return codes(x.float() / scale), scale


def of_groups_in_low_precision(x: Tensor) -> tuple[Tensor, Tensor]:
    groups = x.view(-1, GROUP)
    scale = (groups.abs().amax(dim=-1).clamp(1e-4) / MOST).float()
    return codes(groups.float() / scale.unsqueeze(-1)).view(x.shape), scale.view(*x.shape[:-1], -1)


def of_rows_all_rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """compressed-tensors 0.20: all is in the precision of x, and 0 is no scale."""
    low, high = torch.amin(x, -1, keepdim=True), torch.amax(x, -1, keepdim=True)
    low, high = torch.min(low, torch.zeros_like(low)), torch.max(high, torch.zeros_like(high))
    scale = torch.maximum(low.abs(), high.abs()) / torch.full((), MOST, dtype=x.dtype)
    scale = torch.where(scale == 0, torch.full((), EPSILON, dtype=x.dtype), scale)
    return (x / scale).clamp(torch.full((), -MOST), torch.full((), MOST)).to(FP8), scale


def of_groups_all_rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    groups = x.unflatten(-1, (-1, GROUP))
    scale = groups.abs().amax(-1) / MOST
    scale = torch.where(scale == 0, EPSILON, scale)
    return codes(groups / scale.unsqueeze(-1)).flatten(-2), scale


def of_rows_up_to_a_number(x: Tensor) -> tuple[Tensor, Tensor]:
    """FBGEMM's."""
    scale = x.abs().amax(-1, keepdim=True).float().clamp(1e-4, 1.5) / MOST
    return codes(x.float() / scale), scale


def of_rows_up_to_a_rounded_number(x: Tensor) -> tuple[Tensor, Tensor]:
    """torchao's, by `activation_value_lb` and `activation_value_ub`."""
    scale = (x.abs().amax(-1, keepdim=True).clamp(1e-4, 1.3) / MOST).float()
    return codes(x.float() / scale), scale


def of_groups_up_to_a_number(x: Tensor) -> tuple[Tensor, Tensor]:
    groups = x.view(-1, GROUP)
    scale = (groups.abs().amax(dim=-1).float() / MOST).clamp(max=torch.full((1,), 0.003)).clamp(min=LEAST)
    return codes(groups / scale.unsqueeze(-1)).view(x.shape), scale.view(*x.shape[:-1], -1)


EPSILON = 0.0078125
DIVIDE, MULTIPLY, BY_ROUNDED, ROUNDS = "divide", "multiply", "divide_by_rounded", "divide_rounded"
ROUNDED = float(torch.tensor(1e-10, dtype=torch.bfloat16).float() / MOST)
TENTH = float(torch.tensor(1e-4) / MOST)
ROUNDED_TENTH = float(torch.tensor(1e-4, dtype=torch.bfloat16).float() / MOST)
TWICE_ROUNDED = float((torch.tensor(1e-4).bfloat16() / MOST).float())
UPPER = float(torch.tensor(1.5) / MOST)
ROUNDED_UPPER = float(torch.tensor(1.3).bfloat16() / MOST)
ROWS, GROUPS = ops.dynamic_per_token_scaled_fp8_quant, ops.per_token_group_fp8_quant
SPELLINGS: dict[Quantize, tuple[Any, ...]] = {
    of_rows_by_max: (FP8, LEAST, 0.0, 0.0, None, MULTIPLY),
    of_rows_by_amax: (FP8, LEAST, 0.0, 0.0, None, MULTIPLY),
    of_rows_without_a_least: (FP8, 0.0, 0.0, 0.0, None, DIVIDE),
    of_rows_without_zeros: (FP8, 0.0, 0.0, 1.0, None, DIVIDE),
    of_flat_rows: (FP8, ROUNDED_TENTH, 0.0, 0.0, None, MULTIPLY),
    of_rows_by_a_narrow_least: (FP8, ROUNDED_TENTH, 0.0, 0.0, None, DIVIDE),
    of_rows_in_low_precision: (FP8, 0.0, 0.0, 0.0, None, BY_ROUNDED),
    of_rows_rounded: (FP8, float(torch.tensor(1e-4).bfloat16()), 0.0, 0.0, None, BY_ROUNDED),
    of_groups_in_low_precision: (GROUP, FP8, TWICE_ROUNDED, 0.0, False, 0.0, 0.0, None, BY_ROUNDED, "rows"),
    of_groups_by_max: (GROUP, FP8, LEAST, 0.0, False, 0.0, 0.0, None, DIVIDE, "rows"),
    of_groups_by_columns: (GROUP, FP8, LEAST, 0.0, False, 0.0, 0.0, None, DIVIDE, "columns"),
    of_groups_by_powers: (GROUP, FP8, 0.0, 0.0, True, LEAST, 0.0, None, DIVIDE, "rows"),
    of_rows_of_groups: (GROUP, FP8, ROUNDED, 0.0, False, 0.0, 0.0, None, DIVIDE, "rows"),
    of_groups_unclamped: (GROUP, FP8, TENTH, 0.0, False, 0.0, 0.0, None, MULTIPLY, "rows"),
    of_groups_in_float32: (GROUP, FP8, TENTH, 0.0, False, 0.0, 0.0, None, DIVIDE, "rows"),
    of_rows_up_to_a_number: (FP8, TENTH, UPPER, 0.0, None, DIVIDE),
    of_rows_up_to_a_rounded_number: (FP8, TWICE_ROUNDED, ROUNDED_UPPER, 0.0, None, BY_ROUNDED),
    of_groups_up_to_a_number: (GROUP, FP8, LEAST, 0.003, False, 0.0, 0.0, None, DIVIDE, "rows"),
    of_rows_all_rounded: (FP8, 0.0, 0.0, EPSILON, None, ROUNDS),
    of_groups_all_rounded: (GROUP, FP8, 0.0, 0.0, False, 0.0, EPSILON, None, ROUNDS, "rows"),
    of_groups_repeated: (GROUP, FP8, 0.0, 0.0, False, 0.0, 0.0, None, DIVIDE, "rows"),
}


CODED = (of_rows_by_max, of_rows_up_to_a_number, of_groups_by_max, of_groups_in_float32)
"""What code is made of; graphs of others are interpreted."""


TRACERS = (post_grad, quickly_traced)


def name(function: Any) -> str | None:
    return getattr(function, "__name__", None)


every_spelling = pytest.mark.parametrize("quantize", SPELLINGS, ids=name)


def behind_a_norm(quantize: Quantize) -> Quantize:
    return lambda x: quantize(llama(x, None, W)[0])


def bits(value: Tensor) -> Tensor:
    """NaN being one NaN."""
    return value.float().nan_to_num(nan=torch.inf).add(0.0) if value.dtype is FP8 else value.nan_to_num(nan=-1.0)


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


@every_spelling
@pytest.mark.parametrize("dynamic", [pytest.param(False, marks=pytest.mark.nightly), True])
def test_a_spelling_is_an_op(quantize: Quantize, dynamic: bool) -> None:
    check_spelling(quantize, post_grad(behind_a_norm(quantize), randn(5, WIDTH), dynamic=dynamic))


def check_spelling(quantize: Quantize, traced: fx.Graph) -> None:
    graph = canonicalize(traced)
    op = ROWS if "rows" in quantize.__name__ and quantize is not of_rows_of_groups else GROUPS
    assert graph.recognized() == {f"{op.name}[{WIDTH}]": 1, f"rms_norm[{WIDTH}]": 1}
    (node,) = graph.calls(op.overload)
    assert node.args[1:] == SPELLINGS[quantize]
    assert node.args[0].target is ops.rms_norm.overload
    graph.graph.lint()


@pytest.mark.parametrize("quantize", CODED, ids=name)
def test_graphs_traced_quickly_are_those_of_dynamo(quantize: Quantize) -> None:
    """And stand for them here."""
    given = behind_a_norm(quantize), randn(5, WIDTH)
    targets = [[node.target for node in trace(*given).nodes if node.op == "call_function"] for trace in TRACERS]
    assert targets[0] == targets[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@every_spelling
def test_it_computes_what_the_graph_does(quantize: Quantize, dtype: torch.dtype) -> None:
    x = randn(6, WIDTH).to(dtype)
    graph = quickly_traced(quantize, x)
    raised = canonicalize(graph)
    is_refused = quantize is of_groups_by_powers and dtype is torch.float32
    assert len(raised.dialect_nodes) == (not is_refused)
    ours, theirs = fx.GraphModule({}, raised.graph), fx.GraphModule({}, graph)
    for kind, value in inputs(dtype).items():
        for got, wanted in zip(ours(value), theirs(value), strict=True):
            assert got.dtype is wanted.dtype
            assert torch.equal(bits(got), bits(wanted)), kind


@every_spelling
def test_sizes_may_be_constants(quantize: Quantize) -> None:
    for rows in (5, 1):
        if rows > 1 or quantize is not of_groups_by_columns:  # one row lies in columns, too
            check_spelling(quantize, quickly_traced(behind_a_norm(quantize), randn(rows, WIDTH)))


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("shape", "dynamic"), [((2, 3, WIDTH), (0, 1)), pytest.param((1, WIDTH), (), marks=pytest.mark.nightly)]
)
@pytest.mark.parametrize("quantize", [each for each in SPELLINGS if each is not of_groups_by_columns], ids=name)
def test_batches_of_any_shape_are_fused(quantize: Quantize, shape: tuple[int, ...], dynamic: tuple[int, ...]) -> None:
    reports: list[fuseplan.Report] = []
    torch._dynamo.reset()
    x = randn(*shape)
    torch._dynamo.mark_dynamic(x, dynamic)
    with torch.inference_mode(), nullcontext() if dynamic and quantize in CODED else no_code():
        compiled: Any = fuseplan.compile(
            behind_a_norm(quantize), config=fuseplan.PassConfig(policy="ordered(norm_quant)"), on_report=reports.append
        )
        pairs = list(zip(compiled(x), behind_a_norm(quantize)(x), strict=True))
    assert reports[0].fused["norm_quant"] == 1
    for got, wanted in pairs:
        assert torch.equal(bits(got), bits(wanted))


@pytest.mark.parametrize("shape", [pytest.param((5, WIDTH), marks=pytest.mark.nightly), (2, 3, WIDTH)])
def test_scales_that_lie_column_after_column_still_do(shape: tuple[int, ...]) -> None:
    torch._dynamo.reset()
    with torch.inference_mode():
        compiled: Any = fuseplan.compile(behind_a_norm(of_groups_by_columns))
        assert compiled(randn(*shape))[1].stride() == of_groups_by_columns(randn(*shape))[1].stride()


JUST_ABOVE = 2.0**-20 * (1 + 2.0**-23)


def by_rows(
    scale_of: Callable[[Tensor], Tensor], codes_of: Callable[[Tensor, Tensor], Tensor] | None = None
) -> Quantize:
    """By a scale of rows; without more said, x is divided by it in float32."""

    def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
        scale = scale_of(x)
        return codes_of(x, scale) if codes_of is not None else codes(x.float() / scale), scale

    return quantize


def by_groups(scale_of: Callable[[Tensor], Tensor]) -> Quantize:
    """By a scale of each group, of its magnitudes."""

    def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
        groups = x.view(-1, WIDTH // GROUP, GROUP)
        scale = scale_of(groups.abs().amax(-1, keepdim=True).float() / MOST)
        return codes(groups / scale).view(x.shape), scale

    return quantize


def largest(x: Tensor) -> Tensor:
    return x.abs().amax(-1, keepdim=True)


def up_to_a_power(scale: Tensor) -> Tensor:
    return torch.exp2(torch.ceil(torch.log2(scale)))


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
        by_groups(lambda scale: rounded_by_bits(scale.clamp(1e-4 / MOST))),
        "the scale is rounded by its bits, which makes an infinite one finite",
    ),
    "powers in low precision": (by_rows(lambda x: up_to_a_power((largest(x) / MOST).float())), LOW),
    "multiplied in low precision": (
        by_rows(lambda x: (largest(x) / MOST).float(), lambda x, scale: codes(x.float() * scale.reciprocal())), LOW,
    ),
    "unclamped in low precision": (
        by_rows(lambda x: (largest(x) / MOST).float().clamp(min=LEAST), unclamped), UNCLAMPED,
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
        by_groups(lambda scale: up_to_a_power(scale).clamp(max=2.0)), "the power of two has an upper bound"
    ),
    "a bound, unclamped": (by_rows(lambda x: largest(x).float().clamp(1e-4, 6.0) / MOST, unclamped), UNCLAMPED),
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
        by_groups(lambda scale: up_to_a_power(scale.clamp(min=JUST_ABOVE))),
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
    _, exact = GROUPS.reference(x, *SPELLINGS[of_groups_by_powers])
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


def test_groups_of_heads_are_groups() -> None:
    """Rows are what is viewed as groups, and the earliest view of them."""
    graph = canonicalize(post_grad(lambda x: of_groups_by_max(x.view(2, 3, WIDTH)), randn(6, WIDTH)))
    (node,) = graph.calls(GROUPS.overload)
    assert node.args[0].op == "placeholder"
    assert quantize_rows(randn(2, WIDTH))[1].shape == (2, 1)
