"""Linear layers of few rows in one kernel: several layers that read one input, gate and up with SiLU-and-mul, and a
single layer.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor, fx

from fuseplan.devices.hardware import Hardware
from fuseplan.graph.canonical import CanonicalGraph
from fuseplan.graph.canonical.view import is_dialect
from fuseplan.graph.facts import dtype_text, hint, item, tensor_of
from fuseplan.graph.ops import ActivationRounding, Sample, define
from fuseplan.rules.base import DefaultOn, Rule
from fuseplan.rules.families.compose import fused_as
from fuseplan.rules.families.sites import Pricer, Shape, Site, Taken
from fuseplan.rules.parts import Core
from fuseplan.rules.parts.linear import (
    HALVES,
    LINEARS,
    PART,
    LinearRegion,
    halves_reference,
    library_kernels,
    linears_fake,
    linears_reference,
    parameters_of,
    samples_of,
    skinny_kernel,
    split_arguments,
    weight_draws,
)
from fuseplan.rules.parts.rms_norm import fused_add_rms_norm
from fuseplan.rules.parts.silu_and_mul import silu_and_mul
from fuseplan.rules.parts.traffic import Kernel, Region, Tail


def gated_reference(*arguments: Any) -> Any:
    """y = silu(linear(x, weight0, bias0)) * linear(x, weight1, bias1), each as its own reference computes it.

    Args:
        arguments: x [..., width], the weights of gate and up [intermediate, width], their biases [intermediate] or
            None, and one of `ActivationRounding`.

    Returns:
        [..., intermediate] in x's dtype.

    Raises:
        ValueError: the last argument isn't one of `ActivationRounding`.
    """
    *layers, rounding = arguments
    return silu_and_mul.reference(*linears_reference(*layers), rounding)


def gated_fake(*arguments: Any) -> Any:
    """Shape and dtype of `gated_reference`."""
    return linears_fake(*arguments[:-1])[0]


_ROUNDINGS = (ActivationRounding.LLAMA, ActivationRounding.FP32, ActivationRounding.LLAMA)


def _activated(count: int, arguments: Callable[..., tuple[Any, ...]] = lambda *given: given) -> list[Sample]:
    """Samples of this many layers with an activation behind them.

    Args:
        count: number of layers.
        arguments: makes the fused op's arguments, without its rounding, from those of the layers.
    """

    def sample(layers: Sample, rounding: ActivationRounding) -> Sample:
        def make(device: Any, generator: Any) -> tuple[Any, ...]:
            return *arguments(*layers.make(device, generator)), rounding.value

        return Sample(name=f"{layers.name}-{rounding}", make=make)

    return [sample(each, rounding) for each, rounding in zip(samples_of(count), _ROUNDINGS, strict=True)]


def _alike(x: Tensor, gate: Tensor, _: Tensor, bias: Tensor | None, __: Tensor | None) -> tuple[Any, ...]:
    """Gate and up of one size."""
    biases = (None, None) if bias is None else (bias, bias.roll(1))
    return x, gate, gate.roll(1, dims=0), *biases


LINEAR_FAMILY = tuple(
    fused_as(op, f"merged_{op.name}" if index else "skinny_linear") for index, op in enumerate(LINEARS)
)
"""The fused ops of one, two and three layers."""

GATED = define(
    "merged_linear_silu_and_mul",
    f"({parameters_of(2)}, str rounding) -> Tensor",
    reference=gated_reference,
    fake=gated_fake,
    samples=_activated(2, _alike),
    fused=True,
    draws=weight_draws(2),
)


def halved_reference(x: Tensor, weight0: Tensor, bias0: Tensor | None, rounding: str) -> Tensor:
    """gate, up = torch.nn.functional.linear(x, weight0, bias0).chunk(2, dim=-1);  y = silu(gate) * up

    Args:
        x: [..., width].
        weight0: [2 * intermediate, width], x's dtype: gate's rows, then up's.
        bias0: [2 * intermediate], or None.
        rounding: one of `ActivationRounding`.

    Returns:
        [..., intermediate] in x's dtype.

    Raises:
        ValueError: `rounding` isn't one of `ActivationRounding`.
    """
    y: Tensor = silu_and_mul.reference(*halves_reference(linears_reference(x, weight0, bias0)), rounding)
    return y


def halved_fake(x: Tensor, weight0: Tensor, bias0: Tensor | None, rounding: str) -> Tensor:
    """Shape and dtype of `halved_reference`."""
    return x.new_empty((*x.shape[:-1], weight0.shape[0] // 2))


HALVED = define(
    "linear_silu_and_mul",
    f"({parameters_of(1)}, str rounding) -> Tensor",
    reference=halved_reference,
    fake=halved_fake,
    samples=_activated(1),
    fused=True,
    draws=weight_draws(1),
)


DEFAULT_ON = DefaultOn(most_tokens=32, devices=("gh200", "h100", "h200"))
"""Measured on an H200, `benchmarks/results/decode_one_gpu_h200.json`; the other devices have the same chip, and none of
920 random models gave different numbers.
"""


class Linears(Rule):
    """linear(x, weight0), linear(x, weight1), ...  =>  one op."""

    def __init__(self, count: int) -> None:
        self.count, self.op, self.core = count, LINEAR_FAMILY[count - 1], LINEARS[count - 1]
        self.name = "skinny_linear" if count == 1 else "merged_linear"
        self.opt_in = f"fuse_{self.name}"
        self.flags = (self.opt_in,)

    default_on = DEFAULT_ON

    def pattern(self, **bound: Any) -> Any:
        """The layers."""
        found = self.core(*bound.values())
        return tuple(found[index] for index in range(self.count)) if self.count > 1 else (found,)


class GatedLinears(Rule):
    """linear(x, weight0), linear(x, weight1) -> silu_and_mul  =>  one op.

    y = silu(x @ weight0^T) * (x @ weight1^T), with the weights swapped where a graph has up before gate

    Args:
        up_first: whether the graph has up before gate.
    """

    def __init__(self, *, up_first: bool) -> None:
        self.up_first = up_first

    name, flags = "merged_linear_silu_mul", ("fuse_merged_linear",)
    opt_in, default_on = "fuse_merged_linear", DEFAULT_ON
    op, core = GATED, LINEARS[1]

    def pattern(self, **bound: Any) -> Any:
        """The layers and the activation of their results."""
        *layers, rounding = bound.values()
        found = self.core(*layers)
        gate, up = (1, 0) if self.up_first else (0, 1)
        return (silu_and_mul(found[gate], found[up], rounding),)

    def replacement(self, **bound: Any) -> Any:
        """The fused op."""
        *layers, rounding = bound.values()
        x, weights, biases = split_arguments(layers)
        step = -1 if self.up_first else 1
        return (self.op(x, *weights[::step], *biases[::step], rounding),)

    def describe(self) -> str:
        """The pattern and the fused op on one line."""
        return super().describe() + ", up before gate" * self.up_first


class HalvedLinear(Rule):
    """linear(x, weight0) -> halves -> silu_and_mul  =>  one op.

    gate, up = (x @ weight0^T).chunk(2, dim=-1);  y = silu(gate) * up, as vLLM and models such as Phi-3 merge weights
    """

    name, flags = "merged_linear_silu_mul", ("fuse_merged_linear",)
    opt_in, default_on = "fuse_merged_linear", DEFAULT_ON
    op, core = HALVED, LINEARS[0]

    def pattern(self, x: Any, weight0: Any, bias0: Any, rounding: Any) -> Any:
        """The layer and the activation of its result's halves."""
        found = HALVES(LINEARS[0](x, weight0, bias0))
        return (silu_and_mul(found[0], found[1], rounding),)


@dataclass(frozen=True, kw_only=True)
class Activation(Tail):
    """SiLU-and-mul behind gate and up."""

    name = "silu_and_mul"

    def result_bytes(self, region: Region) -> int:
        """Bytes of one activation of gate's size."""
        return region.row_bytes


@dataclass(frozen=True, kw_only=True)
class Parts(Tail):
    """A layer's result in parts: a norm behind a layer of few features allows several programs to share its width."""

    name = "parts"


@dataclass(frozen=True, kw_only=True)
class LinearShape(Shape):
    """Everything about a group of layers that prices depend on, at one size.

    Attributes:
        sizes: the sizes of the layers.
    """

    sizes: LinearRegion

    @property
    def signature(self) -> str:
        """The site without its rows, e.g. `linear 4096 -> 14336+14336 -> silu_and_mul bfloat16`."""
        features = "+".join(map(str, self.sizes.features))
        return f"linear {self.width} -> {features}{' -> silu_and_mul' * bool(self.tails)} {self.convention}"

    def unfused(self, model: Pricer) -> tuple[Kernel, ...]:
        """The kernels of the unfused site."""
        return (*library_kernels(model.hardware, self.sizes), *self._activation(model.hardware))

    def fused(self, model: Pricer, provider: str, *, reduce: bool, tail: Tail | None) -> tuple[Kernel, ...]:
        """The fused op alone; the reference is the unfused layers behind an opaque op."""
        if model.timing(provider).eager:
            own = (*library_kernels(model.hardware, self.sizes),)
            opaque = Kernel(name="opaque op", launch=round(model.hardware.launch.value))
            return (*own, *(self._activation(model.hardware) if tail else ()), opaque)
        if isinstance(tail, Parts):
            # The norm that sums the parts is a separate kernel.
            behind = Kernel(name="launch of the norm", launch=round(model.hardware.launch.value))
            return (skinny_kernel(model.hardware, self.sizes, shares_width=True), behind)
        return (skinny_kernel(model.hardware, self.sizes),)

    def rest(self, model: Pricer, *, reduce: bool, tail: Tail | None) -> tuple[Kernel, ...]:
        """The unfused rest of the site behind a fused op: the activation, unless the op takes it."""
        return () if tail is not None else self._activation(model.hardware)

    def _activation(self, hardware: Hardware) -> tuple[Kernel, ...]:
        if not self.tails:
            return ()
        nbytes = 3 * self.rows * (sum(self.sizes.features) // 2) * self.itemsize
        kernel = Kernel(
            name="silu_and_mul", launch=round(hardware.launch.value), memory=round(hardware.memory_ns(nbytes))
        )
        return (kernel,)


@dataclass(frozen=True, eq=False)
class LinearSite(Site):
    """A group of layers that read one input; the activation of two of them is its tail."""

    @classmethod
    def at(cls, ordinal: int, core: fx.Node, canonical: CanonicalGraph) -> Self:
        """The site of a group of layers in a graph."""
        activation = _activation_of(core)
        return cls(ordinal, core, None, () if activation is None else (activation,))

    def shape(self, rows: int) -> LinearShape:
        """The site at a number of rows."""
        x, weights, _ = split_arguments(self.core.args)
        value, found = tensor_of(x), [tensor_of(weight) for weight in weights]
        assert value is not None
        width = hint(value.shape[-1])
        sizes = LinearRegion(
            rows=rows, width=width, itemsize=value.dtype.itemsize,
            features=tuple(hint(weight.shape[0]) for weight in found if weight is not None),
        )  # fmt: skip
        return LinearShape(
            core=PART.traffic, rows=rows, width=width, itemsize=value.dtype.itemsize,
            tails=tuple(self.tail(node) for node in self.tails), convention=dtype_text(value.dtype), sizes=sizes,
        )  # fmt: skip

    def taken(self, nodes: Collection[fx.Node]) -> Taken | None:
        """The parts that a fusion takes if it consumes `nodes`; None if they include more than the site and the
        residual add and norm behind a single layer.
        """
        nodes = [node for node in nodes if not is_dialect(node, HALVES)]
        norms = [node for node in nodes if is_dialect(node, fused_add_rms_norm)]
        if len(norms) != 1 or super().taken([*{*nodes} - {*norms}]) is None:
            return super().taken(nodes)
        return Taken(reduce=False, tail=Parts(), also=((norms[0], Taken(reduce=False, tail=None)),))

    def tail(self, node: fx.Node) -> Tail:
        """The activation in the site's shape."""
        return Activation()


def _activation_of(core: fx.Node) -> fx.Node | None:
    """The SiLU-and-mul that is the only reader of two layers' results, or of the halves of one layer's."""
    reader = _reader(core) if is_dialect(core, LINEARS[0]) else core
    if reader is None or not is_dialect(reader, LINEARS[1], HALVES):
        return None
    activation = _reader(*(found for index in range(2) if (found := item(reader, index)) is not None))
    return activation if activation is not None and is_dialect(activation, silu_and_mul) else None


def _reader(*values: fx.Node) -> fx.Node | None:
    """The only reader of all values, if there is just one."""
    readers = {reader for value in values for reader in value.users}
    return next(iter(readers)) if len(readers) == 1 else None


LINEAR_RULES: tuple[Rule, ...] = (
    *(Linears(count) for count in range(1, len(LINEARS) + 1)),
    *(GatedLinears(up_first=up_first) for up_first in (False, True)),
    HalvedLinear(),
)
LINEAR_SITES: Mapping[Core, type[Site]] = {PART: LinearSite}
