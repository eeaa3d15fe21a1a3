"""vLLM's pass manager with a plan in the place of its order.

Of vLLM's own fusion passes, which its `pass_config` switches, those that only replace what they match join the plan.
Whatever runs code of its own, and what matches the results of another one, runs where vLLM has it.
"""

from typing import Any

from torch import fx
from vllm.compilation.passes.inductor_pass import InductorPass, get_pass_context
from vllm.compilation.passes.pass_manager import PostGradPassManager as VllmPassManager

from fuseplan.config import CompileRange, PassConfig
from fuseplan.integrations.vllm.passes import manager_for
from fuseplan.integrations.vllm.plugin import asked_for
from fuseplan.integrations.vllm.reports import Journal
from fuseplan.manager import PostGradPassManager
from fuseplan.matching import external_of


class FuseplanPassManager(VllmPassManager):  # type: ignore[misc]
    """Runs vLLM's passes in a plan, and after it vLLM's lowering and clean-up."""

    passes: list[Any]

    def configure(self, config: Any) -> None:
        """Reads what vLLM's configuration asks for."""
        super().configure(config)
        chosen = asked_for(config)
        assert chosen is not None
        self._config: PassConfig = chosen
        self._journal = Journal.of(config)
        self._managers: dict[tuple[int, int], PostGradPassManager] = {}

    def __call__(self, graph: fx.Graph) -> None:
        """Plans, rewrites and lowers one graph."""
        self._manager()(graph)
        planned = self.passes
        self.passes = []
        try:
            super().__call__(graph)
        finally:
            self.passes = planned

    def uuid(self) -> str:
        """vLLM's key and fuseplan's."""
        return str(InductorPass.hash_dict({"vllm": super().uuid(), "fuseplan": self._manager().uuid()}))

    def _manager(self) -> PostGradPassManager:
        span = get_pass_context().compile_range
        key = (span.start, span.end)
        if key not in self._managers:
            passes = [plannable(each) for each in self.passes if each.is_applicable_for_range(span)]
            self._managers[key] = manager_for(
                self._config, CompileRange(start=max(span.start, 1), end=span.end), self._journal.add, passes=passes
            )
        return self._managers[key]


def plannable(vllm_pass: Any) -> object:
    """A pass of vLLM's as the planner takes it: its patterns, or as a function of the graph what is more than them."""
    name = getattr(vllm_pass, "pass_name", type(vllm_pass).__name__)
    return external_of(vllm_pass, ("patterns", "pm_pass"), name) or vllm_pass
