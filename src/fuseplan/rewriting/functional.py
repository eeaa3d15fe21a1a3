"""An op that writes to its arguments, in the functional form that graphs have before Inductor writes in place."""

from typing import Any

import torch

from fuseplan.graph.ops import DialectOp


def functionalized(
    op: DialectOp, implementation: "torch._ops.OpOverload", args: tuple[Any, ...]
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """A functional call with the op's results.

    Inductor lets the implementation write to an argument itself where no reader sees the difference, and else to a
    copy. The call yields the implementation's results, then the new values of the written arguments, in the order of
    the op's results.

    Args:
        op: one that `writes`.
        implementation: its overload that writes.
        args: in the schema's order.

    Returns:
        (function, its arguments by position, those by name).
    """
    given = dict(zip(op.arguments, args, strict=True))
    written = [given.pop(name) for name in op.writes]
    # Each of them is a tensor of its own, and no view of another one.
    places = {f"_{name}_base_index": index for index, name in enumerate(op.writes)}
    function = torch.ops.higher_order.auto_functionalized_v2
    return function, (implementation,), {**given, **places, "_all_bases": written}
