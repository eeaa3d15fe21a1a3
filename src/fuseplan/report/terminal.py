"""The record on a terminal: what fired, what starved, where and why, on one screen."""

import re
from collections.abc import Iterable, Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from fuseplan.record import Comparison, ConflictClass, Report


def render_comparison(comparison: Comparison) -> RenderableType:
    """One screen: a headline, a table of policies by rules, conflicts, near misses, warnings, and where the time
    went.
    """
    parts: list[RenderableType] = [_headline(comparison), Text(), *_table(comparison)]
    sections = (_conflicts(comparison), _uncontested(comparison), _near_misses(comparison), _warnings(comparison))
    for section in sections:
        if section:
            parts += [Text(), *section]
    parts += [Text(), _footer(comparison)]
    return Group(*parts)


def _headline(comparison: Comparison) -> Text:
    spans = ", ".join(f"{first}-{last}" for first, last in comparison.ranges)
    graphs = len({graph.graph for graph in comparison.reports[0].graphs})
    text = Text()
    text.append(comparison.workload, style="bold")
    text.append(f"  TP={comparison.tp}, providers of {comparison.device}, ")
    text.append(f"{_count(graphs, 'graph')} in {_count(len(comparison.ranges), 'compile range')} (tokens {spans})")
    norms = {name: n for name, n in comparison.reports[0].recognized.items() if n}
    if norms:
        text.append("\nrecognised: " + ", ".join(f"{n} {name}" for name, n in sorted(norms.items())), style="dim")
    return text


def _table(comparison: Comparison) -> list[RenderableType]:
    rules = sorted({rule for report in comparison.reports for rule in report.rules if _matters(comparison, rule)})
    if not any(report.matched.get(rule, 0) for report in comparison.reports for rule in rules):
        known = sorted({rule for report in comparison.reports for rule in report.rules})
        return [Text(f"nothing to fuse: none of {', '.join(known)} matches anywhere")]
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
    table.add_column("policy", overflow="fold")
    for rule in rules:
        table.add_column(rule, justify="right")
    table.add_column("")
    for report in comparison.reports:
        starved = [rule for rule in rules if _starved(report, rule)]
        note = Text(f"{' and '.join(starved)} starved", style="bold red") if starved else Text()
        table.add_row(policy_name(report), *(_cell(report, rule) for rule in rules), note)
    return [table, Text("fired, of the matches there are on the unmodified graphs", style="dim")]


def _matters(comparison: Comparison, rule: str) -> bool:
    return any(report.matched.get(rule, 0) for report in comparison.reports)


def _starved(report: Report, rule: str) -> bool:
    return bool(report.order) and report.matched.get(rule, 0) > 0 and not report.fused.get(rule, 0)


def _cell(report: Report, rule: str) -> Text:
    fused, matched = report.fused.get(rule, 0), report.matched.get(rule, 0)
    style = "bold red" if _starved(report, rule) else "green" if fused else "dim"
    return Text(str(fused), style=style).append(f" of {matched}", style="dim")


def _conflicts(comparison: Comparison) -> list[RenderableType]:
    classes: dict[tuple[tuple[str, ...], str], list[tuple[Report, ConflictClass]]] = {}
    for report in comparison.reports:
        for conflict in report.conflicts:
            classes.setdefault((conflict.rules, conflict.op), []).append((report, conflict))
    lines: list[RenderableType] = []
    for (rules, op), rows in classes.items():
        lines.append(
            Text.assemble(
                ("conflict  ", "bold yellow"),
                f"{' and '.join(rules)} want the same {op}, and it can be in one fusion only",
            )
        )
        lines += [_indented(f"where  {places(rows[0][1].sources)}")] if rows[0][1].sources else []
        for report, conflict in rows:
            verdict = Text(f"{policy_name(report)}: ")
            verdict.append(f"{conflict.winner} takes {conflict.count}", style="green")
            left = report.fused.get(conflict.loser, 0)
            verdict.append(f", {conflict.loser} is left with {left}", style="red" if not left else "")
            lines.append(_indented(verdict))
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
        lines.append(Text(f"uncontested  {rule} in {_count(len(mine), 'place')}{f': {where}' if where else ''}"))
    return lines


def _near_misses(comparison: Comparison) -> list[RenderableType]:
    lines: list[RenderableType] = []
    for miss in comparison.reports[0].near_misses:
        where = f" ({places([miss.source])})" if miss.source else ""
        title = Text.assemble(
            ("near miss ", "bold yellow"),
            f"{miss.rule or miss.op}: {miss.reason.value}, {_count(miss.count, 'place')}{where}",
        )
        lines += [title, _indented(miss.detail), *([_indented(f"mend   {miss.mend}")] if miss.mend else [])]
    return lines


def _warnings(comparison: Comparison) -> list[RenderableType]:
    lines = dict.fromkeys(warning.detail for report in comparison.reports for warning in report.warnings)
    refused = dict.fromkeys(
        refusal.detail
        for report in comparison.reports
        for graph in report.graphs
        for refusal in graph.refusals
        if refusal.reason.value in ("training", "disabled")
    )
    texts = [*lines, *refused, *(f"graph break: {reason}" for reason in comparison.breaks)]
    return [Text.assemble(("warning   ", "bold yellow"), text) for text in texts]


def _footer(comparison: Comparison) -> Text:
    stages: dict[str, int] = {}
    for graph in comparison.reports[0].graphs:
        for stage, time_ns in graph.stages_ns.items():
            stages[stage] = stages.get(stage, 0) + time_ns
    times = [f"build and trace {comparison.trace_ns / 1e9:.1f} s"]
    times += [f"{stage} {time_ns / 1e6:.0f} ms" for stage, time_ns in stages.items()]
    return Text("time  " + ", ".join(times), style="dim")


def policy_name(report: Report) -> str:
    """A policy as it is written on the command line."""
    return f"{report.policy}({', '.join(report.order)})" if report.order else report.policy


def places(sources: Iterable[str | None]) -> str:
    """Module paths with runs of layer numbers folded: `layers.0-35.mlp`."""
    numbers: dict[str, list[int]] = {}
    for source in sources:
        if source is not None:
            found = re.search(r"\d+", source)
            template = re.sub(r"\d+", "{}", source, count=1) if found else source
            numbers.setdefault(template, []).extend([int(found[0])] if found else [])
    return ", ".join(template.replace("{}", _runs(sorted(set(indices)))) for template, indices in numbers.items())


def _runs(indices: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _indented(content: str | Text) -> Padding:
    return Padding(content if isinstance(content, Text) else Text(content), (0, 0, 0, 10))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
