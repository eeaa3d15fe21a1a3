"""The rows behind a report's figures, as the page takes them."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from fuseplan.record import CostRow, DeviceConstant, SizePoint
from fuseplan.report.html.tables import Table


def cost_rows(costs: Iterable[CostRow], strings: Table, kernels: Table) -> list[list[Any]]:
    """[class, places, alternative, tokens, time, spread, provenance, [kernel, count, ...], origins].

    Texts are named by their index in `strings`. A kernel is a row of `kernels`, [name, launch, signal, staging, memory,
    wire], of which an alternative may run several.
    """
    return [
        [
            strings.add(row.site), row.places, strings.add(row.alternative), row.tokens, row.time_ns, row.spread_ns,
            strings.add(row.provenance), _kernels(row, strings, kernels), list(row.origin),
        ]
        for row in costs
    ]  # fmt: skip


def _kernels(row: CostRow, strings: Table, kernels: Table) -> list[int]:
    counts = Counter(
        kernels.add((strings.add(k.name), k.launch, k.signal, k.staging, k.memory, k.wire)) for k in row.kernels
    )
    return [part for kernel, count in counts.items() for part in (kernel, count)]


def constant_rows(constants: Iterable[DeviceConstant]) -> list[list[Any]]:
    """[name, value, unit, source]."""
    return [[each.name, each.value, each.unit, each.source] for each in constants]


def size_rows(sizes: Iterable[SizePoint]) -> dict[str, Any]:
    """`points`: [tokens, unfused, [saved, outcome] by policy, step]; `outcomes`: applied fusions, counted by rule and
    provider.
    """
    outcomes = Table()
    points = [
        [
            point.tokens,
            point.unfused_ns,
            [[at.saved_ns, outcomes.add(tuple(sorted(at.fused.items())))] for at in point.policies],
            point.step_ns,
        ]
        for point in sizes
    ]
    return {"outcomes": [[list(item) for item in outcome] for outcome in outcomes.rows], "points": points}
