"""What is said of a lock that doesn't hold: what, where and why."""

import io
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from fuseplan.record import Fusion, GraphBreak, GraphReport, Loss, Nearness, Reason, Refusal, Report
from fuseplan.report.absence import Absence, AbsenceKind
from fuseplan.report.drift import Drift, DriftKind, drifts
from fuseplan.report.expectation import unmet
from fuseplan.report.lock import FusionLock
from fuseplan.report.paragraphs import Line, drift_paragraphs, plain
from fuseplan.report.verdict import Verdict, render_verdict, verdict_to_json
from tests.report.locked import SPANS, applied, fusion, graph, lock_of, loss, norms, refusal, report, settings

PLACE = "layers.7.norm"
ALL = applied("allreduce_rms_padding", norms(range(36)))
LESS = [each for each in ALL if each.source != PLACE]
OTHER = fusion("allreduce_rms", PLACE)


def only(lock: FusionLock, now: Report) -> Drift:
    (drift,) = drifts(lock, now)
    return drift


def why(lock: FusionLock, now: Report) -> Absence:
    """Why the only fusion that isn't there any more isn't."""
    cause = only(lock, now).cause
    assert cause is not None
    return cause


def cause_of(*graphs: GraphReport, before: Fusion | None = None) -> Absence:
    """Why the fusion that was at a place is not there any more."""
    return why(lock_of(before or fusion("allreduce_rms_padding", PLACE)), report(*graphs))


def test_the_same_fusions_hold() -> None:
    assert drifts(lock_of(*ALL), report(graph(reversed(ALL)))) == ()


def test_what_is_lost_is_named_with_its_place_and_near_miss() -> None:
    now = report(graph(LESS, refusals=[refusal("allreduce_rms_padding", PLACE)]))
    drift = only(lock_of(*ALL), now)
    assert (drift.change, drift.count) == (DriftKind.LOST, 1)
    assert drift.where[0].places == (PLACE,)
    assert drift.cause
    assert drift.cause.near_miss
    assert plain(drift_paragraphs([drift], 1)).splitlines() == [
        "lost    allreduce_rms_padding by triton, 1 place: layers.7.norm",
        "why     near miss: clone stands between",
        "        model.py:7: x = x.clone()",
        "fix     drop the copy",
    ]


def test_what_another_fusion_took_has_moved() -> None:
    now = report(graph([*LESS, OTHER], lost=[loss("allreduce_rms_padding", PLACE, OTHER, lost_ns=1500)]))
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


def test_what_is_gained_needs_no_explanation() -> None:
    drift = only(lock_of(*LESS), report(graph(ALL)))
    assert (drift.change, drift.cause) == (DriftKind.GAINED, None)


def test_thirty_six_layers_in_two_ranges_are_one_paragraph() -> None:
    places = norms(range(36))
    graphs = [graph(refusals=[refusal("allreduce_rms_padding", each) for each in places], span=span) for span in SPANS]
    lock = FusionLock.of(settings("1:64", "65:512"), report(*(graph(ALL, span=span) for span in SPANS)))
    drift = only(lock, report(*graphs))
    assert drift.count == 72
    (paragraph,) = drift_paragraphs([drift], 2)
    assert paragraph[0].text == "allreduce_rms_padding by triton, 36 places in every range: layers.0-35.norm"


def test_ranges_are_named_where_they_differ_and_a_cause_is_told_once() -> None:
    lock = FusionLock.of(settings("1:64", "65:512"), report(*(graph(ALL, span=span) for span in SPANS)))
    refusals = [refusal("allreduce_rms_padding", PLACE), refusal("allreduce_rms_padding", "layers.8.norm")]
    less = [each for each in LESS if each.source != "layers.8.norm"]
    now = report(graph([*LESS, OTHER], refusals=refusals, span=SPANS[0]), graph(less, refusals=refusals, span=SPANS[1]))
    assert plain(drift_paragraphs(drifts(lock, now), 2)).splitlines() == [
        "moved   allreduce_rms_padding by triton -> allreduce_rms by triton, 1 place at 1:64 tokens: layers.7.norm",
        "lost    allreduce_rms_padding by triton, 2 places at 65:512 tokens: layers.7-8.norm",
        "why     near miss: clone stands between",
        "        model.py:7: x = x.clone()",
        "fix     drop the copy",
    ]


def test_one_cause_of_two_rules_is_one_paragraph() -> None:
    before = lock_of(OTHER, *applied("allreduce_rms_padding", norms((1, 2))), fusion("act_padding", "layers.3.norm"))
    refusals = [refusal("allreduce_rms", PLACE), refusal("allreduce_rms_padding", "layers.1.norm")]
    refusals += [refusal("allreduce_rms_padding", "layers.2.norm", "another"), refusal("act_padding", "layers.3.norm")]
    paragraphs = plain(drift_paragraphs(drifts(before, report(graph(refusals=refusals))), 1)).split("\n\n")
    told = ["why     near miss: clone stands between", "        model.py:7: x = x.clone()", "fix     drop the copy"]
    assert [paragraph.splitlines() for paragraph in paragraphs] == [
        [
            "lost    act_padding by triton, 1 place: layers.3.norm",
            "lost    allreduce_rms by triton, 1 place: layers.7.norm",
            "lost    allreduce_rms_padding by triton, 1 place: layers.1.norm",
            *told,
        ],
        ["lost    allreduce_rms_padding by triton, 1 place: layers.2.norm", "why     near miss: another", *told[1:]],
    ]


def test_places_of_one_cause_that_differ_by_range_are_told_apart() -> None:
    lock = FusionLock.of(settings("1:64", "65:512"), report(*(graph(ALL, span=span) for span in SPANS)))
    refusals = [refusal("allreduce_rms_padding", each) for each in norms((7, 8))]
    now = report(
        graph([each for each in ALL if each.source not in norms((7, 8))], refusals=refusals, span=SPANS[0]),
        graph(LESS, refusals=refusals[:1], span=SPANS[1]),
    )
    ((line, *_),) = drift_paragraphs([only(lock, now)], 2)
    assert line.text == (
        "allreduce_rms_padding by triton, 1 place in every range: layers.7.norm; 1 place at 1:64 tokens: layers.8.norm"
    )


@pytest.mark.parametrize(
    ("lost", "kind", "says"),
    [
        (loss("allreduce_rms_padding", PLACE, lost_ns=1200), AbsenceKind.NOT_WORTH_IT, "is 1.2 us a place cheaper"),
        (loss("allreduce_rms_padding", PLACE), AbsenceKind.NOT_WORTH_IT, "leaving it to Inductor is cheaper"),
        (loss("allreduce_rms_padding", PLACE, forbidden=True), AbsenceKind.FORBIDDEN, "is forbidden"),
        (loss("allreduce_rms_padding", PLACE, OTHER, lost_ns=-500), AbsenceKind.CONFLICT, "0.5 us a place behind"),
        (loss("allreduce_rms_padding", PLACE, OTHER), AbsenceKind.CONFLICT, "its nodes to allreduce_rms by triton"),
    ],
)  # fmt: skip
def test_matches_that_are_not_applied_say_what_they_lost_to(lost: Loss, kind: AbsenceKind, says: str) -> None:
    cause = cause_of(graph(lost=[lost], refusals=[refusal("act_padding", PLACE)]))
    assert cause.kind is kind
    assert says in cause.detail


def test_of_several_near_misses_the_nearest_is_told() -> None:
    far = refusal("allreduce_rms_padding", PLACE, "far", nearness=Nearness.ABSENT, found="mm")
    near = refusal("allreduce_rms_padding", PLACE, "near", nearness=Nearness.REFUSED, found="float32")
    other = refusal("act_padding", PLACE, "another rule", nearness=Nearness.REFUSED)
    assert cause_of(graph(refusals=[far, other, near])).detail == "near"


GUESS = refusal("allreduce_rms_padding", PLACE, "others have it", nearness=Nearness.MISSING, reason=Reason.DEAD)
BREAK = GraphBreak(reason="Call to print()", line="model.py:9", code="print(x)")
BROKEN = (
    "the graph has nothing there any more that it could match: the model is traced in 2 graphs, broken at model.py:9"
)


@pytest.mark.parametrize(
    ("there", "kind"),
    [
        ([], AbsenceKind.BROKEN),
        ([GUESS], AbsenceKind.BROKEN),
        ([refusal("allreduce_rms_padding", PLACE, nearness=Nearness.ABSENT, found="an input of the graph")],
         AbsenceKind.BROKEN),
        ([refusal("allreduce_rms_padding", PLACE, nearness=Nearness.ABSENT, found="mm")], AbsenceKind.NEAR_MISS),
        ([refusal("allreduce_rms_padding", PLACE)], AbsenceKind.NEAR_MISS),
    ],
)  # fmt: skip
def test_a_broken_graph_explains_what_nothing_else_does(there: list[Refusal], kind: AbsenceKind) -> None:
    now = report(graph(refusals=there), replace(graph(), graph="graph_1"), breaks=(BREAK,))
    cause = why(lock_of(fusion("allreduce_rms_padding", PLACE)), now)
    assert cause.kind is kind
    if kind is AbsenceKind.BROKEN:
        assert (cause.detail, cause.line, cause.code) == (BROKEN, BREAK.line, BREAK.code)


def test_breaks_are_named_where_counts_are_not_met() -> None:
    now = report(graph(), replace(graph(), graph="graph_1"), breaks=(BREAK,))
    assert plain(unmet(now, {"act_padding": 1})).splitlines() == [
        "wrong   act_padding: expected 1, found 0",
        "why     the graph has nothing that it could match: the model is traced in 2 graphs, broken at model.py:9",
        "",
        "break   Call to print() (model.py:9: print(x))",
    ]
    assert unmet(now, {"act_padding": 0}) == []


DECLINED = refusal("allreduce_rms_padding", PLACE, "declined", nearness=Nearness.DECLINED, provider="triton")


@pytest.mark.parametrize(
    ("refusals", "says"),
    [
        ([refusal("act_padding", PLACE, "its parts")], "its parts"),
        ([refusal(None, PLACE, "no norm", nearness=Nearness.UNRECOGNIZED)], "no norm"),
        ([refusal("allreduce_rms_padding", "layers.7.mlp", "elsewhere in the layer")], "elsewhere in the layer"),
        ([GUESS], "others have it"),
        ([GUESS, refusal("allreduce_rms_padding", "layers.7", "read elsewhere")], "read elsewhere"),
        ([refusal("allreduce_rms_padding", "x", "by source", source=PLACE)], "by source"),
        ([refusal("allreduce_rms_padding", "layers.8.mlp", "another layer")], None),
        ([refusal("norm_quant", PLACE, "nothing to do", nearness=Nearness.ABSENT)], None),
        ([refusal("norm_quant", PLACE, "off", nearness=Nearness.REFUSED, reason=Reason.DISABLED)], None),
        ([DECLINED], "declined"),
        ([refusal("allreduce_rms_padding", PLACE, nearness=Nearness.DECLINED, provider="aiter")], None),
    ],
)  # fmt: skip
def test_what_else_explains_a_place(refusals: list[Refusal], says: str | None) -> None:
    cause = cause_of(graph(refusals=refusals))
    gone = (AbsenceKind.GONE, "the graph has nothing there any more that it could match")
    assert (cause.kind, cause.detail) == ((AbsenceKind.NEAR_MISS, says) if says else gone)


def test_a_graph_that_is_left_alone_explains_all_of_it() -> None:
    training = Refusal(reason=Reason.TRAINING, detail="the graph has a backward", mend="use no_grad")
    cause = cause_of(graph(refusals=[training]))
    assert (cause.kind, cause.detail, cause.mend) == (AbsenceKind.LEFT_ALONE, training.detail, training.mend)


def test_rules_and_providers_that_are_off() -> None:
    cause = why(lock_of(fusion("gone_rule", PLACE)), report(graph()))
    assert (cause.kind, cause.detail) == (AbsenceKind.OFF, "gone_rule isn't among the rules that are on")
    moved = cause_of(graph([fusion("act_padding", PLACE)]), before=fusion("act_padding", PLACE, provider="aiter"))
    assert (moved.kind, moved.detail) == (AbsenceKind.OFF, "it matches, and aiter has no kernel for it any more")


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        ({"policy": "off"}, "the policy is off, which applies nothing"),
        ({"policy": "ordered", "order": ("act_padding", "allreduce_rms")},
         "the policy ordered(act_padding, allreduce_rms) doesn't list allreduce_rms_padding"),
    ],
)  # fmt: skip
def test_a_policy_that_leaves_the_rule_out_is_the_cause_whatever_is_there(policy: dict[str, Any], says: str) -> None:
    now = report(graph(refusals=[refusal("allreduce_rms_padding", PLACE)]), rules=(), **policy)
    cause = why(lock_of(*ALL), now)
    assert (cause.kind, cause.detail, cause.near_miss) == (AbsenceKind.OFF, says, None)
    (paragraph,) = unmet(now, {"allreduce_rms_padding": 36})
    assert paragraph[1:] == [Line("why", says)]


def test_what_is_in_its_layer_under_another_name_has_moved() -> None:
    renamed = applied("allreduce_rms_padding", ["layers.7", "layers.9", *norms(set(range(36)) - {7, 9})])
    drift = only(lock_of(*ALL), report(graph(renamed, refusals=[GUESS])))
    assert (drift.change, drift.before, drift.count) == (DriftKind.MOVED, drift.after, 2)
    assert plain(drift_paragraphs([drift], 1)).splitlines() == [
        "moved   allreduce_rms_padding by triton, 2 places: layers.7,9.norm",
        "why     the same fusions are there, now called layers.7,9",
    ]


def test_names_of_several_places_of_a_layer_can_change() -> None:
    before, after = (
        applied("act_padding", [f"layers.{i}.{name}" for i in (0, 1) for name in names]) for names in ("ab", "cd")
    )
    drift = only(lock_of(*before), report(graph(after)))
    assert (drift.change, drift.count) == (DriftKind.MOVED, 4)
    assert why(lock_of(*before), report(graph(after))).detail == (
        "the same fusions are there, now called layers.0-1.c, layers.0-1.d"
    )


@pytest.mark.parametrize(
    "now",
    [
        graph(applied("allreduce_rms_padding", ["layers.8"])),  # another layer
        graph(applied("allreduce_rms_padding", ["layers.7.a", "layers.7.b"])),  # nobody knows which
        graph(applied("allreduce_rms_padding", ["layers.7"], provider="torch")),  # another fusion
        graph(applied("allreduce_rms_padding", ["layers.7"]), refusals=[refusal("allreduce_rms_padding", PLACE)]),
        graph(applied("allreduce_rms_padding", ["layers.7"]), lost=[loss("allreduce_rms_padding", PLACE, OTHER)]),
    ],
)
def test_what_is_still_at_its_place_or_may_be_another_one_is_lost(now: GraphReport) -> None:
    lost, gained = drifts(lock_of(fusion("allreduce_rms_padding", PLACE)), report(now))
    assert (lost.change, gained.change) == (DriftKind.LOST, DriftKind.GAINED)


LOCKED = fusion("allreduce_rms", PLACE, op="all_reduce_fused_add_rms_norm", provider="flashinfer")


@pytest.mark.parametrize(
    ("op", "further", "kind", "says"),
    [
        (
            "all_reduce_rms_norm", {}, AbsenceKind.CHANGED,
            "all_reduce_rms_norm matches there now, and no longer all_reduce_fused_add_rms_norm",
        ),
        (
            "all_reduce_fused_add_rms_norm", {}, AbsenceKind.OFF,
            "it matches, and flashinfer has no kernel for it any more",
        ),
        (
            "all_reduce_fused_add_rms_norm", {"policy": "ordered", "order": ("allreduce_rms",)}, AbsenceKind.OFF,
            "it matches, and flashinfer has no kernel for it any more, or a slower one",
        ),
    ],
)  # fmt: skip
def test_what_other_kernels_lost_to_is_not_the_cause(
    op: str, further: dict[str, Any], kind: AbsenceKind, says: str
) -> None:
    there = fusion("allreduce_rms", PLACE, op=op)
    other = Loss(fusion=fusion("allreduce_rms", PLACE, op=op, provider="torch"), blocked_by=(there,), lost_ns=16_800)
    far = refusal("allreduce_rms", PLACE, "far", nearness=Nearness.ABSENT)
    drift = only(lock_of(LOCKED), report(graph([there], lost=[other], refusals=[far]), **further))
    assert drift.change is DriftKind.MOVED
    assert drift.cause
    assert (drift.cause.kind, drift.cause.detail) == (kind, says)


def test_that_a_provider_declines_says_more_than_that_it_is_not_there() -> None:
    there = fusion("allreduce_rms", PLACE, op=LOCKED.op)
    facts = {"nearness": Nearness.DECLINED, "provider": "flashinfer"}
    declined = refusal("allreduce_rms", PLACE, "it takes rows", **facts)
    cause = why(lock_of(LOCKED), report(graph([there], refusals=[declined])))
    assert (cause.kind, cause.detail) == (AbsenceKind.NEAR_MISS, "it takes rows")


def test_places_without_a_module_are_told_apart_by_number_alone() -> None:
    before = lock_of(*applied("allreduce_rms_padding", ["f.py:1", "f.py:2", "f.py:3"]))
    refusals = [refusal("allreduce_rms_padding", "f.py:2"), refusal("allreduce_rms_padding", "f.py:3")]
    now = report(graph([fusion("allreduce_rms_padding", "f.py:9"), fusion("act_padding", "f.py:2")], refusals=refusals))
    lost, gained = drifts(before, now)
    assert (lost.change, lost.count, lost.where[0].places) == (DriftKind.LOST, 2, ("(no module) x2",))
    assert lost.cause
    assert lost.cause.near_miss
    assert lost.cause.near_miss.count == 2
    assert (gained.change, gained.count) == (DriftKind.GAINED, 1)


def test_another_op_of_one_rule_and_provider_is_named() -> None:
    before, after = (fusion("act_padding", PLACE, op=op) for op in ("rms_norm_pad", "fused_add_rms_norm_pad"))
    ((line, *_),) = drift_paragraphs([only(lock_of(before), report(graph([after])))], 1)
    assert line.text.startswith(
        "act_padding (rms_norm_pad) by triton -> act_padding (fused_add_rms_norm_pad) by triton"
    )


def test_a_place_with_two_fusions_can_lose_one() -> None:
    both = applied("act_padding", [PLACE, PLACE])
    drift = only(lock_of(*both), report(graph(both[:1], refusals=[refusal("act_padding", PLACE)])))
    assert (drift.change, drift.count, drift.where[0].places) == (DriftKind.LOST, 1, (PLACE,))
    cause = why(lock_of(*both), report(graph(both[:1])))
    assert cause.kind is AbsenceKind.GONE  # its provider has a kernel, as the other one shows


def verdict() -> Verdict:
    now = report(graph([*LESS[5:], OTHER], refusals=[refusal("allreduce_rms_padding", PLACE)]))
    lock = lock_of(*ALL)
    return Verdict(
        path="f.lock", lock=lock, found=FusionLock.of(lock.settings, now), drifts=drifts(lock, now),
        mend="pin it", breaks=("a [break]",),
    )  # fmt: skip


@pytest.mark.parametrize("width", [40, 80, 120])
def test_every_width_shows_all_of_it(width: int) -> None:
    console = Console(file=io.StringIO(), width=width)
    console.print(render_verdict(verdict()))
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    text = " ".join(" ".join(lines).split())
    assert "f.lock doesn't hold: 5 lost, 1 moved (w, planned for h200)" in text
    assert "layers.0-4.norm" in text
    assert "near miss: clone stands between" in text
    assert "break a [break]" in text
    assert text.endswith("pin it")
    assert "break   a [break]" in verdict().text.splitlines()


def test_verdicts_as_json() -> None:
    data = verdict_to_json(verdict())
    assert (data["schema"], data["passed"], data["written"], data["lock"]) == (1, False, False, "f.lock")
    assert data["locked"] == {"allreduce_rms_padding": 36}
    assert data["fused"] == {"allreduce_rms": 1, "allreduce_rms_padding": 30}
    assert data["per_range"] == [{"range": [1, 64], "fused": data["fused"]}]
    assert sorted(each["change"] for each in data["differences"]) == ["lost", "moved"]
    moved = next(each for each in data["differences"] if each["change"] == "moved")
    assert moved["cause"]["near_miss"]["rule"] == "allreduce_rms_padding"
    assert moved["where"] == [{"ranges": ["1:64"], "places": ["layers.7.norm"], "count": 1}]


def test_a_lock_that_holds_is_one_line() -> None:
    for lock, says in ((lock_of(*ALL), "36 fusions (allreduce_rms_padding 36)"), (lock_of(), "0 fusions")):
        held = Verdict(path="f.lock", lock=lock, found=lock, mend="pin it")
        assert held.text == f"f.lock holds: {says} of w, planned for h200"
