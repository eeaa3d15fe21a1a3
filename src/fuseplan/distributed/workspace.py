"""Memory that the ranks of a group share, for kernels that communicate by themselves."""

import contextlib
import contextvars
import itertools
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fuseplan.distributed.groups import resolve, timeout_of
from fuseplan.distributed.meeting import Meeting
from fuseplan.distributed.shared import SHARED, Kind, capturing
from fuseplan.errors import CollectiveError

SLOTS = 3
"""Calls that can have data in a workspace: one being sent, one being read, one being cleared."""
CAPACITY_BYTES = 32 * 2**20
"""The most bytes of a message; larger ones are sent in parts."""
SHOT_BYTES = 2**20
"""The most bytes of a message that every rank sends to every other rank, where there are more than two."""
ONE_SHOT_RANKS = 2
"""Ranks up to which two shots send as much as one, so that workspaces have no room for sums."""
STATE_WORDS = 3 + 2 * SLOTS
HEADER_BYTES = 512
"""The bytes before the slots: the kernels' state between calls, and the offsets of the other ranks' memory. They lie
here and not in tensors of their own, since the first call may come while CUDA graphs' own pool serves all allocations.
"""


@dataclass(frozen=True, kw_only=True)
class SharedMemory:
    """Memory of one rank that the others can write to.

    Attributes:
        local: this rank's, uint8, on its device.
        addresses: of every rank's memory, as this rank sees it.
        keep: objects that have to live as long.
    """

    local: Tensor
    addresses: Sequence[int]
    keep: object


Allocate = Callable[[int, str, torch.device, Meeting], SharedMemory]
"""`allocate(bytes, group_name, device, meeting)`, called by all ranks of the group at once."""
ADVICE = "forbid kernels that need it, e.g. PassConfig(forbid=('allreduce_rms:triton',))"


def allocate_symmetric(size: int, group_name: str, device: torch.device, meeting: Meeting) -> SharedMemory:
    """Memory of `torch.distributed._symmetric_memory`, mapped by every rank of the group; no multicast.

    Raises:
        CollectiveError: the ranks' devices can't reach each other's memory, or a rank didn't come or has none left.
    """
    from torch.distributed import _symmetric_memory as symmetric_memory

    # A rank without memory left doesn't get to where the others would wait for it.
    local = meeting.step(lambda: symmetric_memory.empty(size, dtype=torch.uint8, device=device))
    handle = meeting.collective(lambda: symmetric_memory.rendezvous(local, resolve(group_name)))
    return SharedMemory(local=local, addresses=handle.buffer_ptrs, keep=handle)


def allocate_loopback(size: int, ranks: int, device: torch.device) -> SharedMemory:
    """Memory that returns this rank's own messages to it."""
    local = torch.empty(size, dtype=torch.uint8, device=device)
    return SharedMemory(local=local, addresses=[local.data_ptr()] * ranks, keep=None)


_serials = itertools.count()


class Workspace:
    """Shared memory of one group, with its kernels' state between calls.

    Calls in one workspace have to follow each other on the device: eager calls of other threads and streams wait here;
    owners order replays of their graphs, as with NCCL.

    Args:
        group_name: of the process group.
        device: of this rank.
        itemsize: bytes of an element.
        capacity: bytes of the largest message.
        loopback: whether this rank plays all others, as if they had the same data: its messages come back.
        allocate: allocates the memory.
        timeout_s: seconds after which a kernel stops to wait for another rank; None: the group's own timeout.
        use: its purpose, the same on all ranks; workspaces of one use are made one after the other.

    Raises:
        CollectiveError: the memory can't be allocated on one of the ranks, or a graph is being captured.
    """

    def __init__(
        self, group_name: str, device: torch.device, itemsize: int, *, capacity: int = CAPACITY_BYTES,
        loopback: bool = False, allocate: Allocate = allocate_symmetric, timeout_s: float | None = None,
        use: str = "messages",
    ) -> None:  # fmt: skip
        self.group = resolve(group_name)
        self.group_name, self.device = group_name, device
        self.rank, self.ranks = dist.get_rank(self.group), self.group.size()
        self.timed = device.type == "cuda" and not torch.version.hip
        self.timeout_s = timeout_s if timeout_s is not None else timeout_of(self.group, device.type).total_seconds()
        self.timeout = max(1, round(self.timeout_s * (1e9 if self.timed else POLLS_PER_S)))
        self.loopback, self.one_shot = loopback, self.ranks <= ONE_SHOT_RANKS
        self.sums_words = 0 if self.one_shot else _whole_units(capacity // itemsize)
        share = capacity if loopback or self.one_shot else max(SHOT_BYTES, capacity // self.ranks)
        self.shot_words = _whole_units(share // itemsize)
        self.sums_at = SLOTS * (self.ranks - 1) * self.shot_words
        words = self.sums_at + SLOTS * self.sums_words
        if device.type == "cuda" and capturing():
            raise CollectiveError(
                f"group {group_name!r} has no workspace yet, and none can be made while a graph is captured: run the "
                "model once before capturing it"
            )
        size, self.processors = HEADER_BYTES + words * itemsize, multiprocessors(device)
        if loopback or self.ranks == 1:
            self._lay_out(allocate_loopback(size, self.ranks, device), itemsize)
        else:
            patience, facts = timeout_of(self.group, device.type), f"{itemsize} {size} {self.shot_words} {UNIT_WORDS}"
            meeting = Meeting(self.group, f"share {capacity} bytes of memory for {use}", facts, patience, ADVICE)
            self.processors = meeting.least(self.processors)
            # torch allocates for the current device, which is another one in a new thread.
            with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
                memory = allocate(size, group_name, device, meeting)
            # No rank may send before all memory is cleared.
            meeting.step(lambda: self._lay_out(memory, itemsize))
        self.serial = next(_serials)
        self.lock = threading.RLock()
        self.ended: _Ended | None = None

    def _lay_out(self, memory: SharedMemory, itemsize: int) -> None:
        """Clears this rank's memory, and stores the offsets of the others'."""
        self.memory = memory
        memory.local.fill_(255)
        header = memory.local[:HEADER_BYTES].view(torch.int64)
        self.words = memory.local[HEADER_BYTES:].view({2: torch.int16, 4: torch.int32}[itemsize])
        self.state, self.peer_offsets = header[:STATE_WORDS].zero_(), header[STATE_WORDS : STATE_WORDS + self.ranks]
        peer_offsets = [(address - memory.local.data_ptr()) // 16 for address in memory.addresses]
        self.peer_offsets.copy_(torch.tensor(peer_offsets))
        self.failure = torch.zeros(1, dtype=torch.int32, pin_memory=self.device.type == "cuda")
        self._failure = self.failure.numpy()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The kernels' arguments: messages, the offsets of the others', state between calls, and the late rank; the
        same tensors at every call.
        """
        return self.words, self.peer_offsets, self.state, self.failure

    @property
    def layout(self) -> str:
        """The layout that ranks have to agree on, so that their kernels find messages."""
        return f"{self.processors} processors, {self.shot_words} words, {self.sums_words} of sums"

    @property
    def is_current(self) -> bool:
        """Whether the group still has that name."""
        try:
            return resolve(self.group_name) is self.group
        except (RuntimeError, ValueError, LookupError):
            return False

    @property
    def failed(self) -> bool:
        """Whether a kernel has waited for another rank for too long."""
        return bool(self._failure[0])

    def held(self) -> "_Held":
        """The context of a call's launches: they follow the last call's, whichever thread and stream that was on.

        Raises:
            CollectiveError: an earlier call failed.
        """
        return _Held(self)

    def require(self, shot_words: int, sums_words: int) -> None:
        """Checks before a launch that its messages fit.

        Raises:
            CollectiveError: they don't.
        """
        for name, wanted, there in (("", shot_words, self.shot_words), (" of sums", sums_words, self.sums_words)):
            if wanted > there:
                raise CollectiveError(
                    f"a call in the workspace of group {self.group_name!r} needs {wanted} elements{name}, and it holds "
                    f"{there}"
                )

    def check(self) -> None:
        """Raises a kernel's error, if there is one; the workspace can't be used any more then.

        Raises:
            CollectiveError: a kernel waited for another rank for too long.
        """
        found = int(self._failure[0])
        if found:
            who = f"rank {found - 1}" if found <= self.ranks else "the sums of the other ranks"
            raise CollectiveError(
                f"an all-reduce in group {self.group_name!r} waited {self.timeout_s:g} s for {who}; results since then "
                "are NaN. Look at that rank's log and start all ranks again"
            )


class _Ended(NamedTuple):
    """The last call that ran: its stream, by the driver's handle, and an event after its launches."""

    handle: int
    stream: torch.cuda.Stream
    event: torch.cuda.Event


def _handle_of_current_stream(device: int) -> int:
    return torch.cuda.current_stream(device).cuda_stream


handle_of_current_stream: Callable[[int], int] = getattr(
    torch._C, "_cuda_getCurrentRawStream", _handle_of_current_stream
)
"""It takes the host a tenth of the time of getting the stream itself."""


class _Held:
    """A workspace while a call launches kernels in it. It is no generator, since every call pays for it."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self.ended: _Ended | None = None

    def __enter__(self) -> None:
        workspace = self.workspace
        workspace.lock.acquire()
        try:
            workspace.check()
            if workspace.device.type != "cuda" or torch.cuda.is_current_stream_capturing():
                return
            handle, last = handle_of_current_stream(workspace.words.get_device()), workspace.ended
            if last is None:
                self.ended = _Ended(handle, torch.cuda.current_stream(workspace.device), torch.cuda.Event())
            elif last.handle != handle:
                stream = torch.cuda.current_stream(workspace.device)
                last.event.wait(stream)  # of the device's own stream, which needn't be the current one
                self.ended = _Ended(handle, stream, last.event)
            else:
                self.ended = last
        except BaseException:
            workspace.lock.release()
            raise

    def __exit__(self, *raised: object) -> None:
        workspace = self.workspace
        try:
            if self.ended is not None:
                self.ended.event.record(self.ended.stream)
                workspace.ended = self.ended
        finally:
            workspace.lock.release()


UNIT_WORDS = 64
"""Parts of a workspace begin at multiples of this, so that kernels can store 16 bytes at once."""


def _whole_units(words: int) -> int:
    return words // UNIT_WORDS * UNIT_WORDS


POLLS_PER_S = 1e6
"""Kernels without a clock count their polls; about this many in a second."""


def multiprocessors(device: torch.device) -> int:
    """The number of multiprocessors of a device, or of the part of it that is here; 1 where kernels are interpreted."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


WORKSPACES: Final[Kind[Workspace]] = Kind(name="fuseplan's Triton all-reduce")
_LOOPBACK: contextvars.ContextVar[dict[Hashable, Workspace] | None] = contextvars.ContextVar(
    "fuseplan_loopback", default=None
)


@contextlib.contextmanager
def loopback() -> Iterator[None]:
    """Makes this thread's workspaces loopbacks: its rank plays the others, nothing is sent, and no rank is waited for.
    No other thread uses them, and they are freed at the end.
    """
    token = _LOOPBACK.set({})
    try:
        yield
    finally:
        _LOOPBACK.reset(token)


def workspace_of(
    group_name: str, device: torch.device, dtype: torch.dtype, capacity: int = CAPACITY_BYTES
) -> Workspace:
    """The workspace of a group for messages of a dtype, made at the first call: all ranks make it together, outside of
    any capture. A warm compile cache changes nothing, since the kernel's launcher calls this.

    Where another group has taken the name, its ranks make another one; see `Registry.get`.

    Raises:
        CollectiveError: as for `Workspace`.
    """
    own, key = _LOOPBACK.get(), (device, dtype, capacity)
    if own is not None:
        if (group_name, *key) not in own:
            own[group_name, *key] = Workspace(group_name, device, dtype.itemsize, capacity=SHOT_BYTES, loopback=True)
        return own[group_name, *key]

    def make(group: dist.ProcessGroup) -> Workspace:
        return Workspace(group_name, device, dtype.itemsize, capacity=capacity, use=str(dtype).removeprefix("torch."))

    # A call of any number of rows is split into launches.
    return SHARED.get(WORKSPACES, group_name, key, rows=0, capacity=0, make=make)


def prepare(wanted: Iterable[tuple[str, str, str]]) -> str:
    """Makes workspaces before anything runs in them; all ranks of each group at once.

    Args:
        wanted: names of groups, of dtypes without torch's prefix, and of this rank's devices.

    Returns:
        The layouts, which have to be equal on all ranks, whatever their devices.

    Raises:
        CollectiveError: as for `Workspace`.
    """
    made = [workspace_of(group, torch.device(device), getattr(torch, dtype)) for group, dtype, device in wanted]
    return "; ".join(each.layout for each in made)


def check_workspaces() -> None:
    """Raises kernels' errors since the last check, if any, of groups that still exist.

    Raises:
        CollectiveError: a kernel waited for another rank for too long.
    """
    for workspace in SHARED.values(WORKSPACES):
        if workspace.failed and workspace.is_current:
            workspace.check()
