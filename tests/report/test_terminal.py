import io
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from fuseplan.record import Comparison, Fusion, GraphReport, Loss, Nearness, Pending, Reason, Refusal, Report, SizePrice
from fuseplan.record.report import latest
from fuseplan.report import comparison_to_json, render_comparison, render_report


def fusion(rule: str, layer: int) -> Fusion:
    return Fusion(
        rule=rule, op="fused", provider="torch", anchor=f"mul_{layer}", consumed=("a", "b"),
        contested_op="fused_add_rms_norm", site=f"norm_{layer}", source=f"layers.{layer}.norm",
    )  # fmt: skip


def comparison(*, refusals: tuple[Refusal, ...] = ()) -> Comparison:
    def report(winner: str, loser: str) -> Report:
        applied = tuple(fusion(winner, layer) for layer in range(3))
        lost = tuple(Loss(fusion=fusion(loser, layer), blocked_by=(applied[layer],)) for layer in range(3))
        graph = GraphReport(
            graph="graph_0", range=(1, 8), applied=applied, lost=lost, matched={winner: 3, loser: 3},
            recognized={"fused_add_rms_norm[64]": 3}, refusals=refusals, stages_ns={"canonical": 2_000_000},
        )  # fmt: skip
        return Report(policy="ordered", order=(winner, loser), rules=tuple(sorted((winner, loser))), graphs=(graph,))

    reports = (report("act_padding", "allreduce_rms"), report("allreduce_rms", "act_padding"))
    return Comparison(workload="w", tp=2, device="h200", ranges=((1, 8),), reports=reports, trace_ns=1_500_000_000)


def first(**changes: Any) -> Report:
    """The first report of a comparison, with another graph."""
    report = comparison().reports[0]
    return replace(report, graphs=(replace(report.graphs[0], **changes),))


def render(subject: Comparison | Report, width: int, color: bool = False, verbose: bool = True) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=color, color_system="standard" if color else None)
    if isinstance(subject, Comparison):
        console.print(render_comparison(subject, verbose=verbose))
    else:
        console.print(render_report(subject, "block", verbose=verbose))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [40, 80, 200])
def test_every_width_shows_counts_and_conflicts(width: int) -> None:
    text = render(comparison(), width)
    assert "3 of 3" in text
    assert "starved" in text
    assert "layers.0-2.norm" in text
    assert max(len(line) for line in text.splitlines()) <= width


def test_color_only_on_terminals() -> None:
    assert "\x1b[" in render(comparison(), 80, color=True)
    assert "\x1b[" not in render(comparison(), 80)


def test_what_ranks_have_yet_to_verify_is_told_and_of_two_reports_on_a_graph_the_last_counts() -> None:
    pending = Pending(
        rule="allreduce_rms", op="fused", ops="", provider="flashinfer", signature="", group="0", cases=()
    )  # fmt: skip
    waiting, settled, other = first(pending=(pending,), digest="d"), first(digest="d"), comparison().reports[1]
    assert "flashinfer's fused: all ranks verify it together before the first run" in render(waiting, 200)
    assert "flashinfer" not in render(settled, 200)
    assert latest([waiting, other, settled]) == [settled, other]


def test_an_order_of_three_rules_can_stand_alone() -> None:
    (first, _), order = comparison().reports, ("act_padding", "allreduce_rms", "act_quant")
    text = render(replace(comparison(), reports=(replace(first, order=order),)), 80)
    assert "ordered(act_padding, allreduce_rms, act_quant)" in text


NAMES = ("[red]", "layers:smile:", "x[/b]")


@pytest.mark.parametrize("width", [60, 200])
def test_names_of_workloads_rules_and_places_are_shown_as_they_are(width: int) -> None:
    def renamed(report: Report) -> Report:
        graph = report.graphs[0]
        applied = tuple(replace(each, rule=NAMES[0], source=f"layers.0.{NAMES[1]}") for each in graph.applied[:1])
        lost = tuple(replace(graph.lost[0], blocked_by=applied, fusion=replace(graph.lost[0].fusion, rule=name))
                     for name in NAMES[1:])  # fmt: skip
        warning = Refusal(reason=Reason.NO_EFFECT, detail=f"warned of {NAMES[0]}")
        graph = replace(graph, applied=applied, lost=lost, matched=dict.fromkeys(NAMES, 1))
        return replace(report, order=NAMES, rules=NAMES, graphs=(graph,), warnings=(warning,))

    whole = comparison()
    reports = tuple(map(renamed, whole.reports))
    whole = replace(whole, workload=NAMES[0], reports=reports, breaks=(NAMES[1],), notes=(NAMES[2],))
    text = render(whole, width)
    for shown in (
        f"{NAMES[0]}  TP=2", f"{', '.join(NAMES[:-1])} and {NAMES[-1]} want", f"warned of {NAMES[0]}",
        f"graph break: {NAMES[1]}", f"note  {NAMES[2]}", f"uncontested  {NAMES[0]} in 1 place: layers.0.{NAMES[1]}",
    ):  # fmt: skip
        assert " ".join(shown.split()) in " ".join(text.split())


def test_markup_in_names_is_text() -> None:
    refusal = Refusal(
        reason=Reason.DTYPE, rule="act_padding", detail="weight [bold]is[/bold] float32", mend="cast [it]"
    )
    text = render(comparison(refusals=(refusal,)), 100)
    assert "weight [bold]is[/bold] float32" in text
    assert "cast [it]" in text


def test_near_misses_are_one_row_a_cause() -> None:
    refusals = tuple(
        Refusal(reason=Reason.USERS, rule="norm_quant", op="rms_norm", detail=f"read by add_{layer}")
        for layer in range(5)
    )
    data = comparison_to_json(comparison(refusals=refusals))
    (row,) = data["near_misses"]
    assert (row["rule"], row["reason"], row["op"], row["count"]) == ("norm_quant", "users", "rms_norm", 5)
    assert "5 places" in render(comparison(refusals=refusals), 100)


def test_warnings_are_shown_once() -> None:
    warning = Refusal(reason=Reason.TRAINING, detail="the graph has a backward")
    assert render(comparison(refusals=(warning, warning)), 100).count("the graph has a backward") == 1


MISSES = tuple(
    Refusal(
        reason=Reason.OP, rule=rule, op="rms_norm", detail="aten.mul.Tensor stands between them",
        source=f"layers.{n}.mlp", site=f"layers.{n}.norm", nearness=Nearness.OBSTRUCTED, expected="all_reduce",
        found="aten.mul.Tensor", line="model.py:12", code="y = y * [0.5]", mend="do it before",
    )
    for n in range(36)
    for rule in ("allreduce_rms", "allreduce_rms_padding")
)  # fmt: skip


@pytest.mark.parametrize("width", [40, 80, 200])
def test_36_layers_and_two_rules_are_one_paragraph_with_line_and_mend(width: int) -> None:
    text = render(comparison(refusals=MISSES), width)
    flat = " ".join(text.split())
    assert flat.count("near miss") == 1
    assert "allreduce_rms and allreduce_rms_padding: op, 36 places (layers.0-35.norm)" in flat
    assert "at layers.0-35.mlp model.py:12 y = y * [0.5]" in flat
    assert "fix do it before" in flat
    assert max(len(line) for line in text.splitlines()) <= width


def test_the_rest_of_many_causes_is_counted() -> None:
    many = tuple(replace(MISSES[0], found=f"aten.op_{chr(97 + n)}", line=f"model.py:{n}") for n in range(11))
    text = render(comparison(refusals=many), 120)
    assert text.count("fix   do it before") == 8
    assert "3 more causes: --json and --html have them all" in text


def test_what_is_declined_or_far_is_one_dim_line() -> None:
    declined = replace(
        MISSES[0], nearness=Nearness.DECLINED, provider="flashinfer", detail="it rounds", mend="allow it"
    )
    ops = ("mm", "mm", "embedding")
    far = [replace(MISSES[2 * n], nearness=Nearness.ABSENT, found=op) for n, op in enumerate(ops)]
    flat = " ".join(render(comparison(refusals=(declined, *far)), 120).split())
    assert "near miss" not in flat
    assert "declined allreduce_rms in 1 place: it rounds; allow it" in flat
    assert "no match allreduce_rms in 3 places, where mm and embedding is and no all_reduce: layers.0-2.norm" in flat


def test_a_single_report_has_the_same_screen() -> None:
    whole = comparison(refusals=MISSES)
    text = render(whole.reports[0], 120)
    assert text.startswith("ordered(act_padding, allreduce_rms) saves 0.0 us a step")
    assert "\nblock  ordered(act_padding, allreduce_rms), 1 graph" in text
    assert "3 of 3" in text
    assert "near miss" in text
    assert "TP=" not in text


def with_prices(subject: Comparison) -> Comparison:
    """The same, planned first, in two ranges, priced."""
    first, second = subject.reports
    planned = replace(first, policy="planned", order=())
    spans = ((1, 8), (9, 64))

    def priced(report: Report, saved: int) -> Report:
        (graph,) = report.graphs
        sizes = tuple(SizePrice(tokens=size, unfused_ns=100_000, saved_ns=saved) for size in (1, 3, 8))
        graphs = (replace(graph, range=span, saved_ns=saved, unfused_ns=100_000, step_ns=2_000_000, sizes=sizes)
                  for span in spans)  # fmt: skip
        return replace(report, graphs=tuple(graphs))

    reports = (priced(planned, 40_000), priced(first, 40_000), priced(second, 20_000))
    return replace(subject, reports=reports, ranges=spans)


def test_the_verdict_says_of_what_a_saving_is_a_share() -> None:
    flat = " ".join(render(with_prices(comparison()), 120, verbose=False).split())
    assert flat.startswith(
        "The plan saves 40.0 us a step at 1-8 tokens: 40 % of the 100 us of act_padding and allreduce_rms, about 2 % "
        "of the whole step; fused in 3 of 3 layers. The order act_padding, allreduce_rms would have "
        "starved allreduce_rms."
    )
    assert "us unfused, of a step 100 of 2,000 100 of 2,000" in flat


@pytest.mark.parametrize("width", [80, 120, 200])
def test_counts_are_of_a_step_and_equal_policies_are_one_row(width: int) -> None:
    text = render(with_prices(comparison()), width, verbose=False)
    assert "6" not in text.replace("64", "")
    assert "planned and ordered(act_padding, allreduce_rms) do the same" in " ".join(text.split())
    assert text.count("40.0  40 % 2.0 %") == 2
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width


def test_conflicts_are_told_when_asked_for() -> None:
    subject = with_prices(comparison())
    assert "conflict  " not in render(subject, 120, verbose=False)
    assert "more with -v: conflicts" in render(subject, 120, verbose=False)
    assert render(subject, 120).count("conflict  ") == 1


def test_a_rule_whose_work_a_wider_fusion_does_is_not_starved() -> None:
    whole = comparison()
    (graph,) = whole.reports[0].graphs
    wider = tuple(replace(each, consumed=("a", "b", "c")) for each in graph.applied)
    lost = tuple(replace(loss, blocked_by=(wider[index],)) for index, loss in enumerate(graph.lost))
    assert "starved" not in render(replace(whole, reports=(first(applied=wider, lost=lost),)), 120)
    assert "starved" in render(replace(whole, reports=whole.reports[1:]), 120)


def test_the_all_reduces_that_are_priced_have_names() -> None:
    subject = with_prices(comparison())
    names = {1: ("NCCL ring LL",), 3: ("NCCL ring LL",), 8: ("NCCL NVLS", "NCCL ring LL")}

    def named(*tokens: int) -> str:
        graphs = (
            replace(
                graph, sizes=tuple(replace(s, all_reduces=names[s.tokens]) for s in graph.sizes if s.tokens in tokens)
            )
            for graph in subject.reports[0].graphs
        )
        first = replace(subject.reports[0], graphs=tuple(graphs))
        text = render(replace(subject, reports=(first, *subject.reports[1:])), 120)
        return next((line.strip() for line in text.splitlines() if line.startswith("all-reduces, ")), "")

    assert named(1, 3, 8) == "all-reduces, unfused: NCCL ring LL at 1, 3 and 8; NCCL NVLS at 8 tokens"
    assert named(3) == "all-reduces, unfused: NCCL ring LL"
    assert named() == ""


def test_one_size_is_not_called_one_token() -> None:
    size = SizePrice(tokens=1, unfused_ns=100_000, saved_ns=40_000)
    fixed = first(range=None, sizes=(size,), saved_ns=40_000, unfused_ns=100_000)
    assert "token" not in render(fixed, 120)


@pytest.mark.parametrize("policy", ["planned", "ordered"])
@pytest.mark.parametrize("reason", [Reason.VERIFICATION, Reason.PACKAGE, Reason.LIMIT, Reason.COUPLED, Reason.UNPRICED])
def test_what_keeps_a_match_out_is_said_where_nothing_is_fused(policy: str, reason: Reason) -> None:
    one = Refusal(reason=reason, detail="it is left out", rule="act_padding", op="norm", nodes=("pad_1",))
    other, whole = replace(one, nodes=("pad_2",)), replace(one, nodes=(), detail="act_padding is not applied")
    report = first(applied=(), lost=(), refusals=(whole, one, other, one))
    text = render(replace(report, policy=policy), 120)
    assert "fuses nothing: 2 places match; it is left out." in text


def test_a_plan_that_fuses_nothing_and_a_model_without_matches_say_so() -> None:
    def planned(**changes: Any) -> str:
        return render(replace(first(applied=(), **changes), policy="planned", order=()), 120, verbose=False)

    lost = [Loss(fusion=fusion("act_padding", layer), blocked_by=(), lost_ns=1000) for layer in range(3)]
    matches = "The plan fuses nothing: 3 places match, but"
    assert planned(lost=(*lost,)).startswith(f"{matches} fusing them costs more than it saves.")
    forbidden = tuple(replace(each, forbidden=True) for each in lost)
    assert planned(lost=forbidden).startswith(f"{matches} are forbidden.")
    text = planned(lost=(), matched={})
    assert text.startswith("Nothing to fuse: no rule matches anywhere.")
    assert "recognised: 3 fused_add_rms_norm[64]" in text
