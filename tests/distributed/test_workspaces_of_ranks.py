"""Two processes, and at night four, with gloo make workspaces: all have one, or all know why not, and soon."""

from typing import Any

import pytest

from tests.forks import Forks
from tests.ranks import seen_by_ranks, variables_of_ranks

Ranks = list[dict[str, Any]]

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.nightly)])
def ranks(request: pytest.FixtureRequest, forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    count, folder = request.param, tmp_path_factory.mktemp("workspaces")
    port = variables_of_ranks(count)[0]["MASTER_PORT"]
    return seen_by_ranks(forks, "tests.distributed.run_workspaces", count, folder, statuses=[0] * count, PORT=port)


def test_threads_that_come_in_opposite_orders_do_not_wait_for_each_other(ranks: Ranks) -> None:
    for rank in ranks:
        assert rank["opposite_orders"] == [None] * 6


def test_a_rank_without_memory_is_an_error_on_all_until_it_has_some(ranks: Ranks) -> None:
    for rank in ranks:
        first, second = rank["no_memory_on_the_last"]
        assert f"rank {len(ranks) - 1} fails: OutOfMemoryError: CUDA out of memory; forbid kernels" in first
        assert second is None


def test_a_rank_that_is_late_keeps_nobody_longer_than_its_group_does(ranks: Ranks) -> None:
    for rank in ranks:
        first, second = rank["the_last_is_late"]
        assert f"rank {len(ranks) - 1} didn't come within 0.5 s" in first
        assert second is None
        assert rank["the_last_has_no_plan"] == f"rank {len(ranks) - 1} had no plan for it within 0.5 s"


def test_a_rank_that_can_not_share_memory_has_all_plan_again_without_it(ranks: Ranks) -> None:
    why = f"rank {len(ranks) - 1} can't share memory: AssertionError: an internal error"
    for rank in ranks:
        found = rank["planned again"]
        assert found["right"]
        assert found["providers"][0] == ["shares"]
        assert "shares" not in found["providers"][-1]
        assert any(
            f"planned again without kernels that share memory between ranks: {why}" in each
            for each in found["warnings"]
        )


def test_what_is_forced_and_can_not_share_memory_is_run_unfused(ranks: Ranks) -> None:
    for rank in ranks:
        assert rank["forced"]["right"]
        assert rank["forced"]["providers"][0] == ["shares"]
        assert rank["forced"]["providers"][-1] == []
