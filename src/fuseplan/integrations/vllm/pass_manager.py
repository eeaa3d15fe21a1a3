"""vLLM's pass manager with a plan in the place of its order.

vLLM's own fusion passes, which its `pass_config` switches, join the plan if they only replace their matches. Passes
that run code of their own, or match the results of another one, run where vLLM has them.
"""

import ast
import functools
import inspect
import textwrap
from collections.abc import Sequence
from typing import Any

from torch import fx
from vllm.compilation.passes.inductor_pass import InductorPass, get_pass_context, pass_context
from vllm.compilation.passes.pass_manager import PostGradPassManager as VllmPassManager
from vllm.config.utils import Range

from fuseplan.compilation.manager import PostGradPassManager
from fuseplan.config import CompileRange, PassConfig
from fuseplan.graph.surgery import copy_graph
from fuseplan.integrations.vllm.passes import manager_for
from fuseplan.integrations.vllm.plugin import asked_for
from fuseplan.integrations.vllm.reports import Journal
from fuseplan.matching import ExternalPass, external_of


class FuseplanPassManager(VllmPassManager):  # type: ignore[misc]
    """Runs vLLM's passes in a plan, and after it vLLM's lowering and clean-up."""

    passes: list[Any]

    def configure(self, config: Any) -> None:
        """Reads vLLM's configuration."""
        super().configure(config)
        chosen = asked_for(config)
        assert chosen is not None
        self._config: PassConfig = chosen
        self._journal = Journal.of(config)
        self._managers: dict[tuple[int, int], PostGradPassManager] = {}

    def __call__(self, graph: fx.Graph) -> None:
        """Plans, rewrites and lowers one graph."""
        manager, tuning = self._manager(), self._journal.tuning
        if tuning is not None and manager.compile_range is not None:
            span = manager.compile_range.start, manager.compile_range.end
            copied = fx.GraphModule(graph.owning_module or {}, copy_graph(graph)[0])  # it is rewritten below
            tuning.add(manager.analyze(copied.graph).problem, span, functools.partial(self._lower_in, span))
        manager(graph)
        self._lower(graph)

    def _lower_in(self, span: tuple[int, int], graph: fx.Graph) -> None:
        with pass_context(Range(*span)):
            self._lower(graph)

    def _lower(self, graph: fx.Graph) -> None:
        planned = self.passes
        self.passes = []
        try:
            super().__call__(graph)
        finally:
            self.passes = planned

    def uuid(self) -> str | None:
        """vLLM's key and fuseplan's; None where either has none."""
        keys = {"vllm": super().uuid(), "fuseplan": self._manager().uuid()}
        return None if None in keys.values() else str(InductorPass.hash_dict(keys))

    def _manager(self) -> PostGradPassManager:
        span = get_pass_context().compile_range
        key = (span.start, span.end)
        if key not in self._managers:
            passes: Sequence[object] = [each for each in self.passes if each.is_applicable_for_range(span)]
            # Under another policy vLLM's passes would have no part in the plan: they run first, as usual.
            if self._config.chosen_policy.name == "planned":
                passes = in_plan(passes)
            self._managers[key] = manager_for(
                self._config,
                CompileRange(start=max(span.start, 1), end=span.end),
                self._journal.add,
                passes=passes,
                settles=True,
            )
        return self._managers[key]


def in_plan(passes: Sequence[Any]) -> list[object]:
    """Passes of vLLM's as the planner takes them, in vLLM's order. A pass after code that runs after the plan may match
    that code's results, so it runs after it, too.
    """
    result: list[object] = []
    names: set[str] = set()
    is_behind = False
    for each in passes:
        found = each if is_behind else plannable(each)
        if isinstance(found, ExternalPass) and found.name not in names:
            names.add(found.name)
            result.append(found)
        else:
            is_behind = is_behind or bool(names)
            result.append(each)
    return result


def plannable(vllm_pass: Any) -> object:
    """A pass of vLLM's as the planner takes it: its patterns, or a function of the graph if it does more."""
    name = getattr(vllm_pass, "pass_name", type(vllm_pass).__name__)
    for attribute in ("patterns", "pm_pass"):
        found = external_of(vllm_pass, (attribute,), name)
        if found is not None and _only_applies(type(vllm_pass), attribute):
            return found
    return vllm_pass


def _only_applies(owner: type, attribute: str) -> bool:
    """Whether a pass only runs `self.<attribute>.apply(graph)` on a graph, by its source."""
    try:
        source = inspect.getsource(inspect.unwrap(owner.__call__))
    except (OSError, TypeError):
        return False
    function = ast.parse(textwrap.dedent(source)).body[0]
    if not isinstance(function, ast.FunctionDef) or len(function.args.args) != 2:
        return False
    this, graph = (each.arg for each in function.args.args)
    uses = [node for node in ast.walk(function) if isinstance(node, ast.Name) and node.id == graph]
    apply = f"{this}.{attribute}.apply({graph})"
    return len(uses) == 1 and any(
        isinstance(node, ast.Call) and ast.unparse(node) == apply for node in ast.walk(function)
    )
