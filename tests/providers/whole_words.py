"""Triton's interpreter with one access for each element, as on GPUs, for kernels that read what another process writes.

Its own copies elements by `memcpy`, which in glibc 2.36 reads and writes the second byte of two once more: of a word
that comes in between it reads one byte from before and one from after, and what it writes anew may have been emptied.
"""

from types import SimpleNamespace
from typing import Any

import numpy as np
from triton.runtime import interpreter


def load(pointers: Any, mask: Any, other: Any, dtype: Any) -> Any:
    """`other` where `mask` isn't, else what is at each pointer."""
    result = np.array(np.broadcast_to(other, mask.shape)).astype(dtype)
    if mask.any():
        at = pointers[mask]
        memory, index = _memory(at, result.itemsize)
        result[mask] = memory[index].view(dtype)
    return result


def store(pointers: Any, values: Any, mask: Any) -> None:
    """Writes the values where `mask` is."""
    if mask.any():
        memory, index = _memory(pointers[mask], values.itemsize)
        memory[index] = values[mask].view(memory.dtype)


def install() -> None:
    """Has the interpreter of this process load and store like that."""
    own = interpreter._interpreter
    others = {name: getattr(own, name) for name in dir(own) if name not in ("load", "store")}
    interpreter._interpreter = SimpleNamespace(**others, load=load, store=store)


def _memory(pointers: Any, itemsize: int) -> tuple[Any, Any]:
    """(memory as an array of words, the index of each pointer in it). numpy copies aligned words of 8 bytes and less
    by one access each.
    """
    first = int(pointers.min())
    count = (int(pointers.max()) - first) // itemsize + 1
    assert first % itemsize == 0, "words lie at multiples of their size"
    place = {"data": (first, False), "shape": (count,), "typestr": f"<u{itemsize}", "version": 3}
    return np.asarray(SimpleNamespace(__array_interface__=place)), (pointers - np.uint64(first)) // np.uint64(itemsize)
