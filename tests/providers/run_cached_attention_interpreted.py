"""Runs attention that writes its token into the caches first, on the CPU by Triton's interpreter, and prints what came
of it, as one JSON object.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fuseplan.dialect import RotaryRounding, Rounding, ops
from fuseplan.providers.triton import attention
from fuseplan.providers.triton.attention import launch
from fuseplan.providers.triton.cached_attention import Token
from fuseplan.providers.triton.cached_rotary import QkNorm
from fuseplan.rules.families.cached_attention import CACHED_ATTENTION_RULES
from fuseplan.testing import check_rule
from tests.eager_attention import exact
from tests.providers.run_attention_interpreted import samples, split
from tests.providers.run_interpreted import TRITON, Recorded, apart, prepare, wide_products


@dataclass(frozen=True, kw_only=True)
class Step:
    """One decode step; `nothing` is what hides keys, `shown` which of them the mask shows, None: there is no mask."""

    batch: int = 2
    heads: int = 2
    groups: int = 4
    length: int = 100
    width: int = 16
    value_width: int | None = None
    position: int = 70
    shown: str | None = "until"
    nothing: float = -torch.inf
    shared: bool = False
    own_angles: bool = False
    rounding: RotaryRounding = RotaryRounding.PRODUCTS
    norm: Rounding | None = None
    dtype: torch.dtype = torch.bfloat16
    kernel: str | None = "cpu"
    splits: int = 3
    softcap: float | None = None
    sinks: bool = False

    def arguments(self) -> dict[str, Any]:
        """Of the fused op, but for `kernel`; tokens lie before heads in what was projected."""
        generator = torch.Generator().manual_seed(self.length)
        value_width = self.value_width or self.width

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(self.dtype)

        q, k, v = (
            random(self.batch, 1, heads, width).transpose(1, 2)
            for heads, width in (
                (self.heads * self.groups, self.width), (self.heads, self.width), (self.heads, value_width)
            )
        )  # fmt: skip
        caches = [random(self.batch, self.heads, self.length, width) for width in (self.width, value_width)]
        rows, angles = self.batch if self.own_angles else 1, self.width // 2 if self.shared else self.width
        cos, sin = (random(rows, 1, 1, angles) for _ in range(2))
        weights = {f"{name}_weight": 1 + random(self.width) / 8 for name in "qk"}
        norm = {} if self.norm is None else {**weights, "eps": 1e-6, "rounding": self.norm.value}
        return {
            "q": q, "k": k, "v": v, "k_cache": caches[0], "v_cache": caches[1], "cos": cos, "sin": sin,
            "positions": torch.tensor([self.position]), "rotary_rounding": self.rounding.value, "mask": self.mask(),
            "scale": self.width**-0.5, **norm,
        }  # fmt: skip

    def mask(self) -> Tensor | None:
        """[batch or 1, 1, 1, length], or [batch, q_heads, 1, length]."""
        key, hidden = torch.arange(self.length), torch.tensor(self.nothing, dtype=self.dtype)
        place, heads = self.position % self.length, self.heads * self.groups
        lengths = torch.arange(1, self.batch + 1)[:, None, None, None]
        shown = {
            "until": (key <= place)[None, None, None],
            "window": ((key <= place) & (key > place - 9))[None, None, None],
            "left padding": (key <= place) & (key >= 5 * lengths),
            "hidden token": ((key < 32) & (key != place))[None, None, None],
            "the token alone": (key == place)[None, None, None],
            "nothing": (key < 0)[None, None, None],
            "each head's": ((key + torch.arange(heads)[:, None]) % 3 > 0)[None, :, None].expand(self.batch, -1, -1, -1),
        }
        return None if self.shown is None else torch.zeros((), dtype=self.dtype).where(shown[self.shown], hidden)

    def run(self, given: dict[str, Any]) -> Tensor:
        """What is attended; the caches are written."""
        norm = None
        if self.norm is not None:
            weights = given["q_weight"], given["k_weight"]
            norm = QkNorm(q_weight=weights[0], k_weight=weights[1], eps=given["eps"], rounding=self.norm)
        token = Token(
            **{name: given[name] for name in ("k", "v", "cos", "sin", "positions")}, rotary_rounding=self.rounding,
            norm=norm,
        )  # fmt: skip
        return launch(
            given["q"], given["k_cache"], given["v_cache"], given["mask"], given["scale"], self.kernel,
            split(self.splits), sinks=self.logits, softcap=self.softcap, written=token,
        )  # fmt: skip

    @property
    def logits(self) -> Tensor | None:
        """[q_heads]"""
        return torch.linspace(-1, 1, self.heads * self.groups).to(self.dtype) if self.sinks else None

    def off(self) -> float:
        """The largest difference to float64 attention over the reference's caches, in units in the last place at 1;
        infinity where the caches aren't the reference's.
        """
        given = self.arguments()
        names = ("q", "k", "v", "k_cache", "v_cache", *(("q_weight", "k_weight") if self.norm else ()), "cos", "sin")
        norm = (given["eps"], given["rounding"]) if self.norm else ()
        op = ops.qk_norm_rope_cache if self.norm else ops.rope_cache
        tensors = (given[name] for name in names)
        q, *caches = op.reference(*tensors, given["positions"], *norm, given["rotary_rounding"])
        wanted = exact(q, caches[0], caches[1], given["mask"], self.logits, given["scale"], self.softcap)
        got = self.run(given)
        written = zip((given["k_cache"], given["v_cache"]), caches, strict=True)
        if not all(torch.equal(a, b) for a, b in written):
            return float("inf")
        return apart(got, wanted.nan_to_num(0.0), self.dtype)


def steps() -> Iterator[Step]:
    """In one part and in several, whatever the position, the mask, sizes and conventions."""
    for splits in (1, 3):
        each = Step(splits=splits)
        yield from (replace(each, position=position) for position in (0, 31, 32, 99, -1, -100))
        yield from (replace(each, shown=shown) for shown in (
            None, "window", "left padding", "hidden token", "the token alone", "nothing", "each head's"
        ))  # fmt: skip
        for nothing in (-65504.0, torch.finfo(each.dtype).min):
            yield from (replace(each, shown=shown, nothing=nothing) for shown in ("hidden token", "nothing", "until"))
        yield replace(each, length=1, position=0)
        yield replace(each, groups=70, heads=1, batch=1)  # more rows than one tile has
        yield replace(each, softcap=2.0, sinks=True, kernel=None)
        yield replace(each, sinks=True, shown="hidden token", kernel=None)
    for width in (16, 64, 80, 96, 128, 256):
        yield Step(width=width, shared=width % 64 == 0, heads=1, batch=1)
    yield Step(width=24, value_width=40, kernel="efficient", dtype=torch.float16)
    yield Step(width=80, value_width=16, kernel="efficient", own_angles=True)
    yield from (Step(groups=groups) for groups in (1, 2, 8))
    yield from (Step(dtype=dtype, rounding=RotaryRounding.FP32) for dtype in (torch.float16, torch.float32))
    for norm in Rounding:
        yield from (Step(norm=norm, shared=shared, width=24, dtype=torch.float16) for shared in (False, True))


def stale() -> list[bool]:
    """Whether what a cache held at the position, and in tiles that are hidden, is read by nobody: there it is NaN."""
    found = []
    for splits in (1, 3):
        for shown in (None, "until", "window", "hidden token"):
            step = Step(splits=splits, shown=shown)
            clean, given = step.arguments(), step.arguments()
            wanted = step.run(clean)
            tiles = torch.arange(step.length) // 32
            for name in ("k_cache", "v_cache"):
                given[name][:, :, step.position] = torch.nan
                if shown == "window":
                    given[name][:, :, (tiles != 1) & (tiles != 2)] = torch.nan
            got = step.run(given)
            same = torch.equal(given["k_cache"][:, :, step.position], clean["k_cache"][:, :, step.position])
            found.append(same and torch.equal(got, wanted))
    return found


def out_of_bounds() -> dict[str, bool]:
    """By position: whether nothing is written; the interpreter has no assertions."""
    found = {}
    for position in (100, -101, 2**32 + 70, -(2**40)):
        step = Step(position=position, shown=None)
        given = step.arguments()
        memory = torch.full((40_000,), 7.0).bfloat16()
        for start, name in ((8_000, "k_cache"), (24_000, "v_cache")):
            cache = given[name]
            given[name] = memory[start:].as_strided(cache.shape, cache.stride())
        before = memory.clone()
        step.run(given)
        found[str(position)] = torch.equal(memory, before)
    return found


def strides() -> dict[str, bool]:
    """Whether other layouts give the same: elements apart, angles and one position as parts of others."""
    step, found = Step(norm=Rounding.LLAMA), {}
    wanted = step.run(step.arguments())
    for name in ("q", "k", "v", "k_cache", "v_cache", "cos", "sin", "q_weight", "k_weight", "mask"):
        given = step.arguments()
        apart = torch.full((*given[name].shape, 3), torch.nan, dtype=step.dtype)
        apart[..., 1] = given[name]
        given[name] = apart[..., 1]
        found[name] = torch.equal(step.run(given), wanted)
    given = step.arguments()
    given["positions"] = torch.tensor([70], dtype=torch.int32)
    found["positions"] = torch.equal(step.run(given), wanted)
    return found


def variants() -> int:
    """How many sets of constants the kernel is compiled for, while a cache grows and its position moves."""
    recorded = Recorded()
    with mock.patch.object(attention, "_attend", recorded), mock.patch.object(attention, "_combine", Recorded()):
        for length in range(129, 2048, 97):
            step = Step(length=length, position=length // 2)
            step.run(step.arguments())
    return recorded.unlike


def main() -> None:
    prepare()
    wide_products()
    result = {
        "steps": {str(step): step.off() for step in steps()},
        "stale": stale(), "out of bounds": out_of_bounds(), "strides": strides(),
        "variants": variants(),
        "cases": [
            check_rule(rule, providers=[TRITON], samples=samples(rule)).cases["triton"]
            for rule in CACHED_ATTENTION_RULES
        ],
    }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
