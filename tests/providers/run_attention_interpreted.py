"""Runs split-KV attention on the CPU by Triton's interpreter and prints what came of it, as one JSON object."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fuseplan.dialect import ops
from fuseplan.graph.ops import AttentionRounding
from fuseplan.providers.triton import attention
from fuseplan.providers.triton.attention import launch
from fuseplan.providers.triton.split import Split
from fuseplan.rules import Rule
from fuseplan.rules.families.attention import EagerAttention, GroupedAttention
from fuseplan.rules.parts.attention.op import attention_fake
from fuseplan.testing import check_rule
from fuseplan.verification.layout import significant_strides
from tests.eager_attention import exact
from tests.providers.run_interpreted import TRITON, Recorded, apart, prepare, wide_products
from tests.rules.test_rules import arguments_of


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of one attention; `splits` None: as many as the launcher takes; `sinks`: a number around which they are drawn."""

    batch: int = 2
    heads: int = 2
    groups: int = 4
    queries: int = 1
    keys: int = 129
    width: int = 16
    value_width: int | None = None
    dtype: torch.dtype = torch.bfloat16
    kernel: str = "cpu"
    splits: int | None = 3
    softcap: float | None = None
    sinks: float | None = None

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v."""
        generator = torch.Generator().manual_seed(self.keys)
        value_width = self.value_width or self.width
        shapes = (
            (self.heads * self.groups, self.queries, self.width), (self.heads, self.keys, self.width),
            (self.heads, self.keys, value_width),
        )  # fmt: skip
        q, k, v = (torch.randn(self.batch, *shape, generator=generator).to(self.dtype) for shape in shapes)
        return q, k, v

    def logits(self) -> Tensor | None:
        """[q_heads]"""
        drawn = torch.randn(self.heads * self.groups, generator=torch.Generator().manual_seed(1))
        return None if self.sinks is None else (drawn + self.sinks).to(self.dtype)

    def run(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        how = None if self.splits is None else split(self.splits)
        is_plain = self.softcap is None and self.sinks is None
        return launch(
            q, k, v, mask, self.width**-0.5, self.kernel if is_plain else None, how, sinks=self.logits(),
            softcap=self.softcap,
        )  # fmt: skip

    def off(self, mask: Tensor | None = None, tensors: tuple[Tensor, Tensor, Tensor] | None = None) -> float:
        """The largest difference to float64, in units in the last place at 1."""
        q, k, v = tensors or self.tensors()
        true = exact(q, k, v, mask, self.logits(), self.width**-0.5, self.softcap)
        result = self.run(q, k, v, mask)
        assert result.shape == true.shape
        assert not true.isnan().any()
        assert result.is_contiguous() or self.softcap is self.sinks is None
        return apart(result, true, self.dtype)


def split(count: int, block: int = 32) -> Split:
    return Split(count=count, block=block, warps=4, stages=2)


def hidden(seen: Tensor, dtype: torch.dtype = torch.bfloat16, nothing: float = -torch.inf) -> Tensor:
    """A mask that shows some keys."""
    return torch.zeros((), dtype=dtype).where(seen, nothing)


EVERY = (
    *(Sizes(groups=groups, keys=33, splits=None) for groups in (1, 2, 8)),
    *(Sizes(queries=queries, keys=40, groups=2, batch=1) for queries in (2, 3, 5, 16)),
    Sizes(groups=8, queries=16, heads=1, batch=1, keys=33, splits=2),  # more rows than one tile has
    *(Sizes(keys=keys, heads=1, batch=1, dtype=torch.float16) for keys in (1, 32, 1280)),
    *(Sizes(width=width, keys=65, heads=1) for width in (24, 64, 80, 128, 256)),
    Sizes(width=24, value_width=40, kernel="efficient", dtype=torch.float16),
    Sizes(width=80, value_width=16, kernel="efficient", splits=None),
    Sizes(dtype=torch.float32, queries=2),
    Sizes(batch=0), Sizes(keys=0), Sizes(keys=0, splits=None),
)  # fmt: skip


def masks() -> Iterator[tuple[str, Sizes, Tensor | None]]:
    """(name, sizes, mask)."""
    sizes = Sizes(batch=2, queries=2, keys=100)
    q_heads = sizes.heads * sizes.groups
    generator = torch.Generator().manual_seed(0)
    key = torch.arange(100)
    lengths = torch.tensor([70, 31])[:, None, None, None]

    yield "none", sizes, None
    yield "lengths", sizes, hidden(key < lengths)
    yield "left padding", sizes, hidden((key >= lengths) | (key == 99))
    yield "lengths by a finite number", sizes, hidden(key < lengths).clamp(min=-65504)
    nowhere = (torch.arange(2)[:, None] > 0).expand(1, 1, 2, 100)
    yield "nothing shown to one of two queries", sizes, hidden(nowhere).clamp(min=-65504)
    lowest = torch.finfo(sizes.dtype).min
    yield "nothing shown to one of two queries by the lowest number", sizes, hidden(nowhere).clamp(min=lowest)
    yield "one query", replace(sizes, queries=1), hidden(key < lengths)
    yield "window", sizes, hidden((key > 40) & (key < 50))[None, None, None].expand(2, 1, 2, 100)
    yield "holes", sizes, hidden((key == 3) | (key == 90))[None, None, None]
    yield "2-D", sizes, torch.randn(2, 100, generator=generator).to(sizes.dtype)
    yield "1 x keys", sizes, torch.randn(1, 100, generator=generator).to(sizes.dtype)
    yield "each head's", sizes, hidden(torch.rand(2, q_heads, 2, 100, generator=generator) < 0.5)
    yield "each head's, expanded", sizes, hidden(torch.rand(1, q_heads, 1, 100, generator=generator) < 0.5)
    yield "one key", sizes, torch.randn(2, 1, 1, 1, generator=generator).to(sizes.dtype)
    yield "float32", sizes, torch.randn(2, 1, 2, 100, generator=generator)
    yield "transposed", sizes, torch.randn(100, 2, 1, 2, generator=generator).to(sizes.dtype).permute(3, 2, 1, 0)


def strides() -> Iterator[tuple[str, Sizes, tuple[Tensor, Tensor, Tensor]]]:
    """(name, sizes, arguments) of other layouts."""
    sizes = Sizes(batch=3, keys=70, queries=2)
    q, k, v = sizes.tensors()

    def laid(x: Tensor, *order: int) -> Tensor:
        back = torch.tensor(order).argsort().tolist()
        return x.permute(order).contiguous().permute(back)

    yield "tokens first", sizes, (laid(q, 0, 2, 1, 3), laid(k, 0, 2, 1, 3), laid(v, 2, 0, 1, 3))
    yield "elements apart", sizes, (laid(q, 0, 3, 2, 1), laid(k, 0, 1, 3, 2), laid(v, 3, 2, 1, 0))
    caches = [torch.full((4, 2, 96, 16), torch.nan, dtype=sizes.dtype) for _ in range(2)]
    for cache, value in zip(caches, (k, v), strict=True):
        cache[1:, :, 5:75] = value
    yield "slices of caches", sizes, (q, *(cache[1:, :, 5:75] for cache in caches))  # type: ignore[misc]
    yield "one head and batch expanded", sizes, (q, k[:1, :1].expand_as(k), v[:1, :1].expand_as(v))
    merged = torch.cat([each.transpose(1, 2).flatten(2) for each in (k, v)], dim=-1).unflatten(-1, (4, 16))
    yield "merged", sizes, (q, merged[:, :, :2].transpose(1, 2), merged[:, :, 2:].transpose(1, 2))


def skipped() -> dict[str, bool]:
    """Whether neither keys nor values of tiles that are masked as a whole are read: there they are NaN. Hidden is what
    is minus infinity, or what torch before 2.12 makes of it for cuDNN.
    """
    found = {}
    for nothing, (queries, per_head), splits in product((-torch.inf, -65504.0), ((1, 0), (2, 0), (2, 1)), (1, 3)):
        sizes, key = Sizes(keys=320, queries=queries, splits=splits), torch.arange(320)
        q, k, v = sizes.tensors()
        # Tiles of 32 keys: the third holds some, and so does the eighth.
        rows = [(key == 70) | (key == 230), (key == 80) | (key == 255)]
        shape = (1, 8 if per_head else 1, queries, 320)
        seen = torch.stack([rows[row % 2] for row in range(shape[1] * queries)]).reshape(shape)
        mask, tile = hidden(seen, nothing=nothing), key // 32
        wanted = sizes.run(q, k, v, mask)
        for each in (k, v):
            each[:, :, (tile != 2) & (tile != 7)] = torch.nan
        got = sizes.run(q, k, v, mask)
        name = f"{nothing}, {queries} queries, {splits} splits{', each head alone' if per_head else ''}"
        found[name] = bool(got.isfinite().all()) and torch.equal(got, wanted)
    return found


def fully_masked() -> list[float]:
    """What a query gets that sees nothing: in one part and in several; its neighbour sees the first key."""
    values = []
    for splits in (1, 2):
        sizes = Sizes(queries=2, keys=70, splits=splits, dtype=torch.float16)
        q, k, v = sizes.tensors()
        mask = torch.full((1, 1, 2, 70), -torch.inf, dtype=sizes.dtype)
        mask[..., 1, 0] = 0.0
        y = sizes.run(q, k, v, mask)
        values.append(float(y[:, :, 0].abs().max()))
        values.append(float((y[:, :, 1] - v[:, :, 0].repeat_interleave(4, dim=1)).abs().max()))
    return values


def spelled() -> dict[str, float]:
    """How far soft-caps and sinks are off."""
    both: dict[str, Any] = {"softcap": 2.0, "sinks": 0.5}
    cases = [
        *(Sizes(keys=70, splits=count, **each) for count in (1, 3, None)
          for each in ({"softcap": 2.0}, {"sinks": 0.5}, both)),
        *(Sizes(keys=65, heads=1, width=width, **both) for width in (64, 80, 128, 256)),
        *(Sizes(keys=40, groups=groups, queries=queries, **both)
          for groups, queries in ((1, 1), (8, 1), (2, 5), (2, 16), (4, 3))),
        *(Sizes(keys=70, splits=count, dtype=torch.float16, softcap=50.0, sinks=around)
          for count in (1, 3) for around in (-20.0, 12.0)),
        *(Sizes(keys=70, splits=count, dtype=torch.float32, sinks=0.5) for count in (1, 3)),
        Sizes(width=24, value_width=40, **both), Sizes(keys=0, sinks=0.0), Sizes(keys=1, splits=1, **both),
    ]  # fmt: skip
    return {str(case): case.off() for case in cases}


def spelled_masks() -> dict[str, float]:
    """The same by masks: windows, holes and rows that show nothing, in one part and in several."""
    found, key, token = {}, torch.arange(100), torch.arange(3)[:, None]
    lowest = torch.finfo(torch.bfloat16).min
    seen = {
        "window": (key > 60 + token - 9) & (key <= 60 + token),
        "one tile": (key < 8).expand(3, 100),
        "rows that show nothing": (key < 50 + token) & (token != 1),
        "nothing": torch.zeros(3, 100, dtype=torch.bool),
    }
    for (name, shown), count, nothing, sinks in product(seen.items(), (1, 4), (lowest, -torch.inf), (None, 0.5)):
        if sinks is None and nothing == -torch.inf and "nothing" in name:
            continue  # eager mode yields NaN
        sizes = Sizes(queries=3, keys=100, splits=count, softcap=2.0, sinks=sinks)
        found[f"{name} by {nothing}, {count}, sinks {sinks}"] = sizes.off(hidden(shown, nothing=nothing)[None, None])
    return found


def no_sinks() -> list[bool]:
    """Whether sinks of minus infinity change nothing, in one part and in several, of queries that see nothing, too."""
    q, k, v = Sizes(keys=70, queries=2).tensors()
    mask = torch.zeros(1, 1, 2, 70, dtype=q.dtype)
    mask[..., 1, :] = -torch.inf
    none = torch.full((8,), -torch.inf, dtype=q.dtype)
    return [
        torch.equal(*(launch(q, k, v, mask, 0.25, None, split(count), sinks=sinks) for sinks in (None, none)))
        for count in (1, 3)
    ]


def layouts() -> dict[str, bool]:
    """By kernel: whether results lie in memory as the fused op's fake implementation says."""
    found: dict[str, bool] = {}
    for kernel in ("cudnn", "flash", "efficient", "cpu"):
        for queries in (1, 3):
            q, k, v = Sizes(queries=queries, keys=8).tensors()
            for given in (q, q.transpose(1, 2).contiguous().transpose(1, 2), q.mT.contiguous().mT):
                fake = attention_fake(given.to("meta"), k.to("meta"), v.to("meta"), None, 1.0, False, kernel)
                got = launch(given, k, v, None, 1.0, kernel)
                same = significant_strides(got) == significant_strides(fake)
                found[kernel] = found.get(kernel, True) and same
    return found


def samples(rule: Rule) -> list[dict[str, Any]]:
    """Arguments of a rule, as the kernel rounds."""
    made = arguments_of(rule, torch.device("cpu"))
    spelled = rule.op in (ops.fused_attention, ops.rope_cached_eager_attention)
    return [{**each, "rounding": AttentionRounding.FLOAT32.value} if spelled else each for each in made]


def variants() -> int:
    """How many sets of constants a kernel is compiled for, while a cache grows."""
    recorded = Recorded()
    with (
        mock.patch.object(attention, "_attend", recorded),
        mock.patch.object(attention, "_combine", Recorded()),
        mock.patch.object(attention, "multiprocessors", return_value=132),
    ):
        for keys in range(129, 4096, 97):
            q, k, v = replace(Sizes(), keys=keys).tensors()
            launch(q, k, v, torch.zeros(2, 1, 1, keys, dtype=q.dtype), 1.0, "cudnn")
    return recorded.unlike


def main() -> None:
    prepare()
    wide_products()
    rules = (GroupedAttention(), EagerAttention())
    checked = {rule.name: check_rule(rule, providers=[TRITON], samples=samples(rule)) for rule in rules}
    result = {
        "sizes": {str(each): each.off() for each in EVERY},
        "masks": {name: sizes.off(mask) for name, sizes, mask in masks()},
        "strides": {name: sizes.off(tensors=tensors) for name, sizes, tensors in strides()},
        "skipped": skipped(), "fully masked": fully_masked(), "layouts": layouts(), "variants": variants(),
        "spelled": spelled(), "spelled masks": spelled_masks(), "no sinks": no_sinks(),
        "cases": {name: each.cases["triton"] for name, each in checked.items()},
    }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
