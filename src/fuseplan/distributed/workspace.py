"""Memory that the ranks of a group share, for kernels that communicate by themselves."""

import atexit
import contextlib
import contextvars
import datetime
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from fuseplan.errors import CollectiveError
from fuseplan.record.text import one_line

SLOTS = 3
"""Calls that can have data in a workspace: the one that is sent, the one that is read, the one that is emptied."""
CAPACITY_BYTES = 32 * 2**20
"""Of one call's message; larger ones are sent in parts."""
SHOT_BYTES = 2**20
"""Of a message that every rank sends to every other rank, where there are more than two."""
STATE_WORDS = 2 + 2 * SLOTS
HEADER_BYTES = 512
"""Before the slots: what kernels remember between calls, and how far the other ranks' memory is. It lies here and not
in tensors of its own, since the first call may come while CUDA graphs' own pool serves all allocations.
"""


@dataclass(frozen=True, kw_only=True)
class SharedMemory:
    """Memory of one rank that the others can write to.

    Attributes:
        local: this rank's, uint8, on its device.
        addresses: of every rank's memory, as this rank sees it.
        keep: what has to live as long.
    """

    local: Tensor
    addresses: Sequence[int]
    keep: object


Allocate = Callable[[int, str, torch.device], SharedMemory]
"""`allocate(bytes, group_name, device)`, called by all ranks of the group at once."""


def allocate_symmetric(size: int, group_name: str, device: torch.device) -> SharedMemory:
    """Memory of `torch.distributed._symmetric_memory`, mapped by every rank of the group; no multicast.

    Raises:
        CollectiveError: the ranks' devices can't reach each other's memory, or a rank didn't come.
    """
    from torch.distributed import _symmetric_memory as symmetric_memory

    try:
        local = symmetric_memory.empty(size, dtype=torch.uint8, device=device)
        handle = symmetric_memory.rendezvous(local, resolve(group_name))
    except RuntimeError as error:
        raise CollectiveError(
            f"the ranks of group {group_name!r} can't share {size} bytes of memory: {one_line(error, 200)}; forbid "
            "kernels that need it, e.g. PassConfig(forbid=('allreduce_rms:triton',))"
        ) from error
    return SharedMemory(local=local, addresses=handle.buffer_ptrs, keep=handle)


def allocate_alone(size: int, group_name: str, device: torch.device) -> SharedMemory:
    """Memory in which this rank finds what it sends to others."""
    local = torch.empty(size, dtype=torch.uint8, device=device)
    return SharedMemory(local=local, addresses=[local.data_ptr()] * resolve(group_name).size(), keep=None)


class Workspace:
    """Shared memory of one group, with what its kernels have to remember between calls.

    Calls in one workspace have to follow each other on the device: eager calls of other streams are made to wait here,
    replays of graphs are their owner's to order, as they are with NCCL.

    Args:
        group_name: of the process group.
        device: of this rank.
        itemsize: bytes of an element.
        capacity: bytes of the largest message.
        alone: whether this rank plays all others too, as if they held what it does: what it sends comes back to it.
        allocate: makes the memory.
        timeout_s: seconds after which a kernel stops to wait for another rank; None: the group's own timeout.

    Raises:
        CollectiveError: the memory can't be had, or a graph is being captured.
    """

    def __init__(
        self, group_name: str, device: torch.device, itemsize: int, *, capacity: int = CAPACITY_BYTES,
        alone: bool = False, allocate: Allocate = allocate_symmetric, timeout_s: float | None = None,
    ) -> None:  # fmt: skip
        self.group = resolve(group_name)
        self.group_name, self.device = group_name, device
        self.rank, self.ranks = dist.get_rank(self.group), self.group.size()
        self.timed = device.type == "cuda" and not torch.version.hip
        seconds = timeout_s if timeout_s is not None else _timeout_s(self.group, device)
        self.timeout_s = seconds
        self.limit = round(seconds * (1e9 if self.timed else POLLS_PER_S))
        self.alone, self.one_shot = alone, self.ranks <= 2
        self.sums_words = 0 if self.one_shot else _whole_units(capacity // itemsize)
        share = capacity if alone or self.one_shot else max(SHOT_BYTES, capacity // self.ranks)
        self.shot_words = _whole_units(share // itemsize)
        self.sums_at = SLOTS * (self.ranks - 1) * self.shot_words
        words = self.sums_at + SLOTS * self.sums_words
        if capturing(device):
            raise CollectiveError(
                f"group {group_name!r} has no workspace yet, and none can be made while a graph is captured: run the "
                "model once before capturing it"
            )
        alone = alone or self.ranks == 1
        size = HEADER_BYTES + words * itemsize
        self.memory = (allocate_alone if alone else allocate)(size, group_name, device)
        self.memory.local.fill_(255)
        header = self.memory.local[:HEADER_BYTES].view(torch.int64)
        self.words = self.memory.local[HEADER_BYTES:].view({2: torch.int16, 4: torch.int32}[itemsize])
        self.state, self.distances = header[:STATE_WORDS].zero_(), header[STATE_WORDS : STATE_WORDS + self.ranks]
        distances = [(address - self.memory.local.data_ptr()) // 16 for address in self.memory.addresses]
        self.distances.copy_(torch.tensor(distances))
        pinned = device.type == "cuda"
        self.failure = torch.zeros(1, dtype=torch.int32, pin_memory=pinned)
        self._failure = self.failure.numpy()
        self._ended: tuple[torch.cuda.Stream, torch.cuda.Event] | None = None
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if not alone:
            # Nobody may send before everybody's memory is empty.
            _meet(self.group, group_name, self.ranks, self.timeout_s)

    def enter(self, shot_words: int, sums_words: int) -> None:
        """Before a launch: what it sends has to fit, no earlier one may have failed, and it follows the last one.

        Raises:
            CollectiveError: either of these.
        """
        self.check()
        for name, wanted, there in (("", shot_words, self.shot_words), (" of sums", sums_words, self.sums_words)):
            if wanted > there:
                raise CollectiveError(
                    f"a call in the workspace of group {self.group_name!r} needs {wanted} elements{name}, and it holds "
                    f"{there}"
                )
        if self._ended is not None and not capturing(self.device):
            stream, ended = self._ended
            if stream != torch.cuda.current_stream(self.device):
                ended.wait()

    def leave(self) -> None:
        """After a launch."""
        if self.device.type == "cuda" and not capturing(self.device):
            stream = torch.cuda.current_stream(self.device)
            event = self._ended[1] if self._ended is not None else torch.cuda.Event()
            event.record(stream)
            self._ended = stream, event

    def check(self) -> None:
        """Raises what a kernel found out, if anything; the workspace is of no use any more then.

        Raises:
            CollectiveError: a kernel waited for another rank for too long.
        """
        found = int(self._failure[0])
        if found:
            who = f"rank {found - 1}" if found <= self.ranks else "the sums of the other ranks"
            raise CollectiveError(
                f"an all-reduce in group {self.group_name!r} waited {self.timeout_s:g} s for {who}; results since then "
                "are NaN. Find out what became of that rank and start all ranks again"
            )


UNIT_WORDS = 64
"""Parts of a workspace begin at multiples of this, so that kernels can store 16 bytes at once."""


def _whole_units(words: int) -> int:
    return words // UNIT_WORDS * UNIT_WORDS


POLLS_PER_S = 1e6
"""Where kernels have no clock they count how often they have looked; about this often in a second."""


def capturing(device: torch.device) -> bool:
    """Whether what is launched now is recorded and not run."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


_OPEN: dict[tuple[str, torch.device, torch.dtype, int, bool], Workspace] = {}
_LOCK = threading.Lock()
_ALONE = contextvars.ContextVar("fuseplan_alone", default=False)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Workspaces of this thread are of this rank alone, which plays the others too: nothing is sent, and nobody waited
    for.
    """
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)
        with _LOCK:
            for key in [key for key in _OPEN if key[-1]]:
                del _OPEN[key]


def workspace_of(
    group_name: str, device: torch.device, dtype: torch.dtype, capacity: int = CAPACITY_BYTES
) -> Workspace:
    """The workspace of a group for messages of a dtype, made at the first call: all ranks make it together, outside of
    any capture. A warm compile cache changes nothing, since it is the kernel's launcher that asks.

    Raises:
        CollectiveError: as for `Workspace`.
    """
    key = (group_name, device, dtype, capacity, _ALONE.get())
    with _LOCK:
        found = _OPEN.get(key)
        if found is None or found.group is not resolve(group_name):
            size = SHOT_BYTES if _ALONE.get() else capacity
            found = Workspace(group_name, device, dtype.itemsize, capacity=size, alone=_ALONE.get())
            _OPEN[key] = found
        return found


def prepare(wanted: Iterable[tuple[str, str]], device: torch.device) -> None:
    """Makes workspaces before anything runs in them; all ranks of each group at once.

    Args:
        wanted: names of groups, and of dtypes without torch's prefix.
        device: of this rank.

    Raises:
        CollectiveError: as for `Workspace`.
    """
    for group_name, dtype in wanted:
        workspace_of(group_name, device, getattr(torch, dtype))


def check_workspaces() -> None:
    """Raises what kernels found out since, if anything.

    Raises:
        CollectiveError: a kernel waited for another rank for too long.
    """
    for workspace in list(_OPEN.values()):
        workspace.check()


@atexit.register
def release() -> None:
    """Gives all shared memory back."""
    with _LOCK:
        _OPEN.clear()


def resolve(group_name: str) -> dist.ProcessGroup:
    """The process group of that name."""
    group: dist.ProcessGroup = distributed_c10d._resolve_process_group(group_name)  # type: ignore[attr-defined,arg-type]
    return group


def _timeout_s(group: dist.ProcessGroup, device: torch.device) -> float:
    options = getattr(group._get_backend(device), "options", None)
    timeout = getattr(options, "_timeout", None) or distributed_c10d._get_default_timeout(dist.get_backend(group))
    return timeout.total_seconds()


def _meet(group: dist.ProcessGroup, group_name: str, ranks: int, timeout_s: float) -> None:
    """Returns once every rank of the group is here, by its store."""
    store = distributed_c10d._get_process_group_store(group)
    came = store.add("fuseplan/workspace/came", 1)
    meeting = f"fuseplan/workspace/met/{(came - 1) // ranks}"
    if came % ranks == 0:
        store.set(meeting, "")
    try:
        store.wait([meeting], datetime.timedelta(seconds=timeout_s))
    except RuntimeError as error:
        raise CollectiveError(
            f"not all ranks of group {group_name!r} came to share memory within {timeout_s:g} s; find out what became "
            "of the others and start all ranks again"
        ) from error
