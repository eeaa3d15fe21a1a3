"""`Rule`, the declaration of a fusion. Rules have no state and don't read configuration; their order has no meaning."""

import inspect
import operator
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import fx
from torch.fx.proxy import GraphAppendingTracer

from fuseplan.errors import RuleError
from fuseplan.graph.facts import tensor_of
from fuseplan.graph.ops import DialectOp, ops
from fuseplan.record import Reason, Refusal


class Bindings:
    """A match's bindings of the pattern's variables: `m.x` is the fake tensor of a node, or a plain value.

    Attributes:
        values: nodes and plain values by variable.
    """

    def __init__(self, rule: str, values: Mapping[str, Any]) -> None:
        self.rule = rule
        self.values = dict(values)

    def __getattr__(self, name: str) -> Any:
        values = self.__dict__.get("values", {})
        if name not in values:
            raise AttributeError(
                f"rule {self.__dict__.get('rule')} binds no variable {name!r}; it binds {', '.join(values)}"
            )
        value = values[name]
        return tensor_of(value) if isinstance(value, fx.Node) else value

    def refuse(self, reason: Reason, variable: str, detail: str, fix: str | None = None) -> Refusal:
        """The refusal of this match because of the binding of `variable`."""
        node = self.values[variable]
        nodes = (node.name,) if isinstance(node, fx.Node) else ()
        return Refusal(reason=reason, rule=self.rule, detail=detail, nodes=nodes, fix=fix)


@dataclass(frozen=True)
class Traced:
    """A pattern or a replacement as an FX graph.

    Attributes:
        graph: placeholders for the variables, dialect and aten calls.
        inputs: placeholder by variable.
        outputs: the values it yields.
    """

    graph: fx.Graph
    inputs: Mapping[str, fx.Node]
    outputs: tuple[fx.Node, ...]


@dataclass(frozen=True, kw_only=True)
class DefaultOn:
    """The graphs in which an opt-in rule is on by default: those for which its kernels were measured.

    Attributes:
        most_tokens: the most tokens of a graph, and the most rows of a matrix product in it.
        devices: names of device profiles.
    """

    most_tokens: int
    devices: tuple[str, ...]


class Rule:
    """One fusion: its pattern, its refusals and its replacement.

    A subclass gives `name`, `flags`, `op` and `pattern`. It gives `replacement` unless the fused op takes variables by
    name and yields the pattern's values, and `check` where the pattern alone can't express a condition. Variables bind
    by parameter name; epsilons, widths, groups and dtypes are variables like tensors. `uuid`, a method or a value, has
    to change with the behaviour of these functions: compiled graphs are cached under it, and not at all without it.

    Attributes:
        name: shared by the members of a family, e.g. `allreduce_rms`.
        flags: the flags of `PassConfig` that must all be on; none: it is on wherever it is passed in.
        op: the fused op, whose providers the plan chooses from.
        core: the dialect op that this fusion takes and that other fusions may contend for.
        requires: names of other rules. Each of their matches that shares a value with a match of this rule must be
            applied with it, by the same provider; e.g. where only the other kernel reads the layout of this one's
            result.
        together: whether the matches of the rule in a graph are applied all or none.
        opt_in: the flag that must be True for the rule to be on, unless a policy lists the rule or `default_on` covers
            the graph; None: the rule is on where none of its flags is False.
        default_on: the graphs in which an opt-in rule is on by default; None: no graphs.
    """

    name: str
    flags: tuple[str, ...]
    op: DialectOp
    core: DialectOp
    requires: tuple[str, ...] = ()
    together: bool = False
    opt_in: str | None = None
    default_on: DefaultOn | None = None

    def pattern(self, *variables: Any, **named: Any) -> Any:
        """The values that the fusion computes, written in dialect ops; the first of them is the match's anchor."""
        raise NotImplementedError

    def replacement(self, *variables: Any, **named: Any) -> Any:
        """The same values in the same order, computed by the fused op. By default, a call of the fused op with the
        variables that its schema names.

        Raises:
            RuleError: a name in the schema isn't a variable of the pattern.
        """
        missing = [name for name in self.op.arguments if name not in named]
        if missing:
            raise RuleError(
                f"rule {self.name} ({type(self).__name__}): its pattern has no variable {missing[0]!r}, which "
                f"{self.op.name} takes; write a replacement"
            )
        results = self.op(*(named[name] for name in self.op.arguments))
        count = len(self.op.overload._schema.returns)
        return (results,) if count == 1 else tuple(results[index] for index in range(count))

    def check(self, m: Bindings) -> Refusal | None:
        """The refusal of a match that the pattern admits, or None."""
        return None

    def takes(self, core: fx.Node, consumed: Collection[fx.Node]) -> bool:
        """Whether this rule takes a match that the pattern admits. If not, another rule takes it, and nothing is
        reported for this one.

        Args:
            core: the node that calls the rule's core.
            consumed: all nodes of the match.
        """
        return True

    @property
    def variables(self) -> tuple[str, ...]:
        """The pattern's parameters; for a pattern with `**bound`, also the fused op's, by the names in its schema."""
        parameters = inspect.signature(self.pattern).parameters
        named = [name for name, each in parameters.items() if each.kind is not inspect.Parameter.VAR_KEYWORD]
        takes_any = len(named) < len(parameters)
        return tuple(dict.fromkeys((*named, *(self.op.arguments if takes_any else ()))))

    @cached_property
    def traced_pattern(self) -> Traced:
        """The pattern as a graph.

        Raises:
            RuleError: the pattern yields nothing, or a value that isn't computed by an op.
        """
        traced = _trace(self, self.pattern, dict.fromkeys(self.variables, _NODE))
        if not traced.outputs or traced.outputs[0].op == "placeholder":
            raise RuleError(
                f"rule {self.name} ({type(self).__name__}): the pattern must yield a value that an op computes"
            )
        used = [node for node in traced.graph.nodes if node.op == "call_function"]
        _require_connected(self, traced, used)
        return traced

    def trace_replacement(self, values: Mapping[str, Any]) -> Traced:
        """The replacement as a graph, for variables bound to nodes or plain values.

        Raises:
            RuleError: it yields a different number of values than the pattern.
        """
        traced = _trace(self, self.replacement, values)
        expected = len(self.traced_pattern.outputs)
        if len(traced.outputs) != expected:
            raise RuleError(
                f"rule {self.name} ({type(self).__name__}): pattern and replacement disagree in outputs: the pattern "
                f"yields {expected}, the replacement {len(traced.outputs)}; both must yield the same values in the "
                "same order"
            )
        return traced

    def validate(self) -> None:
        """Traces pattern and replacement once, with a stand-in for every plain value.

        Raises:
            RuleError: they disagree in outputs, the pattern isn't one connected region or lacks the core, or the name
                isn't one word.
        """
        return self._validated

    @cached_property
    def _validated(self) -> None:
        """Validates once: every manager calls `validate`."""
        if not re.fullmatch(r"[A-Za-z_]\w*", self.name):
            raise RuleError(
                f"rule {self.name!r} ({type(self).__name__}): a name is one word of letters, digits and underscores; "
                "policies, selectors and locks are written with it"
            )
        if all(node.target is not self.core.overload for node in self.calls):
            raise RuleError(
                f"rule {self.name} ({type(self).__name__}): the pattern has no {self.core.name}, which the rule names "
                f"as its core; it has {', '.join(op_text(node.target) for node in self.calls)}"
            )
        types = {argument.name: str(argument.type) for argument in self.op.overload._schema.arguments}
        self.trace_replacement({name: _STAND_INS.get(types.get(name, "Tensor"), _NODE) for name in self.variables})

    @cached_property
    def calls(self) -> tuple[fx.Node, ...]:
        """The ops of the pattern, in its order, without `getitem`."""
        nodes = self.traced_pattern.graph.nodes
        return tuple(node for node in nodes if node.op == "call_function" and node.target is not operator.getitem)

    @cached_property
    def required_ops(self) -> frozenset[Any]:
        """The overloads that the pattern calls: a graph that lacks one of them has no match."""
        return frozenset(node.target for node in self.calls if isinstance(node.target, torch._ops.OpOverload))

    @property
    def is_composed(self) -> bool:
        """Whether its one op covers several simpler rules, each with a flag of its own."""
        return len(self.flags) > 1

    def describe(self) -> str:
        """`a -> b` on one line: the pattern's ops, then the fused op."""
        return f"{' -> '.join(op_text(node.target) for node in self.calls)}  =>  {self.op.name}"


def op_text(target: Any) -> str:
    """A dialect op by its name, any other function by its own text."""
    op = ops.of(target)
    return op.name if op is not None else str(target)


_STAND_INS: dict[str, Any] = {"int": 1, "float": 1.0, "str": "", "bool": False}
"""A plain value for each non-tensor type of a schema's arguments."""

_NODE = object()
"""Marks a traced variable; any other value is passed to the function as it is."""


def _trace(rule: Rule, function: Any, values: Mapping[str, Any]) -> Traced:
    graph = fx.Graph()
    tracer = GraphAppendingTracer(graph)
    inputs: dict[str, fx.Node] = {}
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        if value is _NODE or isinstance(value, fx.Node):
            inputs[name] = graph.placeholder(name)
            arguments[name] = fx.Proxy(inputs[name], tracer)
        else:
            arguments[name] = value
    yielded = function(**arguments)
    results = yielded if isinstance(yielded, tuple) else (yielded,)
    if not all(isinstance(result, fx.Proxy) for result in results):
        raise RuleError(
            f"rule {rule.name} ({type(rule).__name__}): {function.__name__} must yield values that ops compute"
        )
    return Traced(graph=graph, inputs=inputs, outputs=tuple(result.node for result in results))


def _require_connected(rule: Rule, traced: Traced, calls: Sequence[fx.Node]) -> None:
    """Every call must lead to the anchor or be a further result of one that does."""
    reached: set[fx.Node] = set()
    stack = [traced.outputs[0]]
    while stack:
        node = stack.pop()
        if node not in reached:
            reached.add(node)
            stack.extend(node.all_input_nodes)
    for node in calls:
        if node not in reached and not (
            node in traced.outputs and all(source in reached for source in node.all_input_nodes)
        ):
            raise RuleError(
                f"rule {rule.name} ({type(rule).__name__}): {node.name} doesn't lead to the first value that the "
                "pattern yields"
            )
