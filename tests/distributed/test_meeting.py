"""Steps that all ranks take, or none. Threads over a store stand in for ranks."""

import datetime
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from operator import methodcaller
from typing import Any, NamedTuple

import pytest
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, Store
from torch.distributed import distributed_c10d

from fuseplan.distributed import Agreement, meeting
from fuseplan.distributed.meeting import BUSY, Meeting
from fuseplan.errors import CollectiveError


class Rank(NamedTuple):
    """What a meeting asks of a process group."""

    store: Store
    rank: int
    ranks: int
    group_name: str = "7"

    def size(self) -> int:
        return self.ranks


@pytest.fixture(autouse=True)
def groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed_c10d, "_get_process_group_store", lambda group: group.store)
    monkeypatch.setattr(dist, "get_rank", lambda group: group.rank)


def met(group: Any, facts: str = "facts", seconds: float = 5.0) -> Meeting:
    return Meeting(group, "share memory", facts, datetime.timedelta(seconds=seconds), "forbid it")


def together(take: Sequence[Callable[[Meeting], Any]], facts: Sequence[str] = ("facts",) * 3) -> list[Any]:
    """What each rank comes to, or why it doesn't."""
    store = HashStore()

    def rank(number: int) -> Any:
        try:
            return take[number](met(Rank(store, number, len(take)), facts[number]))
        except CollectiveError as error:
            return error

    with ThreadPoolExecutor(len(take)) as pool:
        return list(pool.map(rank, range(len(take))))


def fails() -> None:
    raise MemoryError("none is\nleft")


def test_a_step_is_taken_by_all() -> None:
    assert together([lambda at: (at.step(lambda: 1), at.step(lambda: 2))] * 2) == [(1, 2)] * 2


def test_a_step_that_fails_on_one_rank_fails_on_all() -> None:
    taken: list[str] = []

    def other(at: Meeting) -> None:
        at.step(lambda: taken.append("first"))
        at.step(lambda: taken.append("second"))

    right, wrong = together([other, lambda at: at.step(fails)])
    said = "the ranks of group '7' can't share memory: rank 1 fails: MemoryError: none is left; forbid it"
    assert [str(right), str(wrong)] == [said, said]
    assert [type(each.__cause__) for each in (right, wrong)] == [type(None), MemoryError]
    assert taken == ["first"]


def test_ranks_that_come_with_other_facts_do_not_go_on() -> None:
    found = together([lambda at: at.step(lambda: 1)] * 2, ["2 512", "4 512"])
    assert [str(each).split(": ", 1)[1] for each in found] == ["rank 0 and rank 1 differ in how; forbid it"] * 2


def test_a_rank_that_does_not_come_is_waited_for_no_longer_than_said() -> None:
    with pytest.raises(CollectiveError, match=r"rank 1, 2 didn't come within 0\.05 s; forbid it"):
        met(Rank(HashStore(), 0, 3), seconds=0.05).step(lambda: 1)


def test_the_least_of_all_is_known_to_all() -> None:
    assert together([methodcaller("least", own) for own in (132, 78, 114)]) == [78] * 3


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """What ranks hear that say what they are told to, and agree then."""

    def agree(*reasons: str) -> list[str]:
        left, found = [*reasons], list[str]()

        def answer(store: object, *, digest: str, **rest: object) -> Agreement:
            found.append(digest)
            return Agreement(fused=not left, reason=left.pop(0) if left else None)

        monkeypatch.setattr(meeting, "agree", answer)
        return found

    return agree


def is_free() -> bool:
    """Whether the next collective can begin."""
    free = meeting._COLLECTIVE.acquire(blocking=False)
    if free:
        meeting._COLLECTIVE.release()
    return free


def test_a_collective_is_begun_once_no_rank_is_in_another_one(heard: Callable[..., list[str]]) -> None:
    said, taken = heard(f"rank 1 {BUSY}", f"rank 1 {BUSY}"), list[int]()
    met(Rank(HashStore(), 0, 2)).collective(lambda: taken.append(len(said)))
    assert taken == [3], "in front of it the ranks have asked each other three times"
    assert said == ["facts"] * 4
    assert is_free()


def test_a_rank_whose_other_thread_is_in_a_collective_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    said, begun, ends = list[str](), threading.Event(), threading.Event()

    def busy(store: object, *, digest: str, **rest: object) -> Agreement:
        said.append(digest)
        if digest == "facts":
            return Agreement(fused=True)
        ends.set()
        return Agreement(fused=False, reason=f"rank 0 {BUSY}")

    def other() -> None:
        with meeting._COLLECTIVE:
            begun.set()
            ends.wait(20)

    monkeypatch.setattr(meeting, "agree", busy)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(other)
        begun.wait(20)
        assert met(Rank(HashStore(), 0, 2)).collective(lambda: 7) == 7
        running.result()
    assert said[0] == f"failed: {BUSY}"
    assert said[-2:] == ["facts", "facts"]


def test_a_collective_that_can_not_be_begun_is_not_taken(heard: Callable[..., list[str]]) -> None:
    heard("rank 1 didn't come")
    with pytest.raises(CollectiveError, match="can't share memory: rank 1 didn't come; forbid it"):
        met(Rank(HashStore(), 0, 2)).collective(lambda: pytest.fail("it is taken"))
    assert is_free()
