"""Passes that others wrote as `PatternMatcherPass` objects, read without applying them.

A pass can be planned if it only replaces its matches (`register_replacement`). One that runs a function on the graph is
procedural, and one whose patterns hold an op that another pass puts in is chained to that one: these run where their
owner put them.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from torch import fx
from torch._inductor.pattern_matcher import (
    Match as InductorMatch,
)
from torch._inductor.pattern_matcher import (
    PatternEntry,
    PatternExpr,
    PatternMatcherPass,
    ReplacementPatternEntry,
    is_match,
)

from fuseplan.errors import ConfigError
from fuseplan.graph.facts import is_training, mutation_regions
from fuseplan.graph.legality import is_convex

GraphPass: TypeAlias = Callable[..., Any]


@dataclass(frozen=True, eq=False, kw_only=True)
class ExternalPass:
    """Somebody's pass, and the saving of a match.

    Attributes:
        matcher: a `torch._inductor.pattern_matcher.PatternMatcherPass`, unmodified.
        name: unique; default: the pass's own name.
        saving_us: the saving of each match; None: one kernel launch, since a replacement usually is one kernel less.
        uuid: identifies the version of its patterns, replacements, checks and kernels, or a function that returns it:
            compiled graphs, and the results of verification, are cached under it. None: they are not cached, unless the
            matcher has a `uuid` of its own.

    Raises:
        ConfigError: `matcher` is no such pass, or `saving_us` no finite number.
    """

    matcher: PatternMatcherPass
    name: str = ""
    saving_us: float | None = None
    uuid: Any = None

    def __post_init__(self) -> None:
        if not isinstance(self.matcher, PatternMatcherPass):
            raise ConfigError(
                f"matcher={self.matcher!r} isn't a PatternMatcherPass; hand over other passes as they are"
            )
        saving = self.saving_us
        if saving is not None and not (isinstance(saving, (int, float)) and math.isfinite(saving)):
            raise ConfigError(f"saving_us={saving!r}: allowed are None and finite numbers of microseconds")
        if not self.name:
            object.__setattr__(self, "name", self.matcher.pass_name or "external")

    @property
    def entries(self) -> list[PatternEntry]:
        """All entries registered in the pass."""
        return [entry for entries in self.matcher.patterns.values() for entry in entries]

    @property
    def is_procedural(self) -> bool:
        """Whether it does more than replace its matches."""
        return not all(isinstance(entry, ReplacementPatternEntry) for entry in self.entries)


@dataclass(frozen=True, eq=False, kw_only=True)
class ExternalMatch:
    """One place at which somebody's pattern matches.

    Attributes:
        owner: the pass.
        entry: the pattern and its replacement.
        anchor: the node at which the pattern was matched.
        consumed: the nodes that it replaces, in graph order.
        ordinal: of the pass's matches, in graph order.
        emits: the ops that the replacement calls.
        found: the match of Inductor's matcher, with the replacement traced for these very shapes.
    """

    owner: ExternalPass
    entry: PatternEntry
    anchor: fx.Node
    consumed: tuple[fx.Node, ...]
    ordinal: int
    emits: tuple[str, ...]
    found: InductorMatch

    @property
    def replacement(self) -> fx.GraphModule:
        """The replacement, a function of `arguments`."""
        assert self.found.replacement_graph is not None
        return self.found.replacement_graph

    @property
    def arguments(self) -> list[Any]:
        """The replacement's arguments, in the order of its placeholders: nodes and plain values."""
        assert isinstance(self.entry, ReplacementPatternEntry)
        return self.entry.normalize_args(*self.found.args, **self.found.kwargs)

    @property
    def outputs(self) -> list[fx.Node | None]:
        """The nodes whose readers get the replacement's results; one alone stands for a tuple where there are more
        results.
        """
        return self.found.output_nodes()

    @property
    def variables(self) -> dict[fx.Node, str]:
        """The pattern's names for the nodes that it reads."""
        named = {name: value for name, value in self.found.kwargs.items() if isinstance(value, fx.Node)}
        return {node: name for name, node in named.items()}

    @property
    def written_at(self) -> str | None:
        """The function that was registered as the replacement, and `file.py:12` of it; None where that isn't known."""
        function = _closed_over(self.entry.extra_check, "replace_fn")
        while (inner := _closed_over(function, "fn")) is not None:
            function = inner  # torch wraps methods
        code = getattr(function, "__code__", None)
        return f"{code.co_qualname} ({Path(code.co_filename).name}:{code.co_firstlineno})" if code else None

    def apply(self) -> bool:
        """Matches again, since an input may be another node by now, and replaces; False if it no longer matches."""
        if self.anchor._erased:
            return False
        match = _match(self.entry, self.anchor)
        if match is None:
            return False
        self.entry.apply(match, self.anchor.graph, self.anchor)
        return True


@dataclass(frozen=True, eq=False, kw_only=True)
class ChainedPass:
    """A pass of replacements that runs where its owner put it, since it matches ops that an earlier one puts in.

    Attributes:
        owner: the pass.
    """

    owner: ExternalPass

    def matches(self, graph: fx.Graph) -> list[ExternalMatch]:
        """Its matches in a graph now."""
        return list(_matches(graph, self.owner, mutation_regions(graph)))

    def __call__(self, graph: fx.Graph) -> None:
        """Applies it."""
        self.owner.matcher.apply(graph)


@dataclass(frozen=True, kw_only=True)
class ExternalMatches:
    """The matches of other people's passes on an unmodified graph.

    Attributes:
        candidates: of passes that can be planned.
        before: passes that run before the plan: no planned pass precedes them.
        after: passes that run after the plan, in their order.
    """

    candidates: tuple[ExternalMatch, ...] = ()
    before: tuple[GraphPass, ...] = ()
    after: tuple[GraphPass, ...] = field(default=())


def as_external(passes: Sequence[object]) -> tuple["ExternalPass | GraphPass", ...]:
    """Each pass as an `ExternalPass` or a function of the graph.

    Raises:
        ConfigError: it is neither, or two have one name.
    """
    result: list[ExternalPass | GraphPass] = []
    for each in passes if isinstance(passes, Iterable) else (passes,):
        if isinstance(each, PatternMatcherPass):
            result.append(ExternalPass(matcher=each))
        elif isinstance(each, ExternalPass) or callable(each):
            result.append(each)
        else:
            raise ConfigError(
                f"pass {each!r} is neither a PatternMatcherPass, an ExternalPass nor a function of a graph"
            )
    names = [each.name for each in result if isinstance(each, ExternalPass)]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"two passes are named {name!r}; wrap them as ExternalPass(matcher=..., name=...)")
    return tuple(result)


def find_external(graph: fx.Graph, passes: Sequence["ExternalPass | GraphPass"]) -> ExternalMatches:
    """Enumerates, without changing the graph."""
    regions = mutation_regions(graph) if passes else {}
    planned = [each for each in passes if isinstance(each, ExternalPass) and not each.is_procedural]
    found = {each.name: list(_matches(graph, each, regions)) for each in planned}
    emitted = {each.name: {target for match in found[each.name] for target in match.emits} for each in planned}
    chained = [each for i, each in enumerate(planned) if any(emitted[o.name] & _targets(each) for o in planned[:i])]
    independent = {each.name for each in planned if each not in chained}
    before: list[GraphPass] = []
    after: list[GraphPass] = []
    has_planned = False
    for each in passes:
        if isinstance(each, ExternalPass) and each.name in independent:
            has_planned = True
        else:
            (after if has_planned else before).append(_as_it_is(each))
    candidates = [match for each in planned if each.name in independent for match in found[each.name]]
    return ExternalMatches(candidates=tuple(candidates), before=tuple(before), after=tuple(after))


def _as_it_is(each: "ExternalPass | GraphPass") -> GraphPass:
    if not isinstance(each, ExternalPass):
        return each
    return each.matcher.apply if each.is_procedural else ChainedPass(owner=each)


def _matches(graph: fx.Graph, owner: ExternalPass, regions: dict[fx.Node, int]) -> Iterator[ExternalMatch]:
    ordinal = 0
    seen: set[frozenset[fx.Node]] = set()
    for node in graph.nodes:
        for entry in owner.matcher.patterns.get((node.op, node.target), ()):
            match = _match(entry, node)
            if match is None:
                continue
            consumed = tuple(sorted(match.nodes))
            if frozenset(consumed) in seen or not consumed or not is_convex(consumed):
                continue
            if len({regions[each] for each in consumed}) > 1:
                continue
            seen.add(frozenset(consumed))
            emits = _calls(match.replacement_graph)
            yield ExternalMatch(
                owner=owner, entry=entry, anchor=node, consumed=consumed, ordinal=ordinal, emits=emits, found=match
            )
            ordinal += 1
            break


def _match(entry: PatternEntry, node: fx.Node) -> InductorMatch | None:
    match = entry.pattern.match(node)
    if not is_match(match):
        return None
    assert isinstance(match, InductorMatch)
    streams = {each.meta.get("custom", {}).get("stream", 0) for each in match.nodes}
    return match if len(streams) == 1 and entry.extra_check(match) else None


def _closed_over(function: object, name: str) -> Any:
    """The variable of that name in a function's closure, None where there is none."""
    return inspect.getclosurevars(function).nonlocals.get(name) if inspect.isfunction(function) else None


GLUE = frozenset({"auto_functionalized", "auto_functionalized_v2", "empty", "empty_like", "getitem", "reshape", "view"})
"""Ops that most patterns and replacements contain: none of them chains one pass to another."""


def _calls(replacement: fx.GraphModule | None) -> tuple[str, ...]:
    """The ops that a replacement calls, those under `auto_functionalized` too."""
    if replacement is None:
        return ()
    nodes = [node for node in replacement.graph.nodes if node.op == "call_function"]
    return tuple(sorted(_ops(each for node in nodes for each in (node.target, *node.args))))


def _ops(values: Iterable[Any]) -> set[str]:
    """The names of ops among values, without glue."""
    functions = [each for each in values if callable(each) and not isinstance(each, PatternExpr)]
    return {str(each) for each in functions if getattr(each, "__name__", "").partition(".")[0] not in GLUE}


def _targets(owner: ExternalPass) -> set[str]:
    """The ops that the patterns of a pass call."""
    found: set[str] = set()
    stack: list[Any] = [entry.pattern for entry in owner.entries]
    while stack:
        pattern = stack.pop()
        if isinstance(pattern, PatternExpr):
            found |= _ops((*getattr(pattern, "fns", ()), *getattr(pattern, "args", ())))
            stack += [*getattr(pattern, "args", ()), *getattr(pattern, "outputs", ())]
            stack += [*getattr(pattern, "kwargs", {}).values()]
            stack += [getattr(pattern, name, None) for name in ("pattern", "inner_pattern")]  # of lists, and repeated
        elif isinstance(pattern, (list, tuple)):
            stack += pattern
    return found


def run_pass(graph_pass: GraphPass, graph: fx.Graph) -> None:
    """Runs somebody's pass on a graph."""
    if "is_inference" in inspect.signature(graph_pass).parameters:
        graph_pass(graph, is_inference=not is_training(graph))
    else:
        graph_pass(graph)


def external_of(owner: object, attributes: Sequence[str], name: str) -> ExternalPass | None:
    """The `PatternMatcherPass` that an object keeps in one of its attributes, as a pass of that name with the object's
    `uuid`, or None.
    """
    for attribute in attributes:
        matcher = getattr(owner, attribute, None)
        if isinstance(matcher, PatternMatcherPass):
            return ExternalPass(matcher=matcher, name=name, uuid=getattr(owner, "uuid", None))
    return None
