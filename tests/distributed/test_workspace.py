"""Workspaces: what fits, what is found out, when they are made and when they go."""

import datetime
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import fx
from torch._C._distributed_c10d import HashStore

from fuseplan import first_run
from fuseplan.config import PassConfig
from fuseplan.distributed import Verdict, workspace
from fuseplan.distributed.workspace import HEADER_BYTES, SLOTS, UNIT_WORDS, Workspace, alone, workspace_of
from fuseplan.errors import CollectiveError
from fuseplan.record import GraphReport, Report

CPU = torch.device("cpu")


def made(group: str, capacity: int = 1024) -> Workspace:
    return Workspace(group, CPU, 2, capacity=capacity)


def test_memory_is_empty_and_nothing_is_remembered(one_rank: str) -> None:
    space = made(one_rank)
    assert space.words.dtype is torch.int16
    assert (space.words == -1).all()
    assert not space.state.any()
    assert space.distances.tolist() == [0]


def test_one_rank_alone_has_the_slots_of_all_and_the_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=2, world_size=4)
    try:
        assert dist.group.WORLD is not None
        space = Workspace(dist.group.WORLD.group_name, CPU, 4, capacity=4096, alone=True)
        assert (space.rank, space.ranks, space.one_shot) == (2, 4, False)
        assert space.memory.local.numel() == HEADER_BYTES + SLOTS * (3 + 1) * 4096
        assert space.distances.tolist() == [0] * 4
    finally:
        dist.destroy_process_group()


def test_parts_are_whole_units(one_rank: str) -> None:
    space = made(one_rank, capacity=2 * (5 * UNIT_WORDS + 7))
    assert space.shot_words == 5 * UNIT_WORDS


@pytest.mark.parametrize(("words", "fits"), [(511, True), (512, True), (513, False)])
def test_what_fits_is_what_is_usable(one_rank: str, words: int, fits: bool) -> None:
    space = made(one_rank)
    if fits:
        space.enter(words, 0)
        return
    with pytest.raises(CollectiveError, match=r"needs 513 elements, and it holds 512"):
        space.enter(words, 0)
    with pytest.raises(CollectiveError, match=r"needs 1 elements of sums, and it holds 0"):
        space.enter(512, 1)


@pytest.mark.parametrize(("found", "who"), [(1, "rank 0"), (2, "the sums of the other ranks")])
def test_what_a_kernel_found_out_is_raised_from_then_on(one_rank: str, found: int, who: str) -> None:
    space = Workspace(one_rank, CPU, 2, capacity=1024, timeout_s=7)
    space.check()
    space.failure[0] = found
    for _ in range(2):
        with pytest.raises(CollectiveError, match=f"waited 7 s for {who}; results since then are NaN"):
            space.enter(1, 0)


def test_a_workspace_is_made_once_and_again_for_a_new_group() -> None:
    spaces = []
    for _ in range(2):
        dist.init_process_group("gloo", rank=0, world_size=1, store=HashStore())
        assert dist.group.WORLD is not None
        name = dist.group.WORLD.group_name
        first = workspace_of(name, CPU, torch.bfloat16, 1024)
        assert workspace_of(name, CPU, torch.bfloat16, 1024) is first
        assert workspace_of(name, CPU, torch.float16, 1024) is not first
        spaces.append(first)
        dist.destroy_process_group()
    assert spaces[0] is not spaces[1]
    workspace.release()
    assert not workspace._OPEN


def test_what_one_rank_tries_alone_is_kept_apart_and_given_back(one_rank: str) -> None:
    shared = workspace_of(one_rank, CPU, torch.bfloat16, 1024)
    with alone():
        assert workspace_of(one_rank, CPU, torch.bfloat16, 1024) is not shared
        assert len(workspace._OPEN) == 2
    assert list(workspace._OPEN.values()) == [shared]
    workspace.release()


def test_none_is_made_while_a_graph_is_captured(one_rank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace, "capturing", lambda device: True)
    with pytest.raises(CollectiveError, match="run the model once before capturing it"):
        workspace_of(one_rank, CPU, torch.bfloat16, 2048)


def test_the_deadline_is_the_groups_own() -> None:
    dist.init_process_group("gloo", rank=0, world_size=1, store=HashStore(), timeout=datetime.timedelta(seconds=9))
    group = dist.new_group(timeout=datetime.timedelta(seconds=4))
    assert made(group.group_name).timeout_s == 4
    dist.destroy_process_group()


def report(*workspaces: tuple[str, str]) -> Report:
    graph = GraphReport(graph="graph_0", groups=("0",), workspaces=workspaces)
    return Report(policy="planned", order=(), rules=(), graphs=(graph,))


class Asked:
    """Stands for the other ranks, who agree."""

    def __init__(self) -> None:
        self.digests: list[str] = []

    def __call__(self, names: Any, *, graph: str, digest: str, deadline_s: float | None) -> Verdict:
        self.digests.append(digest)
        return Verdict(fused=True)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    found = Asked()
    monkeypatch.setattr(first_run, "agree_in_groups", found)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return found


def test_ranks_that_agree_share_memory_and_agree_again(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = []
    monkeypatch.setattr(first_run, "prepare", lambda wanted, device: prepared.append((wanted, device)))
    graph = fx.GraphModule({}, fx.Graph())
    wanted = ("0", "bfloat16")
    assert first_run.settle(graph, report(wanted, wanted), "digest", PassConfig(), ()) == Verdict(fused=True)
    assert prepared == [((wanted,), torch.device("cuda", 0))]
    assert asked.digests == ["digest", "digest"]
    assert first_run.settle(graph, report(), "other", PassConfig(), ()) == Verdict(fused=True)
    assert asked.digests[2:] == ["other"]


def test_a_rank_that_can_not_share_memory_runs_unfused_and_says_so(
    asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(wanted: Any, device: torch.device) -> None:
        raise CollectiveError("no peer access")

    monkeypatch.setattr(first_run, "prepare", refuse)
    verdict = first_run.settle(fx.GraphModule({}, fx.Graph()), report(("0", "bfloat16")), "digest", PassConfig(), ())
    assert verdict == Verdict(fused=False, reason="no peer access")
    assert asked.digests == ["digest", "failed: could not compile it: CollectiveError: no peer access"]


def test_a_graph_raises_what_an_earlier_call_of_its_kernels_found_out(one_rank: str) -> None:
    space = workspace_of(one_rank, CPU, torch.bfloat16, 4096)
    graph = first_run.AgreedGraph(
        lambda x: x + 1, unfused=lambda: lambda x: x, settle=lambda: Verdict(fused=True), tell=lambda verdict: None
    )
    assert graph(1) == 2
    space.failure[0] = 1
    with pytest.raises(CollectiveError, match="waited"):
        graph(1)
    workspace.release()
