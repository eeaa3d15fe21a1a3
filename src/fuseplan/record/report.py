"""What happened: per graph and range under one policy (`GraphReport`), over all of them (`Report`), and several
policies side by side (`Comparison`, the object that `fuseplan explain --json` prints).
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from fuseplan.record.refusal import Reason, Refusal


@dataclass(frozen=True, kw_only=True)
class Fusion:
    """One match of one rule, whether it was applied or not.

    Attributes:
        rule: the rule's name, e.g. `allreduce_rms`.
        op: the fused op, e.g. `all_reduce_fused_add_rms_norm`.
        provider: whose kernel runs it.
        anchor: the node of the graph as Inductor made it whose value the match is named after.
        consumed: the canonical nodes that the fusion takes, by name.
        contested_op: the dialect op that other fusions could want too: the core of the match.
        site: a name for the place that every candidate there shares: the core's node.
        source: module path in the user's model, if known.
    """

    rule: str
    op: str
    provider: str
    anchor: str
    consumed: tuple[str, ...]
    contested_op: str
    site: str
    source: str | None = None


@dataclass(frozen=True, kw_only=True)
class Loss:
    """A fusion that matched and was not applied, and the applied ones that took its nodes."""

    fusion: Fusion
    blocked_by: tuple[Fusion, ...]


@dataclass(frozen=True, kw_only=True)
class ConflictClass:
    """All places at which one rule took the nodes that another wanted, counted.

    Attributes:
        rules: the rules involved, sorted.
        op: the dialect op they contend for.
        count: in how many places, over all graphs and ranges.
        winner: the rule that took it.
        loser: the rule that got nothing there.
        sources: the places in the user's model, the first few of them.
        lost_us: what the loser would have saved there; None where nothing is priced.
        flips_at_us: the cost at which the choice would flip; None where nothing is priced.
    """

    rules: tuple[str, ...]
    op: str
    count: int
    winner: str
    loser: str
    sources: tuple[str, ...] = ()
    lost_us: float | None = None
    flips_at_us: float | None = None


@dataclass(frozen=True, kw_only=True)
class NearMiss:
    """Matches that were refused for one reason, counted.

    Attributes:
        rule: the rule that refused, None for what looked like a dialect op and wasn't one.
        reason: the kind of thing that stood in the way.
        op: the dialect op at the heart of it.
        detail: the first of them, for a person.
        source: the first place in the user's model.
        count: in how many places, over all graphs and ranges.
        mend: what would mend it, if known.
    """

    rule: str | None
    reason: Reason
    op: str | None
    detail: str
    source: str | None
    count: int
    mend: str | None


@dataclass(frozen=True, kw_only=True)
class GraphReport:
    """What happened to one graph in one compile range.

    Attributes:
        graph: a name, unique within a report.
        range: first and last number of tokens that the graph serves, None where it is not limited.
        applied: the fusions of the plan, in graph order.
        lost: fusions that matched and were not applied.
        matched: candidates by rule, whether chosen or not.
        recognized: dialect ops found in the graph as `op[last dimension]`, counted.
        refusals: everything else that was not done, and why.
        stages_ns: time of each stage, in nanoseconds.
        rewritten: whether the graph was changed; False under `off` and in `explain`.
        from_cache: whether the report was stored by an earlier compilation that a warm compile cache now stands for.
    """

    graph: str
    range: tuple[int, int] | None = None
    applied: tuple[Fusion, ...] = ()
    lost: tuple[Loss, ...] = ()
    matched: Mapping[str, int] = field(default_factory=dict)
    recognized: Mapping[str, int] = field(default_factory=dict)
    refusals: tuple[Refusal, ...] = ()
    stages_ns: Mapping[str, int] = field(default_factory=dict)
    rewritten: bool = False
    from_cache: bool = False

    def count(self, rules: Iterable[str]) -> dict[str, int]:
        """Applied fusions by rule, zeros included."""
        counts = Counter(fusion.rule for fusion in self.applied)
        return {rule: counts[rule] for rule in rules}


@dataclass(frozen=True, kw_only=True)
class Report:
    """What one policy did to every graph, over all compile ranges.

    Attributes:
        policy: `ordered` or `off`.
        order: the order of registration of an `ordered` policy.
        rules: every rule that the configuration switched on, in order of name; `fused` has a key for each.
        graphs: one entry for each graph and range.
        warnings: what was on but can have no effect, and other things a user should see once.
    """

    policy: str
    order: tuple[str, ...]
    rules: tuple[str, ...]
    graphs: tuple[GraphReport, ...]
    warnings: tuple[Refusal, ...] = ()

    @property
    def fused(self) -> dict[str, int]:
        """Replacements by rule, over all graphs and ranges; zeros included."""
        return _total(graph.count(self.rules) for graph in self.graphs)

    @property
    def matched(self) -> dict[str, int]:
        """Matches by rule, over all graphs and ranges, whether applied or not; zeros included."""
        totals = _total(graph.matched for graph in self.graphs)
        return {rule: totals.get(rule, 0) for rule in self.rules}

    @property
    def recognized(self) -> dict[str, int]:
        """Dialect ops found, as `op[last dimension]`, over all graphs and ranges."""
        return _total(graph.recognized for graph in self.graphs)

    @property
    def per_range(self) -> dict[tuple[int, int] | None, dict[str, int]]:
        """`fused`, split by compile range."""
        ranges = dict.fromkeys(graph.range for graph in self.graphs)
        return {key: _total(graph.count(self.rules) for graph in self.graphs if graph.range == key) for key in ranges}

    @property
    def conflicts(self) -> tuple[ConflictClass, ...]:
        """Where one rule took the nodes of another, one row a class."""
        places: dict[tuple[str, str, str], list[str | None]] = {}
        for graph in self.graphs:
            for loss in graph.lost:
                winners = {winner.rule for winner in loss.blocked_by}
                for winner in sorted(winners):
                    key = (winner, loss.fusion.rule, loss.fusion.contested_op)
                    places.setdefault(key, []).append(loss.fusion.source)
        return tuple(
            ConflictClass(
                rules=tuple(sorted({winner, loser})),
                op=op,
                count=len(sources),
                winner=winner,
                loser=loser,
                sources=tuple(dict.fromkeys(source for source in sources if source is not None)),
            )
            for (winner, loser, op), sources in sorted(places.items())
        )

    @property
    def near_misses(self) -> tuple[NearMiss, ...]:
        """Matches that were refused, one row a cause."""
        causes: dict[tuple[str, str, str], list[Refusal]] = {}
        for graph in self.graphs:
            for refusal in graph.refusals:
                if refusal.reason not in _NOT_A_MISS:
                    key = (refusal.rule or "", refusal.reason.value, refusal.op or "")
                    causes.setdefault(key, []).append(refusal)
        return tuple(
            NearMiss(
                rule=refusals[0].rule,
                reason=refusals[0].reason,
                op=refusals[0].op,
                detail=refusals[0].detail,
                source=refusals[0].source,
                count=len(refusals),
                mend=refusals[0].mend,
            )
            for _, refusals in sorted(causes.items())
        )


_NOT_A_MISS = frozenset({Reason.NO_EFFECT, Reason.TRAINING, Reason.DISABLED, Reason.LIMIT})
"""Refusals that concern a whole graph or rule, not a place at which a rule nearly matched."""


def _total(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return dict(total)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Several policies on one workload.

    Attributes:
        workload: as the user named it.
        tp: ranks of tensor parallelism.
        device: the device profile whose providers were taken as present.
        ranges: the compile ranges.
        reports: one for each policy.
        breaks: graph breaks met while tracing, one line each.
        trace_ns: time to build and trace the model.
    """

    workload: str
    tp: int
    device: str
    ranges: tuple[tuple[int, int], ...]
    reports: tuple[Report, ...]
    breaks: tuple[str, ...] = ()
    trace_ns: int = 0
