"""Memory that tells on who uses it wrong."""

import math
import os
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fuseplan.dialect import Indices, draw_activations
from fuseplan.verification import memory
from fuseplan.verification.memory import Poisoned, make_arguments, physical_memory, poison, unguarded
from tests.verification.made import spec


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_allocated_is_full_of_nan(dtype: torch.dtype) -> None:
    given = torch.ones(3, 4, dtype=dtype)
    with Poisoned():
        made = [
            torch.empty(3, 4, dtype=dtype), torch.empty_like(given), given.new_empty(2),
            torch.empty_strided((2, 2), (2, 1), dtype=dtype), given.new_empty_strided((2, 2), (1, 2)),
        ]  # fmt: skip
        written = torch.zeros(3)
    assert all(each.isnan().all() for each in made)
    assert torch.equal(written, torch.zeros(3))


def test_memory_that_is_not_there_is_not_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Systems that promise more memory than there is would end the process over it."""
    monkeypatch.setattr(memory, "physical_memory", lambda: 1000)
    with Poisoned():
        assert torch.empty(250).isnan().all()
        with pytest.raises(MemoryError, match=r"1,004 bytes were asked for; this machine has 1,000"):
            torch.empty(251)
    assert torch.empty(251).shape == (251,)


def test_the_memory_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 2**28 < physical_memory() < 2**46
    monkeypatch.delattr(os, "sysconf")
    assert physical_memory() == math.inf


@pytest.mark.parametrize(
    ("dtype", "byte"),
    [
        (torch.float8_e4m3fn, 0x7F), (torch.float8_e4m3fnuz, 0x80), (torch.float8_e5m2, 0x7F),
        (torch.float8_e5m2fnuz, 0x80), (torch.float8_e8m0fnu, 0xFF),
        (torch.uint8, 0x7F), (torch.int8, 0x7F), (torch.bool, 1),
    ],
)  # fmt: skip
def test_bytes_are_poisoned_with_what_is_no_number_or_large(dtype: torch.dtype, byte: int) -> None:
    made = poison(torch.zeros(3, dtype=dtype))
    assert made.dtype is dtype
    assert made.view(torch.uint8).tolist() == [byte] * 3
    if "float8" in str(dtype):
        assert made.float().isnan().all()


def test_wide_integers_are_poisoned_with_the_largest() -> None:
    assert poison(torch.zeros(2, dtype=torch.int32)).tolist() == [2**31 - 1] * 2
    assert poison(torch.zeros(2, dtype=torch.int16)).tolist() == [2**15 - 1] * 2


def drawn(arguments: dict[str, Any], seed: int = 0, **draws: Any) -> dict[str, Any]:
    return make_arguments(arguments, lambda name: draws.get(name, draw_activations), seed)


@pytest.mark.parametrize(("dtype", "off"), [(torch.float32, 0), (torch.bfloat16, 6), (torch.uint8, 3)])
def test_an_argument_lies_between_margins_as_far_from_a_border_as_in_the_graph(dtype: torch.dtype, off: int) -> None:
    made = drawn({"x": spec(3, 5, dtype=dtype, stride=(8, 1), off=off)})["x"]
    size = dtype.itemsize
    assert made.tensor.storage_offset() * size == 4 * 128 + off
    assert made.buffer.nbytes == 4 * 128 + off + 21 * size + 4 * 128
    inside = torch.zeros_like(made.buffer, dtype=torch.bool)
    inside.as_strided((3, 5), (8, 1), made.tensor.storage_offset()).fill_(True)
    poisoned = poison(torch.empty_like(made.buffer))
    assert torch.equal(made.buffer[~inside].view(torch.uint8), poisoned[~inside].view(torch.uint8))
    assert not made.tensor.isnan().any()
    assert made.is_untouched
    assert made.is_written_inside


@pytest.mark.parametrize(("place", "is_inside"), [(0, True), (20, True), (5, False), (-1, False), (21, False)])
def test_what_is_written_is_seen_wherever_it_is(place: int, is_inside: bool) -> None:
    made = drawn({"x": spec(3, 5, stride=(8, 1))})["x"]
    copy = made.copied()
    assert copy.tensor.data_ptr() != made.tensor.data_ptr()
    assert torch.equal(copy.tensor, made.tensor)
    copy.buffer[made.tensor.storage_offset() + place] = 7.0
    assert (made.is_untouched, copy.is_untouched, copy.is_written_inside) == (True, False, is_inside)
    assert torch.equal(copy.of_before, made.tensor)
    assert torch.equal(copy.copied().tensor, made.tensor), "a copy is of what it was"


def test_arguments_are_drawn_by_seed_and_kind() -> None:
    arguments = {
        "x": spec(4, 8), "same": spec(4, 8, same_as="x"), "other": spec(4, 8), "flag": spec(4, 8, dtype=torch.int64),
        "filled": spec(2, 3, fill=0.5), "none": spec(0, 8), "eps": 1e-6, "row": spec(5, 8, stride=(0, 1)),
    }  # fmt: skip
    made, again, others = (unguarded(drawn(arguments, seed)) for seed in (0, 0, 1))
    assert list(made) == list(arguments)
    assert made["same"] is made["x"]
    assert made["eps"] == 1e-6
    assert all(torch.equal(made[name], again[name]) for name in ("x", "other", "flag"))
    assert not torch.equal(made["x"], others["x"])
    assert not torch.equal(made["x"], made["other"])
    assert set(made["flag"].flatten().tolist()) == {0, 1}
    assert made["filled"].tolist() == [[0.5] * 3] * 2
    assert made["none"].shape == (0, 8)
    assert torch.equal(made["row"][0], made["row"][4])


def test_places_are_distinct_and_not_the_first_where_there_are_others() -> None:
    for length, allowed in ((9, set(range(1, 9))), (3, {0, 1, 2}), (4, {1, 2, 3})):
        arguments = {"cache": spec(2, length), "places": spec(3, dtype=torch.int64)}
        found = [unguarded(drawn(arguments, seed, places=Indices(of="cache", dim=1)))["places"] for seed in range(9)]
        assert all(len(set(each.tolist())) == 3 for each in found)
        assert set(torch.cat(found).tolist()) == allowed


def test_integers_with_a_draw_of_their_own_are_drawn_by_it() -> None:
    made = drawn({"n": spec(4, dtype=torch.int64)}, n=lambda shape, device, generator: torch.full(shape, 7))
    assert made["n"].tensor.tolist() == [7] * 4


def test_blocks_that_a_gpus_allocator_hands_out_next_are_poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    empty, asked = torch.empty, list[tuple[int, str]]()

    def noted(count: int, *, device: torch.device) -> torch.Tensor:
        asked.append((count, device.type))
        return empty(count)

    monkeypatch.setattr(torch, "empty", noted)
    for device, size in (("cuda", 5000), ("cuda", 0), ("cpu", 5000)):
        memory.poison_allocator(torch.device(device), size)
    assert asked == [(1250, "cuda")] * 4 + [(256, "cuda")] * 4


def test_what_ranks_hold_is_added_up(one_rank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gathered as bytes, in the order of rows."""
    x = torch.arange(6, dtype=torch.bfloat16).view(3, 2).t()

    def gather(parts: list[torch.Tensor], mine: torch.Tensor, group: Any) -> None:
        parts[0].copy_(mine)
        parts[1].copy_((x.contiguous() * 4).view(-1).view(torch.uint8))

    monkeypatch.setattr(dist, "all_gather", gather)
    monkeypatch.setattr(dist.ProcessGroup, "size", lambda self: 2)
    functional = torch.ops._c10d_functional
    with memory.Gathered():
        found = functional.wait_tensor(functional.all_reduce(x, "sum", one_rank))
    assert torch.equal(found, x * 5)
    monkeypatch.undo()
    monkeypatch.setattr(memory, "group_size", lambda name: 3 if name == one_rank else None)
    with memory.Loopback():
        found = functional.wait_tensor(functional.all_reduce(x, "sum", one_rank))
    assert torch.equal(found, x * 3)
