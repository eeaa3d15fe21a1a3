"""What a worker says after warm-up, and where its report goes."""

import copy
import json
import logging
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed import distributed_c10d
from vllm.compilation.backends import VllmBackend
from vllm.distributed import parallel_state

from fuseplan.distributed.agreement import Agreement
from fuseplan.errors import UnsupportedError
from fuseplan.integrations.vllm import reports
from fuseplan.integrations.vllm.reports import Journal
from fuseplan.integrations.vllm.together import before_first_run
from fuseplan.record import Fusion, Report
from fuseplan.record.report import GraphReport
from fuseplan.record.serialization import from_json
from tests.integrations.vllm.conftest import Configure

Records = list[logging.LogRecord]


def report(name: str = "graph_0", **recognized: int) -> Report:
    graph = GraphReport(graph=name, range=(1, 64), recognized=recognized or {"rms_norm[64]": 3})
    return Report(policy="planned", order=(), rules=("allreduce_rms",), graphs=(graph,))


@pytest.fixture(autouse=True)
def group(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The tensor-parallel group."""
    found = SimpleNamespace(world_size=1, rank_in_group=0, cpu_group=None)
    monkeypatch.setattr(parallel_state, "get_tp_group", lambda: found)
    return found


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "cache/kept.json", tmp_path / "reports/rank_0_0.json", 0)


def read(path: Path) -> Report:
    return from_json(Report, json.loads(path.read_text()))


def test_a_report_is_written_where_it_was_asked_for_and_kept(journal: Journal, lines: Records) -> None:
    journal.add(report())
    journal.close()
    (record,) = lines
    assert record.getMessage() == (
        f"fuseplan on rank 0: 1 graph; fused: nothing; recognised: rms_norm[64] 3; report: {journal.path}"
    )
    assert read(journal.path) == read(journal.kept) == report()


def test_the_line_has_rules_that_found_places(journal: Journal, lines: Records) -> None:
    fusion = Fusion(rule="r", op="o", provider="p", anchor="n", consumed=("n",), contested_op="rms_norm", site="n")
    graph = GraphReport(graph="g", applied=(fusion,) * 2, matched={"r": 2, "pad": 3, "none": 0}, rewritten=True)
    journal.add(Report(policy="planned", order=(), rules=("r", "none", "pad"), graphs=(graph,)))
    journal.close()
    assert "; fused: r 2, pad 0 of 3; recognised: nothing; " in lines[0].getMessage()


def test_a_warm_start_finds_what_was_kept(journal: Journal, lines: Records) -> None:
    journal.add(report())
    journal.close()
    journal.path.unlink()
    Journal(journal.kept, journal.path, 0).close()
    assert "1 graph from the cache; fused: nothing; recognised: rms_norm[64] 3" in lines[-1].getMessage()
    assert read(journal.path).graphs[0].from_cache


def test_the_report_of_another_model_is_not_taken_for_this_one(journal: Journal, lines: Records) -> None:
    """Two engines with one `FUSEPLAN_REPORT_DIR`; the second finds its graphs in an older cache of vLLM's."""
    journal.add(report())
    journal.close()
    Journal(journal.kept.with_name("another.json"), journal.path, 0).close()
    assert "no graph reached fuseplan" in lines[-1].getMessage()


@pytest.mark.parametrize("rank", [0, 1])
def test_without_a_graph_the_first_rank_says_so(
    rank: int, journal: Journal, lines: Records, group: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    group.world_size, group.rank_in_group = 2, rank
    monkeypatch.setattr(distributed_c10d, "_get_process_group_store", lambda group: None)
    monkeypatch.setattr(reports, "agree", lambda *arguments, **settings: Agreement(fused=True))
    journal.close()
    assert [record.levelno for record in lines] == ([logging.WARNING] if rank == 0 else [])
    assert all("no graph reached fuseplan" in record.getMessage() for record in lines)


def test_workers_with_different_plans_do_not_serve(
    journal: Journal, group: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    group.world_size = 2
    monkeypatch.setattr(distributed_c10d, "_get_process_group_store", lambda group: None)
    verdict = Agreement(fused=False, reason="rank 1 has another plan")
    monkeypatch.setattr(reports, "agree", lambda *arguments, **settings: verdict)
    journal.add(report())
    with pytest.raises(UnsupportedError, match=r"different plans: rank 1 has another plan; .* or set FUSEPLAN=0"):
        journal.close()


def test_a_folder_that_can_not_be_written_to_stops_nothing(tmp_path: Path, lines: Records) -> None:
    (tmp_path / "file").write_text("no folder")
    journal = Journal(tmp_path / "cache/kept.json", tmp_path / "file/rank_0_0.json", 0)
    journal.add(report())
    journal.close()
    warned, closed = lines
    assert f"can't write its report to {journal.path}" in warned.getMessage()
    assert closed.getMessage().endswith("report: not written")
    assert read(journal.kept) == report()


def test_configurations_that_are_copied_or_written_bring_no_second_journal(journal: Journal) -> None:
    before = len(journal.reports)
    journal.add(report())
    journal.note(lambda: None, before)
    assert copy.deepcopy({"journal": journal})["journal"] is journal
    written = pickle.loads(pickle.dumps(journal))
    assert (written.kept, written.path, written.rank) == (journal.kept, journal.path, journal.rank)
    assert not written.reports


def test_pieces_that_are_alike_are_counted(journal: Journal) -> None:
    """vLLM hands out one result for them."""
    first, layer = object(), object()
    for compiled, made in ((first, report("graph_0")), (layer, report("graph_1"))):
        before = len(journal.reports)
        journal.add(made)
        journal.note(compiled, before)
    for compiled in (layer, layer, object()):
        journal.note(compiled, len(journal.reports))
    names = [graph.graph for each in journal.reports for graph in each.graphs]
    assert names == ["graph_0", "graph_1", "graph_1.2", "graph_1.3"]


def test_the_folder_of_the_user_and_the_one_beside_the_cache(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "root"))

    def journals(**arguments: Any) -> Journal:
        return Journal.of(configure(**arguments))

    plain = journals()
    assert plain.path == plain.kept
    assert plain.kept.is_relative_to(tmp_path / "root/fuseplan")
    assert journals(additional_config={"fuseplan": {}}).kept != plain.kept
    monkeypatch.setenv("FUSEPLAN_REPORT_DIR", str(tmp_path / "mine"))
    assert journals().kept == plain.kept
    assert journals().path == tmp_path / "mine/rank_0_0.json"


def test_workers_meet_between_compilation_and_the_first_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """What they make then counts where vLLM sizes the KV cache."""
    order: list[str] = []

    def compile_model(self: Any, graph: Any, inputs: Any) -> str:
        order.append("compiled")
        return "callable"

    monkeypatch.setattr(VllmBackend, "__call__", compile_model)
    before_first_run(lambda: order.append("settled"))
    assert VllmBackend.__call__(object(), None, []) == "callable"
    assert order == ["compiled", "settled"]
