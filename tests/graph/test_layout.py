"""How values lie in memory, with sizes that are known and sizes that aren't, and results of fake implementations."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from fuseplan.graph.facts import equal_size
from fuseplan.graph.layout import (
    carriers,
    is_reordered,
    is_view_of,
    layout_of,
    layout_reader,
    memory_order,
    same_layout,
    storage_of,
    writers,
)
from fuseplan.graph.ops import empty
from fuseplan.graph.ops.fakes import slice_of, view_of
from fuseplan.graph.sizes import equal_rounded
from tests.helpers import written

aten = torch.ops.aten
X = torch.zeros(3, 4)
DENSE = torch.zeros(2, 3, 4)


class Mode(FakeTensorMode):
    """Its values may have sizes that aren't known, which nothing should guard on."""

    def __init__(self) -> None:
        super().__init__(shape_env=ShapeEnv())

    def value(self, kind: str) -> Tensor:
        """A tensor [6, 8]."""
        if kind == "unbacked":
            assert self.shape_env is not None
            with self:
                return torch.empty((self.shape_env.create_unbacked_symint(), 8), dtype=torch.bfloat16)
        sizes = [DimDynamic.DUCK if kind == "backed" else DimDynamic.STATIC] * 2
        context: StatelessSymbolicContext[Any, Any] = StatelessSymbolicContext(dynamic_sizes=sizes)
        return self.from_tensor(torch.empty(6, 8, dtype=torch.bfloat16), symbolic_context=context)


@pytest.fixture
def mode() -> Mode:
    return Mode()


def assert_alike(ours: Tensor | None, theirs: Tensor, mode: Mode) -> None:
    """What is made without a mode is what the mode makes, without a guard."""
    assert type(ours) is FakeTensor
    assert ours.fake_mode is mode
    assert (ours.dtype, ours.device) == (theirs.dtype, theirs.device)
    assert layout_of(ours) == layout_of(theirs)
    assert mode.shape_env is not None
    assert not mode.shape_env.guards


@pytest.mark.parametrize("dtype", [None, torch.float32])
@pytest.mark.parametrize("kind", ["static", "backed", "unbacked"])
def test_a_new_fake_is_the_one_that_the_mode_makes(kind: str, dtype: torch.dtype | None, mode: Mode) -> None:
    x = mode.value(kind)
    for shape in (x.shape, (*x.shape[:-1], x.shape[-1] + 4)):
        with mode:
            theirs, inside = x.new_empty(shape, dtype=dtype), empty(x, shape, dtype)
        for ours in (inside, empty(x, shape, dtype)):
            assert_alike(ours, theirs, mode)
            assert len({storage_of(each) for each in (x, ours, theirs)}) == 3


@pytest.mark.parametrize("kind", ["static", "backed", "unbacked"])
def test_a_view_of_a_fake_is_the_one_that_the_mode_makes(kind: str, mode: Mode) -> None:
    x = mode.value(kind)
    assert isinstance(x, FakeTensor)
    theirs = x.t()[1:, :2] if kind == "static" else x[:, 2:]
    ours = view_of(x, theirs)
    assert_alike(ours, theirs, mode)
    assert layout_of(ours) != layout_of(x)
    assert storage_of(ours) == storage_of(x)


@pytest.mark.parametrize("kind", ["static", "turned", "unbacked"])
@pytest.mark.parametrize("bounds", [(0, -3), (2, 5), (-2, 2**63 - 1), (5, 3), (-100, 100), (9, 10)])
def test_a_slice_of_a_fake_is_the_one_that_the_mode_makes(kind: str, bounds: tuple[int, int], mode: Mode) -> None:
    x = mode.value(kind).t()[1:, 1:] if kind == "turned" else mode.value(kind)
    for dim in (-1, 1):
        with mode:
            theirs = aten.slice.Tensor(x, dim, *bounds)
        ours = slice_of(x, dim, *bounds)
        assert_alike(ours, theirs, mode)
        assert ours is not None
        assert storage_of(ours) == storage_of(x)


def test_what_only_the_mode_or_torch_can_make(mode: Mode) -> None:
    x = mode.value("backed")
    assert slice_of(x, 0, 0, 2) is slice_of(x, 1, 0, x.shape[1]) is slice_of(x, 1, 0, 2, 2) is slice_of(x, 1) is None
    assert slice_of(torch.zeros(2, 3), 1, 0, 2) is None
    made = empty(torch.zeros(2, 3), (4,), torch.int32)
    assert type(made) is Tensor
    assert (made.shape, made.dtype, made.device.type) == ((4,), torch.int32, "cpu")


Size = Callable[[Any], Any]


@pytest.mark.parametrize(
    ("left", "right", "equal"),
    [
        (lambda s: -4 * (s // -4), lambda s: (s + 3) // 4 * 4, True),
        (lambda s: (s + 3) // 4 * 4, lambda s: torch.sym_max(1, (s + 3) // 4 * 4), True),
        (lambda s: s + 3 - (s + 3 - (s + 3) // 4 * 4), lambda s: -(-s // 4) * 4, True),
        (lambda s: s, lambda s: s, True),
        (lambda s: s // 4 * 4, lambda s: (s + 3) // 4 * 4, False),
        (lambda s: (s + 4) // 4 * 4, lambda s: (s + 3) // 4 * 4, False),
        (lambda s: s + (s + 3) // 4, lambda s: (s + 3) // 4 * 4, False),
        (lambda s: (s + 7) // 8 * 8, lambda s: (s + 3) // 4 * 4, False),
        (lambda s: s * s, lambda s: s * s * s, False),
        (lambda s: torch.sym_max(1, s // 4 * 4), lambda s: s // 4 * 4, False),
        (lambda s: 8, lambda s: (s + 3) // 4 * 4, False),
    ],
)
def test_sizes_that_are_rounded_to_multiples(left: Size, right: Size, equal: bool, mode: Mode) -> None:
    rows = mode.value("backed").shape[0]
    assert equal_rounded([2, left(rows)], [2, right(rows)], 4) is equal
    assert equal_rounded([right(rows)], [left(rows)], 4) is equal
    assert not equal_rounded([rows, left(rows)], [right(rows)], 4)


def test_sizes_are_equal_whatever_their_symbols_are(mode: Mode) -> None:
    rows, width = mode.value("backed").shape
    assert equal_size(rows, rows)
    assert equal_size(rows + width, width + rows)
    assert equal_size(2 * rows // 2, rows)
    assert equal_size(8, 8)
    assert not any(equal_size(*each) for each in ((rows, width), (rows, 6), (6, 8)))
    assert mode.shape_env is not None
    assert not mode.shape_env.guards


@pytest.mark.parametrize(
    ("value", "order"),
    [
        (DENSE, (0, 1, 2)),
        (DENSE.transpose(0, 1), (1, 0, 2)),
        (DENSE.permute(2, 0, 1), (1, 2, 0)),
        (DENSE[:, :2], None),
        (DENSE[:1].expand(2, 3, 4), None),
        (DENSE[..., ::2], None),
        (DENSE[:1], (0, 1, 2)),
        (torch.zeros(4, 1, 3).permute(2, 1, 0), (1, 2, 0)),
        (torch.zeros(()), ()),
        (torch.zeros(0, 4), (0, 1)),
    ],
)
def test_the_order_of_dimensions_in_memory(value: Tensor, order: tuple[int, ...] | None) -> None:
    found = memory_order(value)
    assert found == order
    if found is not None:
        assert value.permute(found).is_contiguous()


def test_sizes_that_nobody_knows_have_an_order(mode: Mode) -> None:
    rows = mode.value("unbacked").shape[0]
    with mode:
        value = torch.empty_strided((rows, 3, 4), (4, 4 * rows, 1))
    assert memory_order(value) == (1, 0, 2)
    assert same_layout(value, value)
    assert not is_reordered(value, value)
    assert not same_layout(value, value[..., 1:])


def test_a_view_of_one_tensor_is_one_of_another_that_lies_as_it_does() -> None:
    with FakeTensorMode():
        x, other = torch.empty(4, 8), torch.empty(4, 8)
        turned, wider, half = torch.empty(8, 4).t(), torch.empty(4, 9), torch.empty(4, 8, dtype=torch.float16)
        later = torch.empty(33)[1:].view(4, 8)
    view = x[:, :2]
    assert is_view_of(view, x, other)
    assert not any(is_view_of(view, x, each) for each in (turned, wider, half, later, torch.empty(4, 8)))
    assert not any(is_view_of(each, x, other) for each in (view.clone(), x.view(torch.int32)))


def test_dimensions_of_one_element_have_no_stride() -> None:
    assert same_layout(torch.zeros(1, 4), torch.zeros(1, 8)[:, :4])
    assert not same_layout(torch.zeros(2, 4), torch.zeros(2, 8)[:, :4])
    assert not same_layout(torch.zeros(2, 4), torch.zeros(3, 4)[1:])


def test_gaps_reorder_nothing() -> None:
    assert not is_reordered(torch.zeros(2, 8)[:, :4], torch.zeros(2, 4))
    assert is_reordered(torch.zeros(4, 2).t(), torch.zeros(2, 4))
    assert not is_reordered(torch.zeros(8, 2)[:4].t(), torch.zeros(4, 2).t())
    assert is_reordered(torch.zeros(2, 4), torch.zeros(2, 8)[:, :4])  # nothing is known of what isn't dense


def test_views_carry_a_layout_and_pointwise_ops_carry_its_order() -> None:
    def readers(x: Any) -> Any:
        turned = aten.permute.default(x, [1, 0])
        half = aten.select.int(aten.split.Tensor(turned, 2)[1], 0, 0)
        return aten.sin.default(turned), aten.cos.default(half)

    graph = written(readers, {"x": X})
    (x,) = graph.find_nodes(op="placeholder")
    views, results = {"x", "permute_default", "split_tensor", "getitem", "select_int"}, {"sin_default", "cos_default"}
    assert {node.name for node in carriers(x, (), reordered=False)} == views
    assert {node.name for node in carriers(x, (), reordered=True)} == views | results
    assert layout_reader(x, (), reordered=False) is None
    assert layout_reader(x, (), reordered=True) is graph.output_node()


def test_what_is_skipped_is_not_looked_at() -> None:
    graph = written(lambda x: (aten.sin.default(x), x), {"x": X})
    (x,) = graph.find_nodes(op="placeholder")
    output = graph.output_node()
    assert layout_reader(x, (), reordered=False) is output
    assert layout_reader(x, (output,), reordered=False) is None


def test_only_what_is_written_to_has_a_writer() -> None:
    def model(x: Any, y: Any, z: Any) -> Any:
        aten.copy_.default(x, y)
        return aten.index_put.default(z, [None], y), aten.sin.default(y)

    graph = written(model, {name: X.clone() for name in "xyz"})
    calls: list[fx.Node] = [node for node in graph.nodes if node.op == "call_function"][:2]
    readers = [layout_reader(node, (), reordered=False) for node in graph.find_nodes(op="placeholder")]
    assert readers == [calls[0], None, calls[1]]
    assert [*writers(graph).values()] == calls
