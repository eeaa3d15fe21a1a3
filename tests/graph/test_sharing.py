"""Values that a graph computes more than once."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from fuseplan.graph.facts import aten
from fuseplan.graph.sharing import Shared
from tests.helpers import quickly_traced

LENGTH = torch.tensor(3)
X = torch.zeros(2, 4)


def mask(length: Tensor, hidden: float = float("-inf"), zero: Any = 0.0) -> Tensor:
    shown = torch.arange(4) <= length
    return torch.where(shown, torch.tensor(zero), torch.tensor(hidden))


def equal(length: Tensor, x: Tensor) -> list[Tensor]:
    return [x + mask(length), x - mask(length)]


def of_other_numbers(length: Tensor, x: Tensor) -> list[Tensor]:
    return [x + mask(length, -1e9), x - mask(length, -1e8)]


def of_other_signs(length: Tensor, x: Tensor) -> list[Tensor]:
    return [x + mask(length, zero=0.0), x - mask(length, zero=-0.0)]


def of_another_input(length: Tensor, x: Tensor) -> list[Tensor]:
    return [x + mask(length), x - mask(length + 1)]


def drawn(length: Tensor, x: Tensor) -> list[Tensor]:
    return [x + torch.bernoulli(x), x - torch.bernoulli(x)]


def of_products(length: Tensor, x: Tensor) -> list[Tensor]:
    return [x + torch.relu(x @ x.T)[:, :1], x - torch.relu(x @ x.T)[:, :1]]


def readers(graph: fx.Graph) -> list[fx.Node]:
    found = (graph.find_nodes(op="call_function", target=getattr(aten, name).Tensor) for name in ("add", "sub"))
    return [next(node for node in nodes if node.meta["val"].shape == X.shape) for nodes in found]


def shared(graph: fx.Graph) -> bool:
    """Whether the second reader is given what the first one reads."""
    found, values = Shared(graph), []
    for reader in readers(graph):
        (value,) = (each for each in reader.all_input_nodes if each.op != "placeholder")
        values.append((value, found.first(value, reader)))
    (first, same), (second, given) = values
    assert same is first
    assert first is not second
    assert given in (first, second)
    return given is first


@pytest.mark.parametrize(
    ("function", "is_shared"),
    [
        (equal, True),
        (of_other_numbers, False),
        (of_other_signs, False),
        (of_another_input, False),
        (drawn, False),
        (of_products, False),
    ],
)
def test_values_are_shared_that_the_same_calls_compute(function: Callable[..., Any], is_shared: bool) -> None:
    assert shared(quickly_traced(function, LENGTH, X)) == is_shared


@pytest.mark.parametrize("place", ["between the values", "before the second reader"])
def test_nothing_is_shared_across_a_mutation(place: str) -> None:
    graph = quickly_traced(equal, LENGTH, X)
    length = graph.find_nodes(op="placeholder")[0]
    second = graph.find_nodes(op="call_function", target=aten.where.self)[-1]
    before = readers(graph)[1] if place == "before the second reader" else second
    with graph.inserting_before(before):
        written = graph.call_function(aten.add_.Tensor, (length, 1))
        written.meta["val"] = length.meta["val"]
    assert not shared(graph)


def test_what_is_used_twice_at_each_step_is_looked_at_once() -> None:
    """Otherwise 2 ** 30 times."""

    def squared(length: Tensor, x: Tensor) -> list[Tensor]:
        hidden = mask(length)
        for _ in range(30):
            hidden = hidden * hidden
        return [x + hidden, x - hidden * 2]

    graph = quickly_traced(squared, LENGTH, X)
    found = Shared(graph)
    reader = readers(graph)[0]
    for value in graph.find_nodes(op="call_function", target=aten.mul.Tensor):
        assert found.first(value, reader) is value


def test_what_is_erased_is_no_longer_shared() -> None:
    graph = quickly_traced(equal, LENGTH, X)
    found, (first, second) = Shared(graph), readers(graph)
    values = [next(each for each in reader.all_input_nodes if each.op != "placeholder") for reader in (first, second)]
    assert found.first(values[0], first) is values[0]
    first.replace_all_uses_with(graph.find_nodes(op="placeholder")[1])
    graph.erase_node(first)
    graph.erase_node(values[0])
    assert found.first(values[1], second) is values[1]
