"""Workspaces: what fits, what is found out, when they are made and when they go."""

import contextlib
import datetime
import gc
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import fx
from torch._C._distributed_c10d import HashStore

from fuseplan.compilation import first_run
from fuseplan.config import PassConfig
from fuseplan.distributed import Agreement, workspace
from fuseplan.distributed.agreement import _verdict
from fuseplan.distributed.groups import resolve, timeout_of
from fuseplan.distributed.shared import SHARED
from fuseplan.distributed.workspace import (
    HEADER_BYTES,
    SLOTS,
    UNIT_WORDS,
    WORKSPACES,
    Workspace,
    loopback,
    workspace_of,
)
from fuseplan.errors import CollectiveError, PlanError
from fuseplan.record import GraphReport, Report
from tests.providers.stand_ins import ranks

CPU = torch.device("cpu")


@contextlib.contextmanager
def world(**how: Any) -> Iterator[str]:
    """The name of a gloo group of this process alone."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=HashStore(), **how)
    assert dist.group.WORLD is not None
    try:
        yield dist.group.WORLD.group_name
    finally:
        dist.destroy_process_group()


def made(group: str, capacity: int = 1024) -> Workspace:
    return Workspace(group, CPU, 2, capacity=capacity)


def test_memory_is_empty_and_parts_are_whole_units(one_rank: str) -> None:
    space = made(one_rank, capacity=2 * (5 * UNIT_WORDS + 7))
    assert space.shot_words == 5 * UNIT_WORDS
    assert space.words.dtype is torch.int16
    assert (space.words == -1).all()
    assert not space.state.any()
    assert space.peer_offsets.tolist() == [0]


def test_one_rank_alone_has_the_slots_of_all_and_the_sums(four_ranks: str) -> None:
    space = Workspace(four_ranks, CPU, 4, capacity=4096, loopback=True)
    assert (space.rank, space.ranks, space.one_shot) == (2, 4, False)
    assert space.memory.local.numel() == HEADER_BYTES + SLOTS * (3 + 1) * 4096
    assert space.peer_offsets.tolist() == [0] * 4


class Met:
    """A meeting to which the others come, with fewer processors."""

    def __init__(self, group: object, purpose: str, facts: str, deadline: datetime.timedelta, advice: str) -> None:
        self.said = purpose, facts, deadline.total_seconds()
        self.steps: list[str] = []

    def least(self, mine: int) -> int:
        return 78

    def step(self, take: Callable[[], Any]) -> Any:
        self.steps.append("step")
        return take()


@pytest.mark.parametrize(("mebibytes", "shot"), [(2, 2**20), (32, 8 * 2**20)])
def test_four_ranks_send_parts_and_their_sums(
    four_ranks: str, monkeypatch: pytest.MonkeyPatch, mebibytes: int, shot: int
) -> None:
    """Each rank has a part of every message, but of small ones more than that."""
    asked: list[tuple[Any, ...]] = []

    def allocate(size: int, *rest: Any) -> workspace.SharedMemory:
        asked.append((size, *rest))
        local = torch.zeros(size, dtype=torch.uint8)
        addresses = [local.data_ptr() + 160 * rank for rank in range(-2, 2)]
        return workspace.SharedMemory(local=local, addresses=addresses, keep=None)

    monkeypatch.setattr(workspace, "Meeting", Met)
    capacity = mebibytes * 2**20
    space = Workspace(four_ranks, CPU, 2, capacity=capacity, allocate=allocate, use="bfloat16", timeout_s=2)
    assert (space.one_shot, space.loopback, space.processors) == (False, False, 78)
    assert (2 * space.shot_words, 2 * space.sums_words) == (shot, capacity)
    assert space.sums_at == 3 * 3 * space.shot_words
    ((size, *rest, meeting),) = asked
    assert (size, rest) == (512 + 3 * 3 * shot + 3 * capacity, [four_ranks, CPU])
    assert meeting.said == (
        f"share {capacity} bytes of memory for bfloat16", f"2 {size} {space.shot_words} 64", timeout_of_fake(four_ranks)
    )  # fmt: skip
    assert meeting.steps == ["step"], "nobody sends before all are empty"
    assert space.peer_offsets.tolist() == [-20, -10, 0, 10]
    assert (space.state.tolist(), space.words.numel()) == ([0] * 9, (size - 512) // 2)
    assert (space.words == -1).all()
    assert (space.timed, space.timeout) == (False, 2_000_000)
    assert space.layout == f"78 processors, {space.shot_words} words, {space.sums_words} of sums"
    space.failure[0] = 4
    with pytest.raises(CollectiveError, match="for rank 3; results"):
        space.check()


def timeout_of_fake(name: str) -> float:
    return timeout_of(resolve(name), "cpu").total_seconds()


def test_one_rank_that_stands_for_four_sends_whole_messages(four_ranks: str) -> None:
    with loopback():
        space = workspace_of(four_ranks, CPU, torch.bfloat16)
        other = workspace_of(four_ranks, CPU, torch.float32)
        assert workspace_of(four_ranks, CPU, torch.bfloat16) is space is not other
    assert space.loopback
    assert (2 * space.shot_words, 4 * other.shot_words) == (2**20, 2**20)
    assert space.memory.addresses == [space.memory.local.data_ptr()] * 4


@pytest.mark.parametrize(("count", "one_shot"), [(2, True), (3, False)])
def test_two_ranks_need_no_sums(count: int, one_shot: bool) -> None:
    with ranks(count, rank=1) as group:
        space = Workspace(group, CPU, 2, capacity=4096, loopback=True, timeout_s=1e-9)
    assert (space.one_shot, space.sums_words) == (one_shot, 0 if one_shot else 2048)
    assert (space.shot_words, space.timeout) == (2048, 1)
    assert [each.data_ptr() for each in space.tensors] == [
        each.data_ptr() for each in (space.words, space.peer_offsets, space.state, space.failure)
    ]


@pytest.mark.parametrize("error", [RuntimeError, ValueError, LookupError])
def test_a_group_that_is_not_there_any_more_is_not_current(
    one_rank: str, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    """Whatever torch raises then."""

    def gone(name: str) -> object:
        raise error

    space, found = made(one_rank), list[bool]()
    for each in (resolve, lambda name: object(), gone):
        monkeypatch.setattr(workspace, "resolve", each)
        found.append(space.is_current)
    assert found == [True, False, False]


def test_what_is_wanted_is_made_on_its_device(one_rank: str) -> None:
    layout = workspace.prepare([(one_rank, "bfloat16", "cpu"), (one_rank, "float32", "cpu")])
    spaces = [workspace_of(one_rank, CPU, dtype) for dtype in (torch.bfloat16, torch.float32)]
    assert SHARED.values(WORKSPACES) == spaces
    assert layout == "; ".join(each.layout for each in spaces)
    assert "1 processors, 16777216 words, 0 of sums" in layout
    SHARED.release()


def test_what_fits_is_what_is_usable(one_rank: str) -> None:
    space = made(one_rank)
    space.require(512, 0)
    with pytest.raises(CollectiveError, match=r"needs 513 elements, and it holds 512"):
        space.require(513, 0)
    with pytest.raises(CollectiveError, match=r"needs 1 elements of sums, and it holds 0"):
        space.require(512, 1)


@pytest.mark.parametrize(("found", "who"), [(1, "rank 0"), (2, "the sums of the other ranks")])
def test_what_a_kernel_found_out_is_raised_from_then_on(one_rank: str, found: int, who: str) -> None:
    space = Workspace(one_rank, CPU, 2, capacity=1024, timeout_s=7)
    space.check()
    space.failure[0] = found
    for _ in range(2):
        with pytest.raises(CollectiveError, match=f"waited 7 s for {who}; results since then are NaN"), space.held():
            pytest.fail("a call was made")


def test_a_workspace_is_made_once_and_again_for_a_new_group() -> None:
    spaces = []
    for _ in range(2):
        with world() as name:
            first = workspace_of(name, CPU, torch.bfloat16, 1024)
            assert workspace_of(name, CPU, torch.bfloat16, 1024) is first
            assert workspace_of(name, CPU, torch.float16, 1024) is not first
            spaces.append(first)
    assert spaces[0] is not spaces[1]
    SHARED.release()
    assert not SHARED.values(WORKSPACES)


def test_what_failed_in_a_group_that_is_gone_hinders_nobody() -> None:
    for failed in (True, False):
        with world() as name:
            if not failed:
                workspace.check_workspaces()
            space = workspace_of(name, CPU, torch.bfloat16, 1024)
            with space.held():
                space.failure[0] = 1 if failed else 0
            if failed:
                with pytest.raises(CollectiveError):
                    workspace.check_workspaces()
    SHARED.release()


def test_calls_of_several_threads_follow_each_other(one_rank: str) -> None:
    space, inside, most = made(one_rank), [0], [0]

    def call() -> None:
        for _ in range(20):
            with space.held(), space.held():
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                time.sleep(0.0005)
                inside[0] -= 1

    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(call) for _ in range(4)]:
            future.result()
    assert most == [1]


def test_a_call_on_another_stream_waits_for_the_last_one(one_rank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[tuple[str, int]] = []
    current, captures = [0], [False]

    class Event:
        def record(self, stream: int) -> None:
            log.append(("record", stream))

        def wait(self, stream: int) -> None:
            log.append(("wait", stream))

    space = made(one_rank)
    monkeypatch.setattr(space, "device", torch.device("cuda", 0))
    monkeypatch.setattr(workspace, "handle_of_current_stream", lambda device: current[0])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[0])
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: captures[0])
    for stream, is_captured in ((1, False), (1, False), (3, True), (2, False), (1, False)):
        current[0], captures[0] = stream, is_captured
        with space.held():
            log.append(("launch", stream))
    one, two = [("launch", 1), ("record", 1)], [("launch", 2), ("record", 2)]
    assert log == [*one, *one, ("launch", 3), ("wait", 2), *two, ("wait", 1), *one]


def test_what_one_rank_tries_alone_is_kept_apart_and_given_back(one_rank: str) -> None:
    shared = workspace_of(one_rank, CPU, torch.bfloat16, 1024)
    with loopback():
        tried = weakref.ref(workspace_of(one_rank, CPU, torch.bfloat16, 1024))
        assert tried() not in (shared, None)
        assert workspace_of(one_rank, CPU, torch.bfloat16, 1024) is tried()
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(workspace_of, one_rank, CPU, torch.bfloat16, 1024).result() is shared
    gc.collect()
    assert tried() is None
    assert SHARED.values(WORKSPACES) == [shared]
    assert workspace_of(one_rank, CPU, torch.bfloat16, 1024) is shared
    SHARED.release()


def test_none_is_made_while_a_graph_is_captured(one_rank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace, "capturing", lambda: True)
    with pytest.raises(CollectiveError, match="run the model once before capturing it"):
        workspace_of(one_rank, torch.device("cuda", 0), torch.bfloat16, 2048)


def test_the_deadline_is_the_groups_own() -> None:
    with world(timeout=datetime.timedelta(seconds=9)):
        assert made(dist.new_group(timeout=datetime.timedelta(seconds=4)).group_name).timeout_s == 4


WANTED = ("0", "bfloat16", "cuda:3")


def report(*workspaces: tuple[str, str, str]) -> Report:
    graph = GraphReport(graph="graph_0", groups=("0",), workspaces=workspaces)
    return Report(policy="planned", order=(), rules=(), graphs=(graph,))


class Asked:
    """Stands for the other ranks, who agree to what can be agreed to."""

    def __init__(self) -> None:
        self.digests: list[str] = []

    def __call__(self, names: Any, *, graph: str, digest: str, deadline_s: float | None) -> Agreement:
        self.digests.append(digest)
        return _verdict({0: digest, 1: digest}, [], "", "")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    found = Asked()
    monkeypatch.setattr(first_run, "agree_in_groups", found)
    return found


def test_ranks_that_agree_share_memory_and_agree_again(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the device of the graph's tensors, whatever the current one, and in what they share too."""
    prepared = []

    def prepare(wanted: Any) -> str:
        prepared.append(wanted)
        return "132 processors"

    monkeypatch.setattr(first_run, "prepare", prepare)
    graph = fx.GraphModule({}, fx.Graph())
    assert first_run.settle(graph, report(WANTED, WANTED), "digest", PassConfig(), ()) == Agreement(fused=True)
    assert prepared == [(WANTED,)]
    assert asked.digests == ["digest", "digest 132 processors"]
    assert first_run.settle(graph, report(), "other", PassConfig(), ()) == Agreement(fused=True)
    assert asked.digests[2:] == ["other"]


@pytest.mark.parametrize(
    "error", [CollectiveError("no peer access"), RuntimeError("CUDA\nerror"), AssertionError(), KeyError("x")]
)
def test_a_rank_that_can_not_share_memory_says_so_whatever_it_is(
    asked: Asked, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """The others would wait for it, or run what it doesn't."""

    def refuse(wanted: Any) -> str:
        raise error

    monkeypatch.setattr(first_run, "prepare", refuse)
    verdict = first_run.settle(fx.GraphModule({}, fx.Graph()), report(WANTED), "digest", PassConfig(), ())
    assert (verdict.fused, verdict.apart) == (False, True)
    said = f"can't share memory: {type(error).__name__}: "
    assert verdict.reason is not None
    assert verdict.reason.startswith(f"rank 0 {said}")
    assert asked.digests[0] == "digest"
    assert asked.digests[1].startswith(f"apart: {said}")


def agreed(verdict: Agreement, apart: Callable[[str], Any]) -> first_run.AgreedGraph:
    return first_run.AgreedGraph(
        lambda x: x + 1, unfused=lambda: lambda x: x, apart=apart, settle=lambda: verdict, tell=lambda verdict: None
    )


def test_what_can_not_be_planned_without_shared_memory_is_run_unfused() -> None:
    def refuse(why: str) -> Any:
        raise PlanError("it is forced")

    assert agreed(Agreement(fused=False, apart=True, reason="far"), refuse)(1) == 1


def test_a_graph_raises_what_an_earlier_call_of_its_kernels_found_out(one_rank: str) -> None:
    space = workspace_of(one_rank, CPU, torch.bfloat16, 4096)
    graph = agreed(Agreement(fused=True), lambda why: None)
    assert graph(1) == 2
    space.failure[0] = 1
    with pytest.raises(CollectiveError, match="waited"):
        graph(1)
    SHARED.release()
