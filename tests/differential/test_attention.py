"""Random attention, spelled out in random ways: fused, it computes what it computes in float64 as closely as before."""

import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from fuseplan.compilation.manager import PostGradPassManager
from fuseplan.config import PassConfig
from fuseplan.providers import device_profile
from tests.differential.errors import excess
from tests.eager_attention import Eager
from tests.helpers import post_grad, randn

NIGHTLY = 200


def hugging_face(x: Tensor, groups: int) -> Tensor:
    batch, heads, length, width = x.shape
    return x[:, :, None].expand(batch, heads, groups, length, width).reshape(batch, heads * groups, length, width)


def tokens_first(x: Tensor, groups: int) -> Tensor:
    return x.transpose(1, 2).repeat_interleave(groups, dim=2).transpose(1, 2)


def interleaved(x: Tensor, groups: int) -> Tensor:
    return x.repeat_interleave(groups, dim=1)


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A model, its arguments, and who may run it."""

    model: Eager
    arguments: list[Tensor]
    provider: str

    @classmethod
    def of(cls, seed: int) -> "Drawn":
        rng = random.Random(seed)
        batch, heads, groups = rng.randint(1, 3), rng.randint(1, 3), rng.choice((1, 2, 4))
        queries, width = rng.choice((1, 1, 3, 9)), rng.choice((8, 16, 40))
        # Shapes tell inputs apart.
        keys = rng.choice([count for count in range(2, 70) if count not in (queries, width)])
        dtype = rng.choice((torch.bfloat16, torch.float16, torch.float32))
        softcap, sinks = rng.choice((None, None, 1.5, 30.0)), rng.random() < 0.4
        spelling = rng.choice((hugging_face, tokens_first, interleaved))
        turned = rng.choice((lambda x: x.transpose(2, 3), lambda x: x.mT.contiguous()))
        model = Eager(repeat=lambda x: spelling(x, groups), softcap=softcap, sinks=sinks, turned=turned)
        q = randn(batch, heads * groups, queries, width, dtype=dtype, seed=seed)
        k, v = (randn(batch, heads, keys, width, dtype=dtype, seed=seed + step) for step in (1, 2))
        shape = (rng.choice((1, batch)), rng.choice((1, 1, heads * groups)), rng.choice((1, queries)), keys)
        hidden = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < rng.choice((0.0, 0.3, 0.9))
        hidden[..., 0] = False
        mask = randn(*shape, dtype=dtype, seed=seed + 3) * rng.choice((0.0, 1.0))
        mask = mask.masked_fill(hidden, rng.choice((-torch.inf, torch.finfo(dtype).min)))
        arguments = [q, k, v, mask, *([randn(heads * groups, dtype=dtype, seed=seed + 4)] if sinks else [])]
        fits = softcap is None and not sinks
        packs = fits and queries == 1
        provider = rng.choice(("torch", *(["sdpa"] * fits), *(["sdpa_packed"] * packs)))
        return cls(model=model, arguments=arguments, provider=provider)


def run(graph: fx.Graph, arguments: list[Tensor]) -> Tensor:
    return fx.Interpreter(fx.GraphModule({}, graph)).run(*arguments)[0]  # type: ignore[no-any-return]


def in_order(graph: fx.Graph, drawn: Drawn) -> list[Tensor]:
    """Graphs take their inputs in the order in which they read them: keys before values."""
    left = list(drawn.arguments)
    shapes = [node.meta["val"].shape for node in graph.find_nodes(op="placeholder")]
    return [left.pop(next(at for at, each in enumerate(left) if each.shape == shape)) for shape in shapes]


@pytest.mark.parametrize(
    "seed", [*range(16), *(pytest.param(seed, marks=pytest.mark.nightly) for seed in range(16, NIGHTLY))]
)
def test_it_stays_as_close_to_float64(seed: int) -> None:
    drawn = Drawn.of(seed)
    graph = post_grad(drawn.model, *drawn.arguments)
    given = in_order(graph, drawn)
    plain = run(graph, given)
    exact = drawn.model(*(each.double() for each in drawn.arguments))
    reports: list[Any] = []
    config = PassConfig(allow_rounding_changes=True, verify="always", force=(f"eager_attention:{drawn.provider}",))
    PostGradPassManager(config, device=device_profile("cpu"), on_report=reports.append)(graph)
    graph.lint()
    (applied,) = reports[-1].graphs[0].applied
    assert (applied.rule, applied.provider) == ("eager_attention", drawn.provider)
    assert excess(run(graph, given), exact, [plain]) <= 1
