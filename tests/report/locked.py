"""Reports without a model: what is applied, lost and refused at which place, put together by hand."""

from collections.abc import Iterable, Sequence
from typing import Any

from fuseplan.record import Fusion, GraphReport, Loss, Nearness, Reason, Refusal, Report
from fuseplan.report.lock import FusionLock, LockSettings, Span

RULES = ("act_padding", "allreduce_rms", "allreduce_rms_padding")
SPANS: tuple[Span, ...] = ((1, 64), (65, 512))
Place = str | None


def fusion(rule: str, place: Place, *, provider: str = "triton", op: str | None = None) -> Fusion:
    return Fusion(
        rule=rule, op=op or f"fused_{rule}", provider=provider, anchor="mul", consumed=("a",),
        contested_op="fused_add_rms_norm", site=f"site of {place}", source=place,
    )  # fmt: skip


def norms(layers: Iterable[int]) -> list[str]:
    return [f"layers.{layer}.norm" for layer in layers]


def applied(rule: str, places: Iterable[Place], **further: Any) -> list[Fusion]:
    return [fusion(rule, place, **further) for place in places]


def loss(rule: str, place: Place, winner: Fusion | None = None, **further: Any) -> Loss:
    return Loss(fusion=fusion(rule, place), blocked_by=(winner,) if winner else (), **further)


def refusal(rule: str | None, site: Place, detail: str = "clone stands between", **further: Any) -> Refusal:
    facts: dict[str, Any] = {
        "reason": Reason.LAYOUT, "nearness": Nearness.OBSTRUCTED, "source": site, "expected": "all_reduce",
        "found": "clone", "line": "model.py:7", "code": "x = x.clone()", "fix": "drop the copy",
    }  # fmt: skip
    return Refusal(**{**facts, "rule": rule, "site": site, "detail": detail, **further})


def report(*graphs: GraphReport, rules: Sequence[str] = RULES, **further: Any) -> Report:
    return Report(**{"policy": "planned", "order": (), "rules": tuple(rules), "graphs": graphs, **further})


def graph(
    fusions: Iterable[Fusion] = (), lost: Iterable[Loss] = (), refusals: Iterable[Refusal] = (), span: Span = SPANS[0]
) -> GraphReport:
    return GraphReport(
        graph="graph_0", range=span, applied=tuple(fusions), lost=tuple(lost), refusals=tuple(refusals)
    )  # fmt: skip


def settings(*ranges: str, **further: Any) -> LockSettings:
    return LockSettings(workload="w", device="h200", policy="planned", ranges=ranges, **further)


def lock_of(*fusions: Fusion) -> FusionLock:
    """Of one graph in one range."""
    return FusionLock.of(settings("1:64"), report(graph(fusions)))
