"""Reports beside locks and expected counts that they don't meet, each in another way."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from fuseplan.record import GraphBreak, Loss, Nearness, Reason, Refusal, Report
from fuseplan.report.drift import drifts
from fuseplan.report.lock import FusionLock
from fuseplan.report.paragraphs import cause_lines, drift_paragraphs, plain
from fuseplan.report.verdict import Verdict
from tests.report.locked import SPANS, applied, fusion, graph, lock_of, loss, norms, refusal, report, settings
from tests.report.synthetic import BOTH, PAD, REDUCE

PLACE = "layers.7.norm"
AT = fusion(BOTH, PLACE)
ALL = applied(BOTH, norms(range(36)))
LESS = [each for each in ALL if each.source != PLACE]
OTHER = fusion(REDUCE, PLACE)
BREAK = GraphBreak(reason="Call to print()", line="model.py:9", code="print(x)")
BREAKS = tuple(replace(BREAK, line=f"model.py:{line}") for line in range(9, 14))
GUESS = refusal(BOTH, PLACE, "others have it", nearness=Nearness.MISSING, reason=Reason.DEAD)
LOCKED = fusion(REDUCE, PLACE, op="reduce_add_norm", provider="flashinfer")


def twice(*graphs: Iterable[Any], refusals: Sequence[Refusal] = ()) -> Report:
    """The same in both ranges, or one graph of fusions for each."""
    given = graphs if len(graphs) == 2 else graphs * 2
    return report(*(graph(each, refusals=refusals, span=span) for each, span in zip(given, SPANS, strict=True)))


def lock_of_two() -> FusionLock:
    return FusionLock.of(settings("1:64", "65:512"), twice(ALL))


def lost(refusals: Iterable[Refusal] = (), lost: Any = (), fusions: Any = (), **further: Any) -> tuple[Any, Report]:
    """What was at a place, and a report without it."""
    return lock_of(AT), report(graph(fusions, lost, refusals), **further)


def drifting() -> Iterator[tuple[str, FusionLock, Report]]:
    """(title, lock, report), of which all is shown."""
    near, eight = refusal(BOTH, PLACE), refusal(BOTH, "layers.8.norm")
    yield "as it was", lock_of(*ALL), report(graph(reversed(ALL)))
    yield "gained", lock_of(*LESS), report(graph(ALL))
    everywhere = [refusal(BOTH, place) for place in norms(range(36))]
    yield "36 layers in two ranges", lock_of_two(), twice([], refusals=everywhere)
    two = [each for each in LESS if each.source != "layers.8.norm"]
    yield "ranges differ", lock_of_two(), twice([*LESS, OTHER], two, refusals=[near, eight])
    yield "ranges differ, and one cause", lock_of_two(), twice(two, LESS, refusals=[near, eight])
    before = lock_of(OTHER, *applied(BOTH, norms((1, 2))), fusion(PAD, "layers.3.norm"))
    found = [refusal(REDUCE, PLACE), refusal(BOTH, "layers.1.norm"), refusal(PAD, "layers.3.norm")]
    found.append(refusal(BOTH, "layers.2.norm", "another"))
    yield "one cause of three rules, and another", before, report(graph(refusals=found))
    yield "many places", lock_of(*applied(PAD, [f"{name}.norm" for name in "abcdefgh"])), report(graph())
    renamed = applied(BOTH, ["layers.7", "layers.9", *norms(set(range(36)) - {7, 9})])
    yield "renamed", lock_of(*ALL), report(graph(renamed, refusals=[GUESS]))
    old, new = ([fusion(PAD, f"layers.{n}.{name}") for n in (0, 1) for name in each] for each in ("ab", "cd"))
    yield "several of a layer renamed", lock_of(*old), report(graph(new))
    lines = [refusal(BOTH, line) for line in ("f.py:2", "f.py:3")]
    now = report(graph([fusion(BOTH, "f.py:9"), fusion(PAD, "f.py:2")], refusals=lines))
    yield "without a module", lock_of(*applied(BOTH, ["f.py:1", "f.py:2", "f.py:3"])), now
    add, alone = (fusion(PAD, PLACE, op=op) for op in ("add_norm_pad", "norm_pad"))
    yield "another op", lock_of(alone), report(graph([add]))


def causes() -> Iterator[tuple[str, FusionLock, Report]]:
    """(title, lock, report), of which the cause is shown in a line."""
    near, broken = refusal(BOTH, PLACE), {"breaks": (BREAK,)}
    far = refusal(BOTH, PLACE, "far", nearness=Nearness.ABSENT, found="mm")
    other = refusal(PAD, PLACE, "another rule", nearness=Nearness.REFUSED)
    end = refusal(BOTH, PLACE, nearness=Nearness.ABSENT, found="an input of the graph")
    off: dict[str, Any] = {"nearness": Nearness.REFUSED, "reason": Reason.DISABLED}
    absent, declined = {"nearness": Nearness.ABSENT}, {"nearness": Nearness.DECLINED}
    for title, ours, broken_too in (
        ("nothing", [], True),
        ("a guess", [GUESS], True),
        ("the graph's end", [end], True),
        ("far", [far], True),
        ("near", [near], True),
        ("the nearest of several", [far, other, refusal(BOTH, PLACE, "near", nearness=Nearness.REFUSED)], False),
        ("its parts", [refusal(PAD, PLACE, "its parts")], False),
        ("no norm", [refusal(None, PLACE, "no norm", nearness=Nearness.UNRECOGNIZED)], False),
        ("elsewhere in the layer", [refusal(BOTH, "layers.7.mlp", "elsewhere")], False),
        ("a guess, and elsewhere", [GUESS, refusal(BOTH, "layers.7", "read elsewhere")], False),
        ("by its source", [refusal(BOTH, "x", "by source", source=PLACE)], False),
        ("another layer", [refusal(BOTH, "layers.8.mlp", "another layer")], False),
        ("another rule far off", [refusal("norm_quant", PLACE, "nothing to do", **absent)], False),
        ("another rule that is off", [refusal("norm_quant", PLACE, "off", **off)], False),
        ("its provider declines", [refusal(BOTH, PLACE, "declined", provider="triton", **declined)], False),
        ("another provider declines", [refusal(BOTH, PLACE, provider="aiter", **declined)], False),
        ("left alone", [Refusal(reason=Reason.TRAINING, detail="it has a backward", fix="use no_grad")], False),
    ):
        yield title, *lost(ours)
        if broken_too:
            yield f"{title}, where the graph breaks", *lost(ours, **broken)
    yield "many breaks", *lost(breaks=BREAKS)
    yield "too dear by 1.2 us", *lost(lost=[loss(BOTH, PLACE, lost_ns=1200)], refusals=[other])
    yield "too dear", *lost(lost=[loss(BOTH, PLACE)])
    yield "forbidden", *lost(lost=[loss(BOTH, PLACE, forbidden=True)])
    yield "behind", *lost(lost=[loss(BOTH, PLACE, OTHER, lost_ns=-500)])
    yield "ahead", *lost(lost=[loss(BOTH, PLACE, OTHER, lost_ns=1500)], fusions=[OTHER])
    yield "taken", *lost(lost=[loss(BOTH, PLACE, OTHER)])
    yield "the policy is off", *lost([near], policy="off")
    yield "the order has other rules", *lost([near], policy="ordered", order=(PAD, REDUCE))
    yield "the rule is gone", lock_of(fusion("gone_rule", PLACE)), report(graph())
    yield "the provider is gone", lock_of(fusion(PAD, PLACE, provider="aiter")), report(graph([fusion(PAD, PLACE)]))
    # What is still at its place, or may be another one, is lost.
    yield "in another layer", *lost(fusions=applied(BOTH, ["layers.8"]))
    yield "nobody knows which", *lost(fusions=applied(BOTH, ["layers.7.a", "layers.7.b"]))
    yield "by another provider", *lost(fusions=applied(BOTH, ["layers.7"], provider="torch"))
    yield "a near miss there", *lost([near], fusions=applied(BOTH, ["layers.7"]))
    yield "a match there", *lost(lost=[loss(BOTH, PLACE, OTHER)], fusions=applied(BOTH, ["layers.7"]))
    both = applied(PAD, [PLACE, PLACE])
    yield "one of two", lock_of(*both), report(graph(both[:1], refusals=[refusal(PAD, PLACE)]))
    yield "one of two, for no reason", lock_of(*both), report(graph(both[:1]))
    # What other kernels lost to isn't the cause.
    orders: dict[str, Any] = {"policy": "ordered", "order": (REDUCE,)}
    for title, op, further in (
        ("an op", "reduce_norm", {}),
        ("a kernel", LOCKED.op, {}),
        ("an order", LOCKED.op, orders),
    ):
        there, beside = (fusion(REDUCE, PLACE, op=op, provider=name) for name in ("triton", "torch"))
        slower = Loss(fusion=beside, blocked_by=(there,), lost_ns=16_800)
        yield (
            f"{title} instead",
            lock_of(LOCKED),
            report(graph([there], [slower], [replace(far, rule=REDUCE)]), **further),
        )
    takes = refusal(REDUCE, PLACE, "it takes rows", provider="flashinfer", **declined)
    declines = report(graph([fusion(REDUCE, PLACE, op=LOCKED.op)], refusals=[takes]))
    yield "its kernel declines", lock_of(LOCKED), declines


def cause_text(lock: FusionLock, now: Report) -> str:
    """What became of each fusion, the kind of its cause, and what is said of that."""
    found = [(each.change.value, each.cause) for each in drifts(lock, now)]
    return "; ".join(
        f"{change}, {cause.kind.value}: {' | '.join(line.text for line in cause_lines(cause))}" if cause else change
        for change, cause in found
    )


def told(lock: FusionLock, now: Report) -> str:
    """All that changed."""
    return plain(drift_paragraphs(drifts(lock, now), len(lock.settings.spans))) or "nothing"


def expected() -> Iterator[tuple[str, Report, dict[str, int]]]:
    """(title, report, expected counts)."""
    there = graph(ALL[:2], [loss(BOTH, PLACE, forbidden=True)], [refusal(BOTH, "layers.8.norm"), refusal(PAD, None)])
    several = [refusal(PAD, PLACE, name, line=None, fix=None) for name in "abcdefgg"]
    two = report(graph(), replace(graph(), graph="graph_1"), breaks=(BREAK,))
    yield "as many", report(there), {BOTH: 2}
    yield "too many", report(there), {BOTH: 1, PAD: 0}
    yield "too few", report(there), {BOTH: 4}
    yield "too few, for no reason", report(graph(ALL[:1])), {BOTH: 2}
    yield "causes that are many", report(graph(refusals=several)), {PAD: 7}
    yield "a break", two, {PAD: 1}
    yield "a break where none is expected", two, {PAD: 0}
    yield "a rule that is off", report(graph(), rules=()), {PAD: 1}
    yield "a policy that is off", report(graph(refusals=several), policy="off"), {PAD: 1}
    left = Refusal(reason=Reason.TRAINING, detail="the graph has a backward", fix="use no_grad")
    yield "a graph that is left alone", report(graph(refusals=[left])), {PAD: 1}


def verdicts() -> Iterator[tuple[str, Verdict, Sequence[str]]]:
    """(title, verdict, what paragraphs of it start with; all where there is nothing)."""
    now, lock = report(graph([*LESS[5:], OTHER], refusals=[refusal(BOTH, PLACE)])), lock_of(*ALL)
    changed, ranks = drifts(lock, now), FusionLock.of(settings("1:64", tp=2), now)
    lost: dict[str, Any] = {"path": "f.lock", "drifts": changed, "fix": "pin it"}
    broken = Verdict(lock=lock, found=FusionLock.of(lock.settings, now), breaks=("a [break]",), **lost)
    yield "it doesn't hold", broken, ()
    yield "it holds", Verdict(path="f.lock", lock=lock, found=lock, fix="pin it"), ()
    yield "it holds nothing", Verdict(path="f.lock", lock=lock_of(), found=lock_of()), ()
    resettled = {"tp": ("none", "2"), "device": ("h100", "h200")}
    written = Verdict(lock=ranks, found=ranks, resettled=resettled, written=True, **lost)
    yield "it is written", written, ("wrote", "pin it")
