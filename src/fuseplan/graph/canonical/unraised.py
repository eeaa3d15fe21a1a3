"""Why something that looks like a dialect op isn't one."""

from collections.abc import Sequence

from torch import fx

from fuseplan.graph.canonical.view import CanonicalGraph
from fuseplan.graph.facts import MULS, convert_element_type, is_call
from fuseplan.graph.ops import DialectOp
from fuseplan.record import Reason


class Unraised(Exception):
    """Ends the reading of a candidate.

    Attributes:
        reason: its kind.
        detail: for a person.
        node: the node in the way.
        fix: how to fix it, if known.
        expected: the op that should be there instead, if another op is in the way.
    """

    def __init__(
        self, reason: Reason, detail: str, node: fx.Node, fix: str | None = None, *, expected: object = None
    ) -> None:
        super().__init__(detail)
        self.reason, self.detail, self.node, self.fix = reason, detail, node, fix
        self.expected = str(expected) if expected is not None else None

    def tell(
        self, canonical: CanonicalGraph, op: DialectOp, title: str, *, at: Sequence[fx.Node], place: fx.Node
    ) -> None:
        """Records it in the graph.

        Args:
            canonical: the graph.
            op: the dialect op that it looks like.
            title: its name, for a person.
            at: the nodes by which a search from the op's neighbours would find it.
            place: where in the user's model it is looked for, if the node in the way has no place.
        """
        found = str(self.node.target) if self.expected is not None and self.node.op == "call_function" else None
        canonical.refuse(
            op, at, self.reason, f"{title} not recognised: {self.detail}", node=self.node, place=place,
            expected=self.expected, found=found, fix=self.fix,
        )  # fmt: skip


def only_reader(node: fx.Node, what: str) -> fx.Node:
    """The one node that reads a value inside a region.

    Args:
        node: the value.
        what: it is, for a person.

    Raises:
        Unraised: another one reads it, too, or none does.
    """
    if len(node.users) == 1:
        return next(iter(node.users))
    if not node.users:
        raise Unraised(Reason.DEAD, f"{what} isn't read", node)
    # It isn't known which reader belongs to the region; a multiplication or a cast is the likelier one.
    own = next((user for user in node.users if is_call(user, *MULS, convert_element_type)), None)
    raise read_elsewhere(next(user for user in node.users if user is not own), node, what)


def read_elsewhere(reader: fx.Node, node: fx.Node, what: str) -> Unraised:
    """The refusal of a value inside a region that is read outside it, too. The output has no place in the model; the
    value has.
    """
    if reader.op == "output":
        return Unraised(Reason.USERS, f"{what} is returned from the graph, too", node)
    return Unraised(Reason.USERS, f"{what} is also read by {reader.target} ({reader.name})", reader)
