"""The rows behind a plan's numbers: every alternative at every size, and where measured ones come from."""

from typing import Any

import pytest

from fuseplan.dialect import ops
from fuseplan.planner.alternatives import UNFUSED
from fuseplan.planner.evidence import cost_rows
from fuseplan.planner.pose import Problem
from fuseplan.planner.prices import Prices
from fuseplan.providers import provider_of
from fuseplan.record import CostRow
from tests.planner.posing import MODEL, TORCH, measured, problem_of

UNFUSED_NS = 1182 + 1046


def rows_of(given: Problem) -> dict[tuple[str, int], CostRow]:
    return {(row.alternative, row.tokens): row for row in cost_rows([given])}


def test_modelled_rows_show_every_alternative_at_every_size() -> None:
    given = problem_of(dynamic=True, span=(10, 1000))
    rows = rows_of(given)
    name = "act_padding fused_add_rms_norm_pad"
    alternatives = (UNFUSED, f"{name} torch", f"{name} triton")
    assert list(rows) == [(alternative, size) for size in (10, 100, 1000) for alternative in alternatives]
    assert rows[UNFUSED, 10].time_ns == UNFUSED_NS
    assert [kernel.name for kernel in rows[UNFUSED, 10].kernels] == ["rms_norm", "pad"]
    (kernel,) = rows[f"{name} triton", 10].kernels
    assert (kernel.launch, kernel.memory, kernel.signal, kernel.staging, kernel.wire) == (1000, 88, 0, 0, 0)
    for row in rows.values():
        assert (row.site, row.places, row.provenance, row.spread_ns) == (given.sites[0], 1, "modelled", 0)
        assert row.origin == ()


@pytest.mark.parametrize(("cost", "provenance", "time_ns"), [(2.0, "declared", 2000), (None, "assumed", 1088)])
def test_what_the_model_does_not_know_has_a_row_without_kernels(
    cost: float | None, provenance: str, time_ns: int
) -> None:
    op = ops.fused_add_rms_norm_pad
    mine = provider_of(f"evident_{provenance}", {op: op.reference}, cost=cost)
    unfused, row = cost_rows([problem_of(providers=[mine])])
    assert (unfused.alternative, unfused.provenance) == (UNFUSED, "modelled")
    assert (row.provenance, row.time_ns, row.spread_ns, row.kernels) == (provenance, time_ns, 0, ())


def test_equal_places_share_their_rows() -> None:
    def same(x: Any, r: Any, w: Any) -> Any:
        y = ops.rms_norm(x, w, 1e-5, "llama")
        z = ops.rms_norm(r, w, 1e-5, "llama")
        return ops.pad(y, 28), ops.pad(z, 28), ops.pad(ops.silu_and_mul(x, r, "llama"), 28)

    given = problem_of(same, providers=TORCH)
    rows = cost_rows([given, given])
    assert [(row.alternative, row.places) for row in rows] == [(UNFUSED, 2), ("act_padding rms_norm_pad torch", 2)]


def test_measured_rows_name_where_they_come_from() -> None:
    rows = {"": [(1000, 1), (4000, 2)], "triton": [(500, 3), (1000, 4)]}
    plain = problem_of(dynamic=True, span=(10, 40))
    prices = Prices(model=MODEL, table=measured(plain, rows, (10, 40)), source="measured")
    given = problem_of(dynamic=True, span=(10, 40), prices=prices)
    found = rows_of(given)
    triton = "act_padding fused_add_rms_norm_pad triton"
    assert list(found) == [(name, size) for size in (10, 20, 40) for name in (UNFUSED, triton)]
    assert (found[triton, 20].time_ns, found[triton, 20].spread_ns) == (667, 4)
    origin = "measured at {} tokens; round; tp1; torch 2.13; 2026-11-22; by hand"
    assert found[triton, 20].origin == (origin.format(10), origin.format(40))
    assert found[triton, 40].origin == (origin.format(40),)
    assert {(row.provenance, row.places, row.kernels) for row in found.values()} == {("measured", 1, ())}
