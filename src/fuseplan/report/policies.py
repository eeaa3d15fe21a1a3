"""Policies by rules and by compile ranges: how often each rule fired, and what that saves."""

from collections.abc import Sequence

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from fuseplan.record import Comparison, Report
from fuseplan.report.text import indented, policy_name, tokens_of


class Policies:
    """Policies by rules and by ranges: a table where the terminal is wide enough for it, else one paragraph a
    policy.
    """

    def __init__(self, comparison: Comparison, rules: Sequence[str]) -> None:
        self.comparison, self.rules = comparison, rules
        self.spans = list(dict.fromkeys(graph.range for graph in comparison.reports[0].graphs))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        short = [name for name in map(policy_name, self.comparison.reports) if name.count(",") < 2]
        names = max(map(len, short or ["planned"]))  # longer ones fold
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
            table.add_column(Text(rule), justify="right", no_wrap=True)
        for span in spans:
            table.add_column(_span(span), justify="right", no_wrap=True)
        for report in self.comparison.reports:
            cells = [_cell(report, rule) for rule in rules]
            table.add_row(Text(policy_name(report)), *cells, *(self._saved(report, span) for span in spans))
        return table

    def _paragraphs(self) -> Group:
        lines: list[RenderableType] = []
        for report in self.comparison.reports:
            lines.append(Text(policy_name(report), style="bold"))
            listed = [rule for rule in self.rules if not report.order or rule in report.order]
            lines += [indented(Text(f"{rule}  ").append_text(_cell(report, rule)), 4) for rule in listed]
            saved = [Text(_at(span)).append_text(self._saved(report, span)) for span in self.spans]
            lines.append(indented(Text("saved  ").append_text(Text(", ").join(saved)), 4))
        return Group(*lines)

    def _saved(self, report: Report, span: tuple[int, int] | None) -> Text:
        best = max(_saved_ns(each, span) for each in self.comparison.reports)
        saved_ns = _saved_ns(report, span)
        return Text(f"{saved_ns / 1000:.1f}", style="green" if saved_ns == best and best > 0 else "")


def _saved_ns(report: Report, span: tuple[int, int] | None) -> int:
    return sum(graph.saved_ns for graph in report.graphs if graph.range == span)


def _span(span: tuple[int, int] | None) -> str:
    return f"saved {tokens_of(span)}" if span else "saved"


def _at(span: tuple[int, int] | None) -> str:
    return f"{tokens_of(span)}: " if span else ""


def matters(comparison: Comparison, rule: str) -> bool:
    """Whether a rule matches anywhere."""
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
