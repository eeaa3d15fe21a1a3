"""A rule's two sides as functions: the pattern by the references of its ops or exactly, the replacement by a provider's
kernel.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from fuseplan.rules.base import Rule, Traced

Call = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]
"""`call(target, args, kwargs)` runs one node."""

NARROW = (torch.float16, torch.bfloat16, torch.float32)


def reference(rule: Rule, arguments: Mapping[str, Any], also: fx.Node | None = None) -> tuple[list[Tensor], list[Any]]:
    """(values of the pattern, arguments of a node in it), with each op by its reference and the graph's rounding."""
    return _evaluate(rule.traced_pattern, arguments, lambda target, args, kwargs: target(*args, **kwargs), also)


def exact(rule: Rule, arguments: Mapping[str, Any], also: fx.Node | None = None) -> tuple[list[Tensor], list[Any]]:
    """The same in float64, without casts, except to fp8, in which codes are compared."""
    wide = {name: widened(value) for name, value in arguments.items()}

    def call(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return target(*map(widened, args), **{name: widened(value) for name, value in kwargs.items()})

    return _evaluate(rule.traced_pattern, wide, call, also)


def widened(value: Any) -> Any:
    """Widens a tensor or a dtype narrower than float64 to float64; returns other values as they are."""
    if isinstance(value, Tensor):
        return value.double() if value.dtype in NARROW else value
    return torch.float64 if isinstance(value, torch.dtype) and value in NARROW else value


def fused(rule: Rule, arguments: Mapping[str, Any], kernel: Callable[..., Any]) -> list[Tensor]:
    """The values of the replacement, with its fused op run by `kernel`."""
    traced = rule.trace_replacement({name: _Placeholder.of(value) for name, value in arguments.items()})
    overload = rule.op.overload

    def call(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return kernel(*args) if target is overload else target(*args, **kwargs)

    return _evaluate(traced, arguments, call)[0]


class _Placeholder:
    """A stand-in for the tensors that the replacement is traced with."""

    _node = fx.Graph().placeholder("argument")

    @classmethod
    def of(cls, value: Any) -> Any:
        return cls._node if isinstance(value, Tensor) else value


def _evaluate(
    traced: Traced, arguments: Mapping[str, Any], call: Call, also: fx.Node | None = None
) -> tuple[list[Tensor], list[Any]]:
    values: dict[fx.Node, Any] = {}
    for name, node in traced.inputs.items():
        if name in arguments:
            values[node] = arguments[name]
    for node in traced.graph.nodes:
        if node.op == "call_function":
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: values[source])
            values[node] = call(node.target, args, kwargs)
    given = [values[each] if isinstance(each, fx.Node) else each for each in also.args] if also is not None else []
    return [values[node] for node in traced.outputs], given
