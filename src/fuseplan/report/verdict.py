"""The result of checking a lock: a line where it holds, a paragraph for each cause where it doesn't, or JSON."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from fuseplan.record import Refusal, to_json
from fuseplan.record.text import count_of, printable
from fuseplan.report.drift import Drift, DriftKind
from fuseplan.report.lock import FusionLock
from fuseplan.report.paragraphs import Line, break_paragraphs, drift_paragraphs, plain, render_paragraphs

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The result of a check.

    Attributes:
        path: of the lock, as the user named it.
        lock: the file's content after the check.
        found: the model's fusions.
        drifts: the differences between the former lock and the model.
        resettled: settings that were changed, with their texts before and after.
        breaks: graph breaks met while tracing, one line each.
        warnings: flags and selectors without effect.
        written: whether the file was written.
        fix: what to do where the differences are intended.
    """

    path: str
    lock: FusionLock
    found: FusionLock
    drifts: tuple[Drift, ...] = ()
    resettled: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    breaks: tuple[str, ...] = ()
    warnings: tuple[Refusal, ...] = ()
    written: bool = False
    fix: str = ""

    @property
    def passed(self) -> bool:
        """Whether the file and the model agree, also where the file was just written."""
        return self.written or not self.drifts

    @property
    def headline(self) -> str:
        """The result, in one line."""
        if not self.passed:
            return printable(f"{self.path} doesn't hold: {self._changes} ({self._question})")
        verb = f"wrote {self.path}" if self.written else f"{self.path} holds"
        changed = f"; {self._changes}" if self.drifts else ""
        return printable(f"{verb}: {self._fusions} of {self._question}{changed}")

    @property
    def text(self) -> str:
        """All of it, plain."""
        paragraphs = self.paragraphs
        tail = [self.fix] if self.fix and not self.passed else []
        return "\n\n".join([self.headline, *([plain(paragraphs)] if paragraphs else []), *tail])

    @property
    def paragraphs(self) -> list[list[Line]]:
        """The changes with their causes, and the graph breaks; empty where nothing changed."""
        if not self.drifts:
            return []
        return drift_paragraphs(self.drifts, len(self.lock.settings.spans)) + break_paragraphs(self.breaks)

    @property
    def _changes(self) -> str:
        counts = Counter[DriftKind]()
        for drift in self.drifts:
            counts[drift.change] += drift.count
        return ", ".join(f"{counts[change]} {change.value}" for change in DriftKind if counts[change])

    @property
    def _fusions(self) -> str:
        fused = self.lock.fused
        total = sum(fused.values())
        each = ", ".join(f"{rule} {count}" for rule, count in fused.items())
        return f"{count_of(total, 'fusion')}{f' ({each})' if each else ''}"

    @property
    def _question(self) -> str:
        settings = self.lock.settings
        ranks = f", TP={settings.tp}" if settings.tp is not None else ""
        return f"{settings.workload}{ranks}, {settings.policy} for {settings.device}"


def render_verdict(verdict: Verdict) -> RenderableType:
    """A verdict for a terminal."""
    parts: list[RenderableType] = [Text(verdict.headline, style="green" if verdict.passed else "bold red")]
    parts += [Text(printable(f"{name}: {before} -> {after}")) for name, (before, after) in verdict.resettled.items()]
    if verdict.drifts:
        parts += [Text(), render_paragraphs(verdict.paragraphs)]
    if verdict.fix and not verdict.passed:
        parts += [Text(), Text(verdict.fix, style="dim")]
    return Group(*parts)


def verdict_to_json(verdict: Verdict) -> dict[str, Any]:
    """The object that `fuseplan check --json` prints; its shape is a contract, versioned by `schema`."""
    settings = verdict.lock.settings
    return {
        "schema": SCHEMA,
        "lock": verdict.path,
        "passed": verdict.passed,
        "written": verdict.written,
        "workload": settings.workload,
        "tp": settings.tp,
        "device": settings.device,
        "policy": settings.policy,
        "ranges": [list(span) if span else None for span in settings.spans],
        "fused": verdict.found.fused,
        "locked": verdict.lock.fused,
        "per_range": [
            {"range": list(span) if span else None, "fused": verdict.found.fused_in(span)} for span in settings.spans
        ],
        "settings": {name: {"before": old, "after": new} for name, (old, new) in verdict.resettled.items()},
        "differences": [to_json(drift) for drift in verdict.drifts],
        "warnings": [to_json(warning) for warning in verdict.warnings],
        "breaks": list(verdict.breaks),
    }
