"""What a worker's graphs became, in its log and as a file; from a warm start, too."""

import hashlib
import logging
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed import distributed_c10d

from fuseplan import store
from fuseplan.config import Environment
from fuseplan.distributed import agree
from fuseplan.errors import UnsupportedError
from fuseplan.first_run import digest_of
from fuseplan.record import Report, stored
from fuseplan.record.report import merged

KEPT = "fuseplan_journal"

log = logging.getLogger("vllm.fuseplan")


class Journal:
    """The reports of one worker.

    Args:
        path: where its report is written.
        rank: of the worker, among all.
    """

    def __init__(self, path: Path, rank: int) -> None:
        self.path, self.rank = path, rank
        self.reports: list[Report] = []

    @classmethod
    def of(cls, config: Any) -> "Journal":
        """The one journal of a `VllmConfig`."""
        found = vars(config).get(KEPT)
        if found is None:
            found = vars(config)[KEPT] = cls(_path(config), config.parallel_config.rank)
        assert isinstance(found, cls)
        return found

    def add(self, report: Report) -> None:
        """Takes the report of one graph."""
        self.reports.append(report)

    def close(self) -> None:
        """Says what became of the model, after it was compiled or found in a cache: once.

        Raises:
            UnsupportedError: the ranks of a tensor-parallel group run different plans.
        """
        report = merged(self.reports) if self.reports else store.load_file(self.path)
        _agree(report)
        if report is None:
            log.warning(
                "no graph reached fuseplan on rank %d: the model is not compiled by Inductor, or an older cache of "
                "vLLM's holds it; see VLLM_DISABLE_COMPILE_CACHE=1 and the compilation mode", self.rank,
            )  # fmt: skip
            return
        if self.reports:
            stored.store(self.path, report)
        graphs = len(report.graphs)
        fused = ", ".join(f"{rule} {count}" for rule, count in report.fused.items())
        found = ", ".join(f"{op} {count}" for op, count in report.recognized.items())
        log.info(
            "fuseplan on rank %d: %d graph%s%s; fused: %s; recognised: %s; report: %s",
            self.rank, graphs, "" if graphs == 1 else "s", "" if self.reports else " from the cache",
            fused or "nothing", found or "nothing", self.path,
        )  # fmt: skip


def _path(config: Any) -> Path:
    """Beside vLLM's compile cache, by the same factors, or in `FUSEPLAN_REPORT_DIR`."""
    from vllm import envs

    model = getattr(config.model_config, "model", None)
    key = hashlib.sha256(f"{config.compute_hash()} {model}".encode()).hexdigest()[:10]
    name = f"rank_{config.parallel_config.rank}_{config.parallel_config.data_parallel_index}.json"
    folder = Environment.read().report_dir
    return (folder if folder is not None else Path(envs.VLLM_CACHE_ROOT) / "fuseplan" / key) / name


def _agree(report: Report | None) -> None:
    """Holds the ranks of the tensor-parallel group to one plan. All of them come here, after their models are compiled
    and before they serve.

    Raises:
        UnsupportedError: they run different plans.
    """
    from vllm.distributed.parallel_state import get_tp_group

    group = get_tp_group()
    if group.world_size == 1:
        return
    verdict = agree(
        distributed_c10d._get_process_group_store(group.cpu_group), graph="vllm", rank=group.rank_in_group,
        size=group.world_size, digest=digest_of(report), deadline=timedelta(minutes=10),
    )  # fmt: skip
    if not verdict.fused:
        raise UnsupportedError(
            f"the workers run different plans: {verdict.reason}; start them with one configuration and "
            "VLLM_DISABLE_COMPILE_CACHE=1, or set FUSEPLAN_VLLM=0"
        )
