"""Ranks settle on one verdict, whatever each of them saw. Threads over a store stand in for ranks."""

import datetime
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pytest
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore, HashStore, PrefixStore, Store
from torch.distributed import distributed_c10d

from fuseplan.distributed import agreement
from fuseplan.distributed.agreement import Agreement, agree, agree_in_groups, apart, failed, lost, refused
from fuseplan.errors import UnsupportedError
from tests.providers.stand_ins import ranks


def settle(
    store: Store, digests: Sequence[str | None], *, deadline: float = 5.0, delays: dict[int, float] | None = None
) -> list[Agreement]:
    """One thread a rank; None: the rank never comes."""

    def rank(number: int, digest: str) -> Agreement:
        time.sleep((delays or {}).get(number, 0.0))
        return agree(
            store, graph="g", rank=number, size=len(digests), digest=digest,
            deadline=datetime.timedelta(seconds=deadline),
        )  # fmt: skip

    with ThreadPoolExecutor(len(digests)) as pool:
        runs = [pool.submit(rank, number, digest) for number, digest in enumerate(digests) if digest is not None]
        return [run.result() for run in runs]


def unfused(reason: str, **more: Any) -> Agreement:
    return Agreement(fused=False, reason=reason, **more)


@pytest.mark.parametrize(
    ("digests", "verdict"),
    [
        (["plan"] * 2, Agreement(fused=True)),
        (["plan"] * 4, Agreement(fused=True)),
        (["plan", failed(RuntimeError("no\ncompiler")), "plan"],
         unfused("rank 1 could not compile it: RuntimeError: no compiler")),
        # What is left in a collective counts before what failed.
        ([refused("found it wrong"), lost("is left in it")], unfused("rank 1 is left in it", lost=True)),
        ([apart("far"), "plan"], unfused("rank 0 far", apart=True)),
        ([apart("far"), refused("no")], unfused("rank 1 no")),
        # Ranks that are late may be able to share nothing at all.
        ([apart("far"), None], unfused("rank 0 far")),
        ([None, "plan", None], unfused("rank 0, 2 had no plan for it within 0.3 s")),
    ],
)  # fmt: skip
def test_the_worst_that_a_rank_says_is_the_verdict_of_all(digests: list[str | None], verdict: Agreement) -> None:
    assert settle(HashStore(), digests, deadline=0.3 if None in digests else 5.0) == [verdict] * (
        len(digests) - digests.count(None)
    )


@pytest.mark.parametrize("size", [2, 4])
def test_case_9_pytorch_146707_plans_that_differ_are_run_by_nobody(size: int) -> None:
    """Per-rank timings chose different collectives: deadlock."""
    verdicts = settle(HashStore(), ["plan"] * (size - 1) + ["another"])
    assert verdicts == [unfused(f"rank 0 and rank {size - 1} planned differently")] * size


def test_one_that_never_comes_costs_the_deadline() -> None:
    start = time.monotonic()
    verdicts = settle(HashStore(), ["plan", None, "plan"], deadline=0.3)
    assert time.monotonic() - start < 5
    assert verdicts == [unfused("rank 1 had no plan for it within 0.3 s")] * 2


def test_one_that_is_late_is_told_what_the_others_settled_on() -> None:
    verdicts = settle(HashStore(), ["plan", "plan"], deadline=0.2, delays={1: 1.0})
    assert verdicts == [unfused("rank 1 had no plan for it within 0.2 s")] * 2


def test_one_that_is_slow_and_in_time_takes_part() -> None:
    assert settle(HashStore(), ["plan", "plan"], deadline=10.0, delays={1: 0.5}) == [Agreement(fused=True)] * 2


def test_compiled_again_is_settled_again() -> None:
    store = HashStore()
    assert settle(store, ["a", "b"])[0].fused is False
    assert settle(store, ["c", "c"])[0].fused is True
    assert settle(store, ["c", "d"])[0].fused is False


def test_groups_do_not_hear_each_other(tmp_path: object) -> None:
    """DP x TP: two groups of two, each over its own prefix of one store, which may lie in a file."""
    for store in (HashStore(), FileStore(f"{tmp_path}/store", 2)):
        left, right = PrefixStore("tp0", store), PrefixStore("tp1", store)
        assert [each.fused for each in settle(left, ["a", "a"])] == [True, True]
        assert [each.fused for each in settle(right, ["a", "b"])] == [False, False]


def test_every_race_has_one_verdict() -> None:
    """A rank whose deadline passes just as the other's digest comes must not believe itself alone."""
    for number in range(50):
        delay = 0.02 * (number % 5) / 2
        first, second = settle(HashStore(), ["plan", "plan"], deadline=0.02, delays={1: delay})
        assert first == second


class _Dead(HashStore):
    """A store whose server is gone."""

    def set(self, key: str, value: str) -> None:
        raise dist.DistNetworkError("Connection reset by peer")


def test_a_store_that_is_gone_is_an_error() -> None:
    with pytest.raises(UnsupportedError, match="could not agree on a plan, since its store doesn't answer: Connection"):
        agree(_Dead(), graph="g", rank=0, size=2, digest="a", deadline=datetime.timedelta(seconds=1))


def test_a_group_whose_other_ranks_do_not_exist_waits_for_none_of_them() -> None:
    with ranks(2) as group:
        verdict = agree_in_groups([group], graph="g", digest="a", deadline_s=1.0)
    assert verdict == Agreement(fused=True)


def test_a_rank_that_waits_looks_less_and_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []

    class Slow(HashStore):
        def check(self, keys: list[str]) -> bool:
            return len(keys) == 1 or len(pauses) > 7

    store = Slow()
    store.set("fuseplan/agreement/g/1/1", "plan")
    monkeypatch.setattr(time, "sleep", pauses.append)
    verdict = agree(store, graph="g", rank=0, size=2, digest="plan", deadline=datetime.timedelta(seconds=9))
    assert verdict == Agreement(fused=True)
    assert pauses == [0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.02, 0.02]


def test_a_rank_alone_asks_nobody(one_rank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "agree", lambda *_, **__: pytest.fail("the other ranks are asked"))
    for names in ([one_rank], []):
        assert agree_in_groups(names, graph="g", digest="a", deadline_s=1.0) == Agreement(fused=True)


class Group(NamedTuple):
    ranks: tuple[int, ...]

    def size(self) -> int:
        return len(self.ranks)


@pytest.mark.parametrize(
    ("groups", "asked"),
    [
        (((0, 1), (0, 1, 2, 3), (2, 3)), (0, 1, 2, 3)),
        (((0,), (0, 1)), (0, 1)),
        (((0, 1), (1, 2)), None),
        (((0, 1, 2), (2, 3)), None),
    ],
)
def test_the_group_that_has_all_ranks_of_the_others_settles(
    monkeypatch: pytest.MonkeyPatch, groups: tuple[tuple[int, ...], ...], asked: tuple[int, ...] | None
) -> None:
    found: list[tuple[Any, ...]] = []

    def agree(store: object, *, rank: int, size: int, deadline: datetime.timedelta, **rest: object) -> Agreement:
        found.append((store, rank, size, deadline.total_seconds(), rest))
        return Agreement(fused=True)

    monkeypatch.setattr(agreement, "resolve", lambda name: Group(groups[int(name)]))
    monkeypatch.setattr(dist, "get_backend", lambda group: "gloo")
    monkeypatch.setattr(dist, "get_process_group_ranks", lambda group: list(group.ranks))
    monkeypatch.setattr(dist, "get_rank", lambda group: 1)
    monkeypatch.setattr(distributed_c10d, "_get_process_group_store", lambda group: group.ranks)
    monkeypatch.setattr(agreement, "agree", agree)
    names = [str(number) for number in reversed(range(len(groups)))]
    verdict = agree_in_groups(names, graph="g", digest="d", deadline_s=2.0, work_s=0.5, awaited="is late")
    if asked is None:
        assert verdict == unfused("its collectives are of groups that overlap: 0, 1")
        assert not found
    else:
        rest = {"graph": "g", "digest": "d", "awaited": "is late"}
        assert (verdict.fused, found) == (True, [(asked, 1, len(asked), 2.5, rest)])
