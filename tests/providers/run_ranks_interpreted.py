"""One rank of several, each a process: fuseplan's all-reduces by Triton's interpreter, between ranks that share memory
of the host as GPUs share theirs. `run_ranks_interpreted.py RANK RANKS FOLDER` writes what it saw to FOLDER/RANK.json.
"""

import datetime
import itertools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FileStore

from fuseplan.dialect import KEPT_NORM_FAMILY, NORM_FAMILY, Rounding
from fuseplan.distributed import workspace as workspaces
from fuseplan.distributed.meeting import Meeting
from fuseplan.distributed.workspace import SharedMemory, Workspace
from fuseplan.errors import CollectiveError
from fuseplan.providers.triton import all_reduce_norm
from fuseplan.providers.triton.all_reduce_norm import Schedule, launch
from fuseplan.providers.triton.epilogues import epilogue_of
from fuseplan.providers.triton.launching import Norm, Tile
from tests.providers import whole_words
from tests.providers.epilogues import own
from tests.providers.run_interpreted import prepare
from tests.ranks import always, leave, left_in

RANK, RANKS, FOLDER = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
CPU, WIDTH = torch.device("cpu"), 48
EPILOGUES: dict[str | None, dict[str, Any]] = {
    **{suffix: own(suffix) for suffix in (None, "pad", "static_fp8_quant", "dynamic_fp8_quant")},
    "mx_fp4_quant": own("mx_fp4_quant", group_size=16, layout="swizzled"),
    "nv_fp4_quant": own("nv_fp4_quant", global_scale=torch.tensor(0.02), layout="rows"),
}
ONE_SHOT = (
    (5, 5, 0, "pad"),
    (1, 1, 0, None),
    (11, 2, 1, "static_fp8_quant"),
    (3, 2, 1, "dynamic_fp8_quant"),
    (1, 1, 0, "nv_fp4_quant"),
)
TWO_SHOT = (
    (11, 2, 1, "pad"),
    (1, 1, 0, None),
    (21, 6, 0, "pad"),
    (12, 1, 2, "dynamic_fp8_quant"),
    (2, 2, 0, "mx_fp4_quant"),
    (7, 5, 1, None),
)
"""(rows, programs, lag, epilogue): larger and smaller ones take turns."""
NUMBERS = itertools.count()


def allocate(size: int, group_name: str, device: torch.device, meeting: Meeting) -> SharedMemory:
    """Files that every rank maps."""
    number = next(NUMBERS)

    def mapped(rank: int) -> Tensor:
        return torch.from_file(str(FOLDER / f"memory-{number}-{rank}"), shared=True, size=size, dtype=torch.uint8)

    mine = meeting.step(lambda: mapped(RANK))
    everyone = [mine if rank == RANK else mapped(rank) for rank in range(RANKS)]
    return SharedMemory(local=mine, addresses=[each.data_ptr() for each in everyone], keep=everyone)


def workspace(timeout_s: float = 1e9, group: str | None = None, capacity: int = 1 << 16) -> Workspace:
    assert dist.group.WORLD is not None
    name = group or dist.group.WORLD.group_name
    return Workspace(name, CPU, 2, capacity=capacity, allocate=allocate, timeout_s=timeout_s)


def part(rank: int, rows: int, seed: int) -> Tensor:
    """What a rank brings; every rank can tell what the others do."""
    values = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(100 * seed + rank)).bfloat16()
    values[0, 0] = -0.0
    return values


def computed(
    space: Workspace, rows: int, schedule: Schedule | None, suffix: str | None, seed: int
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """What one call gives, and the reference of the sum in float32. Every other seed yields what is quantised."""
    parts = [part(RANK if space.loopback else rank, rows, seed) for rank in range(RANKS)]
    residual, weight = part(RANKS, rows, seed), (1 + 0.1 * part(RANKS + 1, 1, seed)[0]).bfloat16()
    given, key = EPILOGUES[suffix], (False, True, suffix)
    keeps = seed % 2 == 1 and key in KEPT_NORM_FAMILY
    got = launch(
        parts[RANK], residual, Norm(weight=weight, eps=1e-5, rounding=Rounding.LLAMA), epilogue_of(suffix)(**given),
        space, schedule, keeps=keeps,
    )  # fmt: skip
    reduced = parts[0].float()
    for each in parts[1:]:
        reduced = reduced + each.float()
    family = KEPT_NORM_FAMILY if keeps else NORM_FAMILY
    plain = family[key].reference if suffix else torch.ops.fuseplan.fused_add_rms_norm
    return got, plain(reduced.bfloat16(), residual, weight, 1e-5, "llama", *given.values())


def call(space: Workspace, rows: int, schedule: Schedule | None, suffix: str | None, seed: int) -> tuple[bool, Tensor]:
    """Whether one call gives the reference's bits on the sum in float32, and the sum that was normalised."""
    got, wanted = computed(space, rows, schedule, suffix, seed)
    same = [torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(got, wanted, strict=True)]
    return all(same), got[-1]


def schedule(programs: int, lag: int, two_shot: bool) -> Schedule:
    return Schedule(tile=Tile(rows=1, block=64, warps=1), programs=programs, two_shot=two_shot, lag=lag)


def main() -> None:
    prepare()
    whole_words.install()
    # Who waits leaves the processor to whom it waits for.
    all_reduce_norm.standing_of = observed(lambda: time.sleep(0.001))
    store = FileStore(str(FOLDER / "store"), RANKS)
    dist.init_process_group("gloo", store=store, rank=RANK, world_size=RANKS)
    seen: dict[str, Any] = {}
    space = workspace()
    shots = [(*each, False) for each in ONE_SHOT]
    if RANKS > 2:
        two_shots = [(*each, True) for each in TWO_SHOT]
        # Each kind follows the other, and itself, in every slot.
        shots += [*two_shots, *shots[2:4], two_shots[0], shots[4], two_shots[2], shots[0], two_shots[3]]
    seen["calls"], seen["left"] = [], []
    for seed, (rows, programs, lag, suffix, two) in enumerate((*shots, *shots[:3])):
        seen["calls"].append(call(space, rows, schedule(programs, lag, two), suffix, seed)[0])
        seen["left"].append(left_in(space))
    seen["chosen"] = [call(space, rows, None, "pad", 40 + rows)[0] for rows in (1, 3, 9)]
    total = call(space, 1, None, None, 60)[1]
    seen["minus zero"] = bool(torch.signbit(total[0, 0]) and total[0, 0] == 0)
    if RANKS == 2:
        seen["capacity"] = capacity()
    seen["loopback"] = loopback()
    seen["unlike"] = unlike()
    for two_shot in (False, True) if RANKS > 2 else (False,):
        for comes_late in (False, True):
            name = f"{'late' if comes_late else 'missing'}, {1 + two_shot} shots"
            seen[name] = given_up(two_shot, comes_late)
    seen["deadline"] = deadline()
    (FOLDER / f"{RANK}.json").write_text(json.dumps(seen))
    leave()


def loopback() -> list[bool]:
    """Whether one rank in loopback, the others being taken to hold what it does, is right in two shots as in one."""
    assert dist.group.WORLD is not None
    space = Workspace(dist.group.WORLD.group_name, CPU, 2, capacity=4096, loopback=True, timeout_s=1e9)
    shots = [(*each, False) for each in ONE_SHOT] + [(*each, True) for each in TWO_SHOT if RANKS > 2]
    return [
        call(space, rows, schedule(programs, lag, two), suffix, 90 + seed)[0]
        for seed, (rows, programs, lag, suffix, two) in enumerate((*shots, *shots[-3:]))
    ]


def capacity() -> list[tuple[bool, int]]:
    """One row fewer than fit in a launch, as many, and one more: whether it was right, and launches."""
    space, epochs = workspace(capacity=1024), []
    rows = space.shot_words // WIDTH
    for count in (rows - 1, rows, rows + 1):
        before = int(space.state[0])
        with mock.patch.dict(EPILOGUES["nv_fp4_quant"], layout="swizzled"):  # whose scales of all rows lie in one tile
            right, _ = call(space, count, schedule(1, 0, two_shot=False), "nv_fp4_quant", 70 + count)
        epochs.append((right, int(space.state[0]) - before))
    return epochs


def unlike() -> list[Any]:
    """Ranks with different numbers of multiprocessors, by which each would cut the rows in another way."""
    with (
        mock.patch.object(workspaces, "multiprocessors", return_value=2 + RANK % 2),
        mock.patch.object(all_reduce_norm, "SECOND_WAIT_BYTES", always(0)),
    ):
        space = workspace()
        return [space.processors, *(call(space, rows, None, "pad", 200 + rows)[0] for rows in (1, 5, 9, 21))]


def deadline() -> list[str]:
    """A rank that doesn't come: NaN, and then an error."""
    group = dist.new_group(timeout=datetime.timedelta(seconds=30))
    space = workspace(timeout_s=2e-4, group=group.group_name)
    found = []
    if RANK == 0:
        _, total = call(space, 2, None, None, 80)
        found = ["NaN" if total.isnan().all() else "numbers"]
        found += [str(raised_by(lambda: call(space, 2, None, None, 81))) for _ in range(2)]
    else:
        time.sleep(0.1)
    dist.barrier()
    return found


def raised_by(function: Callable[[], object]) -> str | None:
    """What the host says when it is asked."""
    try:
        function()
    except CollectiveError as error:
        return str(error)
    return None


def observed(on_wait: Callable[[], object]) -> Any:
    """`standing_of`, which calls a function for each further look that whoever waits will take."""
    standing_of = all_reduce_norm.standing_of

    def observing(*arguments: Any) -> Any:
        standing = standing_of(*arguments)
        if int(standing.handle.data.item()) == all_reduce_norm.AWAITED.value:
            on_wait()
        return standing

    return observing


class Replayed:
    """Calls that nobody asks the host about, as replays of a graph are, in a workspace of their own.

    Attributes:
        outcomes: of each call: whether its rows are right, NaN in every result, or anything else.
        waits: how often each call has looked for something that might still come.
    """

    def __init__(self, two_shot: bool) -> None:
        self.space = workspace()
        self.two_shot, self.waits, self.outcomes = two_shot, list[int](), list[str]()

    def call(self, timeout: int | None = None) -> None:
        """One more: of other rows, tiles and epilogue than the last, and of other numbers."""
        number = len(self.outcomes)
        rows, programs, lag = ((3, 2, 1), (2, 2, 0), (4, 2, 0), (2, 1, 1))[number % 4]
        self.space.timeout = timeout or NEVER
        seen = list[None]()
        how, counting = schedule(programs, lag, self.two_shot), observed(lambda: seen.append(None))
        with mock.patch.object(self.space, "check"), mock.patch.object(all_reduce_norm, "standing_of", counting):
            got, wanted = computed(self.space, rows, how, tuple(EPILOGUES)[number % len(EPILOGUES)], 300 + number)
        self.outcomes.append(outcome(got, wanted))
        self.waits.append(len(seen))


NEVER, SOON = 10**12, 40
"""Limits, in numbers of looks."""


def lost_rows(value: Tensor) -> Tensor:
    """Which rows of a result are NaN, their padding aside."""
    own = value[..., :WIDTH]
    return (own == 255 if own.dtype is torch.uint8 else own.float().isnan()).all(-1)  # exponents in E8M0


def outcome(got: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> str:
    pairs = list(zip(got, wanted, strict=True))
    in_rows = [(a, b) for a, b in pairs if a.shape[0] == got[0].shape[0]]  # and not in tiles of several
    right = torch.stack([(a.view(torch.uint8) == b.view(torch.uint8)).all(-1) for a, b in in_rows]).all(0)
    lost = torch.stack([lost_rows(a) for a, _ in in_rows if a.shape[-1] != WIDTH // 2]).all(0)  # fp4 has no NaN
    if lost.all():
        return "NaN"
    if right.all():
        return "right" if all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs) else "wrong"
    return "right or NaN" if (lost | right).all() else "wrong"


def given_up(two_shot: bool, comes_late: bool) -> dict[str, Any]:
    """The last rank takes part in some calls, and then never again, or once the others have given up a call: what it
    sends lies there when the slot's turn comes again, and it makes all further calls.
    """
    replayed, is_away = Replayed(two_shot), RANK == RANKS - 1
    for _ in range(2):
        replayed.call()
    for calls in (not is_away, is_away and comes_late):
        dist.barrier()
        if calls:
            replayed.call(SOON)
    dist.barrier()
    for _ in range(4 if comes_late else 3):
        if comes_late or not is_away:
            replayed.call(SOON)
    dist.barrier()
    return {"outcomes": replayed.outcomes, "waits": replayed.waits, "raised": raised_by(replayed.space.check)}


if __name__ == "__main__":
    main()
