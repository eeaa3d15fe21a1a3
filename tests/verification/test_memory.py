"""Memory that tells on who uses it wrong, and what leaves a region held against the graph's own values in how it lies
there.
"""

import math
import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from fuseplan.dialect import Indices, draw_activations
from fuseplan.dialect.raising import canonicalize
from fuseplan.matching import find_matches
from fuseplan.providers import BUILT_IN_PROVIDERS
from fuseplan.rules import by_name
from fuseplan.rules.families import BUILT_IN_RULES
from fuseplan.verification import memory
from fuseplan.verification.check import check
from fuseplan.verification.layout import misplaced, shares
from fuseplan.verification.memory import Gathered, Loopback, Poisoned, make_arguments, poison, unguarded
from fuseplan.verification.region import MatchedRegion
from fuseplan.verification.specs import Sizes, cases_of
from tests.helpers import HIDDEN, llama, post_grad, randn
from tests.verification.made import spec

functional = torch.ops._c10d_functional


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
    monkeypatch.undo()
    assert 2**28 < memory.physical_memory() < 2**46
    monkeypatch.delattr(os, "sysconf")
    assert memory.physical_memory() == math.inf


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
        "sevens": spec(2, dtype=torch.int64),
    }  # fmt: skip
    sevens = {"sevens": lambda shape, device, generator: torch.full(shape, 7)}
    made, again, others = (unguarded(drawn(arguments, seed, **sevens)) for seed in (0, 0, 1))
    assert list(made) == list(arguments)
    assert made["same"] is made["x"]
    assert made["eps"] == 1e-6
    assert all(torch.equal(made[name], again[name]) for name in ("x", "other", "flag"))
    assert not torch.equal(made["x"], others["x"])
    assert not torch.equal(made["x"], made["other"])
    assert set(made["flag"].flatten().tolist()) == {0, 1}
    assert made["sevens"].tolist() == [7, 7], "integers with a draw of their own are drawn by it"
    assert made["filled"].tolist() == [[0.5] * 3] * 2
    assert made["none"].shape == (0, 8)
    assert torch.equal(made["row"][0], made["row"][4])


def test_places_are_distinct_and_not_the_first_where_there_are_others() -> None:
    for length, allowed in ((9, set(range(1, 9))), (3, {0, 1, 2}), (4, {1, 2, 3})):
        arguments = {"cache": spec(2, length), "places": spec(3, dtype=torch.int64)}
        found = [unguarded(drawn(arguments, seed, places=Indices(of="cache", dim=1)))["places"] for seed in range(9)]
        assert all(len(set(each.tolist())) == 3 for each in found)
        assert set(torch.cat(found).tolist()) == allowed


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
    with Gathered():
        found = functional.wait_tensor(functional.all_reduce(x, "sum", one_rank))
    assert torch.equal(found, x * 5)
    monkeypatch.undo()
    monkeypatch.setattr(memory, "group_size", lambda name: 3 if name == one_rank else None)
    with Loopback():
        found = functional.wait_tensor(functional.all_reduce(x, "sum", one_rank))
    assert torch.equal(found, x * 3)


# How results lie in memory.


W = torch.linspace(0.5, 1.5, HIDDEN).bfloat16()
X = torch.zeros(4, 8)
OWN = torch.zeros(4, 8)


def wrong(*actual: Tensor, wanted: tuple[Tensor | None, ...], free: tuple[int, ...] = ()) -> str | None:
    return misplaced(actual, wanted, {"x": X, "eps": 1e-6}, free)


WIDE = torch.zeros(4, 16)[:, :8]


@pytest.mark.parametrize(
    ("actual", "wanted", "free"),
    [
        ((OWN,), (OWN.clone(),), ()), ((X[1:],), (X[1:],), ()), ((OWN, OWN[1:]), (X.clone(), None), ()),
        ((WIDE[:1],), (OWN[:1].clone(),), ()), ((WIDE[:0],), (OWN[:0].clone(),), ()),
        ((torch.zeros(4, 16), WIDE), (torch.zeros(4, 16), OWN), (1,)),
    ],
    ids=["alike", "the same", "nothing in the graph", "strides of one element", "of none", "nobody reads by layout"],
)  # fmt: skip
def test_results_that_lie_as_the_graphs_do_are_right(actual: Any, wanted: Any, free: tuple[int, ...]) -> None:
    assert wrong(*actual, wanted=wanted, free=free) is None


def test_strides_and_offsets_count() -> None:
    assert wrong(WIDE, wanted=(OWN,)) == (
        "result 0 is float32[4, 8] with strides (16, 1), and the graph's own value is float32[4, 8] with strides (8, 1)"
    )
    assert "from element 8 on" in str(wrong(torch.zeros(5, 8)[1:], wanted=(OWN,)))


def test_what_no_node_has_hides_nothing_behind_it() -> None:
    assert str(wrong(OWN, WIDE, wanted=(None, OWN))).startswith("result 1 is float32[4, 8] with strides (16, 1)")
    assert str(wrong(OWN, WIDE, wanted=(OWN, OWN), free=(0,))).startswith("result 1 is")
    assert wrong(OWN, OWN, wanted=(None, OWN.clone())) is None, "nobody has the other one"


def test_the_graphs_own_values_may_be_of_other_arguments() -> None:
    own = OWN.clone()
    before = {"x": own, "eps": 1e-6}
    for actual, wanted, says in ((X, own, None), (X, X, SHARED.format("its argument x")),
                                 (OWN, own, UNSHARED.format("its argument x"))):  # fmt: skip
        assert misplaced([actual], [wanted], {"x": X, "eps": 1e-6}, (), before) == (says and f"result 0 {says}")


@pytest.mark.parametrize(
    ("left", "right", "is_shared"),
    [
        (X, X[2:], True), (X[0, :1], X[3, 7:], True), (X, OWN, False), (X[0, :1], OWN[0, :1], False),
        (X, X[:0], False), (X[:0], X, False),
    ],
)  # fmt: skip
def test_parts_of_one_memory_share_it_where_they_have_elements(left: Tensor, right: Tensor, is_shared: bool) -> None:
    assert shares(left, right) is is_shared


SHARED = "shares memory with {}, and the graph's own value doesn't"
UNSHARED = "shares no memory with {}, and the graph's own value does"


def test_memory_is_shared_where_the_graph_shares_it_and_nowhere_else() -> None:
    assert wrong(X, wanted=(OWN,)) == f"result 0 {SHARED.format('its argument x')}"
    assert wrong(OWN, wanted=(X,)) == f"result 0 {UNSHARED.format('its argument x')}"
    inside, other = torch.zeros(6, 8)[1:5], OWN.clone()
    assert misplaced((inside,), (OWN,), {"x": inside}, (), {"x": X}) == f"result 0 {SHARED.format('its argument x')}"
    assert wrong(OWN, OWN, wanted=(OWN, other)) == f"result 1 {SHARED.format('result 0')}"
    assert wrong(OWN, other, wanted=(OWN, OWN)) == f"result 1 {UNSHARED.format('result 0')}"


def test_a_slice_where_a_dense_value_is_promised_fails_verification() -> None:
    def model(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        y, _ = llama(x, None, w)
        return F.pad(y, (0, 8)), y

    canonical = canonicalize(post_grad(model, randn(6, HIDDEN), W))
    rules = {"act_padding": by_name(BUILT_IN_RULES)["act_padding"]}
    (match,) = find_matches(canonical, rules, BUILT_IN_PROVIDERS[:1]).candidates
    (case, *_), region = cases_of(match, Sizes(canonical.graph), (6, 6)), MatchedRegion.of(canonical, match)
    found = [check(match.rule, "torch", case, seed=1, region=region, free=free) for free in ((), (1,))]
    assert found[0].wrong == (
        "result 1 is bfloat16[6, 64] with strides (72, 1), "
        "and the graph's own value is bfloat16[6, 64] with strides (64, 1)"
    )
    assert found[1].wrong is None


def test_all_reduces_of_one_rank_and_of_all_lie_as_torchs_do(one_rank: str) -> None:
    columns = randn(3, 16, 5).transpose(1, 2)
    own = functional.wait_tensor(functional.all_reduce(columns, "sum", one_rank))
    for mode in (Loopback(), Gathered()):
        with mode:
            seen = functional.wait_tensor(functional.all_reduce(columns, "sum", one_rank))
        assert (seen.stride(), seen.tolist()) == (own.stride(), own.tolist())
