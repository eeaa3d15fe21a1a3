"""Every rank of a group on GPUs: `torchrun --nproc-per-node N tests/gpu/run_all_reduce.py` runs fuseplan's all-reduces
between real peers and prints one JSON object: by scenario, what was wrong.
"""

import contextlib
import datetime
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

import fuseplan.providers  # noqa: F401 - registers kernels
from fuseplan.dialect import NORM_FAMILY
from fuseplan.distributed import workspace as workspaces
from fuseplan.errors import CollectiveError
from fuseplan.providers.triton import all_reduce_norm
from fuseplan.verification.compare import compare
from tests.ranks import always, left_in

RANK, RANKS = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
DEVICE = torch.device("cuda", RANK)
SIZES = (1, 8191, 7, 700, 33, 300, 2, 2048)
HIDDEN = (2880, 4096, 5120, 7168, 8192, 257)
EPILOGUES: dict[str | None, tuple[Any, ...]] = {
    None: (),
    "pad": (192,),
    "static_fp8_quant": (torch.tensor([0.02], device=DEVICE), torch.float8_e4m3fn, "divide"),
    "dynamic_fp8_quant": (torch.float8_e4m3fn, 1e-6, 0.0, 0.0, None, "multiply"),
}


def part(rank: int, rows: int, hidden: int, dtype: torch.dtype, seed: int) -> Tensor:
    """What a rank brings; every rank can tell what the others do."""
    generator = torch.Generator(DEVICE).manual_seed(1000 * seed + rank)
    return torch.randn(rows, hidden, device=DEVICE, generator=generator).to(dtype)


class Case:
    """Arguments of one call, and what it has to give."""

    def __init__(
        self, rows: int, hidden: int, dtype: torch.dtype, suffix: str | None, seed: int, rounding: str = "llama",
        group: str | None = None,
    ) -> None:  # fmt: skip
        self.suffix, self.op = suffix, NORM_FAMILY[True, True, suffix]
        self.parts = [part(rank, rows, hidden, dtype, seed) for rank in range(RANKS)]
        self.residual = part(RANKS, rows, hidden, dtype, seed)
        weight = (1 + 0.1 * part(RANKS + 1, 1, hidden, torch.float32, seed)[0]).to(dtype)
        self.rest = (weight, 1e-5, rounding, *EPILOGUES[suffix])
        self.group = group or dist.group.WORLD.group_name  # type: ignore[union-attr]

    def run(self) -> tuple[Tensor, ...]:
        """The fused op, by fuseplan's kernel."""
        results: tuple[Tensor, ...] = self.op.kernel("triton")(self.parts[RANK], self.residual, *self.rest, self.group)
        return tuple(results)

    def wrong(self, results: tuple[Tensor, ...]) -> str | None:
        """What is wrong with results: NaN counts, and more error than the unfused ops make."""
        plain = NORM_FAMILY[False, True, self.suffix] if self.suffix else None
        unfused = plain.reference if plain else torch.ops.fuseplan.fused_add_rms_norm
        total = torch.stack(self.parts).float().sum(0).to(self.parts[0].dtype)
        expected = unfused(total, self.residual, *self.rest)
        wide = [each.double() if isinstance(each, Tensor) else each for each in self.rest]
        exact = unfused(torch.stack(self.parts).double().sum(0), self.residual.double(), *wide)
        for index, (got, wanted, true) in enumerate(zip(results, expected, exact, strict=True)):
            deviation = compare(got, wanted, true.to(got.dtype) if got.dtype.itemsize == 1 else true, 2.0)
            if not deviation.share <= 1:
                return f"result {index}: {deviation.text}"
        return None


def same_everywhere(results: tuple[Tensor, ...]) -> bool:
    """Whether all ranks hold the same bits."""
    mine = torch.cat([each.contiguous().reshape(-1).view(torch.uint8) for each in results])
    first = mine.clone()
    dist.broadcast(first, 0)
    return torch.equal(mine, first)


def sizes() -> list[str]:
    found = []
    for index, (rows, hidden) in enumerate((rows, hidden) for hidden in HIDDEN for rows in SIZES):
        for dtype in (torch.bfloat16, torch.float16):
            suffix = list(EPILOGUES)[index % len(EPILOGUES)]
            case = Case(rows, hidden, dtype, suffix, index)
            results = case.run()
            wrong = case.wrong(results)
            if not same_everywhere(results):
                wrong = wrong or "ranks differ"
            left = left_in(workspaces.workspace_of(case.group, DEVICE, dtype))
            if left:
                wrong = wrong or f"{left} words are left in other slots"
            if wrong:
                found.append(f"{rows} x {hidden} {dtype} {suffix}: {wrong}")
    return found


def special_values() -> list[str]:
    """-0.0, infinity, every NaN and the pattern that marks an empty word."""
    found = []
    case = Case(6, 512, torch.bfloat16, "pad", 3)
    for each in case.parts:
        each[0, :], each[1, 3] = -0.0, float("inf")
        each[2, 5] = float("nan")
        each[3].view(torch.int16)[:] = -1
    case.residual[0] = -0.0
    y, total = case.run()
    if not torch.signbit(total[0]).all() or not (total[0] == 0).all():
        found.append("-0.0 is lost")
    if total[1, 3] != float("inf") or not total[2, 5].isnan() or total[2].isnan().sum() != 1:
        found.append("infinity or NaN is lost or spreads")
    if not total[3].isnan().all() or not total[4:].isfinite().all() or (y[:, 512:] != 0).any():
        found.append("a NaN that marks empty words is taken for one, or padding isn't zero")
    return found


def races() -> list[str]:
    """Equal arguments, many times, in sizes that take turns: an error that moves is a race."""
    cases = [Case(rows, 2880, torch.bfloat16, "pad", 50 + rows) for rows in (1, 600, 64, 3000, 5)]
    first = [case.run() for case in cases]
    wrong = [case.wrong(results) for case, results in zip(cases, first, strict=True)]
    moved = 0
    for _ in range(200):
        for case, results in zip(cases, first, strict=True):
            moved += not all(torch.equal(a, b) for a, b in zip(case.run(), results, strict=True))
    return [text for text in wrong if text] + ([f"{moved} of 1000 runs differ"] if moved else [])


def capacity() -> list[str]:
    """One row fewer than fit in a launch, as many, and one more."""
    workspace = workspaces.workspace_of(dist.group.WORLD.group_name, DEVICE, torch.bfloat16)  # type: ignore[union-attr]
    hidden, found = 2880, []
    most = workspace.shot_words // hidden
    for rows in (most - 1, most, most + 1):
        before = int(workspace.state[0])
        case = Case(rows, hidden, torch.bfloat16, None, rows)
        wrong = case.wrong(case.run())
        launches = int(workspace.state[0]) - before
        if wrong or (RANKS == 2 and launches != 1 + (rows > most)):
            found.append(f"{rows} rows in {launches} launches: {wrong}")
    return found


def streams() -> list[str]:
    """Calls of several streams share a workspace, in the order in which they are made."""
    cases = [Case(rows, 2880, torch.bfloat16, "pad", 70 + rows) for rows in (900, 3, 64, 2000)]
    others = [torch.cuda.Stream() for _ in cases]
    found = []
    torch.cuda.synchronize()
    for _ in range(20):
        results = []
        for case, stream in zip(cases, others, strict=True):
            with torch.cuda.stream(stream):
                results.append(case.run())
        torch.cuda.synchronize()
        found += [text for case, each in zip(cases, results, strict=True) if (text := case.wrong(each))]
    return found[:3]


def graphs() -> list[str]:
    """Replays with changing inputs between eager calls of other sizes."""
    case, other = Case(64, 2880, torch.bfloat16, "pad", 90), Case(1500, 2880, torch.bfloat16, None, 91)
    case.run()
    torch.cuda.synchronize()
    dist.barrier()
    graph, found = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        for _ in range(3):
            results = case.run()
    for round_ in range(20):
        fresh = Case(64, 2880, torch.bfloat16, "pad", 900 + round_)
        for mine, new in zip((*case.parts, case.residual), (*fresh.parts, fresh.residual), strict=True):
            mine.copy_(new)
        case.rest[0].copy_(fresh.rest[0])
        graph.replay()
        found += [text for text in (other.wrong(other.run()), case.wrong(results)) if text]
    return found[:3]


def capture_without_workspace() -> list[str]:
    """A workspace can't be made while a graph is captured."""
    group = dist.new_group()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            workspaces.workspace_of(group.group_name, DEVICE, torch.bfloat16)
    except CollectiveError as error:
        return [] if "none can be made while a graph is captured" in str(error) else [str(error)]
    return ["it was made"]


def deadline() -> list[str]:
    """A rank that never comes: NaN, then an error, and no second wait."""
    group = dist.new_group(timeout=datetime.timedelta(seconds=2))
    case = Case(5, 2880, torch.bfloat16, "pad", 7, group=group.group_name)
    case.run()
    torch.cuda.synchronize()
    dist.barrier()
    if RANK:
        time.sleep(4)
        return []
    start = time.monotonic()
    results = case.run()
    torch.cuda.synchronize()
    waited = time.monotonic() - start
    found = [] if 1.5 < waited < 3 else [f"it waited {waited} s"]
    found += [] if results[-1].isnan().all() else ["results aren't NaN"]
    try:
        case.run()
    except CollectiveError as error:
        return found + ([] if "waited 2 s for rank 1" in str(error) else [str(error)])
    return [*found, "no error"]


@contextlib.contextmanager
def shots(two: bool) -> Iterator[None]:
    """Two shots for every call, where two ranks would take one."""
    with contextlib.ExitStack() as patches:
        if two:
            patches.enter_context(mock.patch.object(workspaces, "ONE_SHOT_RANKS", 1))
            patches.enter_context(mock.patch.object(all_reduce_norm, "SECOND_WAIT_BYTES", always(-1)))
        yield


class Replayed:
    """A graph of several calls in one workspace, of a group of its own that gives up soon."""

    def __init__(self, seconds: float, two_shot: bool) -> None:
        with shots(two_shot):
            self._capture(seconds)

    def _capture(self, seconds: float) -> None:
        group = dist.new_group(timeout=datetime.timedelta(seconds=seconds))
        self.seconds, name = seconds, group.group_name
        self.space = workspaces.workspace_of(name, DEVICE, torch.bfloat16)
        self.cases = [
            Case(rows, 2880, torch.bfloat16, suffix, 400 + rows, group=name)
            for rows, suffix in zip((1, 64, 300, 2000), EPILOGUES, strict=True)
        ]
        self.wrong = [text for case in self.cases if (text := case.wrong(case.run()))]
        torch.cuda.synchronize()
        dist.barrier()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.results = [case.run() for case in self.cases]
        self.replay()
        self.wrong += [text for case, each in zip(self.cases, self.results, strict=True) if (text := case.wrong(each))]
        torch.cuda.synchronize()
        dist.barrier()

    def replay(self, times: int = 1) -> float:
        """Seconds that it took."""
        start = time.monotonic()
        for _ in range(times):
            self.graph.replay()
        torch.cuda.synchronize()
        return time.monotonic() - start

    def plausible(self) -> list[int]:
        """Of each call, how many rows aren't NaN through and through, padding aside."""
        return [
            max(int((~each[..., :2880].float().isnan().all(-1)).sum()) for each in results) for results in self.results
        ]

    def expect_nan(self, when: str) -> None:
        """After the call that failed nothing has a number."""
        if any(self.plausible()):
            self.wrong.append(f"{when}: rows that aren't NaN, by call: {self.plausible()}")

    def expect_seconds(self, when: str, seconds: float, waits: int) -> None:
        """A deadline takes what it takes, and a replay without one next to nothing."""
        if not waits * self.seconds * 0.9 <= seconds <= waits * self.seconds + 0.5:
            self.wrong.append(f"{when} took {seconds:.2f} s")

    def expect_error(self) -> None:
        """Whenever the host is asked."""
        for _ in range(2):
            try:
                self.cases[0].run()
            except CollectiveError as error:
                if f"waited {self.seconds:g} s for" not in str(error):
                    self.wrong.append(str(error))
            else:
                self.wrong.append("no error")


def missing_under_replay() -> list[str]:
    """A rank that stops: the others wait once, in one of all the calls that are queued."""
    found = []
    for two_shot in (False, True):
        replayed = Replayed(1.5, two_shot)
        if RANK < RANKS - 1:
            replayed.expect_seconds("three replays", replayed.replay(3), waits=1)
            replayed.expect_nan("after three replays")
            replayed.expect_error()
        dist.barrier()
        found += [f"{1 + two_shot} shots: {text}" for text in replayed.wrong]
    return found


def late_under_replay() -> list[str]:
    """A rank that comes when the others have given up: it finds what they sent before, and nothing after that, and what
    it sends is nobody's.
    """
    found = []
    for two_shot in (False, True):
        replayed, last = Replayed(1.5, two_shot), RANK == RANKS - 1
        if not last:
            replayed.expect_seconds("the first replay", replayed.replay(), waits=1)
        dist.barrier()
        if last:
            replayed.expect_seconds("the late replay", replayed.replay(), waits=1)
        dist.barrier()
        for number in range(3):
            replayed.expect_seconds("a later replay", replayed.replay(), waits=0)
            replayed.expect_nan(f"replay {number}")
        dist.barrier()
        replayed.expect_error()
        found += [f"{1 + two_shot} shots: {text}" for text in replayed.wrong]
    return found


def unlike_cards() -> list[str]:
    """Ranks that see different numbers of multiprocessors."""
    found = []
    for two_shot in (False, True):
        group = dist.new_group()
        with shots(two_shot), mock.patch.object(workspaces, "multiprocessors", return_value=132 - 18 * (RANK % 2)):
            space = workspaces.workspace_of(group.group_name, DEVICE, torch.bfloat16)
            found += [] if space.processors == 114 else [f"{space.processors} multiprocessors"]
            for rows in (1, 100, 600, 5000):
                case = Case(rows, 2880, torch.bfloat16, "pad", 500 + rows, group=group.group_name)
                wrong = [text for _ in range(4) if (text := case.wrong(case.run()))]
                found += [f"{rows} rows, {1 + two_shot} shots: {text}" for text in wrong]
    return found


def two_at_once() -> list[str]:
    """Two threads that make workspaces of two groups and dtypes, on each rank in another order."""
    names = [dist.new_group().group_name for _ in range(2)]
    wanted = [(name, dtype) for name in names for dtype in (torch.bfloat16, torch.float32)]
    failed: list[str] = []

    def make(name: str, dtype: torch.dtype) -> None:
        try:
            workspaces.workspace_of(name, DEVICE, dtype)
        except Exception as error:  # noqa: BLE001 - reported by the scenario
            failed.append(str(error))

    threads = [threading.Thread(target=make, args=each, daemon=True) for each in wanted]
    for thread in reversed(threads) if RANK % 2 else threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    hanging = sum(thread.is_alive() for thread in threads)
    if failed or hanging:
        return [*failed, f"{hanging} threads wait for each other"]
    cases = [Case(64, 2880, dtype, "pad", 600, group=name) for name, dtype in wanted]
    return [text for case in cases if (text := case.wrong(case.run()))]


def no_memory_on_one() -> list[str]:
    """A rank that has no memory left keeps nobody waiting."""
    group, empty = dist.new_group(), symmetric_memory.empty

    def refuse(*size: Any, **options: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    start = time.monotonic()
    with mock.patch.object(symmetric_memory, "empty", refuse if RANK == RANKS - 1 else empty):
        try:
            workspaces.workspace_of(group.group_name, DEVICE, torch.bfloat16)
        except CollectiveError as error:
            found = [] if f"rank {RANKS - 1} fails: OutOfMemoryError" in str(error) else [str(error)]
        else:
            found = ["it was made"]
    return found if time.monotonic() - start < 10 else [*found, "others waited"]


def remade_group() -> list[str]:
    """A graph is replayed after its group was destroyed and another one has its name."""
    case = Case(64, 2880, torch.bfloat16, "pad", 800)
    case.run()
    torch.cuda.synchronize()
    dist.barrier()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = case.run()
    torch.cuda.synchronize()
    dist.barrier()
    dist.destroy_process_group()
    start_group("again")
    if dist.group.WORLD.group_name != case.group:  # type: ignore[union-attr]
        return [f"the new group is called {dist.group.WORLD.group_name}"]  # type: ignore[union-attr]
    found = []
    for round_ in range(4):
        fresh = Case(64, 2880, torch.bfloat16, "pad", 810 + round_)
        for mine, new in zip((*case.parts, case.residual), (*fresh.parts, fresh.residual), strict=True):
            mine.copy_(new)
        case.rest[0].copy_(fresh.rest[0])
        other = fresh.run()
        graph.replay()
        found += [text for text in (fresh.wrong(other), case.wrong(results)) if text]
    torch.cuda.synchronize()
    dist.barrier()
    return found


def start_group(name: str) -> None:
    """The group of all ranks, through a part of torchrun's store of its own."""
    store, rank, ranks = next(rendezvous("env://"))
    dist.init_process_group(
        "nccl", store=PrefixStore(name, store), rank=rank, world_size=ranks, device_id=DEVICE,
        timeout=datetime.timedelta(seconds=60),
    )  # fmt: skip


SCENARIOS: tuple[Callable[[], list[str]], ...] = (
    sizes, special_values, races, capacity, streams, graphs, capture_without_workspace, unlike_cards, two_at_once,
    no_memory_on_one, deadline, missing_under_replay, late_under_replay, remade_group,
)  # fmt: skip


def main() -> None:
    torch.cuda.set_device(DEVICE)
    start_group("first")
    found = {}
    wanted = sys.argv[1:] or [scenario.__name__ for scenario in SCENARIOS]
    for scenario in (each for each in SCENARIOS if each.__name__ in wanted):
        start = time.monotonic()
        try:
            wrong = scenario()
        except Exception as error:  # noqa: BLE001 - the other scenarios still tell something
            wrong = [f"{type(error).__name__}: {error}"]
        found[scenario.__name__] = wrong
        print(RANK, scenario.__name__, wrong, f"{time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)
        torch.cuda.synchronize()
    everyone: list[Any] = [None] * RANKS
    dist.all_gather_object(everyone, found)
    if RANK == 0:
        print(json.dumps({name: [text for each in everyone for text in each[name]] for name in found}), flush=True)
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
