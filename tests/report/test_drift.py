"""What a lock that doesn't hold is told of; tests/report/data/drift.txt has how it is said."""

import pytest

from fuseplan.record import Report
from fuseplan.report.absence import Absence, AbsenceKind
from fuseplan.report.drift import Drift, DriftKind, drifts
from fuseplan.report.lock import FusionLock
from fuseplan.report.verdict import render_verdict, verdict_to_json
from tests.report.drifting import ALL, AT, BREAK, LESS, OTHER, PLACE, lock_of_two, twice, verdicts
from tests.report.goldens import text_of
from tests.report.locked import applied, fusion, graph, lock_of, loss, norms, refusal, report
from tests.report.synthetic import BOTH, PAD


def only(lock: FusionLock, now: Report) -> Drift:
    (drift,) = drifts(lock, now)
    return drift


def test_what_another_fusion_took_has_moved() -> None:
    now = report(graph([*LESS, OTHER], lost=[loss(BOTH, PLACE, OTHER, lost_ns=1500)]))
    drift = only(lock_of(*ALL), now)
    assert (drift.change, drift.before, drift.after) == (
        DriftKind.MOVED,
        "allreduce_rms_padding fused_allreduce_rms_padding triton",
        "allreduce_rms fused_allreduce_rms triton",
    )
    assert drift.cause == Absence(
        kind=AbsenceKind.CONFLICT, lost_us=1.5, winners=("allreduce_rms fused_allreduce_rms triton",),
        detail="it matches, and lost its nodes to allreduce_rms by triton, 1.5 us a place ahead",
    )  # fmt: skip


def test_thirty_six_layers_in_two_ranges_are_one_difference() -> None:
    drift = only(lock_of_two(), twice([], refusals=[refusal(BOTH, each) for each in norms(range(36))]))
    (where,) = drift.where
    assert (drift.change, drift.count, where.count) == (DriftKind.LOST, 72, 72)
    assert (where.ranges, where.places) == (("1:64", "65:512"), ("layers.0-35.norm",))


def test_a_break_is_the_cause_with_its_line() -> None:
    cause = only(lock_of(AT), report(graph(), breaks=(BREAK,))).cause
    assert cause
    assert (cause.kind, cause.line, cause.code) == (AbsenceKind.BROKEN, BREAK.line, BREAK.code)


def test_places_without_a_module_are_told_apart_by_number_alone() -> None:
    refusals = [refusal(BOTH, "f.py:2"), refusal(BOTH, "f.py:3")]
    now = report(graph([fusion(BOTH, "f.py:9"), fusion(PAD, "f.py:2")], refusals=refusals))
    lost, gained = drifts(lock_of(*applied(BOTH, ["f.py:1", "f.py:2", "f.py:3"])), now)
    assert (lost.change, lost.count, lost.where[0].places) == (DriftKind.LOST, 2, ("(no module) x2",))
    assert lost.cause
    assert lost.cause.near_miss
    assert lost.cause.near_miss.count == 2
    assert (gained.change, gained.count, gained.cause) == (DriftKind.GAINED, 1, None)


def test_verdicts_as_json() -> None:
    (_, broken, _), *_ = verdicts()
    data = verdict_to_json(broken)
    assert (data["schema"], data["passed"], data["written"], data["lock"]) == (1, False, False, "f.lock")
    assert data["locked"] == {"allreduce_rms_padding": 36}
    assert data["fused"] == {"allreduce_rms": 1, "allreduce_rms_padding": 30}
    assert data["per_range"] == [{"range": [1, 64], "fused": data["fused"]}]
    assert sorted(each["change"] for each in data["differences"]) == ["lost", "moved"]
    moved = next(each for each in data["differences"] if each["change"] == "moved")
    assert moved["cause"]["near_miss"]["rule"] == "allreduce_rms_padding"
    assert moved["where"] == [{"ranges": ["1:64"], "places": ["layers.7.norm"], "count": 1}]


def test_a_verdict_says_the_same_where_there_is_no_terminal() -> None:
    for title, verdict, _ in verdicts():
        if not verdict.resettled:
            assert verdict.text.split() == text_of(render_verdict(verdict), 80).split(), title


@pytest.mark.parametrize("width", [40, 80, 120])
def test_no_line_of_a_verdict_is_wider_than_the_terminal(width: int) -> None:
    for title, verdict, _ in verdicts():
        assert max(map(len, text_of(render_verdict(verdict), width).splitlines())) <= width, title
