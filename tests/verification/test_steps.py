"""Kernels whose rows are off by what is allowed, and with them the scales of groups that lie where these step."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fuseplan.dialect import DialectOp, ops
from fuseplan.providers import provider_of
from fuseplan.rules import Rule
from fuseplan.rules.families import BUILT_IN_RULES, ComposedRule
from fuseplan.verification.check import Finding, check
from fuseplan.verification.specs import Case
from fuseplan.verification.steps import Stepped
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


def checked(name: str, kernel: Kernel, rows: int, width: int) -> Finding:
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


def test_codes_by_the_other_scale_are_held_against_numbers() -> None:
    def dropped(name: str, gate: Tensor, up: Tensor, rounding: str, *arguments: Any) -> Any:
        """The scales of rows that are off, and the codes of those that aren't."""
        codes, _ = right(name, gate, up, rounding, *arguments)
        return codes, off_by_a_step(name, gate, up, rounding, *arguments)[1]

    assert "the scale of group" in str(checked("mx_fp8 floor", dropped, 257, 4096).wrong)


def test_scales_of_the_precision_of_rows_have_no_steps() -> None:
    """Three of them in a row, which are no whole number of float32's."""
    rule, quant, _ = rule_of("group_fp8 rows")
    rounded = {**POWERS, "ue8m0": False, "zero_scale": 2.0**-7, "quant_rounding": "divide_rounded", "layout": "rows"}

    def moved(gate: Tensor, up: Tensor, rounding: str, *arguments: Any) -> Any:
        return quant.reference(nudged(gate, up), *arguments)

    assert check(rule, offer(rule, moved, "rounded"), case_of(33, 384, rounded), seed=3).wrong is None


def test_scales_without_steps_are_compared_as_before() -> None:
    rule, _, arguments = rule_of("group_fp8 rows")
    found = Stepped.of(rule)
    assert found is not None
    assert found.places == (0, 1)
    assert Stepped.of(next(rule for rule in BUILT_IN_RULES if rule.op.name == "rms_norm_dynamic_fp8_quant")) is None
    given = {**arguments, "ue8m0": False}
    rows = torch.ones(2, 128, dtype=BF16)
    assert found.op.decode is not None
    assert found.op.decode(*found.op.reference(rows, *given.values()), *given.values()) is None
