"""What counts as an error, and where an element's place is reported."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fuseplan.verification.compare import compare, unit_in_the_last_place

FP8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_one_unit_in_the_last_place_is_allowed_and_two_are_not(dtype: torch.dtype) -> None:
    exact = torch.tensor([[1.0, -1.5, 3.0, 1000.0]], dtype=torch.float64)
    reference = exact.to(dtype)
    for steps, passes in ((1, True), (2, False)):
        actual = reference.clone()
        actual[0, 2] += steps * 2 * torch.finfo(dtype).eps
        assert (compare(actual, reference, exact, 2.0).share <= 1) is passes


def test_a_lucky_reference_is_half_a_unit_off_where_another_order_is_allowed() -> None:
    exact = torch.tensor([[1.0, -1.5, 3.0]], dtype=torch.float64)
    reference = exact.float()
    for steps, passes in ((5, True), (6, False)):
        actual = reference.clone()
        actual[0, 2] += steps * 2 * torch.finfo(torch.float32).eps
        assert (compare(actual, reference, exact, 8.0).share <= 1) is passes


@given(st.floats(min_value=2.0**-120, max_value=2.0**120), st.booleans())
def test_a_unit_is_the_distance_to_the_next_value(value: float, negative: bool) -> None:
    nearest = torch.tensor(-value if negative else value, dtype=torch.float32)
    further = torch.nextafter(nearest, torch.copysign(torch.tensor(torch.inf), nearest))
    distance = (further.double() - nearest.double()).abs()
    assert torch.equal(unit_in_the_last_place(nearest.double(), torch.float32), distance)


def test_errors_are_measured_by_those_of_the_reference_in_the_same_row() -> None:
    exact = torch.ones(2, 4, dtype=torch.float64)
    reference, actual = torch.ones(2, 4), torch.ones(2, 4)
    reference[0, 3] += 0.25
    actual[0, 0] -= 0.5
    assert compare(actual, reference, exact, 2.0).share == pytest.approx(1.0, rel=1e-6)
    actual[1, 0] -= 0.5
    worst = compare(actual, reference, exact, 2.0)
    assert worst.share > 1
    assert worst.text.startswith("element [1, 0] is 0.5 where 1 is exact: off by 0.5, allowed ")
    assert worst.text.endswith("1 of 8 are wrong")


@pytest.mark.parametrize("dtype", FP8)
def test_codes_may_be_one_apart(dtype: torch.dtype) -> None:
    codes = torch.tensor([[1, 2, 0x38, 0x82]], dtype=torch.uint8)
    exact = codes.view(dtype)
    for steps, passes in ((1, True), (2, False)):
        actual = codes.clone()
        actual[0, 3] += steps
        assert (compare(actual.view(dtype), exact, exact, 2.0).share <= 1) is passes
    assert "codes" in compare(torch.full_like(codes, 0x48).view(dtype), exact, exact, 2.0).text


def test_codes_near_zero_may_be_as_far_off_as_their_values() -> None:
    """Two kernels whose sums are rounded differently, quantised: neither is wrong."""
    generator = torch.Generator().manual_seed(0)
    exact = 50 * torch.randn(200, 512, generator=generator)
    noise = [0.2 * torch.rand(exact.shape, generator=generator) - 0.1 for _ in range(2)]
    actual, reference, true = (each.to(torch.float8_e4m3fn) for each in (exact + noise[0], exact + noise[1], exact))
    assert compare(actual, reference, true, 2.0).share <= 1
    lucky = true.clone()
    lucky[1:] = reference[1:]
    assert compare(actual, lucky, true, 2.0).share <= 1
    assert compare(actual, true, true, 2.0).share > 1
    lost = torch.where(exact.abs() < 1, 0.0, exact + noise[0]).to(torch.float8_e4m3fn)
    assert compare(lost, reference, true, 2.0).share > 1


def test_zero_has_two_codes() -> None:
    zeros, flipped = (
        torch.tensor(codes, dtype=torch.uint8).view(torch.float8_e4m3fn) for codes in ([0, 128], [128, 0])
    )
    assert compare(zeros, flipped, flipped, 2.0).share == 0


def test_codes_of_pairs_may_be_one_apart() -> None:
    exact = torch.tensor([[0x80, 0x21, 0x9F]], dtype=torch.uint8)
    for pair, passes in ((0x00, True), (0x01, True), (0x90, True), (0x02, False), (0xA0, False)):
        actual = exact.clone()
        actual[0, 0] = pair
        assert (compare(actual, exact, exact, 2.0, is_packed=True).share <= 1) is passes
    worst = compare(torch.tensor([[0x80, 0x51, 0x9F]], dtype=torch.uint8), exact, exact, 2.0, is_packed=True)
    assert worst.text == "element [0, 3] is 5 where 2 is exact: off by 3 codes, allowed 1; 1 of 6 are wrong"
    unlike = torch.tensor([[0x80, 0x41, 0x9F]], dtype=torch.uint8)
    assert compare(unlike, unlike, exact, 2.0, is_packed=True).share <= 1


def test_integers_are_equal_or_wrong() -> None:
    numbers = torch.arange(6).view(2, 3)
    assert compare(numbers, numbers, numbers, 2.0).share == 0
    assert compare(numbers + (numbers == 4), numbers, numbers, 2.0).share > 1


@pytest.mark.parametrize("got", [float("nan"), float("inf"), 1.0])
@pytest.mark.parametrize("wanted", [float("nan"), float("inf"), float("-inf"), 1.0])
def test_what_is_not_finite_is_so_on_both_sides(got: float, wanted: float) -> None:
    actual, reference = torch.tensor([[got, 1.0]]), torch.tensor([[wanted, 1.0]])
    same = got == wanted or (got != got and wanted != wanted)
    assert (compare(actual, reference, torch.ones(1, 2, dtype=torch.float64), 2.0).share <= 1) is same


def test_the_worst_of_many_blocks_is_found_and_placed() -> None:
    exact = torch.zeros(3, 5, 40_000, dtype=torch.float64)
    actual = exact.float()
    actual[2, 3, 17] = 1.0
    assert compare(actual, exact.float(), exact, 2.0).text.startswith("element [2, 3, 17] is 1 where 0 is exact")


def test_nothing_is_never_wrong() -> None:
    empty = torch.empty(0, 8)
    assert compare(empty, empty, empty.double(), 2.0).share == 0
    scalar = torch.tensor(2.0)
    assert compare(scalar, scalar, scalar.double(), 2.0).share == 0
