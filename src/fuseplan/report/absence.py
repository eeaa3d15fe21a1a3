"""Why a fusion that was expected at a place isn't there, as a report tells."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from fuseplan.record import GraphBreak, Loss, NearMiss, Nearness, Reason, Refusal, Report
from fuseplan.record.near_miss import cause_of, near_misses_of
from fuseplan.record.serialization import JSON_NAME
from fuseplan.record.text import count_of
from fuseplan.report.lock import Applied, Span
from fuseplan.report.places import module_of, places
from fuseplan.report.text import enumerate_names, policy_name

MOST_BREAKS = 3
"""Graph breaks that one cause names."""

GRAPH_ENDS = ("an input of the graph", "the graph's output")
"""The `found` texts where a graph starts or ends in place of an op."""


class AbsenceKind(StrEnum):
    """The kind of reason for which a fusion is missing."""

    CONFLICT = "conflict"
    """It matches, and another fusion takes its nodes."""
    NOT_WORTH_IT = "not worth it"
    """It matches, and costs more than it saves."""
    FORBIDDEN = "forbidden"
    """It matches, and must not be applied."""
    NEAR_MISS = "near miss"
    """It doesn't match, and the report says why."""
    LEFT_ALONE = "left alone"
    """The graph as a whole was not looked at."""
    OFF = "off"
    """The policy or the configuration leaves the rule out, or the provider isn't there."""
    CHANGED = "changed"
    """The rule matches there as another op."""
    RENAMED = "renamed"
    """It is applied, at a place that has another name."""
    BROKEN = "graph break"
    """The model is traced in several graphs, and the ops to fuse are not in one of them."""
    GONE = "gone"
    """None of its ops is left."""


@dataclass(frozen=True, kw_only=True)
class Absence:
    """Why a rule isn't applied at some places.

    Attributes:
        kind: its kind.
        detail: one clause for a person.
        near_miss: the row of the report, narrowed down to those places.
        winners: the fusions that took the nodes, as `RULE OP PROVIDER`.
        lost_us: how much less a place would save with it, the mean over places; negative where it would save more.
        line: `file.py:12` of the user's model, if known.
        code: the text of that line, if known.
        fix: how to fix it, if known.
    """

    kind: AbsenceKind
    detail: str
    near_miss: NearMiss | None = None
    winners: tuple[str, ...] = ()
    lost_us: float | None = None
    line: str | None = None
    code: str | None = None
    fix: str | None = field(default=None, metadata={JSON_NAME: "mend"})


class Finding(NamedTuple):
    """A report's statement about one fusion at one place."""

    kind: AbsenceKind
    found: Loss | Refusal | None = None
    detail: str = ""
    now: str | None = None
    """The new name of the place, where it has one."""
    at: GraphBreak | None = None


class Witness:
    """A report that answers questions about single places."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self._losses: dict[tuple[Span, str, str | None], list[Loss]] = defaultdict(list)
        self._matches: dict[tuple[Span, str, str | None], dict[str, set[Applied]]] = defaultdict(dict)
        self._refusals: dict[tuple[Span, str | None], list[Refusal]] = defaultdict(list)
        self._left_alone: dict[Span, list[Refusal]] = defaultdict(list)
        for graph in report.graphs:
            for fusion in (*graph.applied, *(loss.fusion for loss in graph.lost)):
                at_site = self._matches[graph.range, fusion.rule, module_of(fusion.source)]
                at_site.setdefault(f"{graph.graph} {fusion.site}", set()).add(Applied.of(fusion))
            for loss in graph.lost:
                self._losses[graph.range, loss.fusion.rule, module_of(loss.fusion.source)].append(loss)
            for refusal in graph.refusals:
                if refusal.rule is None and refusal.reason in (Reason.TRAINING, Reason.DISABLED):
                    self._left_alone[graph.range].append(refusal)
                elif refusal.reason is not Reason.NO_EFFECT:
                    for place in dict.fromkeys((module_of(refusal.site), module_of(refusal.source))):
                        self._refusals[graph.range, place].append(refusal)
        self._in_layers: dict[tuple[Span, str | None], list[Refusal]] = defaultdict(list)
        for (span, place), refusals in self._refusals.items():
            self._in_layers[span, layer_of(place)] += refusals
        for index in (self._matches, self._losses, self._refusals, self._left_alone, self._in_layers):
            index.default_factory = None  # a lock may ask for more places than the report has

    def about(self, kernel: Applied, span: Span, place: str | None, count: int = 1) -> list[Finding]:
        """Why a fusion isn't at a place, for each of `count` of them.

        Args:
            kernel: the expected one.
            span: in which range.
            place: a module path; None: any place without one.
            count: how many are missing.
        """
        policy = self.policy_off(kernel.rule)
        if policy is not None:
            return [policy] * count
        losses = self._losses.get((span, kernel.rule, place), [])
        mine = [loss for loss in losses if Applied.of(loss.fusion) == kernel]
        found = [_of_loss(loss) for loss in mine]
        for further in (self._refused, self._changed, self._nearest):
            found += further(kernel, span, place) if len(found) < count else ()
        found = found or [self._nothing(kernel, span)]
        return found[:count] + found[:1] * (count - len(found))

    def is_gone(self, kernel: Applied, span: Span, place: str) -> bool:
        """Whether a place has gone, as far as a rule can tell: it has neither a match nor a near miss there."""
        is_there = (span, kernel.rule, place) in self._matches or self._refused(kernel, span, place)
        return not is_there and self.policy_off(kernel.rule) is None

    def policy_off(self, rule: str) -> Finding | None:
        """The finding that the policy never applies a rule, whatever the graph; None where it may."""
        report = self.report
        if report.policy == "off":
            return Finding(AbsenceKind.OFF, None, "the policy is off, which applies nothing")
        if report.order and rule not in report.order:
            return Finding(AbsenceKind.OFF, None, f"the policy {policy_name(report)} doesn't list {rule}")
        return None

    def of_rule(self, rule: str) -> Iterator[tuple[Finding, Span, str | None]]:
        """Every obstacle to a rule, with its range and place: a line of code where there is no module."""
        if self.policy_off(rule) is not None:
            return
        for graph in self.report.graphs:
            # A rule is there where one of its providers lost to another.
            there = {fusion.site for fusion in graph.applied if fusion.rule == rule}
            mine = [loss for loss in graph.lost if loss.fusion.rule == rule and loss.fusion.site not in there]
            cheapest = {loss.fusion.site: loss for loss in sorted(mine, key=lambda loss: loss.margin, reverse=True)}
            yield from ((_of_loss(loss), graph.range, loss.fusion.source) for loss in cheapest.values())
            for refusal in graph.refusals:
                is_whole = refusal.nearness is not Nearness.DECLINED or refusal.reason is Reason.UNSURE
                is_meant = refusal.rule == rule and is_whole
                if is_meant and refusal.reason is not Reason.NO_EFFECT:
                    yield Finding(AbsenceKind.NEAR_MISS, refusal), graph.range, refusal.site or refusal.source
        for span, refusals in self._left_alone.items():
            yield from ((Finding(AbsenceKind.LEFT_ALONE, refusal), span, None) for refusal in refusals)

    def _refused(self, kernel: Applied, span: Span, place: str | None) -> list[Finding]:
        """The rule's near misses at the place itself."""
        here = self._refusals.get((span, place), [])
        mine = [each for each in here if each.rule == kernel.rule and _concerns(each, kernel)]
        return _near([each for each in mine if each.nearness not in (Nearness.MISSING, Nearness.ABSENT)])

    def _nearest(self, kernel: Applied, span: Span, place: str | None) -> list[Finding]:
        """Distant near misses of the rule at the place, else any refusal there, else the rule's in the same layer, else
        the ops that the place lacks beside other layers, which is a guess; the nearest first.
        """
        here, rule = self._refusals.get((span, place), []), kernel.rule
        tiers: list[Callable[[], Iterable[Refusal]]] = [
            lambda: [each for each in here if each.rule == rule and self._is_absent(each)],
            lambda: [each for each in here if place and each.rule != rule and _is_obstacle(each)],
            lambda: [each for each in self._layer(span, place) if each.rule == rule and _is_obstacle(each)],
            lambda: [each for each in here if place and each.nearness is Nearness.MISSING and not self.report.breaks],
        ]
        for tier in tiers:
            found = [each for each in tier() if _concerns(each, kernel)]
            if found:
                return _near(found)
        return []

    def _is_absent(self, refusal: Refusal) -> bool:
        """Whether the rest of a pattern is absent; it may be in another graph where the model's graph breaks."""
        return refusal.nearness is Nearness.ABSENT and not (self.report.breaks and refusal.found in GRAPH_ENDS)

    def _layer(self, span: Span, place: str | None) -> list[Refusal]:
        layer = layer_of(place)
        return self._in_layers.get((span, layer), []) if layer is not None else []

    def _nothing(self, kernel: Applied, span: Span) -> Finding:
        """The finding where the report has nothing about a place."""
        if span in self._left_alone:
            return Finding(AbsenceKind.LEFT_ALONE, self._left_alone[span][0])
        if kernel.rule not in self.report.rules:
            return Finding(AbsenceKind.OFF, None, f"{kernel.rule} isn't among the rules that are on")
        nothing = "the graph has nothing there any more that it could match"
        if self.report.breaks:
            return Finding(AbsenceKind.BROKEN, None, f"{nothing}: {self.broken}", at=self.report.breaks[0])
        return Finding(AbsenceKind.GONE, None, nothing)

    @property
    def broken(self) -> str:
        """The number of graphs that the model is traced in, and its breaks; empty without any."""
        if not self.report.breaks:
            return ""
        lines = list(dict.fromkeys(each.line or each.reason for each in self.report.breaks))
        more = f" and {len(lines) - MOST_BREAKS} more lines" if len(lines) > MOST_BREAKS else ""
        graphs = count_of(len({graph.graph for graph in self.report.graphs}), "graph")
        return f"the model is traced in {graphs}, broken at {', '.join(lines[:MOST_BREAKS])}{more}"

    def _changed(self, kernel: Applied, span: Span, place: str | None) -> list[Finding]:
        """The other ops or providers that the rule matches with at the place. Their losses don't explain this kernel's
        absence; that it isn't among them does.
        """
        at_site = self._matches.get((span, kernel.rule, place), {})
        others = [kernels for kernels in at_site.values() if kernel not in kernels]
        if any(each.op == kernel.op for kernels in others for each in kernels):
            # An order looks at one provider a match, the one that saves the most.
            slower = ", or a slower one" if self.report.order else ""
            detail = f"it matches, and {kernel.provider} has no kernel for it any more{slower}"
            return [Finding(AbsenceKind.OFF, None, detail)]
        ops = sorted({each.op for kernels in others for each in kernels})
        if not ops:
            return []
        detail = f"{enumerate_names(ops)} matches there now, and no longer {kernel.op}"
        return [Finding(AbsenceKind.CHANGED, None, detail)]


def absences(findings: Sequence[Finding]) -> list[Absence]:
    """The absence of each finding. Findings that differ only in places share one object."""
    alike: dict[object, list[Finding]] = defaultdict(list)
    keys = [_key(finding) for finding in findings]
    for key, finding in zip(keys, findings, strict=True):
        alike[key].append(finding)
    made = {key: _absence(members) for key, members in alike.items()}
    return [made[key] for key in keys]


def _key(finding: Finding) -> object:
    if isinstance(finding.found, Refusal):
        return finding.kind, cause_of(finding.found)
    if finding.now is not None:
        return finding.kind
    if isinstance(finding.found, Loss):
        return finding.kind, finding.found.fusion.rule, _winners(finding.found)
    return finding


def _absence(findings: Sequence[Finding]) -> Absence:
    """The absence of equal findings."""
    kind, detail = findings[0].kind, findings[0].detail
    refusals = {id(each.found): each.found for each in findings if isinstance(each.found, Refusal)}
    losses = [each.found for each in findings if isinstance(each.found, Loss)]
    if refusals:
        return _of_row(kind, near_misses_of(refusals.values())[0])
    names = dict.fromkeys(each.now for each in findings if each.now is not None)
    if names:
        what = "the same fusion is" if len(names) == 1 else "the same fusions are"
        detail = f"{what} there, now called {places(names)}"
    if losses:
        return _of_contest(kind, losses)
    at = findings[0].at
    return Absence(kind=kind, detail=detail, line=at.line if at else None, code=at.code if at else None)


def _near(refusals: Iterable[Refusal]) -> list[Finding]:
    return [Finding(AbsenceKind.NEAR_MISS, refusal) for refusal in sorted(refusals, key=_distance)]


def _of_loss(loss: Loss) -> Finding:
    if loss.forbidden:
        return Finding(AbsenceKind.FORBIDDEN, loss)
    return Finding(AbsenceKind.CONFLICT if loss.blocked_by else AbsenceKind.NOT_WORTH_IT, loss)


def _winners(loss: Loss) -> tuple[Applied, ...]:
    return tuple(sorted({Applied.of(winner) for winner in loss.blocked_by}))


def _of_row(kind: AbsenceKind, row: NearMiss) -> Absence:
    return Absence(
        kind=kind, detail=row.detail, near_miss=row if kind is AbsenceKind.NEAR_MISS else None, line=row.line,
        code=row.code, fix=row.fix,
    )  # fmt: skip


def _of_contest(kind: AbsenceKind, losses: Sequence[Loss]) -> Absence:
    winners = _winners(losses[0])
    margins = [loss.lost_ns for loss in losses if loss.lost_ns is not None]
    lost_us = round(sum(margins) / len(margins) / 1000, 3) if margins else None
    if kind is AbsenceKind.FORBIDDEN:
        detail, fix = "it matches, and is forbidden", "don't forbid it"
    elif kind is AbsenceKind.NOT_WORTH_IT:
        cheaper = "" if lost_us is None else f" {lost_us:.1f} us a place"
        detail, fix = f"it matches, and leaving it to Inductor is{cheaper} cheaper", None
    else:
        names = " and ".join(f"{winner.rule} by {winner.provider}" for winner in winners)
        detail, fix = f"it matches, and lost its nodes to {names}{_lead(lost_us)}", None
    return Absence(
        kind=kind, detail=detail, winners=tuple(map(str, winners)) if kind is AbsenceKind.CONFLICT else (),
        lost_us=lost_us, fix=fix,
    )  # fmt: skip


def _lead(lost_us: float | None) -> str:
    """How much more the winners save, or less where they came first in an order."""
    if lost_us is None:
        return ""
    return f", {abs(lost_us):.1f} us a place {'behind' if lost_us < 0 else 'ahead'}"


def _concerns(refusal: Refusal, kernel: Applied) -> bool:
    """Whether a refusal can explain a kernel's absence: one provider may take the arguments that another declines."""
    is_mine = (refusal.rule, refusal.provider) == (kernel.rule, kernel.provider)
    return is_mine or refusal.nearness is not Nearness.DECLINED


def _is_obstacle(refusal: Refusal) -> bool:
    """Whether a refusal says more about a place than that one rule doesn't apply there."""
    has_parts = refusal.nearness in (Nearness.REFUSED, Nearness.OBSTRUCTED, Nearness.UNRECOGNIZED)
    return has_parts and refusal.reason not in (Reason.DISABLED, Reason.PROVIDER)


def _distance(refusal: Refusal) -> tuple[int, bool]:
    nearness = refusal.nearness or Nearness.REFUSED
    return list(Nearness).index(nearness), refusal.reason is Reason.PROVIDER


def layer_of(place: str | None) -> str | None:
    """`model.layers.7` of `model.layers.7.mlp.act`, None for a place in no layer."""
    parts = (place or "").split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdecimal()]
    return ".".join(parts[: numbers[0] + 1]) if numbers else None
