"""vLLM's pass manager with a plan, as vLLM's backend calls it on GPUs. The CPU build imports none of vLLM's fusion
passes, so stand-ins with the same surface take their place.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch._inductor.pattern_matcher as pm
import vllm.ir.ops
from torch import Tensor, fx
from torch._inductor.pattern_matcher import PatternMatcherPass
from vllm.compilation.passes.inductor_pass import InductorPass, pass_context
from vllm.compilation.passes.vllm_inductor_pass import VllmInductorPass, VllmPatternMatcherPass
from vllm.config import CompilationConfig, PassConfig, VllmConfig, set_current_vllm_config
from vllm.config.utils import Range

from fuseplan.integrations.vllm.pass_manager import FuseplanPassManager, plannable
from fuseplan.integrations.vllm.plugin import KEY
from fuseplan.matching import ExternalPass
from tests.helpers import written

HIDDEN = 64
ROWS = Range(start=1, end=64)


@torch.library.custom_op("fuseplan_stand_in::norm_relu", mutates_args=())
def norm_relu(x: Tensor, weight: Tensor) -> Tensor:
    """What a kernel of vLLM's would fuse."""
    result: Tensor = torch.relu(vllm.ir.ops.rms_norm(x, weight, 1e-5))
    return result


@norm_relu.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return torch.empty_like(x)


class NormRelu(VllmPatternMatcherPass):  # type: ignore[misc]
    """As vLLM's independent passes are: patterns that are replaced, and nothing else."""

    def __init__(self, config: VllmConfig) -> None:
        super().__init__(config)
        self.patterns = PatternMatcherPass(pass_name="norm_relu")

        def pattern(x: Tensor, weight: Tensor) -> Tensor:
            result: Tensor = torch.relu(torch.ops.vllm_ir.rms_norm.default(x, weight, 1e-5))
            return result

        def replacement(x: Tensor, weight: Tensor) -> Tensor:
            result: Tensor = norm_relu(x, weight)
            return result

        example = [torch.empty(4, HIDDEN, dtype=torch.bfloat16), torch.empty(HIDDEN, dtype=torch.bfloat16)]
        pm.register_replacement(pattern, replacement, example, pm.fwd_only, self.patterns)

    def __call__(self, graph: fx.Graph) -> None:
        self.matched_count = self.patterns.apply(graph)


class Procedural(VllmInductorPass):  # type: ignore[misc]
    """As vLLM's others are: code over the graph."""

    def __init__(self, config: VllmConfig, ran: list[str]) -> None:
        super().__init__(config)
        self.ran = ran

    def __call__(self, graph: fx.Graph) -> None:
        self.ran.append(",".join(str(node.target) for node in graph.nodes if node.op == "call_function"))

    def uuid(self) -> str:
        return str(InductorPass.hash_source(type(self)))


class OnlyLarge(NormRelu):
    """Applies to some compile ranges alone."""

    def is_applicable_for_range(self, compile_range: Range) -> bool:
        return bool(compile_range.start > 64)


@contextmanager
def managed(passes: Any, **settings: Any) -> Iterator[FuseplanPassManager]:
    """A manager as vLLM's backend configures it, with passes of vLLM's."""
    theirs = PassConfig(**{field.name: False for field in dataclasses.fields(PassConfig) if field.type is bool})
    config = VllmConfig(
        compilation_config=CompilationConfig(pass_config=theirs),
        additional_config={KEY: settings or {"policy": "planned"}},
    )
    manager = FuseplanPassManager()
    with set_current_vllm_config(config), pass_context(ROWS):
        manager.configure(config)
        manager.passes = passes(config)
        yield manager


def graph_of(function: Any) -> fx.Graph:
    """A graph of vLLM's ops."""
    x = torch.randn(8, HIDDEN, dtype=torch.bfloat16)
    weight = torch.randn(HIDDEN, dtype=torch.bfloat16)
    return written(function, {"x": x, "weight": weight})


def normed(x: Any, weight: Any) -> Any:
    return torch.ops.aten.relu.default(torch.ops.vllm_ir.rms_norm.default(x, weight, 1e-5))


def targets(graph: fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


def test_a_pass_of_vllm_joins_the_plan() -> None:
    graph = graph_of(normed)
    with managed(lambda config: [NormRelu(config)]) as manager:
        manager(graph)
        (report,) = manager._journal.reports
    assert report.fused["NormRelu"] == 1
    assert targets(graph) == ["fuseplan_stand_in.norm_relu.default"]


def test_a_pass_of_vllm_can_be_forbidden() -> None:
    graph = graph_of(normed)
    with managed(lambda config: [NormRelu(config)], forbid=["NormRelu"]) as manager:
        manager(graph)
    assert "fuseplan_stand_in.norm_relu.default" not in targets(graph)
    assert not [target for target in targets(graph) if target.startswith("vllm_ir")], "vLLM lowers what is left"


def test_procedural_passes_run_where_vllm_has_them() -> None:
    graph, ran = graph_of(normed), list[str]()
    with managed(lambda config: [Procedural(config, ran), NormRelu(config)]) as manager:
        manager(graph)
    assert ran
    assert set(ran) == {"vllm_ir.rms_norm.default,aten.relu.default"}


def test_passes_apply_to_their_compile_ranges() -> None:
    graph = graph_of(normed)
    with managed(lambda config: [OnlyLarge(config)]) as manager:
        manager(graph)
        (report,) = manager._journal.reports
    assert "OnlyLarge" not in report.fused
    assert report.graphs[0].range == (1, 64)


def test_the_key_is_of_vllm_and_of_fuseplan() -> None:
    keys = []
    for settings in ({"policy": "planned"}, {"policy": "off"}):
        with managed(lambda config: [], **settings) as manager:
            keys.append(manager.uuid())
    with managed(lambda config: [NormRelu(config)], policy="planned") as manager:
        keys.append(manager.uuid())
        with pass_context(Range(start=65, end=512)):
            keys.append(manager.uuid())
    assert len(set(keys)) == 4
    with managed(lambda config: [], policy="planned") as manager:
        assert manager.uuid() == keys[0]


def test_norms_of_vllm_are_recognised() -> None:
    with managed(lambda config: []) as manager:
        manager(graph_of(normed))
        (report,) = manager._journal.reports
    assert report.recognized == {f"rms_norm[{HIDDEN}]": 1}


def test_plannable() -> None:
    config = VllmConfig()
    planned = plannable(NormRelu(config))
    assert isinstance(planned, ExternalPass)
    assert planned.name == "NormRelu"
    procedural = Procedural(config, [])
    assert plannable(procedural) is procedural


@pytest.fixture(autouse=True)
def _no_weights() -> Iterator[None]:
    with torch.no_grad():
        yield
