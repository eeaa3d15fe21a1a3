"""Twelve obstacles, planted in real models at places that a seeded generator picks: the report names each first."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from fuseplan.config import PassConfig
from fuseplan.record import Nearness, Reason
from tests.helpers import KEEPS_FLOAT32_RESIDUAL
from tests.matching import planted
from tests.matching.planted import GPT_OSS, WORKLOADS, Garden, Place, explain, garden

PLANTED = "planted.py:"


@dataclass(frozen=True)
class Obstacle:
    """What is planted, and what must be said of it.

    Attributes:
        plant: puts it into a model.
        reason: the reason of the first near miss.
        detail: what its detail contains.
        folded: what it contains where Inductor has folded the obstacle into what is next to it, as that of torch 2.11
            does with casts.
        line: the file of the line that is to blame; empty: the model's own.
        config: under which it is one.
        providers: who may run fused ops; empty: all.
        layers: that the model needs for it: dead ops are found by comparison with other layers.
        at_norm: whether it is planted in the norm's module, and not in the module whose result is reduced.
        hint: what the row advises; None where nothing that leaves the model's result alone is known.
    """

    plant: Callable[[Garden, Place], None]
    reason: Reason
    detail: str
    folded: str = ""
    line: str = PLANTED
    config: PassConfig = field(default_factory=PassConfig)
    providers: tuple[str, ...] = ()
    layers: int = planted.LAYERS
    at_norm: bool = False
    hint: str | None = None


OBSTACLES = {
    "slice": Obstacle(planted.a_slice, Reason.OP, "aten.slice.Tensor stands between all_reduce and"),
    "reshape": Obstacle(planted.a_reshape, Reason.OP, "aten.reshape.default stands between all_reduce and"),
    "transpose": Obstacle(planted.a_transpose, Reason.OP, "aten.permute.default stands between all_reduce and"),
    "clone": Obstacle(
        planted.a_clone, Reason.LAYOUT, "aten.clone.default stands between", config=PassConfig(eliminate_noops=False),
        hint="drop the copy, or leave eliminate_noops on, which sees through it",
    ),
    "dtype cast": Obstacle(
        planted.a_cast, Reason.DTYPE, "fused_add_rms_norm: float32 is cast to bfloat16",
        folded="it norms a float32 sum of",
    ),
    "extra user": Obstacle(planted.an_extra_user, Reason.USERS, "is also read by aten.sum.default"),
    "dead output": Obstacle(
        planted.a_dead_output, Reason.DEAD, "is its result not used?", line="", layers=4, at_norm=True
    ),
    "fp32 weight": Obstacle(
        planted.an_fp32_weight, Reason.DTYPE, "weight is float32 and x is bfloat16", line="", at_norm=True
    ),
    "in-place add": Obstacle(
        planted.an_in_place_add, Reason.MUTATION, "add_, an in-place op", hint="add it to the residual"
    ),
    "different group": Obstacle(
        planted.another_group, Reason.GROUP, "another all_reduce, over group '0'", line="helpers.py:"
    ),
    "unsupported hidden size": Obstacle(
        planted.an_unsupported_hidden_size, Reason.SIZE, "hidden sizes that are multiples of 8",
        config=PassConfig(allow_rounding_changes=True), providers=("flashinfer",), at_norm=True,
        hint="let another provider run it",
    ),
    "disabled flag": Obstacle(
        planted.nothing, Reason.DISABLED, "fuse_allreduce_rms=False switches it off", line="",
        config=PassConfig(fuse_allreduce_rms=False), hint="leave fuse_allreduce_rms out, or set it to True",
    ),
}  # fmt: skip


def planted_in() -> Iterator[Any]:
    """Every obstacle in one model by day, and every model with two or three of them; in all models at night."""
    for at, name in enumerate(OBSTACLES):
        by_day = WORKLOADS[at % len(WORKLOADS)]
        for workload in WORKLOADS:
            yield pytest.param(name, workload, marks=[pytest.mark.nightly] * (workload != by_day))


@pytest.mark.parametrize(("name", "workload"), list(planted_in()))
def test_the_first_cause_is_the_planted_obstacle(name: str, workload: str) -> None:
    obstacle = OBSTACLES[name]
    if KEEPS_FLOAT32_RESIDUAL and workload == GPT_OSS and obstacle.providers:
        pytest.skip("its residual stream is in float32, which stands before the planted obstacle")
    with garden(workload, obstacle.layers) as made:
        place = random.Random(f"{name} in {workload}").choice(made.places)
        obstacle.plant(made, place)
        report = explain(made, obstacle.config, obstacle.providers)
    # What is said of attention that isn't torch's comes before what other layers have.
    first = next(row for row in report.near_misses if row.rule != "grouped_attention")
    assert first.rule in ("allreduce_rms", "act_padding")
    is_folded = bool(obstacle.folded) and obstacle.folded in first.detail
    assert (first.reason, obstacle.detail in first.detail or is_folded) == (obstacle.reason, True), first
    assert first.fix == obstacle.hint
    if name == "disabled flag":
        assert first.count == len(first.sites) > len(made.places) / 2
        assert place.norm in first.sites
        return
    assert first.count == 1
    assert first.sites == (place.norm,)
    expected = place.norm if obstacle.at_norm or is_folded else place.reduced
    assert first.source is not None
    assert first.source.startswith(expected)
    if not is_folded:
        assert first.line is None if name == "dead output" else str(first.line).startswith(obstacle.line)


@pytest.mark.parametrize("workload", [GPT_OSS, "llama"])
def test_nothing_is_near_where_nothing_is_planted(workload: str) -> None:
    with garden(workload) as made:
        report = explain(made, PassConfig(), ())
    assert {miss.nearness for miss in report.near_misses} <= {Nearness.DECLINED, Nearness.ABSENT}
    assert report.matched["allreduce_rms"] >= len(made.places)
