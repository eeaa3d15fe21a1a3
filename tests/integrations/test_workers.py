"""Two workers of vLLM's, with gloo: what neither can verify alone they verify together, before their model runs."""

import socket
from typing import Any

import pytest

from tests.forks import Forks
from tests.ranks import seen_by_ranks

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def workers(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("workers")
    return seen_by_ranks(forks, "tests.integrations.run_workers", 2, folder, statuses=[0, 0], PORT=str(port))


def test_a_kernel_in_which_ranks_meet_is_verified_once(workers: list[dict[str, Any]]) -> None:
    for worker in workers:
        settled = {"pending": [0], "verified": [[True, 2, [1, 8]]], "raised": None, "given_up": 0}
        assert worker["cold"] == worker["again"] == settled


def test_what_an_engine_that_ended_left_is_verified_from_the_report_that_is_kept(workers: list[dict[str, Any]]) -> None:
    """vLLM's cache may have the graph by then, and a warm start brings none."""
    for worker in workers:
        assert worker["killed"] == {"pending": [], "verified": [], "raised": None, "given_up": 0}
        assert worker["kept"] == [[0, 1]]


def test_a_kernel_that_is_wrong_on_one_rank_stops_the_engine_and_is_not_cached(workers: list[dict[str, Any]]) -> None:
    for worker in workers:
        assert worker["wrong"]["given_up"] == 1
        raised = worker["wrong"]["raised"]
        assert "rank 1 found allreduce_rms by wrong_on_rank_1 wrong at 1 tokens: result 0: element" in raised
        assert raised.endswith("if this comes again, forbid allreduce_rms:wrong_on_rank_1, or set FUSEPLAN=0")
        assert "\n" not in raised


def test_a_worker_whose_others_do_not_come_is_told(workers: list[dict[str, Any]]) -> None:
    """They found their graphs in a cache, say, and it didn't."""
    first, _ = workers
    assert "rank 1 had no plan for it within 0.5 s; start the engine again" in first["alone"]["raised"]
    assert "set VLLM_DISABLE_COMPILE_CACHE=1" in first["alone"]["raised"]
    assert first["alone"]["given_up"] == 1
