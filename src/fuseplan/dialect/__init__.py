"""The ops that rules are written in, all of them: those of the parts, and the fused ones.

Importing this package registers them with torch as `torch.ops.fuseplan.*`.
"""

from fuseplan.graph.ops import (
    PACKED,
    TILE_GROUPS,
    ActivationRounding,
    AttentionRounding,
    Decoded,
    Dialect,
    DialectOp,
    Draw,
    Indices,
    MxScaling,
    QuantRounding,
    RotaryRounding,
    Rounding,
    Sample,
    ScaleLayout,
    define,
    draw_activations,
    draw_near_one,
    draw_positive,
    empty_scales,
    facts_of,
    falls_back,
    implement,
    is_inlined,
    kernel_of,
    ops,
    registered_kernel,
)
from fuseplan.rules.families import (
    ACTIVATION_FAMILY,
    KEPT_ACTIVATION_FAMILY,
    KEPT_NORM_FAMILY,
    LINEAR_FAMILY,
    NORM_FAMILY,
    SCALED_LINEAR_FAMILY,
)
from fuseplan.rules.parts.attention import KERNELS as ATTENTION_KERNELS
from fuseplan.rules.parts.fp8 import FP8_DTYPES
from fuseplan.rules.parts.linear import split_arguments
from fuseplan.rules.parts.mx_fp8 import FORMATS as MX_FP8_FORMATS
from fuseplan.rules.parts.scaled_linear import Layers as ScaledLayers

__all__ = [
    "ACTIVATION_FAMILY",
    "ATTENTION_KERNELS",
    "FP8_DTYPES",
    "KEPT_ACTIVATION_FAMILY",
    "KEPT_NORM_FAMILY",
    "LINEAR_FAMILY",
    "MX_FP8_FORMATS",
    "NORM_FAMILY",
    "PACKED",
    "SCALED_LINEAR_FAMILY",
    "TILE_GROUPS",
    "ActivationRounding",
    "AttentionRounding",
    "Decoded",
    "Dialect",
    "DialectOp",
    "Draw",
    "Indices",
    "MxScaling",
    "QuantRounding",
    "RotaryRounding",
    "Rounding",
    "Sample",
    "ScaleLayout",
    "ScaledLayers",
    "define",
    "draw_activations",
    "draw_near_one",
    "draw_positive",
    "empty_scales",
    "facts_of",
    "falls_back",
    "implement",
    "is_inlined",
    "kernel_of",
    "ops",
    "registered_kernel",
    "split_arguments",
]
