"""Kernels whose rows are off by what is allowed, and with them the scales of groups that lie where these step."""

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fuseplan.dialect import DialectOp, ops
from fuseplan.graph.ops import Decoded
from fuseplan.providers import provider_of
from fuseplan.rules import Rule
from fuseplan.rules.families import BUILT_IN_RULES, ComposedRule
from fuseplan.verification.check import CheckResult, check
from fuseplan.verification.specs import Case
from fuseplan.verification.steps import Stepped, _spacing
from tests.verification.made import spec

FP8, BF16 = torch.float8_e4m3fn, torch.bfloat16
GROUPS = {"min_scale": 0.0, "max_scale": 0.0, "ue8m0": True, "min_power": 0.0, "zero_scale": 2.0**-20, "scale_ub": None}
POWERS = {"group_size": 128, "dtype": FP8, **GROUPS, "quant_rounding": "divide"}
FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        f"mx_fp8 {scaling}": ("mx_fp8_quant", {"group_size": 32, "dtype": FP8, "scaling": scaling, "layout": "rows"})
        for scaling in ("floor", "ceil", "even", "rceil")
    },
    **{
        f"mx_fp4 {scaling}": ("mx_fp4_quant", {"group_size": 32, "scaling": scaling, "layout": "swizzled"})
        for scaling in ("floor", "even")
    },
    **{f"group_fp8 {layout}": ("group_fp8_quant", {**POWERS, "layout": layout}) for layout in ("rows", "packed")},
    **{
        f"nv_fp4 {layout}": (
            "nv_fp4_quant", {"group_size": 16, "global_scale": None, "min_scale": 2.0**-6, "layout": layout}
        )
        for layout in ("rows", "swizzled")
    },
}  # fmt: skip
every_format = pytest.mark.parametrize("name", FORMATS)
Kernel = Callable[..., Any]
COUNT = itertools.count()


def rule_of(name: str) -> tuple[Rule, DialectOp, dict[str, Any]]:
    suffix, arguments = FORMATS[name]
    found = (rule for rule in BUILT_IN_RULES if isinstance(rule, ComposedRule))
    rule = next(each for each in found if each.op.name == f"silu_and_mul_{suffix}")
    return rule, ops[f"per_token_{suffix}"], arguments


def offer(rule: Rule, kernel: Kernel, name: str) -> str:
    """Registers a kernel, under a name of its own."""
    own = f"stepping_{name}_{next(COUNT)}".replace(" ", "_")
    provider_of(own, {rule.op: kernel}, cost=0.0, uuid=own)
    return own


def case_of(rows: int, width: int, arguments: dict[str, Any]) -> Case:
    rows_of = spec(rows, width, dtype=BF16)
    return Case(tokens=rows, arguments={"gate": rows_of, "up": rows_of, "rounding": "llama", **arguments})


def checked(name: str, kernel: Kernel, rows: int, width: int) -> CheckResult:
    rule, _, arguments = rule_of(name)
    own = offer(rule, lambda *given: kernel(name, *given), f"{kernel.__name__}_{name}")
    return check(rule, own, case_of(rows, width, arguments), seed=3)


def nudged(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU times up, of which one element in three is the next one in bfloat16, up or down."""
    y = ops.silu_and_mul.reference(gate, up, "llama")
    bits = y.view(torch.int16)
    moved = torch.arange(y.numel(), dtype=torch.int32).mul(-1640531527).reshape(y.shape)
    step = torch.where(moved % 3 == 0, torch.where(moved & 64 > 0, 1, -1), 0).to(torch.int16)
    return torch.where(y == 0, bits, bits + step).view(BF16)


def off_by_a_step(name: str, gate: Tensor, up: Tensor, rounding: str, *arguments: Any) -> Any:
    return rule_of(name)[1].reference(nudged(gate, up), *arguments)


def right(name: str, gate: Tensor, up: Tensor, rounding: str, *arguments: Any) -> Any:
    return rule_of(name)[1].reference(ops.silu_and_mul.reference(gate, up, rounding), *arguments)


def scaled_otherwise(name: str, gate: Tensor, up: Tensor, rounding: str, *arguments: Any) -> Any:
    """By another rounding of scales, or by one that the library has dropped."""
    found = dict(zip(FORMATS[name][1], arguments, strict=True))
    if "scaling" in found:
        found["scaling"] = "even" if found["scaling"] == "floor" else "floor"
    elif "ue8m0" in found:
        found["ue8m0"], found["layout"] = False, found["layout"]
    else:
        found["global_scale"] = torch.tensor(1.06)
    return right(name, gate, up, rounding, *found.values())


def one_scale_up(name: str, gate: Tensor, up: Tensor, rounding: str, *arguments: Any) -> Any:
    """Of the first group whose largest element is far from where its scale steps, with the codes of that scale."""
    codes, scales = right(name, gate, up, rounding, *arguments)
    scaled = ops.silu_and_mul.reference(gate, up, rounding)
    bigger, others = rule_of(name)[1].reference(scaled * 1.4, *arguments)
    width = codes.shape[-1] * FORMATS[name][1]["group_size"] // scaled.shape[-1]
    row = 1
    if others.shape[0] != len(scales) or torch.equal(others[row], scales[row]):
        return bigger, others
    group = int((others[row] != scales[row]).nonzero()[0])
    scales[row, group] = others[row, group]
    codes[row, group * width : (group + 1) * width] = bigger[row, group * width : (group + 1) * width]
    return codes, scales


@every_format
def test_either_scale_is_right_where_one_ends(name: str) -> None:
    *_, arguments = rule_of(name)
    assert checked(name, off_by_a_step, 33, 1024).wrong is None
    generator = torch.Generator().manual_seed(0)
    gate, up = (torch.randn(64, 4096, generator=generator).bfloat16() for _ in range(2))
    given = (name, gate, up, "llama", *arguments.values())
    assert not torch.equal(*(each(*given)[1].contiguous().view(torch.uint8) for each in (right, off_by_a_step)))


@every_format
@pytest.mark.parametrize("kernel", [scaled_otherwise, one_scale_up], ids=lambda each: each.__name__)
def test_a_wrong_scale_is_none_of_them(name: str, kernel: Kernel) -> None:
    if "packed" in name and kernel is scaled_otherwise:
        kernel = one_scale_up  # what isn't a power of two has no such layout
    assert "the scale of group" in str(checked(name, kernel, 33, 1024).wrong)


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["mx_fp8 even", "nv_fp4 rows"])
def test_many_rows_of_a_wide_model(name: str) -> None:
    """The largest size that kernels are verified at."""
    assert checked(name, off_by_a_step, 8191, 14336).wrong is None
    for kernel in (scaled_otherwise, one_scale_up):
        assert "the scale of group" in str(checked(name, kernel, 8191, 14336).wrong)


def test_scales_without_steps_are_compared_as_before() -> None:
    rule, _, arguments = rule_of("group_fp8 rows")
    given = {**arguments, "ue8m0": False}
    op: Any = Stepped.of(rule).op  # type: ignore[union-attr]
    assert op.decode(*op.reference(torch.ones(2, 128, dtype=BF16), *given.values()), *given.values()) is None


# Scales that step at whole tenths, of groups that are written.


class Tenths:
    """A quantisation whose scale is a group's largest element, rounded down to tenths; a code is the number."""

    def __init__(self, most: float = 4.0, without: Tensor | None = None) -> None:
        self.most, self.without = most, without

    def reference(self, rows: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        assert arguments == (7,)
        return rows, rows.unflatten(-1, (-1, 2)).abs().amax(-1)

    def decode(self, codes: Tensor, scales: Tensor, *arguments: Any) -> Decoded | None:
        assert arguments == (7,)
        steps = (scales * 10).floor()
        decoded = Decoded(numbers=lambda codes: codes.double(), scales=scales.double(), steps=steps, most=self.most)
        return None if scales is self.without else decoded


EXACT = torch.tensor([[0.95, 0.5, 0.3, 0.1], [0.75, 0.2, 0.05, 0.04]]).double()
ROWS = EXACT.float() + 0.06
RIGHT = torch.tensor([[0.95, 0.3], [0.75, 0.05]])
Place = tuple[int, int]


def settled(
    scales: Tensor | None, codes: Tensor | None = ROWS, *, op: Any = None, right: Tensor = RIGHT,
    rows: tuple[Tensor, Tensor] = (ROWS, EXACT), factor: float = 1.0,
) -> Any:  # fmt: skip
    """What becomes of scales of two rows of two groups, and codes that differ from those of the graph by 0.01."""
    actual: list[Any] = ["first", scales, codes]
    expected: Any = ["first", right, ROWS + 0.01]
    stepped = Stepped(op=op or Tenths(), node=None, places=(2, 1))  # type: ignore[arg-type]
    return actual, stepped.settled(actual, expected, [rows[0], 7], [rows[1], 7], factor)


def changed(tensor: Tensor, place: Place, value: float) -> Tensor:
    made = tensor.clone()
    made[place] = value
    return made


@pytest.mark.parametrize(("scales", "codes"), [(RIGHT, ROWS), (None, ROWS), (RIGHT + 1, None), (RIGHT + 0.001, ROWS)])
def test_what_is_as_in_the_graph_stays(scales: Tensor | None, codes: Tensor | None) -> None:
    actual, (found, wrong) = settled(scales, codes)
    assert (found is actual, wrong) == (True, None)


@pytest.mark.parametrize("of_the_graph", [True, False])
def test_scales_without_steps_are_left(of_the_graph: bool) -> None:
    scales = changed(RIGHT, (0, 0), 1.0)
    actual, (found, wrong) = settled(scales, op=Tenths(without=RIGHT if of_the_graph else scales))
    assert (found is actual, wrong) == (True, None)


@pytest.mark.parametrize(("place", "scale"), [((0, 0), 1.0), ((1, 0), 0.8), ((1, 1), 0.1)])
def test_codes_by_the_other_scale_are_those_of_the_graph(place: Place, scale: float) -> None:
    actual, (found, wrong) = settled(changed(RIGHT, place, scale))
    assert (found[0], found[1] is RIGHT, wrong) == ("first", True, None)
    wanted = ROWS.clone()
    wanted[place[0], 2 * place[1] : 2 * place[1] + 2] += 0.01
    assert torch.equal(found[2], wanted)
    assert actual[2] is ROWS
    assert torch.equal(ROWS, EXACT.float() + 0.06), "what the kernel yields isn't written to"


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("scale", "own", "fits"), [(1.0, 0.95, True), (0.8, 0.95, True), (1.1, 1.0, False),
                                                    (0.7, 0.8, False), (0.9, 0.7, False)])  # fmt: skip
def test_a_scale_fits_that_is_one_step_off_and_between_both_ends(
    scale: float, own: float, fits: bool, sign: int
) -> None:
    """Between 0.89, which is 8 tenths, and 1.01, which is 10; it is the size that counts."""
    scales, right = changed(RIGHT, (0, 0), scale), changed(RIGHT, (0, 0), own)
    _, (_, wrong) = settled(scales, sign * ROWS, right=right, rows=(sign * ROWS, sign * EXACT))
    assert (wrong is None) is fits


@pytest.mark.parametrize(
    ("code", "most", "fits"),
    [(1.5, 4.0, True), (1.52, 4.0, False), (0.4, 4.0, True), (0.38, 4.0, False), (0.38, 0.9, True)],
    ids=["above", "too far above", "below", "too far below", "of what is beyond the largest code"],
)
def test_codes_are_one_code_and_what_is_allowed_from_what_is_exact(code: float, most: float, fits: bool) -> None:
    """Codes below 2 are 0.5 apart, and 0.06 is allowed."""
    _, (_, wrong) = settled(changed(RIGHT, (0, 0), 1.0), changed(ROWS, (0, 0), code), op=Tenths(most))
    assert (wrong is None) is fits


@pytest.mark.parametrize(("factor", "fits"), [(2.0, False), (2.5, True)])
def test_rows_that_are_exact_by_luck_may_be_half_a_unit_off_where_ops_round_otherwise(
    factor: float, fits: bool
) -> None:
    exact = changed(EXACT, (0, 0), 127 / 128).bfloat16()
    scales, right = changed(RIGHT, (0, 0), 1.0), changed(RIGHT, (0, 0), 127 / 128)
    _, (_, wrong) = settled(scales, right=right, rows=(exact, exact.double()), factor=factor)
    assert (wrong is None) is fits


def test_more_scales_than_those_of_groups_are_left() -> None:
    scales = changed(RIGHT, (0, 0), 1.0)
    scales[1] += 0.001
    _, (found, wrong) = settled(scales)
    assert wrong is None
    assert found[1] is scales
    assert not torch.equal(found[2], ROWS)


def test_the_first_scale_that_is_wrong_is_named_with_what_is_right() -> None:
    actual, (found, wrong) = settled(changed(changed(RIGHT, (0, 0), 1.0), (0, 1), 0.9))
    assert found is actual
    assert wrong == (
        "the scale of group 1 of row 0 is 0.9 where 0.3 is right for a largest element of 0.3; 1 of 4 are wrong"
    )
    _, (_, wrong) = settled(torch.full((2, 2), 1.5))
    assert str(wrong).endswith("of 0.95; 4 of 4 are wrong")


def test_e2m1_codes_are_as_far_apart_as_the_farther_neighbour() -> None:
    numbers = torch.tensor([0.0, 1.5, -1.5, 2.0, -3.0, 4.0, -6.0]).double()
    assert _spacing(numbers).tolist() == [0.5, 0.5, 0.5, 1.0, 1.0, 2.0, 2.0]


def test_the_quantisation_of_a_pattern() -> None:
    named = {rule.op.name: rule for rule in BUILT_IN_RULES}
    traced = named["silu_and_mul_mx_fp8_quant"].traced_pattern
    for outputs, places in ((traced.outputs, (0, 1)), (traced.outputs[::-1], (1, 0))):
        rule: Any = SimpleNamespace(traced_pattern=SimpleNamespace(graph=traced.graph, outputs=outputs))
        found = Stepped.of(rule)
        assert found is not None
        assert (found.op, found.node.target) == (ops.per_token_mx_fp8_quant, found.op.overload)
        assert found.places == places
    for without in ("rms_norm_dynamic_fp8_quant", "rms_norm_pad"):
        assert Stepped.of(named[without]) is None
