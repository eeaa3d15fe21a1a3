"""Debug dumps: one folder a graph under `FUSEPLAN_DEBUG_DIR`.

1-before.txt      the graph as Inductor handed it over
2-canonical.txt   its copy in the dialect
3-after.txt       the graph with the chosen fusions, if there are any
patterns.txt      every rule's pattern as Inductor's matcher sees it
matches.txt       every candidate: chosen, or the fusions that took its nodes, and its saving
report.json       the record of all that
"""

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import fx
from torch._logging._internal import warning_once

from fuseplan.config import CompileRange
from fuseplan.graph.canonical import CanonicalGraph
from fuseplan.matching import Matches, compiled_pattern
from fuseplan.planner import Decision, Problem
from fuseplan.record import GraphReport, to_json
from fuseplan.record.text import one_line
from fuseplan.rules import Rule

log = logging.getLogger("fuseplan")


@dataclass(frozen=True)
class DebugDump:
    """Writes the files of one graph, or nothing where `folder` is None."""

    folder: Path | None

    @classmethod
    def open(cls, directory: Path | None, graph: str, compile_range: CompileRange | None) -> "DebugDump":
        """A folder for one graph: `<graph>[-<first>-<last>]-pid<process>`."""
        if directory is None:
            return cls(None)
        suffix = f"-{compile_range.start}-{compile_range.end}" if compile_range else ""
        folder = directory / f"{graph}{suffix}-pid{os.getpid()}"
        with _errors_logged():
            folder.mkdir(parents=True, exist_ok=True)
        return cls(folder)

    def graph(self, name: str, graph: fx.Graph) -> None:
        """A graph as readable Python."""
        if self.folder is not None:
            owner = graph.owning_module
            module = fx.GraphModule(owner if owner is not None else {}, graph)
            self._write(
                f"{name}.txt", module.print_readable(print_output=False, include_stride=True, include_device=True)
            )

    def analysis(
        self,
        canonical: CanonicalGraph,
        rules: Mapping[str, tuple[Rule, ...]],
        matches: Matches,
        problem: Problem,
        decision: Decision,
    ) -> None:
        """The canonical graph, the patterns and the table of matches."""
        if self.folder is None:
            return
        self.graph("2-canonical", canonical.graph)
        patterns = [
            f"{name} [{rule.describe()}]\n    {compiled_pattern(rule).expression!r}\n"
            for name, members in rules.items()
            for rule in members
        ]
        self._write("patterns.txt", "\n".join(patterns))
        lost = {each.candidate: each for each in decision.lost}
        lines = []
        for index, candidate in enumerate(problem.candidates):
            fate = "chosen    " if index in decision.selected else "not chosen"
            winners = {problem.candidates[winner].rule for winner in lost[index].blocked_by} if index in lost else set()
            why = f"  lost to {', '.join(sorted(winners))}" if winners else ""
            where = f"  {candidate.source}" if candidate.source else ""
            saving = f"{problem.program.savings_ns[index] / 1000:+9.2f} us"
            anchor = canonical.source_node(candidate.anchor).name
            lines.append(
                f"{fate} {saving} {candidate.rule:16} {candidate.op:40} {candidate.provider:10} {anchor}{where}{why}"
            )
        refused = [
            f"refused    {refusal.rule or '-':16} {refusal.reason}: {refusal.detail}" for refusal in matches.refusals
        ]
        self._write("matches.txt", "\n".join([*lines, *refused]) + "\n")

    def report(self, report: GraphReport) -> None:
        """The record as JSON."""
        if self.folder is not None:
            self._write("report.json", json.dumps(to_json(report), indent=1))

    def _write(self, name: str, text: str) -> None:
        assert self.folder is not None
        with _errors_logged():
            # A name in a model may not be valid text.
            (self.folder / name).write_text(text, encoding="utf-8", errors="backslashreplace")


@contextmanager
def _errors_logged() -> Iterator[None]:
    """Logs a dump that can't be written: it is no reason to fail a compilation."""
    try:
        yield
    except OSError as error:
        warning_once(log, "%s", one_line(f"FUSEPLAN_DEBUG_DIR: {error}; dumps are left out"))
