"""The ops that rules are written in: schema, fake, reference, tolerance, sample inputs, a file per family.

Importing this package registers them with torch as `torch.ops.fuseplan.*`.
"""

from fuseplan.dialect import activation, attention, collective, layout, norm, quant, rotary
from fuseplan.dialect.attention import KERNELS as ATTENTION_KERNELS
from fuseplan.dialect.fused import (
    ACTIVATION_FAMILY,
    DYNAMIC_FP8_QUANT,
    NORM_FAMILY,
    PAD,
    STATIC_FP8_QUANT,
    Epilogue,
)
from fuseplan.dialect.quant import FP8_DTYPES
from fuseplan.dialect.registry import (
    Dialect,
    DialectOp,
    Draw,
    Sample,
    define,
    draw_activations,
    draw_near_one,
    draw_positive,
    facts_of,
    implement,
    is_inlined,
    kernel_of,
    registered_kernel,
)
from fuseplan.dialect.rounding import ActivationRounding, QuantRounding, RotaryRounding, Rounding

ops = Dialect(
    [
        activation.silu_and_mul,
        attention.attention,
        attention.grouped_attention,
        attention.repeat_heads,
        collective.all_reduce,
        layout.pad,
        norm.fused_add_rms_norm,
        norm.rms_norm,
        quant.dynamic_per_token_scaled_fp8_quant,
        quant.static_scaled_fp8_quant,
        rotary.qk_norm_rope,
        rotary.rotary_embedding,
        *NORM_FAMILY.values(),
        *ACTIVATION_FAMILY.values(),
    ]
)

__all__ = [
    "ACTIVATION_FAMILY",
    "ATTENTION_KERNELS",
    "DYNAMIC_FP8_QUANT",
    "FP8_DTYPES",
    "NORM_FAMILY",
    "PAD",
    "STATIC_FP8_QUANT",
    "ActivationRounding",
    "Dialect",
    "DialectOp",
    "Draw",
    "Epilogue",
    "QuantRounding",
    "RotaryRounding",
    "Rounding",
    "Sample",
    "define",
    "draw_activations",
    "draw_near_one",
    "draw_positive",
    "facts_of",
    "implement",
    "is_inlined",
    "kernel_of",
    "ops",
    "registered_kernel",
]
