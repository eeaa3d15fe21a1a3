"""A `Bench` as JSON and for a terminal."""

from collections.abc import Iterator
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from fuseplan.record.bench import PLAIN, BatchTimes, Bench, PolicyTime
from fuseplan.record.text import printable

SCHEMA = 1


def bench_to_json(bench: Bench) -> dict[str, Any]:
    """The object that `fuseplan bench --json` prints; times in ns."""
    return {
        "schema": SCHEMA, "workload": bench.workload, "tp": bench.tp, "device": bench.device, "torch": bench.torch,
        "triton": bench.triton, "date": bench.date, "command": bench.command, "repeats": bench.repeats,
        "batches": [
            {
                "batch": times.batch,
                "steps": times.steps,
                "policies": [
                    {
                        "policy": each.policy, "step_ns": each.step_ns, "spread_ns": each.spread_ns,
                        "tokens_per_s": round(times.tokens_per_s(each), 1), "change": round(times.change(each), 4),
                        "noise": times.is_noise(each),
                        "change_interval": [round(end, 4) for end in times.interval(each)],
                        "repeats_needed": _needed(times, each),
                        "fused": dict(each.fused), "prices": list(each.prices),
                        "same_as": each.same_as,
                    }
                    for each in times.policies
                ],
            }
            for times in bench.batches
        ],
        "notes": list(bench.notes),
    }  # fmt: skip


def render_bench(bench: Bench) -> Group:
    """A table for each batch size, and notes."""
    head = f"{bench.workload}  TP={bench.tp}, {bench.device}, torch {bench.torch}, {bench.repeats} interleaved repeats"
    parts: list[Any] = [Text(printable(head), style="bold"), Text("")]
    for times in bench.batches:
        parts += [_table(times), Text("")]
    parts += [Text(printable(line)) for times in bench.batches for line in _doubts(times)]
    parts += [Text(printable(f"note  {note}")) for note in bench.notes]
    return Group(*parts)


def gain(bench: Bench) -> str:
    """One sentence: the time of a step under the plan beside plain torch.compile, at the first batch size."""
    times = bench.batches[0]
    planned, low, high = times.policies[0], *times.interval(times.policies[0])
    took = f"{time_text(planned.step_ns)} a step under the plan, {time_text(times.plain.step_ns)} under {PLAIN}"
    interval = f"{100 * low:+.1f} to {100 * high:+.1f} %"
    if times.is_same(planned):
        verdict = f"The plan fuses nothing, so both run the same code ({interval} is noise)"
    elif times.is_even(planned):
        verdict = f"The plan gains nothing that could be measured here ({interval})"
    elif times.is_noise(planned):
        needed = _needed(times, planned)
        hint = f": about {needed} repeats would settle it (--repeats {needed})" if needed else ""
        verdict = f"Whether the plan gains anything is unclear ({interval}){hint}"
    else:
        change = times.change(planned)
        word = "less" if change < 0 else "more"
        verdict = f"A step takes {100 * abs(change):.1f} % {word} time with the plan ({interval})"
    return f"{verdict}; on {bench.device}, batch {times.batch}: {took}."


def _needed(times: BatchTimes, each: PolicyTime) -> int | None:
    """How many repeats would settle an unclear difference; None where it is clear, or so many aren't worth it."""
    return each.beside_plain.repeats_needed if each.beside_plain and _is_open(times, each) else None


def _is_open(times: BatchTimes, each: PolicyTime) -> bool:
    """Whether the repeats show neither a difference to plain torch.compile nor that there is none."""
    if each.policy == PLAIN or times.is_same(each):
        return False
    return times.is_noise(each) and not times.is_even(each)


def _doubts(times: BatchTimes) -> Iterator[str]:
    """The differences that the repeats leave open, and how many would settle them."""
    for each in times.policies:
        if each.same_as is None and _is_open(times, each):
            needed = _needed(times, each)
            settled = f"about {needed} repeats would settle it" if needed else "more repeats would hardly settle it"
            yield f"unclear  {each.policy} at batch {times.batch}: {settled}"


def _table(times: BatchTimes) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
    longest = max(len(word) for each in times.policies for word in each.policy.split())
    table.add_column(f"batch {times.batch}", overflow="fold", min_width=longest)
    for column in ("a step", "spread", "tokens/s", f"to {PLAIN}"):
        table.add_column(column, overflow="fold", justify="right")
    table.add_column("fused", overflow="fold")
    best = min(times.policies, key=lambda each: each.step_ns)
    best = times.plain if times.is_noise(best) else best
    for each in times.policies:
        fused = ", ".join(f"{rule} {count}" for rule, count in each.fused.items()) or (
            "" if each.policy == PLAIN else "-"
        )
        if each.same_as is not None:
            fused = f"as {each.same_as}"
        table.add_row(
            printable(each.policy), Text(time_text(each.step_ns), style="green" if each is best else ""),
            time_text(each.spread_ns), f"{times.tokens_per_s(each):,.0f}", change_text(times, each), fused,
        )  # fmt: skip
    return table


def time_text(ns: int) -> str:
    """`5.10 us`, `1.36 ms`: three digits that count."""
    unit, size = next(((unit, size) for unit, size in (("s", 1e9), ("ms", 1e6)) if ns >= size), ("us", 1e3))
    value = ns / size
    return f"{value:.0f} {unit}" if value >= 99.95 else f"{value:#.3g} {unit}"


def change_text(times: BatchTimes, each: PolicyTime) -> str:
    """`-5.2 % (-5.6 to -4.7)`, `same code` where nothing is fused, `even` where the difference surely is below 1 %, or
    `unclear`; empty for plain torch.compile itself.
    """
    if each.policy == PLAIN:
        return ""
    low, high = (100 * end for end in times.interval(each))
    if times.is_same(each):
        word = "same code"
    elif times.is_even(each):
        word = "even"
    else:
        word = "unclear" if times.is_noise(each) else f"{100 * times.change(each):+.1f} %"
    return f"{word} ({low:+.1f} to {high:+.1f})"
