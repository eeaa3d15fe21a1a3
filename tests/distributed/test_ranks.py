"""Two processes with gloo: they run one plan, or none, whatever happens to one of them."""

from typing import Any

import pytest

from tests.forks import Forks
from tests.ranks import seen_by_ranks, variables_of_ranks

Ranks = tuple[dict[str, Any], dict[str, Any]]

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def ranks(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    folder = tmp_path_factory.mktemp("ranks")
    port = variables_of_ranks(2)[0]["MASTER_PORT"]
    first, second = seen_by_ranks(forks, "tests.distributed.run_ranks", 2, folder, statuses=[0, 7], PORT=port)
    return first, second


@pytest.mark.parametrize("name", ["equal plans", "rank 0 warm, rank 1 cold", "rank 0 warm without its report"])
def test_ranks_that_agree_run_fused(ranks: Ranks, name: str) -> None:
    for rank in ranks:
        assert rank[name]["right"]
        assert rank[name]["fused"] == [1]
        assert rank[name]["calls"] == 1
        assert rank[name]["warnings"] == []


def test_a_warm_rank_and_a_cold_one_were_both_there(ranks: Ranks) -> None:
    cached = [rank["rank 0 warm, rank 1 cold"]["cached"] for rank in ranks]
    assert cached == [[True], [False]]
    assert [rank["rank 0 warm without its report"]["cached"] for rank in ranks] == [[False], [True]]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("opposing plans", "rank 0 and rank 1 planned differently"),
        ("rank 1 late", "rank 1 had no plan for it within 0.5 s"),
    ],
)
def test_case_9_ranks_that_do_not_agree_run_unfused(ranks: Ranks, name: str, reason: str) -> None:
    for rank in ranks:
        assert rank[name]["right"]
        assert rank[name]["calls"] == 0
        assert rank[name]["fused"][-1] == 0
        assert sum(reason in warning for warning in rank[name]["warnings"]) == 1


def test_a_rank_that_raises_sends_the_others_to_unfused(ranks: Ranks) -> None:
    for rank in ranks:
        assert rank["rank 1 raises"]["right"]
        assert rank["rank 1 raises"]["calls"] == 0


def test_what_one_rank_could_not_verify_once_all_run_fused_from_the_next_start_on(ranks: Ranks) -> None:
    for rank in ranks:
        starts = rank["short of memory once"]
        assert all(start["right"] for start in starts)
        assert [start["calls"] for start in starts] == [0, 1, 1]
    cached = [[start["cached"] for start in rank["short of memory once"]] for rank in ranks]
    assert cached == [[[False], [True], [True]], [[False], [False], [True]]]


def test_kernels_in_which_ranks_meet_are_verified_in_lock_step_alone(ranks: Ranks) -> None:
    """A kernel that takes the other rank to hold what it holds itself is found out."""
    for rank in ranks:
        alone, together = rank["verified"]["alone"], rank["verified"]["in lock step"]
        assert all("its kernel is collective" in alone[name] for name in ("sums", "doubles"))
        assert alone["plays_both"] is None
        assert together["sums"] is None
        assert all(together[name].startswith("at 1 tokens: result 0: ") for name in ("doubles", "plays_both"))


@pytest.mark.parametrize("name", ["met", "met, rank 0 warm, rank 1 cold"])
def test_kernels_in_which_ranks_meet_are_verified_before_the_first_run_and_applied(ranks: Ranks, name: str) -> None:
    """From a warm compile cache too, which brings no graph."""
    for rank in ranks:
        assert rank[name]["right"]
        assert rank[name]["calls"] == 1
        assert rank[name]["warnings"] == []
        assert rank[name]["fused"] == [1, 1]
        assert rank[name]["pending"] == [1, 0]
        assert rank[name]["verified"] == [[True, 2, [1, 8]]]
    assert [rank["met, rank 0 warm, rank 1 cold"]["cached"] for rank in ranks] == [[True], [False]]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("wrong_on_rank_1", "rank 1 found allreduce_rms by wrong_on_rank_1 wrong at 1 tokens: result 0: element"),
        (
            "raises_on_rank_1",
            "rank 1 found allreduce_rms by raises_on_rank_1 wrong at 1 tokens: the kernel raises RuntimeError: no more",
        ),
        ("late to verify", "rank 1 did not come to verify allreduce_rms by sums within 1.5 s"),
    ],
)
def test_what_one_rank_finds_wrong_all_run_unfused(ranks: Ranks, name: str, reason: str) -> None:
    for rank in ranks:
        assert rank[name]["right"]
        assert rank[name]["calls"] == 0
        assert rank[name]["fused"] == [1, 0]
        assert rank[name]["pending"] == [1, 0]
        assert [passed for passed, _, _ in rank[name]["verified"]] == [False]
        (warning,) = rank[name]["warnings"]
        assert reason in warning
        assert warning.endswith(" or forbid allreduce_rms:" + ("sums" if name == "late to verify" else name))


def test_a_rank_that_is_left_in_a_kernel_is_an_error_on_all(ranks: Ranks) -> None:
    """What the group sends from then on could end up there."""
    for rank in ranks:
        first, second = rank["left in a kernel"]
        assert first == second
        assert first.startswith("rank 0 is left in the verification of allreduce_rms by stays_away_on_rank_1 at 1 tok")


def test_a_rank_that_dies_is_an_error_on_the_other(ranks: Ranks) -> None:
    """Nothing is computed without it, and nobody waits for ever."""
    assert ranks[0]["rank 1 dies"]["raised"] is not None
    assert ranks[0]["rank 1 dies"]["seconds"] < 120
