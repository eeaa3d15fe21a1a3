"""Calls and garbage: that what is declared to cost nothing costs nothing, wherever in the call stack it stands."""

import gc
import resource
import sys

import pytest

from fuseplan.cpython import uncollected, with_room

DEPTHS, CALLS = 300, 400
"""Frames of more than one chunk, and calls at each depth."""


def leaf() -> None:
    pass


def faults(depth: int) -> int:
    """Pages mapped by calls at a depth."""
    if depth:
        return faults(depth - 1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(CALLS):
        leaf()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def worst() -> int:
    return max(map(faults, range(DEPTHS)))


def test_with_room_no_depth_maps_memory_at_each_call() -> None:
    assert with_room(worst) < CALLS / 4


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="CPython keeps a chunk since")
def test_without_room_some_depth_does() -> None:
    assert worst() >= CALLS


@pytest.mark.parametrize("collects", [True, False])
def test_collection_goes_on_as_it_did_before(collects: bool) -> None:
    @uncollected()
    def fail() -> None:
        assert not gc.isenabled()
        raise KeyError

    try:
        gc.enable() if collects else gc.disable()
        with pytest.raises(KeyError):
            fail()
        assert gc.isenabled() == collects
    finally:
        gc.enable()
