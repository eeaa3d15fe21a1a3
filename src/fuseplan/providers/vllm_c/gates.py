"""The limits of vLLM's kernels."""

from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor

from fuseplan.dialect import QuantRounding, ScaleLayout
from fuseplan.graph.facts import dtype_text
from fuseplan.providers.gates import Gate, listed
from fuseplan.providers.vllm_c.halves import is_half
from fuseplan.record import Reason, Refusal
from fuseplan.rules import Bindings

MIN_SCALE: Final = 1 / (448 * 512)
"""`min_scaling_factor` of float8_e4m3fn, which is built into the kernels."""

GROUPS: Final = frozenset({64, 128})
LEAST_THREADS: Final = 256
"""The least threads of a block that normalises a row in groups; each group of the row has its own threads."""

LAYOUTS: Final = frozenset({ScaleLayout.ROWS.value, ScaleLayout.COLUMNS.value, ScaleLayout.ALIGNED.value})


@dataclass(frozen=True, kw_only=True)
class QuantGate(Gate):
    """A `Gate` with further limits that are built into the kernels.

    Attributes:
        groups: sizes of groups that share a scale; empty: no groups.
        layouts: supported layouts of the scales of groups.
        most_groups: the most groups of a row; None: any number.
    """

    groups: frozenset[int] = frozenset()
    layouts: frozenset[str] = frozenset()
    most_groups: int | None = None

    def __call__(self, m: Any) -> Refusal | None:
        """As `Gate.__call__`."""
        return super().__call__(m) or self._tensors(m) or self._groups(m)

    def limits(self) -> tuple[str, ...]:
        """As `Gate.limits`."""
        if not self.groups:
            return super().limits()
        sizes = f"groups of {listed(list(map(str, sorted(self.groups))))}"
        most = f", up to {self.most_groups} in a row" if self.most_groups is not None else ""
        return (*super().limits(), f"{sizes}{most}", f"scales in {listed(sorted(self.layouts))}")

    def _tensors(self, m: Any) -> Refusal | None:
        """The refusal of other tensors than x, which kernels read in fixed dtypes, or None."""
        fixed = {"weight": m.x.dtype, "residual": m.x.dtype, "scale": torch.float32, "scale_ub": torch.float32}
        for name, dtype in fixed.items():
            tensor = getattr(m, name) if m.values.get(name) is not None else None
            if tensor is not None and tensor.dtype is not dtype:
                detail = f"{self.name} takes the {name} in {dtype_text(dtype)}, not in {dtype_text(tensor.dtype)}"
                return Refusal(
                    reason=Reason.DTYPE, detail=detail, expected=f"the {name} in {dtype_text(dtype)}",
                    found=dtype_text(tensor.dtype),
                )  # fmt: skip
        return None

    def _groups(self, m: Any) -> Refusal | None:
        if not self.groups:
            return None
        size, layout, width = m.group_size, m.layout, m.x.shape[-1]
        wrong = {
            f"groups of {listed(list(map(str, sorted(self.groups))))}": f"groups of {size}" * (size not in self.groups),
            f"scales in {listed(sorted(self.layouts))}": f"scales in {layout}" * (layout not in self.layouts),
            "scales that aren't powers of two": "powers of two" * bool(m.ue8m0),
            f"up to {self.most_groups} groups": f"{width // size} groups"
            * (self.most_groups is not None and isinstance(width, int) and width // size > self.most_groups),
        }
        for expected, found in wrong.items():
            if found:
                detail = f"{self.name} takes {expected}, not {found}"
                return Refusal(reason=Reason.ATTRIBUTE, detail=detail, expected=expected, found=found)
        return None


@dataclass(frozen=True, kw_only=True)
class ActivationGate(QuantGate):
    """The gate of kernels that read gate and up as one tensor, with both as halves of its rows."""

    def __call__(self, m: Any) -> Refusal | None:
        """As `Gate.__call__`."""
        return super().__call__(Bindings(m.rule, {**m.values, "x": m.gate}))

    def limits(self) -> tuple[str, ...]:
        """As `Gate.limits`."""
        return (*super().limits(), "gate and up that are the halves of rows")

    def _layout(self, x: Tensor) -> Refusal | None:
        if is_half(x):
            return None
        detail = f"{self.name} reads gate and up as halves of rows; the strides of gate are {tuple(x.stride())}"
        return Refusal(
            reason=Reason.LAYOUT, detail=detail, expected="gate and up that are the halves of rows",
            found="another layout", fix="make gate and up of one product",
        )  # fmt: skip


_DTYPES, _CODES = frozenset({torch.float16, torch.bfloat16}), frozenset({torch.float8_e4m3fn})

STATIC = QuantGate(
    name="vLLM's norm with a given scale",
    source="vLLM 0.22 to 0.33, csrc/layernorm_quant_kernels.cu: weight and residual in the input's dtype",
    dtypes=_DTYPES, quant_rounding=QuantRounding.MULTIPLY, quant_dtypes=_CODES,
)  # fmt: skip
DYNAMIC = QuantGate(
    name="vLLM's norm with a scale a row",
    source="vLLM 0.22 to 0.33, csrc/quantization/fused_kernels/fused_layernorm_dynamic_per_token_quant.cu",
    dtypes=_DTYPES, quant_rounding=QuantRounding.DIVIDE, quant_dtypes=_CODES, min_scale=MIN_SCALE, bounds_largest=True,
)  # fmt: skip
GROUP = replace(
    DYNAMIC, name="vLLM's norm with a scale a group", groups=GROUPS, layouts=LAYOUTS,
    most_groups=LEAST_THREADS,
)  # fmt: skip
ACTIVATION_STATIC = ActivationGate(
    name="vLLM's SiLU-and-mul with a given scale",
    source="vLLM 0.22 to 0.33, csrc/quantization/activation_kernels.cu: one contiguous input",
    dtypes=_DTYPES, quant_rounding=QuantRounding.MULTIPLY, quant_dtypes=_CODES,
)  # fmt: skip
ACTIVATION_GROUP = ActivationGate(
    name="vLLM's SiLU-and-mul with a scale a group",
    source="vLLM 0.22 to 0.33, csrc/quantization/fused_kernels/fused_silu_mul_block_quant.cu: one contiguous input",
    dtypes=_DTYPES, quant_rounding=QuantRounding.DIVIDE, quant_dtypes=_CODES, min_scale=MIN_SCALE, groups=GROUPS,
    layouts=frozenset({ScaleLayout.ROWS.value}),
)  # fmt: skip
