"""Overhead of CPython: garbage collection, and memory for the frames of calls."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

Result = TypeVar("Result")

ROOM = 2**17
"""Slots of 8 bytes for a call stack, 1 MiB: Dynamo's, several hundred calls deep, takes a tenth."""


@contextmanager
def uncollected() -> Iterator[None]:
    """Disables cyclic garbage collection: tracing and planning keep nearly all their objects, and searching all nodes
    of a large graph again and again would make their time grow faster than the graph.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def with_room(function: Callable[[], Result]) -> Result:
    """`function()`, whose calls find their frames' memory mapped.

    CPython keeps frames in chunks of 16 KiB. A loop at the end of one maps a chunk with each call and unmaps it with
    each return (python/cpython#142183, fixed in 2026, not in 3.11 and 3.12): a third of the time that 80 layers took to
    trace. The frame of this function claims so many slots that its chunk has room for all calls below it. Unused memory
    is never touched.
    """
    return function()


with_room.__code__ = with_room.__code__.replace(co_stacksize=ROOM)
