"""How AITER is called, held against the signatures of its source by stand-ins that compute what its kernels do.

Nothing of this has been run on ROCm hardware.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore

from fuseplan.dialect import ops
from fuseplan.distributed.shared import SHARED
from fuseplan.errors import CollectiveError
from fuseplan.providers import BUILT_IN_PROVIDERS, aiter
from fuseplan.rules import Bindings
from fuseplan.verification.memory import Loopback
from tests.providers.stand_ins import FN, Library, arguments_of, check_bits, check_declined, normed, ranks

PROVIDER = next(each for each in BUILT_IN_PROVIDERS if each.name == "aiter")
MOST_BYTES = 2**26


class Aiter:
    """The library as a stand-in, and what became of it."""

    def __init__(self, name: str = "aiter-e4048607") -> None:
        self.communicators: list[Any] = []
        self.calls: list[dict[str, Any]] = []
        self.disabled = False
        self.fp8 = FN
        reduce = "aiter.dist.device_communicators.custom_all_reduce.CustomAllreduce"
        self.library = Library(
            name,
            {
                "aiter.ops.triton.normalization.fused_add_rmsnorm_pad.fused_add_rmsnorm_pad": self.pad,
                f"{reduce}.__init__": self.init,
                f"{reduce}.close": self.close,
                f"{reduce}.custom_fused_ar_rms": self.reduce_and_norm,
                f"{reduce}.custom_fused_ar_rms_quant": self.reduce_norm_and_quantise,
            },
        )

    def pad(self, x: Tensor, weight: Tensor, epsilon: float, res: Tensor | None, x_pad_to_multiple: int) -> Any:
        assert x.dim() == 2
        assert weight.is_contiguous()
        width = -(-x.shape[1] // x_pad_to_multiple) * x_pad_to_multiple
        out = x.new_zeros(x.shape[0], width)
        total = x.float() if res is None else x.float() + res.float()
        out[:, : x.shape[1]] = normed(total, weight, epsilon).to(x.dtype)
        return out if res is None else (out, total.to(res.dtype))

    def init(self, own: Any, **given: Any) -> None:
        # The real one asserts this, and takes addresses from all ranks of the group.
        assert dist.get_backend(given["group"]) != "nccl"
        own.group, own.device, own.max_size = given["group"], given["device"], given["max_size"]
        own.world_size, own.disabled, own.closed = dist.get_world_size(own.group), self.disabled, False
        self.communicators.append(own)

    def close(self, own: Any) -> None:
        own.closed = True

    def reduced(self, own: Any, input: Tensor, residual: Tensor) -> Tensor | None:
        """The sum that is normalised, in float32; None where the real one declines."""
        assert not own.closed
        assert input.is_contiguous()
        assert residual.is_contiguous()
        if input.nbytes > min(own.max_size, MOST_BYTES) or input.nbytes % 16 or not input.numel():
            return None
        total: Tensor = (input.float() * own.world_size).to(input.dtype).float() + residual.float()
        return total

    def reduce_and_norm(self, own: Any, **given: Any) -> tuple[Tensor, Tensor] | None:
        self.calls.append(given)
        x, weight = given["input"], given["weight"]
        total = self.reduced(own, x, given["residual_inp"])
        if total is None:
            return None
        out = x.new_zeros(*x.shape[:-1], given["out_hidden_dim"] or x.shape[-1])
        out[..., : x.shape[-1]] = normed(total, weight, given["eps"], float(given["gemma_norm"])).to(x.dtype)
        return out, total.to(x.dtype)

    def reduce_norm_and_quantise(self, own: Any, **given: Any) -> tuple[Tensor, Tensor, Tensor] | None:
        self.calls.append(given)
        x = given["input"]
        total = self.reduced(own, x, given["residual_inp"])
        if total is None:
            return None
        y = normed(total, given["weight"], given["eps"])
        most = y.abs().amax(-1, keepdim=True)
        scale = torch.where(most == 0, 1.0, most / torch.finfo(self.fp8).max)
        return (y / scale).to(self.fp8), total.to(x.dtype), scale


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[Aiter]:
    stand_in = Aiter()
    stand_in.library.install(monkeypatch)
    yield stand_in
    SHARED.release(aiter._COMMUNICATORS)


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The groups that were asked for: nobody is there to make one with."""
    asked: list[dict[str, Any]] = []

    def new_group(ranks: list[int], **how: Any) -> Any:
        asked.append({"ranks": ranks, **how})
        return dist.group.WORLD

    monkeypatch.setattr(dist, "new_group", new_group)
    return asked


def arguments(name: str, shape: tuple[int, ...], group: str = "", **more: Any) -> dict[str, Any]:
    return arguments_of(name, torch.bfloat16, shape, **{"rounding": "fp32", "group_name": group, **more})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("right", [192, 1])
@pytest.mark.parametrize("shape", [(7, 64), (2, 3, 2880), (1, 320), (0, 64)])
def test_the_triton_kernel_gives_the_references_bits(
    library: Aiter, shape: tuple[int, ...], right: int, dtype: torch.dtype
) -> None:
    for name, rounding in (("rms_norm_pad", "gpt_oss"), ("fused_add_rms_norm_pad", "fp32")):
        check_bits("aiter", name, arguments_of(name, dtype, shape, right=right, rounding=rounding))


@pytest.mark.parametrize("count", [2, 4, 8])
@pytest.mark.parametrize("right", [0, 192])
@pytest.mark.parametrize("shape", [(7, 512), (2, 3, 2880)])
def test_the_all_reduce_gives_the_references_bits(
    library: Aiter, groups: list[dict[str, Any]], shape: tuple[int, ...], right: int, count: int
) -> None:
    name = "all_reduce_fused_add_rms_norm" + ("_pad" if right else "")
    with ranks(count) as group:
        check_bits("aiter", name, arguments(name, shape, group, right=right))
    (communicator,) = library.communicators
    assert (communicator.device, communicator.max_size) == (torch.device("cpu"), MOST_BYTES)
    assert groups == [{"ranks": list(range(count)), "backend": "gloo", "use_local_synchronization": True}]


def test_quantisation_rounds_nothing_before_it(library: Aiter, groups: list[dict[str, Any]]) -> None:
    op = ops.all_reduce_fused_add_rms_norm_dynamic_fp8_quant
    with ranks(2) as group:
        given = arguments(op.name, (5, 512), group).values()
        with Loopback():
            q, scale, total = op.kernel("aiter")(*given)
            expected = op.reference(*given)
        library.fp8 = torch.float8_e4m3fnuz
        with pytest.raises(CollectiveError, match=r"AITER quantises to torch.float8_e4m3fnuz on this device"):
            op.kernel("aiter")(*given)
    assert [(each.dtype, each.shape) for each in (q, scale, total)] == [(each.dtype, each.shape) for each in expected]
    assert torch.equal(total, expected[2])
    assert not torch.equal(scale, expected[1])  # the greatest of values that are rounded
    torch.testing.assert_close(scale, expected[1], rtol=2**-8, atol=0)
    torch.testing.assert_close(q.float() * scale, expected[0].float() * expected[1], rtol=2**-3, atol=2**-6)


@pytest.mark.parametrize(
    ("count", "shape", "quantises", "expected"),
    [
        # 128 * 7168 * 2 bytes over the ranks: 160 rows of 2880 for two, 40 for eight
        (2, (159, 2880), False, True),
        (2, (160, 2880), False, False),
        (8, (39, 2880), False, True),
        (8, (40, 2880), False, False),
        (2, (64, 1024), True, True),
        (2, (65, 1024), True, False),
    ],
)
def test_one_stage_or_two_is_decided_as_aiter_does(
    library: Aiter, groups: list[dict[str, Any]], count: int, shape: tuple[int, ...], quantises: bool, expected: bool
) -> None:
    with ranks(count) as group:
        name = "all_reduce_fused_add_rms_norm" + ("_dynamic_fp8_quant" if quantises else "")
        ops[name].kernel("aiter")(*arguments(name, shape, group).values())
    assert library.calls[0]["use_1stage"] is expected


def fuse(rows: int, group: str, hidden: int = 512) -> tuple[Tensor, Tensor]:
    op = ops.all_reduce_fused_add_rms_norm
    result: tuple[Tensor, Tensor] = op.kernel("aiter")(*arguments(op.name, (rows, hidden), group).values())
    return result


def test_a_group_has_one_communicator_and_it_is_closed(library: Aiter, groups: list[dict[str, Any]]) -> None:
    with ranks(2) as group:
        for rows in (3, 40, 0, 7):
            fuse(rows, group)
        fuse(3, group, hidden=1024)
    assert len(library.communicators) == len(groups) == 1
    SHARED.release(aiter._COMMUNICATORS)
    assert library.communicators[0].closed


def test_capacity_is_the_memory_that_the_ranks_share(
    library: Aiter, groups: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aiter, "POOL_BYTES", 5 * 1024 + 1)
    with ranks(2) as group:
        fuse(4, group)
        fuse(5, group)
        with pytest.raises(CollectiveError, match="takes up to 5 rows of this width over group '0', not 6"):
            fuse(6, group)
    bound = Bindings("r", {"x": torch.empty(6, 512, dtype=torch.bfloat16)})
    assert aiter.PROVIDER.implements["all_reduce_fused_add_rms_norm"].most_rows is not None
    assert aiter.PROVIDER.implements["all_reduce_fused_add_rms_norm"].most_rows(bound) == 5


def test_errors_are_one_line(library: Aiter, groups: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    with ranks(2) as group:
        with monkeypatch.context() as patched:
            patched.setattr(torch.cuda, "is_initialized", lambda: True)
            patched.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            with pytest.raises(CollectiveError, match="none can be made while a graph is captured"):
                fuse(4, group)
        library.disabled = True
        with pytest.raises(CollectiveError, match="doesn't serve group '0' of 2 ranks") as refused:
            fuse(4, group)
        library.disabled = False
        fuse(4, group)
        library.communicators[-1].max_size = 16
        with pytest.raises(CollectiveError, match=r"takes no \[4, 512\] in torch.bfloat16") as declined:
            fuse(4, group)
    assert "\n" not in f"{refused.value}{declined.value}"


def test_the_group_is_made_with_gloo(library: Aiter) -> None:
    """By torch itself, in a world of one."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        assert dist.group.WORLD is not None
        fuse(4, dist.group.WORLD.group_name)
        assert dist.get_backend(library.communicators[0].group) == "gloo"
        assert library.communicators[0].group is not dist.group.WORLD
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("gate", "count", "shape", "more", "detail"),
    [
        (aiter.ALL_REDUCE, 2, (8, 480), {}, "takes hidden sizes from 512 in bfloat16, not 480"),
        (aiter.ALL_REDUCE, 8, (8, 520), {}, "takes hidden sizes that are multiples of 64 in bfloat16, not 520"),
        (aiter.ALL_REDUCE, 2, (8, 16400), {}, "takes hidden sizes up to 16384 in bfloat16, not 16400"),
        (aiter.ALL_REDUCE, 3, (8, 1536), {}, "serves groups of 2, 4 or 8 ranks"),
        (aiter.ALL_REDUCE, 2, (8, 2880), {"right": 4}, "pads by multiples of 8 in this dtype, not by 4"),
        (aiter.ALL_REDUCE_QUANT, 2, (8, 2880), {}, "takes hidden sizes 512, 1024, 2048, 4096, 6144 or 7168"),
        (aiter.ALL_REDUCE_QUANT, 2, (8, 4096), {"quant_rounding": "multiply"}, "the kernel divides by the scale"),
    ],
)
def test_what_is_declined(gate: Any, count: int, shape: tuple[int, ...], more: dict[str, Any], detail: str) -> None:
    check_declined(gate, detail, count, x=torch.empty(shape, dtype=torch.bfloat16), **more)


@pytest.mark.parametrize("count", [2, 4, 8])
@pytest.mark.parametrize("hidden", [2880, 4096, 5120, 7168, 8192])
def test_hidden_sizes_of_models_are_taken(hidden: int, count: int) -> None:
    check_declined(aiter.ALL_REDUCE, None, count, x=torch.empty(8, hidden, dtype=torch.bfloat16), right=192)


def test_the_triton_kernel_counts_in_32_bits() -> None:
    bound = Bindings("r", {"x": torch.empty(8, 2880), "right": 192})
    most = aiter.PROVIDER.implements["rms_norm_pad"].most_rows
    assert most is not None
    assert most(bound) == (2**31 - 1) // 3072
