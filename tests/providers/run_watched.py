"""Compiles kernels on a machine without a GPU while somebody watches, as Triton 3.6 lets them.

Prints the names of the kernels that they saw.
"""

import json
from typing import Any

import torch
import triton
from triton.runtime import jit

triton.__version__ = "3.6.0"


def as_before(name: str, signature: Any, constants: dict[Any, Any], *further: Any) -> str:
    """Triton 3.6 has dtypes by their names, and other constants as they are."""
    kept = [str(each) if type(each).__name__ == "dtype" else each for each in constants.values()]
    return json.dumps([name, signature, kept])


jit.serialize_specialization_data = as_before

from fuseplan.dialect import ops, registered_kernel  # noqa: E402
from fuseplan.providers.triton.replay import OPTIONS  # noqa: E402
from tests.providers.test_compiles import FAMILIES, TARGETS, Driver, stand_ins  # noqa: E402

SEEN: list[str] = []


def compile_kernel(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    kernel.warmup(*arguments, grid=grid, **{**OPTIONS, **constants})


def main() -> None:
    triton.runtime.driver._active = Driver(TARGETS["sm_90"])
    triton.knobs.runtime.jit_post_compile_hook = lambda **given: SEEN.append(given["fn"].name)
    for family in FAMILIES:
        for name, stand_in in stand_ins("cuda", compile_kernel).items():
            if hasattr(family, name):
                setattr(family, name, stand_in)
    for name in ("rms_norm_dynamic_fp8_quant", "silu_and_mul_static_fp8_quant", "qk_norm_rope", "skinny_linear"):
        kernel = registered_kernel(name, "triton")
        assert kernel is not None
        kernel(*ops[name].samples[0].make(torch.device("cpu"), torch.Generator().manual_seed(0)))
    print(json.dumps(SEEN))


if __name__ == "__main__":
    main()
