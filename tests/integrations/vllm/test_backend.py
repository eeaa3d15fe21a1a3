"""vLLM's own backend, as GPUs have it: a model split at attention, pieces compiled for each compile range and kept in
vLLM's cache. It runs on a CPU once it is let.
"""

import re
from pathlib import Path
from typing import Any

import pytest

from fuseplan.planner.costs import CostTable, Provenance
from tests.integrations.vllm.checkpoints import DEEPER, HEAD, HIDDEN
from tests.integrations.vllm.conftest import Engines, Run, check_close

RANGES = ((1, 64), (65, 512))
COMPILATION: dict[str, Any] = {"compilation_config": {"compile_sizes": [], "compile_ranges_endpoints": [64]}}
FUSED: dict[str, Any] = {**COMPILATION, "additional_config": {"fuseplan": {"policy": "ordered(qk_norm_rope)"}}}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def cold(engines: Engines, cache: Path) -> list[Run]:
    """Without fuseplan, and with it."""
    return engines("deep_qwen3", [({}, COMPILATION), ({}, FUSED)], cache, as_on_gpus=True)


def test_pieces_are_planned_for_each_range(cold: list[Run]) -> None:
    """A piece before the first attention, one between each two and one behind the last; of those between, which are
    alike, vLLM compiles the first.
    """
    stock, ours = cold
    assert not stock.lines
    assert ours.tokens == stock.tokens
    check_close(ours, stock)
    (report,) = ours.reports.values()
    assert [graph.range for graph in report.graphs].count(RANGES[0]) == DEEPER + 1
    assert len({(graph.graph, graph.range) for graph in report.graphs}) == len(report.graphs) == 2 * (DEEPER + 1)
    norms = {op: n for op, n in report.recognized.items() if "norm" in op}
    assert norms == {
        f"rms_norm[{HIDDEN}]": 2, f"fused_add_rms_norm[{HIDDEN}]": 2 * 2 * DEEPER, f"rms_norm[{HEAD}]": 2 * 2 * DEEPER
    }  # fmt: skip
    assert report.per_range == {span: {"qk_norm_rope": DEEPER} for span in RANGES}


def test_a_warm_start_is_as_a_cold_one(cold: list[Run], cache: Path, engines: Engines) -> None:
    """What vLLM has in its cache doesn't come by fuseplan again: its report is kept beside it."""
    _, first = cold
    (warm,) = engines("deep_qwen3", [({}, FUSED)], cache, forced=first.forced, as_on_gpus=True)
    assert warm.tokens == first.tokens
    assert warm.log_probabilities == first.log_probabilities
    summary = rf"rank 0: {2 * (DEEPER + 1)} graphs%s; (fused: qk_norm_rope {2 * DEEPER}; recognised: .*)"
    (now,), (then,) = re.findall(summary % " from the cache", warm.log), re.findall(summary % "", first.log)
    assert now == then


def test_fusions_are_measured_as_vllm_compiles_them(tmp_path: Path, engines: Engines) -> None:
    """In its pieces and ranges, its norms lowered as it lowers them; the next engine plans by what was measured."""
    table = tmp_path / "costs.json"
    asked = {**COMPILATION, "additional_config": {"fuseplan": {"enable_qk_norm_rope_fusion": True}}}
    starts = [({"FUSEPLAN_TUNE": str(table)}, asked), ({"FUSEPLAN_COSTS": str(table)}, asked)]
    tuned, served = engines("qwen3", starts, tmp_path / "cache", as_on_gpus=True)
    assert served.tokens == tuned.tokens
    rows = CostTable.load(table).rows
    assert {row.provenance for row in rows} == {Provenance.MEASURED}
    assert {row.key.rpartition(": ")[2] for row in rows} == {"unfused", "qk_norm_rope qk_norm_rope torch"}
    assert {row.tokens for row in rows} == {4 * size for size in (1, 8, 64, 65, 182, 512)}, "four heads of queries"
    assert f"measured {len(rows)} rows of 1 kinds of sites" in tuned.log
    assert f"start again with FUSEPLAN_COSTS={table} in place of FUSEPLAN_TUNE" in tuned.log
    (report,) = served.reports.values()
    found = [each for graph in report.graphs for each in (*graph.applied, *(loss.fusion for loss in graph.lost))]
    assert {each.provenance for each in found} == {"measured"}
