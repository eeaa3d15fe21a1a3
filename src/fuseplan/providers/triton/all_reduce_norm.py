"""All-reduce [-> residual add] -> RMSNorm [-> an epilogue], in one kernel, which may store the norm as well.

total = sum over ranks of x [+ residual];  y = epilogue(total * rsqrt(mean(total^2) + eps) * weight)

One shot: each rank stores its rows into every other rank's memory and sums the rows it received. Two shots: it stores
each row into the memory of the one rank that owns it, which sums the row and stores the sum into everybody's memory;
2 / N of the bytes over the links for N ranks, and twice the wait.

There is no barrier. A word of a buffer holds EMPTY, a NaN that no rank ever sends, until its value arrives, as in
Lamport's construction and NCCL's LL protocols. Three slots take turns: while slot n is filled, slot n - 1, which was
read in the previous call, is emptied; no other rank can be sending to it before this rank has taken part in call n + 1.
The size written to each slot is remembered, so that a smaller call empties all words of a larger one. The epoch is
counted in device memory, so that replays of a graph advance it like eager calls.

A rank that has waited for another one in vain has failed for good: a word beside the epoch tells every later kernel in
the workspace, replays of graphs included, before the host is asked. Those yield only NaN, wait for nobody and send
nothing. So the other ranks miss its rows and fail one by one, each after one deadline. Its memory may hold words of any
call and is never used again.

Sums are in float32, in order of rank, hence bit for bit equal on all ranks.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fuseplan.distributed.workspace import SLOTS as SLOT_COUNT
from fuseplan.distributed.workspace import UNIT_WORDS, Workspace
from fuseplan.providers.triton.epilogues import TritonEpilogue
from fuseplan.providers.triton.hooks import names_functions
from fuseplan.providers.triton.launching import Norm, Tile, block_of, flattened, is_nvidia
from fuseplan.providers.triton.replay import run_kernel
from fuseplan.providers.triton.rows import normalized, rounded, within
from fuseplan.providers.triton.tuned import (
    AHEAD_REGISTERS,
    AHEAD_THREAD,
    FEW_ROWS,
    REDUCED_REGISTERS,
    REDUCED_THREAD,
    RESIDENT,
    SECOND_WAIT_BYTES,
    SOME_ROWS,
)

SLOTS = tl.constexpr(SLOT_COUNT)
EPOCH, FAILED, COUNTED, WRITTEN = (tl.constexpr(word) for word in range(4))
"""Words of a workspace's state: the epoch, i.e. the number of calls so far; the rank that didn't come in time, plus one
(0: none so far); the number of programs of this call that have read the epoch; then the words written in each slot,
first of messages between ranks, then of sums."""
UNIT = tl.constexpr(UNIT_WORDS)
ARRIVED, LATE, AWAITED = (tl.constexpr(standing) for standing in range(3))
"""The state of a tile: all of it has arrived, some of it didn't arrive in time, or may still arrive."""


@triton.jit
def clock(polls, TIMED: tl.constexpr):
    """Nanoseconds, or the number of polls where no clock is known."""
    if TIMED:
        return tl.extra.cuda.globaltimer()
    return polls


@triton.jit
def standing_of(words, missing, timeout):
    """The state of a tile, given the state of a missing word: a maximum over all elements instead of each thread's own
    view, so that threads don't diverge. A rank without time to wait has failed, and reads nothing it received.
    """
    there = tl.where(timeout > 0, ARRIVED, LATE)
    return tl.max(tl.max(tl.where(words == -1, missing, there), axis=1), axis=0)


@triton.jit
def receive(source, inside, timeout, who, state, failure, TIMED: tl.constexpr):
    """Waits until no word of a tile is EMPTY, or for `timeout`, in the unit of `clock`; (the words, the timeout, or 0).

    If a tile doesn't arrive, all its words are EMPTY, which is NaN, there are no further waits, and the sender is
    reported to the device and the host; the first such sender of a program is the one reported.
    """
    polls = tl.zeros((), dtype=tl.int64)
    start = clock(polls, TIMED)
    words = tl.load(source, mask=inside, other=0, volatile=True)
    standing = standing_of(words, tl.where(timeout > 0, AWAITED, LATE), timeout)
    while standing == AWAITED:
        # The clock is read while the words are on their way.
        words = tl.load(source, mask=inside, other=0, volatile=True)
        polls += 1
        missing = tl.where(clock(polls, TIMED) - start < timeout, AWAITED, LATE)
        standing = standing_of(words, missing, timeout)
    if standing == LATE:
        words = tl.full(words.shape, -1, words.dtype)
        tl.store(state + FAILED, who, mask=timeout > 0)
        tl.store(failure, who, mask=timeout > 0)
        timeout = tl.zeros_like(timeout)
    return words, timeout


@triton.jit
def sent(x, WORD: tl.constexpr):
    """The words of x, none of them EMPTY: a NaN with those bits is replaced by another NaN."""
    words = x.to(WORD, bitcast=True)
    return tl.where(words == -1, (1 << (WORD.primitive_bitwidth - 1)) - 1, words).to(WORD)


@triton.jit
def memory_of(mine, peer_offsets, rank, timeout):
    """A rank's memory in this rank's address space, by its offset from `mine` in units of 16 bytes. A rank without
    time to wait has failed and sends only to itself.
    """
    offset = tl.where(timeout > 0, tl.load(peer_offsets + rank), 0)
    return mine + offset * (16 // (mine.dtype.element_ty.primitive_bitwidth // 8))


@triton.jit
def empty(mine, chunk, written, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Empties a chunk of ROWS * BLOCK words of the `written` ones."""
    at = (chunk * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(mine + at, tl.full((ROWS, BLOCK), -1, mine.dtype.element_ty), mask=at < written)


@triton.jit
def reduced(
    x, place, shot_words, summing, state, failure, timeout,
    RANK: tl.constexpr, RANKS: tl.constexpr, TIMED: tl.constexpr,
):  # fmt: skip
    """The sum over ranks of a tile x, rounded to x's dtype, and the timeout that is left: 0 if the sum is NaN.

    The words from rank RANK + 1 + n, modulo RANKS, are n * shot_words behind `place`.
    """
    for source in tl.static_range(RANKS):
        if source == RANK:
            part = x.to(tl.float32)
        else:
            sent_at = place + ((source - RANK + RANKS) % RANKS - 1) * shot_words
            words, timeout = receive(sent_at, summing, timeout, source + 1, state, failure, TIMED)
            part = words.to(x.dtype, bitcast=True).to(tl.float32)
        # -0.0 and -0.0 is -0.0, but not if 0.0 comes first.
        total = part if source == 0 else total + part  # type: ignore[has-type]  # noqa: F821
    return rounded(total, x.dtype), timeout


@names_functions
@triton.jit(do_not_specialize=["rows", "timeout", "shot_units", "sums_units_at", "sums_units"])
def _all_reduce_norm(
    x_ptr, residual_ptr, weight_ptr, arguments, y_ptr, total_ptr, mine, peer_offsets, state, failure,
    rows, x_row, residual_row, weight_dim, eps, timeout, shot_units, sums_units_at, sums_units,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ADDS: tl.constexpr, ROUNDS_SUM: tl.constexpr,
    ROUNDS_NORMED: tl.constexpr, ADDS_ONE: tl.constexpr, STORE: tl.constexpr, CONSTANTS: tl.constexpr,
    KEEPS: tl.constexpr, LAUNCHES_EARLY: tl.constexpr, NVIDIA: tl.constexpr,
    RANK: tl.constexpr, RANKS: tl.constexpr, TWO_SHOT: tl.constexpr, LAG: tl.constexpr, TIMED: tl.constexpr,
    LOOPBACK: tl.constexpr,
):  # fmt: skip
    """Program p takes tiles p, p + programs, ...; it waits for a tile LAG tiles after it has sent its own part of it.

    In two shots the ranks own a program's tiles round robin, and programs begin with different ranks. In LOOPBACK one
    rank owns all of them, and receives the messages for all ranks.
    """
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    program, programs = tl.program_id(0), tl.num_programs(0)
    column = tl.arange(0, BLOCK)
    if LAUNCHES_EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    epoch = tl.load(state + EPOCH)
    # No branch depends on it alone: if another program fails just now, only some of this one's threads may see it.
    timeout = tl.where(tl.load(state + FAILED) != 0, tl.zeros_like(timeout), timeout)
    slot, last = epoch % SLOTS, (epoch + 2) % SLOTS
    WORD: tl.constexpr = mine.dtype.element_ty
    # Parts of a workspace begin at multiples of UNIT words, which lets the compiler store 16 bytes at once.
    shot_words, sums_words, sums_at = shot_units * UNIT, sums_units * UNIT, sums_units_at * UNIT
    written = tl.load(state + WRITTEN + last) * UNIT
    summed = tl.load(state + WRITTEN + SLOTS + last) * UNIT
    slot_at, last_at = slot * (RANKS - 1) * shot_words, last * (RANKS - 1) * shot_words
    weight = tl.load(weight_ptr + column * weight_dim, mask=column < WIDTH, other=0.0)
    steps = tl.cdiv(tl.cdiv(rows, ROWS), programs)
    # Of the tiles of a step: the most that one rank owns, and the index of this program's tile among them.
    if LOOPBACK:
        shares, share = programs, program
    else:
        shares, share = tl.cdiv(programs, RANKS), program // RANKS
    for step in range(steps + (1 + TWO_SHOT) * LAG):
        # Send.
        row = (step * programs + program) * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & within(column, WIDTH)[None, :]
        x = tl.load(x_ptr + row.to(tl.int64)[:, None] * x_row + column[None, :], mask=inside, other=0.0)
        if TWO_SHOT:
            packed = (step * shares + share) * ROWS + tl.arange(0, ROWS)
            at = packed.to(tl.int64)[:, None] * WIDTH + column[None, :]
        else:
            at = row.to(tl.int64)[:, None] * WIDTH + column[None, :]
        if TWO_SHOT and not LOOPBACK:
            owner = (step + program) % RANKS
            place = slot_at + ((RANK - owner + RANKS) % RANKS - 1) * shot_words
            # A failed rank sends nothing: other programs of it may be waiting at this place in its own memory.
            inside = inside & (row < tl.where((owner == RANK) | (timeout <= 0), 0, rows))[:, None]
            tl.store(memory_of(mine, peer_offsets, owner, timeout) + place + at, sent(x, WORD), mask=inside)
        else:
            for to in tl.static_range(RANKS):
                if to != RANK:
                    place = slot_at + ((RANK - to + RANKS) % RANKS - 1) * shot_words
                    tl.store(memory_of(mine, peer_offsets, to, timeout) + place + at, sent(x, WORD), mask=inside)
        # Empty the slot that was read in the previous call.
        for source in tl.static_range(RANKS - 1):
            empty(mine + last_at + source * shot_words, step * programs + program, written, BLOCK, ROWS)
        if step == 0:
            # All threads have used the epoch. Once all programs have, it advances to the next call's.
            tl.debug_barrier()
            if tl.atomic_add(state + COUNTED, 1, sem="relaxed", scope="gpu") == programs - 1:
                tl.store(state + COUNTED, 0)
                tl.store(state + WRITTEN + last, 0)
                tl.store(state + WRITTEN + SLOTS + last, 0)
                if TWO_SHOT:
                    packed_rows = steps.to(tl.int64) * shares * ROWS
                    tl.store(state + WRITTEN + slot, tl.cdiv(packed_rows * WIDTH, UNIT))
                    tl.store(state + WRITTEN + SLOTS + slot, tl.cdiv(rows.to(tl.int64) * WIDTH, UNIT))
                else:
                    tl.store(state + WRITTEN + slot, tl.cdiv(rows.to(tl.int64) * WIDTH, UNIT))
                tl.store(state + EPOCH, epoch + 1)
        # Sum the tile sent LAG steps ago.
        row = ((step - LAG) * programs + program) * ROWS + tl.arange(0, ROWS)
        inside = ((row >= 0) & (row < rows))[:, None] & within(column, WIDTH)[None, :]
        if ADDS and not TWO_SHOT:
            there = row.to(tl.int64)[:, None] * residual_row + column[None, :]
            residual = tl.load(residual_ptr + there, mask=inside, other=0.0).to(tl.float32)
        if TWO_SHOT:
            # Send the sums of the rows it owns, and read everybody's LAG steps later.
            sums = mine + sums_at + slot * sums_words
            owns = step >= LAG
            if not LOOPBACK:
                owns = owns & ((step - LAG + program) % RANKS == RANK)
            if owns:
                own = tl.load(x_ptr + row.to(tl.int64)[:, None] * x_row + column[None, :], mask=inside, other=0.0)
                packed = ((step - LAG) * shares + share) * ROWS + tl.arange(0, ROWS)
                sent_to = mine + slot_at + packed.to(tl.int64)[:, None] * WIDTH + column[None, :]
                total, timeout = reduced(own, sent_to, shot_words, inside, state, failure, timeout, RANK, RANKS, TIMED)
                words = sent(total.to(dtype), WORD)
                at = row.to(tl.int64)[:, None] * WIDTH + column[None, :]
                for to in tl.static_range(RANKS):
                    tl.store(memory_of(sums, peer_offsets, to, timeout) + at, words, mask=inside)
            empty(mine + sums_at + last * sums_words, step * programs + program, summed, BLOCK, ROWS)
            row = ((step - 2 * LAG) * programs + program) * ROWS + tl.arange(0, ROWS)
            inside = ((row >= 0) & (row < rows))[:, None] & within(column, WIDTH)[None, :]
            if ADDS:
                there = row.to(tl.int64)[:, None] * residual_row + column[None, :]
                residual = tl.load(residual_ptr + there, mask=inside, other=0.0).to(tl.float32)
            at = row.to(tl.int64)[:, None] * WIDTH + column[None, :]
            words, timeout = receive(sums + at, inside, timeout, RANKS + 1, state, failure, TIMED)
            total = words.to(dtype, bitcast=True).to(tl.float32)
        else:
            if LAG > 0:
                x = tl.load(x_ptr + row.to(tl.int64)[:, None] * x_row + column[None, :], mask=inside, other=0.0)
            sent_to = mine + slot_at + row.to(tl.int64)[:, None] * WIDTH + column[None, :]
            total, timeout = reduced(x, sent_to, shot_words, inside, state, failure, timeout, RANK, RANKS, TIMED)
        if ADDS:
            total += residual
        kept = row.to(tl.int64)[:, None] * WIDTH + column[None, :]
        tl.store(total_ptr + kept, total.to(total_ptr.dtype.element_ty), mask=inside)
        if ADDS and ROUNDS_SUM:
            total = rounded(total, dtype)
        y = normalized(total, weight, eps, dtype, WIDTH, ROUNDS_NORMED, ADDS_ONE, NVIDIA)
        if KEEPS:
            tl.store(y_ptr + kept, y.to(dtype), mask=inside)
        STORE(y, arguments, row, 0, (row >= 0) & (row < rows), dtype, WIDTH, CONSTANTS, NVIDIA)
    # Empty the rest that a larger call has left, and all sums if this call has none.
    emptied = (steps + (1 + TWO_SHOT) * LAG) * programs + program
    for chunk in range(emptied, tl.cdiv(written, ROWS * BLOCK), programs):
        for source in tl.static_range(RANKS - 1):
            empty(mine + last_at + source * shot_words, chunk, written, BLOCK, ROWS)
    for chunk in range(emptied if TWO_SHOT else program, tl.cdiv(summed, ROWS * BLOCK), programs):
        empty(mine + sums_at + last * sums_words, chunk, summed, BLOCK, ROWS)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How a call is spread over programs, and its tiles over time.

    Attributes:
        tile: the tile of a program.
        programs: number of programs; all of them are resident at once.
        two_shot: whether each row is summed by one rank alone.
        lag: tiles between sending and summing.
    """

    tile: Tile
    programs: int
    two_shot: bool
    lag: int

    @classmethod
    def of(cls, x: Tensor, epilogue: TritonEpilogue, workspace: Workspace) -> "Schedule":
        """For rows x [rows, hidden]."""
        rows, width = x.shape
        # The fewest of any rank: all ranks need the same grid, since it determines which rank owns a row.
        processors, block = workspace.processors, block_of(epilogue.width(width))
        # A rank sends N - 1 messages in one shot, and 2 / N of that in two.
        saved = rows * width * x.element_size() * (workspace.ranks - 1) * (1 - 2 / workspace.ranks)
        two_shot = not workspace.one_shot and saved > SECOND_WAIT_BYTES.value
        turns = rows / processors
        lag = int(turns > (FEW_ROWS if two_shot else SOME_ROWS).value)
        if two_shot or lag:
            shape = Tile.holding(block, elements=AHEAD_THREAD.value, registers=AHEAD_REGISTERS.value)
        else:
            shape = Tile.holding(block, elements=REDUCED_THREAD.at(turns), registers=REDUCED_REGISTERS.at(turns))
        resident = processors * min(RESIDENT.value, shape.resident)
        programs = min(rows, resident, max(1, workspace.shot_words // width))
        return cls(tile=shape, programs=programs, two_shot=two_shot, lag=lag)

    def words(self, width: int, rows: int, workspace: Workspace) -> tuple[int, int]:
        """Words that a rank receives from each other rank, and words of sums."""
        if not self.two_shot:
            return rows * width, 0
        steps = triton.cdiv(triton.cdiv(rows, self.tile.rows), min(rows, self.programs))
        return steps * self.share(rows, workspace) * width, rows * width

    def share(self, rows: int, workspace: Workspace) -> int:
        """The most rows of a step that one rank owns."""
        owners = 1 if workspace.loopback else workspace.ranks
        return int(triton.cdiv(min(rows, self.programs), owners)) * self.tile.rows

    def most_rows(self, width: int, workspace: Workspace) -> int:
        """Rows that fit in a workspace."""
        if not self.two_shot:
            return workspace.shot_words // width
        steps = workspace.shot_words // (self.share(self.programs, workspace) * width)
        return min(workspace.sums_words // width, steps * self.programs * self.tile.rows)


def launch(
    x: Tensor,
    residual: Tensor | None,
    norm: Norm,
    epilogue: TritonEpilogue,
    workspace: Workspace,
    schedule: Schedule | None = None,
    *,
    keeps: bool = False,
) -> tuple[Tensor, ...]:
    """The family's op.

    Args:
        x: [..., hidden], any strides; bfloat16, float16 or float32; equal shapes on all ranks.
        residual: like x, or float32; None: no residual.
        norm: weight, epsilon and rounding.
        epilogue: the epilogue of rows before they are stored.
        workspace: the group's workspace for x's dtype.
        schedule: None: by size. A message that doesn't fit in the workspace takes several launches.
        keeps: whether the norm is yielded as well.

    Returns:
        The epilogue's results, the norm in x's dtype if it is kept, and the sum before the norm.

    Raises:
        CollectiveError: an earlier call in this workspace failed.
    """
    flat = flattened(x)
    rows, width = flat.shape
    results, kept = epilogue.results(x), (x.new_empty(x.shape),) if keeps else ()
    total = x.new_empty(x.shape, dtype=x.dtype if residual is None else norm.total_dtype(x))
    if not x.numel():
        return *results, *kept, total
    chosen = schedule or Schedule.of(flat, epilogue, workspace)
    sums = total.view(rows, -1)
    added = flat if residual is None else flattened(residual)
    most = chosen.most_rows(width, workspace)
    with torch.cuda.device_of(x), workspace.held():
        for start in range(0, rows, most):
            part, rest, summed = (each[start : start + most] for each in (flat, added, sums))
            store, written = epilogue.part(results, start, start + most)
            own = rest if residual is not None else None
            normed = tuple(each.view(rows, -1)[start : start + most] for each in kept)
            _launch(part, own, norm, store, workspace, chosen, written, normed, summed)
    return *results, *kept, total


def _launch(
    x: Tensor, residual: Tensor | None, norm: Norm, epilogue: TritonEpilogue, workspace: Workspace, schedule: Schedule,
    results: tuple[Tensor, ...], kept: tuple[Tensor, ...], total: Tensor,
) -> None:  # fmt: skip
    rows, width = x.shape
    added, programs = x if residual is None else residual, min(rows, schedule.programs)
    workspace.require(*schedule.words(width, rows, workspace))
    run_kernel(
        _all_reduce_norm, (programs,),
        x, added, norm.weight, epilogue.arguments(results), kept[0] if kept else total, total, *workspace.tensors,
        rows, x.stride(0), added.stride(0), norm.weight.stride(0), norm.eps, workspace.timeout,
        *(words // UNIT_WORDS for words in (workspace.shot_words, workspace.sums_at, workspace.sums_words)),
        WIDTH=width, ROWS=schedule.tile.rows, BLOCK=schedule.tile.block, ADDS=residual is not None,
        RANK=workspace.rank, RANKS=workspace.ranks, TWO_SHOT=schedule.two_shot, LAG=schedule.lag,
        TIMED=workspace.timed, LOOPBACK=workspace.loopback and schedule.two_shot,
        STORE=epilogue.store, CONSTANTS=epilogue.constants, KEEPS=bool(kept), NVIDIA=is_nvidia(x.device),
        **norm.constants, **schedule.tile.launch(x),
    )  # fmt: skip
