"""How values lie in memory, with sizes that are known and sizes that aren't."""

from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fuseplan.graph.layout import carriers, is_reordered, is_view_of, layout_reader, memory_order, same_layout, writers
from tests.helpers import written

aten = torch.ops.aten
X = torch.zeros(3, 4)
DENSE = torch.zeros(2, 3, 4)


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


def unknown_rows() -> Tensor:
    environment = ShapeEnv()
    with FakeTensorMode(shape_env=environment):
        rows: Any = environment.create_unbacked_symint()
        return torch.empty_strided((rows, 3, 4), (4, 4 * rows, 1))


def test_sizes_that_nobody_knows_have_an_order_and_no_guard() -> None:
    value = unknown_rows()
    assert memory_order(value) == (1, 0, 2)
    assert same_layout(value, value)
    assert not is_reordered(value, value)
    assert not same_layout(value, value[..., 1:])


def test_a_view_of_one_tensor_is_one_of_another_that_lies_as_it_does() -> None:
    with FakeTensorMode():
        x, other = torch.empty(4, 8), torch.empty(4, 8)
        turned, wider, half = torch.empty(8, 4).t(), torch.empty(4, 9), torch.empty(4, 8, dtype=torch.float16)
        later = torch.empty(33)[1:].view(4, 8)
    view, by_bits = x[:, :2], x.view(torch.int32)
    assert is_view_of(view, x, other)
    for each in (turned, wider, half, later, torch.empty(4, 8)):
        assert not is_view_of(view, x, each)
    assert not is_view_of(view.clone(), x, other)
    assert not is_view_of(by_bits, x, other)


def test_dimensions_of_one_element_have_no_stride() -> None:
    assert same_layout(torch.zeros(1, 4), torch.zeros(1, 8)[:, :4])
    assert not same_layout(torch.zeros(2, 4), torch.zeros(2, 8)[:, :4])
    assert not same_layout(torch.zeros(2, 4), torch.zeros(3, 4)[1:])


def test_gaps_reorder_nothing() -> None:
    assert not is_reordered(torch.zeros(2, 8)[:, :4], torch.zeros(2, 4))
    assert is_reordered(torch.zeros(4, 2).t(), torch.zeros(2, 4))
    assert not is_reordered(torch.zeros(8, 2)[:4].t(), torch.zeros(4, 2).t())
    assert is_reordered(torch.zeros(2, 4), torch.zeros(2, 8)[:, :4])  # nothing is known of what isn't dense


def readers(x: Any) -> Any:
    turned = aten.permute.default(x, [1, 0])
    half = aten.select.int(aten.split.Tensor(turned, 2)[1], 0, 0)
    return aten.sin.default(turned), aten.cos.default(half)


def test_views_carry_a_layout_and_pointwise_ops_carry_its_order() -> None:
    graph = written(readers, {"x": X})
    (x,) = graph.find_nodes(op="placeholder")
    assert {node.name for node in carriers(x, (), reordered=False)} == {
        "x",
        "permute_default",
        "split_tensor",
        "getitem",
        "select_int",
    }
    beyond = {node.name for node in carriers(x, (), reordered=True)}
    assert {"sin_default", "cos_default"} <= beyond
    assert layout_reader(x, (), reordered=False) is None
    reader = layout_reader(x, (), reordered=True)
    assert reader is not None
    assert reader.op == "output"


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
    x, y, z = graph.find_nodes(op="placeholder")
    assert sees(graph, x, "copy_")
    assert not sees(graph, y, "copy_")
    assert {node.target for node in writers(graph).values()} == {aten.copy_.default, aten.index_put.default}
    assert len(writers(graph)) == 2
    assert layout_reader(y, (), reordered=False) is None
    assert layout_reader(z, (), reordered=False) is not None


def sees(graph: fx.Graph, node: fx.Node, name: str) -> bool:
    (writer,) = [each for each in graph.nodes if each.op == "call_function" and name in str(each.target)]
    return layout_reader(node, (), reordered=False) is writer
