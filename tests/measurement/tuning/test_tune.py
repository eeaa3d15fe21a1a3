"""Tuning a small model on the CPU, and planning from what was measured."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fuseplan
from fuseplan.config import CompileRange, PassConfig
from fuseplan.dialect import define, ops
from fuseplan.errors import ConfigError
from fuseplan.measurement.costs import Measurement, tune
from fuseplan.measurement.tuning import Skipped, Step
from fuseplan.planner.costs import CostTable, Provenance, cached_path
from fuseplan.providers import provider_of
from fuseplan.record import GraphReport, Report
from fuseplan.rules import Rule
from tests.helpers import gpt_oss, llama, randn

# A fusion whose kernels do less work than the ops that they stand for, or more: sorting what is sorted already changes
# nothing.

SORTS = 32
WIDTH = 256
CALLS: list[str] = []


def sorted_often(y: Tensor, times: int) -> Tensor:
    for _ in range(times):
        y = torch.ops.aten.sort.default(y)[0]
    return y


def reference(x: Tensor, weight: Tensor, eps: float, rounding: str) -> Tensor:
    return sorted_often(ops.rms_norm.reference(x, weight, eps, rounding), SORTS)


norm_sort = define(
    "norm_sort", "(Tensor x, Tensor weight, float eps, str rounding) -> Tensor",
    reference=reference, fake=lambda x, *rest: torch.empty_like(x), samples=ops.rms_norm.samples, fused=True,
)  # fmt: skip


class NormSort(Rule):
    """rms_norm -> sort, again and again  =>  one op.   y = sort(rms_norm(x) * weight)"""

    name, flags, op, core = "norm_sort", (), norm_sort, ops.rms_norm

    def pattern(self, x: Any, weight: Any, eps: Any, rounding: Any) -> Any:
        return sorted_often(ops.rms_norm(x, weight, eps, rounding), SORTS)

    def replacement(self, x: Any, weight: Any, eps: Any, rounding: Any) -> Any:
        return norm_sort(x, weight, eps, rounding)


def kernel(name: str, times: int) -> Callable[..., Tensor]:
    def run(x: Tensor, weight: Tensor, eps: float, rounding: str) -> Tensor:
        CALLS.append(name)
        return sorted_often(ops.rms_norm.reference(x, weight, eps, rounding), times)

    return run


def wrong(x: Tensor, weight: Tensor, eps: float, rounding: str) -> Tensor:
    return reference(x, weight, eps, rounding).flip(-1)


def raises(*arguments: Any) -> Tensor:
    raise ZeroDivisionError("division\nby zero")


FAST = provider_of("fast_sorts", {norm_sort: kernel("fast_sorts", 1)})
SLOW = provider_of("slow_sorts", {norm_sort: kernel("slow_sorts", 3 * SORTS)})
WRONG = provider_of("wrong_sorts", {norm_sort: wrong})
RAISING = provider_of("raising_sorts", {norm_sort: raises})
SITE = f"rms_norm {WIDTH} bfloat16 llama"
W = torch.linspace(0.5, 1.5, WIDTH).bfloat16()


def model(x: Tensor) -> Tensor:
    return sorted_often(llama(x, None, W)[0], SORTS)


RANGE = CompileRange(start=4, end=64)
MINE = f"norm_sort norm_sort {FAST.name}", f"norm_sort norm_sort {SLOW.name}"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("costs") / "costs.json"


def measured(table: Path, **more: Any) -> Measurement:
    """Of the model at 4 tokens, unless more is said."""
    given: dict[str, Any] = {"tokens": [4], "repeats": 5, "rules": [NormSort()], **more}
    return tune(model, (randn(16, WIDTH),), table=table, ranges=[RANGE], **given)


def explained(*providers: Any, **config: Any) -> GraphReport:
    report = fuseplan.explain(
        model, randn(16, WIDTH), config=PassConfig(**config), device="cpu", rules=[NormSort()], providers=providers
    )
    (graph,) = report.graphs
    return graph


def prices_of(graph: GraphReport) -> tuple[str, ...]:
    assert graph.plan is not None
    return graph.plan.prices


@pytest.fixture(scope="module")
def tuned(path: Path) -> Measurement:
    CALLS.clear()
    return measured(path, tokens=[4, 64], providers=[FAST, SLOW, WRONG], command="a test")


def test_each_alternative_is_run_and_has_a_row_at_each_size(tuned: Measurement, path: Path) -> None:
    rows = {(row.key, row.tokens) for row in tuned.rows}
    assert rows == {(f"{SITE}: {name}", tokens) for name in ("unfused", *MINE) for tokens in (4, 64)}
    assert {FAST.name, SLOW.name} <= set(CALLS)
    assert tuned.classes == {SITE: 1}
    assert not tuned.stopped
    assert set(CostTable.load(path, device="cpu").rows) == set(tuned.rows)
    for row in tuned.rows:
        assert (row.provenance, row.device, row.topology) == (Provenance.MEASURED, "cpu", "tp1")
        assert (row.torch, row.command) == (torch.__version__, "a test")
        assert row.time_ns > 0


def test_what_fails_verification_is_not_measured(tuned: Measurement) -> None:
    (skipped,) = tuned.skipped
    assert skipped.alternative == f"norm_sort norm_sort {WRONG.name}"
    assert skipped.reason.startswith("norm_sort failed verification at 4 tokens: result 0")


@pytest.fixture
def quiet(tuned: Measurement, path: Path, tmp_path: Path) -> Path:
    """The table as a machine that does nothing else measures it: what lies within a spread is no reason to fuse."""
    table, found = CostTable.load(path), tmp_path / "quiet.json"
    table.updated(replace(row, spread_ns=0) for row in table.rows).save(found)
    return found


def fastest(path: Path, tokens: int) -> str:
    rows = {row.key: row.time_ns for row in CostTable.load(path).rows if row.tokens == tokens}
    return min(rows, key=lambda key: rows[key]).rpartition(" ")[2]


def test_plans_are_made_of_measured_rows_alone(quiet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel that is faster by its rows is chosen at both ends, and in between by interpolation."""
    monkeypatch.setenv("FUSEPLAN_COSTS", str(quiet))
    assert fastest(quiet, 4) == fastest(quiet, 64) == FAST.name
    graph = explained(FAST, SLOW, compile_ranges=[RANGE])
    assert prices_of(graph) == ("measured",)
    assert [fusion.provider for fusion in graph.applied] == [FAST.name]
    assert {loss.fusion.provider for loss in graph.lost} == {SLOW.name}


def test_compiled_models_run_what_was_measured_to_be_fastest(quiet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEPLAN_COSTS", str(quiet))
    reports: list[Report] = []
    torch._dynamo.reset()
    compiled = fuseplan.compile(model, rules=[NormSort()], providers=[FAST, SLOW], on_report=reports.append)
    CALLS.clear()
    with torch.inference_mode():
        actual = compiled(randn(16, WIDTH))
    torch.testing.assert_close(actual, model(randn(16, WIDTH)), rtol=2**-6, atol=2**-6)
    (graph,) = reports[0].graphs
    assert [fusion.provider for fusion in graph.applied] == [FAST.name]
    assert CALLS[-1] == FAST.name


def layers(x: Tensor, residual: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    for weight in weights:
        y, residual = gpt_oss(x, residual, weight)
        x = (F.pad(y, (0, 16)) @ torch.ones(WIDTH + 16, WIDTH, dtype=torch.bfloat16)).tanh()
    return x, residual


def test_equal_components_are_measured_once(tmp_path: Path) -> None:
    table = tmp_path / "costs.json"
    inputs = randn(16, WIDTH), randn(16, WIDTH), randn(3, WIDTH)
    found = tune(layers, inputs, table=table, ranges=[RANGE], tokens=[16], repeats=5)
    (site,) = found.classes
    assert found.classes == {site: 3}
    assert site == f"add -> rms_norm -> pad {WIDTH}:{WIDTH + 16} {WIDTH} bfloat16 gpt_oss"
    assert sorted(row.key for row in found.rows) == [
        f"{site}: act_padding fused_add_rms_norm_pad torch", f"{site}: unfused",
    ]  # fmt: skip


def test_the_default_table_is_read_where_none_is_named(
    tuned: Measurement, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))

    assert prices_of(explained(FAST, SLOW)) == ("assumed",)
    cached = cached_path("cpu")
    cached.parent.mkdir(parents=True)
    cached.write_bytes(path.read_bytes())
    assert prices_of(explained(FAST, SLOW)) == ("measured",)
    cached.write_text('{"schema": 1, "device"')
    with caplog.at_level(logging.WARNING, "fuseplan"):
        assert prices_of(explained(FAST, SLOW)) == ("assumed",)
    assert [record.getMessage() for record in caplog.records if "measured costs are ignored" in record.getMessage()]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"repeats": 4}, "repeats=4: a median and its spread need at least 5"),
        ({"tokens": [65]}, "tokens=65 lie in none of the ranges 4:64; add one that has them"),
    ],
)
def test_what_can_not_be_measured_is_refused(tmp_path: Path, options: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        measured(tmp_path / "costs.json", **options)
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_leaves_whole_rows_or_none(tmp_path: Path) -> None:
    def interrupt(step: Step) -> None:
        if step.doing.startswith("timing"):
            raise KeyboardInterrupt

    found = measured(tmp_path / "costs.json", providers=[FAST], watch=interrupt)
    assert found.stopped
    assert found.rows == CostTable.load(tmp_path / "costs.json").rows == ()


def test_what_a_kernel_raises_when_it_is_run_is_told(tmp_path: Path) -> None:
    found = measured(tmp_path / "costs.json", providers=[RAISING], config=PassConfig(verify="off"))
    assert [row.key for row in found.rows] == [f"{SITE}: unfused"]
    alternative = f"norm_sort norm_sort {RAISING.name}"
    reason = "ZeroDivisionError: division by zero"
    assert found.skipped == (Skipped(site=SITE, alternative=alternative, tokens=4, reason=reason),)
