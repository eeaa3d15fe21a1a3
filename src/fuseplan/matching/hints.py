"""Fixes for an obstacle: only those that keep the result, but for the order of additions."""

from torch import fx

from fuseplan.graph.canonical.noops import is_noop
from fuseplan.graph.facts import aten, is_call
from fuseplan.rules.parts import Epilogue, Prologue, part_at


def hint(node: fx.Node, goal: fx.Node, consumer: fx.Node) -> str | None:
    """How to move an obstacle out of the way, or None where no equivalent rewrite is known.

    Args:
        node: the obstacle.
        goal: the op before it: a prologue, or the op that an epilogue should read.
        consumer: the op after it.
    """
    if is_call(node, aten.clone.default):
        return f"drop the copy{', or leave eliminate_noops on, which sees through it' if is_noop(node) else ''}"
    before, after = part_at(goal), part_at(consumer)
    part = before if isinstance(before, Prologue) else after if isinstance(after, Epilogue) else None
    return part.hint(node, goal, consumer) if part is not None and part.hint is not None else None
