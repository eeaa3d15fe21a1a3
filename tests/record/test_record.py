import copy
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuseplan.record import (
    DeviceConstant,
    Fusion,
    GraphReport,
    Loss,
    Nearness,
    Reason,
    Refusal,
    Report,
    from_json,
    to_json,
)

FUSION = Fusion(
    rule="act_padding", op="rms_norm_pad", provider="torch", anchor="pad", consumed=("a", "b"), contested_op="rms_norm",
    site="rms_norm", source="layers.0",
)  # fmt: skip
OTHER = Fusion(
    rule="allreduce_rms", op="all_reduce_rms_norm", provider="torch", anchor="mul", consumed=("b",),
    contested_op="rms_norm", site="rms_norm",
)  # fmt: skip
GRAPH = GraphReport(
    graph="graph_0", range=(1, 8), applied=(FUSION,), lost=(Loss(fusion=OTHER, blocked_by=(FUSION,)),),
    matched={"act_padding": 1, "allreduce_rms": 1}, recognized={"rms_norm[64]": 1},
    refusals=(Refusal(reason=Reason.DTYPE, detail="float32"),), stages_ns={"matching": 5},
)  # fmt: skip
REPORT = Report(
    policy="ordered", order=("act_padding", "allreduce_rms"), rules=("act_padding", "allreduce_rms"), graphs=(GRAPH,)
)


def test_reports_survive_json() -> None:
    assert from_json(Report, to_json(REPORT)) == REPORT


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
        (("graphs", 0, "surprise"), 1, r"surprise: expected one of the fields"),
    ],
)
def test_malformed_reports_name_the_field(path: tuple[Any, ...], value: Any, message: str) -> None:
    data = copy.deepcopy(to_json(REPORT))
    place = data
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    with pytest.raises(ValueError, match=message):
        from_json(Report, data)


def test_missing_fields_are_named() -> None:
    data = to_json(REPORT)
    del data["graphs"][0]["graph"]
    with pytest.raises(ValueError, match="expected a field 'graph'"):
        from_json(Report, data)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner) | st.dictionaries(st.text() | st.sampled_from(["policy", "graphs", "order", "rules"]), inner)
    ),
)


@given(JSON)
def test_whatever_comes_in_is_a_report_or_a_value_error(data: Any) -> None:
    try:
        report = from_json(Report, data)
    except ValueError:
        return
    assert to_json(report)["policy"] == data["policy"]


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
