"""Reports: as JSON, what they count, how two of them differ, and names in them that anybody may have chosen."""

import copy
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuseplan.record import (
    Change,
    DeviceConstant,
    Difference,
    Fusion,
    GraphReport,
    Loss,
    Nearness,
    Reason,
    Refusal,
    Report,
    changes,
    differences,
    from_json,
    to_json,
)
from fuseplan.record.text import LONGEST_QUOTE, one_line, printable, shown


def fusion(rule: str, layer: int, provider: str = "triton") -> Fusion:
    return Fusion(
        rule=rule, op="fused", provider=provider, anchor=f"mul_{layer}", consumed=("a", "b"), contested_op="rms_norm",
        site=f"norm_{layer}", source=f"layers.{layer}.norm",
    )  # fmt: skip


FUSION, OTHER = fusion("act_padding", 0), fusion("allreduce_rms", 0)
GRAPH = GraphReport(
    graph="graph_0", range=(1, 8), applied=(FUSION,), lost=(Loss(fusion=OTHER, blocked_by=(FUSION,)),),
    matched={"act_padding": 1, "allreduce_rms": 1}, recognized={"rms_norm[64]": 1},
    refusals=(Refusal(reason=Reason.DTYPE, detail="float32"),), stages_ns={"matching": 5},
)  # fmt: skip
REPORT = Report(
    policy="ordered", order=("act_padding", "allreduce_rms"), rules=("act_padding", "allreduce_rms"), graphs=(GRAPH,)
)


def test_whole_numbers_survive_json_as_floats() -> None:
    constant = DeviceConstant(name="launch", value=1402, unit="ns", source="measured")
    assert from_json(DeviceConstant, json.loads(json.dumps(to_json(constant)))) == constant
    with pytest.raises(ValueError, match=r"value: expected float, found 'True'"):
        from_json(DeviceConstant, {**to_json(constant), "value": True})


def test_counts_are_split_by_range_and_include_zeros() -> None:
    other = GraphReport(graph="graph_1", range=(9, 20), applied=(FUSION, FUSION))
    report = Report(policy="ordered", order=(), rules=REPORT.rules, graphs=(GRAPH, other))
    assert report.fused == {"act_padding": 3, "allreduce_rms": 0}
    assert report.per_range == {
        (1, 8): {"act_padding": 1, "allreduce_rms": 0},
        (9, 20): {"act_padding": 2, "allreduce_rms": 0},
    }


def test_conflicts_are_one_row_a_class() -> None:
    report = Report(policy="ordered", order=(), rules=REPORT.rules, graphs=(GRAPH, GRAPH))
    (row,) = report.conflicts
    assert (row.winner, row.loser, row.op, row.count) == ("act_padding", "allreduce_rms", "rms_norm", 2)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("policy",), 3, r"Report\.policy: expected str"),
        (("order",), "a", r"Report\.order: expected a list"),
        (("graphs", 0, "range"), [1], r"graphs\[0\]\.range: expected a list of 2"),
        (("graphs", 0, "range"), [1, True], r"range\[1\]: expected int"),
        (("graphs", 0, "refusals", 0, "reason"), "bored", r"reason: expected one of"),
        (("graphs", 0, "matched"), {"a": "b"}, r"matched\.a: expected int"),
        (("graphs", 0), 3, r"graphs\[0\]: expected an object"),
        (("graphs", 0, "surprise"), 1, r"surprise: expected one of the fields"),
        (("graphs", 0, "graph"), None, "expected a field 'graph'"),
    ],
)
def test_malformed_reports_name_the_field(path: tuple[Any, ...], value: Any, message: str) -> None:
    assert from_json(Report, to_json(REPORT)) == REPORT
    place = data = copy.deepcopy(to_json(REPORT))
    for step in path[:-1]:
        place = place[step]
    if value is None:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    with pytest.raises(ValueError, match=message):
        from_json(Report, data)


def test_near_misses_know_what_they_count() -> None:
    def refusal(layer: int, **more: Any) -> Refusal:
        return Refusal(reason=Reason.USERS, rule="norm_quant", detail=f"read by add_{layer}", **more)

    other = Refusal(reason=Reason.DTYPE, detail="float32")
    disabled = Refusal(reason=Reason.DISABLED, detail="off")
    first, second = refusal(0), refusal(1, nearness=Nearness.REFUSED)
    graphs = (
        GraphReport(graph="graph_0", refusals=(first, other, disabled)),
        GraphReport(graph="graph_1", refusals=(second,)),
    )
    report = Report(policy="planned", order=(), rules=(), graphs=graphs)
    counted = {miss.reason: report.counted_in(miss) for miss in report.near_misses}
    assert counted == {Reason.USERS: [(graphs[0], first), (graphs[1], second)], Reason.DTYPE: [(graphs[0], other)]}
    assert [miss.count for miss in report.near_misses] == [2, 1]


def test_errors_stay_short_whatever_the_names_are() -> None:
    name = "\x7f" * 5000
    with pytest.raises(ValueError, match=r"\\x7f") as error:
        from_json(Report, {**to_json(REPORT), name: name})
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 500


def test_what_is_no_text_is_written_as_python_writes_it() -> None:
    assert printable("layers.0 · µ漢") == "layers.0 · µ漢"
    assert printable("a\x1b[31mb\n\r\x07\u202e\udce4\x9b") == r"a\x1b[31mb\n\r\x07\u202e\udce4\x9b"


@given(st.text(alphabet=st.characters()))
def test_whatever_is_said_is_one_printable_line(text: str) -> None:
    assert printable(text).isprintable()
    assert one_line(text).isprintable()
    assert len(one_line(text)) <= LONGEST_QUOTE


def test_long_texts_are_cut_and_say_so() -> None:
    assert one_line("x" * 1000, longest=10) == "xxxxxxx..."
    assert one_line(" two\n lines ") == "two lines"


def test_names_in_a_record_are_shown_as_python_writes_them() -> None:
    assert shown(REPORT) is REPORT
    hostile = "layers.0\x1b[2J"
    report = Report(
        policy="planned", order=(), rules=(hostile,),
        graphs=(GraphReport(graph="graph_0", matched={hostile: 1}, applied=(FUSION,)),),
    )  # fmt: skip
    stored = shown(report)
    assert stored.rules == (r"layers.0\x1b[2J",)
    assert stored.graphs[0].matched == {r"layers.0\x1b[2J": 1}
    assert stored.graphs[0].applied[0] is FUSION
    assert stored.graphs[0].range is None
    assert shown((Reason.DTYPE, 1, None)) == (Reason.DTYPE, 1, None)


def ranged(*graphs: tuple[tuple[int, int], list[Fusion], int]) -> Report:
    made = [
        GraphReport(graph="graph_0", range=span, applied=tuple(applied), saved_ns=ns) for span, applied, ns in graphs
    ]
    return Report(policy="planned", order=(), rules=("a", "b"), graphs=tuple(made))


SMALL, LARGE = (1, 8), (9, 64)
FREE = ranged(
    (SMALL, [fusion("b", 0), fusion("b", 1), fusion("a", 2)], 9_000), (LARGE, [fusion("a", 0), fusion("a", 1)], 7_000)
)
BOUND = ranged((SMALL, [fusion("a", 0), fusion("a", 1)], 4_000), (LARGE, [fusion("a", 0), fusion("a", 1)], 7_000))


def test_changes_are_told_by_range_and_by_what_takes_the_place_of_what() -> None:
    assert changes(FREE, BOUND) == (
        Change(range=SMALL, before="b triton", after="a triton", count=2, sources=("layers.0.norm", "layers.1.norm")),
        Change(range=SMALL, before="a triton", after="unfused", count=1, sources=("layers.2.norm",)),
    )
    assert changes(FREE, FREE) == ()


def test_differences_are_what_each_range_saves_under_both() -> None:
    assert differences(FREE, BOUND) == (
        Difference(range=SMALL, before_ns=9_000, after_ns=4_000),
        Difference(range=LARGE, before_ns=7_000, after_ns=7_000),
    )


def test_another_provider_is_a_change() -> None:
    (change,) = changes(ranged((SMALL, [fusion("a", 0)], 1)), ranged((SMALL, [fusion("a", 0, "flashinfer")], 1)))
    assert (change.before, change.after) == ("a triton", "a flashinfer")


def test_coupled_fusions_of_one_site_are_one_choice() -> None:
    pair = [fusion("a", 0), fusion("b", 0)]
    for coupled in (pair, pair[::-1]):
        (change,) = changes(ranged((SMALL, [], 0)), ranged((SMALL, coupled, 1)))
        assert (change.before, change.after, change.count) == ("unfused", "a triton and b triton", 1)


def test_graphs_that_one_report_lacks_are_left_out() -> None:
    assert {change.range for change in changes(FREE, ranged((SMALL, [], 0)))} == {SMALL}
    assert [each.range for each in differences(FREE, ranged((SMALL, [], 0)))] == [SMALL]
