"""Ops of inference engines, which replace aten's ops and functional collectives in their graphs.

Rounding points are read off vLLM 0.22 to 0.33: `vllm/ir/ops/layernorm.py` for `vllm_ir`, and
`csrc/layernorm_kernels.cu` for `_C`, which rounds the sum to the activation dtype, and the normalised value once it is
multiplied by the weight (0.23, alone, before that, too). Under `auto_functionalized` written arguments come after
returned results.
"""

import operator
from typing import Any

from torch import fx
from torch._ops import HigherOrderOperator, OpOverload

from fuseplan.graph.canonical.view import CanonicalGraph
from fuseplan.graph.facts import is_call

NAMESPACES = frozenset({"vllm", "vllm_ir", "_C", "symm_mem"})
"""Namespaces of engines, and of torch's collectives over symmetric memory, which engines call, too."""


def merge_equal_results(canonical: CanonicalGraph, node: fx.Node) -> None:
    """Merges `getitem`s of the same result into one value."""
    first: dict[object, fx.Node] = {}
    for user in list(node.users):
        if is_call(user, operator.getitem):
            known = first.setdefault(user.args[1], user)
            if known is not user:
                canonical.replace(user, known)


def is_engines(target: object) -> bool:
    """Whether calls of a function may be calls of an engine's op."""
    return _is_functionalizer(target) or (isinstance(target, OpOverload) and target.namespace in NAMESPACES)


def _is_functionalizer(target: object) -> bool:
    return isinstance(target, HigherOrderOperator) and target.name() == "auto_functionalized"


def engine_op(node: fx.Node) -> OpOverload | None:
    """The custom op that a node calls, itself or under `auto_functionalized`."""
    target: object = node.target
    if _is_functionalizer(target) and node.args:
        target = node.args[0]
    return target if isinstance(target, OpOverload) else None


def engine_op_name(node: fx.Node) -> str:
    """The name of a node's engine op, e.g. `_C::rms_norm`; empty where there is none."""
    op = engine_op(node)
    return "" if op is None else op.name().removesuffix(".default")


def arguments_of(node: fx.Node, op: OpOverload) -> dict[str, Any]:
    """An engine op's arguments by the names in the op's schema, defaults included."""
    schema = op._schema.arguments
    values = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
    if node.target is op:
        values |= {argument.name: value for argument, value in zip(schema, node.args, strict=False)}
    return values | node.kwargs


def read_at(node: fx.Node) -> list[fx.Node]:
    """The nodes where a search from a norm's neighbours reaches it."""
    return [node, *node.users]
