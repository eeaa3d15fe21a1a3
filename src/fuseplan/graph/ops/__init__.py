"""The record of a dialect op: schema, fake, reference, tolerance, sample inputs, and where it rounds.

`ops` has those that parts and families have added; importing `fuseplan.dialect` adds all of them.
"""

from fuseplan.graph.ops.fakes import empty
from fuseplan.graph.ops.registry import (
    Decoded,
    Dialect,
    DialectOp,
    Draw,
    Indices,
    Sample,
    define,
    draw_activations,
    draw_near_one,
    draw_positive,
    facts_of,
    falls_back,
    implement,
    is_inlined,
    kernel_of,
    ops,
    registered_kernel,
)
from fuseplan.graph.ops.rounding import (
    ActivationRounding,
    AttentionRounding,
    MxScaling,
    QuantRounding,
    RotaryRounding,
    Rounding,
)
from fuseplan.graph.ops.samples import compute_dtype, random_tensor
from fuseplan.graph.ops.scale_layout import (
    ALIGNED_ROWS,
    PACKED,
    SWIZZLED_ROWS,
    TILE_GROUPS,
    TILE_ROWS,
    ScaleLayout,
    empty_scales,
    in_rows,
    lay_out,
)
