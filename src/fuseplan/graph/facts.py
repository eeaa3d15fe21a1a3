"""Facts about FX nodes: ops, values, and where they come from."""

import functools
import itertools
import operator
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, fx
from torch.distributed import distributed_c10d
from torch.fx.experimental import symbolic_shapes
from torch.utils import _pytree as pytree

aten = torch.ops.aten
convert_element_type = torch.ops.prims.convert_element_type.default

LOW_PRECISION = (torch.bfloat16, torch.float16)
ADDS = (aten.add.Tensor, aten.add.Scalar)
MULS = (aten.mul.Tensor, aten.mul.Scalar)
RESHAPES = (aten.reshape.default, aten.view.default, aten._unsafe_view.default)
ORDER_KEEPING = (
    *RESHAPES, aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims,
)  # fmt: skip
"""Views with the same elements in the same order."""


class Call(fx.Node):
    """An FX node that calls a function, for type checkers: its arguments follow the function's schema."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def is_call(node: object, *targets: object) -> TypeGuard[Call]:
    """Whether `node` is an FX node that calls one of `targets`."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def targets_of(graph: fx.Graph) -> list[Any]:
    """The functions that nodes of a graph call, each once."""
    table = graph._find_nodes_lookup_table.table
    return [target for (op, target), nodes in table.items() if op == "call_function" and nodes]


def arguments(call: fx.Node) -> tuple[Any, ...]:
    """The arguments of a call, in the order of its schema, with defaults where the call leaves them out. Without a
    schema: as in the call, keyword arguments last.
    """
    if not isinstance(call.target, torch._ops.OpOverload):
        return *call.args, *sorted(call.kwargs.items())
    names, defaults = _schema_of(call.target)
    if len(call.args) == len(names):
        return call.args
    rest = zip(names[len(call.args) :], defaults[len(call.args) :], strict=True)
    return *call.args, *(call.kwargs.get(name, default) for name, default in rest)


@functools.lru_cache(maxsize=4096)
def _schema_of(target: torch._ops.OpOverload) -> tuple[tuple[str, ...], tuple[Any, ...]]:
    """Names of the arguments, and their defaults, None of those that have none."""
    schema = target._schema.arguments
    return tuple(argument.name for argument in schema), tuple(argument.default_value for argument in schema)


def other_operand(call: fx.Node, operand: object) -> object:
    """The other operand of a binary op."""
    left, right = call.args
    return right if left is operand else left


def tensor_of(node: object) -> Tensor | None:
    """The fake tensor of a node's value, or None where it holds no single tensor."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value if isinstance(value, Tensor) else None


def is_on_cpu(graph: fx.Graph) -> bool:
    """Whether a graph has tensors, and all of them are on the CPU."""
    values = itertools.chain.from_iterable(pytree.tree_leaves(node.meta.get("val")) for node in graph.nodes)
    devices = (value.device.type for value in values if isinstance(value, Tensor))
    return next(devices, None) == "cpu" and all(device == "cpu" for device in devices)


def fill_of(node: object) -> float | None:
    """The constant that fills a node's value, or None where it is no such constant."""
    if not is_call(node, aten.full.default) or not isinstance(node.args[1], (int, float)):
        return None
    return node.args[1]


def dtype_of(node: object) -> torch.dtype | None:
    """The dtype of a node's value."""
    value = tensor_of(node)
    return None if value is None else value.dtype


def dtype_text(dtype: torch.dtype | None) -> str:
    """A dtype without torch's prefix: `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def signature_text(value: torch.Tensor) -> str:
    """Dtype and sizes, unknown ones as `?`: `bfloat16[?x64]`."""
    sizes = "x".join(str(size) if isinstance(size, int) else "?" for size in value.shape)
    return f"{dtype_text(value.dtype)}[{sizes}]"


def dtype_name(node: object) -> str:
    """The name of a node's dtype."""
    return dtype_text(dtype_of(node))


def equal_size(left: object, right: object) -> bool:
    """Whether two sizes are equal for every value of their symbols; adds no guard."""
    if isinstance(left, int) and isinstance(right, int):
        return left == right
    # Comparing symbolic integers goes through sympy's relations, which takes long; most are the same.
    if isinstance(left, torch.SymInt) and isinstance(right, torch.SymInt) and _is_same(left.node, right.node):
        return True
    return symbolic_shapes.statically_known_true(left == right)


def _is_same(left: Any, right: Any) -> bool:
    return left is right or left.expr == right.expr


def exact(size: Any) -> Any:
    """A size to be compared and hashed: a symbolic one by its expression, which adds no guard."""
    return size.node.expr if isinstance(size, torch.SymInt) else size


def equal_sizes(left: Sequence[object], right: Sequence[object]) -> bool:
    """Whether two shapes are equal for every value of their symbols; adds no guard."""
    return len(left) == len(right) and all(equal_size(a, b) for a, b in zip(left, right, strict=True))


def equal_shape(left: Tensor | None, right: Tensor | None) -> bool:
    """Whether two tensors have the same shape for every value of its symbols; adds no guard."""
    return left is not None and right is not None and equal_sizes(left.shape, right.shape)


def is_dense(value: Tensor) -> bool:
    """Whether a tensor is contiguous for every value of its symbols; adds no guard."""
    expected: Any = 1
    for size, stride in zip(reversed(value.shape), reversed(value.stride()), strict=True):
        if not equal_size(stride, expected) and not equal_size(size, 1):
            return False
        expected = expected * size
    return True


def is_mutation(node: fx.Node) -> bool:
    """Whether a node writes to one of its arguments.

    The same test as Inductor's pattern matcher makes for ops with a schema; functionalised higher-order ops don't
    mutate.
    """
    return _writes(node.target) or (node.op == "call_method" and str(node.target).endswith("_"))


def _writes(target: object) -> bool:
    return isinstance(target, torch._ops.OpOverload) and bool(target._schema.is_mutable)


FUNCTIONAL = frozenset({torch.Tag.core, torch.Tag.pointwise, torch.Tag.reduction})
"""Tags of torch's ops whose values follow from the values of their arguments."""


def is_torchs(target: object) -> TypeGuard[torch._ops.OpOverload]:
    """Whether a function is an op of torch itself."""
    return isinstance(target, torch._ops.OpOverload) and target.namespace in ("aten", "prims")


def is_pure(target: object) -> bool:
    """Whether a function surely does nothing but compute its result, as views and arithmetic of torch do."""
    return is_torchs(target) and _is_pure_op(target)


@functools.lru_cache(maxsize=4096)
def _is_pure_op(target: torch._ops.OpOverload) -> bool:
    if target._schema.is_mutable or torch.Tag.nondeterministic_seeded in target.tags:
        return False
    return target.is_view or not FUNCTIONAL.isdisjoint(target.tags)


def is_attention(node: fx.Node) -> bool:
    """Whether a node calls one of torch's attention ops: on queries [batch, heads, tokens, head size] first."""
    return is_attention_op(node.target)


def is_attention_op(target: object) -> bool:
    """Whether a function is one of torch's attention ops."""
    return isinstance(target, torch._ops.OpOverload) and str(target).startswith("aten._scaled_dot_product_")


def drops_nothing(node: fx.Node) -> bool:
    """Whether a node calls an op with dropout, which torch therefore tags as random, with a dropout probability
    of 0.
    """
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    for index, argument in enumerate(node.target._schema.arguments):
        if argument.name == "dropout_p":
            default = argument.default_value
            given = node.args[index] if index < len(node.args) else node.kwargs.get("dropout_p", default)
            return given in (0, 0.0)
    return False


def is_training(graph: fx.Graph) -> bool:
    """Whether a graph is the forward or the backward half of a joint graph.

    AOTAutograd names the inputs of those `primals_*` and `tangents_*`, which its partitioner relies on too, and those
    of an inference graph `arg*`. (From torch 2.12 on a custom pass gets that as an argument; 2.11 has no other sign.)
    """
    inputs = graph.find_nodes(op="placeholder")
    return any(str(node.target).startswith(("primals", "tangents")) for node in inputs)


def mutations(graph: fx.Graph) -> dict[fx.Node, None]:
    """The nodes that write to one of their arguments, in graph order."""
    if not any(map(_writes, targets_of(graph))) and not graph.find_nodes(op="call_method"):
        return {}  # as nearly all graphs
    return dict.fromkeys(filter(is_mutation, graph.nodes))


def mutation_regions(graph: fx.Graph) -> dict[fx.Node, int]:
    """For every node the number of mutations at or before it. A region of nodes may be moved only within one number."""
    regions, count = dict.fromkeys(graph.nodes, 0), 0
    if writers := mutations(graph):
        for node in regions:
            count += node in writers
            regions[node] = count
    return regions


def depths(graph: fx.Graph) -> dict[fx.Node, int]:
    """The length of the longest path to each node from an input.

    Without another sign, the deeper of two addends is a block's output and the shallower one the residual that it was
    computed from, however the nodes are laid out.
    """
    result: dict[fx.Node, int] = {}
    depth_of = result.__getitem__
    for node in graph.nodes:
        result[node] = 1 + max(map(depth_of, node._input_nodes), default=-1)
    return result


def item(node: fx.Node, index: int) -> fx.Node | None:
    """The `getitem` that takes result `index` of a node with several results, or None where that result is dead."""
    for user in node.users:
        if is_call(user, operator.getitem) and user.args[1] == index:
            return user
    return None


def is_item(node: object) -> TypeGuard[Call]:
    """Whether a node is one of several results of another one."""
    return is_call(node, operator.getitem) and isinstance(node.args[0], fx.Node)


def process_group(name: str) -> dist.ProcessGroup | None:
    """The process group of that `ProcessGroup.group_name`; None where this process knows none of that name."""
    try:
        group: dist.ProcessGroup = distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined,arg-type]
    except (RuntimeError, ValueError, LookupError):
        return None
    return group


def group_size(name: str) -> int | None:
    """The number of ranks of a process group, by its name; None where this process knows none of that name."""
    group = process_group(name)
    return None if group is None else group.size()


def groups_in(graph: fx.Graph) -> tuple[str, ...]:
    """The process groups whose collectives are in a graph, by `ProcessGroup.group_name`."""
    names: dict[str, None] = {}
    for node in graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "_c10d_functional":
            arguments = [argument.name for argument in node.target._schema.arguments]
            if "group_name" in arguments:
                names[str(node.args[arguments.index("group_name")])] = None
    return tuple(names)


def is_functionalized(target: object) -> bool:
    """Whether it is the higher-order op that calls a mutating op on copies of the arguments that this writes to."""
    return getattr(target, "__name__", "").startswith("auto_functionalized")


def written_in_place(node: fx.Node) -> str | None:
    """The in-place call of the user's model that a node comes from: `add_`, `imul`; or None.

    Functionalization turned it into an op that writes to a new tensor, and a custom op into a higher-order one.
    """
    if is_functionalized(node.target):
        return str(node.args[0])
    found = (_in_place(str(name)) for name, _ in node.meta.get("source_fn_stack") or ())
    return next(filter(None, found), None)


@functools.lru_cache(maxsize=4096)
def _in_place(name: str) -> str | None:
    found = _IN_PLACE.fullmatch(name)
    return found[1] if found else None


_IN_PLACE = re.compile(r"((?:[a-z]\w*[a-z0-9])_|i(?:add|sub|mul|truediv|floordiv|pow|matmul|and|or|xor))(?:_\d+)?")
"""A method that writes in place, or an augmented assignment, as Dynamo names its nodes: `add_`, `add__1`, `imul_2`."""


def module_path(node: fx.Node) -> str | None:
    """The module of the user's model that a node was traced from, e.g. `layers.3.mlp`, or None."""
    stack = node.meta.get("nn_module_stack")
    return _clean_path(str(next(reversed(stack.values()))[0])) if stack else None


@functools.lru_cache(maxsize=16384)
def _clean_path(path: str) -> str | None:
    """A module's path without the parts that Dynamo and wrappers add.

    Dynamo starts with where it found the root: `L['self']` for a module's own forward, `L['fn']` for a function that
    fuseplan or a wrapper calls, `L['fn'].__self__` for a bound method, `G['model']` for a global.
    """
    root = _ROOT.match(path)
    if root:
        path = path[root.end() :] if root[1] in ("self", "fn") else f"{root[1]}.{path[root.end() :]}"
    parts = [part for part in _path_parts(path) if part not in ("_orig_mod", "_modules")]
    return ".".join(parts) or None


_ROOT = re.compile(r"[LG]\['(\w+)'\](?:\.__self__)?")


def _path_parts(path: str) -> Iterator[str]:
    for piece in path.replace("[", ".").replace("]", "").split("."):
        cleaned = piece.strip("'\"() ")
        if cleaned:
            yield cleaned


def place_of(node: fx.Node) -> str | None:
    """Where in the user's model a node comes from: its module, else its source line, or None."""
    return module_path(node) or source_line(node)


def source_line(node: fx.Node) -> str | None:
    """`file.py:12` of the line of the user's model that a node was traced from, or None."""
    frame = _frame(node)
    return f"{frame[0].split('/')[-1]}:{frame[1]}" if frame else None


def source_code(node: fx.Node) -> str | None:
    """The text of that line, or None."""
    frame = _frame(node)
    return frame[2] or None if frame else None


def _frame(node: fx.Node) -> tuple[str, str, str] | None:
    """(file, line, text) of the innermost frame of a node's stack that isn't torch's own."""
    return _innermost(node.meta.get("stack_trace") or "")


@functools.lru_cache(maxsize=4096)
def _innermost(stack_trace: str) -> tuple[str, str, str] | None:
    """Many nodes share the text of one stack, so each text is read once."""
    lines = stack_trace.splitlines()
    frames = []
    for index, line in enumerate(lines):
        found = _FRAME.match(line)
        if found:
            text = lines[index + 1].strip() if index + 1 < len(lines) else ""
            frames.append((found[1], found[2], "" if _FRAME.match(text) else text))
    own = [frame for frame in frames if not frame[0].startswith(_TORCH)] or frames
    return own[-1] if own else None


_FRAME = re.compile(r'\s*File "(.*)", line (\d+)')
_TORCH = os.path.dirname(torch.__file__) + os.sep  # noqa: PTH120 - a prefix of the texts in stack traces


def hint(size: Any) -> int:
    """A size, or the one that a symbolic size had when the graph was traced."""
    return int(size.node.hint or 1) if isinstance(size, torch.SymInt) else int(size)
