"""fp8 by groups behind fuseplan's Triton kernels, by Triton's interpreter in a process of its own."""

import importlib.util
from typing import Any

import pytest
import torch

from fuseplan.dialect import Rounding
from fuseplan.providers.triton.epilogues import epilogue_of
from fuseplan.record import Reason
from fuseplan.rules import Bindings
from tests.forks import Forks
from tests.providers.processes import printed_by

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


@pytest.fixture(scope="module")
def interpreted(interpreting_forks: Forks) -> dict[str, Any]:
    found: dict[str, Any] = printed_by(interpreting_forks, "run_group_interpreted")
    return found


@needs_triton
def test_it_gives_the_references_bits(interpreted: dict[str, Any]) -> None:
    """All roundings, scales rounded up to powers of two or not, groups of 32 to 512, rows that no tile divides."""
    assert len(interpreted["cases"]) == 64
    assert all(interpreted["cases"].values()), interpreted["cases"]


@needs_triton
def test_scales_of_rows_are_rounded_and_bounded_or_not(interpreted: dict[str, Any]) -> None:
    assert len(interpreted["by row"]) == 16
    assert all(interpreted["by row"].values()), interpreted["by row"]


@needs_triton
def test_what_is_quantised_is_yielded_too(interpreted: dict[str, Any]) -> None:
    """In memory of its own, and everything else stays as it is."""
    assert len(interpreted["kept"]) == 6 * len(Rounding)
    assert all(interpreted["kept"].values()), interpreted["kept"]


@needs_triton
def test_scales_lie_as_they_are_asked_to(interpreted: dict[str, Any]) -> None:
    assert len(interpreted["layouts"]) == 24
    assert all(interpreted["layouts"].values()), interpreted["layouts"]


@needs_triton
def test_exponents_are_the_references(interpreted: dict[str, Any]) -> None:
    assert len(interpreted["microscaled"]) == 92 - 6
    assert all(interpreted["microscaled"].values()), interpreted["microscaled"]


@needs_triton
@pytest.mark.nightly
def test_exponents_of_many_rows_are_the_references_by_each_scaling(interpreting_forks: Forks) -> None:
    found = printed_by(interpreting_forks, "run_group_interpreted", "all")
    assert len(found) == 92
    assert all(found.values()), found


@needs_triton
def test_scales_in_fp8_of_codes_in_fp4_are_the_references(interpreted: dict[str, Any]) -> None:
    assert interpreted["scales"]
    assert len(interpreted["by scales"]) == 7 * 6 + 1
    assert all(interpreted["by scales"].values()), interpreted["by scales"]


@needs_triton
def test_zeros_infinity_and_nan_stay_within_their_groups(interpreted: dict[str, Any]) -> None:
    assert len(interpreted["not finite"]) == 28
    assert all(interpreted["not finite"].values()), interpreted["not finite"]


@needs_triton
def test_powers_of_two_stay_and_what_is_above_goes_up(interpreted: dict[str, Any]) -> None:
    assert interpreted["powers"]


@pytest.mark.parametrize(
    ("size", "width", "detail", "layout"),
    [
        (64, 2880, None, "packed"),
        (64, 128, "at least 3 groups where scales are packed, not groups of 64 in rows of 128", "packed"),
        (64, 2880, None, "rows"),
        (128, 7168, None, "rows"),
        (128, 2880, "a hidden size that is a multiple of 128, not groups of 128 in rows of 2880", "rows"),
        (96, 2880, "a group size that is a power of two, not groups of 96 in rows of 2880", "rows"),
        (0, 2880, "a group size that is a power of two, not groups of 0 in rows of 2880", "rows"),
    ],
)
def test_what_it_declines(size: int, width: int, detail: str | None, layout: str) -> None:
    given = Bindings("any", {"group_size": size, "layout": layout})
    refusal = epilogue_of("group_fp8_quant").refuse(torch.empty(2, width), given)
    if detail is None:
        assert refusal is None
    else:
        assert refusal is not None
        assert refusal.reason is Reason.SIZE
        assert refusal.detail.startswith("fuseplan's Triton kernels take")
        assert refusal.detail.endswith(detail)


@needs_triton
def test_codes_in_e5m2_have_the_references_bits(interpreted: dict[str, Any]) -> None:
    assert interpreted["all of e5m2"]
    assert len(interpreted["wider"]) == 12
    assert all(interpreted["wider"].values()), interpreted["wider"]
