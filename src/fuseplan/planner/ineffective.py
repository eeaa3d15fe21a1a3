"""Flags and selectors without effect in a graph. Each is a refusal that users see as a warning, with the reason."""

import re
from collections.abc import Iterator, Mapping, Sequence

from fuseplan.config import PassConfig
from fuseplan.matching import Matches, missing_ops
from fuseplan.planner.decide import Decision
from fuseplan.planner.pose import Problem
from fuseplan.record import Reason, Refusal
from fuseplan.rules import Rule


def ineffective_requests(
    config: PassConfig,
    ineffective_flags: Sequence[str],
    overruled: Mapping[str, tuple[str, str]],
    rules: Mapping[str, Sequence[Rule]],
    matches: Matches,
    problem: Problem,
    decision: Decision,
) -> Iterator[Refusal]:
    """Selectors without a match, and flags that are True without effect on the applied fusions.

    A rule that lost to another fusion did have an effect: the report has it among the conflicts.

    Args:
        config: its settings.
        ineffective_flags: flags that no rule answers to.
        overruled: of flags that are True, a rule of theirs that another flag switches off, and that flag.
        rules: enabled ones, by name.
        matches: of the graph.
        problem: its problem.
        decision: the fusions that are applied.
    """
    for flag in ineffective_flags:
        if getattr(config, flag) is True:
            yield _no_effect(f"{flag}=True has no effect: none of the given rules answers to it")
    for selector in problem.ineffective:
        if selector in config.forbid and re.split("[@#:]", selector)[0] not in rules:
            continue  # it is off in this graph anyway
        yield _no_effect(f"{selector!r} is forced or forbidden, and selects no match in this graph")
    reported = {*overruled} - {members[0].opt_in for members in rules.values()}
    for flag in sorted(reported):
        yield _no_effect(f"{flag}=True has no effect: {_overruling(*overruled[flag])}")
    counts = {match.rule.name for match in matches.candidates}
    for name, members in rules.items():
        flags = (members[0].opt_in,) if members[0].opt_in else members[0].flags
        if not flags or not all(getattr(config, flag) is True for flag in flags):
            continue
        if name not in counts and any(other in counts and {*flags} <= {*rules[other][0].flags} for other in rules):
            continue  # they switch on something else, too, which matches
        if {*flags} & reported:
            continue
        why = _too_dear(name, problem, decision)
        if name not in counts:
            missing = missing_ops(problem.canonical, members)
            refused = next((each.detail for each in matches.refusals if each.rule == name), None)
            why = f"the graph has no {' and no '.join(missing)}" if missing else refused or f"{name} matches nowhere"
            if flags[0] in overruled:
                reported.add(flags[0])
                why = _overruling(*overruled[flags[0]])
        if why is not None:
            yield _no_effect(f"{' and '.join(flags)}=True has no effect: {why}", name)


def _too_dear(name: str, problem: Problem, decision: Decision) -> str | None:
    """Why none of a rule's matches pays off, if their price is the only reason."""
    mine = {index for index, candidate in enumerate(problem.candidates) if candidate.rule == name}
    lost = [each for each in decision.lost if each.candidate in mine]
    margins = [each.lost_ns for each in lost if each.lost_ns is not None]
    if len(lost) < len(mine) or not margins or any(each.blocked_by for each in lost):
        return None
    places = "place" if len(mine) == 1 else "places"
    if mine & problem.unsure:
        return f"it isn't sure to gain in any of {len(mine)} {places}; fuseplan tune --only-unsure would settle it"
    return f"it costs at least {min(margins) / 1000:.1f} us more than it saves in each of {len(mine)} {places}"


def _overruling(rule: str, flag: str) -> str:
    return f"{flag}=False switches {rule} off"


def _no_effect(detail: str, rule: str | None = None) -> Refusal:
    return Refusal(reason=Reason.NO_EFFECT, rule=rule, detail=detail)
