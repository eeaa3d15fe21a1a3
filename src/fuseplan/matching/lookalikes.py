"""Lookalikes of dialect ops, and places that would match if their rule were on."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from torch import fx

from fuseplan.graph.canonical import CanonicalGraph
from fuseplan.graph.facts import place_of, source_code, source_line
from fuseplan.graph.ops import ops
from fuseplan.graph.reach import path_between
from fuseplan.matching.match import Matches
from fuseplan.record import Nearness, Reason, Refusal
from fuseplan.rules import Rule
from fuseplan.rules.parts import Core, Part, Prologue, Reported, part_at, part_of


def unclaimed(canonical: CanonicalGraph, claimed: set[int]) -> Iterator[Refusal]:
    """Lookalikes of dialect ops that no rule has reported, as far as their part asks for it."""
    for node, refusal in canonical.unraised.items():
        part = _part_named(refusal.op)
        if id(refusal) in claimed or part is None or part.reported in (Reported.BY_RULE, Reported.NEVER):
            continue
        if part.reported is Reported.ALWAYS or _core_near(node, part):
            claimed.add(id(refusal))
            yield refusal


def of_rules(canonical: CanonicalGraph, rules: Mapping[str, Sequence[Rule]], claimed: set[int]) -> Iterator[Refusal]:
    """Lookalikes of dialect ops, where their part asks for them: reported for the rule whose core they resemble, or
    else for one that has the op; among several, for the one with the fewest flags.
    """
    members = [member for _, each in sorted(rules.items(), reverse=True) for member in each]
    members.sort(key=lambda member: -len(member.flags))
    owners = {op.name: member.name for member in members for call in member.calls if (op := ops.of(call.target))}
    owners |= {member.core.name: member.name for member in members}
    for refusal in canonical.refusals:
        part = _part_named(refusal.op)
        if part is None or part.reported is not Reported.BY_RULE or id(refusal) in claimed:
            continue
        if part.op.name in owners:
            yield replace(refusal, rule=owners[part.op.name], site=refusal.source)


def _part_named(op: str | None) -> Part | None:
    """The part that a dialect op belongs to, by the op's name."""
    return part_of(ops.get(op)) if op is not None else None


def noted_as(name: str) -> str:
    """The op that names the refusal of something that isn't raised: its part's first."""
    part = _part_named(name)
    return part.op.name if part is not None else name


def _core_near(node: fx.Node, part: Part) -> bool:
    towards_users = isinstance(part, Prologue)
    starts = node.users if towards_users else node.all_input_nodes
    return any(path_between(start, _is_near_core, "users" if towards_users else "inputs") for start in starts)


def _is_near_core(node: fx.Node) -> bool:
    """Whether a node calls a core that prologues and epilogues stand around."""
    part = part_at(node)
    return isinstance(part, Core) and part.reported is not Reported.BY_RULE


def is_always_reported(refusal: Refusal) -> bool:
    """Whether a refusal is reported whatever rules ask for."""
    part = _part_named(refusal.op)
    return part is not None and part.reported is Reported.ALWAYS


def find_disabled(matches: Matches, flags: Mapping[str, str]) -> tuple[Refusal, ...]:
    """Places that would match if their flag weren't off.

    Args:
        matches: of rules that are off, on one graph.
        flags: by rule name, the flag that is off.
    """
    first = {(match.rule.name, match.anchor): match for match in reversed(matches.candidates)}
    return tuple(
        Refusal(
            reason=Reason.DISABLED, rule=name, op=match.rule.core.name, nodes=(match.core.name,),
            detail=f"it matches, and {flags[name]}=False switches it off", source=place_of(match.core),
            fix=f"leave {flags[name]} out, or set it to True", nearness=Nearness.REFUSED, site=place_of(match.core),
            expected=f"{flags[name]} not False", found=f"{flags[name]}=False", line=source_line(match.core),
            code=source_code(match.core),
        )
        for (name, _), match in reversed(first.items())
    )  # fmt: skip
