"""Where a norm rounds. Real graphs differ, and a fusion may not move a rounding point silently.

`sum` is x + residual, `normed` is sum * rsqrt(mean(sum^2) + eps); all arithmetic is float32 (float64 on float64 inputs)
except where the table says "rounded", i.e. cast to the activation dtype.

====================  ===========  ========================  =================  ================================
convention            sum          normed before the weight  weight             seen in
====================  ===========  ========================  =================  ================================
`llama`               rounded      rounded                   in its own dtype   Hugging Face Llama, Qwen3
`gpt_oss`             rounded      not rounded               in float32         Hugging Face GPT-OSS, `rms_norm`
`gemma`               rounded      not rounded               1 + w, in float32  Hugging Face Gemma
`vllm`                not rounded  rounded                   in its own dtype   vLLM's RMSNorm
`vllm_fp32_residual`  not rounded  rounded                   in its own dtype   the same, compiled by torch 2.11
`fp32`                not rounded  not rounded               in float32         most hand-written kernels
====================  ===========  ========================  =================  ================================

residual_out is the sum rounded to the activation dtype. Under `vllm_fp32_residual` it stays float32, and the residual
may come in as float32: Inductor of torch 2.11 drops the cast of the residual to bf16 and back between two layers.
Without a residual `vllm` means `llama`, and `fp32` means `gpt_oss`: canonical graphs then use the latter names, so that
equal computations are spelled equally.
"""

from enum import StrEnum


class Rounding(StrEnum):
    """A convention of the table above. Liger Kernel's `casting_mode` names the first three the same way."""

    LLAMA = "llama"
    GPT_OSS = "gpt_oss"
    GEMMA = "gemma"
    VLLM = "vllm"
    VLLM_FP32_RESIDUAL = "vllm_fp32_residual"
    FP32 = "fp32"

    @property
    def rounds_sum(self) -> bool:
        """Whether x + residual is rounded before it is normalised."""
        return self in (Rounding.LLAMA, Rounding.GPT_OSS, Rounding.GEMMA)

    @property
    def rounds_residual(self) -> bool:
        """Whether the sum is rounded for the residual stream."""
        return self is not Rounding.VLLM_FP32_RESIDUAL

    @property
    def rounds_normed(self) -> bool:
        """Whether the normalised value is rounded before the weight is multiplied in."""
        return self in (Rounding.LLAMA, Rounding.VLLM, Rounding.VLLM_FP32_RESIDUAL)

    @property
    def adds_one(self) -> bool:
        """Whether the norm multiplies by 1 + weight."""
        return self is Rounding.GEMMA

    def differs_by_rounding(self, other: "Rounding") -> bool:
        """Whether two conventions have the same formula and result dtypes, and round in different places."""
        same_formula = self.adds_one is other.adds_one
        return self is not other and same_formula and self.rounds_residual is other.rounds_residual


class ActivationRounding(StrEnum):
    """Where SiLU-and-mul rounds: `llama` rounds silu(gate) to the activation dtype before the product, `fp32`
    doesn't.
    """

    LLAMA = "llama"
    FP32 = "fp32"


class RotaryRounding(StrEnum):
    """Where a rotary embedding rounds x * cos + turned * sin: `products` rounds both products to the activation dtype,
    then their sum; `fp32` the sum alone.
    """

    PRODUCTS = "products"
    FP32 = "fp32"


class AttentionRounding(StrEnum):
    """Where attention rounds that a model spells out: `eager` rounds scores after every op on them, and their softmax,
    to the dtype of the queries; `float32` neither. A kernel that computes `float32` may round the exponentials that it
    multiplies values by, as SDPA's kernels do.
    """

    EAGER = "eager"
    FLOAT32 = "float32"


class QuantRounding(StrEnum):
    """How a scale is applied: `divide` computes x / scale; `multiply` takes the reciprocal of the scale and multiplies;
    `divide_by_rounded` is `divide` where a scale that is computed from x was rounded to x's precision first, as torchao
    does it; `divide_rounded` is the same, and x / scale is rounded to x's precision, too, as compressed-tensors does:
    its scales are in x's dtype.

    The first two differ in the last place of float32, which can move an fp8 code by one.
    """

    DIVIDE = "divide"
    MULTIPLY = "multiply"
    DIVIDE_BY_ROUNDED = "divide_by_rounded"
    DIVIDE_ROUNDED = "divide_rounded"

    @property
    def rounds_scale(self) -> bool:
        """Whether the quotient of amax and the largest code is rounded to x's precision."""
        return self in (QuantRounding.DIVIDE_BY_ROUNDED, QuantRounding.DIVIDE_ROUNDED)

    @property
    def rounds_scaled(self) -> bool:
        """Whether x / scale is rounded to x's precision before it is clamped, and the scale in x's dtype."""
        return self is QuantRounding.DIVIDE_ROUNDED

    @property
    def multiplies(self) -> bool:
        """Whether x is multiplied by the reciprocal of the scale."""
        return self is QuantRounding.MULTIPLY

    @property
    def text(self) -> str:
        """The convention in words, with a kernel or a graph as the subject."""
        return {
            "divide": "divides by the scale",
            "multiply": "multiplies by the reciprocal of the scale",
            "divide_by_rounded": "divides by the scale, rounded to the precision of what it scales",
            "divide_rounded": "divides by the scale, and rounds both to the precision of what it scales",
        }[self]


class MxScaling(StrEnum):
    """Which power of two scales a group of a microscaled format, as torchao names it: the largest element's power of
    two over the largest code's, rounded down (`floor`), up (`ceil`) or, with as many digits as codes have, to the
    nearest (`even`); or the quotient of the largest element and the largest code, rounded up (`rceil`).
    """

    FLOOR = "floor"
    CEIL = "ceil"
    EVEN = "even"
    RCEIL = "rceil"
