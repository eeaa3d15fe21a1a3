"""What counts as an error, and where an element's place is reported."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fuseplan.verification.compare import BLOCK, compare, unit_in_the_last_place

FP8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz)


def fp8(*rows: list[int], dtype: torch.dtype = FP8[0]) -> Tensor:
    return torch.tensor(rows, dtype=torch.uint8).view(dtype)


def packed(*codes: int) -> Tensor:
    return torch.tensor([codes], dtype=torch.uint8)


@pytest.mark.parametrize(
    ("dtype", "factor", "most"),
    [(torch.float16, 2.0, 1), (torch.bfloat16, 2.0, 1), (torch.float32, 2.0, 1), (torch.float32, 8.0, 5)],
    ids=["float16", "bfloat16", "float32", "another order is allowed: half a unit of the reference"],
)
def test_so_many_units_in_the_last_place_are_allowed(dtype: torch.dtype, factor: float, most: int) -> None:
    exact = torch.tensor([[1.0, -1.5, 3.0, 1000.0]], dtype=torch.float64)
    reference = exact.to(dtype)
    for steps, passes in ((most, True), (most + 1, False)):
        actual = reference.clone()
        actual[0, 2] += steps * 2 * torch.finfo(dtype).eps
        assert (compare(actual, reference, exact, factor).share <= 1) is passes


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
@pytest.mark.parametrize(
    ("actual", "exact", "share"),
    [
        ([1, 2, 0x38, 0x83], [1, 2, 0x38, 0x82], 1), ([1, 2, 0x38, 0x84], [1, 2, 0x38, 0x82], 2),
        ([0x38, 1], [0x38, 0], 1), ([0x38, 2], [0x38, 0], 2), ([0x36], [0x38], 1), ([0x35], [0x38], 1.5),
    ],
    ids=["one", "two", "one from zero, as what pads a row", "two from it", "half as far below a power of 2", "three"],
)  # fmt: skip
def test_codes_may_be_one_apart(dtype: torch.dtype, actual: list[int], exact: list[int], share: float) -> None:
    wanted = fp8(exact, dtype=dtype)
    found = compare(fp8(actual, dtype=dtype), wanted, wanted, 2.0)
    assert found.share == pytest.approx(share)
    assert "codes" in found.text


@pytest.mark.parametrize(
    ("actual", "exact", "share"),
    [
        (fp8([0, 128]), fp8([128, 0]), 0),
        (fp8([0x7E], dtype=FP8[1]), fp8([0x7F], dtype=FP8[1]), 1),
        (fp8([0xFE], dtype=FP8[1]), fp8([0xFF], dtype=FP8[1]), 1),
        (torch.arange(6), torch.arange(6), 0), (torch.tensor([3, 5]), torch.tensor([3, 4]), 2),
        (torch.tensor([True, False]), torch.tensor([True, False]), 0),
        (torch.tensor([True, False]), torch.tensor([False, True]), 2),
        (torch.empty(0, 8), torch.empty(0, 8), 0), (torch.tensor(2.0), torch.tensor(2.0), 0),
    ],
    ids=["zero has two codes", "the largest without infinities", "the least", "integers", "another integer", "truths",
         "other truths", "nothing", "a scalar"],
)  # fmt: skip
def test_what_is_told_by_codes_or_numbers(actual: Tensor, exact: Tensor, share: float) -> None:
    assert compare(actual, exact, exact, 2.0).share == share


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


def test_codes_of_pairs_may_be_one_apart() -> None:
    exact = packed(0x80, 0x21, 0x9F)
    for pair, passes in ((0x00, True), (0x01, True), (0x90, True), (0x02, False), (0xA0, False)):
        assert (compare(packed(pair, 0x21, 0x9F), exact, exact, 2.0, is_packed=True).share <= 1) is passes
    worst = compare(packed(0x80, 0x51, 0x9F), exact, exact, 2.0, is_packed=True)
    assert worst.text == "element [0, 3] is 5 where 2 is exact: off by 3 codes, allowed 1; 1 of 6 are wrong"
    unlike = packed(0x80, 0x41, 0x9F)
    assert compare(unlike, unlike, exact, 2.0, is_packed=True).share <= 1


@pytest.mark.parametrize("got", [float("nan"), float("inf"), 1.0])
@pytest.mark.parametrize("wanted", [float("nan"), float("inf"), float("-inf"), 1.0])
def test_what_is_not_finite_is_so_on_both_sides(got: float, wanted: float) -> None:
    actual, reference = torch.tensor([[got, 1.0]]), torch.tensor([[wanted, 1.0]])
    same = got == wanted or (got != got and wanted != wanted)
    share = compare(actual, reference, torch.ones(1, 2, dtype=torch.float64), 2.0).share
    assert share == (0 if same else float("inf"))


def worst(actual: list[float], reference: list[float], exact: list[float], factor: float = 2.0) -> float:
    """Of rows of one element each."""
    got, wanted = (torch.tensor(each).unsqueeze(-1) for each in (actual, reference))
    return compare(got, wanted, torch.tensor(exact, dtype=torch.float64).unsqueeze(-1), factor).share


def test_in_rows_of_one_element_the_largest_relative_error_of_all_counts() -> None:
    """The reference may have been lucky in one of them."""
    exact = [1.0, 100.0, -1e4]
    reference = [1.0, 101.0, -1e4]
    assert worst([1.0, 101.0, -1e4 - 199], reference, exact) <= 1
    assert worst([1.0, 101.0, -1e4 - 201], reference, exact) > 1
    assert worst([1.019, 101.0, -1e4], reference, exact) <= 1
    assert worst([1.021, 101.0, -1e4], reference, exact) > 1
    assert worst([1.019], [1.0], [1.0]) > 1


@pytest.mark.parametrize("lucky", [0.0, 0.5])
def test_a_zero_says_nothing_of_relative_errors(lucky: float) -> None:
    assert worst([0.0, 1.0], [lucky, 1.0], [0.0, 1.0]) <= 1
    assert worst([0.0, 1.001], [lucky, 1.0], [0.0, 1.0]) > 1
    assert worst([1e-6, 1.0], [lucky, 1.0], [0.0, 1.0]) > 1


def test_where_the_reference_overflows_its_row_is_allowed_no_more() -> None:
    exact = torch.tensor([[1e39, 1.0, 2.0]], dtype=torch.float64)
    reference, actual = exact.float(), exact.float()
    assert reference.isinf().sum() == 1
    right = compare(actual, reference, exact, 2.0)
    assert right.share == 0
    actual[0, 2] += 1e-3
    assert 1 < compare(actual, reference, exact, 2.0).share < float("inf")


def test_what_is_not_finite_on_one_side_alone_is_told_without_a_distance() -> None:
    one = torch.ones(2, 2)
    one[1, 0] = float("nan")
    found = compare(one, torch.ones(2, 2), torch.ones(2, 2).double(), 2.0)
    assert (found.share, found.text) == (float("inf"), "element [1, 0] is nan where 1 is exact; 1 of 4 are wrong")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_next_to_zero_a_unit_is_the_least_number_there_is(dtype: torch.dtype) -> None:
    least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    small = torch.tensor([0.0, least, -torch.finfo(dtype).smallest_normal], dtype=torch.float64)
    assert unit_in_the_last_place(small, dtype).tolist() == [least] * 3
    exact = torch.zeros(1, 2, dtype=torch.float64)
    actual = torch.tensor([[0.0, least]], dtype=dtype)
    assert compare(actual, exact.to(dtype), exact, 2.0).share == 1


@pytest.mark.parametrize("is_packed", [False, True])
def test_codes_may_be_one_further_apart_than_those_of_the_reference_in_that_row(is_packed: bool) -> None:
    def codes(*rows: list[int]) -> Tensor:
        made = torch.tensor(rows, dtype=torch.uint8)
        return made if is_packed else made.view(FP8[0])

    exact = codes([0x38, 0x38], [0x38, 0x38])
    reference = codes([0x38, 0x3A], [0x38, 0x38])
    for row, steps, passes in ((0, 3, True), (0, 4, False), (1, 1, True), (1, 2, False)):
        actual = exact.clone().view(torch.uint8)
        actual[row, 0] += steps
        found = compare(actual if is_packed else actual.view(FP8[0]), reference, exact, 2.0, is_packed=is_packed)
        assert (found.share <= 1) is passes
        assert found.share == pytest.approx(steps / (3 - 2 * row))


def test_a_code_and_its_negative_are_as_far_apart_as_their_numbers() -> None:
    assert "off by 5 codes, allowed 1" in compare(fp8([0x83]), fp8([2]), fp8([2]), 2.0).text
    found = compare(packed(0xF0), packed(0x10), packed(0x10), 2.0, is_packed=True)
    assert "element [0, 1] is -7 where 1 is exact: off by 8 codes" in found.text


def test_what_is_wrong_is_counted_over_all_blocks() -> None:
    exact = torch.zeros(1, 5, BLOCK // 2, dtype=torch.float64)
    actual = exact.float()
    actual[0, :, -1] = torch.tensor([1.0, 2.0, 3.0, 4.0, 0.0])
    found = compare(actual, exact.float(), exact, 2.0)
    assert found.text.startswith(f"element [0, 3, {BLOCK // 2 - 1}] is 4 where 0 is exact")
    assert found.text.endswith(f"; 4 of {actual.numel()} are wrong")


SIXTEEN, TWENTY, HALF = 0x58, 0x5A, 0x30
FOUR_AND_A_HALF = 0x49


@pytest.mark.parametrize(
    ("others", "allowed"),
    [
        ((), 4.0625), (((TWENTY, HALF), (SIXTEEN, HALF)), 4.0625), (((SIXTEEN, HALF), (SIXTEEN, HALF)), 4.0625),
    ],
)  # fmt: skip
def test_codes_may_be_off_as_far_as_their_values_may(others: tuple[tuple[int, int], ...], allowed: float) -> None:
    """Twice what the reference is off beyond a code, which is 2, and a code of 0.5, in the same row."""
    exact = fp8(*[[SIXTEEN, HALF]] * (1 + len(others)))
    reference = fp8([TWENTY, HALF], *map(list, others))
    actual = exact.view(torch.uint8).clone()
    actual[0, 1] = FOUR_AND_A_HALF
    assert compare(actual.view(FP8[0]), reference, exact, 2.0).share == pytest.approx(4 / allowed)
