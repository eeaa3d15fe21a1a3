"""How long a group waits, and whether it is of one machine; and that plans know."""

import datetime
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore
from torch.distributed import _functional_collectives as collectives
from torch.distributed import distributed_c10d
from torch.nn import functional as F

import fuseplan
from fuseplan.compilation.manager import PostGradPassManager
from fuseplan.distributed import Agreement, agreement
from fuseplan.distributed.groups import elsewhere, timeout_of
from fuseplan.providers import BUILT_IN_PROVIDERS, without_shared_memory
from fuseplan.record import Reason, Report
from fuseplan.rules import Bindings

HIDDEN = 2880


def launched(monkeypatch: pytest.MonkeyPatch, *numbers: int | None) -> None:
    """As torchrun starts a process."""
    names = "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"
    for name, number in zip(names, numbers, strict=True):
        monkeypatch.delenv(name, raising=False)
        if number is not None:
            monkeypatch.setenv(name, str(number))


@pytest.mark.parametrize(
    ("launch", "others"),
    [
        ((2, 2, 4, 4), []),
        ((2, 0, 4, 2), [0, 1]),
        ((2, 0, 4, 1), [0, 1, 3]),
        ((2, 1, 4, 3), [0]),
        ((2, 2, 4, None), []),  # nobody says
        ((0, 0, 4, 1), []),  # of another launch
        ((2, 0, 8, 2), []),
    ],
)
def test_ranks_of_other_machines_are_known(
    monkeypatch: pytest.MonkeyPatch, four_ranks: str, launch: tuple[int, int, int, int | None], others: list[int]
) -> None:
    launched(monkeypatch, *launch)
    assert elsewhere(four_ranks) == others


def test_a_part_of_the_ranks_may_be_of_one_machine(monkeypatch: pytest.MonkeyPatch, four_ranks: str) -> None:
    launched(monkeypatch, 2, 0, 4, 2)
    within, across = dist.new_group([2, 3]), dist.new_group([0, 2])
    assert (elsewhere(within.group_name), elsewhere(across.group_name)) == ([], [0])
    assert elsewhere("no such group") == []


def block(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    assert dist.group.WORLD is not None
    total = collectives.all_reduce(x, "sum", dist.group.WORLD) + residual
    return F.pad(F.rms_norm(total, (HIDDEN,), weight, 1e-5), (0, 192)), total


def explained() -> Report:
    inputs = (torch.randn(16, HIDDEN).bfloat16(), torch.randn(16, HIDDEN).bfloat16(), torch.ones(HIDDEN).bfloat16())
    return fuseplan.explain(block, *inputs, device="h200")


@pytest.mark.usefixtures("four_ranks")
def test_across_machines_the_other_fusions_are_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """All-reduces whose ranks write to each other's memory are refused with the reason, whoever's they are."""
    key, met = {}, {}
    for name, launch in (("one", (2, 2, 4, 4)), ("two", (2, 0, 4, 2))):
        launched(monkeypatch, *launch)
        key[name], (graph,) = PostGradPassManager(fuseplan.PassConfig()).uuid(), explained().graphs
        met[name] = [(fusion.rule, fusion.provider) for fusion in graph.applied]
        declined = [refusal for refusal in graph.refusals if "serves ranks of one machine" in refusal.detail]
        assert bool(declined) is (name == "two")
    assert met["one"] == [("allreduce_rms_padding", "triton")]
    assert [rule for rule, _ in met["two"]] == ["act_padding"]
    assert {refusal.provider for refusal in declined} >= {"triton", "flashinfer"}
    assert {refusal.reason for refusal in declined} == {Reason.GROUP}
    assert all("rank 0, 1 is on another one" in refusal.detail for refusal in declined)
    assert key["one"] != key["two"]


def test_what_ranks_found_out_about_their_memory_is_said_of_the_kernels_that_need_it(four_ranks: str) -> None:
    providers = {each.name: each for each in without_shared_memory(BUILT_IN_PROVIDERS, "no peer access")}
    plain = {each.name: each for each in BUILT_IN_PROVIDERS}
    assert all(providers[name] == plain[name] for name in ("torch", "flashinfer", "aiter"))
    for name, offer in providers["triton"].implements.items():
        is_met = name.startswith("all_reduce")
        assert (offer == plain["triton"].implements[name]) is not is_met
        if is_met:
            refusal = offer.accepts(Bindings(name, {"group_name": four_ranks}))
            assert refusal is not None
            assert refusal.detail == f"the ranks of group {four_ranks!r} can't share memory: no peer access"


def test_a_group_waits_as_long_as_it_was_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not as long as its backend does by default."""
    asked = []

    def agree(store: object, *, deadline: datetime.timedelta, **rest: object) -> Agreement:
        asked.append(deadline.total_seconds())
        return Agreement(fused=True)

    monkeypatch.setattr(agreement, "agree", agree)
    dist.init_process_group("gloo", rank=0, world_size=1, store=HashStore(), timeout=datetime.timedelta(seconds=9))
    try:
        group = dist.new_group(timeout=datetime.timedelta(seconds=4))
        assert (timeout_of(dist.group.WORLD), timeout_of(group)) == tuple(  # type: ignore[arg-type]
            datetime.timedelta(seconds=seconds) for seconds in (9, 4)
        )
        monkeypatch.setattr(type(group), "size", lambda self: 2)
        name = group.group_name
        agreement.agree_in_groups([name], graph="g", digest="d", deadline_s=None, work_s=1)
        # By its own name from torch 2.15 on, which warns of the other.
        shorten: Any = getattr(dist, "set_timeout", None) or distributed_c10d._set_pg_timeout
        shorten(datetime.timedelta(seconds=3), group)
        agreement.agree_in_groups([name], graph="g", digest="d", deadline_s=None)
        agreement.agree_in_groups([name], graph="g", digest="d", deadline_s=7)
    finally:
        monkeypatch.undo()
        dist.destroy_process_group()
    assert asked == [5, 3, 7]


class Backends:
    """A group with a backend for each type of device, some of which don't say how long they wait."""

    def __init__(self, **seconds: int | None) -> None:
        self.seconds = seconds
        self._device_types = [torch.device(name) for name in seconds]

    def _get_backend(self, device: torch.device) -> object:
        if device.type not in self.seconds:
            raise RuntimeError("no backend")
        seconds = self.seconds[device.type]
        options = SimpleNamespace(_timeout=None if seconds is None else datetime.timedelta(seconds=seconds))
        return SimpleNamespace(options=options) if seconds != 0 else object()


@pytest.mark.parametrize(
    ("seconds", "asked", "found"),
    [
        ({"cpu": 3, "cuda": 4}, None, 4),
        ({"cpu": 3, "cuda": 4}, "cpu", 3),
        ({"cpu": 3, "meta": 4}, None, 3),
        ({"meta": 4, "cpu": 3}, None, 4),
        ({"cpu": 3}, "cuda", 3),
        ({"cpu": 3, "cuda": None}, None, 3),
        ({"cpu": 3, "cuda": 0}, None, 3),
        ({"cpu": None}, None, 77),
        ({}, None, 77),
    ],
)
def test_the_gpus_backend_says_how_long_a_group_waits(
    monkeypatch: pytest.MonkeyPatch, seconds: dict[str, int], asked: str | None, found: int
) -> None:
    """Else another one of the group, else torch's own."""
    monkeypatch.setattr(dist, "get_backend", lambda group: "gloo")
    monkeypatch.setattr(distributed_c10d, "_get_default_timeout", lambda backend: datetime.timedelta(seconds=77))
    assert timeout_of(Backends(**seconds), asked).total_seconds() == found  # type: ignore[arg-type]
