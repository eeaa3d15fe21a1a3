"""A policy's saving, as a share of the time of the contested ops, and of a whole step."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from rich.text import Text

from fuseplan.record import Comparison, Fusion, GraphReport, Loss, Reason, Report
from fuseplan.record.text import count_of
from fuseplan.report.absence import layer_of
from fuseplan.report.lock import Span
from fuseplan.report.text import enumerate_names, policy_name, tokens_of

WORK = (
    ("all_reduce", "all-reduce"), ("norm", "norm"), ("pad", "pad"), ("silu", "activation"), ("quant", "quantisation"),
    ("rope", "rotary embedding"), ("cache", "cache write"), ("attention", "attention"), ("linear", "linear layer"),
)  # fmt: skip
"""The work of fused ops, by parts of their names."""


@dataclass(frozen=True)
class Saved:
    """The saving of a step in one range under a policy.

    Attributes:
        saved_ns: the saving of a step.
        unfused_ns: the time of the contested ops, unfused.
        step_ns: the whole step, estimated; None where that isn't known.
        low_ns: the lower end of the interval of the saving; None where that isn't known.
        high_ns: its upper end.
    """

    saved_ns: int
    unfused_ns: int
    step_ns: int | None
    low_ns: int | None = None
    high_ns: int | None = None

    @classmethod
    def of(cls, report: Report, span: Span) -> "Saved":
        """All graphs of a range together."""
        return cls.over(graphs_of(report, span))

    @classmethod
    def over(cls, graphs: Sequence[GraphReport]) -> "Saved":
        """Some graphs together."""
        steps = [graph.step_ns for graph in graphs if graph.step_ns is not None]
        return cls(
            sum(graph.saved_ns for graph in graphs),
            sum(graph.unfused_ns for graph in graphs),
            sum(steps) if len(steps) == len(graphs) else None,
            *(sum_of_ends([getattr(graph, name) for graph in graphs]) for name in ("saved_low_ns", "saved_high_ns")),
        )

    @property
    def interval(self) -> str:
        """`307 to 390`; empty where that isn't known."""
        return between(self.low_ns, self.high_ns)

    @property
    def share(self) -> str:
        """As a share of the contested ops: `41 %`."""
        return percent(self.saved_ns, self.unfused_ns)

    @property
    def step_share(self) -> str:
        """As a share of the step: `2.0 %`; empty where that isn't known."""
        return percent(self.saved_ns, self.step_ns) if self.step_ns else ""


def sizes_of(graphs: Iterable[GraphReport]) -> list[tuple[int, int, int]]:
    """(tokens, unfused_ns, saved_ns) of some graphs together, at each size."""
    sizes: dict[int, tuple[int, int]] = {}
    for size in (size for graph in graphs for size in graph.sizes):
        unfused, saved = sizes.get(size.tokens, (0, 0))
        sizes[size.tokens] = unfused + size.unfused_ns, saved + size.saved_ns
    return [(tokens, *total) for tokens, total in sorted(sizes.items())]


def counts_of_step(report: Report, rule: str) -> list[tuple[int, int]]:
    """(how often a rule fired in a step, of how many matches), range by range."""
    return [fired(graphs, rule) for graphs in by_range(report)]


def fired(graphs: Iterable[GraphReport], rule: str) -> tuple[int, int]:
    """(how often a rule fired in some graphs, of how many matches)."""
    counts = [(each.count([rule])[rule], each.matched.get(rule, 0)) for each in graphs]
    return sum(count for count, _ in counts), sum(count for _, count in counts)


def by_range(report: Report) -> list[list[GraphReport]]:
    """The graphs of each compile range."""
    return [graphs_of(report, span) for span in dict.fromkeys(graph.range for graph in report.graphs)]


def percent(part: float, whole: float) -> str:
    """`41 %`, `2.0 %`"""
    share = 100 * part / whole if whole else 0.0
    return f"{share:.1f} %" if 0.05 <= abs(share) < 9.95 else f"{share:.0f} %"


def us(time_ns: float) -> str:
    """`8,304`, `12.3`"""
    return f"{time_ns / 1000:,.0f}" if abs(time_ns) >= 99_950 else f"{round(time_ns / 1000, 1) + 0.0:.1f}"


def between(low_ns: float | None, high_ns: float | None) -> str:
    """`307 to 390`, in us; empty where an end isn't known, or both are the same."""
    if low_ns is None or high_ns is None or us(low_ns) == us(high_ns):
        return ""
    return f"{us(low_ns)} to {us(high_ns)}"


def sum_of_ends(ends: Sequence[int | None]) -> int | None:
    """The ends of several graphs: errors of the model are the same in all of them."""
    known = [end for end in ends if end is not None]
    return sum(known) if len(known) == len(ends) else None


def spans_of(comparison: Comparison) -> list[Span]:
    """The ranges that differ: one where no size of the graphs varies."""
    spans = list(dict.fromkeys(graph.range for graph in comparison.reports[0].graphs))
    is_fixed = all(len(graph.sizes) == 1 for graph in comparison.reports[0].graphs if graph.sizes)
    varies = any(graph.range is not None and graph.range[0] < graph.range[1] for graph in comparison.reports[0].graphs)
    return spans[:1] if is_fixed and varies else spans


def is_fixed(comparison: Comparison) -> bool:
    """Whether the graphs serve one size alone, so that the number of tokens isn't worth mentioning."""
    return all(len(graph.sizes) <= 1 for graph in comparison.reports[0].graphs)


def is_starved(report: Report, rule: str) -> bool:
    """Whether a rule of an order matches and fires nowhere, and no fusion that fired does its work."""
    fires = bool(report.fused.get(rule, 0)) or not report.matched.get(rule, 0)
    return rule in report.order and not fires and not is_covered(report, rule)


def is_covered(report: Report, rule: str) -> bool:
    """Whether a rule only loses to fusions of a superset of its nodes: they do its work."""
    losses = list(losses_of(report, rule))
    return bool(losses) and all(
        any(set(loss.fusion.consumed) < set(winner.consumed) for winner in loss.blocked_by) for loss in losses
    )


def losses_of(report: Report, rule: str) -> Iterator[Loss]:
    """The matches of a rule that weren't applied by any provider."""
    for graph in report.graphs:
        taken = {(fusion.rule, fusion.anchor) for fusion in graph.applied}
        for loss in graph.lost:
            # Where a match is applied by another provider, the rule has lost nothing.
            if loss.fusion.rule == rule and (rule, loss.fusion.anchor) not in taken:
                yield loss


def verdict(comparison: Comparison, *, orders: bool = True) -> Text:
    """One sentence: the first policy's saving, its share, and where.

    Args:
        comparison: of at least one policy.
        orders: with another sentence on which order would have starved which rule.
    """
    report = comparison.reports[0]
    span = next(iter(spans_of(comparison)), None)
    who = "The plan" if report.policy == "planned" else policy_name(report)
    if not any(graph.applied for graph in report.graphs):
        if left := [each.detail for g in report.graphs for each in g.refusals if each.reason in _LEFT_ALONE]:
            return Text(f"Nothing is fused: {left[0]}.")
        if not any(report.matched.values()):
            return Text("Nothing to fuse: no rule matches anywhere.")
        return Text(f"{who} fuses nothing: {why_nothing(report, span)}.")
    saved = Saved.of(report, span)
    is_gain = saved.saved_ns >= 0
    text = Text(f"{who} {'saves' if is_gain else 'costs'} ")
    text.append(f"{us(abs(saved.saved_ns))} us a step", style="bold green" if is_gain else "bold red")
    if is_gain and saved.interval:
        text.append(f" ({saved.interval})")
    text.append(f"{at_size(comparison, span)}: {share_text(report, saved)}")
    if saved.step_ns:
        share = 100 * abs(saved.saved_ns) / saved.step_ns
        text.append(f", about {share:.{0 if share >= 0.95 else 1}f} % of the whole step")
    text.append(f"; fused in {where_of(report, span)}.")
    return text.append(_starving(comparison)) if orders else text


def at_size(comparison: Comparison, span: Span) -> str:
    """` at 1-64 tokens`; nothing where sizes are fixed."""
    return f" at {tokens_of(span)} tokens" if span is not None and not is_fixed(comparison) else ""


def share_text(report: Report, saved: Saved) -> str:
    """`70 % of the 476 us of all-reduce and norm`"""
    share = percent(abs(saved.saved_ns), saved.unfused_ns)
    return f"{share} of the {us(saved.unfused_ns)} us of {_work(report)}"


def why_nothing(report: Report, span: Span) -> str:
    """Why a report with matches fuses nothing: `2 places match, but fusing them costs more than it saves`"""
    graphs = graphs_of(report, span)
    unsure = {(each.op, each.nodes) for g in graphs for each in g.refusals if each.reason is Reason.UNSURE}
    losses = [loss for graph in graphs for loss in graph.lost]
    lost = {loss.fusion.site for loss in losses}
    refused = {
        (each.op, each.nodes): each.detail
        for g in graphs
        for each in g.refusals
        if each.nodes and each.reason in _LEFT_OUT
    }
    count = len(lost) + len(unsure) or len(refused)
    found, them, are = (f"{count} places match", "them", "are") if count != 1 else ("1 place matches", "it", "is")
    if refused and not (lost or unsure):
        return f"{found}; {next(iter(refused.values()))}"
    if losses and not unsure and all(loss.forbidden for loss in losses):
        return f"{found}, but {are} forbidden"
    if report.policy != "planned":
        # Where fusion is off, nothing is tried, and so no place is counted.
        return f"{found}, but the policy leaves {them} unfused" if count else "the policy leaves every match unfused"
    dearer = f"fusing {them} costs more than it saves"
    if unsure and lost:
        return f"{found}, but {dearer}, or may do so"
    return f"{found}, but {f'fusing {them} may cost more than it saves' if unsure else dearer}"


_LEFT_ALONE = (Reason.DISABLED, Reason.TRAINING)
"""Refusals of whole graphs, in which no rule is tried."""
_LEFT_OUT = (Reason.VERIFICATION, Reason.PACKAGE, Reason.LIMIT, Reason.COUPLED, Reason.UNPRICED)


def graphs_of(report: Report, span: Span) -> list[GraphReport]:
    """The graphs of a range."""
    return [graph for graph in report.graphs if graph.range == span]


def _work(report: Report) -> str:
    """`norm and all-reduce`: the contested ops."""
    fusions = [*_applied(report.graphs), *(loss.fusion for graph in report.graphs for loss in graph.lost)]
    ops = {each.op for each in fusions}
    known = [word for part, word in WORK if any(part in op for op in ops)]
    unknown = sorted({each.rule for each in fusions if not any(part in each.op for part, _ in WORK)})
    return enumerate_names([*known, *unknown])


def _applied(graphs: Iterable[GraphReport]) -> list[Fusion]:
    return [fusion for graph in graphs for fusion in graph.applied]


def where_of(report: Report, span: Span) -> str:
    """`36 of 36 layers`, or places where the model has no layers."""
    graphs = graphs_of(report, span)
    fused = _applied(graphs)
    every = [*fused, *(loss.fusion for graph in graphs for loss in graph.lost)]
    layers = {layer for each in every if (layer := layer_of(each.source))}
    if layers:
        return f"{len({layer_of(each.source) for each in fused} & layers)} of {count_of(len(layers), 'layer')}"
    places = {(graph.graph, each.site) for graph in graphs for each in (*graph.applied, *_lost(graph))}
    taken = {(graph.graph, each.site) for graph in graphs for each in graph.applied}
    return f"{len(taken)} of {count_of(len(places), 'place')}"


def _lost(graph: GraphReport) -> list[Fusion]:
    return [loss.fusion for loss in graph.lost]


def _starving(comparison: Comparison) -> str:
    for report in comparison.reports[1:]:
        starved = [rule for rule in report.rules if is_starved(report, rule)]
        if starved and comparison.reports[0].policy == "planned":
            return f" The order {', '.join(report.order)} would have starved {enumerate_names(starved)}."
    return ""
