"""fuseplan's Triton kernels: which there are, and what they do between ranks, by Triton's interpreter."""

import importlib.util
from typing import Any

import pytest

from fuseplan.dialect import ops, registered_kernel
from fuseplan.providers import BUILT_IN_PROVIDERS
from fuseplan.providers.triton import ACCEPTS
from tests.forks import Forks
from tests.ranks import seen_by_ranks

TRITON = next(each for each in BUILT_IN_PROVIDERS if each.name == "triton")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


def test_it_runs_every_fused_op() -> None:
    fused = {op.name for op in ops.values() if op.fused}
    assert set(TRITON.implements) == set(ACCEPTS) == fused
    assert all(registered_kernel(name, "triton") is not None for name in TRITON.implements)
    assert not TRITON.prices


@pytest.fixture(scope="module", params=[2, 4, pytest.param(8, marks=pytest.mark.nightly)])
def between_ranks(
    request: pytest.FixtureRequest, interpreting_forks: Forks, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """What each of so many ranks saw."""
    ranks, folder = request.param, tmp_path_factory.mktemp("ranks")
    module = "tests.providers.run_ranks_interpreted"
    return seen_by_ranks(interpreting_forks, module, ranks, folder, statuses=[0] * ranks)


@needs_triton
def test_all_reduces_between_ranks(between_ranks: list[dict[str, Any]]) -> None:
    """One shot and two, larger calls and smaller in turns, at the capacity, and a rank that doesn't come."""
    ranks = len(between_ranks)
    for rank in between_ranks:
        assert len(rank["calls"]) == (8 if ranks == 2 else 21)
        assert all(rank["calls"] + rank["chosen"])
        assert len(rank["loopback"]) == (8 if ranks == 2 else 14)
        assert all(rank["loopback"])
        assert not any(rank["left"])
        assert rank["minus zero"]
        assert rank.get("capacity", []) == ([[True, 1], [True, 1], [True, 2]] if ranks == 2 else [])
    numbers, first, second = between_ranks[0]["deadline"]
    assert numbers == "NaN"
    assert first == second
    assert "waited 0.0002 s for rank" in first


@needs_triton
def test_ranks_on_unlike_cards_share_one_layout(between_ranks: list[dict[str, Any]]) -> None:
    assert [rank["unlike"] for rank in between_ranks] == [[2, True, True, True, True]] * len(between_ranks)


def seen_with(between_ranks: list[dict[str, Any]], kind: str, shots: int) -> list[dict[str, Any]]:
    """What each rank saw of a rank that is missing, or late; two have but one shot."""
    name = f"{kind}, {shots} shots"
    if len(between_ranks) == 2 and shots == 2:
        assert name not in between_ranks[0]
        return []
    return [rank[name] for rank in between_ranks]


@needs_triton
@pytest.mark.parametrize("shots", [1, 2])
def test_after_a_rank_went_missing_all_calls_are_nan_and_only_one_waits(
    between_ranks: list[dict[str, Any]], shots: int
) -> None:
    """Nobody asks the host between the calls, as in replays of a graph."""
    seen = seen_with(between_ranks, "missing", shots)
    for away in seen[-1:]:
        assert away["outcomes"] == ["right"] * 2
        assert away["raised"] is None
    for rank in seen[:-1]:
        assert rank["outcomes"][:2] == ["right"] * 2
        # A tile that was sent before may still be right, in the call that failed.
        assert rank["outcomes"][2] in ("NaN", "right or NaN")
        assert rank["outcomes"][3:] == ["NaN"] * 3
        assert 0 < rank["waits"][2] <= 2 * len(between_ranks) * 40
        assert rank["waits"][3:] == [0] * 3
        assert "results since then are NaN" in rank["raised"]


@needs_triton
@pytest.mark.parametrize("shots", [1, 2])
def test_what_comes_too_late_is_never_taken_for_another_calls(between_ranks: list[dict[str, Any]], shots: int) -> None:
    """It lies in a slot whose turn comes again three calls later."""
    for found in seen_with(between_ranks, "late", shots):
        assert found["outcomes"][:2] == ["right"] * 2
        assert found["outcomes"][2] in ("right", "NaN", "right or NaN")
        assert found["outcomes"][3] in ("NaN", "right or NaN")
        assert found["outcomes"][4:] == ["NaN"] * 3
        assert found["waits"][4:] == [0] * 3
        assert "results since then are NaN" in found["raised"]
