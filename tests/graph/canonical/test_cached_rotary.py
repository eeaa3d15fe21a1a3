"""Rotated keys, and values, that are written into static caches, in the spellings that models have; and what only looks
like it, or couldn't be written in place.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from fuseplan.dialect import ops
from fuseplan.graph.canonical.view import CanonicalGraph
from fuseplan.graph.facts import tensor_of
from fuseplan.record import Reason
from tests.cached import LENGTH, WRITES, Layer, arguments, index_copy, layer, normed_layer
from tests.helpers import quickly_canonical
from tests.rotary import HEAD, K_HEADS, Q_HEADS, hugging_face, hugging_face_in_float32, rotate_pairs

RAISED = f"cached_rotary[{HEAD}]"


def nodes(graph: CanonicalGraph, name: str) -> list[fx.Node]:
    return list(graph.graph.find_nodes(op="call_function", target=ops[name].overload))


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("write", sorted(WRITES))
def test_rotation_and_writes_are_raised_together(write: str, dtype: torch.dtype, tokens: int) -> None:
    graph = quickly_canonical(layer(WRITES[write]), *arguments(tokens, dtype))
    assert graph.recognized() == {RAISED: 1}
    assert not graph.refusals
    (node,) = nodes(graph, "cached_rotary")
    shapes = [[*value.shape] for value in map(tensor_of, node.args[:5]) if value is not None]
    assert shapes == [
        [2, Q_HEADS, tokens, HEAD], *[[2, K_HEADS, tokens, HEAD]] * 2, *[[2, K_HEADS, LENGTH, HEAD]] * 2
    ]  # fmt: skip
    assert node.args[8] == "products"
    graph.graph.lint()
    wide = quickly_canonical(layer(WRITES[write], rotate=hugging_face_in_float32), *arguments(tokens))
    assert [node.args[8] for node in nodes(wide, "cached_rotary")] == ["fp32"]


@pytest.mark.parametrize("tokens_first", [True, False])
def test_behind_norms_the_writes_are_an_op_of_their_own(tokens_first: bool) -> None:
    graph = quickly_canonical(normed_layer(tokens_first=tokens_first), *arguments())
    assert graph.recognized() == {f"rms_norm[{HEAD}]": 2, f"rotary_embedding[{HEAD}]": 1, f"cache_write[{HEAD}]": 1}
    (node,), (rotary,) = nodes(graph, "cache_write"), nodes(graph, "rotary_embedding")
    assert node.args[0] in rotary.users
    assert not graph.refusals


@pytest.mark.parametrize("normed", [True, False])
def test_keys_are_what_is_cached_where_there_are_as_many_queries(normed: bool) -> None:
    """And not what is rotated second."""
    inner = normed_layer() if normed else layer()

    def function(q: Tensor, k: Tensor, *rest: Tensor) -> Any:
        return inner(k, q, *rest)  # keys come first in the graph's inputs

    given = arguments(k_heads=Q_HEADS)
    graph = quickly_canonical(function, given[1], *(given[0], *given[2:]))
    assert len(nodes(graph, "cache_write" if normed else "cached_rotary")) == 1
    assert not graph.refusals


def test_each_layer_has_its_own_though_they_share_positions_and_angles() -> None:
    def function(*given: Tensor) -> Any:
        first = layer()(*given[:3], *given[3:5], *given[7:])
        q = given[0] + first[0].transpose(1, 2)
        return layer()(q, given[1] * 2, given[2] * 2, *given[5:7], *given[7:])

    q, k, v, k_cache, v_cache, *rest = arguments()
    graph = quickly_canonical(function, q, k, v, k_cache, v_cache, k_cache.clone(), v_cache.clone(), *rest)
    assert graph.recognized() == {RAISED: 2}
    caches = [node.args[index] for node in nodes(graph, "cached_rotary") for index in (3, 4)]
    assert len({*caches}) == 4


def writes_twice(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, *rest: Tensor) -> Any:
    k_cache.index_copy_(2, rest[2] + 1, v.transpose(1, 2))
    return layer()(q, k, v, k_cache, v_cache, *rest)


def writes_again_after(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, *rest: Tensor) -> Any:
    q, *_ = layer()(q, k, v, k_cache, v_cache, *rest)
    v_cache.mul_(2)
    return q, k_cache + 1, v_cache + 1


def rolls(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, *rest: Tensor) -> Any:
    """A sliding window that is full, as in transformers' `StaticSlidingWindowLayer`."""

    def write(cache: Tensor, positions: Tensor, x: Tensor) -> None:
        new = cache.roll(-1, dims=-2)
        new[:, :, torch.tensor([-1])] = x
        cache.copy_(new)

    return layer(write)(q, k, v, k_cache, v_cache, *rest)


def one_row(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Any:
    def put(cache: Tensor, positions: Tensor, x: Tensor) -> None:
        torch.ops.aten.index_put_(cache, [None, None, positions], x)

    return layer(put)(q[:1], k[:1], v[:1], *rest[:2], *(each[:1] for each in rest[2:4]), rest[4])


def by_hand(
    values: Callable[[Tensor, Tensor], Tensor] | None = lambda v, k_cache: v, *, swaps: bool = False, sums: bool = False
) -> Layer:  # fmt: skip
    """A layer whose written values are computed of values and cached keys, whose queries may be rotated by sines and
    cosines swapped, and whose keys may be read beside the cache.
    """

    def function(
        q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, cos: Tensor, sin: Tensor, positions: Tensor
    ) -> Any:
        q = hugging_face(q.transpose(1, 2), *((sin, cos) if swaps else (cos, sin)))
        k = hugging_face(k.transpose(1, 2), cos, sin)
        index_copy(k_cache, positions, k)
        if values is not None:
            index_copy(v_cache, positions, values(v.transpose(1, 2), k_cache))
        return q, k.sum() if sums else q, k_cache + 1, v_cache + 1

    return function


def adds(cache: Tensor, positions: Tensor, x: Tensor) -> None:
    torch.ops.aten.index_put_(cache, [None, None, positions], x, True)


WAYS: dict[str, tuple[Layer, Reason, str]] = {
    "the cache is read before": (
        lambda *given: (given[3] * 2, *layer()(*given)), Reason.USERS, "cache as it is before is also read by aten.mul"
    ),
    "a part of it is": (
        lambda *given: (given[4][:, :, :3] + 0, *layer()(*given)), Reason.USERS,
        "the cache as it is before is also read by aten.slice",
    ),
    "values are made of it": (
        lambda q, k, v, *rest: layer()(q, k, rest[1][:, :, :1].transpose(1, 2) + v, *rest), Reason.USERS,
        "is also read by aten.slice",
    ),
    "it is written twice": (writes_twice, Reason.OP, "no input of the graph but computed by aten.index_put.default"),
    "it is written again": (writes_again_after, Reason.OP, "its result isn't the updated cache"),
    "one cache of both": (
        lambda q, k, v, cache, _, *rest: layer()(q, k, v, cache, cache, *rest), Reason.OP,
        "its result isn't the updated cache",
    ),
    "a window that rolls": (rolls, Reason.OP, "no input of the graph but computed by aten.index.Tensor: a window that"),
    "a part of a larger one": (
        lambda q, k, v, *rest: layer()(q, k, v, *(each[:, :K_HEADS] for each in rest[:2]), *rest[2:]), Reason.OP,
        "no input of the graph but computed by aten.slice.Tensor",
    ),
    "it isn't written in place": (
        lambda q, k, v, *rest: layer()(q, k, v, *(each + 1 for each in rest[:2]), *rest[2:]), Reason.OP,
        "no input of the graph but computed by aten.add.Tensor",
    ),
    "it accumulates": (layer(adds), Reason.ATTRIBUTE, "it adds to the cache's values"),
    "one row for all": (one_row, Reason.SIZE, "[1, 2, 1, 16] is written where the cache takes [2, 2, 1, 16]"),
    "it has gaps": (layer(), Reason.LAYOUT, "its cache has gaps or overlaps"),
    "both share memory": (layer(), Reason.LAYOUT, "its cache shares memory with another input of the graph"),
    "keys alone": (by_hand(None), Reason.OP, "no values are written at the positions of the keys"),
    "keys are read too": (by_hand(sums=True), Reason.USERS, "the rotated key is also read by"),
    "other angles": (by_hand(swaps=True), Reason.OP, "no queries are rotated by the angles of the keys"),
    "values depend on cached keys": (
        by_hand(lambda v, k_cache: k_cache[:, :, :1] + v), Reason.CYCLE, "depend on the cache"
    ),
    "partial": (layer(rotate=partial(hugging_face, rotated=8)), Reason.ATTRIBUTE, "8 of a head's 16 dimensions"),
    "interleaved": (
        layer(rotate=partial(hugging_face, turn=rotate_pairs)), Reason.ATTRIBUTE, "it rotates neighbours against",
    ),
}  # fmt: skip
CHANGED: dict[str, Callable[[list[Tensor]], list[Tensor]]] = {
    "a part of a larger one": lambda caches: [torch.cat((each, each), dim=1) for each in caches],
    "it has gaps": lambda caches: [torch.cat((caches[0], caches[0]), dim=-1)[..., :HEAD], caches[1]],
    "both share memory": lambda caches: [*torch.stack(caches)],
}
"""The caches, where they aren't as usual."""


@pytest.mark.parametrize("way", sorted(WAYS))
def test_what_could_not_be_done_in_place_or_at_once_is_refused_by_name(way: str) -> None:
    function, reason, detail = WAYS[way]
    given = arguments()
    if way == "partial":
        given[5:7] = [each[..., :8] for each in given[5:7]]
    given[3:5] = CHANGED.get(way, list)(given[3:5])
    graph = quickly_canonical(function, *given)
    assert not {"cached_rotary", "cache_write"} & {name.partition("[")[0] for name in graph.recognized()}
    (refusal,) = graph.refusals
    assert (refusal.op, refusal.reason) == ("cached_rotary", reason)
    assert detail in refusal.detail


@pytest.mark.parametrize("sound", [True, False])
def test_each_write_is_checked_that_could_be_the_values(sound: bool) -> None:
    """Of two the nearer depends on the cached keys; it is the other one, unless its cache is read before."""

    def function(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, near: Tensor, *rest: Tensor) -> Any:
        cos, sin, positions, far = rest
        before = v if sound else far * 2
        q, k = (hugging_face(x.transpose(1, 2), cos, sin) for x in (q, k))
        index_copy(k_cache, positions, k)
        index_copy(near, positions, k_cache[:, :, :1] + v.transpose(1, 2))
        index_copy(far, positions, v.transpose(1, 2))
        return q, before, k_cache + 1, near + 1, far + 1

    given = arguments()
    graph = quickly_canonical(function, *given, given[4].clone())
    assert len(nodes(graph, "cached_rotary")) == sound
    assert len(graph.refusals) == (not sound)


def test_a_cache_of_another_dtype_is_left_alone() -> None:
    def write(cache: Tensor, positions: Tensor, x: Tensor) -> None:
        cache[:, :, positions] = x.to(cache.dtype)

    given = arguments()
    given[3:5] = [each.float() for each in given[3:5]]
    assert RAISED not in quickly_canonical(layer(write), *given).recognized()


def test_behind_norms_it_is_refused_by_the_name_of_the_write() -> None:
    graph = quickly_canonical(lambda *given: (given[3] * 2, *normed_layer()(*given)), *arguments())
    assert [(each.op, each.reason) for each in graph.refusals] == [("cache_write", Reason.USERS)]


@pytest.mark.parametrize("normed", [True, False])
def test_a_cache_that_grows_is_a_near_miss(normed: bool) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, *rest: Tensor) -> Any:
        grown = []

        def append(cache: Tensor, positions: Tensor, x: Tensor) -> None:
            grown.append(torch.cat((cache, x), dim=-2))

        make = normed_layer if normed else layer
        q, *_ = make(append)(q, k, v, k_cache, v_cache, *rest)
        return q, *grown

    (refusal,) = quickly_canonical(function, *arguments()).refusals
    assert refusal.op == ("cache_write" if normed else "cached_rotary")
    assert "keys are appended to a cache that grows" in refusal.detail


def test_keys_that_are_not_rotated_have_nothing_to_say() -> None:
    graph = quickly_canonical(layer(rotate=lambda x, cos, sin: x * 2), *arguments())
    assert not graph.recognized()
    assert not graph.refusals
