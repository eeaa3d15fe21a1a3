"""Linear layers. Layers that read one input, like queries, keys and values, or gate and up, become one op."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fuseplan.devices.hardware import Hardware
from fuseplan.graph.canonical import CanonicalGraph
from fuseplan.graph.facts import RESHAPES, Call, aten, equal_size, equal_sizes, is_call, tensor_of
from fuseplan.graph.ops import DialectOp, Sample, define, random_tensor
from fuseplan.rules.parts.base import Core, Reported, Stage
from fuseplan.rules.parts.halves import SPLITS, half_of
from fuseplan.rules.parts.traffic import Kernel, Middle

NAMES = ("linear", "linear_pair", "linear_triple")
"""Names of the ops of one, two and three layers."""
MOST_TOGETHER = len(NAMES)
LEAST_ROWS = 16
"""Rows that a tensor core multiplies at once."""
MOST_SHARED_FEATURES = 4224
"""The most features of layers whose width is split: tiles of 64 for half of a device's 132 processors."""


def parameters_of(count: int) -> str:
    """The arguments of this many layers, in the syntax of a schema."""
    weights = [f"Tensor weight{index}" for index in range(count)]
    biases = [f"Tensor? bias{index}" for index in range(count)]
    return ", ".join(("Tensor x", *weights, *biases))


def linears_reference(*arguments: Any) -> Any:
    """y_i = torch.nn.functional.linear(x, weight_i, bias_i)

    Args:
        arguments: x [..., width], then the weights [features_i, width], x's dtype, then a bias [features_i] or None for
            each weight.

    Returns:
        [..., features_i] of each layer in x's dtype; for a single layer not in a tuple.
    """
    x, weights, biases = split_arguments(arguments)
    found = tuple(torch.nn.functional.linear(x, *each) for each in zip(weights, biases, strict=True))
    return found if len(found) > 1 else found[0]


def linears_fake(*arguments: Any) -> Any:
    """Shapes and dtypes of `linears_reference`."""
    x, weights, _ = split_arguments(arguments)
    found = tuple(x.new_empty((*x.shape[:-1], weight.shape[0])) for weight in weights)
    return found if len(found) > 1 else found[0]


def split_arguments(arguments: Sequence[Any]) -> tuple[Any, Sequence[Any], Sequence[Any]]:
    """(x, weights, biases) of an op's arguments."""
    x, *rest = arguments
    count = len(rest) // 2
    return x, rest[:count], rest[count:]


def draw_weight(shape: tuple[int, ...], device: torch.device, generator: torch.Generator) -> Tensor:
    """Normal values whose products with normal rows have a variance of 1."""
    return torch.randn(shape, device=device, generator=generator) / math.sqrt(shape[-1])


def samples_of(count: int) -> list[Sample]:
    """Samples of this many layers."""
    return [
        _sample((1, 96), (64, 32, 16)[:count], torch.bfloat16, biased=False),
        _sample((2, 5, 160), (48, 80, 33)[:count], torch.float16, biased=True),
        _sample((17, 64), (40, 40, 8)[:count], torch.bfloat16, biased=count > 1),
    ]


def _sample(shape: tuple[int, ...], features: tuple[int, ...], dtype: torch.dtype, *, biased: bool) -> Sample:
    def make(device: torch.device, generator: torch.Generator) -> tuple[Any, ...]:
        x = random_tensor(shape, dtype, device, generator)
        weights = [draw_weight((each, shape[-1]), torch.device("cpu"), generator) for each in features]
        biases = [random_tensor((each,), dtype, device, generator) if biased else None for each in features]
        return x, *(each.to(device=device, dtype=dtype) for each in weights), *biases

    name = f"{'x'.join(map(str, shape))}-{'-'.join(map(str, features))}-{str(dtype).removeprefix('torch.')}"
    return Sample(name=name + "-biased" * biased, make=make)


def weight_draws(count: int) -> dict[str, Any]:
    """How to draw the weights of this many layers."""
    return {f"weight{index}": draw_weight for index in range(count)}


def _define(count: int) -> DialectOp:
    results = "Tensor" if count == 1 else f"({', '.join(['Tensor'] * count)})"
    return define(
        NAMES[count - 1],
        f"({parameters_of(count)}) -> {results}",
        reference=linears_reference,
        fake=linears_fake,
        samples=samples_of(count),
        draws=weight_draws(count),
    )


LINEARS = tuple(_define(count) for count in range(1, MOST_TOGETHER + 1))
"""The ops of one, two and three layers."""


def halves_reference(y: Tensor) -> tuple[Tensor, Tensor]:
    """first, second = y.chunk(2, dim=-1)

    Args:
        y: [..., 2 * features], a layer's result.

    Returns:
        The halves of its last dimension, [..., features] in y's dtype, contiguous.
    """
    first, second = (each.clone(memory_format=torch.contiguous_format) for each in y.chunk(2, dim=-1))
    return first, second


def halves_fake(y: Tensor) -> tuple[Tensor, Tensor]:
    """Shapes and dtypes of `halves_reference`."""
    first, second = (y.new_empty((*y.shape[:-1], y.shape[-1] // 2)) for _ in range(2))
    return first, second


def _halves_sample(shape: tuple[int, ...], dtype: torch.dtype) -> Sample:
    name = f"{'x'.join(map(str, shape))}-{str(dtype).removeprefix('torch.')}"
    return Sample(name=name, make=lambda device, generator: (random_tensor(shape, dtype, device, generator),))


HALVES = define(
    "linear_halves",
    "(Tensor y) -> (Tensor, Tensor)",
    reference=halves_reference,
    fake=halves_fake,
    samples=[_halves_sample((3, 64), torch.bfloat16), _halves_sample((2, 5, 96), torch.float16)],
)
"""The results of a layer that a model merged itself: gate and up."""


# How graphs spell them.


@dataclass(frozen=True, kw_only=True)
class _Layer:
    """One layer: `reshape(mm(reshape(x), permute(weight)))`, the reshapes absent where x has two dimensions.

    Attributes:
        rows: the left operand of the product.
        weight: [features, width], an input of the graph.
        bias: [features], an input of the graph, or None.
        product: the product.
        source: the operand of the reshape that yields `rows`; without one, `rows`.
        result: the reshape of the product back to the source's dimensions; None: there is none, or the product has
            other readers.
    """

    rows: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    product: fx.Node
    source: fx.Node
    result: fx.Node | None


def raise_linears(canonical: CanonicalGraph) -> None:
    """Raises products with weights, up to three that read the same rows as one op."""
    groups: dict[tuple[fx.Node, int], list[Call]] = {}
    for node in canonical.calls(aten.mm.default, aten.addmm.default):
        layer = _read(node)
        if layer is not None:
            groups.setdefault((layer.source, canonical.region[node]), []).append(node)
    for products in groups.values():
        for few in shared_out(products):
            # Read again: the group's inputs may have been results of a group raised before.
            _raise(canonical, [layer for product in few if (layer := _read(product)) is not None])
    for call in canonical.calls(LINEARS[0].overload):
        _raise_halves(canonical, call)


def _raise_halves(canonical: CanonicalGraph, layer: Call) -> None:
    """Raises both halves of a layer's result, where nothing else reads it."""
    readers = [part for user in layer.users for part in (user.users if is_call(user, *SPLITS) else (user,))]
    halves = {half.index: reader for reader in readers if (half := half_of(reader)) and not half.interleaved}
    if len(readers) == 2 and halves.keys() == {0, 1}:
        canonical.raise_op(HALVES, (layer,), [halves[0], halves[1]])


def _read(node: Call) -> _Layer | None:
    if not node.users or node.kwargs:
        return None
    bias, rows, transposed = (None, *node.args) if is_call(node, aten.mm.default) else node.args
    if not is_call(transposed, aten.permute.default) or list(transposed.args[1]) != [1, 0]:
        return None
    weight = transposed.args[0]
    if not is_input(weight) or not _fits(weight, bias):
        return None
    assert isinstance(rows, fx.Node) and isinstance(weight, fx.Node) and isinstance(bias, fx.Node | None)
    source, result = rows, None
    if is_call(rows, *RESHAPES) and _ends_alike(rows.args[0], rows):
        source, result = rows.args[0], _undone(node, rows.args[0])
    return _Layer(rows=rows, weight=weight, bias=bias, product=node, source=source, result=result)


def is_input(node: object) -> bool:
    """Whether a value exists before the graph runs, so that it depends on no layer's result."""
    return isinstance(node, fx.Node) and node.op in ("placeholder", "get_attr")


def _fits(weight: object, bias: object) -> bool:
    """Whether a weight is floating point, and its bias, if any, has one element for each of its rows."""
    value, added = tensor_of(weight), tensor_of(bias)
    if value is None or not value.dtype.is_floating_point or any(equal_size(size, 0) for size in value.shape):
        return False
    if bias is None:
        return True
    return is_input(bias) and added is not None and equal_sizes(added.shape, value.shape[:1])


def _ends_alike(source: object, rows: fx.Node) -> bool:
    before, after = tensor_of(source), tensor_of(rows)
    if before is None or after is None or not before.dim():
        return False
    return equal_size(before.shape[-1], after.shape[-1])


def _undone(product: fx.Node, source: fx.Node) -> fx.Node | None:
    """The only reader of a product, if it is a reshape to the leading dimensions of the source."""
    reader = next(iter(product.users)) if len(product.users) == 1 else None
    if not is_call(reader, *RESHAPES):
        return None
    before, after, value = tensor_of(source), tensor_of(reader), tensor_of(product)
    if before is None or after is None or value is None:
        return None
    wanted = (*before.shape[:-1], value.shape[-1])
    return reader if equal_sizes(wanted, after.shape) else None


def shared_out(products: Sequence[Call]) -> Iterable[Sequence[Call]]:
    """Products in groups of up to three; four are split in two and two."""
    while products:
        count = 2 if len(products) == MOST_TOGETHER + 1 else min(MOST_TOGETHER, len(products))
        yield products[:count]
        products = products[count:]


def _raise(canonical: CanonicalGraph, layers: Sequence[_Layer]) -> None:
    results = [layer.result for layer in layers]
    first = layers[0]
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    op = LINEARS[len(layers) - 1]
    if all(result is not None for result in results):
        canonical.raise_op(op, (first.source, *weights, *biases), results)
    else:
        canonical.raise_op(op, (first.rows, *weights, *biases), [layer.product for layer in layers])


# Prices.


@dataclass(frozen=True, kw_only=True)
class LinearRegion:
    """Layers that read the same rows, at one size.

    Attributes:
        rows: rows of the input.
        width: elements of a row.
        features: features of each layer's result.
        itemsize: bytes of an element.
    """

    rows: int
    width: int
    features: tuple[int, ...]
    itemsize: int


def library_kernels(hardware: Hardware, region: LinearRegion) -> tuple[Kernel, ...]:
    """A product by torch for each layer: latency + max(bytes / bandwidth, operations / rate)."""
    return tuple(
        _kernel(hardware, region, (each,), "linear", hardware.linear.library.value) for each in region.features
    )


def skinny_kernel(hardware: Hardware, region: LinearRegion, *, shares_width: bool = False) -> Kernel:
    """One kernel for all layers, which reads the weights at the memory bandwidth that its programs can use.

    Args:
        hardware: the device.
        region: the layers.
        shares_width: whether several programs share the width where there are few tiles of features.
    """
    slowdown = 1.0
    if not shares_width and sum(region.features) <= MOST_SHARED_FEATURES:
        slowdown = (hardware.linear.idle if region.rows > LEAST_ROWS else hardware.linear.idle_few).value
    return _kernel(hardware, region, region.features, "skinny linear", hardware.linear.skinny.value, slowdown)


def _kernel(
    hardware: Hardware, region: LinearRegion, features: Sequence[int], name: str, latency: float, slowdown: float = 1.0
) -> Kernel:  # fmt: skip
    elements = region.rows * region.width + sum(features) * (region.width + region.rows)
    operations = 2.0 * region.rows * region.width * sum(features)
    # Weights don't stay in the L2 cache: a model reads all the others before it reads them again.
    memory = slowdown * elements * region.itemsize / hardware.memory_bandwidth.value
    return Kernel(
        name=name, launch=round(latency), memory=round(max(memory, operations / hardware.attention.rate.value)),
        kind="linear" if name == "linear" else "skinny",
    )  # fmt: skip


PART = Core(
    name="linear",
    ops=(*LINEARS, HALVES),
    raising=((Stage.LINEARS, raise_linears),),
    reported=Reported.NEVER,
    traffic=Middle(name="linear"),
    opt_in=True,
    several=LINEARS[1:],
)
