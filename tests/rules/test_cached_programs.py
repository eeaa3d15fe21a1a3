"""Random programs around static caches: reads before and after writes, views, second writes, caches handed on and
returned. Whatever is fused, results and caches are those of eager PyTorch, and caches stay where they are.
"""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fuseplan
from fuseplan.record import Report
from tests.cached import Layer, arguments, assigned, attending, index_copy, layer, normed_layer
from tests.interpreted import no_code

PROGRAMS, BY_DAY = 40, 12
RULES = ("cached_attention", "qk_norm_cached_attention", "rope_cache", "qk_norm_rope_cache")
LAYER, MOVE_ON = "a layer", "positions move on"
Step = Callable[[dict[str, Any]], Any]
Caches = tuple[tuple[Tensor, Tensor], ...]


def _layer(state: dict[str, Any]) -> None:
    caches = state["caches"][state["turn"] % 2]
    results = state["layer"](state["q"], state["k"], state["v"], *caches, *state["angles"], state["positions"])
    state["out"] += results
    state["q"] = results[0].transpose(1, 2) + state["q"]
    state["turn"] += 1


def _advance(state: dict[str, Any]) -> None:
    """The next layer has the caches of the one before the last."""
    state["turn"] += 1


def _from_cache(state: dict[str, Any]) -> None:
    state["v"] = state["v"] + state["caches"][0][0][:, :, :1].transpose(1, 2)


def _move_on(state: dict[str, Any]) -> None:
    state["given"][-1].add_(1)  # as `cumulative_length` does


def _yields(read: Callable[[Caches], Tensor]) -> Step:
    """What is read of the caches of both layers is a result."""
    return lambda state: state["out"].append(read(state["caches"]))


STEPS: dict[str, Step] = {
    "the same caches again": _advance,
    "keys are read": _yields(lambda caches: caches[0][0] * 2),
    "a slice is read": _yields(lambda caches: caches[1][1][:, :, 2:5].sum(-1)),
    "a view": _yields(lambda caches: caches[0][1].view(-1)[3:9].clone()),
    "returned": _yields(lambda caches: caches[1][0]),
    "a view is returned": _yields(lambda caches: caches[0][0].transpose(1, 2)),
    "written once more": lambda state: state["caches"][0][1].index_copy_(
        2, state["positions"] - 1, state["v"].transpose(1, 2) * 2
    ),
    "scaled": lambda state: state["caches"][1][1].mul_(2),
    "values from a cache": _from_cache,
    "copied over": lambda state: state["caches"][0][0].copy_(state["caches"][1][0]),
    "queries are written to": lambda state: state["given"][0].add_(1),
    MOVE_ON: _move_on,
    LAYER: _layer,
}


def _attended(inner: Layer) -> Layer:
    """A layer whose queries attend to its caches, which something else reads, too."""

    def function(*given: Tensor) -> tuple[Tensor, ...]:
        q, keys, values = inner(*given)
        return attending(lambda *_: (q, keys, values))(*given).transpose(1, 2), keys + 1, values[:, :, 1:] * 2

    return function


def program(seed: int) -> tuple[Callable[..., Any], list[Tensor], list[str]]:
    """A function of q, k, v, two layers' caches, angles and positions; its arguments; and its steps."""
    draw = random.Random(seed)
    others = [name for name in STEPS if name != LAYER]
    steps = [LAYER, *draw.choices(others, k=draw.randint(0, 4)), *[LAYER] * draw.randint(0, 2)]
    draw.shuffle(steps)
    make, write = draw.choice((layer, normed_layer)), draw.choice((index_copy, assigned))
    tokens_first = draw.random() < 0.7
    q, k, v, *caches, cos, sin, positions = arguments(draw.choice((1, 3)))
    shared, attends = draw.random() < 0.2, draw.random() < 0.5
    inner = make(write, tokens_first=tokens_first, read=(lambda x: x) if attends else torch.relu)
    if attends:
        inner = _attended(inner)

    def function(*given: Tensor) -> list[Tensor]:
        state = {
            "given": given, "q": given[0], "k": given[1], "v": given[2], "layer": inner, "turn": 0, "out": [],
            "caches": (given[3:5], given[3:5] if shared else given[5:7]), "angles": given[7:9],
            "positions": given[9] + 0 if MOVE_ON in steps else given[9],
        }  # fmt: skip
        for step in steps:
            STEPS[step](state)
        return state["out"] or [given[0] + 1]  # type: ignore[return-value]

    own = [each.clone() for _ in range(2) for each in caches]
    return function, [q, k, v, *own, cos, sin, positions], steps


def test_programs_differ() -> None:
    drawn = [program(seed)[2] for seed in range(PROGRAMS)]
    assert len({*map(tuple, drawn)}) > PROGRAMS // 2
    assert [LAYER] in drawn


@pytest.mark.parametrize(
    "seed", [pytest.param(seed, marks=[pytest.mark.nightly] * (seed >= BY_DAY)) for seed in range(PROGRAMS)]
)
def test_what_is_computed_and_cached_stays(seed: int) -> None:
    function, given, steps = program(seed)
    reports: list[Report] = []
    wanted, fused = [each.clone() for each in given], [each.clone() for each in given]
    pointers = [each.data_ptr() for each in fused]
    with torch.inference_mode(), no_code():
        expected = function(*wanted)
        torch._dynamo.reset()
        config = fuseplan.PassConfig(policy=f"ordered({', '.join(RULES)})")
        actual = fuseplan.compile(function, config=config, on_report=reports.append)(*fused)
    if steps == [LAYER]:
        assert sum(reports[0].fused.values()) == 1
    assert [each.data_ptr() for each in fused] == pointers
    for got, want in zip((*actual, *fused), (*expected, *wanted), strict=True):
        assert got.shape == want.shape, steps
        assert torch.allclose(got, want, rtol=2**-6, atol=2**-5), steps
