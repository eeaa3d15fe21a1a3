"""Policies by rules and by compile ranges: how often each rule fired, and the saving as a share."""

from collections.abc import Sequence

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from fuseplan.record import Comparison, Report
from fuseplan.report.lock import Span
from fuseplan.report.savings import Saved, counts_of_step, is_fixed, is_starved, spans_of, us
from fuseplan.report.text import enumerate_names, indented, policy_name, tokens_of

LONGEST_NAME = 24
"""Columns of a policy's name in the table; longer ones take several lines."""

LONGEST_RULE = 10
"""Columns of a rule's name."""

GAP = 2

WHOLE = "us unfused, of a step"
"""The row of the totals that savings are a share of."""

SURE = "80 % interval, us"
"""The row of the interval of the first policy's saving."""


class Policies:
    """Policies by rules and by ranges: a table where the terminal is wide enough, two where it is not, and else one
    paragraph a policy. Policies with the same fusions share a row.
    """

    def __init__(self, comparison: Comparison, rules: Sequence[str]) -> None:
        self.comparison, self.rules = comparison, rules
        self.spans = spans_of(comparison)
        self.is_fixed = is_fixed(comparison)
        self._knows_steps = any(Saved.of(each, span).step_ns for each in comparison.reports for span in self.spans)
        self.alike = alike([each for each in comparison.reports if each.policy != "off"] or comparison.reports)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        labels = [WHOLE, SURE, *(policy_name(report) for report, *_ in self.alike)]
        names = max(len(line) for label in labels for line in _broken(label, ", ", LONGEST_NAME))
        counts, savings = self._widths()
        if names + counts + savings <= options.max_width:
            yield self._table(self.rules, self.spans)
        elif names + max(counts, savings) <= options.max_width:
            yield self._table(self.rules, ())
            yield Text()
            yield self._table((), self.spans)
        else:
            yield self._paragraphs()
        yield from (Text(line, style="dim") for line in self._legend())

    def _widths(self) -> tuple[int, int]:
        """Columns of the counts and of the savings."""
        counts = [
            max(
                *map(len, _broken(rule, "_", LONGEST_RULE)),
                *(len(self._count(each, rule).plain) for each, *_ in self.alike),
            )
            for rule in self.rules
        ]
        cells = [(span, [self._saved(each, span) for each, *_ in self.alike]) for span in self.spans]
        savings = [
            max(
                len(text)
                for text in (
                    *self._head(span).split("\n"),
                    self._whole(span),
                    *self._sure,
                    *(cell.plain for cell in row),
                )
            )
            for span, row in cells
        ]
        return sum(counts) + GAP * len(counts), sum(savings) + GAP * len(savings)

    def _table(self, rules: Sequence[str], spans: Sequence[Span]) -> Table:
        table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), header_style="bold")
        table.add_column("policy", no_wrap=True)
        for rule in rules:
            table.add_column(Text("\n".join(_broken(rule, "_", LONGEST_RULE))), justify="right", no_wrap=True)
        for span in spans:
            table.add_column(Text(self._head(span)), justify="right", no_wrap=True)
        for report, *_ in self.alike:
            cells = [self._count(report, rule) for rule in rules]
            name = "\n".join(_broken(policy_name(report), ", ", LONGEST_NAME))
            table.add_row(Text(name), *cells, *(self._saved(report, span) for span in spans))
        if spans:
            wholes = [self._whole(span) for span in spans]
            table.add_row(Text(WHOLE, style="dim"), *("" for _ in rules), *(Text(each, style="dim") for each in wholes))
            if any(sure := self._sure):
                table.add_row(
                    Text(SURE, style="dim"), *("" for _ in rules), *(Text(each, style="dim") for each in sure)
                )
        return table

    def _paragraphs(self) -> Group:
        lines: list[RenderableType] = []
        for report, *_ in self.alike:
            lines.append(Text(policy_name(report), style="bold"))
            listed = [rule for rule in self.rules if not report.order or rule in report.order]
            lines += [indented(Text(f"{rule}  ").append_text(self._count(report, rule)), 4) for rule in listed]
            lines += [indented(self._in_words(report, span), 4) for span in self.spans]
        lines.append(Text("unfused", style="dim"))
        wholes = [Text(f"{self._at(span)}{self._whole(span)} us of a step", style="dim") for span in self.spans]
        return Group(*lines, *(indented(each, 4) for each in wholes))

    def _in_words(self, report: Report, span: Span) -> Text:
        """A policy's saving, in words."""
        saved = Saved.of(report, span)
        step = f", {saved.step_share} of a step" if self._knows_steps else ""
        return Text(f"{self._at(span)}saves {us(saved.saved_ns)} us, {saved.share} of the ops{step}")

    def _at(self, span: Span) -> str:
        return "" if span is None or self.is_fixed else f"{tokens_of(span)} tokens: "

    def _head(self, span: Span) -> str:
        """The range, and under it the units of a cell."""
        units = "us  ops  step" if self._knows_steps else "us  ops"
        return units if span is None or self.is_fixed else f"{tokens_of(span)} tokens\n{units}"

    def _count(self, report: Report, rule: str) -> Text:
        """How often a rule fired in a step, of its matches; range by range where that differs."""
        if report.order and rule not in report.order:
            return Text("-", style="dim")
        ranges = counts_of_step(report, rule)
        fused, matched = (list(dict.fromkeys(column)) for column in zip(*ranges, strict=True))
        counts = fused if len(fused) == 1 else [count for count, _ in ranges]
        if is_starved(report, rule):
            return Text("starved", style="bold red")
        cell = Text("/".join(map(str, counts)), style="green" if any(counts) else "dim")
        return cell.append(f" of {max(matched)}", style="dim")

    def _saved(self, report: Report, span: Span) -> Text:
        best = max(Saved.of(each, span).saved_ns for each in self.comparison.reports)
        saved = Saved.of(report, span)
        cell = Text(us(saved.saved_ns), style="green" if saved.saved_ns == best and best > 0 else "")
        cell.append(f" {saved.share:>5}", style="dim")
        return cell.append(f" {saved.step_share:>5}" if self._knows_steps else "", style="dim")

    def _whole(self, span: Span) -> str:
        whole = Saved.of(self.comparison.reports[0], span)
        return us(whole.unfused_ns) + (f" of {us(whole.step_ns)}" if whole.step_ns else "")

    @property
    def _sure(self) -> list[str]:
        """The intervals of the first policy's saving, by range."""
        return [Saved.of(self.comparison.reports[0], span).interval for span in self.spans]

    def _legend(self) -> list[str]:
        """The meaning of the columns, and the policies with the same result."""
        texts = [self._count(each, rule).plain for each, *_ in self.alike for rule in self.rules]
        several = any("/" in text for text in texts)
        counts = f"counts: fused, of the matches in a step{', range by range' if several else ''}"
        step = "; step: of a whole step, estimated" if self._knows_steps else ""
        counts += "; starved: others took all of its nodes" if "starved" in texts else ""
        lines = [f"{counts}; us: saved a step{self._sizes()}; ops: share of the ops that fusions contend for{step}"]
        for report, *others in self.alike:
            if others:
                lines.append(f"{enumerate_names([*map(policy_name, (report, *others))])} do the same")
        return lines

    def _sizes(self) -> str:
        """The priced numbers of tokens; empty where the graphs serve one size alone."""
        graphs = [graph for graph in self.comparison.reports[0].graphs if graph.sizes]
        if self.is_fixed:
            return ""
        middles = dict.fromkeys(graph.sizes[len(graph.sizes) // 2].tokens for graph in graphs)
        ends = dict.fromkeys(
            f"{graph.sizes[0].tokens:,} to {graph.sizes[-1].tokens:,}" for graph in graphs if graph.range is None
        )
        valid = f"; priced for {' and '.join(ends)} tokens, valid for all" if ends else ""
        return f", at {', '.join(map(str, middles))} tokens{valid}"


def matters(comparison: Comparison, rule: str) -> bool:
    """Whether a rule matches anywhere."""
    return any(report.matched.get(rule, 0) for report in comparison.reports)


def alike(reports: Sequence[Report]) -> list[list[Report]]:
    """Reports that apply the same fusions, the first of each in front."""
    grouped: dict[object, list[Report]] = {}
    for report in reports:
        grouped.setdefault(tuple((graph.graph, graph.range, graph.applied) for graph in report.graphs), []).append(
            report
        )
    return list(grouped.values())


def _broken(text: str, at: str, longest: int) -> list[str]:
    """Lines of at most `longest` columns, broken behind a separator where that can be."""
    lines = [""]
    for word in (parts := text.split(at)):
        piece = word if word is parts[-1] else f"{word}{at}"
        if lines[-1] and len(lines[-1]) + len(piece.rstrip()) > longest:
            lines.append("")
        lines[-1] += piece
    return [line.rstrip() for line in lines]
