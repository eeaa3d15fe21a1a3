"""What libraries whose kernels reduce over ranks keep for each process group: made at first need, released at exit."""

import atexit
import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
import torch.distributed as dist

from fuseplan.errors import CollectiveError
from fuseplan.graph.facts import process_group

T = TypeVar("T")


@dataclass(frozen=True, eq=False, kw_only=True)
class _Entry(Generic[T]):
    group: dist.ProcessGroup
    group_name: str
    key: Hashable
    capacity: int
    workspace: T


class Workspaces(Generic[T]):
    """The workspaces of one library.

    A kernel asks for one in its first eager call of a size, which is before a graph is captured, and whether or not its
    graph came from a warm compile cache. All ranks of a group come to it in the same call, since they run one plan.

    Args:
        library: for a person.
        release: gives a workspace back; it doesn't communicate.
    """

    def __init__(self, library: str, release: Callable[[T], None]) -> None:
        self._library, self._release = library, release
        self._entries: list[_Entry[T]] = []
        self._lock = threading.Lock()
        atexit.register(self.release)

    def get(
        self,
        group_name: str,
        key: Hashable,
        rows: int,
        capacity: int,
        make: Callable[[dist.ProcessGroup], T],
    ) -> T:
        """The least workspace there is that holds so many rows, or a new one.

        Args:
            group_name: of the process group.
            key: what a workspace is made for, beside the group and its capacity.
            rows: of the call.
            capacity: rows that a new one holds.
            make: makes one; a collective of the group.

        Raises:
            CollectiveError: none is there yet and a CUDA graph is being captured.
        """
        group = process_group(group_name)
        assert group is not None, group_name
        with self._lock:
            self._drop(lambda entry: entry.group_name == group_name and entry.group is not group)
            for entry in self._entries:
                if entry.group is group and entry.key == key and entry.capacity >= rows:
                    return entry.workspace
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                raise CollectiveError(
                    f"{self._library} has no memory for {rows} rows over group {group_name!r} yet, and none can be "
                    "made while a graph is captured: run the model once at this size before"
                )
            made = _Entry(group=group, group_name=group_name, key=key, capacity=capacity, workspace=make(group))
            self._entries = sorted([*self._entries, made], key=lambda entry: entry.capacity)
            return made.workspace

    def require(self, rows: int, most_rows: int, group_name: str) -> None:
        """Refuses what the library's kernels would go wrong at.

        Raises:
            CollectiveError: more rows than that.
        """
        if rows > most_rows:
            raise CollectiveError(
                f"{self._library} takes up to {most_rows} rows of this width over group {group_name!r}, not {rows}: "
                "end the compile range there, or forbid the provider"
            )

    def release(self) -> None:
        """Gives all of them back."""
        with self._lock:
            self._drop(lambda entry: True)

    def _drop(self, goes: Callable[[_Entry[T]], bool]) -> None:
        """Those of a process group that is gone, say, whose name another one has now."""
        gone = [entry for entry in self._entries if goes(entry)]
        self._entries = [entry for entry in self._entries if entry not in gone]
        for entry in gone:
            self._release(entry.workspace)
