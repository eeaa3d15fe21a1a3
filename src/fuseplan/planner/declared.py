"""Prices of ops that the cost model doesn't know: the providers' declared costs, beside Inductor's kernels for the
nodes that the ops replace.
"""

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx

from fuseplan.graph.facts import group_size, is_call, tensor_of
from fuseplan.matching import Match
from fuseplan.planner.costs import CostModel
from fuseplan.providers import KernelCost
from fuseplan.providers.declared import declared_us
from fuseplan.rules import Bindings
from fuseplan.rules.parts import Core, Epilogue, Prologue, part_at, reducer_of
from fuseplan.rules.parts.traffic import Kernel, Middle, Region

Sized = Callable[[Tensor], Tensor]
"""A tensor of the graph at some number of tokens, without data: all its sizes are numbers."""

GENERATED = frozenset(
    {
        "amax", "amin", "cat", "clone", "constant_pad_nd", "convert_element_type", "full", "mean", "prod", "sum",
        "_to_copy", "var", "var_mean", "where",
    }
)  # fmt: skip
"""Ops, beside pointwise ones and views, that Inductor generates code for, by name."""


def declared_ns(match: Match, model: CostModel, sized: Sized) -> int:
    """The time of a call of a fused op, as its provider declares it.

    Args:
        match: of a provider that declares a cost.
        model: of the device.
        sized: the arguments' size.

    Raises:
        ConfigError: the provider's function raises, or returns no time.
    """
    cost = match.cost
    assert cost is not None
    if isinstance(cost, KernelCost):
        moved = model.hardware.memory_ns(_bytes(match.values.values(), sized) + _bytes(match.outputs, sized))
        return round(cost.kernels * model.hardware.launch.value + cost.passes * moved)
    values = {name: _sized(value, sized) for name, value in match.values.items()}
    tensors = " ".join(f"{name}{list(value.shape)}" for name, value in values.items() if isinstance(value, Tensor))
    whose = f"{match.provider}'s {match.rule.op.name} of {tensors}"
    return round(1000 * declared_us(cost, Bindings(match.rule.name, values), whose))


def generated(match: Match, model: CostModel, sized: Sized) -> tuple[Kernel, ...] | None:
    """Inductor's kernels for a match's nodes: one, one more for each epilogue that stands alone, and the all-reduces;
    None where the match has an op whose kernels aren't known.
    """
    reads = _bytes(match.values.values(), sized)
    found, alone, reduction = list[Kernel](), False, False
    for node in match.consumed:
        part = part_at(node)
        if isinstance(part, Prologue):
            found += _all_reduce(node, model, sized)
        elif isinstance(part, Epilogue) and part.tail(node, match.core).stays_apart(_core_of(match)):
            results = [user for user in node.users if is_call(user, operator.getitem)]
            found.append(_kernel(part.name, model, _bytes((*node.all_input_nodes, node, *results), sized)))
        elif part is None and not _is_generated(node.target):
            return None
        else:
            alone = True
            reduction |= isinstance(part, (Core, Epilogue)) and part.traffic.reduces_rows
    if alone:
        extra = model.hardware.generated_norm.value if reduction else 0.0
        found.append(_kernel(match.rule.core.name, model, reads + _bytes(match.outputs, sized), extra))
    return tuple(found)


def _kernel(name: str, model: CostModel, nbytes: int, extra: float = 0.0) -> Kernel:
    fixed, moved = model.hardware.launch.value + extra, model.hardware.memory_ns(nbytes)
    return Kernel(name=name, launch=round(fixed), memory=round(fixed + moved) - round(fixed))


def _core_of(match: Match) -> Middle:
    part = part_at(match.core)
    return part.traffic if isinstance(part, Core) else Middle(name=match.rule.core.name)


def _is_generated(target: Any) -> bool:
    if not isinstance(target, torch._ops.OpOverload):
        return getattr(target, "__name__", "") == "getitem"
    if target.namespace not in ("aten", "prims"):
        return False
    return torch.Tag.pointwise in target.tags or target.is_view or target.overloadpacket.__name__ in GENERATED


def _all_reduce(node: fx.Node, model: CostModel, sized: Sized) -> tuple[Kernel, ...]:
    value, ranks = tensor_of(node), group_size(str(node.args[1])) or 1
    if value is None or ranks == 1:
        return ()
    x = sized(value)
    region = Region(
        core=Middle(name="reduced", reads_sums=True), tokens=max(1, x.shape[:-1].numel()), width=x.shape[-1],
        itemsize=x.dtype.itemsize, reduce=True, ranks=ranks, reducer=reducer_of(node),
    )  # fmt: skip
    return model.reduce(region)


def _sized(value: Any, sized: Sized) -> Any:
    tensor = tensor_of(value) if isinstance(value, fx.Node) else None
    return sized(tensor) if tensor is not None else value


def _bytes(values: Iterable[Any], sized: Sized) -> int:
    nodes = dict.fromkeys(value for value in values if isinstance(value, fx.Node))
    tensors = [tensor for node in nodes if (tensor := tensor_of(node)) is not None]
    return sum(x.numel() * x.dtype.itemsize for x in map(sized, tensors))
