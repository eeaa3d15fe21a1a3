"""What a user can do about an obstacle: only what leaves the result as it is, but for the order of additions."""

from torch import fx

from fuseplan.graph.canonical.noops import is_noop
from fuseplan.graph.facts import aten, is_call
from fuseplan.rules.parts import Epilogue, Prologue, part_at


def hint(node: fx.Node, goal: fx.Node, consumer: fx.Node) -> str | None:
    """What puts an obstacle elsewhere, or None where nothing that computes the same is known.

    Args:
        node: the obstacle.
        goal: the op before it, a prologue or what an epilogue should read.
        consumer: the op after it.
    """
    if is_call(node, aten.clone.default):
        return f"drop the copy{', or leave eliminate_noops on, which sees through it' if is_noop(node) else ''}"
    before, after = part_at(goal), part_at(consumer)
    part = before if isinstance(before, Prologue) else after if isinstance(after, Epilogue) else None
    return part.hint(node, goal, consumer) if part is not None and part.hint is not None else None
