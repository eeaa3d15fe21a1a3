"""The report on a worker's graphs, in its log and as a file; from a warm start, too."""

import hashlib
import logging
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed import distributed_c10d

from fuseplan.caching import store
from fuseplan.compilation.first_run import digest_of, pending_in
from fuseplan.config import Environment, PassConfig
from fuseplan.distributed import agree
from fuseplan.errors import UnsupportedError
from fuseplan.integrations.vllm.together import verified_by_all
from fuseplan.integrations.vllm.tuning import Tuning
from fuseplan.record import Pending, Report, Verification, stored
from fuseplan.record.report import again, merged

KEPT = "fuseplan_journal"

log = logging.getLogger("vllm.fuseplan")


class Journal:
    """The reports of one worker.

    Args:
        kept: a file beside vLLM's compile cache, keyed by the same factors, since a warm start brings no graph.
        path: the file for the user.
        rank: of the worker, among all.

    Attributes:
        reports: of the graphs that were compiled here.
        tuning: takes graphs to measure; None: none are measured.
    """

    def __init__(self, kept: Path, path: Path, rank: int) -> None:
        self.kept, self.path, self.rank = kept, path, rank
        self.reports: list[Report] = []
        self._compiled: dict[int, tuple[object, list[Report]]] = {}
        self._verified: dict[Pending, Verification] = {}
        self._is_silent = False
        self.tuning: Tuning | None = None

    @classmethod
    def of(cls, config: Any) -> "Journal":
        """The one journal of a `VllmConfig`."""
        found = vars(config).get(KEPT)
        if found is None:
            found = vars(config)[KEPT] = cls(*_paths(config), config.parallel_config.rank)
        assert isinstance(found, cls)
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> "Journal":
        """Itself: vLLM copies its configuration for a second model in a worker."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Without the reports: vLLM writes its configuration beside its cache."""
        return type(self), (self.kept, self.path, self.rank)

    def add(self, report: Report) -> None:
        """Takes the report of one graph."""
        self.reports.append(report)
        if pending_in([report]):
            # vLLM may cache compiled graphs before they are verified, and the engine may end in between.
            _write(self.kept, merged(self.reports))

    def note(self, compiled: object, before: int) -> None:
        """Takes a result of vLLM's backend: equal pieces share one, and a pass sees only the first of them.

        Args:
            compiled: the result.
            before: the number of reports before it.
        """
        if len(self.reports) > before:
            self._compiled[id(compiled)] = compiled, self.reports[before:]
            return
        _, known = self._compiled.get(id(compiled), (None, []))
        for report in known:
            self.reports.append(replace(report, graphs=tuple(again(each, before) for each in report.graphs)))

    @property
    def is_lasting(self) -> bool:
        """Whether the graphs compiled here may be cached."""
        return all(graph.is_lasting for report in self.reports for graph in report.graphs)

    def settle(self, config: PassConfig, give_up: Callable[[], None]) -> None:
        """Has all workers verify pending fusions together, if there are any: of the graphs that were compiled here, or
        of those that a warm start brings.

        Args:
            config: as for `verified_by_all`.
            give_up: as for `verified_by_all`.

        Raises:
            UnsupportedError: as for `verified_by_all`.
            CollectiveError: as for `verified_by_all`.
        """
        kept = None if self.reports else store.load_file(self.kept)
        if kept is not None and pending_in([kept]):
            _write(self.kept, *verified_by_all([kept], config, self._verified, give_up))
        elif pending_in(self.reports):
            self.reports = verified_by_all(self.reports, config, self._verified, give_up)

    def silence(self) -> None:
        """Suppresses the log line: another one said that fuseplan does nothing."""
        self._is_silent = True

    def close(self) -> None:
        """Logs the result, once, after the model was compiled or found in a cache.

        Raises:
            UnsupportedError: the ranks of a tensor-parallel group run different plans.
        """
        self._compiled.clear()
        if self._is_silent:
            return
        report = merged(self.reports) if self.reports else store.load_file(self.kept)
        is_first = _agree(report)
        if report is None:
            if is_first:
                log.warning(
                    "no graph reached fuseplan: the model is not compiled by Inductor, or an older cache of vLLM's "
                    "holds it; see VLLM_DISABLE_COMPILE_CACHE=1 and the compilation mode"
                )
            return
        is_written = not self.reports or _write(self.kept, report)
        if self.path != self.kept:
            is_written = _write(self.path, report)
        graphs = len(report.graphs)
        # Users have to see rules that found places and fused none of them.
        fused = ", ".join(
            f"{rule} {count}" if count else f"{rule} 0 of {report.matched[rule]}"
            for rule, count in report.fused.items()
            if count or report.matched[rule]
        )
        found = ", ".join(f"{op} {count}" for op, count in report.recognized.items())
        log.info(
            "fuseplan on rank %d: %d graph%s%s; fused: %s; recognised: %s; report: %s",
            self.rank, graphs, "" if graphs == 1 else "s", "" if self.reports else " from the cache",
            fused or "nothing", found or "nothing", self.path if is_written else "not written",
        )  # fmt: skip


def _write(path: Path, report: Report) -> bool:
    """Writes a file. A folder that can't be written to is no reason to stop an engine."""
    try:
        stored.store(path, report)
    except OSError as error:
        log.warning("fuseplan can't write its report to %s: %s", path, error.strerror or error)
        return False
    return True


def _paths(config: Any) -> tuple[Path, Path]:
    """The paths beside vLLM's compile cache, and in `FUSEPLAN_REPORT_DIR`."""
    from vllm import envs

    model = getattr(config.model_config, "model", None)
    key = hashlib.sha256(f"{config.compute_hash()} {model}".encode()).hexdigest()[:10]
    name = f"rank_{config.parallel_config.rank}_{config.parallel_config.data_parallel_index}.json"
    kept = Path(envs.VLLM_CACHE_ROOT) / "fuseplan" / key / name
    folder = Environment.read().report_dir
    return kept, kept if folder is None else folder / name


def _agree(report: Report | None) -> bool:
    """Checks that the ranks of the tensor-parallel group run one plan. All of them call it, after their models are
    compiled and before they serve.

    Returns:
        Whether this is the first rank.

    Raises:
        UnsupportedError: they run different plans.
    """
    from vllm.distributed.parallel_state import get_tp_group

    group = get_tp_group()
    if group.world_size == 1:
        return True
    verdict = agree(
        distributed_c10d._get_process_group_store(group.cpu_group), graph="vllm", rank=group.rank_in_group,
        size=group.world_size, digest=digest_of(report), deadline=timedelta(minutes=10),
    )  # fmt: skip
    if not verdict.fused:
        raise UnsupportedError(
            f"the workers run different plans: {verdict.reason}; start them with one configuration and "
            "VLLM_DISABLE_COMPILE_CACHE=1, or set FUSEPLAN=0"
        )
    return bool(group.rank_in_group == 0)
