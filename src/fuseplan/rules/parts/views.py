"""Groups of aten ops that other ops may be moved across."""

from fuseplan.graph.facts import MULS, RESHAPES, aten

MOVERS = (
    *RESHAPES,
    aten.slice.Tensor,
    aten.permute.default,
    aten.expand.default,
    aten.select.int,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.as_strided.default,
    aten.split_with_sizes.default,
    aten.split.Tensor,
)
"""Views: they select and rearrange elements."""

SCALES = (*MULS, aten.div.Tensor, aten.div.Scalar, aten.neg.default)
"""Ops that are linear in their first operand, where the second is the same on all ranks."""
