"""A plan: the fusions applied to one graph in one compile range, the others and why not, and the proof that none is
better. Saved as JSON, compared, replayed.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fuseplan.errors import PlanError
from fuseplan.record.files import check_writable, read_bytes, reading, write_whole, writing
from fuseplan.record.parsing import parse_object
from fuseplan.record.serialization import from_json, to_json
from fuseplan.record.text import one_line

SCHEMA = 1
LARGEST_BYTES = 32 * 2**20


@dataclass(frozen=True, kw_only=True)
class Selected:
    """A fusion that is applied.

    Attributes:
        name: place, rule, fused op, provider; the same on every rank.
        signature: the op with dtypes, static sizes and attributes.
        source: module path in the user's model, if known.
        saving_ns: its saving, weighted over the sizes of the range.
        provenance: how the saving is known: `measured`, `modelled`, `declared` by its owner, or `assumed`.
        low_ns: the lower end of the interval that holds the saving in 80 of 100 cases; None where that isn't known.
        high_ns: its upper end.
    """

    name: str
    signature: str
    source: str | None
    saving_ns: int
    provenance: str = "modelled"
    low_ns: int | None = None
    high_ns: int | None = None


@dataclass(frozen=True, kw_only=True)
class Rejected:
    """A fusion that matches and is not applied.

    Attributes:
        name: as for `Selected`.
        signature: as for `Selected`.
        source: as for `Selected`.
        saving_ns: its saving by itself; negative where it costs.
        blocked_by: names of the fusions in its way; empty where it is just not worth it.
        lost_ns: how much less a plan that has to apply it saves; None where none can.
        flips_at_ns: the longest time of its op at which it would be applied; None where no time is short enough, or its
            time isn't known.
        provenance: as for `Selected`.
        low_ns: as for `Selected`.
        high_ns: as for `Selected`.
        lost_low_ns: the lower end of the interval of `lost_ns`; None where that isn't known.
        lost_high_ns: its upper end.
    """

    name: str
    signature: str
    source: str | None
    saving_ns: int
    blocked_by: tuple[str, ...]
    lost_ns: int | None
    flips_at_ns: int | None
    provenance: str = "modelled"
    low_ns: int | None = None
    high_ns: int | None = None
    lost_low_ns: int | None = None
    lost_high_ns: int | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The fusions applied to one graph.

    Attributes:
        graph: its name in the report.
        range: first and last number of tokens, None where they aren't limited.
        device: the profile that it was priced for.
        prices: `modelled`, `measured`, `declared`, `assumed`, or several of them where candidates differ.
        sites: the signature of every contested place, in graph order.
        selected: in order of name.
        rejected: in order of name.
        objective_ns: the saving of the selected together.
        bound_ns: no legal selection saves more.
        unfused_ns: the unfused time of all contested sites, at the middle size of the range.
        components: how many sets of candidates are independent of each other.
        classes: how many of those differ.
        cuts: sets of candidates that would be cyclic together.
        low_ns: the lower end of the interval of `objective_ns`; None where that isn't known.
        high_ns: its upper end.
        ahead_ns: the smallest margin over the next best alternative at a place; None where there is none.
        ahead_low_ns: the lower end of its interval.
        ahead_high_ns: the upper end.
    """

    graph: str
    range: tuple[int, int] | None
    device: str
    prices: tuple[str, ...]
    sites: tuple[str, ...]
    selected: tuple[Selected, ...]
    rejected: tuple[Rejected, ...]
    objective_ns: int
    bound_ns: int
    unfused_ns: int
    components: int
    classes: int
    cuts: tuple[tuple[str, ...], ...] = ()
    low_ns: int | None = None
    high_ns: int | None = None
    ahead_ns: int | None = None
    ahead_low_ns: int | None = None
    ahead_high_ns: int | None = None

    @property
    def gap(self) -> float:
        """`(bound - objective) / max(1, |bound|)`. 0.0 certifies that no legal selection saves more."""
        return (self.bound_ns - self.objective_ns) / max(1, abs(self.bound_ns))

    @property
    def digest(self) -> str:
        """sha256 of the applied fusions by rule, op, provider, shape and place; no node names and no prices."""
        return choice_digest(self.sites, [(each.name, each.signature) for each in self.selected])


def choice_digest(sites: Sequence[str], chosen: Sequence[tuple[str, str]]) -> str:
    """sha256 of the sites of a graph, and of names and signatures of the fusions there."""
    return hashlib.sha256(json.dumps([sites, chosen]).encode()).hexdigest()


def plan_to_json(plan: Plan) -> dict[str, Any]:
    """A plan as plain JSON values, with its certificate and its digest."""
    return {**to_json(plan), "gap": plan.gap, "digest": plan.digest}


@dataclass(frozen=True, kw_only=True)
class SavedPlans:
    """The plans of a workload: one a graph and range.

    Attributes:
        workload: as the user named it.
        tp: ranks of tensor parallelism.
        plans: in the order of graphs and ranges.
        schema: of the file.
    """

    workload: str
    tp: int
    plans: tuple[Plan, ...]
    schema: int = field(default=SCHEMA)

    def save(self, path: Path) -> None:
        """Writes the plans as JSON: the whole file, or none.

        Raises:
            PlanError: the file can't be written.
        """
        plans = [plan_to_json(plan) for plan in self.plans]
        text = json.dumps({"schema": self.schema, "workload": self.workload, "tp": self.tp, "plans": plans}, indent=1)
        with writing("plan file", path, PlanError):
            write_whole(path, text + "\n")

    @staticmethod
    def check_file(path: Path) -> None:
        """Refuses a path that plans can't be written to, before there are any.

        Raises:
            PlanError: the text says why not.
        """
        with writing("plan file", path, PlanError):
            check_writable(path)

    @classmethod
    def load(cls, path: Path) -> "SavedPlans":
        """Reads a file that `save` wrote.

        Raises:
            PlanError: there is none, it isn't one of this schema, it is larger than `LARGEST_BYTES`, or a digest
                doesn't fit its plan.
        """
        with reading("plan file", path, PlanError):
            return cls._decode(parse_object(read_bytes(path, LARGEST_BYTES), most_bytes=LARGEST_BYTES, schema=SCHEMA))

    @classmethod
    def _decode(cls, data: dict[str, Any]) -> "SavedPlans":
        plans = data.get("plans")
        if not isinstance(plans, list) or not all(isinstance(plan, dict) for plan in plans):
            raise ValueError("its plans aren't a list of objects")
        digests = [(plan.pop("gap", None), plan.pop("digest", None))[1] for plan in plans]
        saved = from_json(cls, data)
        for plan, digest in zip(saved.plans, digests, strict=True):
            if digest not in (None, plan.digest):
                raise ValueError(f"{_title(plan)} was changed after it was saved")
        return saved

    def find(self, graph: str, span: tuple[int, int] | None) -> Plan:
        """The plan of a graph in a range.

        Raises:
            PlanError: there is none; the text says which there are.
        """
        for plan in self.plans:
            if (plan.graph, plan.range) == (graph, span):
                return plan
        there = one_line(", ".join(_title(plan) for plan in self.plans)) or "none"
        wanted = f"{graph} at {span[0]}:{span[1]} tokens" if span else graph
        raise PlanError(f"the saved plans have none for {wanted}; there are: {there}")


def diff(left: SavedPlans, right: SavedPlans) -> list[str]:
    """The changes between two files, one line each; empty where the same is applied at the same places."""
    lines = [
        f"{name}: {before} -> {after}"
        for name, before, after in (("workload", left.workload, right.workload), ("tp", left.tp, right.tp))
        if before != after
    ]
    rows = {(plan.graph, plan.range): plan for plan in left.plans}
    others = {(plan.graph, plan.range): plan for plan in right.plans}
    for key in {**rows, **others}:
        if key not in others:
            lines.append(f"{_title(rows[key])}: only in the first")
        elif key not in rows:
            lines.append(f"{_title(others[key])}: only in the second")
        else:
            lines += [f"{_title(rows[key])}: {change}" for change in _changes(rows[key], others[key])]
    return lines


def _changes(left: Plan, right: Plan) -> Iterator[str]:
    for name in ("device", "prices"):
        before, after = getattr(left, name), getattr(right, name)
        if before != after:
            yield f"{name}: {_text(before)} -> {_text(after)}"
    site = first_difference(left.sites, right.sites)
    if site is not None:
        yield site
    before, after = ({_place(each.name): each for each in plan.selected} for plan in (left, right))
    grouped: dict[tuple[str, str], list[str]] = {}
    for place in {**before, **after}:
        old, new = before.get(place), after.get(place)
        change = (_choice(old), _choice(new))
        if change[0] != change[1]:
            grouped.setdefault(change, []).append(place)
    for (old_choice, new_choice), places in grouped.items():
        where = f"site {places[0]}" if len(places) == 1 else f"{len(places)} sites, first {places[0]}"
        yield f"{old_choice} -> {new_choice} ({where})"
    if left.objective_ns != right.objective_ns:
        saved = [f"{each.objective_ns / 1000:.1f} of {each.unfused_ns / 1000:.1f} us" for each in (left, right)]
        yield f"saves {' -> '.join(saved)}"


def first_difference(before: Sequence[str], after: Sequence[str]) -> str | None:
    """The first place at which two graphs differ, or None."""
    for index, (old, new) in enumerate(zip(before, after, strict=False)):
        if old != new:
            return f"site {index} was {old} and is {new}"
    if len(before) != len(after):
        return f"there were {len(before)} sites and are {len(after)}"
    return None


def _title(plan: Plan) -> str:
    return f"{plan.graph} {plan.range[0]}:{plan.range[1]}" if plan.range else plan.graph


def _place(name: str) -> str:
    return name.split(" ", 1)[0]


def _choice(selected: Selected | None) -> str:
    return " ".join(selected.name.split(" ")[1:]) if selected else "unfused"


def _text(value: object) -> str:
    return " and ".join(map(str, value)) if isinstance(value, tuple) else str(value)
