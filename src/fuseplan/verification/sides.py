"""Another pass's replacement as two functions: the nodes that it removes from a graph, and the graph it inserts."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx
from torch._C import DispatchKey, DispatchKeySet
from torch._higher_order_ops.auto_functionalize import auto_functionalized_dense, auto_functionalized_v2_dense
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from fuseplan.graph.facts import aten, is_functionalized, tensor_of
from fuseplan.graph.legality import external_inputs
from fuseplan.matching import ExternalMatch
from fuseplan.verification.evaluate import widened
from fuseplan.verification.memory import Poisoned
from fuseplan.verification.specs import concrete

TORCHS = ("aten", "prims")
BY_BITS = (aten.view.dtype, torch.ops.prims.view_of_dtype.default)
"""Ops that read the bits of a value, which differ in float64."""

Change = Callable[[fx.Node, Any], Any]
Given = Callable[[Change], tuple[tuple[Any, ...], dict[str, Any]]]
"""`given(change)` yields a node's arguments, with `change(source, value)` in the place of each node that it reads."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Side:
    """Nodes to run one after the other.

    Attributes:
        names: the variable of each node that the others read; they may also read sizes.
        nodes: the nodes, in graph order.
        outputs: the results: nodes, or nests of nodes.
    """

    names: Mapping[fx.Node, str]
    nodes: tuple[fx.Node, ...]
    outputs: tuple[Any, ...]

    def run(
        self, arguments: Mapping[str, Any], symbols: Mapping[Any, int], *, call: "Callable[[fx.Node, Given], Any]"
    ) -> list[Any]:
        """The values of `outputs`.

        Args:
            arguments: arguments by variable.
            symbols: the values of symbolic sizes.
            call: runs a node.
        """
        values = {node: arguments[name] for node, name in self.names.items()}
        known = _known(values, symbols)
        for node in self.nodes:

            def given(change: Change, node: fx.Node = node) -> tuple[tuple[Any, ...], dict[str, Any]]:
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: change(source, known(source)))
                return _plain(args, symbols), _plain(kwargs, symbols)

            values[node] = call(node, given)
        return [fx.map_arg(output, known) for output in self.outputs]

    @cached_property
    def calls(self) -> list[tuple[Any, dict[str, Any], fx.Node]]:
        """(op, arguments by name, node) of each called op, including ops under `auto_functionalized`."""
        found = []
        for node in self.nodes:
            target: Any = node.target
            args = node.args
            if is_functionalized(target):
                (target,), args = args, ()
            if isinstance(target, OpOverload):
                names = [argument.name for argument in target._schema.arguments]
                found.append((target, {**dict(zip(names, args, strict=False)), **node.kwargs}, node))
        return found

    def text(self, symbols: Mapping[Any, int]) -> str:
        """The calls of the nodes, without the nodes' names."""
        named: dict[fx.Node, Any] = dict(self.names)
        known, lines = _known(named, symbols), []
        for number, node in enumerate(self.nodes):
            args, kwargs = fx.map_arg((node.args, node.kwargs), known)
            named[node] = f"%{number}"
            lines.append(f"{node.target} {_plain(args, symbols)} {_plain(kwargs, symbols)}")
        outputs = [fx.map_arg(output, known) for output in self.outputs]
        return "\n".join([*lines, str(outputs)])


def _known(values: Mapping[fx.Node, Any], symbols: Mapping[Any, int]) -> Callable[[fx.Node], Any]:
    return lambda node: values[node] if node in values else concrete(node.meta["val"], symbols)


def _plain(values: Any, symbols: Mapping[Any, int]) -> Any:
    return pytree.tree_map(lambda value: concrete(value, symbols), values)


def sides_of(match: ExternalMatch) -> tuple[Side, Side]:
    """The nodes that a match replaces, and their replacement, with the same variables.

    Raises:
        ValueError: the replacement isn't a function of nodes alone.
    """
    arguments, names = match.arguments, dict[fx.Node, str]()
    known, taken = match.variables, set[str]()
    given = [each for each in arguments if isinstance(each, fx.Node)]
    for node in dict.fromkeys((*given, *external_inputs(match.consumed))):
        name = known.get(node, node.name)
        names[node] = name if name not in taken else f"{name} ({node.name})"
        taken.add(names[node])
    before = Side(names=names, nodes=match.consumed, outputs=tuple(match.outputs))
    return before, _replacement(match, arguments, names)


def _replacement(match: ExternalMatch, arguments: list[Any], names: Mapping[fx.Node, str]) -> Side:
    """The replacement, with plain values instead of their placeholders."""
    module = match.replacement
    placeholders = module.graph.find_nodes(op="placeholder")
    if len(placeholders) != len(arguments):
        raise ValueError(f"its replacement has {len(placeholders)} inputs and is called with {len(arguments)}")
    graph, made = fx.Graph(), dict[fx.Node, Any]()
    own: dict[str, fx.Node] = {}
    for placeholder, argument in zip(placeholders, arguments, strict=True):
        if not isinstance(argument, fx.Node):
            made[placeholder] = argument
            continue
        if names[argument] not in own:
            own[names[argument]] = graph.placeholder(argument.name)
            own[names[argument]].meta = argument.meta
        made[placeholder] = own[names[argument]]
    for node in module.graph.nodes:
        if node.op == "get_attr":
            raise ValueError(f"its replacement holds {node.target}, which isn't an argument")
        if node.op == "call_function":
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: made[source])
            made[node] = graph.call_function(node.target, args, kwargs)
            made[node].meta = node.meta
    (yielded,) = fx.map_arg(module.graph.output_node().args, lambda source: made[source])
    outputs = tuple(yielded) if isinstance(yielded, (list, tuple)) else (yielded,)
    calls = tuple(node for node in graph.nodes if node.op == "call_function")
    return Side(names={node: name for name, node in own.items()}, nodes=calls, outputs=outputs)


def run_node(node: fx.Node, given: Given) -> Any:
    """Runs a node in its own dtypes."""
    return _called(node, *given(_placed if is_functionalized(node.target) else lambda source, value: value))


def run_exactly(node: fx.Node, given: Given) -> Any:
    """Runs a node in float64, without casts except to fp8. An op from outside of torch may refuse float64 or misread
    it: if its result then isn't close to its result in the graph's dtypes, the latter is used.
    """
    target = node.target
    is_known = isinstance(target, OpOverload) and target.namespace in TORCHS and target not in BY_BITS
    narrow = None if is_known else _called(node, *given(_as_in_the_graph))
    if target in BY_BITS:
        return narrow
    try:
        wide = _called(node, *pytree.tree_map(widened, given(lambda source, value: value)))
    except Exception:  # noqa: BLE001 - an op that doesn't take float64 may raise anything
        return _called(node, *given(_as_in_the_graph)) if narrow is None else narrow
    return wide if narrow is None or _is_near(wide, narrow) else narrow


def _called(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if is_functionalized(node.target):
        is_second = str(getattr(node.target, "__name__", "")).endswith("_v2")
        return (auto_functionalized_v2_dense if is_second else auto_functionalized_dense)(*args, **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)


def _placed(source: fx.Node, value: Any) -> Any:
    """A value at its storage offset in the graph, which copies of written arguments keep."""
    own = tensor_of(source)
    if own is None or not isinstance(value, Tensor) or not isinstance(own.storage_offset(), int) or not value.numel():
        return value
    extent = 1 + sum((size - 1) * step for size, step in zip(value.shape, value.stride(), strict=True))
    buffer = torch.empty(own.storage_offset() + extent, dtype=value.dtype, device=value.device)
    memory = value.as_strided((extent,), (1,), value.storage_offset())
    buffer[own.storage_offset() :].copy_(memory)
    return buffer.as_strided(value.shape, value.stride(), own.storage_offset())


def _as_in_the_graph(source: fx.Node, value: Any) -> Any:
    """A value in its dtype in the graph."""
    own = tensor_of(source)
    if own is None or not isinstance(value, Tensor) or value.dtype is own.dtype:
        return value
    return value.to(own.dtype)


def _is_near(wide: Any, narrow: Any) -> bool:
    """Whether all tensors of two results are as close as a value and its rounding."""
    left, right = pytree.tree_leaves(wide), pytree.tree_leaves(narrow)
    return len(left) == len(right) and all(map(_is_rounding, left, right))


def _is_rounding(wide: Any, narrow: Any) -> bool:
    if not isinstance(narrow, Tensor) or not narrow.dtype.is_floating_point:
        return True
    if not isinstance(wide, Tensor) or wide.shape != narrow.shape:
        return False
    a, b = wide.double(), narrow.double()
    finite = a.isfinite() & b.isfinite()
    largest = torch.where(finite, b.abs(), 0.0).amax() if b.numel() else torch.zeros(())
    off = torch.where(finite, (a - b).abs(), 0.0)
    return bool((finite == b.isfinite()).all() and (off <= 8 * torch.finfo(narrow.dtype).eps * largest).all())


class PoisonedInside(Poisoned):
    """Also poisons allocations from Python inside other libraries' ops."""

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs an op; an op from outside of torch runs with this mode active inside."""
        if not isinstance(func, OpOverload) or func.namespace in TORCHS:
            return super().run(func, args, kwargs)
        tensors = (each for each in pytree.tree_leaves((args, kwargs)) if isinstance(each, Tensor))
        device = next((each.device.type for each in tensors), "cpu")
        key = getattr(DispatchKey, device.upper())
        with self:
            return func.redispatch(DispatchKeySet(key), *args, **kwargs)
