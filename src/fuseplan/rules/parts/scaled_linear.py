"""Linear layers on fp8 codes: rows and weights each have a scale a row. Layers that read one input become one op.

y = _scaled_mm(codes, permute(weight), scale, view(weight_scale), bias, None, bfloat16, use_fast_accum)
_C.cutlass_scaled_mm(y, codes, weight, scale, weight_scale, bias)

The second is vLLM's: its weights [width, features] are stored feature by feature, with a scale a feature or one for
all. Its kernels for Hopper let tensor cores accumulate without float32's help (0.22 to 0.33,
`csrc/quantization/w8a8/cutlass/c3x/scaled_mm_sm90_fp8_dispatch.cuh`).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fuseplan.devices.hardware import Hardware
from fuseplan.graph.canonical import CanonicalGraph
from fuseplan.graph.canonical.engines import arguments_of, engine_op, engine_op_name, is_engines, merge_equal_results
from fuseplan.graph.facts import (
    ORDER_KEEPING,
    Call,
    aten,
    dtype_of,
    equal_size,
    equal_sizes,
    exact,
    is_call,
    item,
    targets_of,
    tensor_of,
)
from fuseplan.graph.ops import DialectOp, Sample, define, draw_positive, random_tensor
from fuseplan.rules.parts.base import Core, Reported, Stage
from fuseplan.rules.parts.linear import MOST_TOGETHER, NAMES, LinearRegion, is_input, shared_out
from fuseplan.rules.parts.traffic import Kernel, Middle

CODES = torch.float8_e4m3fn
CUTLASS = "_C::cutlass_scaled_mm"
RESULT = torch.bfloat16
"""The only result dtype that torch has for row-wise scales."""
ERROR_FACTOR = 4.0
"""Tensor cores accumulate products of fp8 to some 14 bits; the reference accumulates in float32."""


@dataclass(frozen=True, kw_only=True)
class Layers:
    """The arguments of an op for one or several layers.

    Attributes:
        x: [..., width], codes.
        x_scale: [..., 1], float32.
        weights: [features_i, width], codes.
        scales: [1, features_i], float32, or [1, 1], of all features.
        biases: [features_i], bfloat16, or None.
        use_fast_accum: whether tensor cores may accumulate without float32's help.
    """

    x: Any
    x_scale: Any
    weights: Sequence[Any]
    scales: Sequence[Any]
    biases: Sequence[Any]
    use_fast_accum: bool

    @classmethod
    def of(cls, arguments: Sequence[Any]) -> "Layers":
        """Splits an op's arguments."""
        x, x_scale, *rest, use_fast_accum = arguments
        count = len(rest) // 3
        return cls(
            x=x, x_scale=x_scale, weights=rest[:count], scales=rest[count : 2 * count], biases=rest[2 * count :],
            use_fast_accum=use_fast_accum,
        )  # fmt: skip


def parameters_of(count: int) -> str:
    """The arguments of this many layers, in the syntax of a schema."""
    each = [
        f"{kind}{index}" for kind in ("Tensor weight", "Tensor weight_scale", "Tensor? bias") for index in range(count)
    ]
    return ", ".join(("Tensor x", "Tensor x_scale", *each, "bool use_fast_accum"))


def scaled_linears_reference(*arguments: Any) -> Any:
    """y_i = (x @ weight_i^T) * x_scale * weight_scale_i + bias_i, in float32 and rounded once.

    Args:
        arguments: x [..., width] in float8_e4m3fn, x_scale [..., 1] in float32, then the weights [features_i, width] in
            float8_e4m3fn, their scales [1, features_i] or [1, 1] in float32, their biases [features_i] in bfloat16 or
            None, and whether tensor cores may accumulate without float32's help, which changes nothing here.

    Returns:
        [..., features_i] of each layer in bfloat16 (float64 for float64 scales); for a single layer not in a tuple.
    """
    layers = Layers.of(arguments)
    dtype = layers.x_scale.dtype
    x = layers.x.to(dtype)
    found = []
    for weight, scale, bias in zip(layers.weights, layers.scales, layers.biases, strict=True):
        y = x @ weight.to(dtype).t() * layers.x_scale * scale
        found.append((y if bias is None else y + bias).to(_result_dtype(dtype)))
    return tuple(found) if len(found) > 1 else found[0]


def scaled_linears_fake(*arguments: Any) -> Any:
    """Shapes and dtypes of `scaled_linears_reference`."""
    layers = Layers.of(arguments)
    x, dtype = layers.x, _result_dtype(layers.x_scale.dtype)
    found = tuple(x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype) for weight in layers.weights)
    return found if len(found) > 1 else found[0]


def _result_dtype(scale: torch.dtype) -> torch.dtype:
    return scale if scale is torch.float64 else RESULT


def draw_codes(shape: tuple[int, ...], device: torch.device, generator: torch.Generator) -> Tensor:
    """Normal values that use most of fp8's range."""
    return (torch.randn(shape, device=device, generator=generator) * 64).clamp(-448, 448)


def draws_of(count: int) -> dict[str, Any]:
    """How to draw the arguments of this many layers."""
    weights = {f"weight{index}": draw_codes for index in range(count)}
    return {**weights, "x_scale": draw_positive, **{f"weight_scale{index}": draw_positive for index in range(count)}}


def samples_of(count: int) -> list[Sample]:
    """Samples of this many layers."""
    return [
        _sample((1, 96), (64, 32, 16)[:count], biased=False),
        _sample((2, 5, 160), (48, 80, 33)[:count], biased=True),
        _sample((17, 64), (40, 40, 8)[:count], biased=count > 1, use_fast_accum=False),
        _sample((3, 128), (48, 33, 16)[:count], biased=count == 1, in_all=count),
        *([_sample((5, 96), (24, 40, 9)[:count], biased=True, in_all=1)] if count > 1 else []),
    ]


def _sample(
    shape: tuple[int, ...], features: tuple[int, ...], *, biased: bool, use_fast_accum: bool = True, in_all: int = 0
) -> Sample:
    """A sample in which each of the first `in_all` layers has a single scale."""

    def make(device: torch.device, generator: torch.Generator) -> tuple[Any, ...]:
        cpu = torch.device("cpu")
        x = draw_codes(shape, cpu, generator).to(device=device, dtype=CODES)
        weights = [draw_codes((each, shape[-1]), cpu, generator).to(device=device, dtype=CODES) for each in features]
        x_scale = draw_positive((*shape[:-1], 1), cpu, generator).to(device)
        counts = [1 if index < in_all else each for index, each in enumerate(features)]
        scales = [draw_positive((1, each), cpu, generator).to(device) for each in counts]
        biases = [random_tensor((each,), RESULT, device, generator) if biased else None for each in features]
        return x, x_scale, *weights, *scales, *biases, use_fast_accum

    name = f"{'x'.join(map(str, shape))}-{'-'.join(map(str, features))}"
    kind = "-biased" * biased + "-fast" * use_fast_accum + (f"-{in_all}_in_all" if in_all else "")
    return Sample(name=name + kind, make=make)


def _define(count: int) -> DialectOp:
    results = "Tensor" if count == 1 else f"({', '.join(['Tensor'] * count)})"
    return define(
        f"scaled_{NAMES[count - 1]}",
        f"({parameters_of(count)}) -> {results}",
        reference=scaled_linears_reference,
        fake=scaled_linears_fake,
        samples=samples_of(count),
        error_factor=ERROR_FACTOR,
        draws=draws_of(count),
    )


SCALED_LINEARS = tuple(_define(count) for count in range(1, MOST_TOGETHER + 1))
"""The ops of one, two and three layers."""


# How graphs spell them.


@dataclass(frozen=True, kw_only=True)
class _Layer:
    """One layer.

    Attributes:
        product: the call.
        rows: the codes that it reads, [rows, width].
        scale: their scales, [rows, 1].
        weight: [features, width], an input of the graph.
        weight_scale: [1, features], a view of an input of the graph.
        bias: [features], an input of the graph, or None.
        use_fast_accum: the call's argument.
    """

    product: fx.Node
    rows: fx.Node
    scale: fx.Node
    weight: fx.Node
    weight_scale: fx.Node
    bias: fx.Node | None
    use_fast_accum: bool

    @property
    def reads(self) -> tuple[Any, ...]:
        """A key that layers for one op have in common; it looks through views, as layers may have separate ones."""
        return _viewed(self.rows), _viewed(self.scale), exact(_size(self.rows, 1)), self.use_fast_accum


def raise_scaled_linears(canonical: CanonicalGraph) -> None:
    """Raises products of codes with scales of rows, up to three that read the same codes as one op."""
    groups: dict[tuple[Any, ...], list[Call]] = {}
    for node in canonical.calls(aten._scaled_mm.default):
        layer = _read(node)
        if layer is not None:
            groups.setdefault((*layer.reads, canonical.region[node]), []).append(node)
    for products in groups.values():
        for few in shared_out(products):
            # Read again: the group's inputs may have been results of a group raised before.
            _raise(canonical, [layer for product in few if (layer := _read(product)) is not None])
    for node in canonical.calls(*filter(is_engines, targets_of(canonical.graph))):
        op = engine_op(node)
        if op is not None and engine_op_name(node) == CUTLASS:
            merge_equal_results(canonical, node)
            if (own := _read_engines(canonical, node, arguments_of(node, op))) is not None:
                _raise(canonical, [own])


def _read(node: Call) -> _Layer | None:
    given = arguments_of(node, aten._scaled_mm.default)
    rows, transposed, scale, weight_scale = (given[name] for name in ("self", "mat2", "scale_a", "scale_b"))
    if not node.users or given["scale_result"] is not None or given["out_dtype"] is not RESULT:
        return None
    if not is_call(transposed, aten.permute.default) or list(transposed.args[1]) != [1, 0]:
        return None
    weight, bias = transposed.args[0], given["bias"]
    if not is_input(weight) or not is_input(_viewed(weight_scale)) or not _fits(rows, scale, weight, weight_scale):
        return None
    if bias is not None and not (is_input(bias) and _is_of(bias, RESULT, _size(weight, 0))):
        return None
    return _Layer(
        product=node, rows=rows, scale=scale, weight=weight, weight_scale=weight_scale, bias=bias,
        use_fast_accum=given["use_fast_accum"],
    )  # fmt: skip


def _read_engines(canonical: CanonicalGraph, node: Call, given: Mapping[str, Any]) -> _Layer | None:
    """The layer of a vLLM call, which writes its result into an argument."""
    rows, weight, scale, weight_scale, bias = (given[name] for name in ("a", "b", "a_scales", "b_scales", "bias"))
    result, features, own = item(node, 1), _size(weight, 1), tensor_of(weight_scale)
    if result is None or len(node.users) != 1 or not is_input(weight) or not is_input(weight_scale):
        return None
    written, held, codes = tensor_of(result), tensor_of(weight), tensor_of(rows)
    if written is None or held is None or codes is None or own is None or codes.dim() != 2:
        return None
    if codes.dtype is not CODES or held.dtype is not CODES or not equal_size(held.stride(0), 1):
        return None
    if not _is_of(scale, torch.float32, _size(rows, 0), 1) or own.dtype is not torch.float32:
        return None
    if not _is_of(result, RESULT, _size(rows, 0), features) or not equal_sizes(written.stride(), (features, 1)):
        return None
    if bias is not None and not (is_input(bias) and _is_of(bias, RESULT, features)):
        return None
    count = 1 if equal_size(own.numel(), 1) else features
    if not equal_size(own.numel(), count):
        return None
    transposed = canonical.insert_before(node, aten.permute.default, (weight, [1, 0]), held.t())
    row = canonical.insert_before(node, aten.reshape.default, (weight_scale, [1, count]), own.reshape(1, count))
    return _Layer(
        product=result, rows=rows, scale=scale, weight=transposed, weight_scale=row, bias=bias, use_fast_accum=True
    )


def _fits(rows: Any, scale: Any, weight: Any, weight_scale: Any) -> bool:
    """Whether both are codes, each with a scale of every row."""
    if dtype_of(rows) is not CODES or dtype_of(weight) is not CODES:
        return False
    return _is_of(scale, torch.float32, _size(rows, 0), 1) and _is_of(weight_scale, torch.float32, 1, _size(weight, 0))


def _is_of(node: object, dtype: torch.dtype, *shape: Any) -> bool:
    value = tensor_of(node)
    return value is not None and value.dtype is dtype and equal_sizes(value.shape, shape)


def _size(node: object, dim: int) -> Any:
    value = tensor_of(node)
    return None if value is None else value.shape[dim]


def _viewed(node: Any) -> Any:
    """The value at the base of a chain of views that keep all elements in their order."""
    while is_call(node, *ORDER_KEEPING) or (is_call(node, aten.permute.default) and _is_line(node)):
        node = node.args[0]
    return node


def _is_line(node: fx.Node) -> bool:
    """Whether a value is one row or one column, so that a permutation keeps the order of its elements."""
    value = tensor_of(node)
    return value is not None and value.dim() == 2 and any(equal_size(size, 1) for size in value.shape)


def _raise(canonical: CanonicalGraph, layers: Sequence[_Layer]) -> None:
    first = layers[0]
    args: Iterable[Any] = (
        first.rows, first.scale, *(each.weight for each in layers), *(each.weight_scale for each in layers),
        *(each.bias for each in layers), first.use_fast_accum,
    )  # fmt: skip
    canonical.raise_op(SCALED_LINEARS[len(layers) - 1], tuple(args), [each.product for each in layers])


# Prices.


def library_kernels(hardware: Hardware, region: LinearRegion) -> tuple[Kernel, ...]:
    """A product by torch for each layer: latency + max(bytes / bandwidth, width * column). Its kernels have tiles of
    128 x 128, and a single processor goes through each.
    """
    column = region.width * hardware.linear.scaled_column.value
    latency = hardware.linear.scaled_library.value
    return tuple(_kernel(hardware, region, (each,), "linear", latency, column) for each in region.features)


def skinny_kernel(hardware: Hardware, region: LinearRegion) -> Kernel:
    """One kernel for all layers, which reads the weights at memory bandwidth."""
    return _kernel(hardware, region, region.features, "skinny", hardware.linear.scaled.value)


def reference_kernels(hardware: Hardware, region: LinearRegion) -> tuple[Kernel, ...]:
    """The kernels of the reference: a cast of the weights to float32, and the product."""
    launch, wide = round(hardware.launch.value), 5 + 4
    nbytes = wide * region.width * sum(region.features)
    return (
        Kernel(
            name="scaled linear reference", launch=4 * launch, memory=round(nbytes / hardware.memory_bandwidth.value)
        ),
    )


def _kernel(
    hardware: Hardware, region: LinearRegion, features: Sequence[int], kind: str, latency: float, least: float = 0.0
) -> Kernel:  # fmt: skip
    codes = region.width * (region.rows + sum(features))
    nbytes = codes * region.itemsize + region.rows * sum(features) * RESULT.itemsize
    # Weights don't stay in the L2 cache: a model reads all the others before it reads them again.
    memory = max(nbytes / hardware.memory_bandwidth.value, least)
    return Kernel(name=f"scaled {kind}", launch=round(latency), memory=round(memory), kind=kind)


PART = Core(
    name="scaled_linear",
    ops=SCALED_LINEARS,
    raising=((Stage.LINEARS, raise_scaled_linears),),
    evaluated=(CUTLASS,),
    reported=Reported.NEVER,
    traffic=Middle(name="scaled_linear"),
    opt_in=True,
    several=SCALED_LINEARS[1:],
)
