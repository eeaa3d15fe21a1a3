"""Steps that the ranks of a group take together, over its store: all of them go on, or all of them raise."""

import datetime
import random
import threading
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist
from torch.distributed import distributed_c10d

from fuseplan.distributed.agreement import agree, refused
from fuseplan.errors import CollectiveError
from fuseplan.record.text import one_line

T = TypeVar("T")
PREFIX = "fuseplan/meeting"
BUSY = "is busy with another group"
MOST_PATIENCE_S = 0.05
"""How long a thread waits for another one of its process, before it lets the other ranks try again."""

_COLLECTIVE = threading.Lock()


class Meeting:
    """A meeting of a group's ranks for one purpose, in any number of steps.

    Args:
        group: of the ranks.
        purpose: a verb and its object, the same on all of them.
        facts: a text that has to be equal on all of them.
        deadline: how long they wait for each other at each step.
        advice: what to do if they can't.
    """

    def __init__(
        self, group: dist.ProcessGroup, purpose: str, facts: str, deadline: datetime.timedelta, advice: str
    ) -> None:
        self._group, self._purpose, self._facts, self._deadline = group, purpose, facts, deadline
        self._advice = advice
        self._store = distributed_c10d._get_process_group_store(group)

    def step(self, take: Callable[[], T]) -> T:
        """The result of this rank's step, once all ranks have done theirs.

        Raises:
            CollectiveError: one of them failed, didn't come, or came with other facts.
        """
        failure, said = None, self._facts
        try:
            taken = take()
        except Exception as error:  # noqa: BLE001 - whatever it is, the others would wait for this rank
            failure, said = error, refused(f"fails: {type(error).__name__}: {one_line(error, 200)}")
        reason = self._ask(said)
        if reason is not None:
            raise self._error(reason) from failure
        return taken

    def collective(self, take: Callable[[], T]) -> T:
        """A step in which ranks wait for each other inside a library, which may hold the interpreter's lock. It begins
        once no rank is in another such step, or threads of two ranks could deadlock.

        Raises:
            CollectiveError: as for `step`.
        """
        while True:
            # A random time, so that two groups don't block each other for ever.
            free = _COLLECTIVE.acquire(timeout=random.uniform(0, MOST_PATIENCE_S))
            try:
                reason = self._ask(self._facts if free else refused(BUSY))
                if reason is None:
                    return self.step(take)
            finally:
                if free:
                    _COLLECTIVE.release()
            if not reason.endswith(BUSY):
                raise self._error(reason)

    def least(self, mine: int) -> int:
        """The least value of all ranks.

        Raises:
            CollectiveError: as for `step`.
        """
        name = f"{PREFIX}/{self._purpose}/least"
        self.step(lambda: self._store.set(f"{name}/{dist.get_rank(self._group)}", str(mine)))
        return min(int(self._store.get(f"{name}/{rank}")) for rank in range(self._group.size()))

    def _ask(self, said: str) -> str | None:
        """Why the ranks don't go on, or None."""
        verdict = agree(
            self._store, graph=f"{PREFIX}/{self._purpose}", rank=dist.get_rank(self._group), size=self._group.size(),
            digest=said, deadline=self._deadline, awaited="didn't come", differing="differ in how",
        )  # fmt: skip
        return verdict.reason

    def _error(self, reason: str) -> CollectiveError:
        name = self._group.group_name
        return CollectiveError(f"the ranks of group {name!r} can't {self._purpose}: {reason}; {self._advice}")
