"""Ranks in lock step: they exchange values, and none waits for ever for one that is gone."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store
from torch.distributed import distributed_c10d

from fuseplan.errors import RanksError
from fuseplan.record.text import one_line

PREFIX = "fuseplan/tuning"
POLL_S, WATCH_S = 0.005, 1.0


class Ranks:
    """One rank alone, which waits for nobody.

    Attributes:
        rank: of this process.
        size: how many there are.
    """

    rank, size = 0, 1

    def exchange(self, value: Any) -> list[Any]:
        """The values of all ranks, in their order; each has to be JSON data.

        Raises:
            RanksError: a rank failed, or didn't come in time.
        """
        return [value]

    def align(self, device: torch.device) -> None:
        """Aligns the ranks, so that they start the next work together, as closely as the device allows."""


class LockStep(Ranks):
    """Several ranks that all enter `exchange` and `align` in the same order.

    Args:
        store: the ranks' shared store.
        rank: of this process.
        size: how many there are.
        deadline_s: seconds that one waits for the others.
        leave: ends this process where it can't end by itself, since it waits for another rank inside a kernel; called
            with a line for a person, empty where another rank reports it.
    """

    def __init__(self, store: Store, rank: int, size: int, *, deadline_s: float, leave: Callable[[str], None]) -> None:
        self.rank, self.size, self.deadline_s = rank, size, deadline_s
        self._store, self._leave = store, leave
        self._turn = 0
        self._heard = time.monotonic()
        self._token: torch.Tensor | None = None

    @classmethod
    def of_world(cls, deadline_s: float, leave: Callable[[str], None]) -> Self:
        """All ranks of the default process group."""
        group = dist.group.WORLD
        assert group is not None
        store = distributed_c10d._get_process_group_store(group)
        return cls(store, group.rank(), group.size(), deadline_s=deadline_s, leave=leave)

    def exchange(self, value: Any) -> list[Any]:
        """As for `Ranks`."""
        where = f"{PREFIX}/{self._turn}"
        names = [f"{where}/{rank}" for rank in range(self.size)]
        self._turn += 1
        with self._answering():
            self._store.set(names[self.rank], json.dumps(value))
            end = time.monotonic() + self.deadline_s
            while not self._store.check(names):
                self._raise_failure()
                if time.monotonic() > end:
                    late = [str(rank) for rank, name in enumerate(names) if not self._store.check([name])]
                    raise RanksError(f"rank {', '.join(late)} did not come within {self.deadline_s:g} s")
                time.sleep(POLL_S)
            found = [json.loads(self._store.get(name)) for name in names]
        self._heard = time.monotonic()
        return found

    def align(self, device: torch.device) -> None:
        """As for `Ranks`. On a GPU the next launch starts when all ranks have reached this point."""
        if device.type != "cuda":
            dist.barrier()
            return
        if self._token is None:
            self._token = torch.zeros(1, device=device)
        dist.all_reduce(self._token)

    def fail(self, error: BaseException) -> bool:
        """Tells the other ranks that this one failed.

        Returns:
            Whether it was the first: the one to report.
        """
        if isinstance(error, RanksError) and error.reported:
            return False
        mine = f"rank {self.rank}: {type(error).__name__}: {one_line(error)}"
        try:
            return self._store.compare_set(f"{PREFIX}/failed", "", mine).decode() == mine
        except RuntimeError:  # the store is gone with the rank that holds it, which was reported
            return False

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Ends this process in the meantime if another rank fails, or none comes for twice the deadline, and it hasn't
        noticed: it may be waiting inside a kernel.
        """
        done = threading.Event()

        def watch() -> None:
            failed_since = None
            while not done.wait(WATCH_S):
                try:
                    failed = self._store.check([f"{PREFIX}/failed"])
                except RuntimeError:
                    failed = True
                now = time.monotonic()
                failed_since = (failed_since or now) if failed else None
                if failed_since is not None and now - failed_since > 10 * WATCH_S:
                    self._leave("")
                if now - self._heard > 2 * self.deadline_s:
                    error = RanksError(f"rank {self.rank} waited for the others for {2 * self.deadline_s:g} s")
                    self._leave(str(error) if self.fail(error) else "")

        self._heard = time.monotonic()
        thread = threading.Thread(target=watch, daemon=True, name="fuseplan-ranks")
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _raise_failure(self) -> None:
        if self._store.check([f"{PREFIX}/failed"]):
            raise RanksError(self._store.get(f"{PREFIX}/failed").decode(), reported=True)

    @contextlib.contextmanager
    def _answering(self) -> Iterator[None]:
        try:
            yield
        except RanksError:
            raise
        except RuntimeError as error:
            raise RanksError(f"the ranks' store doesn't answer: {one_line(error)}", reported=self.rank > 0) from None
