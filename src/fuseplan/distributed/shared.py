"""Shared objects of process groups, made by all ranks together: fuseplan's own workspaces and those of libraries, in
one registry.
"""

import atexit
import collections
import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

import torch
import torch.distributed as dist

from fuseplan.distributed.groups import resolve
from fuseplan.errors import CollectiveError

T = TypeVar("T")


@dataclass(frozen=True, eq=False, kw_only=True)
class Kind(Generic[T]):
    """The shared objects of one library.

    Attributes:
        name: of the library, for a person.
        release: frees one; it doesn't communicate. None: it is freed with its last reference.
    """

    name: str
    release: Callable[[T], None] | None = None

    def require(self, rows: int, most_rows: int, group_name: str) -> None:
        """Refuses calls that the library's kernels can't serve.

        Raises:
            CollectiveError: `rows` exceeds `most_rows`.
        """
        if rows > most_rows:
            raise CollectiveError(
                f"{self.name} takes up to {most_rows} rows of this width over group {group_name!r}, not {rows}: "
                "end the compile range there, or forbid the provider"
            )


@dataclass(eq=False, kw_only=True)
class _Entry:
    kind: Kind[Any]
    group: dist.ProcessGroup
    group_name: str
    key: Hashable
    capacity: int
    value: Any
    captured: bool = False
    """Whether a CUDA graph points to it, which may be replayed at any time."""


class Registry:
    """The shared objects of this process, by kind, group, key and capacity.

    A kernel gets one in its first eager call of a size, which is before a graph is captured, whether or not its graph
    came from a warm compile cache. All ranks of a group do so in the same call, since they run one plan.
    """

    def __init__(self) -> None:
        self._entries: tuple[_Entry, ...] = ()
        self._making: collections.defaultdict[Hashable, threading.Lock] = collections.defaultdict(threading.Lock)
        self._lock = threading.Lock()

    def get(
        self, kind: Kind[T], group_name: str, key: Hashable, *, rows: int, capacity: int,
        make: Callable[[dist.ProcessGroup], T],
    ) -> T:  # fmt: skip
        """The smallest one that holds so many rows, or a new one.

        Where another group has taken the name, the first group's objects are freed, except those that CUDA graphs have
        captured: these may still be replayed.

        Args:
            kind: of the object.
            group_name: of the process group.
            key: further properties of it, such as device and dtype, beside the group and its capacity.
            rows: of the call.
            capacity: rows that a new one holds.
            make: makes one; a collective of the group.

        Raises:
            CollectiveError: there is none yet and a CUDA graph is being captured.
        """
        group = resolve(group_name)
        found = self._find(kind, group, key, rows)
        if found is not None:
            return found  # type: ignore[no-any-return]
        with self._lock:
            making = self._making[kind, group_name, key]
        # The thread that makes one waits for the other ranks, and these may wait for another thread of this rank with
        # another group: no other lock is held meanwhile.
        with making:
            found = self._find(kind, group, key, rows)
            if found is not None:
                return found  # type: ignore[no-any-return]
            if capturing():
                raise CollectiveError(
                    f"{kind.name} has no memory for {rows} rows over group {group_name!r} yet, and none can be made "
                    "while a graph is captured: run the model once at this size before"
                )
            value = make(group)
            made = _Entry(kind=kind, group=group, group_name=group_name, key=key, capacity=capacity, value=value)
            with self._lock:
                gone = [
                    each
                    for each in self._entries
                    if each.group_name == group_name and each.group is not group and not each.captured
                ]
                kept = [each for each in self._entries if each not in gone]
                self._entries = tuple(sorted([*kept, made], key=lambda entry: entry.capacity))
            _give_back(gone)
            return value

    def _find(self, kind: Kind[Any], group: dist.ProcessGroup, key: Hashable, rows: int) -> Any:
        for entry in self._entries:
            if entry.kind is kind and entry.group is group and entry.key == key and entry.capacity >= rows:
                entry.captured = entry.captured or capturing()
                return entry.value
        return None

    def values(self, kind: Kind[T]) -> list[T]:
        """All objects of a kind."""
        return [entry.value for entry in self._entries if entry.kind is kind]

    def release(self, kind: Kind[Any] | None = None) -> None:
        """Frees all objects of a kind; None: of all kinds."""
        with self._lock:
            gone = [each for each in self._entries if kind in (None, each.kind)]
            self._entries = tuple(each for each in self._entries if each not in gone)
        _give_back(gone)


def _give_back(entries: list[_Entry]) -> None:
    for entry in entries:
        if entry.kind.release is not None:
            entry.kind.release(entry.value)


def capturing() -> bool:
    """Whether launches are captured now, and not run."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


SHARED: Final = Registry()
"""This process's registry; freed when it ends."""
atexit.register(SHARED.release)
