"""vLLM's ops that quantise to fp8, as its post-grad graphs have them with `+quant_fp8`.

Its builds for CPUs have none of them, so that they are declared here by the schemas that vLLM 0.22 to 0.33 publishes
(`csrc/torch_bindings.cpp`), and computed by references in plain torch, step by step as its CUDA kernels do.
"""

from collections.abc import Callable, Iterator
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
from fuseplan.graph.ops import empty_scales
from fuseplan.record import Fusion, Nearness, Reason, Refusal, Report
from tests.graph.canonical.engine_ops import defined
from tests.graph.canonical.test_vllm import vllm_ops
from tests.helpers import randn, written
from tests.rules.parts.test_fp8_spellings import inputs

__all__ = ["vllm_ops"]

FP8, WIDTH, GROUP, EPS = torch.float8_e4m3fn, 512, 128, 1e-5
SCHEMAS = {
    "static_scaled_fp8_quant": "(Tensor! result, Tensor input, Tensor scale, (int, int)? group_shape=None) -> ()",
    "dynamic_scaled_fp8_quant": "(Tensor! result, Tensor input, Tensor! scale) -> ()",
    "dynamic_per_token_scaled_fp8_quant": "(Tensor! result, Tensor input, Tensor! scale, Tensor? scale_ub) -> ()",
    "per_token_group_fp8_quant": "(Tensor input, Tensor! output_q, Tensor! output_s, int group_size, float eps, "
    "float fp8_min, float fp8_max, bool scale_ue8m0, bool dummy_is_scale_transposed, bool dummy_is_tma_aligned) -> ()",
    "per_token_group_fp8_quant_packed": "(Tensor input, Tensor! output_q, Tensor! output_s_packed, int group_size, "
    "float eps, float fp8_min, float fp8_max) -> ()",
    "scaled_fp4_quant": "(Tensor input, Tensor input_scale, bool is_sf_swizzled_layout) -> (Tensor, Tensor)",
}


def static(result: Tensor, x: Tensor, scale: Tensor, group_shape: Any = None) -> None:
    """As `scaled_fp8_quant_kernel_strided_group_shape` with one scale."""
    result.copy_((x.float() * (1.0 / scale)).clamp(-448, 448).to(FP8))


def by_rows(result: Tensor, x: Tensor, scale: Tensor, scale_ub: Tensor | None) -> None:
    """As `dynamic_per_token_scaled_fp8_quant_kernel_strided`."""
    largest = x.abs().amax(-1, keepdim=True).float()
    largest = largest if scale_ub is None else torch.minimum(largest, scale_ub)
    scale.copy_((largest / 448).clamp(min=1 / (448 * 512)))
    result.copy_((x.float() / scale).clamp(-448, 448).to(FP8))


def group_scales(x: Tensor, size: int, eps: float, *, powers: bool) -> tuple[Tensor, Tensor]:
    groups = x.float().unflatten(-1, (-1, size))
    scale = groups.abs().amax(-1).clamp(min=eps) / 448
    scale = torch.exp2(torch.ceil(torch.log2(scale.clamp(min=1e-10)))) if powers else scale
    return (groups / scale.unsqueeze(-1)).clamp(-448, 448).to(FP8).flatten(-2), scale


def by_groups(
    x: Tensor, output_q: Tensor, output_s: Tensor, size: int, eps: float, least: float, most: float, powers: bool,
    *dummies: bool,
) -> None:  # fmt: skip
    """As `per_token_group_quant_8bit_kernel`."""
    codes, scale = group_scales(x, size, eps, powers=powers)
    output_q.copy_(codes)
    output_s.copy_(scale)


def packed(
    x: Tensor, output_q: Tensor, output_s: Tensor, size: int, eps: float, least: float, most: float
) -> None:  # fmt: skip
    """As `per_token_group_quant_8bit_packed_register_kernel`."""
    codes, scale = group_scales(x, size, eps, powers=True)
    output_q.copy_(codes)
    exponents = torch.nn.functional.pad(scale.view(torch.int32) >> 23, (0, -scale.shape[-1] % 4)).unflatten(-1, (-1, 4))
    output_s.copy_((exponents << torch.tensor([0, 8, 16, 24], dtype=torch.int32)).sum(-1, dtype=torch.int32))


COMPUTED: dict[str, Callable[..., Any]] = {
    "static_scaled_fp8_quant": static,
    "dynamic_scaled_fp8_quant": lambda *arguments: None,
    "dynamic_per_token_scaled_fp8_quant": by_rows,
    "per_token_group_fp8_quant": by_groups,
    "per_token_group_fp8_quant_packed": packed,
    "scaled_fp4_quant": lambda x, *rest: (
        x.new_empty((len(x), x.shape[1] // 2), dtype=torch.uint8),
        x.new_empty((len(x), x.shape[1] // 16), dtype=torch.uint8),
    ),
}


@pytest.fixture(scope="module", autouse=True)
def quantising_ops(vllm_ops: None) -> Iterator[None]:
    """Defines them. vLLM's builds for CPUs have some by the same names, without arguments."""
    if any(hasattr(torch.ops._C, name) for name in SCHEMAS):
        pytest.skip("vLLM's build has an op of the same name without arguments")
    schemas = {f"_C::{name}": schema for name, schema in SCHEMAS.items()}
    computed = {f"_C::{name}": function for name, function in COMPUTED.items()}
    with defined(schemas, {"_C::scaled_fp4_quant": COMPUTED["scaled_fp4_quant"]}, computed):
        yield


def called(name: str, **values: Any) -> Any:
    """A call as functionalisation leaves it: what is returned, then what is written."""
    return auto_functionalized(getattr(torch.ops._C, name).default, **values)


def new(x: Any, like: Tensor) -> Any:
    """Memory as `torch.empty_strided` makes it."""
    made = {"dtype": like.dtype, "device": torch.device("cpu")}
    args = [*like.shape], [*like.stride()]
    return fx.Proxy(x.node.graph.call_function(torch.ops.aten.empty_strided.default, args, made), x.tracer)


Quantise = Callable[[Any], tuple[Any, ...]]
ROWS = 6
LIKE = torch.empty(ROWS, WIDTH)
CODES = LIKE.to(FP8)
BOUNDS = {"fp8_min": -448.0, "fp8_max": 448.0}


def groups_of(layout: str = "rows", *, powers: bool = False) -> Quantise:
    def quantise(y: Any) -> tuple[Any, ...]:
        values = {"input": y, "output_q": new(y, CODES), "group_size": GROUP, "eps": 1e-10, **BOUNDS}
        if layout == "packed":
            scales = new(y, empty_scales(LIKE, WIDTH // GROUP, torch.int32, layout))
            result = called("per_token_group_fp8_quant_packed", **values, output_s_packed=scales)
        else:
            scales = new(y, empty_scales(LIKE, WIDTH // GROUP, torch.float32, layout))
            result = called(
                "per_token_group_fp8_quant", **values, output_s=scales, scale_ue8m0=powers,
                dummy_is_scale_transposed=layout != "rows", dummy_is_tma_aligned=layout == "aligned",
            )  # fmt: skip
        return result[1], result[2]

    return quantise


def by_row(y: Any) -> tuple[Any, ...]:
    codes, scales = new(y, CODES), new(y, torch.empty(ROWS, 1))
    result = called("dynamic_per_token_scaled_fp8_quant", result=codes, input=y, scale=scales, scale_ub=None)
    return result[1], result[2]


def by_one(scale: Any) -> Quantise:
    def quantise(y: Any) -> tuple[Any, ...]:
        result = called("static_scaled_fp8_quant", result=new(y, CODES), input=y, scale=scale, group_shape=[-1, -1])
        return (result[1],)

    return quantise


LEAST = float(torch.tensor(1e-10) / 448)
"""Of the scales of groups."""


KINDS: dict[str, Callable[[Any], Quantise]] = {
    "static": by_one,
    "rows": lambda s: by_row,
    "groups": lambda s: groups_of(),
    "powers": lambda s: groups_of(powers=True),
    "columns": lambda s: groups_of("columns"),
    "aligned": lambda s: groups_of("aligned"),
    "packed": lambda s: groups_of("packed"),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def graph_of(kind: str, dtype: torch.dtype = torch.bfloat16) -> fx.Graph:
    """Of the quantisation alone."""
    return written(lambda x, s: KINDS[kind](s)(x), {"x": torch.empty(ROWS, WIDTH, dtype=dtype), "s": torch.empty(1)})


def bits(value: Tensor) -> Tensor:
    return value.view(torch.uint8) if value.itemsize == 1 else value


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@every_kind
def test_it_is_one_op_that_computes_what_the_kernel_does(kind: str, dtype: torch.dtype) -> None:
    """Of all rows without NaN, whose codes nobody reads; infinity is one of them, whose scale is infinite."""
    graph = graph_of(kind, dtype)
    raised = canonicalize(graph)
    if dtype is torch.float32 and kind in ("powers", "packed"):
        assert not raised.dialect_nodes
        assert raised.refusals
        return
    assert len(raised.dialect_nodes) == 1
    assert not raised.refusals
    for name, value in inputs(dtype).items():
        largest = torch.inf if kind != "packed" else 3e4
        x = value.repeat(1, WIDTH // value.shape[-1]).nan_to_num(0.0, largest, -largest)
        both = (fx.GraphModule({}, each)(x, torch.tensor([0.37])) for each in (raised.graph, graph))
        for got, wanted in zip(*both, strict=True):
            same = (bits(got) == bits(wanted)) | (got.float().isnan() & wanted.float().isnan())
            assert bool(same.all()), name
            assert got.stride() == wanted.stride()


def block(kind: str, *, adds: bool) -> fx.Graph:
    """A half layer of vLLM's: its norm in `vllm_ir`, and the quantisation behind it."""

    def layer(x: Any, r: Any, w: Any, s: Any) -> Any:
        if adds:
            both = torch.ops.vllm_ir.fused_add_rms_norm.default(x, r, w, EPS)
            return *KINDS[kind](s)(both[0]), both[1]
        return KINDS[kind](s)(torch.ops.vllm_ir.rms_norm.default(x, w, EPS))

    x = randn(ROWS, WIDTH)
    return written(layer, {"x": x, "r": x, "w": randn(WIDTH), "s": torch.empty(1)})


def applied_to(graph: fx.Graph, **config: Any) -> Fusion:
    """The one fusion in a graph, on an H200."""
    reports: list[Report] = []
    PostGradPassManager(fuseplan.PassConfig(**config), on_report=reports.append, device=device_profile("h200"))(graph)
    (applied,) = reports[0].graphs[0].applied
    return applied


def fused(graph: fx.Graph, policy: str = "ordered(norm_quant)") -> Fusion:
    return applied_to(graph, policy=policy, verify="off", costs="modelled")


@pytest.mark.parametrize("policy", ["ordered(norm_quant)", "planned"])
@pytest.mark.parametrize("adds", [False, True])
@every_kind
def test_it_goes_into_its_norm(kind: str, adds: bool, policy: str) -> None:
    graph = block(kind, adds=adds)
    applied = fused(graph, policy)
    assert applied.rule == "norm_quant"
    assert applied.op.startswith("fused_add_rms_norm" if adds else "rms_norm")
    assert "opaque" in str(applied.site_class)
    left = {str(node.target) for node in graph.nodes if node.op == "call_function"}
    assert left - {"<built-in function getitem>"} == {f"fuseplan.{applied.op}.triton"}


def test_unfused_it_is_a_kernel_of_its_own() -> None:
    """Inductor has a quantisation in plain torch in the norm's kernel, and makes none of this one's."""

    def plain(x: Any, w: Any) -> Any:
        y = torch.ops.vllm_ir.rms_norm.default(x, w, EPS)
        both = ops.dynamic_per_token_scaled_fp8_quant(y, FP8, 1 / (448 * 512), 0.0, 0.0, None, "divide")
        return both[0], both[1]

    own = fused(written(plain, {"x": randn(ROWS, WIDTH), "w": randn(WIDTH)})).saving_ns
    theirs = fused(block("rows", adds=False)).saving_ns
    assert own is not None
    assert theirs is not None
    assert theirs > own + 1000


CALLS: dict[str, dict[str, Any]] = {
    "static_scaled_fp8_quant": {"result": CODES, "scale": torch.empty(1), "group_shape": None},
    "dynamic_scaled_fp8_quant": {"result": CODES, "scale": torch.empty(1)},
    "dynamic_per_token_scaled_fp8_quant": {"result": CODES, "scale": torch.empty(ROWS, 1), "scale_ub": None},
    "per_token_group_fp8_quant": {
        "output_q": CODES, "output_s": torch.empty(ROWS, WIDTH // GROUP), "group_size": GROUP, "eps": 1e-10,
        **BOUNDS, "scale_ue8m0": False, "dummy_is_scale_transposed": False, "dummy_is_tma_aligned": False,
    },
}  # fmt: skip


def refusal(name: str, **changed: Any) -> Refusal:
    """What is said of one call."""

    def quantise(x: Any) -> Any:
        values = {
            key: new(x, each) if isinstance(each, Tensor) else each for key, each in (CALLS[name] | changed).items()
        }
        result = called(name, input=x, **values)
        return (result[1],) if name.startswith("static") else (result[1], result[2])

    raised = canonicalize(written(quantise, {"x": LIKE.bfloat16()}))
    assert not raised.dialect_nodes
    (found,) = raised.refusals
    assert found.nearness is Nearness.UNRECOGNIZED
    return found


@pytest.mark.parametrize(
    ("name", "changed", "reason", "detail"),
    [
        (
            "static_scaled_fp8_quant", {"scale": torch.empty(4)}, Reason.SIZE,
            "the scale is float32[4] on cpu, and the op takes one float32 number",
        ),
        (
            "static_scaled_fp8_quant", {"result": torch.empty(16, WIDTH, dtype=FP8)}, Reason.LAYOUT,
            f"a result is float8_e4m3fn[16, {WIDTH}]",
        ),
        (
            "static_scaled_fp8_quant", {"result": torch.empty(ROWS, WIDTH, dtype=torch.float8_e4m3fnuz)}, Reason.DTYPE,
            "vLLM's kernels take 224 for the largest of float8_e4m3fnuz",
        ),
        ("dynamic_scaled_fp8_quant", {}, Reason.OP, "the scale is computed from all rows at once"),
        (
            "dynamic_per_token_scaled_fp8_quant", {"scale_ub": torch.empty(ROWS)}, Reason.SIZE,
            f"the upper bound is float32[{ROWS}]",
        ),
        ("per_token_group_fp8_quant", {"fp8_max": 240.0}, Reason.ATTRIBUTE, "codes are between -448 and 240"),
        ("per_token_group_fp8_quant", {"group_size": 96}, Reason.SIZE, f"rows of {WIDTH} aren't whole groups of 96"),
        ("per_token_group_fp8_quant", {"output_s": torch.empty(4, 16).T}, Reason.LAYOUT, "which no layout has"),
    ],
)  # fmt: skip
def test_what_computes_otherwise_is_named(name: str, changed: dict[str, Any], reason: Reason, detail: str) -> None:
    found = refusal(name, **changed)
    assert found.reason is reason
    assert detail in found.detail


def test_approximate_reciprocals_are_named() -> None:
    def quantise(x: Any, s: Any) -> Any:
        result = torch.ops._C.scaled_fp4_quant.default(x, s, True)
        return result[0], result[1]

    (found,) = canonicalize(written(quantise, {"x": randn(ROWS, WIDTH), "s": torch.empty(1)})).refusals
    assert (found.reason, "approximate reciprocals" in found.detail) == (Reason.ROUNDING, True)
