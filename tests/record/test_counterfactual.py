import pytest

from fuseplan.record import Change, Difference, Fusion, GraphReport, Report, changes, differences


def fusion(rule: str, layer: int, provider: str = "triton") -> Fusion:
    return Fusion(
        rule=rule, op="fused", provider=provider, anchor=f"mul_{layer}", consumed=("a",), contested_op="rms_norm",
        site=f"norm_{layer}", source=f"layers.{layer}.norm",
    )  # fmt: skip


def report(*graphs: tuple[tuple[int, int], list[Fusion], int]) -> Report:
    made = [
        GraphReport(graph="graph_0", range=span, applied=tuple(applied), saved_ns=ns) for span, applied, ns in graphs
    ]
    return Report(policy="planned", order=(), rules=("a", "b"), graphs=tuple(made))


SMALL, LARGE = (1, 8), (9, 64)
FREE = report(
    (SMALL, [fusion("b", 0), fusion("b", 1), fusion("a", 2)], 9_000), (LARGE, [fusion("a", 0), fusion("a", 1)], 7_000)
)
BOUND = report((SMALL, [fusion("a", 0), fusion("a", 1)], 4_000), (LARGE, [fusion("a", 0), fusion("a", 1)], 7_000))


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
    (change,) = changes(report((SMALL, [fusion("a", 0)], 1)), report((SMALL, [fusion("a", 0, "flashinfer")], 1)))
    assert (change.before, change.after) == ("a triton", "a flashinfer")


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_coupled_fusions_of_one_site_are_one_choice(order: tuple[int, int]) -> None:
    pair = [fusion("a", 0), fusion("b", 0)]
    (change,) = changes(report((SMALL, [], 0)), report((SMALL, [pair[i] for i in order], 1)))
    assert (change.before, change.after, change.count) == ("unfused", "a triton and b triton", 1)


def test_graphs_that_one_report_lacks_are_left_out() -> None:
    assert {change.range for change in changes(FREE, report((SMALL, [], 0)))} == {SMALL}
    assert [each.range for each in differences(FREE, report((SMALL, [], 0)))] == [SMALL]
