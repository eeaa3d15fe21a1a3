"""The record on a terminal: what fired, what starved, where and why, on one screen."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from fuseplan.record import Comparison, ConflictClass, Report, changes, differences
from fuseplan.record.report import UNFUSED
from fuseplan.record.text import printable, shown
from fuseplan.report.misses import render_near_misses
from fuseplan.report.places import places
from fuseplan.report.policies import Policies, matters
from fuseplan.report.text import count_of, entry, enumerate_names, indented, policy_name, tokens_of, warnings_of


def render_comparison(comparison: Comparison) -> RenderableType:
    """One screen: a headline, a table of policies by rules, conflicts, near misses, warnings, and where the time
    went. Names of models that aren't printable are shown as Python writes them.
    """
    comparison = shown(comparison)
    return Group(_headline(comparison), Text(), *_sections(comparison), Text(), _footer(comparison))


def render_report(report: Report, name: str = "model") -> RenderableType:
    """One screen for one report, of `fuseplan.compile` or `fuseplan.explain`: `rich.print(render_report(report))`.

    Args:
        report: on one policy.
        name: of what was compiled.
    """
    report, name = shown(report), printable(name)
    spans = dict.fromkeys(graph.range for graph in report.graphs)
    devices = dict.fromkeys(graph.plan.device for graph in report.graphs if graph.plan is not None)
    comparison = Comparison(
        workload=name, tp=1, device=", ".join(devices), ranges=tuple(span for span in spans if span), reports=(report,)
    )
    graphs = len({graph.graph for graph in report.graphs})
    priced = f", priced for {comparison.device}" if devices else ""
    headline = Text.assemble((name, "bold"), f"  {policy_name(report)}, {count_of(graphs, 'graph')}{priced}")
    return Group(headline.append_text(_recognised(report)), Text(), *_sections(comparison))


def _sections(comparison: Comparison) -> list[RenderableType]:
    parts: list[RenderableType] = [*_table(comparison)]
    sections = (
        _what_if(comparison),
        _conflicts(comparison),
        _uncontested(comparison),
        _not_worth_it(comparison),
        _forbidden(comparison),
        render_near_misses(comparison.reports[0].near_misses),
        _assumed(comparison),
        _pending(comparison),
        _warnings(comparison),
    )
    for section in sections:
        if section:
            parts += [Text(), *section]
    return parts


def _headline(comparison: Comparison) -> Text:
    spans = ", ".join(map(tokens_of, comparison.ranges))
    graphs = len({graph.graph for graph in comparison.reports[0].graphs})
    text = Text()
    text.append(comparison.workload, style="bold")
    text.append(f"  TP={comparison.tp}, providers of {comparison.device}, ")
    text.append(f"{count_of(graphs, 'graph')} in {count_of(len(comparison.ranges), 'compile range')} (tokens {spans})")
    return text.append_text(_recognised(comparison.reports[0]))


def _recognised(report: Report) -> Text:
    found = ", ".join(f"{count} {name}" for name, count in sorted(report.recognized.items()) if count)
    return Text(f"\nrecognised: {found}" if found else "", style="dim")


def _table(comparison: Comparison) -> list[RenderableType]:
    rules = sorted({rule for report in comparison.reports for rule in report.matched if matters(comparison, rule)})
    if not rules:
        known = sorted({rule for report in comparison.reports for rule in report.rules})
        return [Text(f"nothing to fuse: none of {', '.join(known)} matches anywhere")]
    legend = "fired, of the matches there are on the unmodified graphs"
    return [Policies(comparison, rules), Text(f"{legend}; {_saving_legend(comparison)}", style="dim")]


def _saving_legend(comparison: Comparison) -> str:
    sizes = [graph.sizes[len(graph.sizes) // 2].tokens for graph in comparison.reports[0].graphs if graph.sizes]
    middles = ", ".join(str(tokens) for tokens in dict.fromkeys(sizes))
    spans = [graph.sizes for graph in comparison.reports[0].graphs if graph.range is None and len(graph.sizes) > 1]
    ends = dict.fromkeys(f"{sizes[0].tokens:,} to {sizes[-1].tokens:,}" for sizes in spans)
    valid = f"; priced for {' and '.join(ends)} tokens, valid for all" if ends else ""
    return f"saved: us a step at the middle of each range ({middles} tokens){valid}"


def _what_if(comparison: Comparison) -> list[RenderableType]:
    """What forcing and forbidding costs, and what it changes where."""
    free, asked = comparison.unconstrained, comparison.constrained
    if free is None or asked is None:
        return []
    given = [f"{verb} {text}" for verb, texts in (("force", asked.force), ("forbid", asked.forbid)) for text in texts]
    under = f" under {policy_name(asked)}" if asked.order else ""
    lines: list[RenderableType] = [entry("what if", f"{enumerate_names(given)}{under}")]
    saved = [_saves(each.range, each.before_ns, each.after_ns) for each in differences(free, asked)]
    lines.append(indented(Text("saves ").append_text(Text(", ").join(saved))))
    grouped: dict[tuple[str, str, tuple[str, ...]], int] = {}
    for change in changes(free, asked):
        key = (change.before, change.after, change.sources)
        grouped[key] = grouped.get(key, 0) + change.count
    for (before, after, sources), count in grouped.items():
        where = f": {places(sources)}" if sources else ""
        lines.append(indented(f"{after} in place of {before} in {count_of(count, 'place')}{where}"))
    if not grouped:
        same = "the order does" if asked.order else "the plan is"
        lines.append(indented(f"it changes nothing: {same} the same without it"))
    return lines


def _saves(span: tuple[int, int] | None, before_ns: int, after_ns: int) -> Text:
    worse = after_ns < before_ns
    at = f" at {tokens_of(span)}" if span else ""
    return Text.assemble(
        (f"{after_ns / 1000:.1f} us", "red" if worse else ""), f" instead of {before_ns / 1000:.1f} us{at}"
    )


def _forbidden(comparison: Comparison) -> list[RenderableType]:
    """Matches that the first policy was told not to apply."""
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
    """One paragraph for each set of places: who wants them, and who gets them under each policy."""
    contests: dict[tuple[str, tuple[str, ...]], list[tuple[Report, ConflictClass]]] = {}
    for report in comparison.reports:
        for conflict in (each for each in report.conflicts if each.winner != UNFUSED):
            contests.setdefault((conflict.op, conflict.sources), []).append((report, conflict))
    lines: list[RenderableType] = []
    for (op, sources), rows in contests.items():
        rules = sorted({rule for _, conflict in rows for rule in conflict.rules})
        text = f"{enumerate_names(rules)} want the same {op}, which can be in one fusion only"
        lines.append(entry("conflict", text))
        lines += [indented(f"where  {places(sources)}")] if sources else []
        for report in comparison.reports:
            mine = [conflict for owner, conflict in rows if owner is report]
            lines += [indented(_verdict(report, mine))] if mine else []
    return lines


def _verdict(report: Report, conflicts: Sequence[ConflictClass]) -> Text:
    verdict = Text(f"{policy_name(report)}: ")
    winners = {conflict.winner: conflict.count for conflict in conflicts}
    verdict.append(enumerate_names([f"{rule} takes {count}" for rule, count in winners.items()]), style="green")
    losers: dict[str, list[ConflictClass]] = {}
    for conflict in conflicts:
        losers.setdefault(conflict.loser, []).append(conflict)
    for rule, rows in losers.items():
        left = report.fused.get(rule, 0)
        verdict.append(f", {rule} is left with {left}", style="" if left else "red")
        verdict.append(_margin(rows[0]))
    return verdict


def _margin(conflict: ConflictClass) -> str:
    """By how much a place would be worse off with the loser, and from which cost on it would not."""
    if conflict.lost_us is None:
        return ""
    text = f"{abs(conflict.lost_us):.1f} us {'more' if conflict.lost_us < 0 else 'less'} a place"
    return f" (would save {text}{_flip(conflict)})"


def _flip(conflict: ConflictClass) -> str:
    """What the loser's op would have to take, beside what it takes."""
    if conflict.flips_at_us is None or conflict.lost_us is None:
        return ""
    takes = conflict.flips_at_us + conflict.lost_us
    return f"; it would win if its op took {conflict.flips_at_us:.1f} us instead of {takes:.1f}"


def _not_worth_it(comparison: Comparison) -> list[RenderableType]:
    """Of the first policy: matches that nothing else wants, and that cost more than they save."""
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
    """What every order applies: the matches of a conflicting rule that no other rule wants."""
    ordered = [report for report in comparison.reports if report.order]
    if not any(report.conflicts for report in ordered):
        return []
    applied = [[(graph.range, fusion) for graph in report.graphs for fusion in graph.applied] for report in ordered]
    always = [entry for entry in applied[0] if all(entry in others for others in applied[1:])]
    lines: list[RenderableType] = []
    for rule in sorted({fusion.rule for _, fusion in always}):
        mine = [fusion for _, fusion in always if fusion.rule == rule]
        where = places(fusion.source for fusion in mine)
        told = f"{rule} in {count_of(len(mine), 'place')}{f': {where}' if where else ''}"
        lines.append(entry("uncontested", told, style=""))
    return lines


def _assumed(comparison: Comparison) -> list[RenderableType]:
    """What the first policy applies and nobody has priced."""
    lines: list[RenderableType] = []
    for (rule, provider), fusions in comparison.reports[0].assumed.items():
        where = places(fusion.source for fusion in fusions)
        title = f"{rule} by {provider} in {count_of(len(fusions), 'place')}: {where}"
        lines.append(entry("assumed", title.rstrip(": ")))
        savings = sorted({f"{(fusion.saving_ns or 0) / 1000:.1f}" for fusion in fusions})
        lines.append(indented(f"taken to save {' or '.join(savings)} us a place: nobody has measured or declared it"))
    return lines


def _pending(comparison: Comparison) -> list[RenderableType]:
    """What a compilation applied and ranks haven't verified yet."""
    pending = [each for report in comparison.reports for graph in report.graphs for each in graph.pending]
    kernels = dict.fromkeys(f"{each.provider}'s {each.op}" for each in pending)
    return [entry("pending", f"{kernel}: all ranks verify it together before the first run") for kernel in kernels]


def _warnings(comparison: Comparison) -> list[RenderableType]:
    lines = dict.fromkeys(warning.detail for report in comparison.reports for warning in warnings_of(report))
    texts = [*lines, *(f"graph break: {reason}" for reason in comparison.breaks)]
    return [entry("warning", text) for text in texts]


def _footer(comparison: Comparison) -> Text:
    stages: dict[str, int] = {}
    for graph in comparison.reports[0].graphs:
        for stage, time_ns in graph.stages_ns.items():
            stages[stage] = stages.get(stage, 0) + time_ns
    times = [f"build and trace {comparison.trace_ns / 1e9:.1f} s"]
    times += [f"{stage} {time_ns / 1e6:.0f} ms" for stage, time_ns in stages.items()]
    notes = "".join(f"note  {note}\n" for note in comparison.notes)
    return Text(f"{notes}time  {', '.join(times)}", style="dim")
