"""Where a rule nearly matched: the obstacles, for every op that a fusion should start or end with.

A pattern is followed from its anchor towards its inputs. Where the graph has another op than the pattern, the expected
one is looked for a few thin ops further: found, these ops are obstacles; not found, it is absent. Prologues that no
match takes are looked at from their own side too, since their norm may be hidden or gone.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import fx

from fuseplan.graph.canonical import CanonicalGraph
from fuseplan.graph.facts import arguments, dtype_name, place_of, source_code, source_line
from fuseplan.graph.legality import is_convex
from fuseplan.graph.ops import DialectOp, ops
from fuseplan.graph.reach import is_view, path_between
from fuseplan.matching.blame import Shared
from fuseplan.matching.candidates import missing_ops, op_name
from fuseplan.matching.lookalikes import is_always_reported, noted_as, of_rules, unclaimed
from fuseplan.matching.match import Matches
from fuseplan.matching.obstacles import without_taken
from fuseplan.matching.outline import Outline, difference, outline_of
from fuseplan.matching.trial import Place, Way
from fuseplan.record import Nearness, Reason, Refusal
from fuseplan.rules import Rule
from fuseplan.rules.parts import Epilogue, Prologue, part_at, part_of


@dataclass(frozen=True, eq=False, kw_only=True)
class Gap:
    """An edge of the pattern where the graph has something else.

    Attributes:
        expected: the pattern's op.
        consumer: the node that should read it.
        found: the value that it reads.
        way: from `found` towards the expected one, if that is near.
        goal: the expected op, or a lookalike; None where it is not near.
        lacking: of an absent one, how many calls of the pattern aren't there: itself and all behind it.
    """

    expected: str
    consumer: fx.Node
    found: object
    way: Sequence[fx.Node] = ()
    goal: fx.Node | None = None
    lacking: int = 1


@dataclass(eq=False, kw_only=True)
class Attempt:
    """A pattern compared with the graph at one anchor, as far as it matches.

    Attributes:
        rule: the member of the rule's family.
        anchor: the node where it was compared.
        core: the node of its core, if there is one.
        gaps: where the graph differs, from the anchor on.
        calls: the nodes that call its ops, as far as these are there.
    """

    rule: Rule
    anchor: fx.Node
    core: fx.Node | None = None
    gaps: list[Gap] = field(default_factory=list)
    calls: list[fx.Node] = field(default_factory=list)

    @property
    def rank(self) -> tuple[int, int, int]:
        """The nearest first: fewest calls missing, then fewest obstacles and most calls found; where any is missing,
        the number of calls found counts more than the obstacles.
        """
        missing = sum(gap.lacking for gap in self.gaps if gap.goal is None)
        obstacles, found = sum(len(gap.way) for gap in self.gaps), len(self.calls)
        return (missing, -found, obstacles) if missing else (0, obstacles, -found)


def find_near_misses(
    canonical: CanonicalGraph, rules: Mapping[str, Sequence[Rule]], matches: Matches
) -> tuple[Refusal, ...]:
    """All causes why rules don't match, beside those in `matches`.

    Args:
        canonical: the graph.
        rules: members by rule name.
        matches: of these rules on this graph.
    """
    found: list[Refusal] = []
    claimed: set[int] = set()
    looks_like = {refusal.op for refusal in canonical.refusals}
    settled = {node for match in matches.candidates for node in match.consumed}
    settled |= {node for miss in matches.misses for node in miss.consumed}
    coreless: list[Sequence[Rule]] = []
    shared = Shared(canonical)
    for _, members in sorted(rules.items()):
        missing = {name for name in missing_ops(canonical, members) if noted_as(name) not in looks_like}
        if not missing:
            search = _Search(shared, members, matches)
            found += search.refusals()
            claimed |= search.claimed
            settled |= search.anchors.keys()
        elif missing <= {member.core.name for member in members}:
            coreless.append(members)
    # Without a core anywhere, a rule doesn't report places that other rules match, or nearly match.
    for members in coreless:
        found += _Search(shared, members, matches, settled).refusals()
    return (*found, *unclaimed(canonical, claimed), *of_rules(canonical, rules, claimed))


class _Search:
    """Near misses of one rule.

    Attributes:
        claimed: identities of refusals of the canonical graph that the rule reports as its own.
        anchors: the nodes that a member's pattern could end at and that aren't settled, with these members.
    """

    def __init__(
        self, shared: Shared, members: Sequence[Rule], matches: Matches, settled: Collection[fx.Node] = ()
    ) -> None:
        self.canonical, self.shared = shared.canonical, shared
        self.members, self.name = members, members[0].name
        self.outlines = {member: outline_of(member) for member in members}
        mine = [match for match in matches.candidates if match.rule.name == self.name]
        misses = [miss for miss in matches.misses if miss.rule.name == self.name]
        self.candidates = mine
        self.covered = {node for match in mine for node in match.consumed}
        self.done = {match.anchor for match in mine} | {miss.anchor for miss in misses} | {*settled}
        self.named = {node for miss in misses for node in miss.consumed}
        self.claimed: set[int] = set()
        self.anchors = self._anchors()

    def refusals(self) -> Iterator[Refusal]:
        """One for each place."""
        refused: list[fx.Node] = []
        for anchor, members in self.anchors.items():
            attempt = min((self._attempt(member, anchor) for member in members), key=lambda each: each.rank)
            refused += [node for node in (attempt.core, anchor) if node is not None]
            self.named.update(gap.goal for gap in attempt.gaps if gap.goal is not None)
            yield self._explain(attempt)
        yield from self._unread_prologues()
        yield from self.shared.siblings.missing(self.members, self.candidates, [*refused, *self.named])

    def _anchors(self) -> dict[fx.Node, list[Rule]]:
        """Nodes that a member's pattern could end at and that aren't settled, in graph order."""
        found: dict[fx.Node, list[Rule]] = {}
        for member in self.members:
            for node in self.outlines[member].nodes(self.canonical.graph):
                if node not in self.done:
                    found.setdefault(node, []).append(member)
        for node, refusal in self.canonical.unraised.items():
            members = [each for each in self.members if self.outlines[each].name == refusal.op]
            if not is_always_reported(refusal) and any(self._is_near(each, node) for each in members):
                found[node] = members
        return dict(sorted(found.items()))

    def _is_near(self, rule: Rule, node: fx.Node) -> bool:
        """Whether the pattern's next op is behind a node that looks like an anchor."""
        return all(gap.goal is not None for gap in self._attempt(rule, node).gaps)

    def _attempt(self, rule: Rule, anchor: fx.Node) -> Attempt:
        attempt, outline = Attempt(rule=rule, anchor=anchor), self.outlines[rule]
        if anchor in self.canonical.unraised:
            attempt.gaps.append(Gap(expected=outline.name, consumer=anchor, found=anchor, goal=anchor))
            (first,) = anchor.all_input_nodes[:1] or (None,)
            for _, part in outline.inputs[:1]:
                self._follow(attempt, part, first, anchor)
        else:
            self._enter(attempt, outline, outline.call_of(anchor))
        return attempt

    def _follow(self, attempt: Attempt, expected: Outline, found: object, consumer: fx.Node) -> None:
        """Compares one call of the pattern with the graph's node in its place."""
        reached: tuple[list[fx.Node], fx.Node] | None = None
        if isinstance(found, fx.Node):
            if expected.fits(found) and not self._is_taken(expected, found):
                self._enter(attempt, expected, expected.call_of(found))
                return
            reached = self._search(expected, found)
        if reached is None:
            gap = Gap(expected=expected.name, consumer=consumer, found=found, lacking=expected.size)
            attempt.gaps.append(gap)
            return
        way, goal = reached
        attempt.gaps.append(Gap(expected=expected.name, consumer=consumer, found=found, way=way, goal=goal))
        if goal not in self.canonical.unraised:
            self._enter(attempt, expected, expected.call_of(goal))

    def _enter(self, attempt: Attempt, expected: Outline, found: fx.Node) -> None:
        """Goes on to the inputs of a call that matches the pattern's."""
        attempt.calls.append(found)
        if expected.is_core:
            attempt.core = found
        for place, part in expected.inputs:
            self._follow(attempt, part, arguments(found)[place], found)

    def _search(self, expected: Outline, found: fx.Node) -> tuple[list[fx.Node], fx.Node] | None:
        """(obstacles, the expected node or a lookalike) behind `found`."""
        name = noted_as(expected.name)
        unraised = self.canonical.unraised

        def is_goal(node: fx.Node) -> bool:
            if node in unraised:
                return unraised[node].op == name
            return expected.fits(node) and not self._is_taken(expected, node)

        return path_between(found, is_goal, "inputs")

    def _is_taken(self, expected: Outline, node: fx.Node) -> bool:
        """Whether a prologue's op belongs to another match already; one core can have several epilogues."""
        return not expected.is_core and node in self.covered

    def _unread_prologues(self) -> Iterator[Refusal]:
        """Prologues that no match takes and no anchor has led to, looked at from their own side."""
        ends = {member.core.overload for member in self.members} | {each.target for each in self.outlines.values()}
        targets = {node.target for member in self.members if not member.is_composed for node in member.calls}
        prologues = {op for target in targets - ends if (op := ops.of(target)) is not None}
        prologues -= {op for op in prologues if isinstance(part_of(op), Epilogue)}
        for op in sorted(prologues, key=lambda each: each.name):
            for node in self.canonical.graph.find_nodes(op="call_function", target=op.overload):
                if node not in self.covered and node not in self.named:
                    yield self._explain_unread(op, node)

    def _explain_unread(self, op: DialectOp, node: fx.Node) -> Refusal:
        cores = {member.core.overload: member.core for member in self.members}
        looks_like = {noted_as(core.name) for core in cores.values()}

        def is_core(each: fx.Node) -> bool:
            refusal = self.canonical.unraised.get(each)
            return each.target in cores or (refusal is not None and refusal.op in looks_like)

        for user in node.users:
            reached = path_between(user, is_core, "users")
            if reached is not None:
                way, goal = reached
                if goal in self.canonical.unraised:
                    return self._claim(goal, self.canonical.unraised[goal].op)
                if without_taken(way, node):
                    gap = Gap(expected=op.name, consumer=goal, found=way[-1], way=way[::-1], goal=node)
                    return self._obstructed([gap], goal, goal)
        for core in node.users:
            if core.target in cores:
                role = cores[core.target].arguments[arguments(core).index(node)]
                if role == "residual":
                    return self._taken_as_residual(op, node, core)
                return self._refuse(
                    core, Reason.OP, f"{op.name} is read as the {role} of {op_name(core)}", nearness=Nearness.ABSENT,
                    expected=f"{op.name} as another argument", found=role, site=place_of(core), further=(node,),
                )  # fmt: skip
        reader = next((each for each in node.users if each.op == "call_function"), None)
        found = op_name(reader) if reader is not None else "the graph's output"
        expected = min((core.name for core in cores.values()), key=len)
        return self._refuse(
            reader or node, Reason.OP, f"expected {expected} after {op.name}, found {found}",
            nearness=Nearness.ABSENT, expected=expected, found=found, site=place_of(node), further=(node,),
        )  # fmt: skip

    def _taken_as_residual(self, op: DialectOp, node: fx.Node, core: fx.Node) -> Refusal:
        """Why a prologue's result isn't the addend that the rule would fuse."""
        other, added, part = core.args[0], op_name(core), part_at(node)
        if isinstance(part, Prologue) and part.added_twice is not None and part_at(other) is part:
            blame = part.added_twice(added)
            return self._refuse(
                core, blame.reason, blame.detail, nearness=Nearness.OBSTRUCTED, expected=f"one {op.name}",
                found=blame.found, site=place_of(core), fix=blame.fix, further=(node,),
            )  # fmt: skip
        assert isinstance(other, fx.Node), core.format_node()
        others = [user for user in node.users if user is not core]
        reader = next((user for user in others if user is other or not is_convex([user], [other])), None)
        if reader is not None:
            found = op_name(reader)
            detail = f"{op.name} is also read by {found} ({reader.name}), and what {added} adds depends on it"
            return self._refuse(
                reader, Reason.USERS, detail, nearness=Nearness.OBSTRUCTED, expected=f"no other reader of {op.name}",
                found=found, site=place_of(core), further=(node, core),
            )  # fmt: skip
        dtypes = dtype_name(node), dtype_name(other)
        if dtypes[0] == dtypes[1]:
            return self._taken_for_the_other(op, node, core, other)
        detail = f"{op.name} is added as the residual of {added}: it is {dtypes[0]}, and the norm yields {dtypes[1]}"
        return self._refuse(
            core, Reason.DTYPE, detail, nearness=Nearness.OBSTRUCTED, expected=f"{op.name} of {dtypes[1]}",
            found=dtypes[0], site=place_of(core), further=(node,),
        )  # fmt: skip

    def _taken_for_the_other(self, op: DialectOp, node: fx.Node, core: fx.Node, other: fx.Node) -> Refusal:
        """Why of two addends of one dtype the other one is the norm's first: it is computed from another prologue, or
        the graph called an op that tells them apart.
        """
        added, place = op_name(core), _origin(other)
        found = op_name(place) if place is not None else "an input of the graph"
        detail = f"{op.name} is added as the residual of {added}"
        expected = op.name
        fix: str | None = f"swap the two addends of {added}"
        if path_between(other, lambda each: each.target is op.overload, "inputs") is not None:
            detail += f", whose other addend, {found}, is computed from {op.name}, too"
            expected, found, fix = f"one {op.name}", f"two of {op.name}", None
        else:
            detail += f": the rule has it in the place of the other addend, {found}"
        return self._refuse(
            core, Reason.OP, detail, nearness=Nearness.OBSTRUCTED, expected=expected, found=found,
            site=place_of(core), fix=fix, further=(node,),
        )  # fmt: skip

    def _explain(self, attempt: Attempt) -> Refusal:
        site = attempt.core or attempt.anchor
        absent = [gap for gap in attempt.gaps if gap.goal is None]
        if not attempt.gaps:
            return self._unequal(attempt, site)
        if not absent:
            gap = attempt.gaps[0]
            assert gap.goal is not None
            if gap.goal in self.canonical.unraised:
                return self._claim(gap.goal, attempt.rule.core.name)
            return self._obstructed(attempt.gaps, attempt.anchor, site, attempt.calls)
        gap = absent[0]
        place = _origin(gap.found)
        found = op_name(place) if place is not None else "an input of the graph"
        place = place or gap.consumer
        # With or without a residual: either would do.
        cores = [member.core.name for member in self.members if gap.expected == attempt.rule.core.name]
        expected = min(cores, key=len, default=gap.expected)
        return self._refuse(
            place, Reason.OP, f"expected {expected} before {op_name(gap.consumer)}, found {found}",
            nearness=Nearness.ABSENT, expected=expected, found=found, site=place_of(site), further=(gap.consumer,),
        )  # fmt: skip

    def _unequal(self, attempt: Attempt, site: fx.Node) -> Refusal:
        """All ops are there, and one of their arguments is another."""
        found = difference(attempt.rule, attempt.anchor)
        return self._refuse(
            found.node if found else site, Reason.ATTRIBUTE,
            found.detail if found else "its ops are there, and take other keyword arguments than the rule's",
            nearness=Nearness.REFUSED, expected=found.expected if found else "the rule's arguments",
            found=found.found if found else "others", site=place_of(site), further=(attempt.anchor,),
        )  # fmt: skip

    def _obstructed(
        self, gaps: Sequence[Gap], anchor: fx.Node, site: fx.Node, calls: Sequence[fx.Node] = ()
    ) -> Refusal:  # fmt: skip
        gap = gaps[0]
        assert gap.goal is not None
        ways = [Way(nodes=each.way, goal=each.goal) for each in gaps if each.goal is not None]
        place = Place(members=self.members, anchor=anchor, ways=ways, calls=calls)
        obstruction = self.shared.obstruction(place, gap.consumer)
        return self._refuse(
            obstruction.node, obstruction.reason, obstruction.detail, nearness=Nearness.OBSTRUCTED,
            expected=gap.expected, found=obstruction.found, site=place_of(site), fix=obstruction.fix,
            further=(*gap.way, gap.consumer, gap.goal),
        )  # fmt: skip

    def _claim(self, node: fx.Node, core: str | None) -> Refusal:
        refusal = self.canonical.unraised[node]
        self.claimed.add(id(refusal))
        return replace(refusal, rule=self.name, site=refusal.source, op=core)

    def _refuse(
        self, node: fx.Node, reason: Reason, detail: str, *, nearness: Nearness, expected: str, found: str,
        site: str | None, fix: str | None = None, further: Iterable[fx.Node] = (),
    ) -> Refusal:  # fmt: skip
        names = dict.fromkeys(self.canonical.source_node(each).name for each in (node, *further))
        return Refusal(
            reason=reason, rule=self.name, op=self.members[0].core.name, detail=detail, nodes=tuple(names),
            source=place_of(node) or site, fix=fix, nearness=nearness, expected=expected, found=found, site=site,
            line=source_line(node), code=source_code(node),
        )  # fmt: skip


def _origin(found: object) -> fx.Node | None:
    """The op that computes a value, seen through views; None for an input of the graph."""
    while isinstance(found, fx.Node) and found.op == "call_function" and is_view(found):
        found = found.all_input_nodes[0]
    return found if isinstance(found, fx.Node) and found.op == "call_function" else None
