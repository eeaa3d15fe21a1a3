"""Graphs of workloads, of which a process traces each once: tests read them, and change copies alone."""

import contextlib
import functools
from collections.abc import Iterator

from torch import fx

from fuseplan.explanation.capture import capture
from fuseplan.workloads import catalog


@contextlib.contextmanager
def workload_graph(name: str, tp: int = 1, layers: int | None = None) -> Iterator[fx.Graph]:
    """The one graph of a workload, its leading dimensions unknown, inside the stand-in for the group of its ranks."""
    with catalog._stand_in_group(tp):
        yield _traced(name, tp, layers).graph


@functools.cache
def _traced(name: str, tp: int, layers: int | None) -> fx.GraphModule:
    with catalog.build(name, tp=tp, layers=layers) as built:
        (gm,) = capture(built.model, built.inputs, {}, dynamic=True).graphs
    return gm
