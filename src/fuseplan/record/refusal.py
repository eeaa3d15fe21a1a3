"""Why something was not fused. A refusal is a value: it is shown, counted and tested, never swallowed."""

from dataclasses import dataclass, field
from enum import StrEnum

from fuseplan.record.serialization import JSON_NAME


class Reason(StrEnum):
    """The kind of obstacle."""

    OP = "op"
    """Another op than the pattern expects."""
    USERS = "users"
    """A value inside the region is needed outside it, and the fused op doesn't yield it."""
    DTYPE = "dtype"
    """Mixed dtypes, one that the op doesn't take, or a cast between two ops of the region."""
    LAYOUT = "layout"
    """Strides that the kernel doesn't take."""
    SIZE = "size"
    """A size that the kernel doesn't take."""
    GROUP = "group"
    """A process group that isn't known here, or two that would have to be one."""
    DEAD = "dead"
    """The result of the ops isn't used."""
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
    """Switched on, but without effect here."""
    TRAINING = "training"
    """The graph has a backward."""
    UNPRICED = "unpriced"
    """Its cost is neither measured, modelled nor declared."""
    UNSURE = "unsure"
    """It may cost more than it saves, as far as prices tell."""
    COUPLED = "coupled"
    """A fusion that it requires, or is only applied together with, isn't applied."""
    LIMIT = "limit"
    """Beyond `max_fusions`."""
    VERIFICATION = "verification"
    """The fused op was run here and differs from the unfused ops."""
    FAULT = "fault"
    """A rule, a provider or fuseplan itself raised an unexpected error."""
    RANKS = "ranks"
    """The ranks of a process group didn't agree on one plan."""
    REPEATS = "repeats"
    """Data decides how often a step runs it, so it is counted once."""
    PACKAGE = "package"
    """An AOTInductor package calls fuseplan, which has to be installed where it is loaded; or it can't call it."""


class Nearness(StrEnum):
    """How much of a match there is where a rule doesn't match, the nearest first."""

    REFUSED = "refused"
    """All of its ops in the pattern's shape, and a predicate that failed."""
    OBSTRUCTED = "obstructed"
    """All of its ops, and something between them."""
    UNRECOGNIZED = "unrecognized"
    """Something that looks like one of its ops and isn't."""
    MISSING = "missing"
    """All but an op that other layers have at the same place."""
    DECLINED = "declined"
    """A match, which one provider declines and another takes."""
    ABSENT = "absent"
    """An op of the pattern, and nothing like the rest of it."""


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """One fusion, or one request, that was not carried out.

    Attributes:
        reason: its kind.
        detail: one clause for a person: expected against found.
        rule: the rule that refused, if it was one.
        op: the dialect op at the heart of it, if there is one.
        nodes: names of the FX nodes concerned, the one in the way first.
        source: module path or line of the user's model, of the node in the way, if known.
        fix: how to fix it, if known.
        nearness: how much of a match there is; None where no place in a graph is concerned.
        expected: the op that the pattern has instead of the node in the way, or the condition of the predicate.
        found: the actual op or value.
        provider: who declined, if it was a provider.
        site: module path of the ops that would have been fused, if known.
        line: `file.py:12` of the line of the user's model that the node in the way comes from, if known.
        code: the text of that line, if known.
    """

    reason: Reason
    detail: str
    rule: str | None = None
    op: str | None = None
    nodes: tuple[str, ...] = ()
    source: str | None = None
    fix: str | None = field(default=None, metadata={JSON_NAME: "mend"})
    nearness: Nearness | None = None
    expected: str | None = None
    found: str | None = None
    provider: str | None = None
    site: str | None = None
    line: str | None = None
    code: str | None = None
