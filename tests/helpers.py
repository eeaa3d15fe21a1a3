"""Small models in the spellings that real ones use, and the graphs that Inductor makes of them."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import detect_fake_mode
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.joint_graph import joint_graph_passes
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed import _functional_collectives as collectives
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.fx.proxy import GraphAppendingTracer
from torch.nn import functional as F
from torch.torch_version import TorchVersion

from fuseplan.dialect.raising import canonicalize
from fuseplan.explanation.capture import _Recorder, capture
from fuseplan.graph.canonical import CanonicalGraph

HIDDEN = 64
Norm = Callable[[Tensor, Tensor | None, Tensor], tuple[Tensor, Tensor]]


def llama(x: Tensor, residual: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x if residual is None else residual + x
    wide = total.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return weight * wide.to(x.dtype), total


def gpt_oss(x: Tensor, residual: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x if residual is None else residual + x
    wide = total.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
    return (weight * wide).to(x.dtype), total


def gemma(x: Tensor, residual: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x if residual is None else residual + x
    wide = total.float()
    wide = wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + 1e-6)
    return (wide * (1.0 + weight.float())).type_as(x), total


def vllm(x: Tensor, residual: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x.float() if residual is None else x.float() + residual.float()
    wide = total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + 1e-5)
    return wide.to(x.dtype) * weight, total.to(x.dtype)


def built_in(x: Tensor, residual: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x if residual is None else residual + x
    return F.rms_norm(total, (total.shape[-1],), weight, 1e-6), total


SPELLINGS: dict[str, Norm] = {"llama": llama, "gpt_oss": gpt_oss, "gemma": gemma, "vllm": vllm, "built_in": built_in}
CONVENTIONS = {"llama": "llama", "gpt_oss": "gpt_oss", "gemma": "gemma", "vllm": "vllm", "built_in": "gpt_oss"}


# Of vLLM's spelling, see `fuseplan.graph.ops.rounding`: kernels that return it rounded can't be put there.
KEEPS_FLOAT32_RESIDUAL = TorchVersion(torch.__version__) < "2.12"
needs_rounded_residual = pytest.mark.skipif(
    KEEPS_FLOAT32_RESIDUAL, reason="torch 2.11's Inductor leaves the residual stream of vLLM's norms in float32"
)


def all_reduce(x: Tensor, group: str) -> Tensor:
    reduced: Tensor = collectives.all_reduce(x, "sum", group)  # type: ignore[arg-type]
    return reduced


def quantize(x: Tensor, scale: Tensor, *, reciprocal: bool = False) -> Tensor:
    """Static per-tensor fp8, as vLLM's QuantFP8 computes it natively."""
    scaled = x.float() * scale.reciprocal() if reciprocal else x.float() / scale
    return scaled.clamp(-448.0, 448.0).to(torch.float8_e4m3fn)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Dynamic per-token fp8, as vLLM's QuantFP8 computes it natively."""
    scale = x.abs().amax(-1, keepdim=True).float() / 448.0
    scale = scale.clamp(min=1 / (448.0 * 512.0))
    return (x.float() * scale.reciprocal()).clamp(-448.0, 448.0).to(torch.float8_e4m3fn), scale


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def post_grad(function: Callable[..., Any], *inputs: Tensor, dynamic: bool = False) -> fx.Graph:
    """The one graph that Inductor hands to custom passes."""
    (gm,) = capture(function, inputs, {}, dynamic=dynamic).graphs
    return gm.graph


def canonical(function: Callable[..., Any], *inputs: Tensor, dynamic: bool = False) -> CanonicalGraph:
    """That graph, raised."""
    return canonicalize(post_grad(function, *inputs, dynamic=dynamic))


def quickly_canonical(function: Callable[..., Any], *inputs: Tensor, dynamic: bool = False) -> CanonicalGraph:
    """What `quickly_traced` yields, raised."""
    return canonicalize(quickly_traced(function, *inputs, dynamic=dynamic))


def quickly_traced(function: Callable[..., Any], *inputs: Tensor, dynamic: bool = False) -> fx.Graph:
    """The same graph of a function of tensors that Dynamo leaves as it is, without Dynamo unless it is dynamic, in a
    third of the time: for further inputs of what another test traces as users do.
    """
    if dynamic:
        return post_grad(function, *inputs, dynamic=True)
    marks = "_dynamo_dynamic_indices", "_dynamo_weak_dynamic_indices"
    assert not [each for each in inputs if any(hasattr(each, mark) for mark in marks)], "marks are for Dynamo"

    def on_inputs(*given: Tensor) -> Any:
        return function(*given)  # tracing would ask for arguments that have defaults, too

    free = torch.func.functionalize(on_inputs, remove="mutations")
    with torch.no_grad(), enable_python_dispatcher():
        gm = make_fx(free, select_decomp_table(), tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.add_.Scalar):
        node.target = torch.ops.aten.add.Scalar  # F.rms_norm's own, on a value that nothing else reads
    gm.graph.eliminate_dead_code()
    values = [node.meta["val"] for node in gm.graph.find_nodes(op="placeholder")]
    recorder, mode = _Recorder(), detect_fake_mode(values)
    with torch.no_grad(), V.set_fake_mode(mode):
        joint_graph_passes(gm)
        recorder._inner(gm, values, is_inference=True)
    (traced,) = recorder.graphs
    return traced.graph


def written(function: Callable[..., Any], inputs: Mapping[str, Tensor], *, dynamic: bool = False) -> fx.Graph:
    """The graph of a function that calls dialect and aten ops itself, with fake values: nothing is captured, so that it
    takes milliseconds. If it is dynamic, the rows of matrices are symbols.

    `inputs` are handed over by name.
    """
    graph = fx.Graph()
    tracer = GraphAppendingTracer(graph)
    results = function(**{name: fx.Proxy(graph.placeholder(name), tracer) for name in inputs})
    graph.output(fx.node.map_aggregate(results, lambda each: each.node if isinstance(each, fx.Proxy) else each))
    mode = FakeTensorMode(shape_env=ShapeEnv() if dynamic else None)
    fakes = [_fake(value, mode, dynamic) for value in inputs.values()]
    FakeTensorProp(fx.GraphModule({}, graph), mode).propagate_dont_convert_inputs(*fakes)
    return graph


def _fake(value: Tensor, mode: FakeTensorMode, dynamic: bool) -> Tensor:
    if not dynamic or value.dim() != 2:
        return mode.from_tensor(value, static_shapes=True)
    sizes = [DimDynamic.DUCK, DimDynamic.STATIC]  # equal sizes are one symbol
    context: StatelessSymbolicContext[Any, Any] = StatelessSymbolicContext(dynamic_sizes=sizes)
    return mode.from_tensor(value, symbolic_context=context)
