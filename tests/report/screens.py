"""Records that together take every way through what is shown of a comparison and of a report."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from rich.console import RenderableType

from fuseplan.record import (
    Comparison,
    Fusion,
    GraphReport,
    Loss,
    Nearness,
    Pending,
    Reason,
    Refusal,
    Report,
    SizePrice,
    Unsure,
    Verification,
)
from fuseplan.record.report import ASSUMED
from fuseplan.report import render_comparison, render_report
from tests.report.locked import fusion, graph, loss, norms, refusal, report
from tests.report.synthetic import BOTH, PAD, REDUCE, Synthetic

PLACES = norms(range(3))
SPANS = ((1, 8), (9, 64))
OBSTACLE: dict[str, Any] = {"found": "aten.mul.Tensor", "code": "y = y * [0.5]", "source": "layers.1.mlp"}


def wide(place: str | None) -> Fusion:
    """A fusion that does the work of two others."""
    return replace(fusion(BOTH, place), consumed=("a", "b"), saving_ns=5000)


def contest(winner: Fusion, *losers: str, lost_ns: int | None = 1000) -> list[Loss]:
    """What others lose at the place of a fusion."""
    return [
        loss(rule, winner.source, winner, lost_ns=lost_ns, flips_at_ns=7000, lost_low_ns=-200, lost_high_ns=2100)
        for rule in losers
    ]


def priced(each: GraphReport, saved_ns: int, **further: Any) -> GraphReport:
    """A graph with prices of 100 us, of 3 places that all rules match at."""
    span = each.range or (1, 8192)
    sizes = tuple(SizePrice(tokens=tokens, unfused_ns=100_000, saved_ns=saved_ns) for tokens in (span[0], 3, span[1]))
    facts: dict[str, Any] = {"sizes": sizes, "matched": {PAD: 3, REDUCE: 3, BOTH: 3}, "unfused_ns": 100_000}
    facts |= {"recognized": {"fused_add_rms_norm[64]": 3}, "stages_ns": {"matching": 2_000_000}}
    return replace(each, saved_ns=saved_ns, **{**facts, **further})


def refusals() -> Iterator[Refusal]:
    """What is in the way of two rules, what one provider declines, and what is far from a match."""
    for place in PLACES:
        yield from (refusal(rule, place, "aten.mul.Tensor stands between", **OBSTACLE) for rule in (BOTH, REDUCE))
    yield refusal(None, None, "no norm [it is]", op="rms_norm", reason=Reason.DTYPE, line=None, code=None, fix=None)
    declined: dict[str, Any] = {"nearness": Nearness.DECLINED, "provider": "flashinfer", "fix": "allow it"}
    yield from (refusal(rule, PLACES[0], "it rounds", **declined) for rule in (PAD, REDUCE))
    for place, found in zip(PLACES, ("mm", "mm", "embedding"), strict=True):
        yield refusal(REDUCE, place, nearness=Nearness.ABSENT, found=found)


def planned(places: Sequence[str] = PLACES) -> Report:
    """A plan that differs by range, with all that can be said of one."""
    assumed = replace(fusion("[red]", "layers:smile:", provider="mine"), provenance=ASSUMED, saving_ns=500)
    lost = [each for place in places for each in contest(wide(place), PAD, REDUCE)]
    lost += [loss("act_quant", "head", lost_ns=1200, flips_at_ns=300), loss("norm_quant", None, forbidden=True)]
    unsure = Unsure(
        site="add -> rms_norm", places=3, alternatives=(BOTH, "unfused"), tokens=(1, 8), ahead_ns=300, low_ns=-200,
        high_ns=800, device="h200",
    )  # fmt: skip
    behind = replace(unsure, site="pad", alternatives=(PAD, REDUCE), ahead_ns=-300, low_ns=-800, high_ns=200)
    unknown = replace(unsure, site="mul", places=1, ahead_ns=None)
    pending = Pending(rule=REDUCE, op="fused", ops="", provider="flashinfer", signature="", group="0", cases=())
    skipped = Verification(rule="theirs", op="o", provider="external", signature="", detail="it couldn't be run")
    small = priced(
        graph([*map(wide, places), assumed], lost, refusals(), SPANS[0]), 40_000, unsure=(unsure, behind, unknown),
        saved_low_ns=30_000, saved_high_ns=50_000, step_ns=2_000_000, pending=(pending, pending), verified=(skipped,),
    )  # fmt: skip
    names = (("NCCL ring LL",), ("NCCL ring LL",), ("NCCL NVLS", "NCCL ring LL"))
    sizes = tuple(replace(size, all_reduces=each) for size, each in zip(small.sizes, names, strict=True))
    won = [fusion(REDUCE, place) for place in PLACES]
    left = Refusal(reason=Reason.TRAINING, detail="the graph has a backward")
    often = Refusal(reason=Reason.REPEATS, detail="a loop is counted once")
    large = graph(won, [each for winner in won for each in contest(winner, PAD)], [left, left, often], SPANS[1])
    large = priced(large, 20_000, step_ns=100_000)
    rules = (PAD, REDUCE, BOTH, "[red]", "act_quant", "norm_quant")
    return report(replace(small, sizes=sizes), large, rules=rules)


def ordered(first: str, second: str, saved_ns: int, lost_ns: int | None) -> Report:
    """An order whose first rule takes all places; what the other one would save differs by range, if it is known."""
    won = [wide(place) if first == BOTH else fusion(first, place) for place in PLACES]
    graphs = []
    for index, span in enumerate(SPANS):
        margin = lost_ns * (1 + index) if lost_ns is not None else None
        lost = [each for winner in won for each in contest(winner, second, lost_ns=margin)]
        graphs.append(priced(graph([*won, fusion(REDUCE, "embed")], lost, span=span), saved_ns, step_ns=2_000_000))
    return report(*graphs, policy="ordered", order=(first, second))


def everything() -> Comparison:
    """Four policies, of which two do the same."""
    pads, reduces = ordered(PAD, REDUCE, 20_000, -1000), ordered(REDUCE, PAD, -15_000, 1000)
    off = report(*(priced(graph(span=span), 0) for span in SPANS), policy="off")
    same = replace(pads, order=(PAD, REDUCE, "act_quant"))
    return Comparison(
        workload="a [model]", tp=2, device="h200", ranges=SPANS, reports=(planned(), pads, reduces, same, off),
        trace_ns=1_500_000_000, breaks=("Call to print():smile:",), notes=("costs are modelled[/b]",),
    )  # fmt: skip


def asked(before: Report, after: Report, **constraints: Any) -> RenderableType:
    """A report that is asked to be otherwise, beside what it would be."""
    return render_comparison(replace(everything(), reports=(replace(after, **constraints),), unconstrained=before))


def one_size(given: Report) -> Report:
    """The same at 8 tokens alone."""
    (first, *_) = given.graphs
    sizes = (replace(first.sizes[0], all_reduces=("NCCL ring LL", "NCCL NVLS")),)
    return replace(given, graphs=(replace(first, range=(8, 8), sizes=sizes),))


def screens() -> Iterator[tuple[str, RenderableType, int, Sequence[str]]]:
    """(title, what is shown, columns, what paragraphs of it start with; all where there is nothing)."""
    whole, free, pads = everything(), ordered(REDUCE, PAD, 30_000, 1000), ordered(PAD, REDUCE, 20_000, -1000)
    yield "a comparison with -v", render_comparison(whole, verbose=True), 160, ()
    yield "in few columns", render_comparison(whole), 76, ("policy", "conflict", "declined", "recognised")
    two = replace(whole, reports=whole.reports[2:3], breaks=(), notes=())
    yield "in fewer", render_comparison(two), 48, ()
    unknown = replace(two, reports=(pads, ordered(REDUCE, PAD, 15_000, None)))
    yield "ranges that differ in figures", render_comparison(unknown, verbose=True), 160, ("conflict",)
    same = replace(free, policy="planned", order=())
    few, label = replace(same, graphs=same.graphs[:1]), ("what if",)
    yield "what is forced", asked(same, pads, policy="planned", order=(), force=(PAD,)), 120, label
    yield "what is forbidden under an order", asked(free, free, forbid=("x", "y")), 120, label
    yield "what is forbidden, and changes nothing", asked(few, few, forbid=("x",)), 120, label
    causes = [refusal(PAD, PLACES[0], found=f"aten.{n}", line=None, code=None, fix=None) for n in "abcdefghij"]
    many = report(priced(graph([wide(None)], (), causes, None), 40_000), rules=(BOTH,))
    yield (
        "a report with many causes, for every size",
        render_report(many, "block"),
        160,
        ("block", "policy", "near miss"),
    )
    none = report(GraphReport(graph="graph_0"), rules=(PAD,))
    yield "a report without matches", render_report(none), 120, ()
    yield "a comparison without matches", render_comparison(replace(whole, reports=(none,))), 120, ("recognised",)
    wider = replace(two, reports=(ordered(BOTH, PAD, 40_000, 1000),))
    yield "a wider fusion does its work", render_comparison(wider), 160, ("policy",)
    fixed = one_size(Synthetic(layers=2).report("planned"))
    beside = replace(everything(), reports=(fixed,))
    yield "one size", render_comparison(beside, verbose=True), 120, ("all-reduces", "policy")
    yield "a report of one size", render_report(fixed), 120, ("model",)


def outcomes() -> Iterator[tuple[str, Report]]:
    """(title, report), of which a sentence says what it comes to."""
    at_sites = [loss(PAD, place, lost_ns=1000) for place in PLACES]
    unsure, left = Refusal(reason=Reason.UNSURE, detail="it may cost more", nodes=("pad_1",)), Reason.VERIFICATION
    out = [Refusal(reason=left, detail="it is left out", op="norm", nodes=(node,)) for node in ("pad_1", "pad_2")]
    whole = Refusal(reason=left, detail="act_padding is not applied")
    disabled = Refusal(reason=Reason.DISABLED, detail="FUSEPLAN=0 switches every fusion off")

    def of(fusions: Sequence[Fusion] = (), lost: Sequence[Loss] = (), found: Sequence[Refusal] = (), saved_ns: int = 0,
           **further: Any) -> Report:  # fmt: skip
        return report(priced(graph(fusions, lost, found), saved_ns), **further)

    orders: dict[str, Any] = {"policy": "ordered", "order": (PAD, REDUCE)}
    yield "every match costs more", of(lost=at_sites)
    yield "one match costs more", of(lost=at_sites[:1])
    yield "every match is forbidden", of(lost=[replace(each, forbidden=True) for each in at_sites])
    yield "one is forbidden, and others cost more", of(lost=[replace(at_sites[0], forbidden=True), *at_sites[1:]])
    yield "a match may cost more", of(found=[unsure])
    yield "one costs more, and another may", of(lost=at_sites[:1], found=[unsure])
    yield "an order takes none", of(lost=at_sites, **orders)
    yield "two are left out", of(found=[whole, *out, out[0]])
    yield "two are left out by an order", of(found=[whole, *out, out[0]], **orders)
    yield "nothing matches", report(graph())
    yield "it is switched off", of(found=[disabled])
    yield "it costs time", of([wide(place) for place in PLACES], saved_ns=-3000, **orders)
    yield "in two of three layers", of([wide(place) for place in PLACES[:2]], at_sites[2:], saved_ns=3000)
    yield "in places without layers", of([wide("embed"), wide(None)], [loss(PAD, "head")], saved_ns=-1)
    known = of([wide("embed")], saved_ns=300)
    step = replace(known.graphs[0], step_ns=1_000_000, saved_low_ns=100, saved_high_ns=400, range=None)
    yield "of a known step, with an interval", replace(known, graphs=(step,))


def logged() -> Iterator[tuple[str, Report]]:
    """(title, report), whose logs are shown."""
    plan = planned(PLACES[:1])
    yield "a plan", replace(plan, graphs=plan.graphs[:1])
    disabled = Refusal(reason=Reason.DISABLED, detail="FUSEPLAN=0 switches every fusion off")
    left = graph(refusals=[disabled], span=(8, 8))
    yield "what is left alone, and a warm cache", report(left, GraphReport(graph="graph_1", from_cache=True))
