"""The record on a terminal: what fired, what starved, where and why, on one screen."""

import re
from collections.abc import Iterable, Sequence

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from fuseplan.record import Comparison, ConflictClass, Report
from fuseplan.record.report import UNFUSED


def render_comparison(comparison: Comparison) -> RenderableType:
    """One screen: a headline, a table of policies by rules, conflicts, near misses, warnings, and where the time
    went.
    """
    parts: list[RenderableType] = [_headline(comparison), Text(), *_table(comparison)]
    sections = (
        _conflicts(comparison),
        _uncontested(comparison),
        _not_worth_it(comparison),
        _near_misses(comparison),
        _warnings(comparison),
    )
    for section in sections:
        if section:
            parts += [Text(), *section]
    parts += [Text(), _footer(comparison)]
    return Group(*parts)


def _headline(comparison: Comparison) -> Text:
    spans = ", ".join(map(_tokens, comparison.ranges))
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
    rules = sorted({rule for report in comparison.reports for rule in report.matched if _matters(comparison, rule)})
    if not rules:
        known = sorted({rule for report in comparison.reports for rule in report.rules})
        return [Text(f"nothing to fuse: none of {', '.join(known)} matches anywhere")]
    legend = "fired, of the matches there are on the unmodified graphs"
    return [_Policies(comparison, rules), Text(f"{legend}; {_saving_legend(comparison)}", style="dim")]


def _saving_legend(comparison: Comparison) -> str:
    sizes = [graph.sizes[len(graph.sizes) // 2].tokens for graph in comparison.reports[0].graphs if graph.sizes]
    middles = ", ".join(str(tokens) for tokens in dict.fromkeys(sizes))
    return f"saved: us a step at the middle of each range ({middles} tokens)"


class _Policies:
    """Policies by rules and by ranges: a table where the terminal is wide enough for it, else one paragraph a
    policy.
    """

    def __init__(self, comparison: Comparison, rules: Sequence[str]) -> None:
        self.comparison, self.rules = comparison, rules
        self.spans = list(dict.fromkeys(graph.range for graph in comparison.reports[0].graphs))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        names = max(len(name) for name in map(policy_name, self.comparison.reports) if name.count(",") < 2)
        counts = names + 3 + sum(max(len(rule), len("0 of 1000, starved")) + 3 for rule in self.rules)
        savings = sum(max(len(_span(span)), 8) + 3 for span in self.spans)
        if counts + savings <= options.max_width:
            yield self._table(self.rules, self.spans)
        elif counts <= options.max_width:
            yield self._table(self.rules, ())
            yield Text()
            yield self._table((), self.spans)
        else:
            yield self._paragraphs()

    def _table(self, rules: Sequence[str], spans: Sequence[tuple[int, int] | None]) -> Table:
        table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
        table.add_column("policy", overflow="fold")
        for rule in rules:
            table.add_column(rule, justify="right", no_wrap=True)
        for span in spans:
            table.add_column(_span(span), justify="right", no_wrap=True)
        for report in self.comparison.reports:
            cells = [_cell(report, rule) for rule in rules]
            table.add_row(policy_name(report), *cells, *(self._saved(report, span) for span in spans))
        return table

    def _paragraphs(self) -> Group:
        lines: list[RenderableType] = []
        for report in self.comparison.reports:
            lines.append(Text(policy_name(report), style="bold"))
            listed = [rule for rule in self.rules if not report.order or rule in report.order]
            lines += [_indented(Text(f"{rule}  ").append_text(_cell(report, rule)), 4) for rule in listed]
            saved = [Text(f"{_span(span)}: ").append_text(self._saved(report, span)) for span in self.spans]
            lines.append(_indented(Text("saved  ").append_text(Text(", ").join(saved)), 4))
        return Group(*lines)

    def _saved(self, report: Report, span: tuple[int, int] | None) -> Text:
        best = max(_saved_ns(each, span) for each in self.comparison.reports)
        saved_ns = _saved_ns(report, span)
        return Text(f"{saved_ns / 1000:.1f}", style="green" if saved_ns == best and best > 0 else "")


def _saved_ns(report: Report, span: tuple[int, int] | None) -> int:
    return sum(graph.saved_ns for graph in report.graphs if graph.range == span)


def _span(span: tuple[int, int] | None) -> str:
    return f"saved {_tokens(span)}" if span else "saved"


def _tokens(span: tuple[int, int]) -> str:
    first, last = span
    return str(first) if first == last else f"{first}-{last}"


def _matters(comparison: Comparison, rule: str) -> bool:
    return any(report.matched.get(rule, 0) for report in comparison.reports)


def _starved(report: Report, rule: str) -> bool:
    return bool(report.order) and report.matched.get(rule, 0) > 0 and not report.fused.get(rule, 0)


def _cell(report: Report, rule: str) -> Text:
    fused, matched = report.fused.get(rule, 0), report.matched.get(rule, 0)
    style = "bold red" if _starved(report, rule) else "green" if fused else "dim"
    if report.order and rule not in report.order:
        return Text("not listed", style="dim")
    cell = Text(str(fused), style=style).append(f" of {matched}", style="dim")
    return cell.append(", starved", style="bold red") if _starved(report, rule) else cell


def _conflicts(comparison: Comparison) -> list[RenderableType]:
    """One paragraph for each set of places: who wants them, and who gets them under each policy."""
    contests: dict[tuple[str, tuple[str, ...]], list[tuple[Report, ConflictClass]]] = {}
    for report in comparison.reports:
        for conflict in (each for each in report.conflicts if each.winner != UNFUSED):
            contests.setdefault((conflict.op, conflict.sources), []).append((report, conflict))
    lines: list[RenderableType] = []
    for (op, sources), rows in contests.items():
        rules = sorted({rule for _, conflict in rows for rule in conflict.rules})
        text = f"{_enumerate(rules)} want the same {op}, which can be in one fusion only"
        lines.append(Text.assemble(("conflict  ", "bold yellow"), text))
        lines += [_indented(f"where  {places(sources)}")] if sources else []
        for report in comparison.reports:
            mine = [conflict for owner, conflict in rows if owner is report]
            lines += [_indented(_verdict(report, mine))] if mine else []
    return lines


def _verdict(report: Report, conflicts: Sequence[ConflictClass]) -> Text:
    verdict = Text(f"{policy_name(report)}: ")
    winners = {conflict.winner: conflict.count for conflict in conflicts}
    verdict.append(_enumerate([f"{rule} takes {count}" for rule, count in winners.items()]), style="green")
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
    flips = "" if conflict.flips_at_us is None else f", wins below {conflict.flips_at_us:.1f} us"
    return f" (would save {text}{flips})"


def _enumerate(parts: Sequence[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else parts[0]


def _not_worth_it(comparison: Comparison) -> list[RenderableType]:
    """Of the first policy: matches that nothing else wants, and that cost more than they save."""
    lines: list[RenderableType] = []
    for conflict in comparison.reports[0].conflicts:
        if conflict.winner == UNFUSED:
            where = places(conflict.sources)
            title = f"{conflict.loser} in {_count(conflict.count, 'place')}{f': {where}' if where else ''}"
            lines.append(Text.assemble(("not worth it  ", "bold yellow"), title))
            flips = (
                "" if conflict.flips_at_us is None else f"; it would pay if its op took {conflict.flips_at_us:.1f} us"
            )
            lines.append(_indented(f"leaving it to Inductor is {conflict.lost_us or 0:.1f} us a place cheaper{flips}"))
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
    notes = "".join(f"note  {note}\n" for note in comparison.notes)
    return Text(f"{notes}time  {', '.join(times)}", style="dim")


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


def _indented(content: str | Text, columns: int = 10) -> Padding:
    return Padding(content if isinstance(content, Text) else Text(content), (0, 0, 0, columns))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
