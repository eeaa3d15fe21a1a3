"""Scales that step at whole tenths, of groups that are written: which of them are right, and what takes their place."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fuseplan.dialect import ops
from fuseplan.graph.ops import Decoded
from fuseplan.rules.families import BUILT_IN_RULES
from fuseplan.verification.compare import FP8
from fuseplan.verification.steps import Stepped, _bits, _Groups, _spacing

MOST = 4.0


def decoded(scales: Tensor, *, most: float = MOST) -> Decoded:
    """Scales that are so many tenths; a code is the number."""
    return Decoded(numbers=lambda codes: codes.double(), scales=scales.double(), steps=(scales * 10).floor(), most=most)


class Tenths:
    """A quantisation whose scale is a group's largest element, rounded down to tenths."""

    def __init__(self, group_size: int = 2) -> None:
        self.group_size, self.arguments = group_size, list[tuple[Any, ...]]()

    def reference(self, rows: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        self.arguments.append(arguments)
        groups = rows.unflatten(-1, (-1, self.group_size))
        return rows, groups.abs().amax(-1)

    def decode(self, codes: Tensor, scales: Tensor, *arguments: Any) -> Decoded | None:
        self.arguments.append(arguments)
        return decoded(scales)


def stepped(op: Any, places: tuple[int, int] = (0, 1)) -> Stepped:
    return Stepped(op=op, node=None, places=places)  # type: ignore[arg-type]


def fits(
    exact: list[float], allowed: list[float], got: float, own: float, codes: list[float], *, most: float = MOST,
    kind: torch.dtype = torch.float32,
) -> bool:  # fmt: skip
    """Whether a scale of one group fits, in tenths, and its codes."""
    groups = _Groups(exact=torch.tensor([exact]).double(), allowed=torch.tensor([allowed]).double())
    zero = torch.zeros(1, dtype=torch.int64)
    op = Tenths(len(exact))
    scale = torch.tensor([[got / 10 + 0.01]])
    result = stepped(op)._fits(
        groups, decoded(scale, most=most), decoded(torch.tensor([[own / 10 + 0.01]])), zero, zero, ("a", 3),
        torch.tensor([codes]).to(kind),
    )  # fmt: skip
    assert op.arguments == [("a", 3)] * 4
    assert result.shape == (1,)
    return bool(result)


@pytest.mark.parametrize(
    ("got", "own", "fit"), [(10, 9, True), (8, 9, True), (9, 9, False), (10, 8, False), (11, 10, False), (7, 8, False)]
)
@pytest.mark.parametrize("sign", [1, -1])
def test_a_scale_fits_that_is_one_step_off_and_between_both_ends(got: int, own: int, fit: bool, sign: int) -> None:
    """Between 0.85, which is 8 tenths, and 1.05, which is 10; it is the size that counts."""
    assert fits([sign * 0.95, sign * -0.1], [0.1, 0.1], got, own, [sign * 1.0, 0.0]) is fit


def test_elements_that_may_be_zero_are_at_the_lower_end() -> None:
    """What is allowed below zero isn't an element of that size."""
    assert fits([0.53, 0.0], [0.4, 0.9], 5, 4, [0.5, 0.0])
    assert fits([0.53, 0.0], [0.4, 0.9], 2, 1, [0.5, 0.0])
    assert not fits([0.53, 0.0], [0.4, 0.9], 0, 1, [0.5, 0.0])


@pytest.mark.parametrize(
    ("off", "beside", "fit"),
    [
        (1 - 1e-3, 0, True), (1 + 1e-3, 0, False), (-1 + 1e-3, 0, True), (-1 - 1e-3, 0, False), (0, 1 + 1e-3, False),
        (0, -1 + 1e-3, True),
    ],
)  # fmt: skip
def test_codes_are_one_code_and_what_is_allowed_from_what_is_exact(off: float, beside: float, fit: bool) -> None:
    """The scale is 1.01, and codes below 2 are 0.5 apart."""
    most = 0.125 + 0.5 * 1.01
    codes = [(0.96875 + off * most) / 1.01, beside * most / 1.01]
    assert fits([0.96875, 0.0], [0.125, 0.125], 10, 9, codes) is fit


def test_just_what_is_allowed_is() -> None:
    groups = _Groups(exact=torch.tensor([[1.0, 0.0]]).double(), allowed=torch.tensor([[0.25, 0.25]]).double())
    zero = torch.zeros(1, dtype=torch.int64)
    got, own = decoded(torch.tensor([[1.0]])), decoded(torch.tensor([[0.95]]))
    for code, is_right in ((1.75, True), (1.75 + 2**-10, False), (0.25, True), (0.25 - 2**-10, False)):
        found = stepped(Tenths())._fits(groups, got, own, zero, zero, (), torch.tensor([[code, 0.0]]))
        assert bool(found) is is_right


@pytest.mark.parametrize(
    ("code", "most", "fit"),
    [(0.4, 0.4, True), (0.39, 0.4, True), (0.39, 1.4, False), (1.0, 100.0, True), (0.3, 100.0, False)],
)
def test_what_is_beyond_the_largest_code_is_that_code_or_one_code_off(code: float, most: float, fit: bool) -> None:
    assert fits([10.0, 0.0], [0.95, 0.1], 100, 101, [code, 0.0], most=most) is fit


@pytest.mark.parametrize("kind", sorted(FP8, key=str))
def test_fp8_codes_have_the_spacing_of_their_values(kind: torch.dtype) -> None:
    """Of an fp8 code between 1 and 2: an eighth, or a fourth."""
    unit = torch.finfo(kind).eps
    exact, allowed = [1.0, 0.0], [0.06, 0.06]  # from 9 tenths to 10
    for off, is_right in ((0, True), (1, True), (3, False)):
        assert fits(exact, allowed, 10, 9, [1.0 + off * unit, 0.0], kind=kind) is is_right


def test_e2m1_codes_are_as_far_apart_as_the_farther_neighbour() -> None:
    numbers = torch.tensor([0.0, 0.5, 1.5, -1.5, 2.0, 3.0, -3.0, 4.0, 6.0, -6.0]).double()
    assert _spacing(numbers).tolist() == [0.5, 0.5, 0.5, 0.5, 1.0, 1.0, 1.0, 2.0, 2.0, 2.0]


def test_bits_are_integers_of_the_same_size() -> None:
    for dtype, integer in ((torch.uint8, torch.uint8), (torch.bfloat16, torch.int16), (torch.float32, torch.int32),
                           (torch.float64, torch.int64), (torch.float8_e8m0fnu, torch.uint8)):  # fmt: skip
        assert _bits(torch.ones(2, 3).to(dtype)).dtype is integer
        assert _bits(torch.ones(2, 3).to(dtype)).shape == (2, 3)


@pytest.mark.parametrize("factor", [1.0, 2.0, 2.5])
def test_groups_are_as_far_off_as_their_rows_may_be(factor: float) -> None:
    exact = torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.5, 0.25, 8.0, 0.0], [1.0, 1.0, 1.0, 1.0]]).double()
    rows = exact.bfloat16()
    rows[0, 1] += 0.25
    rows[1, 3] -= 1.0
    row, group = torch.tensor([0, 1, 1, 2]), torch.tensor([1, 0, 1, 0])
    found = _Groups.of(rows, exact, factor, row, group, 2)
    assert found.exact.tolist() == [[3.0, 4.0], [0.5, 0.25], [8.0, 0.0], [1.0, 1.0]]
    unit = torch.tensor([[2.0, 4.0], [0.5, 0.25], [8.0, 0.0], [1.0, 1.0]]).double() * 2.0**-7
    finfo = torch.finfo(torch.bfloat16)
    unit[2, 1] = finfo.smallest_normal * finfo.eps
    worst = torch.tensor([[0.25], [1.0], [1.0], [0.0]]).double()
    if factor > 2:  # where nothing was off it may have been luck
        worst = torch.maximum(worst, unit / 2)
    assert torch.equal(found.allowed, factor * worst + unit)
    cube = _Groups.of(rows.view(3, 1, 4), exact.view(3, 1, 4), factor, row, group, 2)
    assert torch.equal(cube.allowed, found.allowed)
    assert torch.equal(cube.exact, found.exact)


EXACT = torch.tensor([[0.95, 0.5, 0.3, 0.1], [0.75, 0.2, 0.05, 0.04]]).double()
ROWS = EXACT.float() + 0.06
RIGHT = torch.tensor([[0.95, 0.3], [0.75, 0.05]])


def settled(scales: Tensor | None, codes: Tensor | None = ROWS, *, op: Any = None, right: Tensor = RIGHT) -> Any:
    """What becomes of scales of two rows of two groups, and codes that differ from those of the graph by 0.01."""
    actual: list[Any] = ["first", scales, codes]
    expected: Any = ["first", right, ROWS + 0.01]
    return actual, stepped(op or Tenths(), (2, 1)).settled(actual, expected, [ROWS, 7], [EXACT, 7], 1.0)


def with_scale(place: tuple[int, int], scale: float, right: Tensor = RIGHT) -> Tensor:
    scales = right.clone()
    scales[place] = scale
    return scales


@pytest.mark.parametrize(("scales", "codes"), [(RIGHT, ROWS), (None, ROWS), (RIGHT + 1, None), (RIGHT + 0.001, ROWS)])
def test_what_is_as_in_the_graph_stays(scales: Tensor | None, codes: Tensor | None) -> None:
    actual, (found, wrong) = settled(scales, codes)
    assert (found is actual, wrong) == (True, None)


@pytest.mark.parametrize("of_the_graph", [True, False])
def test_scales_without_steps_are_left(of_the_graph: bool) -> None:
    class Plain(Tenths):
        """The scales of some have no steps."""

        def decode(self, codes: Tensor, scales: Tensor, *arguments: Any) -> Decoded | None:
            return None if (scales is RIGHT) is of_the_graph else decoded(scales)

    actual, (found, wrong) = settled(with_scale((0, 0), 1.0), op=Plain())
    assert (found is actual, wrong) == (True, None)


@pytest.mark.parametrize(("place", "scale"), [((0, 0), 1.0), ((1, 0), 0.8), ((1, 1), 0.1)])
def test_codes_by_the_other_scale_are_those_of_the_graph(place: tuple[int, int], scale: float) -> None:
    scales, op = with_scale(place, scale), Tenths()
    actual, (found, wrong) = settled(scales, op=op)
    assert wrong is None
    assert found[0] == "first"
    assert found[1] is RIGHT
    row, columns = place[0], slice(2 * place[1], 2 * place[1] + 2)
    wanted = ROWS.clone()
    wanted[row, columns] += 0.01
    assert torch.equal(found[2], wanted)
    assert actual[2] is ROWS
    assert torch.equal(ROWS, EXACT.float() + 0.06), "what the kernel yields isn't written to"
    assert op.arguments[:2] == [(7,), (7,)]


def test_more_scales_than_those_of_groups_are_left() -> None:
    scales = with_scale((0, 0), 1.0)
    scales[1] += 0.001
    _, (found, wrong) = settled(scales)
    assert wrong is None
    assert found[1] is scales
    assert not torch.equal(found[2], ROWS)


def test_a_scale_that_is_wrong_is_named_with_what_is_right() -> None:
    actual, (found, wrong) = settled(with_scale((1, 0), 1.5))
    assert found is actual
    assert wrong == (
        "the scale of group 0 of row 1 is 1.5 where 0.75 is right for a largest element of 0.75; 1 of 4 are wrong"
    )
    scales = with_scale((0, 0), 1.0)
    scales[0, 1], scales[1, 1] = 0.9, 0.9
    _, (_, wrong) = settled(scales)
    assert wrong == (
        "the scale of group 1 of row 0 is 0.9 where 0.3 is right for a largest element of 0.3; 2 of 4 are wrong"
    )


def test_the_first_quantisation_of_a_pattern_is_the_one() -> None:
    named = {rule.op.name: rule for rule in BUILT_IN_RULES}
    found = Stepped.of(named["silu_and_mul_mx_fp8_quant"])
    assert found is not None
    assert found.op is ops.per_token_mx_fp8_quant
    assert found.node.target is found.op.overload
    traced = named["silu_and_mul_mx_fp8_quant"].traced_pattern
    assert [traced.outputs[place].args[1] for place in found.places] == [0, 1]
    assert Stepped.of(named["rms_norm_pad"]) is None
    beside: Any = SimpleNamespace(graph=traced.graph, outputs=traced.outputs[::-1])
    turned = Stepped.of(SimpleNamespace(traced_pattern=beside))  # type: ignore[arg-type]
    assert turned is not None
    assert turned.places == found.places[::-1]
