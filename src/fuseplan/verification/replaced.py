"""Matches of other people's passes, prepared for verification: both sides, the results that the graph reads, and
arguments at every size.
"""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from fuseplan.caching.fingerprint import fingerprint
from fuseplan.graph.facts import drops_nothing, fill_of, hint, is_item, signature_text, tensor_of
from fuseplan.graph.layout import layout_reader, storage_of
from fuseplan.matching import ExternalMatch
from fuseplan.verification import outcomes
from fuseplan.verification.region import ENGINE_COLLECTIVES
from fuseplan.verification.sides import TORCHS, Side, sides_of
from fuseplan.verification.specs import SMALL, Case, Sizes, TensorSpec, concrete, possible, spec_of

functional = torch.ops._c10d_functional
COLLECTIVES = ("_c10d_functional", "_dtensor", "c10d", "c10d_functional", "symm_mem")


@dataclass(frozen=True, eq=False, kw_only=True)
class Result:
    """A result that the graph reads.

    Attributes:
        output: index of the pattern's output that it is, or is an item of.
        item: index of the item; None: the output itself.
        node: its node in the graph.
        promise: the replacement's fake value; None: it has none.
    """

    output: int
    item: int | None
    node: fx.Node
    promise: Tensor | None

    def of(self, values: Sequence[Any]) -> Any:
        """The result, among the values of a side."""
        value = values[self.output]
        return value if self.item is None else value[self.item]


@dataclass(frozen=True, kw_only=True)
class Replaced:
    """A match of another pass, prepared for verification.

    Attributes:
        match: the match.
        before: the nodes that it replaces.
        after: the replacement.
        results: the results that the graph reads.
        free: indices of results whose layout nothing reads.
        kept: by variable, the node that reads or may read it later; other variables may be written to.
        cases: arguments at each size.
    """

    match: ExternalMatch
    before: Side
    after: Side
    results: tuple[Result, ...]
    free: frozenset[int]
    kept: Mapping[str, fx.Node]
    cases: tuple[Case, ...]

    @classmethod
    def of(cls, match: ExternalMatch, sizes: Sizes, span: tuple[int, int]) -> "Replaced":
        """Prepares a match.

        Raises:
            ValueError: it can't be verified; the text says why.
        """
        before, after = sides_of(match)
        results = _results(match, after)
        skipped = set(match.consumed)
        readers = (layout_reader(each.node, skipped, reordered=True) for each in results)
        return cls(
            match=match, before=before, after=after, results=results, cases=_cases(match, before, after, sizes, span),
            free=frozenset(index for index, reader in enumerate(readers) if reader is None), kept=_kept(match, before),
        )  # fmt: skip

    @property
    def signature(self) -> str:
        """The pass with the graph's dtypes and sizes."""
        values = [(name, tensor_of(node)) for node, name in self.before.names.items()]
        parts = [f"{name}:{signature_text(each)}" for name, each in values if each is not None]
        return f"{self.match.owner.name}({', '.join(parts)})"

    def key(self, content: str) -> str:
        """A hash of everything that an outcome depends on.

        Args:
            content: identifies the pass.
        """
        symbols = self.cases[-1].symbols
        devices = {
            spec.device for case in self.cases for spec in case.arguments.values() if isinstance(spec, TensorSpec)
        }
        return fingerprint(
            foreign=content,
            packages=_versions(self.match),
            sides=[self.before.text(symbols), self.after.text(symbols)],
            results=[[each.output, each.item] for each in self.results],
            cases=[[case.tokens, [[n, str(v)] for n, v in case.arguments.items()]] for case in self.cases],
            free=sorted(self.free),
            kept=sorted(self.kept),
            hardware=sorted(map(outcomes.hardware_text, devices)),
        )


def _results(match: ExternalMatch, after: Side) -> tuple[Result, ...]:
    """The results of a region that the graph reads."""
    outputs, inside, results = match.outputs, set(match.consumed), list[Result]()
    packed = len(outputs) == 1 != len(after.outputs)
    if not packed and len(outputs) != len(after.outputs):
        raise ValueError(f"its pattern has {len(outputs)} results, and its replacement {len(after.outputs)}")
    for index, node in enumerate(outputs):
        made = after.outputs if packed else after.outputs[index]
        users = [user for user in node.users if user not in inside] if node is not None else []
        if node is None or not users:
            continue
        if tensor_of(node) is not None:
            results.append(Result(output=index, item=None, node=node, promise=tensor_of(made)))
            continue
        if not all(is_item(user) for user in users):
            raise ValueError(f"its result for {node.name} isn't a tensor")
        for user in users:
            item: Any = user.args[1]
            promise = tensor_of(made[item]) if isinstance(made, (list, tuple)) else None
            results.append(Result(output=index, item=item, node=user, promise=promise))
    return tuple(results)


def _cases(match: ExternalMatch, before: Side, after: Side, sizes: Sizes, span: tuple[int, int]) -> tuple[Case, ...]:
    first = next((value for node in match.consumed if (value := tensor_of(node)) is not None), None)
    rows = math.prod(map(hint, first.shape[:-1])) if first is not None else 1
    tokens_of = sizes.tokens(span) or (rows,)
    values_at: Callable[[int], Mapping[Any, int]] = sizes.varied
    if all(op.namespace in TORCHS for op, _, _ in after.calls):
        tokens_of = tuple(tokens for tokens in tokens_of if tokens <= max(SMALL, tokens_of[0]))
        values_at = sizes.at
    return possible(
        Case(tokens=tokens, arguments=_arguments(before, symbols := values_at(tokens)), symbols=symbols)
        for tokens in tokens_of
    )


def _arguments(before: Side, symbols: Mapping[Any, int]) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    for node, name in before.names.items():
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            arguments[name] = replace(spec_of(value, symbols, name, name), fill=fill_of(node))
        elif isinstance(value, (int, float, bool, torch.SymInt)):
            arguments[name] = concrete(value, symbols)
        else:
            raise ValueError(f"its argument {name} is a {type(value).__name__}")
    return arguments


def _kept(match: ExternalMatch, before: Side) -> dict[str, fx.Node]:
    """Variables that are read after the region, directly or through an alias, and those that the graph doesn't own."""
    graph, inside = match.anchor.graph, set(match.consumed)
    place = min(node for node in match.outputs if node is not None)
    named: dict[int, str] = {}
    for node, name in before.names.items():
        value = tensor_of(node)
        if value is not None:
            named[storage_of(value)] = name
    kept: dict[str, fx.Node] = {}
    for node in graph.nodes:
        value = tensor_of(node)
        if value is None or node in inside or storage_of(value) not in named:
            continue
        later = [user for user in node.users if user not in inside and place < user]
        if node.op != "call_function" or later:
            kept.setdefault(named[storage_of(value)], later[0] if later else node)
    return kept


def _versions(match: ExternalMatch) -> list[str]:
    """Versions of the packages of the pass and its ops, if they have any."""
    uuid = match.owner.uuid
    owner = getattr(uuid, "__self__", uuid)
    names = {type(owner).__module__.partition(".")[0], *(text.partition(".")[0] for text in match.emits)}
    return [f"{name} {getattr(sys.modules.get(name), '__version__', None)}" for name in sorted(names)]


def _is_sum(node: fx.Node) -> bool:
    """Whether it is torch's own sum over ranks, or its wait: these run as if every rank had the same values."""
    return node.target is functional.wait_tensor.default or (
        node.target is functional.all_reduce.default and node.args[1] == "sum"
    )


def unverifiable(match: ExternalMatch) -> str | None:
    """Why this process can't run the match alone, or None."""
    replacement = [node for node in match.replacement.graph.nodes if node.op == "call_function"]
    for node in (*match.consumed, *replacement):
        ops = [each for each in (node.target, *node.args[:1]) if isinstance(each, OpOverload)]
        for op in () if _is_sum(node) else ops:
            names = [argument.name for argument in op._schema.arguments]
            if op.namespace in COLLECTIVES or op.name() in ENGINE_COLLECTIVES or "group_name" in names:
                return f"{op} is a collective"
            if torch.Tag.nondeterministic_seeded in op.tags and not drops_nothing(node):
                return f"{op} draws random numbers"
    for node in match.consumed:
        for value in pytree.tree_leaves(node.meta.get("val")):
            if isinstance(value, Tensor) and value.device.type == "cuda" and not torch.cuda.is_available():
                return f"there is no {value.device} here"
    return None
