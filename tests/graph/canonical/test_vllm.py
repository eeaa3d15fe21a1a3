"""vLLM's ops, by ops of the same names and schemas where vLLM isn't installed."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._higher_order_ops.auto_functionalize import auto_functionalized

from fuseplan.compilation.manager import PostGradPassManager
from fuseplan.config import PassConfig
from fuseplan.dialect import ops
from fuseplan.dialect.raising import canonicalize
from fuseplan.graph.canonical import CanonicalGraph
from fuseplan.record import Reason
from fuseplan.rules.families import find_sites
from tests.graph.canonical.engine_ops import defined
from tests.helpers import randn, written
from tests.providers.stand_ins import ranks

HIDDEN, EPS = 64, 1e-5
X, R, W = randn(4, HIDDEN), randn(4, HIDDEN, seed=1), randn(HIDDEN)
SCHEMAS = {
    "vllm::all_reduce": "(Tensor tensor, str group_name) -> Tensor",
    "vllm_ir::rms_norm": "(Tensor x, Tensor? weight, float epsilon, int? variance_size=None) -> Tensor",
    "vllm_ir::fused_add_rms_norm": "(Tensor x, Tensor x_residual, Tensor? weight, float epsilon, "
    "int? variance_size=None) -> (Tensor, Tensor)",
    "vllm::rocm_unquantized_gemm": "(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor",
    "_C::rms_norm": "(Tensor! result, Tensor input, Tensor? weight, float epsilon) -> ()",
    "_C::fused_add_rms_norm": "(Tensor! input, Tensor! residual, Tensor? weight, float epsilon) -> ()",
    "_C::rotary_embedding": "(Tensor positions, Tensor! query, Tensor!? key, int head_size, Tensor cos_sin_cache, "
    "bool is_neox) -> ()",
    "_C::shm_allreduce": "(int handle, Tensor! data) -> ()",
}
FAKES: dict[str, Callable[..., Any]] = {
    "vllm::all_reduce": lambda tensor, group_name: torch.empty_like(tensor),
    "vllm_ir::rms_norm": lambda x, weight, epsilon, variance_size=None: torch.empty_like(x),
    "vllm_ir::fused_add_rms_norm": lambda x, x_residual, *rest: (torch.empty_like(x), torch.empty_like(x)),
    "vllm::rocm_unquantized_gemm": lambda x, weight, bias=None: x.new_empty(x.shape[0], weight.shape[0]),
}


@pytest.fixture(scope="module", autouse=True)
def vllm_ops() -> Iterator[None]:
    with defined(SCHEMAS, FAKES):
        yield


def raised(function: Callable[..., Any], groups: Any = None, **inputs: Tensor) -> CanonicalGraph:
    return canonicalize(written(function, inputs), engine_groups=groups or {"tp:0": "0", 7: "0"})


def calls(canonical: CanonicalGraph, name: str) -> list[tuple[Any, ...]]:
    """The arguments of a dialect op, nodes by their names."""
    found = canonical.calls(ops[name].overload)
    return [tuple(str(a) if isinstance(a, fx.Node) else a for a in node.args) for node in found]


def reduce_add_norm(x: Any, residual: Any, weight: Any) -> Any:
    """A half layer of vLLM's on GPUs."""
    reduced = torch.ops.vllm.all_reduce.default(x, "tp:0")
    y = torch.ops.vllm_ir.fused_add_rms_norm.default(reduced, residual, weight, EPS)
    return y[0], y[1]


@pytest.mark.parametrize(("dtype", "convention"), [(torch.bfloat16, "vllm"), (torch.float32, "fp32")])
def test_what_gpus_have(dtype: torch.dtype, convention: str) -> None:
    canonical = raised(reduce_add_norm, x=X, residual=R, weight=W.to(dtype))
    assert canonical.recognized() == {f"all_reduce[{HIDDEN}]": 1, f"fused_add_rms_norm[{HIDDEN}]": 1}
    assert calls(canonical, "all_reduce") == [("x", "0")]
    (norm,) = calls(canonical, "fused_add_rms_norm")
    assert norm[1:] == ("residual", "weight", EPS, convention)


def signatures(canonical: CanonicalGraph, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr("fuseplan.rules.families.sites.group_size", lambda name: 4)
    return [site.shape(4).signature for site in find_sites(canonical)]


def test_prices_know_whose_all_reduce_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def flat(x: Any, residual: Any, weight: Any) -> Any:
        reduced = torch.ops.aten.view.default(torch.ops.vllm.all_reduce.default(x, "tp:0"), [2, 2, HIDDEN])
        return torch.ops.vllm_ir.rms_norm.default(reduced, weight, EPS)

    for function, between in ((reduce_add_norm, "-> add ->"), (flat, "->")):
        (site,) = signatures(raised(function, x=X, residual=R, weight=W), monkeypatch)
        assert site.startswith(f"all_reduce[4 vllm] {between} rms_norm")


@pytest.mark.parametrize(("operation", "expected"), [("sum", 1), ("max", 0)])
def test_torchs_all_reduce_in_symmetric_memory(operation: str, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.distributed._symmetric_memory

    def norm(x: Any, weight: Any) -> Any:
        reduced = torch.ops.symm_mem.one_shot_all_reduce.default(x, operation, "0")
        return torch.ops.vllm_ir.rms_norm.default(reduced, weight, EPS)

    canonical = raised(norm, x=X, weight=W)
    assert canonical.recognized().get(f"all_reduce[{HIDDEN}]", 0) == expected
    (site,) = signatures(canonical, monkeypatch)
    assert site.startswith("all_reduce[4 symm_mem one-shot]") == bool(expected)


@pytest.mark.parametrize(("dtype", "convention"), [(torch.bfloat16, "llama"), (torch.float32, "gpt_oss")])
def test_a_norm_multiplies_in_the_dtype_of_its_weight(dtype: torch.dtype, convention: str) -> None:
    def norm(x: Any, weight: Any) -> Any:
        return torch.ops.vllm_ir.rms_norm.default(x, weight, EPS)

    assert calls(raised(norm, x=X, weight=W.to(dtype)), "rms_norm") == [("x", "weight", EPS, convention)]


def custom_norms(x: Any, residual: Any, weight: Any = None) -> Any:
    empty = torch.ops.aten.empty_like.default(x)
    first: Any = auto_functionalized(torch.ops._C.rms_norm.default, result=empty, input=x, weight=weight, epsilon=EPS)
    second: Any = auto_functionalized(
        torch.ops._C.fused_add_rms_norm.default, input=first[1], residual=residual, weight=weight, epsilon=EPS
    )
    return second[1], second[2]


def test_the_custom_ops() -> None:
    canonical = raised(custom_norms, x=X, residual=R, weight=W)
    assert calls(canonical, "rms_norm") == [("x", "weight", EPS, "gpt_oss")]
    (norm,) = calls(canonical, "fused_add_rms_norm")
    assert norm[1:] == ("residual", "weight", EPS, "gpt_oss")
    assert "auto_functionalized" not in str(canonical.graph), "nothing of them is left in the raised copy"


def test_custom_ops_without_a_weight_are_named() -> None:
    canonical = raised(custom_norms, x=X, residual=R)
    assert [each.reason for each in canonical.refusals] == [Reason.OP, Reason.OP]
    assert all("it has no weight" in each.detail for each in canonical.refusals)
    assert not canonical.recognized()


@pytest.mark.parametrize(
    ("neox", "table", "reason", "expected"),
    [
        (True, 32, Reason.OP, "it looks its angles up itself"),
        (True, 16, Reason.ATTRIBUTE, "it rotates 16 of the 32 elements of a head, and looks its angles up itself"),
        (False, 32, Reason.ATTRIBUTE, "it rotates neighbours (interleaved), and looks its angles up itself"),
    ],
)
def test_the_custom_op_for_rotary_embeddings_is_named(neox: bool, table: int, reason: Reason, expected: str) -> None:
    def rotated(positions: Any, query: Any, key: Any, table: Any) -> Any:
        both: Any = auto_functionalized(
            torch.ops._C.rotary_embedding.default, positions=positions, query=query, key=key, head_size=32,
            cos_sin_cache=table, is_neox=neox,
        )  # fmt: skip
        return both[1], both[2]

    canonical = raised(rotated, positions=torch.arange(4), query=X, key=R, table=randn(128, table))
    (refusal,) = canonical.refusals
    assert (refusal.reason, refusal.detail) == (reason, f"rotary embedding not recognised: {expected}")
    assert refusal.fix is not None
    assert "-rotary_embedding" in refusal.fix


def test_what_the_cpu_has() -> None:
    def reduced(x: Any, weight: Any) -> Any:
        both = auto_functionalized(torch.ops._C.shm_allreduce.default, handle=7, data=x)
        return torch.ops.vllm_ir.rms_norm.default(both[1], weight, EPS)

    canonical = raised(reduced, x=X, weight=W)
    assert calls(canonical, "all_reduce") == [("x", "0")]
    assert canonical.recognized() == {f"all_reduce[{HIDDEN}]": 1, f"rms_norm[{HIDDEN}]": 1}


def test_a_group_that_is_not_known_is_named() -> None:
    canonical = raised(reduce_add_norm, {"ep:0": "1"}, x=X, residual=R, weight=W)
    (refusal,) = canonical.refusals
    assert refusal.reason is Reason.GROUP
    assert "vLLM's group 'tp:0' is not among those of this process (ep:0)" in refusal.detail


@pytest.mark.parametrize(
    ("weight", "size", "reason", "expected"),
    [
        (None, None, Reason.OP, "it has no weight"),
        (W, 32, Reason.ATTRIBUTE, "the variance is taken over the first 32 elements"),
        (W.half(), None, Reason.DTYPE, "the weight is float16 and x is bfloat16"),
    ],
)
def test_norms_that_are_others(weight: Tensor | None, size: int | None, reason: Reason, expected: str) -> None:
    inputs = {"x": X} if weight is None else {"x": X, "weight": weight}

    def norm(x: Any, weight: Any = None) -> Any:
        return torch.ops.vllm_ir.rms_norm.default(x, weight, EPS, size)

    canonical = raised(norm, **inputs)
    (refusal,) = canonical.refusals
    assert (refusal.reason, expected in refusal.detail) == (reason, True), refusal.detail
    assert not canonical.recognized()


@pytest.fixture
def two_ranks() -> Iterator[str]:
    with ranks(2) as group:
        yield group


def test_the_router_of_gpt_oss_on_rocm_reads_beside_the_pad() -> None:
    """`rocm_unquantized_gemm` reads what the experts read padded: the pad is fused, and the router gets its part."""

    def layer(x: Any, residual: Any, weight: Any, router: Any) -> Any:
        both = torch.ops.vllm_ir.fused_add_rms_norm.default(x, residual, weight, EPS)
        gemm = torch.ops.vllm.rocm_unquantized_gemm.default(both[0], router)
        return gemm, torch.ops.aten.constant_pad_nd.default(both[0], [0, 64], 0.0), both[1]

    graph = written(layer, {"x": X, "residual": R, "weight": W, "router": randn(8, HIDDEN)})
    manager = PostGradPassManager(PassConfig(policy="ordered(act_padding)"))
    analysis = manager.analyze(graph)
    decision = manager.decide(analysis, manager.config.chosen_policy, "graph_0")
    assert manager.report("graph_0", analysis, decision).count(manager.rules)["act_padding"] == 1


def test_an_all_reduce_of_vllm_goes_into_its_norm(two_ranks: str) -> None:
    graph = written(reduce_add_norm, {"x": X, "residual": R, "weight": W})
    manager = PostGradPassManager(
        PassConfig(policy="ordered(allreduce_rms)", verify="off"), engine_groups=lambda: {"tp:0": two_ranks}
    )
    manager(graph)
    targets = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    assert [target for target in targets if "getitem" not in target] == [
        "fuseplan.all_reduce_fused_add_rms_norm.default"
    ]
