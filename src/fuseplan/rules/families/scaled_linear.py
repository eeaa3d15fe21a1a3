"""Linear layers of few rows in fp8 with row-wise scales in one kernel: several that read one input, or a single one."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from torch import fx

from fuseplan.graph.canonical import CanonicalGraph
from fuseplan.graph.facts import dtype_text, hint, tensor_of
from fuseplan.rules.base import Rule
from fuseplan.rules.families.compose import fused_as
from fuseplan.rules.families.linear import DEFAULT_ON, Linears, LinearShape
from fuseplan.rules.families.sites import Pricer, Site
from fuseplan.rules.parts.base import Core
from fuseplan.rules.parts.linear import LinearRegion
from fuseplan.rules.parts.scaled_linear import (
    PART,
    SCALED_LINEARS,
    Layers,
    library_kernels,
    reference_kernels,
    skinny_kernel,
)
from fuseplan.rules.parts.traffic import Kernel, Tail

SCALED_LINEAR_FAMILY = tuple(
    fused_as(op, f"{'merged' if index else 'skinny'}_{op.name}") for index, op in enumerate(SCALED_LINEARS)
)
"""The fused ops of one, two and three layers."""


class ScaledLinears(Linears):
    """scaled_linear(x, x_scale, weight0, weight_scale0), ...  =>  one op."""

    opt_in, default_on = "fuse_scaled_linear", DEFAULT_ON
    flags = (opt_in,)

    def __init__(self, count: int) -> None:
        self.count, self.op, self.core = count, SCALED_LINEAR_FAMILY[count - 1], SCALED_LINEARS[count - 1]
        self.name = f"{'skinny' if count == 1 else 'merged'}_scaled_linear"


@dataclass(frozen=True, kw_only=True)
class ScaledLinearShape(LinearShape):
    """Everything about a group of fp8 layers that prices depend on, at one size."""

    @property
    def signature(self) -> str:
        """The site without its rows, e.g. `scaled linear 4096 -> 14336+14336 float8_e4m3fn`."""
        return f"scaled {super().signature}"

    def unfused(self, model: Pricer) -> tuple[Kernel, ...]:
        """The kernels of the unfused site."""
        return library_kernels(model.hardware, self.sizes)

    def fused(self, model: Pricer, provider: str, *, reduce: bool, tail: Tail | None) -> tuple[Kernel, ...]:
        """The fused op alone."""
        if model.timing(provider).eager:
            return reference_kernels(model.hardware, self.sizes)
        return (skinny_kernel(model.hardware, self.sizes),)


@dataclass(frozen=True, eq=False)
class ScaledLinearSite(Site):
    """A group of layers that read one input."""

    @classmethod
    def at(cls, ordinal: int, core: fx.Node, canonical: CanonicalGraph) -> Self:
        """The site of a group of layers in a graph."""
        return cls(ordinal, core, None, ())

    def shape(self, rows: int) -> ScaledLinearShape:
        """The site at a number of rows."""
        layers = Layers.of(self.core.args)
        value, found = tensor_of(layers.x), [tensor_of(weight) for weight in layers.weights]
        assert value is not None
        width = hint(value.shape[-1])
        features = tuple(hint(weight.shape[0]) for weight in found if weight is not None)
        sizes = LinearRegion(rows=rows, width=width, itemsize=value.dtype.itemsize, features=features)
        return ScaledLinearShape(
            core=PART.traffic, rows=rows, width=width, itemsize=value.dtype.itemsize,
            convention=dtype_text(value.dtype), sizes=sizes,
        )  # fmt: skip


SCALED_LINEAR_RULES: tuple[Rule, ...] = tuple(ScaledLinears(count) for count in range(1, len(SCALED_LINEARS) + 1))
SCALED_LINEAR_SITES: Mapping[Core, type[Site]] = {PART: ScaledLinearSite}
