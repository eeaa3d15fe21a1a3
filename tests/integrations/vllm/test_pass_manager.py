"""vLLM's pass manager with a plan, as vLLM's backend calls it on GPUs. The CPU build imports none of vLLM's fusion
passes, so stand-ins with the same surface take their place.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.pattern_matcher as pm
import vllm.ir.ops
from torch import Tensor, fx
from torch._higher_order_ops.auto_functionalize import auto_functionalized
from torch._inductor.pattern_matcher import PatternMatcherPass
from vllm.compilation.passes.inductor_pass import InductorPass, pass_context
from vllm.compilation.passes.vllm_inductor_pass import VllmInductorPass, VllmPatternMatcherPass
from vllm.config import CompilationConfig, PassConfig, VllmConfig, set_current_vllm_config
from vllm.config.utils import Range

from fuseplan.integrations.vllm.pass_manager import FuseplanPassManager
from fuseplan.integrations.vllm.plugin import KEY
from fuseplan.integrations.vllm.tuning import Tuning
from fuseplan.record import Report
from tests.helpers import written
from tests.integrations.vllm import missing_ops

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
        example = [torch.empty(4, HIDDEN, dtype=torch.bfloat16), torch.empty(HIDDEN, dtype=torch.bfloat16)]
        pm.register_replacement(
            lambda x, weight: torch.relu(torch.ops.vllm_ir.rms_norm.default(x, weight, 1e-5)),
            norm_relu, example, pm.fwd_only, self.patterns,
        )  # fmt: skip

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


def run(function: Any, *passes: Any, **settings: Any) -> tuple[fx.Graph, Report]:
    """What a manager with passes of vLLM's makes of a graph, and its report."""
    graph = graph_of(function)
    with managed(lambda config: [each(config) for each in passes], **settings) as manager:
        manager(graph)
        (report,) = manager._journal.reports
    return graph, report


def test_a_pass_of_vllm_joins_the_plan() -> None:
    graph, report = run(normed, NormRelu)
    assert report.recognized == {f"rms_norm[{HIDDEN}]": 1}
    assert report.fused["NormRelu"] == 1
    assert targets(graph) == ["fuseplan_stand_in.norm_relu.default"]


def test_what_one_worker_can_not_verify_is_left_to_all() -> None:
    with managed(lambda config: []) as manager:
        assert manager._manager().verifier.settles


def test_what_is_measured_is_lowered_as_vllm_does_it(tmp_path: Path) -> None:
    graph = graph_of(normed)
    with managed(lambda config: [NormRelu(config)]) as manager:
        manager._journal.tuning = tuning = Tuning(tmp_path / "costs.json")
        manager(graph)
    ((problem, span),) = tuning._problems
    assert span == (1, 64)
    original = problem.canonical.original
    assert targets(original) == ["vllm_ir.rms_norm.default", "aten.relu.default"]
    assert tuning._lower is not None
    tuning._lower(original)
    assert not [target for target in targets(original) if target.startswith("vllm_ir")]


def test_a_pass_of_vllm_can_be_forbidden() -> None:
    graph, _ = run(normed, NormRelu, forbid=["NormRelu"])
    assert "fuseplan_stand_in.norm_relu.default" not in targets(graph)
    assert not [target for target in targets(graph) if target.startswith("vllm_ir")], "vLLM lowers what is left"


def test_procedural_passes_run_where_vllm_has_them() -> None:
    ran = list[str]()
    run(normed, partial(Procedural, ran=ran), NormRelu)
    assert ran
    assert set(ran) == {"vllm_ir.rms_norm.default,aten.relu.default"}


def test_passes_apply_to_their_compile_ranges() -> None:
    _, report = run(normed, OnlyLarge)
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


def patterned(name: str, search: Any, replacement: Any, *, owner: type = VllmPatternMatcherPass) -> Any:
    """A pass as `VllmFusionPatternMatcherPass`es are: one pattern on one tensor, and a name of its own."""

    class Patterned(owner):  # type: ignore[misc]
        def __init__(self, config: VllmConfig) -> None:
            super().__init__(config)
            self.pass_name = name
            self.pm_pass = PatternMatcherPass(pass_name=name)
            example = [torch.empty(4, HIDDEN, dtype=torch.bfloat16)]
            pm.register_replacement(search, replacement, example, pm.fwd_only, self.pm_pass)

        @VllmInductorPass.time_and_log
        def __call__(self, graph: fx.Graph) -> None:
            self.matched_count = self.pm_pass.apply(graph)
            VllmPatternMatcherPass.match_table[self.pass_name] += self.matched_count

        def uuid(self) -> str:
            return name

    return Patterned


def unary(name: str, compute: Any) -> Any:
    """A kernel of vLLM's, which writes into what it is given: it stands in graphs under `auto_functionalized`."""

    def write(result: Tensor, x: Tensor) -> None:
        result.copy_(compute(x))

    LIBRARY.define(f"{name}(Tensor! result, Tensor x) -> ()")
    LIBRARY.impl(name, write, "CPU")
    LIBRARY.impl(name, lambda result, x: None, "Meta")
    op = getattr(torch.ops.fuseplan_stand_in, name).default

    def call(x: Tensor) -> Any:
        return auto_functionalized(op, result=torch.empty_like(x), x=x)[1]

    return call


LIBRARY, OPS = torch.library.Library("fuseplan_stand_in", "FRAGMENT"), missing_ops.define()


def relu(x: Tensor) -> Any:
    return torch.ops.aten.relu.default(x)


def relu_sin(x: Tensor) -> Any:
    return torch.ops.aten.sin.default(relu(x))


def sin_of(x: Any) -> Any:
    return torch.ops.aten.sin.default(x)


def cos_of(x: Any) -> Any:
    return torch.ops.aten.cos.default(x)


reduced, normed_and_quantised, both = unary("reduced", relu), unary("quantised", relu_sin), unary("both", relu_sin)
split, cached = unary("split", sin_of), unary("cached", cos_of)


def kernels(graph: fx.Graph) -> list[str]:
    """The kernels that a graph calls, from before lowering to after it."""
    names = {str(node.args[0] if "auto_functionalized" in str(node.target) else node.target) for node in graph.nodes}
    return sorted(name.split(".")[1] for name in names if name.startswith("fuseplan_stand_in"))


def two_in_a_row(x: Any, weight: Any) -> Any:
    return relu_sin(x) + weight


ALLREDUCE = patterned("AllReduceFusionPass", relu, reduced)
QUANT = patterned("RMSNormQuantFusionPass", relu_sin, normed_and_quantised)
CHAINED = patterned("ChainedFusionPass", lambda x: sin_of(reduced(x)), both)


def test_independent_passes_of_vllm_are_chosen_between() -> None:
    """In vLLM's order the first takes what the second needs; all their graphs have `auto_functionalized` in common."""
    graph, report = run(two_in_a_row, ALLREDUCE, QUANT, force=["RMSNormQuantFusionPass"])
    assert report.matched["AllReduceFusionPass"] == report.matched["RMSNormQuantFusionPass"] == 1
    assert (report.fused["AllReduceFusionPass"], report.fused["RMSNormQuantFusionPass"]) == (0, 1)
    assert kernels(graph) == ["quantised"]


def test_a_pass_that_matches_what_another_made_runs_behind_it() -> None:
    graph, report = run(two_in_a_row, ALLREDUCE, CHAINED)
    assert report.fused["AllReduceFusionPass"] == 1
    assert kernels(graph) == ["both"]


def test_what_a_pass_does_beside_its_patterns_is_done() -> None:
    """As sequence parallelism, whose clean-up the next pass's pattern needs."""

    class Cleaning(ALLREDUCE):  # type: ignore[misc, valid-type]
        def __call__(self, graph: fx.Graph) -> None:
            self.matched_count = self.pm_pass.apply(graph)
            self.clean_up(graph)

        def clean_up(self, graph: fx.Graph) -> None:
            ran.append("clean-up")

    ran: list[str] = []
    graph, report = run(two_in_a_row, partial(Procedural, ran=ran), Cleaning, CHAINED)
    assert ran[-1] == "clean-up"
    assert len(ran) >= 2
    assert report.fused["ChainedFusionPass"] == 1, "it is planned on the graph that the other one left"
    assert kernels(graph) == ["both"]


def test_a_pass_behind_code_behind_the_plan_stays_there() -> None:
    """As `SplitCoalescingPass` before `RopeKVCacheFusionPass`: what the code makes, the pass matches."""

    class Coalescing(Procedural):
        def __call__(self, graph: fx.Graph) -> None:
            super().__call__(graph)
            for node in graph.find_nodes(op="call_function", target=torch.ops.aten.sin.default):
                node.target = torch.ops.aten.cos.default

    rope = patterned("RopeKVCacheFusionPass", cos_of, cached)
    ran = list[str]()
    graph, report = run(two_in_a_row, ALLREDUCE, partial(Coalescing, ran=ran), rope)
    assert len(ran) == 1
    assert report.fused["AllReduceFusionPass"] == 1
    assert kernels(graph) == ["cached", "reduced"]


@pytest.mark.parametrize("policy", ["off", "ordered(act_padding)"])
def test_other_policies_leave_the_passes_of_vllm_on(policy: str) -> None:
    graph, _ = run(two_in_a_row, ALLREDUCE, CHAINED, policy=policy)
    assert kernels(graph) == ["both"]


def test_two_passes_of_one_name_both_run() -> None:
    graph, _ = run(two_in_a_row, ALLREDUCE, patterned("AllReduceFusionPass", sin_of, split))
    assert kernels(graph) == ["reduced", "split"]


@pytest.fixture(autouse=True)
def _no_weights() -> Iterator[None]:
    with torch.no_grad():
        yield
