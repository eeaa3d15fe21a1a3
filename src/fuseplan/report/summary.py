"""The result of one compilation, in a line of `logging`."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from fuseplan.record import Comparison, Reason, Report
from fuseplan.record.text import printable, shown
from fuseplan.report.savings import verdict

LOGGER = "fuseplan.compiled"
"""Says one line at INFO. `logging.getLogger("fuseplan.compiled").setLevel(logging.WARNING)` switches it off."""


def alone(report: Report, name: str = "model") -> Comparison:
    """A report as the only one of a comparison."""
    spans = dict.fromkeys(graph.range for graph in report.graphs)
    devices = dict.fromkeys(graph.plan.device for graph in report.graphs if graph.plan is not None)
    return Comparison(
        workload=name, tp=1, device=", ".join(devices), ranges=tuple(span for span in spans if span), reports=(report,)
    )


def summary(report: Report) -> str:
    """The fusions and their saving, or why there are none."""
    left = [
        each for graph in report.graphs for each in graph.refusals if each.reason in (Reason.TRAINING, Reason.DISABLED)
    ]
    if left and not any(graph.applied for graph in report.graphs):
        return f"Nothing is fused: {printable(left[0].detail)}."
    return verdict(alone(shown(report))).plain


def tell(report: Report) -> None:
    """Logs the summary. If logging isn't configured, it goes to standard error."""
    log = logging.getLogger(LOGGER)
    if not log.handlers:
        log.addHandler(_Unconfigured())
        if log.level == logging.NOTSET:
            log.setLevel(logging.INFO)
    log.info("fuseplan: %s (all of it: on_report=print)", summary(report))


@contextmanager
def untold() -> Iterator[None]:
    """Without that line, where many models are compiled to be compared."""
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
