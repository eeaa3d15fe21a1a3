"""Python floats that Dynamo made inputs of a graph, and that a norm reads as its epsilon.

Dynamo remembers by code object which floats differed: the second model of a class with another epsilon gets it as an
input, and a norm with such an epsilon can't be raised. Dynamo can trace a frame again with some floats as constants,
and guard on their values; it does so itself for floats that can't become tensors. fuseplan asks it to, once for each
place that a float comes from. A float that changes from call to call costs one more compilation than without fuseplan,
and then stays an input.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._guards import CompileContext

from fuseplan.compatibility import FLOATS, find_moved
from fuseplan.compilation.regions import CacheRegion
from fuseplan.errors import FuseplanError
from fuseplan.graph.canonical import CanonicalGraph


class RestartError(FuseplanError):
    """Ends a compilation that is begun again. No user sees it."""


@dataclass(frozen=True)
class _Float:
    """A float input of a graph of Dynamo's.

    Attributes:
        symbol: Dynamo's name of the float; the same each time that a frame is traced.
        place: the frame, and where in it the float comes from.
        value: of this call.
    """

    symbol: str
    place: tuple[object, str]
    value: float


class Floats:
    """The floats of one compiled model to make constants.

    Args:
        region: notified of the number of compilations.
    """

    def __init__(self, region: CacheRegion) -> None:
        self._region = region
        self._known: dict[tuple[object, str], float] = {}
        self._inputs: list[_Float | None] = []
        self._frame: object = None
        self._asked: set[str] = set()
        self._wanted: set[str] = set()

    def meet(self, gm: fx.GraphModule) -> bool:
        """Records the inputs of a graph that is about to be compiled.

        Returns:
            Whether `choose` could ask for some. Then a cached version of the graph must not be used.
        """
        compile_id = CompileContext.current_compile_id()
        if compile_id != self._frame:
            self.settle()
            self._frame = compile_id
        frame = None if compile_id is None else compile_id.frame_id
        self._inputs = [_float_of(node, frame) for node in gm.graph.find_nodes(op="placeholder")]
        return any(each is not None and self._may_ask(each) for each in self._inputs)

    def choose(self, canonical: CanonicalGraph) -> None:
        """Looks for norms that a constant would complete.

        Args:
            canonical: the graph that is being compiled, raised.

        Raises:
            RestartError: there are some, and `restart` has work.
        """
        inputs = canonical.original.find_nodes(op="placeholder")
        if not canonical.dynamic_epsilons or len(inputs) != len(self._inputs):
            return  # AOTAutograd removed or added inputs, so they can't be told apart
        found = [self._inputs[inputs.index(node)] for node in canonical.dynamic_epsilons]
        chosen = [each for each in found if each is not None and self._may_ask(each)]
        if chosen:
            self._region.further += len({each.place for each in chosen} - self._known.keys())
            self._known.update({each.place: each.value for each in chosen})
            self._wanted = {each.symbol for each in chosen}
            raise RestartError

    def _may_ask(self, each: _Float) -> bool:
        if find_moved(FLOATS):
            return False
        return each.symbol not in self._asked and self._known.get(each.place, each.value) == each.value

    def restart(self) -> None:
        """Makes Dynamo trace the frame again, where `choose` found something, by an exception of Dynamo's own."""
        if not self._wanted:
            return
        from torch._dynamo.exc import TensorifyScalarRestartAnalysis
        from torch._dynamo.symbolic_convert import TensorifyState

        for symbol in self._wanted:
            TensorifyState.specialize(symbol)
        self._asked |= self._wanted
        self._wanted = set()
        raise TensorifyScalarRestartAnalysis

    def settle(self) -> frozenset[str]:
        """Withdraws the request to Dynamo, which would affect other frames, too; returns the symbols, for
        `constant`.
        """
        asked, self._asked = frozenset(self._asked), set()
        _take_back(asked)
        return asked


@contextmanager
def constant(symbols: frozenset[str]) -> Iterator[None]:
    """Makes a graph's floats constants again while it is compiled once more."""
    if symbols:
        from torch._dynamo.symbolic_convert import TensorifyState

        for symbol in symbols:
            TensorifyState.specialize(symbol)
    try:
        yield
    finally:
        _take_back(symbols)


def _take_back(symbols: frozenset[str]) -> None:
    if symbols:
        from torch._dynamo.symbolic_convert import TensorifyState

        TensorifyState.force_specializations -= symbols


def _float_of(node: fx.Node, frame: object) -> _Float | None:
    """An input of Dynamo's graph as a float, if it is one: a tensor that the graph calls `item` on."""
    for item in node.users:
        value: Any = item.meta.get("example_value")
        if item.target == "item" and isinstance(value, torch.SymFloat) and value.node.hint is not None:
            return _Float(str(value.node.expr), (frame, str(node.target)), float(value.node.hint))
    return None
