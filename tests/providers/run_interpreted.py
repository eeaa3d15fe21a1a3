"""Runs fuseplan's Triton kernels on the CPU by Triton's interpreter and prints what came of it, as one JSON object.

A process of its own: whether a kernel is interpreted is settled when Triton is imported, by `TRITON_INTERPRET=1`.
"""

import dataclasses
import functools
import json
import math
import sys
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import triton.language as tl
from torch._C._distributed_c10d import HashStore
from triton.runtime import interpreter

from fuseplan import testing
from fuseplan.dialect import NORM_FAMILY, ops
from fuseplan.providers import BUILT_IN_PROVIDERS
from fuseplan.rules.families import BUILT_IN_RULES
from fuseplan.rules.families.cached_rotary import CACHED_ROTARY_RULES
from fuseplan.testing import check_rule
from tests.providers.epilogues import own
from tests.rules.test_rules import arguments_of

CPU = torch.device("cpu")
PRODUCTS = {name for name in ops if "attention" in name or "linear" in name}
KEPT = {name for name in ops if name.endswith(("_and_norm", "_and_activation"))}
"""The kernels of other ops, and a store."""
TRITON = dataclasses.replace(
    next(each for each in BUILT_IN_PROVIDERS if each.name == "triton"), vendors=frozenset({"cpu", "nvidia", "amd"})
)
convert = interpreter._convert_float
FP8 = {"fp8e4nv": torch.float8_e4m3fn, "fp8e4b8": torch.float8_e4m3fnuz}


def rounded(data: Any, before: Any, after: Any, mode: Any) -> Any:
    """The interpreter truncates float32 to bfloat16 and loses carries to fp8, where GPUs round to the nearest, ties to
    even.
    """
    names = str(before), str(after)
    if names == ("bf16", "fp32"):
        return data.astype(np.uint32) << 16
    if names == ("fp32", "bf16"):
        bits = data.view(np.uint32)
        nearest = (bits + ((bits >> 16) & 1) + 0x7FFF) >> 16
        return np.where(np.isnan(data), 0x7FFF, nearest).astype(np.uint16)
    if names[0] == "fp32" and names[1] in FP8:
        return torch.from_numpy(data.copy()).to(FP8[names[1]]).view(torch.uint8).numpy()
    return convert(data, before, after, mode)


def prepare() -> None:
    """Has the interpreter round as GPUs do, and leaves out what takes most of its time: it would replace what
    `triton.language` holds by its own at every call of a function, look for overflows that it then tells nobody of, and
    make a table of dtypes for each value.
    """
    interpreter._convert_float = rounded
    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    interpreter._patch_lang = lambda fn: interpreter._LangPatchScope()
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    of_scalars = functools.cache(interpreter._get_np_dtype)
    interpreter._get_np_dtype = lambda kind: of_scalars(tl.uint64 if kind.scalar.is_ptr() else kind.scalar)
    _share_shapes()
    torch.set_num_threads(1)
    # One program runs after the other, always in the same order: no race could show.
    vars(testing)["repeated"] = lambda *_, **__: True


def _share_shapes() -> None:
    """Has types and tensors of one shape share what follows from it, which otherwise takes a third of the time."""
    make, types = tl.block_type.__init__, dict[Any, dict[str, Any]]()

    def block_type(self: Any, element: Any, shape: Any) -> None:
        key = element.name, tuple(size.value if isinstance(size, tl.constexpr) else size for size in shape)
        if key not in types:
            make(self, element, shape)
            types[key] = dict(vars(self))
        vars(self).update(types[key], element_ty=element)

    @functools.cache
    def shape_of(sizes: tuple[int, ...]) -> tuple[Any, Any]:
        return tl.tuple([tl.constexpr(size) for size in sizes]), tl.constexpr(math.prod(sizes))

    def tensor(self: Any, handle: Any, kind: Any) -> None:
        self.handle, self.type, self.dtype = handle, kind, kind.scalar
        self.shape, self.numel = shape_of(tuple(kind.shape) if kind.is_block() else ())

    tl.block_type.__init__, tl.tensor.__init__ = block_type, tensor


def wide_products() -> None:
    """Has the interpreter multiply matrices of bfloat16, whose bits it multiplies as if they were integers."""
    dot = interpreter.InterpreterBuilder.create_dot

    def wide_dot(builder: Any, left: Any, right: Any, *rest: Any) -> Any:
        return dot(builder, *map(_widened, (left, right)), *rest)

    interpreter.InterpreterBuilder.create_dot = wide_dot


def _widened(value: Any) -> Any:
    if value.dtype.scalar != tl.bfloat16:
        return value
    bits = value.data.astype(np.uint32) << 16
    return interpreter.TensorHandle(bits.view(np.float32), tl.float32)


def apart(got: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> float:
    """The largest difference to float64, in units in the last place of a dtype at 1."""
    return float((got.double() - wanted).abs().amax()) / torch.finfo(dtype).eps if wanted.numel() else 0.0


class Recorded:
    """What a kernel is launched with."""

    def __init__(self) -> None:
        self.constants: list[dict[str, Any]] = []

    def __getitem__(self, grid: Any) -> Any:
        return lambda *arguments, **constants: self.constants.append(constants)

    @property
    def unlike(self) -> int:
        """Sets of constants, each of which the kernel is compiled for."""
        assert len(self.constants) > 1
        return len({json.dumps(each, sort_keys=True, default=str) for each in self.constants})


def transposed(leading: tuple[int, ...], heads: int, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
    """Heads first in memory, so that no dimension of x follows another one."""
    generator = torch.Generator().manual_seed(heads)
    return torch.randn(heads, head_dim, *leading, generator=generator).to(dtype).movedim((0, 1), (-2, -1))


def differences(names: Iterable[str], most: int | None = None) -> dict[str, dict[str, float]]:
    """By op and sample, of so many: the largest difference to the reference; of fp8 codes, in steps.

    Not of products, whose sums have no order to keep.
    """
    found: dict[str, dict[str, float]] = {}
    for name in names:
        op = ops[name]
        for sample in op.samples[:most]:
            arguments = sample.make(CPU, torch.Generator().manual_seed(0))
            wanted, got = op.reference(*arguments), op.kernel("triton")(*arguments)
            if op.writes:
                got = (got, *(arguments[op.arguments.index(name)] for name in op.writes))
            pairs = zip(*(each if isinstance(each, tuple) else (each,) for each in (got, wanted)), strict=True)
            found.setdefault(name, {})[sample.name] = max(difference(*pair) for pair in pairs)
    return found


def difference(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Infinite where shapes or dtypes differ."""
    if (got.shape, got.dtype) != (wanted.shape, wanted.dtype) or not got.is_contiguous():
        return float("inf")
    if got.dtype.itemsize == 1:
        return float((got.view(torch.int8).int() - wanted.view(torch.int8).int()).abs().max())
    return float((got - wanted).abs().max())


def not_finite() -> dict[str, list[bool]]:
    """By epilogue: whether infinity and NaN stay where the reference has them, padding included."""
    found = {}
    for suffix in ("pad", "static_fp8_quant", "dynamic_fp8_quant"):
        op = NORM_FAMILY[False, True, suffix]
        x, residual = torch.randn(4, 24).bfloat16(), torch.randn(4, 24).bfloat16()
        x[0, 1], x[1, 2], residual[2] = float("inf"), float("nan"), 0.0
        x[2] = 0.0
        arguments = x, residual, torch.ones(24).bfloat16(), 1e-5, "llama", *own(suffix).values()
        pairs = zip(op.kernel("triton")(*arguments), op.reference(*arguments), strict=True)
        found[suffix] = [torch.equal(got.float().isnan(), wanted.float().isnan()) for got, wanted in pairs]
    return found


MANY_ROWS = 100
CHECKED = ("fused_add_rms_norm_pad", "silu_and_mul_dynamic_fp8_quant")
"""One of each family that runs on one rank."""


def odd() -> dict[str, bool]:
    """By shape: whether sizes that no tile divides, angles of half a head shared by a batch, and any strides do."""
    found = {}
    for leading, heads, head_dim in (
        ((1,), (1, 1), 2),
        ((3, 5), (5, 3), 10),
        ((2, 131), (7, 1), 96),
        ((6, 1), (16, 2), 16),
        ((0,), (2, 1), 8),
    ):
        q, k = (transposed(leading, each, head_dim, torch.float16) for each in heads)
        shared = leading if leading[-1] == 1 else (*(1,) * (len(leading) - 1), leading[-1])
        turn = torch.rand(*shared, 1, head_dim // 2) * 6
        weights = torch.randn(2 * head_dim)[::2].half(), torch.randn(head_dim).half()
        arguments = q, k, *weights, turn.cos().half(), turn.sin().half(), 1e-6, "gpt_oss", "products"
        pairs = zip(ops.qk_norm_rope.kernel("triton")(*arguments), ops.qk_norm_rope(*arguments), strict=True)
        name = f"{'x'.join(map(str, leading))} {heads[0]}+{heads[1]} x {head_dim}"
        found[name] = all(
            got.is_contiguous() and torch.allclose(got, wanted, rtol=2**-9, atol=2**-9) for got, wanted in pairs
        )
    return found


def more_than_programs() -> bool:
    """Whether what is beyond the largest grid is computed too."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(5, 4, heads, 8, generator=generator).bfloat16() for heads in (3, 1))
    weights = torch.ones(8).bfloat16(), torch.ones(8).bfloat16()
    cos, sin = (torch.randn(5, 4, 1, 8, generator=generator).bfloat16() for _ in range(2))
    arguments = (q, k, *weights, cos, sin, 1e-6, "llama", "products")
    with mock.patch.object(sys.modules["fuseplan.providers.triton.qk_norm_rope"], "MOST_PROGRAMS", 3):
        got, wanted = ops.qk_norm_rope.kernel("triton")(*arguments), ops.qk_norm_rope.reference(*arguments)
    return all(difference(*pair) == 0 for pair in zip(got, wanted, strict=True))


def cached(tokens: int = 3, *, first: int = 2, dtype: torch.dtype = torch.bfloat16) -> list[Any]:
    """Arguments of `rope_cache`: tokens lie before heads in memory, and values in every other place."""
    generator = torch.Generator().manual_seed(tokens)
    q, k = (torch.randn(2, tokens, heads, 10, generator=generator).to(dtype).transpose(1, 2) for heads in (5, 3))
    v = torch.randn(2, 3, tokens, 14, generator=generator).to(dtype)[..., ::2]
    k_cache = torch.randn(2, 7, 3, 10, generator=generator).to(dtype).transpose(1, 2)
    v_cache = torch.randn(2, 3, 7, 7, generator=generator).to(dtype)
    cos, sin = (torch.rand(1, 1, tokens, 5, generator=generator).to(dtype) for _ in range(2))
    return [q, k, v, k_cache, v_cache, cos, sin, first + torch.arange(tokens), "products"]


def caches() -> dict[str, bool]:
    """Whether what is yielded and what is cached are the reference's, and nothing else is written."""
    found = {}
    for name, given in {
        "one token": cached(1), "several": cached(), "all of the cache": cached(7, first=0), "the end": cached(first=4),
        "from the end": cached(first=-5), "int32": [*cached()[:7], torch.tensor([5, 0, 3], dtype=torch.int32), "fp32"],
        "float32": cached(dtype=torch.float32),
    }.items():  # fmt: skip
        wanted = ops.rope_cache.reference(*given)
        got = ops.rope_cache.kernel("triton")(*given), given[3], given[4]
        found[name] = all(torch.allclose(a, b, rtol=2**-9, atol=2**-9) for a, b in zip(got, wanted, strict=True))
        found[name] &= all(torch.equal(a, b) for a, b in zip(got[2:], wanted[2:], strict=True))
    with mock.patch.object(sys.modules["fuseplan.providers.triton.cached_rotary"], "MOST_PROGRAMS", 1):
        given = cached(5)
        wanted = ops.rope_cache.reference(*given)
        got = ops.rope_cache.kernel("triton")(*given), given[3], given[4]
    found["more than programs"] = all(difference(*pair) == 0 for pair in zip(got[::2], wanted[::2], strict=True))
    empty = [each[:0] if index < 5 else each for index, each in enumerate(cached())]
    found["no rows"] = ops.rope_cache.kernel("triton")(*empty).shape == (0, 5, 3, 10)
    return found


def out_of_bounds() -> dict[str, bool]:
    """By position: whether nothing is written; the interpreter has no assertions."""
    found = {}
    for position in (7, -8, 2**40, -(2**40)):
        given = cached(1, first=position)
        memory = torch.full((4096,), 7.0).bfloat16()
        for index in (3, 4):
            cache = memory[1024 * index - 2048 :].as_strided(given[index].shape, given[index].contiguous().stride())
            given[index] = cache
        before = memory.clone()
        ops.rope_cache.kernel("triton")(*given)
        found[str(position)] = torch.equal(memory, before)
    return found


def main() -> None:
    """Alone with the argument `kept`: every sample of ops that yield what they quantise, of which else one is tried."""
    prepare()
    dist.init_process_group("gloo", rank=0, world_size=1, store=HashStore())
    if "kept" in sys.argv:
        print(json.dumps(differences(KEPT)))
        return
    (rule,) = (each for each in BUILT_IN_RULES if each.name == "qk_norm_rope" and not vars(each)["transposes"])
    # Each token is programs of its own, and the interpreter takes milliseconds for one.
    with mock.patch.object(testing, "ROWS", tuple(each for each in testing.ROWS if each < MANY_ROWS)):
        checked = check_rule(rule, providers=[TRITON])
        cached_rotary = [check_rule(each, providers=[TRITON], samples=arguments_of(each, CPU))
                         for each in CACHED_ROTARY_RULES]  # fmt: skip
        alone = {each.op.name: check_rule(each, providers=[TRITON]).cases["triton"]
                 for each in BUILT_IN_RULES if each.op.name in CHECKED}  # fmt: skip
    result = {
        "differences": differences(TRITON.implements.keys() - PRODUCTS - KEPT) | differences(KEPT, most=1),
        "odd": odd(), "more than programs": more_than_programs(), "not finite": not_finite(), "caches": caches(),
        "out of bounds": out_of_bounds(), "cases": checked.cases["triton"], "refused": checked.refused,
        "cached": [each.cases["triton"] for each in cached_rotary], "alone": alone,
    }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
