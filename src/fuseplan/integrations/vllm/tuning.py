"""Measuring a model's fusions as vLLM compiles it: in its pieces and compile ranges, with its lowering of ops."""

import logging
import time
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist
from torch import fx

from fuseplan.config import PassConfig
from fuseplan.errors import FuseplanError
from fuseplan.measurement.costs import Measurement, tune_problems
from fuseplan.measurement.tuning import LockStep, Ranks
from fuseplan.planner import Problem
from fuseplan.providers import BUILT_IN_PROVIDERS, ENGINE_PROVIDERS

log = logging.getLogger("vllm.fuseplan")

REPEATS = 9
DEADLINE_S = 600.0
"""How long a worker waits for the others; one of them may compile an alternative meanwhile."""


class Tuning:
    """The graphs of a worker to measure.

    Args:
        table: the file that rows are merged into.
    """

    def __init__(self, table: Path) -> None:
        self.table = table
        self._problems: list[tuple[Problem, tuple[int, int]]] = []
        self._lower: Callable[[fx.Graph], None] | None = None

    def add(self, problem: Problem, span: tuple[int, int], lower: Callable[[fx.Graph], None]) -> None:
        """Takes a graph before rewriting, with its compile range and vLLM's lowering."""
        self._problems.append((problem, span))
        self._lower = lower

    def run(self, config: PassConfig) -> None:
        """Measures, on all workers in lock step, and logs it. The engine goes on even if it fails."""
        from vllm.distributed.parallel_state import get_tp_group

        if not self._problems:
            log.warning("fuseplan didn't measure: no graph came by it; see the compilation mode")
            return
        size = get_tp_group().world_size
        if size != dist.get_world_size():
            log.warning("fuseplan didn't measure: it does where tensor parallelism alone spreads a model over GPUs")
            return
        ranks = LockStep.of_world(DEADLINE_S, log.error) if size > 1 else Ranks()
        start = time.monotonic()
        try:
            found = tune_problems(
                self._problems, table=self.table, tokens=(), repeats=REPEATS, config=config, ranks=ranks,
                providers=(*BUILT_IN_PROVIDERS, *ENGINE_PROVIDERS), command="FUSEPLAN_TUNE in vLLM", lower=self._lower,
            )  # fmt: skip
        except FuseplanError as error:
            log.warning("fuseplan didn't measure: %s", error)
            return
        if ranks.rank == 0:
            self._tell(found, time.monotonic() - start)

    def _tell(self, found: Measurement, seconds: float) -> None:
        for each in found.skipped:
            log.warning("fuseplan didn't measure %s of %s: %s", each.alternative or "any", each.site, each.reason)
        log.info(
            "fuseplan measured %d rows of %d kinds of sites in %.0f s; start again with FUSEPLAN_COSTS=%s in place of "
            "FUSEPLAN_TUNE", len(found.rows), len(found.classes), seconds, self.table,
        )  # fmt: skip
