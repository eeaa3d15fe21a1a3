"""What ranks keep for their groups, apart from any library: made once, found by size, never in each other's way."""

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch.distributed as dist

from fuseplan.distributed import shared
from fuseplan.distributed.shared import Kind, Registry
from fuseplan.errors import CollectiveError
from tests.providers.stand_ins import ranks


def get(registry: Registry, kind: Kind[Any], group: str, value: Any, key: str = "k") -> Any:
    return registry.get(kind, group, key, rows=1, capacity=1, make=lambda _: value() if callable(value) else value)


def test_the_least_that_holds_the_rows_is_taken() -> None:
    made: list[int] = []
    released: list[int] = []
    kind, registry = Kind(name="a library", release=released.append), Registry()

    def get(group: str, rows: int, capacity: int, key: str = "k") -> int:
        def make(_: dist.ProcessGroup) -> int:
            made.append(capacity)
            return capacity

        return registry.get(kind, group, key, rows=rows, capacity=capacity, make=make)

    with ranks(2) as group:
        asked = ((3, 4), (9, 16), (4, 8), (5, 8), (16, 99))
        assert [get(group, *each) for each in asked] == [4, 16, 4, 16, 16]
        assert get(group, 1, 2, key="other") == 2
    assert made == [4, 16, 2]
    registry.release(kind)
    assert sorted(released) == [2, 4, 16]
    registry.release()
    assert len(released) == 3


def test_kinds_are_kept_apart() -> None:
    one, other, registry = Kind[str](name="one"), Kind[str](name="other"), Registry()
    with ranks(2) as group:
        assert [get(registry, kind, group, kind.name) for kind in (one, other)] == ["one", "other"]
    assert (registry.values(one), registry.values(other)) == (["one"], ["other"])
    registry.release(one)
    assert (registry.values(one), registry.values(other)) == ([], ["other"])


def test_one_that_can_not_be_made_is_asked_for_again() -> None:
    kind, registry = Kind[int](name="a library"), Registry()
    tries: list[int] = []

    def make() -> int:
        tries.append(1)
        if len(tries) == 1:
            raise MemoryError
        return 7

    with ranks(2) as group:
        with pytest.raises(MemoryError):
            get(registry, kind, group, make)
        assert get(registry, kind, group, make) == 7
    assert len(tries) == 2


def test_whoever_waits_for_other_ranks_keeps_nobody_else_waiting() -> None:
    """Two threads that make for two keys, each only once the other has begun."""
    kind, registry = Kind[int](name="a library"), Registry()
    begun = threading.Barrier(2, timeout=20)

    with ranks(2) as group, ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(get, registry, kind, group, begun.wait, key) for key in ("a", "b")]
        assert {each.result() for each in asked} == {0, 1}


def test_several_threads_make_one() -> None:
    kind, registry, made = Kind[int](name="a library"), Registry(), list[int]()

    def make() -> int:
        made.append(len(made))
        return made[-1]

    with ranks(2) as group, ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(get, registry, kind, group, make) for _ in range(8)]
        assert {each.result() for each in asked} == {0}
    assert made == [0]


def test_what_a_graph_has_captured_stays_when_its_group_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    released: list[str] = []
    kind, registry = Kind(name="a library", release=released.append), Registry()

    for key in ("captured", "eager", "last"):
        with ranks(1) as group, monkeypatch.context() as patched:
            get(registry, kind, group, key, key)
            patched.setattr(shared, "capturing", lambda key=key: key == "captured")
            assert get(registry, kind, group, key, key) == key
    assert released == ["eager"]
    assert registry.values(kind) == ["captured", "last"]
    registry.release()
    assert sorted(released) == ["captured", "eager", "last"]


def test_none_is_made_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    kind, registry = Kind[int](name="a library"), Registry()
    monkeypatch.setattr(shared, "capturing", lambda: True)
    with ranks(2) as group, pytest.raises(CollectiveError, match=r"a library has no memory for 5 rows .* at this size"):
        registry.get(kind, group, "k", rows=5, capacity=8, make=lambda _: 1)


def test_more_rows_than_a_library_takes_are_refused() -> None:
    kind: Kind[Any] = Kind(name="a library")
    kind.require(4, 4, "0")
    with pytest.raises(CollectiveError, match="a library takes up to 4 rows of this width over group '0', not 5"):
        kind.require(5, 4, "0")


def test_they_are_given_back_when_the_process_ends() -> None:
    code = (
        "from fuseplan.distributed.shared import SHARED, Kind\n"
        "from tests.providers.stand_ins import ranks\n"
        "kind = Kind(name='a library', release=lambda workspace: print('released', workspace))\n"
        "with ranks(2) as group:\n"
        "    SHARED.get(kind, group, 'k', rows=1, capacity=1, make=lambda group: 'it')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "released it\n"
