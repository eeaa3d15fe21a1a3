"""The result of one compilation, in a line of `logging`."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from fuseplan.record import Comparison, Report
from fuseplan.record.text import shown
from fuseplan.report.savings import Saved, at_size, share_text, spans_of, us, verdict, where_of
from fuseplan.report.text import policy_name

LOGGER = "fuseplan.compiled"
"""Says one line at INFO. `logging.getLogger("fuseplan.compiled").setLevel(logging.WARNING)` switches it off."""


def alone(report: Report, name: str = "model") -> Comparison:
    """A comparison of one report."""
    spans = dict.fromkeys(graph.range for graph in report.graphs)
    devices = dict.fromkeys(graph.plan.device for graph in report.graphs if graph.plan is not None)
    return Comparison(
        workload=name, tp=1, device=", ".join(devices), ranges=tuple(span for span in spans if span), reports=(report,)
    )


def summary(report: Report) -> str:
    """Where something is fused, and the saving as a share; or why nothing is."""
    report = shown(report)
    comparison = alone(report)
    if not any(graph.applied for graph in report.graphs):
        text = verdict(comparison).plain
        return f"{text[0].lower()}{text[1:]}"
    span = spans_of(comparison)[0]
    saved = Saved.of(report, span)
    who = "" if report.policy == "planned" else f"{policy_name(report)}: "
    is_gain = saved.saved_ns >= 0
    interval = f" ({saved.interval})" if is_gain and saved.interval else ""
    return (
        f"{who}fused in {where_of(report, span)}. Estimated {'saving' if is_gain else 'loss'}: "
        f"{us(abs(saved.saved_ns))} us a step{interval}{at_size(comparison, span)}, {share_text(report, saved)}."
    )


def tell(report: Report, *, hint: bool = True) -> None:
    """Logs the summary. If logging isn't configured, it goes to standard error.

    Args:
        report: of one compilation.
        hint: whether to add how to get the full report.
    """
    log = logging.getLogger(LOGGER)
    if not log.handlers:
        log.addHandler(_Unconfigured())
        if log.level == logging.NOTSET:
            log.setLevel(logging.INFO)
    log.info("fuseplan: %s%s", summary(report), " Full report: on_report=print" if hint else "")


@contextmanager
def untold() -> Iterator[None]:
    """Suppresses that line while many models are compiled for a comparison."""
    log = logging.getLogger(LOGGER)
    log.disabled = True
    try:
        yield
    finally:
        log.disabled = False


class _Unconfigured(logging.Handler):
    """Prints where no logger above has a handler, which would do so itself."""

    def emit(self, record: logging.LogRecord) -> None:
        above = logging.getLogger(LOGGER).parent
        if above is None or not above.hasHandlers():
            sys.stderr.write(f"{self.format(record)}\n")
