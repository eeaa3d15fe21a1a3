"""Runs fuseplan's Triton kernels on the CPU by Triton's interpreter and prints what came of it, as one JSON object.

A process of its own: whether a kernel is interpreted is settled when Triton is imported, by `TRITON_INTERPRET=1`.
"""

import dataclasses
import json
from typing import Any

import torch
from triton.runtime import interpreter

from fuseplan.dialect import ops
from fuseplan.providers import BUILT_IN_PROVIDERS
from fuseplan.rules import BUILT_IN_RULES, Bindings
from fuseplan.testing import check_rule

CPU = torch.device("cpu")
TRITON = dataclasses.replace(
    next(each for each in BUILT_IN_PROVIDERS if each.name == "triton"), vendors=frozenset({"cpu", "nvidia", "amd"})
)
convert = interpreter._convert_float
NARROW = {
    "bf16": (torch.bfloat16, torch.int16, "uint16"),
    "fp8e4nv": (torch.float8_e4m3fn, torch.uint8, "uint8"),
    "fp8e4b8": (torch.float8_e4m3fnuz, torch.uint8, "uint8"),
}


def rounded(data: Any, before: Any, after: Any, mode: Any) -> Any:
    """The interpreter truncates float32 to bfloat16 and loses carries to fp8, where GPUs round to the nearest, ties to
    even.
    """
    if str(before) != "fp32" or str(after) not in NARROW:
        return convert(data, before, after, mode)
    dtype, bits, words = NARROW[str(after)]
    return torch.from_numpy(data.copy()).to(dtype).view(bits).numpy().view(words)


def transposed(leading: tuple[int, ...], heads: int, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
    """Heads first in memory, so that no dimension of x follows another one."""
    generator = torch.Generator().manual_seed(heads)
    return torch.randn(heads, head_dim, *leading, generator=generator).to(dtype).movedim((0, 1), (-2, -1))


def differences() -> dict[str, float]:
    """By sample: the largest difference to the reference."""
    found = {}
    for sample in ops.qk_norm_rope.samples:
        arguments = sample.make(CPU, torch.Generator().manual_seed(0))
        pairs = zip(ops.qk_norm_rope.kernel("triton")(*arguments), ops.qk_norm_rope(*arguments), strict=True)
        found[sample.name] = max(float((got - wanted).abs().max()) for got, wanted in pairs)
    return found


def odd() -> dict[str, bool]:
    """By shape: whether sizes that no tile divides, angles of half a head shared by a batch, and any strides do."""
    found = {}
    for leading, heads, head_dim in (
        ((1,), (1, 1), 2),
        ((3, 5), (5, 3), 10),
        ((2, 131), (7, 1), 96),
        ((0,), (2, 1), 8),
    ):
        q, k = (transposed(leading, each, head_dim, torch.float16) for each in heads)
        turn = torch.rand(*(1,) * (len(leading) - 1), leading[-1], 1, head_dim // 2) * 6
        weights = torch.randn(2 * head_dim)[::2].half(), torch.randn(head_dim).half()
        arguments = q, k, *weights, turn.cos().half(), turn.sin().half(), 1e-6, "gpt_oss", "products"
        pairs = zip(ops.qk_norm_rope.kernel("triton")(*arguments), ops.qk_norm_rope(*arguments), strict=True)
        name = f"{'x'.join(map(str, leading))} {heads[0]}+{heads[1]} x {head_dim}"
        found[name] = all(
            got.is_contiguous() and torch.allclose(got, wanted, rtol=2**-9, atol=2**-9) for got, wanted in pairs
        )
    return found


def declined() -> str:
    """What is said of more leading dimensions than the kernel steps through."""
    x = torch.empty(2, 2, 2, 3, 8)
    refusal = TRITON.offers()["qk_norm_rope"].accepts(Bindings("qk_norm_rope", {"q": x}))
    assert refusal is not None
    return refusal.detail


def main() -> None:
    interpreter._convert_float = rounded
    (rule,) = (each for each in BUILT_IN_RULES if each.name == "qk_norm_rope" and not vars(each)["transposes"])
    checked = check_rule(rule, providers=[TRITON])
    result = {
        "differences": differences(), "odd": odd(), "declined": declined(), "cases": checked.cases["triton"],
        "refused": checked.refused,
    }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
