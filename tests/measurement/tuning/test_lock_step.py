"""Ranks as threads that share a store."""

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from torch._C._distributed_c10d import HashStore

from fuseplan.errors import ConfigError, RanksError
from fuseplan.measurement.tuning import LockStep
from fuseplan.measurement.tuning import lock_step as module


def together(*of_rank: Callable[[LockStep], Any], deadline_s: float = 20.0) -> list[Any]:
    """What each rank returns or raises."""
    store, results = HashStore(), [None] * len(of_rank)

    def run(rank: int) -> None:
        ranks = LockStep(store, rank, len(of_rank), deadline_s=deadline_s, leave=lambda text: None)
        try:
            results[rank] = of_rank[rank](ranks)
        except Exception as error:  # noqa: BLE001 - it is what the test looks at
            results[rank] = error  # type: ignore[call-overload]

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(of_rank))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return results


def test_every_rank_gets_what_all_say_in_order() -> None:
    def talk(ranks: LockStep) -> Any:
        return [ranks.exchange({"rank": ranks.rank, "turn": turn}) for turn in range(3)]

    expected = [[{"rank": rank, "turn": turn} for rank in range(3)] for turn in range(3)]
    assert together(talk, talk, talk) == [expected] * 3


def test_a_rank_that_fails_ends_the_others_and_one_of_them_tells() -> None:
    def wait(ranks: LockStep) -> Any:
        try:
            return ranks.exchange(1)
        except RanksError as error:
            return error.reported, str(error), ranks.fail(error)

    def fail(ranks: LockStep) -> Any:
        return ranks.fail(ConfigError("no such\nthing"))

    reported = (True, "rank 1: ConfigError: no such thing", False)
    assert together(wait, fail, wait) == [reported, True, reported]


def test_of_two_that_fail_one_tells() -> None:
    def fail(ranks: LockStep) -> Any:
        return ranks.fail(ConfigError("both"))

    assert sorted(together(fail, fail)) == [False, True]


def test_a_rank_that_does_not_come_is_an_error_after_the_deadline() -> None:
    error, _ = together(lambda ranks: ranks.exchange(1), lambda ranks: None, deadline_s=0.1)
    assert isinstance(error, RanksError)
    assert str(error) == "rank 1 did not come within 0.1 s"
    assert not error.reported


@pytest.mark.parametrize(("fails", "deadline_s"), [(True, 20.0), (False, 0.05)])
def test_who_waits_inside_a_kernel_is_ended(monkeypatch: pytest.MonkeyPatch, fails: bool, deadline_s: float) -> None:
    """Another rank failed, which tells; or none came, of which this one tells."""
    monkeypatch.setattr(module, "WATCH_S", 0.02)
    store, left = HashStore(), list[str]()
    ranks = LockStep(store, 0, 2, deadline_s=deadline_s, leave=left.append)
    if fails:
        LockStep(store, 1, 2, deadline_s=1.0, leave=left.append).fail(ConfigError("x"))
    with ranks.watched():
        end = time.monotonic() + 20
        while not left and time.monotonic() < end:
            time.sleep(0.01)
    assert left[0] == ("" if fails else "rank 0 waited for the others for 0.1 s")
