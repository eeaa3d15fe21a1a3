"""What a fused op's epilogue is given beside the rows: its own arguments by suffix, in the op's order."""

from typing import Any

import torch

_FN = torch.float8_e4m3fn
_ROW = {"dtype": _FN, "min_scale": 1e-6, "max_scale": 0.0, "zero_scale": 0.0, "scale_ub": None}
OWN: dict[str, dict[str, Any]] = {
    "pad": {"right": 16},
    "static_fp8_quant": {"scale": torch.tensor([0.02]), "dtype": _FN, "quant_rounding": "divide"},
    "dynamic_fp8_quant": {**_ROW, "quant_rounding": "multiply"},
    "group_fp8_quant": {
        "group_size": 64, "dtype": _FN, "min_scale": 1e-10, "max_scale": 0.0, "ue8m0": False, "min_power": 0.0,
        "zero_scale": 0.0, "scale_ub": None, "quant_rounding": "divide", "layout": "rows",
    },
    "mx_fp8_quant": {"group_size": 32, "dtype": _FN, "scaling": "rceil", "layout": "swizzled"},
    "mx_fp4_quant": {"group_size": 32, "scaling": "even", "layout": "rows"},
    "nv_fp4_quant": {"group_size": 16, "global_scale": None, "min_scale": 2.0**-6, "layout": "swizzled"},
}  # fmt: skip


def own(suffix: str | None, **changed: Any) -> dict[str, Any]:
    """Those of a suffix; none of None."""
    given = {} if suffix is None else OWN[suffix]
    assert changed.keys() <= given.keys()
    return {**given, **changed}
