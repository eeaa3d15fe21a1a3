"""Attention spelled out in plain PyTorch, in the spellings that models have, and near them."""

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from fuseplan.graph.facts import is_call
from fuseplan.graph.surgery import copy_graph
from fuseplan.rules.parts.attention.op import exact_attention
from tests.attention import GROUPS, HEADS, Repeat, hugging_face, inputs
from tests.helpers import post_grad, randn

aten = torch.ops.aten
SCALE, CAP = 0.25, 2.0
Step = Callable[[Tensor], Tensor]


def same(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True, kw_only=True)
class Eager:
    """`eager_attention_forward` of transformers, and of gpt-oss and Gemma 2.

    Attributes:
        repeat: copies heads.
        softcap: of scores.
        sinks: whether there are any.
        scores: what else is done to scores before their softmax.
        weights: what else is done to weights.
        turned: swaps the last dimensions of keys.
    """

    repeat: Repeat = hugging_face
    softcap: float | None = None
    sinks: bool = False
    scores: Step = same
    weights: Step = same
    turned: Step = field(default=lambda keys: keys.transpose(2, 3))

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, sinks: Tensor | None = None
    ) -> Tensor:  # fmt: skip
        return self.both(q, k, v, mask, sinks)[0].transpose(1, 2).contiguous()

    def both(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, sinks: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The result, heads before tokens, and the weights."""
        scores = torch.matmul(q, self.turned(self.repeat(k))) * SCALE
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        scores = self.scores(scores if mask is None else scores + mask)
        if not self.sinks:
            weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
        else:
            assert sinks is not None
            column = sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[-2], -1)
            joined = torch.cat([scores, column], dim=-1)
            joined = joined - joined.max(dim=-1, keepdim=True).values
            weights = F.softmax(joined, dim=-1, dtype=joined.dtype)[..., :-1]
        weights = self.weights(weights)
        return torch.matmul(weights, self.repeat(v)), weights

    def inputs(self, queries: int = 1, dtype: torch.dtype = torch.bfloat16, **sizes: int) -> list[Tensor]:
        """q, k, v, a mask that hides keys by the lowest number, and sinks."""
        q, k, v, seen = inputs(queries, dtype, **sizes)  # type: ignore[arg-type]
        mask = torch.zeros((), dtype=dtype).where(seen, torch.finfo(dtype).min)
        return [q, k, v, mask, *([randn(HEADS, dtype=dtype, seed=4)] if self.sinks else [])]

    def graph(self, *how: Any, **sizes: Any) -> fx.Graph:
        """What Inductor hands over: a graph of one's own."""
        return copy_graph(_traced(self, how, tuple(sizes.items())))[0]


@functools.cache
def _traced(model: Eager, how: tuple[Any, ...], sizes: tuple[tuple[str, Any], ...]) -> fx.Graph:
    return post_grad(model, *model.inputs(*how, **dict(sizes)))


PLAIN, CAPPED, SINKS = Eager(), Eager(softcap=CAP), Eager(sinks=True)
MODELS = {"plain": PLAIN, "capped": CAPPED, "sinks": SINKS, "both": Eager(softcap=CAP, sinks=True)}


def exact(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None, scale: float, softcap: float | None
) -> Tensor:  # fmt: skip
    """The op in float64."""
    mask, sinks = (None if each is None else each.double() for each in (mask, sinks))
    return exact_attention(q.double(), k.double(), v.double(), mask, scale, softcap=softcap, sinks=sinks)


def unshared(x: Tensor) -> Tensor:
    """Heads of their own for all queries."""
    return torch.cat([x] * GROUPS, 1)


def online(graph: fx.Graph) -> fx.Graph:
    """The graph with softmaxes as Inductor prepares them on CUDA."""
    from torch._inductor.inductor_prims import prepare_softmax_online

    for top in graph.find_nodes(op="call_function", target=aten.amax.default):
        (centred,) = [user for user in top.users if is_call(user, aten.sub.Tensor)]
        (exp,) = centred.users
        (total,) = [user for user in exp.users if is_call(user, aten.sum.dim_IntList)]
        with graph.inserting_before(top):
            both = graph.call_function(prepare_softmax_online, (top.args[0], top.meta["val"].dim() - 1))
            both.meta["val"] = (top.meta["val"], total.meta["val"])
            for index, old in enumerate((top, total)):
                new = graph.call_function(operator.getitem, (both, index))
                new.meta = dict(old.meta)
                old.replace_all_uses_with(new)
        graph.erase_node(total)
        graph.erase_node(top)
    graph.lint()
    return graph
