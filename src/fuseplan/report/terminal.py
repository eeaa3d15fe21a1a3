"""The record on a terminal: applied and starved rules, where and why, on one screen."""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import replace

from rich.console import Console, Group, RenderableType
from rich.text import Text

from fuseplan.record import Comparison, ConflictClass, Report, changes, differences
from fuseplan.record.report import UNFUSED
from fuseplan.record.text import count_of, duration, printable, shown
from fuseplan.report.misses import render_near_misses
from fuseplan.report.places import places
from fuseplan.report.policies import Policies, alike, matters
from fuseplan.report.savings import Saved, between, is_starved, us, verdict
from fuseplan.report.summary import alone
from fuseplan.report.text import PLAIN, entry, enumerate_names, indented, policy_name, tokens_of, warnings_of

Section = Callable[[Comparison], list[RenderableType]]


def render_comparison(comparison: Comparison, *, verbose: bool = False) -> RenderableType:
    """One screen: a verdict, a table of policies by rules, near misses and warnings. Names of models that aren't
    printable are shown as Python writes them.

    Args:
        comparison: of at least one policy.
        verbose: with conflicts, declined matches, recognised ops and the time of each stage; always on where nothing
            matches.
    """
    comparison = shown(comparison)
    verbose = verbose or not _matches(comparison)
    parts = [
        _headline(comparison),
        Text(),
        *_sections(comparison, verbose=verbose),
        Text(),
        *_footer(comparison, verbose),
    ]
    return Group(verdict(comparison), Text(), *parts)


def render_report(report: Report, name: str = "model", *, verbose: bool = False) -> RenderableType:
    """One screen for one report, of `fuseplan.compile` or `fuseplan.explain`: `rich.print(render_report(report))`.

    Args:
        report: on one policy.
        name: of the compiled model.
        verbose: as for `render_comparison`.
    """
    report, name = shown(report), printable(name)
    comparison = alone(report, name)
    graphs = len({graph.graph for graph in report.graphs})
    priced = f", priced for {comparison.device}" if comparison.device else ""
    headline = Text.assemble((name, "bold"), f"  {policy_name(report)}, {count_of(graphs, 'graph')}{priced}")
    verbose = verbose or not _matches(comparison)
    footer = [_recognised(report), *([] if verbose else _hidden(comparison))]
    parts = [*_sections(comparison, verbose=verbose), Text(), *footer]
    return Group(verdict(comparison), Text(), headline, *([Text()] if _matches(comparison) else []), *parts)


def _sections(comparison: Comparison, *, verbose: bool) -> list[RenderableType]:
    parts: list[RenderableType] = [*_table(comparison)]
    sections = [
        _what_if(comparison),
        *([lines for _, lines in _asides(comparison)] if verbose else []),
        _by_range(comparison, _forbidden),
        _by_range(comparison, lambda each: render_near_misses(each.reports[0].near_misses)[0]),
        *([_by_range(comparison, _declined)] if verbose else []),
        _by_range(comparison, _assumed),
        _pending(comparison),
        _unverified(comparison),
        _warnings(comparison),
    ]
    for section in sections:
        if section:
            parts += [Text(), *section]
    return parts


def _matches(comparison: Comparison) -> bool:
    return any(any(report.matched.values()) for report in comparison.reports)


def _by_range(comparison: Comparison, section: Section) -> list[RenderableType]:
    """A section that counts a step's places. Ranges with the same result, figures aside, are shown once."""
    found: dict[str, list[tuple[str, list[RenderableType]]]] = {}
    every = list(dict.fromkeys(graph.range for graph in comparison.reports[0].graphs))
    for span in every:
        lines = section(_only(comparison, span))
        if lines:
            name = tokens_of(span) if span else ""
            found.setdefault(re.sub(r"[0-9]+\.[0-9]+", "", _plain(lines)), []).append((name, lines))
    parts: list[RenderableType] = []
    for same in found.values():
        spans, lines = [name for name, _ in same], same[0][1]
        if len(same) < len(every):
            parts.append(Text(f"at {enumerate_names(spans)} tokens", style="dim"))
        elif len(spans) > 1 and len({_plain(each) for _, each in same}) > 1:
            parts.append(Text(f"at {spans[0]} tokens, and likewise at {enumerate_names(spans[1:])}", style="dim"))
        parts += lines
    return parts


def _only(comparison: Comparison, span: tuple[int, int] | None) -> Comparison:
    """The part of a comparison in one range."""
    reports = (replace(each, graphs=tuple(g for g in each.graphs if g.range == span)) for each in comparison.reports)
    return replace(comparison, reports=tuple(reports))


def _plain(lines: Sequence[RenderableType]) -> str:
    text = io.StringIO()
    Console(file=text, width=1000, **PLAIN).print(Group(*lines))
    return " ".join(text.getvalue().split())


def _declined(comparison: Comparison) -> list[RenderableType]:
    return render_near_misses(comparison.reports[0].near_misses)[1]


def _asides(comparison: Comparison) -> list[tuple[str, list[RenderableType]]]:
    """Sections that explain a plan, and need no action."""
    return [
        ("conflicts", _by_range(comparison, _conflicts)),
        ("uncontested matches", _by_range(comparison, _uncontested)),
        ("matches not worth fusing", _by_range(comparison, _not_worth_it)),
        ("what measuring could change", _open(comparison)),
    ]


def _hidden(comparison: Comparison) -> list[RenderableType]:
    """A hint at the hidden sections, if there are any."""
    names = [name for name, lines in _asides(comparison) if lines]
    names += ["declined matches"] if _declined(comparison) else []
    return [Text(f"more with -v: {enumerate_names(names)}", style="dim")] if names else []


def _headline(comparison: Comparison) -> Text:
    graphs = len({graph.graph for graph in comparison.reports[0].graphs})
    text = Text()
    text.append(comparison.workload, style="bold")
    return text.append(f"  TP={comparison.tp}, providers of {comparison.device}, {count_of(graphs, 'graph')}")


def _recognised(report: Report) -> Text:
    """The dialect ops of a step."""
    spans = dict.fromkeys(graph.range for graph in report.graphs)
    report = replace(report, graphs=tuple(graph for graph in report.graphs if graph.range == next(iter(spans))))
    found = ", ".join(f"{count} {name}" for name, count in sorted(report.recognized.items()) if count)
    return Text(f"recognised: {found or 'nothing'}", style="dim")


def _table(comparison: Comparison) -> list[RenderableType]:
    rules = sorted({rule for report in comparison.reports for rule in report.matched if matters(comparison, rule)})
    return [Policies(comparison, rules)] if rules else []


def _what_if(comparison: Comparison) -> list[RenderableType]:
    """The cost of forcing and forbidding, and the changes by place."""
    free, asked = comparison.unconstrained, comparison.constrained
    if free is None or asked is None:
        return []
    given = [f"{verb} {text}" for verb, texts in (("force", asked.force), ("forbid", asked.forbid)) for text in texts]
    under = f" under {policy_name(asked)}" if asked.order else ""
    lines: list[RenderableType] = [entry("what if", f"{enumerate_names(given)}{under}")]
    saved = [
        _saves(each.range, each.before_ns, each.after_ns, Saved.of(asked, each.range).unfused_ns)
        for each in differences(free, asked)
    ]
    lines.append(indented(Text("saves ").append_text(Text(", ").join(saved))))
    grouped: dict[tuple[str, str, tuple[str, ...]], int] = {}
    for change in changes(free, asked):
        key = (change.before, change.after, change.sources)
        grouped[key] = max(grouped.get(key, 0), change.count)  # of a step: a range is another one
    for (before, after, sources), count in grouped.items():
        where = f": {places(sources)}" if sources else ""
        lines.append(indented(f"{after} in place of {before} in {count_of(count, 'place')}{where}"))
    if not grouped:
        same = "the order does" if asked.order else "the plan is"
        lines.append(indented(f"it changes nothing: {same} the same without it"))
    return lines


def _saves(span: tuple[int, int] | None, before_ns: int, after_ns: int, unfused_ns: int) -> Text:
    worse = after_ns < before_ns
    at = f" at {tokens_of(span)} tokens" if span else ""
    return Text.assemble(
        (us(after_ns), "red" if worse else ""), f" of {us(unfused_ns)} us instead of {us(before_ns)}{at}"
    )


def _forbidden(comparison: Comparison) -> list[RenderableType]:
    """Matches that are forbidden under the first policy."""
    sources: dict[str, list[str | None]] = {}
    for graph in comparison.reports[0].graphs:
        for rule, site in dict.fromkeys((loss.fusion.rule, loss.fusion.site) for loss in graph.lost if loss.forbidden):
            place = next(loss.fusion.source for loss in graph.lost if loss.fusion.site == site)
            sources.setdefault(rule, []).append(place)
    return [
        entry("forbidden", f"{rule} in {count_of(len(where), 'place')}: {places(where)}".rstrip(": "))
        for rule, where in sorted(sources.items())
    ]


def _conflicts(comparison: Comparison) -> list[RenderableType]:
    """One paragraph for each set of places: the rules that contend for them, and the winner under each policy."""
    contests: dict[tuple[str, tuple[str, ...]], list[tuple[Report, ConflictClass]]] = {}
    reports = [first for first, *_ in alike(comparison.reports)]
    for report in reports:
        for conflict in (each for each in report.conflicts if each.winner != UNFUSED):
            contests.setdefault((conflict.op, conflict.sources), []).append((report, conflict))
    lines: list[RenderableType] = []
    for (op, sources), rows in contests.items():
        rules = sorted({rule for _, conflict in rows for rule in conflict.rules})
        text = f"{enumerate_names(rules)} want the same {op}, which can be in one fusion only"
        lines.append(entry("conflict", text))
        lines += [indented(f"where  {places(sources)}")] if sources else []
        for report in reports:
            mine = [conflict for owner, conflict in rows if owner is report]
            lines += [indented(_outcome(report, mine))] if mine else []
    return lines


def _outcome(report: Report, conflicts: Sequence[ConflictClass]) -> Text:
    text = Text(f"{policy_name(report)}: ")
    winners = {conflict.winner: conflict.count for conflict in conflicts}
    text.append(enumerate_names([f"{rule} takes {count}" for rule, count in winners.items()]), style="green")
    losers: dict[str, list[ConflictClass]] = {}
    for conflict in conflicts:
        losers.setdefault(conflict.loser, []).append(conflict)
    for rule, rows in losers.items():
        text.append(
            f", {rule} is left with {report.fused.get(rule, 0)}", style="red" if is_starved(report, rule) else ""
        )
        text.append(_margin(rows[0]))
    return text


def _margin(conflict: ConflictClass) -> str:
    """How much more a place would take with the loser, and the cost at which it would not."""
    if conflict.lost_us is None:
        return ""
    more = "more" if conflict.lost_us < 0 else "less"
    text = f"{abs(conflict.lost_us):.1f} us {more} a place{_interval(conflict)}"
    return f" (would save {text}{_flip(conflict)})"


def _interval(conflict: ConflictClass) -> str:
    """`, 0.9 to 2.1`: where the margin is, 8 times of 10."""
    low, high = conflict.lost_low_us, conflict.lost_high_us
    if low is None or high is None:
        return ""
    if conflict.lost_us is not None and conflict.lost_us < 0:
        low, high = -high, -low
    return f", {low:.1f} to {high:.1f}" if f"{low:.1f}" != f"{high:.1f}" else ""


def _flip(conflict: ConflictClass) -> str:
    """The time at which the loser would win, beside its op's time."""
    if conflict.flips_at_us is None or conflict.lost_us is None:
        return ""
    takes = conflict.flips_at_us + conflict.lost_us
    return f"; it would win if its op took {conflict.flips_at_us:.1f} us instead of {takes:.1f}"


def _not_worth_it(comparison: Comparison) -> list[RenderableType]:
    """The first policy's uncontested matches that cost more than they save."""
    lines: list[RenderableType] = []
    for conflict in comparison.reports[0].conflicts:
        if conflict.winner == UNFUSED:
            where = places(conflict.sources)
            title = f"{conflict.loser} in {count_of(conflict.count, 'place')}{f': {where}' if where else ''}"
            lines.append(entry("not worth it", title))
            cheaper = f"leaving it to Inductor is {conflict.lost_us or 0:.1f} us a place cheaper"
            lines.append(indented(f"{cheaper}{_flip(conflict)}"))
    return lines


def _uncontested(comparison: Comparison) -> list[RenderableType]:
    """Matches of a conflicting rule that no other rule contends for."""
    ordered = [report for report in comparison.reports if report.order]
    if not any(report.conflicts for report in ordered):
        return []
    applied = [[(graph.range, fusion) for graph in report.graphs for fusion in graph.applied] for report in ordered]
    always = [entry for entry in applied[0] if all(entry in others for others in applied[1:])]
    lines: list[RenderableType] = []
    for rule in sorted({fusion.rule for _, fusion in always}):
        mine = [fusion for _, fusion in always if fusion.rule == rule]
        where = places(fusion.source for fusion in mine)
        text = f"{rule} in {count_of(len(mine), 'place')}{f': {where}' if where else ''}"
        lines.append(entry("uncontested", text, style=""))
    return lines


def _assumed(comparison: Comparison) -> list[RenderableType]:
    """Fusions that the first policy applies without a known price."""
    lines: list[RenderableType] = []
    for (rule, provider), fusions in comparison.reports[0].assumed.items():
        where = places(fusion.source for fusion in fusions)
        title = f"{rule} by {provider} in {count_of(len(fusions), 'place')}: {where}"
        lines.append(entry("assumed", title.rstrip(": ")))
        savings = sorted({f"{(fusion.saving_ns or 0) / 1000:.1f}" for fusion in fusions})
        lines.append(indented(f"taken to save {' or '.join(savings)} us a place: neither measured nor declared"))
    return lines


def _pending(comparison: Comparison) -> list[RenderableType]:
    """Applied fusions that ranks haven't verified yet."""
    pending = [each for report in comparison.reports for graph in report.graphs for each in graph.pending]
    kernels = dict.fromkeys(f"{each.provider}'s {each.op}" for each in pending)
    return [entry("pending", f"{kernel}: all ranks verify it together before the first run") for kernel in kernels]


def _unverified(comparison: Comparison) -> list[RenderableType]:
    """Other people's passes that were applied as they are, since they couldn't be run."""
    graphs = [graph for report in comparison.reports for graph in report.graphs]
    found = [each for graph in graphs for each in graph.verified if each.unverified]
    return [entry("note", text) for text in dict.fromkeys(f"{each.rule}: {each.detail}" for each in found)]


def _warnings(comparison: Comparison) -> list[RenderableType]:
    lines = dict.fromkeys(warning.detail for report in comparison.reports for warning in warnings_of(report))
    texts = [*lines, *(f"graph break: {reason}" for reason in comparison.breaks)]
    return [entry("warning", text) for text in texts]


def _footer(comparison: Comparison, verbose: bool) -> list[RenderableType]:
    notes: list[RenderableType] = [Text(f"note  {note}", style="dim") for note in comparison.notes]
    notes += _unsure(comparison)
    recognised = _recognised(comparison.reports[0])
    if not verbose:
        return [recognised, *notes, *_hidden(comparison)]
    times = [f"build and trace {comparison.trace_ns / 1e9:.1f} s"]
    times += [f"{stage} {time_ns / 1e6:.0f} ms" for stage, time_ns in comparison.reports[0].stages_ns.items()]
    return [*_all_reduces(comparison), recognised, *notes, Text(f"time  {', '.join(times)}", style="dim")]


def _unsure(comparison: Comparison) -> list[RenderableType]:
    """The note that measuring could change the plan, where, and about how long it takes."""
    found = comparison.reports[0].unsure
    if not found:
        return []
    places = count_of(sum(each.places for each in found), "place")
    takes = duration(sum(each.tuning_s for each in found))
    text = f"measuring could change the plan in {places}: fuseplan tune --only-unsure, about {takes}"
    lines: list[RenderableType] = [Text(f"note  {text}", style="dim")]
    return lines


def _open(comparison: Comparison) -> list[RenderableType]:
    """Where measuring could change the plan: the alternatives that could be the best."""
    lines: list[RenderableType] = []
    for each in comparison.reports[0].unsure:
        lines.append(entry("unsure", f"{each.site}, {count_of(each.places, 'place')}"))
        if each.ahead_ns is not None:
            lines.append(indented(f"{each.alternatives[0]}: {_ahead(each.ahead_ns, each.low_ns, each.high_ns)}"))
        lines.append(indented(f"beside {enumerate_names(each.alternatives[1:])}"))
    return lines


def _ahead(ns: int, low_ns: int | None, high_ns: int | None) -> str:
    """How far the applied alternative is ahead, or behind one that isn't sure enough to be applied."""
    if ns >= 0 or low_ns is None or high_ns is None:
        return f"ahead by {us(ns)} us ({between(low_ns, high_ns)})"
    return f"behind by {us(-ns)} us ({between(-high_ns, -low_ns)}), which isn't sure"


def _all_reduces(comparison: Comparison) -> list[RenderableType]:
    """The kernels that unfused all-reduces are priced as, by size."""
    found: dict[str, dict[int, None]] = {}
    for size in (size for graph in comparison.reports[0].graphs for size in graph.sizes):
        for name in size.all_reduces:
            found.setdefault(name, {})[size.tokens] = None
    if len({tokens for sizes in found.values() for tokens in sizes}) < 2:
        listed = ", ".join(found)
    else:
        at = {name: enumerate_names([f"{each:,}" for each in sorted(sizes)]) for name, sizes in found.items()}
        listed = "; ".join(f"{name} at {sizes}" for name, sizes in at.items()) + " tokens"
    return [Text(f"all-reduces, unfused: {listed}", style="dim")] if found else []
