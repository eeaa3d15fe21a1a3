"""Ranks settle on one verdict, whatever each of them saw. Threads over a store stand in for ranks."""

import datetime
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore, HashStore, PrefixStore, Store
from torch.testing._internal.distributed.fake_pg import FakeStore

from fuseplan.distributed.agreement import Verdict, agree, agree_in_groups, failed, lost, refused
from fuseplan.errors import UnsupportedError


def settle(
    store: Store, digests: Sequence[str | None], *, deadline: float = 5.0, delays: dict[int, float] | None = None
) -> list[Verdict]:
    """One thread a rank; None: the rank never comes."""

    def rank(number: int, digest: str) -> Verdict:
        time.sleep((delays or {}).get(number, 0.0))
        return agree(
            store, graph="g", rank=number, size=len(digests), digest=digest,
            deadline=datetime.timedelta(seconds=deadline),
        )  # fmt: skip

    with ThreadPoolExecutor(len(digests)) as pool:
        runs = [pool.submit(rank, number, digest) for number, digest in enumerate(digests) if digest is not None]
        return [run.result() for run in runs]


@pytest.mark.parametrize("size", [2, 4])
def test_equal_plans_are_run_by_all(size: int) -> None:
    assert settle(HashStore(), ["plan"] * size) == [Verdict(fused=True)] * size


@pytest.mark.parametrize("size", [2, 4])
def test_case_9_pytorch_146707_plans_that_differ_are_run_by_nobody(size: int) -> None:
    """Per-rank timings chose different collectives: deadlock."""
    verdicts = settle(HashStore(), ["plan"] * (size - 1) + ["another"])
    assert verdicts == [Verdict(fused=False, reason=f"rank 0 and rank {size - 1} planned differently")] * size


def test_one_that_failed_sends_all_to_unfused() -> None:
    verdicts = settle(HashStore(), ["plan", failed(RuntimeError("no\ncompiler")), "plan"])
    assert verdicts == [Verdict(fused=False, reason="rank 1 could not compile it: RuntimeError: no compiler")] * 3


def test_one_that_is_left_in_a_collective_counts_before_one_that_failed() -> None:
    verdicts = settle(HashStore(), [refused("found it wrong"), lost("is left in it")])
    assert verdicts == [Verdict(fused=False, reason="rank 1 is left in it", lost=True)] * 2


def test_one_that_never_comes_costs_the_deadline() -> None:
    start = time.monotonic()
    verdicts = settle(HashStore(), ["plan", None, "plan"], deadline=0.3)
    assert time.monotonic() - start < 5
    assert verdicts == [Verdict(fused=False, reason="rank 1 had no plan for it within 0.3 s")] * 2


def test_one_that_is_late_is_told_what_the_others_settled_on() -> None:
    verdicts = settle(HashStore(), ["plan", "plan"], deadline=0.2, delays={1: 1.0})
    assert verdicts == [Verdict(fused=False, reason="rank 1 had no plan for it within 0.2 s")] * 2


def test_one_that_is_slow_and_in_time_takes_part() -> None:
    assert settle(HashStore(), ["plan", "plan"], deadline=10.0, delays={1: 0.5}) == [Verdict(fused=True)] * 2


def test_compiled_again_is_settled_again() -> None:
    store = HashStore()
    assert settle(store, ["a", "b"])[0].fused is False
    assert settle(store, ["c", "c"])[0].fused is True
    assert settle(store, ["c", "d"])[0].fused is False


def test_groups_do_not_hear_each_other() -> None:
    """DP x TP: two groups of two, each over its own prefix of one store."""
    store = HashStore()
    left, right = PrefixStore("tp0", store), PrefixStore("tp1", store)
    assert [each.fused for each in settle(left, ["a", "a"])] == [True, True]
    assert [each.fused for each in settle(right, ["a", "b"])] == [False, False]


def test_a_store_in_a_file_will_do(tmp_path: object) -> None:
    path = f"{tmp_path}/store"
    assert [each.fused for each in settle(FileStore(path, 2), ["a", "a"])] == [True, True]


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
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        assert dist.group.WORLD is not None
        verdict = agree_in_groups([dist.group.WORLD.group_name], graph="g", digest="a", deadline_s=1.0)
    finally:
        dist.destroy_process_group()
    assert verdict == Verdict(fused=True)
