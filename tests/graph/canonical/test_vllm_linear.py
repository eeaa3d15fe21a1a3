"""vLLM's linear layers in fp8, as its post-grad graphs on NVIDIA's GPUs have them: `_C.cutlass_scaled_mm`.

Its builds for CPUs have no such op. It is declared here by the schema that vLLM 0.22 to 0.33 publishes
(`csrc/torch_bindings.cpp`), and computed in plain torch as its epilogue does: the sum times the weight's scale, times
the row's, plus the bias.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._higher_order_ops.auto_functionalize import auto_functionalized

import fuseplan
from fuseplan.compilation.manager import PostGradPassManager
from fuseplan.devices import device_profile
from fuseplan.dialect import ops
from fuseplan.dialect.raising import canonicalize
from fuseplan.matching import Match
from fuseplan.providers import REFERENCE
from fuseplan.rules.parts.scaled_linear import PART
from fuseplan.verification.check import check
from fuseplan.verification.region import MatchedRegion
from fuseplan.verification.specs import Sizes, cases_of
from tests.graph.canonical.engine_ops import defined
from tests.graph.canonical.test_vllm_quantisation import applied_to, new
from tests.helpers import quantize_rows, randn, written

FP8, ROWS, WIDTH, FEATURES = torch.float8_e4m3fn, 3, 64, 48
SCHEMAS = {
    "_C::cutlass_scaled_mm": "(Tensor! out, Tensor a, Tensor b, Tensor a_scales, Tensor b_scales, Tensor? bias) -> ()"
}


FACTOR = {"of results": 1.0}
"""1, or the op computes something else."""


def computed(out: Tensor, a: Tensor, b: Tensor, a_scales: Tensor, b_scales: Tensor, bias: Tensor | None) -> None:
    y = (a.float() @ b.float()) * b_scales.reshape(1, -1) * a_scales
    out.copy_((y if bias is None else y + bias) * FACTOR["of results"])


@pytest.fixture(scope="module", autouse=True)
def op() -> Iterator[None]:
    if hasattr(torch.ops._C, "cutlass_scaled_mm"):
        pytest.skip("there is an op of that name")
    with defined(SCHEMAS, {}, {"_C::cutlass_scaled_mm": computed}):
        yield


def given(scales: str = "of each", bias: bool = False) -> dict[str, Tensor]:
    """Inputs by name; `b` lies as rows of features do."""
    codes, scale = quantize_rows(randn(ROWS, WIDTH))
    weight, own = quantize_rows(randn(FEATURES, WIDTH, seed=1))
    found = {"a": codes, "a_scales": scale, "b": weight.t()}
    found["b_scales"] = {"of each": own, "of all": own[:1, 0].clone(), "of no dimension": own[0, 0].clone()}[scales]
    return found | ({"bias": randn(FEATURES, seed=2)} if bias else {})


def graph_of(inputs: dict[str, Tensor], dtype: torch.dtype = torch.bfloat16, twice: bool = False) -> fx.Graph:
    def layer(**values: Any) -> Any:
        out = new(values["a"], torch.empty(inputs["a"].shape[0], inputs["b"].shape[1], dtype=dtype))
        target = torch.ops._C.cutlass_scaled_mm.default
        result = auto_functionalized(target, out=out, **({"bias": None} | values))
        return (result[1], result[0]) if twice else (result[1],)

    return written(layer, inputs)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scales", ["of each", "of all", "of no dimension"])
def test_it_is_a_layer_with_scales_of_rows(scales: str, bias: bool) -> None:
    inputs = given(scales, bias)
    graph = graph_of(inputs)
    raised = canonicalize(graph, asked=(PART,))
    (node,) = raised.calls(ops.scaled_linear.overload)
    assert node.args[-1] is True, "tensor cores may add up all products"
    (got,), (wanted,) = (fx.GraphModule({}, each)(*inputs.values()) for each in (raised.graph, graph))
    assert torch.equal(got, wanted)
    assert got.stride() == wanted.stride()


def test_graphs_are_not_read_for_it_unless_it_is_asked_for() -> None:
    assert not canonicalize(graph_of(given())).dialect_nodes


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"b": torch.zeros(WIDTH, FEATURES).to(FP8)}, "weights lie in columns of features"),
        ({"a": torch.zeros(ROWS, WIDTH).to(torch.int8), "b": torch.zeros(FEATURES, WIDTH).to(torch.int8).t()}, "int8"),
        ({"a_scales": torch.ones(1)}, "one scale for all rows"),
        ({"a_scales": torch.ones(ROWS, 2)}, "a scale a group"),
        ({"b_scales": torch.ones(2, 3)}, "scales of blocks"),
        ({"b_scales": torch.ones(FEATURES, 1).bfloat16()}, "other scales"),
        ({"bias": torch.zeros(FEATURES)}, "another bias"),
    ],
)  # fmt: skip
def test_what_it_does_not_compute_stays(change: dict[str, Tensor], why: str) -> None:
    graph = graph_of(given() | change)
    assert not canonicalize(graph, asked=(PART,)).dialect_nodes, why


@pytest.mark.parametrize("changed", [{"dtype": torch.float16}, {"twice": True}])
def test_results_in_another_dtype_or_read_twice_stay(changed: dict[str, Any]) -> None:
    assert not canonicalize(graph_of(given(), **changed), asked=(PART,)).dialect_nodes


@pytest.mark.parametrize("scales", ["of each", "of all"])
def test_it_is_one_kernel_of_few_rows(scales: str) -> None:
    graph = graph_of(given(scales, bias=True))
    applied = applied_to(graph, verify="off", fuse_scaled_linear=True, force=("skinny_scaled_linear",))
    assert (applied.rule, applied.provider) == ("skinny_scaled_linear", "triton")
    left = {str(node.target) for node in graph.nodes if node.op == "call_function"}
    assert left == {"aten.permute.default", "aten.reshape.default", "fuseplan.skinny_scaled_linear.triton"}


@pytest.mark.parametrize("factor", [1.0, 2.0])
@pytest.mark.parametrize("scales", ["of each", "of all"])
def test_it_is_verified_against_the_call(scales: str, factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FACTOR, "of results", factor)
    manager = PostGradPassManager(fuseplan.PassConfig(fuse_scaled_linear=True), device=device_profile("h200"))
    analysis = manager.analyze(graph_of(given(scales, bias=True)))
    match = next(each.match for each in analysis.problem.candidates)
    assert isinstance(match, Match)
    (case,) = cases_of(match, Sizes(analysis.canonical.graph), (1, 32))
    region = MatchedRegion.of(analysis.canonical, match)
    assert region is not None
    found = check(match.rule, REFERENCE.name, case, seed=0, region=region)
    wrong = "the unfused ops don't compute what the graph does" if factor != 1 else "None"
    assert str(found.wrong).split(":")[0] == wrong
