"""Why something was not done. A refusal is a value: it is shown, counted and tested, never swallowed."""

from dataclasses import dataclass
from enum import StrEnum


class Reason(StrEnum):
    """What kind of thing stood in the way."""

    OP = "op"
    """Another op than the pattern expects."""
    USERS = "users"
    """A value inside the region is needed outside it, and the fused op doesn't yield it."""
    DTYPE = "dtype"
    ATTRIBUTE = "attribute"
    """An attribute that the replacement would drop."""
    ROUNDING = "rounding"
    """The kernel rounds at other points than the graph."""
    MUTATION = "mutation"
    """An in-place op stands between two nodes of the region."""
    CYCLE = "cycle"
    """Contracting the region would make the graph cyclic."""
    PROVIDER = "provider"
    """No provider on this device accepts these arguments."""
    DISABLED = "disabled"
    """Switched off by a flag, the policy or the environment."""
    NO_EFFECT = "no effect"
    """Switched on, but nothing it could do here."""
    TRAINING = "training"
    """The graph has a backward."""
    LIMIT = "limit"
    """Beyond `max_fusions`."""


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """One thing that was not done.

    Attributes:
        reason: its kind.
        detail: one clause for a person: expected against found.
        rule: the rule that refused, if it was one.
        op: the dialect op at the heart of what was refused, if there is one.
        nodes: names of the FX nodes concerned, the one in the way first.
        source: module path or line of the user's model, if known.
        mend: what would mend it, if known.
    """

    reason: Reason
    detail: str
    rule: str | None = None
    op: str | None = None
    nodes: tuple[str, ...] = ()
    source: str | None = None
    mend: str | None = None
