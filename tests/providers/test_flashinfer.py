"""How FlashInfer is called, held against the signatures of its source by stand-ins that compute what its kernels do."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.torch_version import TorchVersion

from fuseplan.compilation.manager import PostGradPassManager
from fuseplan.config import CompileRange, PassConfig
from fuseplan.dialect import ops
from fuseplan.distributed.shared import SHARED
from fuseplan.errors import CollectiveError
from fuseplan.providers import BUILT_IN_PROVIDERS, PROFILES, flashinfer
from tests.helpers import all_reduce, gpt_oss, post_grad, randn
from tests.providers.stand_ins import (
    FN,
    MIN_SCALE,
    Library,
    arguments_of,
    check_bits,
    check_declined,
    fp8,
    installed,
    is_aligned,
    normed,
    ranks,
    snapshot,
)

PROVIDER = next(each for each in BUILT_IN_PROVIDERS if each.name == "flashinfer")
VERSIONS = tuple(f"flashinfer-{each}" for each in ("0.6.16.post3", "0.6.18.post1", "0.7.0.post1", "0.7.2.post1"))
OLD = ("flashinfer-0.6.11.post2", "flashinfer-0.6.12")
"""Without a scale a row; the first without 1 + weight, too."""
PINNED = {
    "0.22": "0.6.11.post2", "0.23": "0.6.12", "0.24": "0.6.12", "0.25": "0.6.13", "0.26": "0.6.14",
    "0.27": "0.6.16.post3", "0.28": "0.6.16.post3", "0.29": "0.6.18", "0.30": "0.6.18.post1", "0.31": "0.7.0.post1",
    "0.32": "0.7.0.post1", "0.33": "0.7.2.post1",
}  # fmt: skip
"""By releases of vLLM. 0.6.13 and 0.6.14 have the signatures of 0.6.12, and 0.6.18 those of 0.6.18.post1."""


class Workspace:
    """What `create_allreduce_fusion_workspace` yields."""

    def __init__(self, **asked: Any) -> None:
        self.asked, self.destroyed = asked, False
        self.ipc_handles = [id(self)]

    def destroy(self) -> None:
        self.destroyed = True


class FlashInfer:
    """The library as a stand-in, and what became of it."""

    def __init__(self, name: str) -> None:
        self.created: list[Workspace] = []
        self.forgotten: list[Any] = []
        self.fusions: list[dict[str, Any]] = []
        self.patterns = snapshot(name)["constants"]["flashinfer.comm.AllReduceFusionPattern"]
        self.library = Library(
            name,
            {
                "flashinfer.comm.allreduce_fusion": self.allreduce_fusion,
                "flashinfer.comm.create_allreduce_fusion_workspace": self.create,
                "flashinfer.comm.trtllm_destroy_ipc_workspace_for_all_reduce_fusion": self.forget,
                "flashinfer.norm.rmsnorm_quant": self.rmsnorm_quant,
                "flashinfer.norm.fused_add_rmsnorm_quant": self.fused_add_rmsnorm_quant,
            },
        )

    def create(self, **asked: Any) -> Workspace:
        self.created.append(Workspace(**asked))
        return self.created[-1]

    def forget(self, workspace: Any, group: Any) -> None:
        self.forgotten.append(workspace)

    def allreduce_fusion(self, input: Tensor, workspace: Workspace, pattern: int, **rest: Any) -> None:
        self.fusions.append({"pattern": pattern, **rest})
        asked = workspace.asked
        assert input.dim() == 2
        assert not workspace.destroyed
        assert input.shape[0] * input.shape[1] <= asked["max_token_num"] * asked["hidden_dim"]
        assert input.dtype is asked["dtype"]
        assert is_aligned(input, rest["residual_in"], rest["rms_gamma"], rest["residual_out"])
        assert rest["residual_in"].is_contiguous()
        assert rest["rms_gamma"].is_contiguous()
        assert rest["fp32_acc"]
        dtype = input.dtype
        reduced = (input.float() * asked["world_size"]).to(dtype)
        total = (reduced.float() + rest["residual_in"].float()).to(dtype)
        y = normed(total.float(), rest["rms_gamma"], rest["rms_eps"], rest.get("weight_bias", 0.0)).to(dtype)
        rest["residual_out"].copy_(total)
        if pattern == self.patterns["kARResidualRMSNorm"]:
            rest["norm_out"].copy_(y)
        elif pattern == self.patterns["kARResidualRMSNormFP8Quant"]:
            assert rest["scale_factor"].dtype is torch.float32
            rest["quant_out"].copy_(fp8(y, 1 / rest["scale_factor"]))
        else:
            assert pattern == self.patterns["kARResidualRMSNormDynamicFP8Quant"]
            scale = (y.float().abs().amax(-1, keepdim=True) / 448).clamp(min=MIN_SCALE)
            rest["scale_out"].copy_(scale)
            rest["quant_out"].copy_((y.float() / scale).clamp(-448, 448).to(FN))

    def rmsnorm_quant(self, out: Tensor, input: Tensor, weight: Tensor, scale: Tensor, eps: float, **rest: Any) -> None:
        assert input.dim() == out.dim() == 2
        out.copy_(fp8(normed(input.float(), weight, eps), 1 / scale))

    def fused_add_rmsnorm_quant(
        self, out: Tensor, input: Tensor, residual: Tensor, weight: Tensor, scale: Tensor, eps: float, **rest: Any
    ) -> None:
        total = input.float() + residual.float()
        residual.copy_(total.to(residual.dtype))
        out.copy_(fp8(normed(total, weight, eps), 1 / scale))


@pytest.fixture(params=VERSIONS)
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[FlashInfer]:
    stand_in = FlashInfer(request.param)
    stand_in.library.install(monkeypatch)
    yield stand_in
    SHARED.release(flashinfer._WORKSPACES)


EXACT = [name for name, offer in flashinfer.PROVIDER.implements.items() if offer.leaves_out is None]


@pytest.mark.parametrize("rounding", ["gpt_oss", "gemma"])
@pytest.mark.parametrize(
    ("dtype", "shape"), [(torch.bfloat16, (7, 64)), (torch.float16, (2, 3, 320)), (torch.bfloat16, (1, 2880))]
)
@pytest.mark.parametrize("name", EXACT)
def test_the_all_reduce_fusion_gives_the_references_bits(
    library: FlashInfer, name: str, dtype: torch.dtype, shape: tuple[int, ...], rounding: str
) -> None:
    with ranks(2) as group:
        check_bits("flashinfer", name, arguments_of(name, dtype, shape, rounding=rounding, group_name=group))
    (asked,) = [each.asked for each in library.created]
    assert (asked["backend"], asked["world_size"], asked["rank"]) == ("trtllm", 2, 0)


def test_norms_with_quantisation_round_nothing_before_it(library: FlashInfer) -> None:
    left_out = {name: offer for name, offer in PROVIDER.implements.items() if offer.leaves_out is not None}
    assert {offer.leaves_out for offer in left_out.values()} == {"the norm before it is quantised"}
    roundings = {"rms_norm_static_fp8_quant": "gpt_oss", "fused_add_rms_norm_static_fp8_quant": "fp32"}
    assert {name: offer.roundings for name, offer in left_out.items()} == {
        name: frozenset({rounding}) for name, rounding in roundings.items()
    }
    for name, rounding in roundings.items():
        given = arguments_of(name, torch.bfloat16, (2, 33, 320), rounding=rounding)
        x, residual = given["x"].clone(), given.get("residual", torch.zeros(1)).clone()
        actual = ops[name].kernel("flashinfer")(*given.values())
        total = x.float() + residual.float()
        codes = fp8(normed(total, given["weight"], 1e-5), 1 / torch.tensor([0.02]))
        got = actual[0] if "add" in name else actual
        assert torch.equal(got.float(), codes.float())
        assert not torch.equal(got.float(), ops[name].reference(*given.values())[0].float())  # which rounds y before
        if "add" in name:
            assert torch.equal(actual[1], total.bfloat16())
            assert torch.equal(residual, given["residual"])
        assert torch.equal(x, given["x"])


def fuse(rows: int, group: str, hidden: int = 64, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
    op = ops.all_reduce_fused_add_rms_norm
    given = arguments_of(op.name, torch.bfloat16, (rows, hidden), rounding="gpt_oss", group_name=group)
    given |= {} if x is None else {"x": x}
    result: tuple[Tensor, Tensor] = op.kernel("flashinfer")(*given.values())
    return result


def test_workspaces_grow_in_powers_of_two_and_serve_whatever_fits(library: FlashInfer) -> None:
    with ranks(2) as group:
        for rows in (3, 4, 1, 5, 8, 2, 7):
            fuse(rows, group)
        fuse(5, group, hidden=128)
        made = [(each.asked["max_token_num"], each.asked["hidden_dim"]) for each in library.created]
        assert made == [(4, 64), (8, 64), (8, 128)]
        assert all(each.asked["group"] is dist.group.WORLD for each in library.created)


def test_workspaces_are_given_back_at_the_end_or_to_another_group(library: FlashInfer) -> None:
    with ranks(2) as first:
        fuse(4, first)
    with ranks(4) as second:
        assert second == first
        fuse(4, second)
    old, new = library.created
    assert (old.destroyed, new.destroyed, new.asked["world_size"]) == (True, False, 4)
    SHARED.release(flashinfer._WORKSPACES)
    assert new.destroyed
    assert library.forgotten == [old.ipc_handles, new.ipc_handles]


@pytest.mark.parametrize("count", [2, 8])
def test_capacity_is_what_the_kernels_can_count(
    library: FlashInfer, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    row = 64 * 2 * count
    monkeypatch.setattr(flashinfer, "COUNTED_BYTES", 7 * row + 1)
    with ranks(count) as group:
        fuse(6, group)
        assert [each.asked["max_token_num"] for each in library.created] == [7]
        fuse(7, group)
        with pytest.raises(CollectiveError, match=r"takes up to 7 rows of this width over group '0', not 8") as error:
            fuse(8, group)
        assert "\n" not in str(error.value)
        monkeypatch.setattr(flashinfer, "COUNTED_BYTES", 7 * row)
        with pytest.raises(CollectiveError, match="takes up to 6 rows"):
            fuse(7, group)


def test_nothing_is_made_while_a_graph_is_captured(library: FlashInfer, monkeypatch: pytest.MonkeyPatch) -> None:
    with ranks(2) as group:
        fuse(4, group)
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        fuse(3, group)
        with pytest.raises(CollectiveError, match=r"no memory for 5 rows .* run the model once at this size before"):
            fuse(5, group)
    assert len(library.created) == 1


def test_it_is_launched_early_only_where_it_waits_before_it_reads(library: FlashInfer) -> None:
    with ranks(2) as group:
        fuse(4, group)
    (call,) = library.fusions
    assert call["launch_with_pdl"] is (library.library.snapshot["version"] == "0.7.2.post1")
    assert call["use_oneshot"] is None


def test_rows_that_lie_anyhow_are_made_to_fit(library: FlashInfer) -> None:
    with ranks(2) as group:
        whole = randn(4 * 64 + 1)
        shifted = whole[1:].view(4, 64)
        turned = randn(64, 4, seed=3).t()
        for x in (shifted, turned):
            name = "all_reduce_fused_add_rms_norm"
            given = arguments_of(name, torch.bfloat16, (4, 64), rounding="gpt_oss", group_name=group, x=x)
            check_bits("flashinfer", name, given)
        empty = fuse(0, group)
        assert [each.shape for each in empty] == [(0, 64), (0, 64)]
        assert len(library.fusions) == 2


OF_ROWS = {"dtype": FN, "min_scale": MIN_SCALE, "quant_rounding": "divide"}
STATIC = {"dtype": FN, "quant_rounding": "multiply"}
HIDDEN_SIZES = (2880, 3072, 4096, 5120, 7168, 8192, 16384, 65536)
"""Of models."""


@pytest.mark.parametrize(
    ("release", "gate", "hidden", "more", "detail"),
    [
        (None, flashinfer.ALL_REDUCE, 64, {"x": torch.empty(8, 64)}, "in bfloat16 or float16, not in float32"),
        (None, flashinfer.ALL_REDUCE, 60, {}, "takes hidden sizes that are multiples of 8 in bfloat16, not 60"),
        (None, flashinfer.ALL_REDUCE, 65544, {}, "takes hidden sizes up to 65536 in bfloat16, not 65544"),
        (None, flashinfer.ALL_REDUCE, 8200, {},
         "takes hidden sizes that split into up to 8 blocks of 1024 threads in bfloat16, not 8200"),
        (None, flashinfer.ALL_REDUCE_STATIC, 64, {**STATIC, "quant_rounding": "divide"},
         "the kernel multiplies by the reciprocal of the scale; the graph divides by the scale"),
        (None, flashinfer.ALL_REDUCE_STATIC, 64, {**STATIC, "dtype": torch.float8_e4m3fnuz},
         "takes codes in float8_e4m3fn, not in float8_e4m3fnuz"),
        (None, flashinfer.ALL_REDUCE_DYNAMIC, 64, {**OF_ROWS, "min_scale": 1e-12}, "and the graph's is 1e-12"),
        (None, flashinfer.ALL_REDUCE_DYNAMIC, 64, {**OF_ROWS, "scale_ub": torch.ones(1)}, "has no scale_ub"),
        (None, flashinfer.ALL_REDUCE_DYNAMIC, 64, {**OF_ROWS, "zero_scale": 1.0}, "has no zero_scale, and the graph's"),
        (None, flashinfer.ALL_REDUCE_DYNAMIC, 2880, OF_ROWS, None),
        *((None, flashinfer.ALL_REDUCE, hidden, {}, None) for hidden in HIDDEN_SIZES),
        *((None, flashinfer.ALL_REDUCE_DYNAMIC, hidden, {**OF_ROWS, "min_scale": torch.tensor(MIN_SCALE).item()}, None)
          for hidden in HIDDEN_SIZES),  # as a graph may have the scale
        ("0.6.11.post2", flashinfer.ALL_REDUCE, 4096, {"rounding": "gpt_oss"}, None),
        ("0.6.11.post2", flashinfer.ALL_REDUCE, 5120, {}, None),
        ("0.6.11.post2", flashinfer.ALL_REDUCE, 2880, {},
         "takes hidden sizes that split into whole warps before flashinfer-python 0.6.15 in bfloat16, not 2880"),
        ("0.6.14", flashinfer.ALL_REDUCE, 2880, {}, "split into whole warps"),
        ("0.6.15", flashinfer.ALL_REDUCE, 2880, {}, None),
        ("0.6.11.post2", flashinfer.ALL_REDUCE, 4096, {"rounding": "gemma"},
         "0.6.11.post2 is installed, and FlashInfer's all-reduce fusion has 1 + weight from 0.6.12 on"),
        ("0.6.12", flashinfer.ALL_REDUCE, 4096, {"rounding": "gemma"}, None),
        ("0.6.14", flashinfer.ALL_REDUCE_DYNAMIC, 4096, OF_ROWS, "has a scale a row from 0.6.15 on"),
        ("0.6.15", flashinfer.ALL_REDUCE_DYNAMIC, 4096, OF_ROWS, None),
    ],
)  # fmt: skip
def test_what_is_declined(
    release: str | None, gate: Any, hidden: int, more: dict[str, Any], detail: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    installed(monkeypatch, "flashinfer", release)
    check_declined(gate, detail, **{"x": torch.empty(8, hidden, dtype=torch.bfloat16), **more})


@pytest.mark.parametrize("count", [3, 16])
def test_groups_of_other_sizes_are_declined(count: int) -> None:
    said = f"FlashInfer's all-reduce fusion serves groups of 2, 4 or 8 ranks; group '0' has {count}"
    check_declined(flashinfer.ALL_REDUCE, said, count, x=torch.empty(8, 64, dtype=torch.bfloat16))


@pytest.mark.parametrize("release", sorted(set(PINNED.values())))
def test_releases_that_vllm_pins_will_do(release: str, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, "flashinfer", release)
    assert PROVIDER.unavailable() is None
    has_rows = TorchVersion(release) >= flashinfer.DYNAMIC_FROM
    same = {"0.6.13": "0.6.12", "0.6.14": "0.6.12", "0.6.18": "0.6.18.post1"}.get(release, release)
    assert f"flashinfer-{same}" in (VERSIONS if has_rows else OLD)
    patterns = snapshot(f"flashinfer-{same}")["constants"]["flashinfer.comm.AllReduceFusionPattern"]
    assert ("kARResidualRMSNormDynamicFP8Quant" in patterns) is has_rows
    takes_bias = "weight_bias" in snapshot(f"flashinfer-{same}")["functions"]["flashinfer.comm.allreduce_fusion"]
    assert takes_bias is (TorchVersion(release) >= flashinfer.WEIGHT_BIAS_FROM)


@pytest.mark.parametrize("old", OLD)
@pytest.mark.parametrize("name", [name for name in EXACT if "dynamic" not in name])
def test_what_an_old_release_has_gives_the_references_bits(
    name: str, old: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in = FlashInfer(old)
    stand_in.library.install(monkeypatch)
    try:
        with ranks(2) as group:
            given = arguments_of(name, torch.bfloat16, (7, 64), rounding="gpt_oss", group_name=group)
            check_bits("flashinfer", name, given)
    finally:
        SHARED.release(flashinfer._WORKSPACES)


def test_a_range_beyond_the_capacity_is_declined() -> None:
    with ranks(2) as group:

        def function(x: Tensor, residual: Tensor, weight: Tensor) -> Any:
            return gpt_oss(all_reduce(x, group), residual, weight)

        inputs = randn(16, 2880), randn(16, 2880), torch.ones(2880, dtype=torch.bfloat16)
        graph = post_grad(function, *inputs, dynamic=True)
        most = (2**30 - 1) // (2880 * 2 * 2)
        for last, taken in ((most, ["all_reduce_fused_add_rms_norm"]), (most + 1, [])):
            span = CompileRange(start=1, end=last)
            manager = PostGradPassManager(
                PassConfig(), providers=[PROVIDER], device=PROFILES["h200"], compile_range=span
            )
            matches = manager.analyze(graph).matches
            assert [each.rule.op.name for each in matches.candidates] == taken
        details = [each.detail for each in matches.refusals]
        assert f"flashinfer takes up to {most} rows of this width, and the range has up to {most + 1}" in details


@pytest.mark.parametrize(
    ("version", "why"),
    [
        ("0.6.10", "flashinfer-python 0.6.10 is installed, and 0.6.11 is the oldest that will do"),
        (None, "the package flashinfer that is installed isn't that of flashinfer-python"),
    ],
)
def test_an_old_release_will_not_do(monkeypatch: pytest.MonkeyPatch, version: str | None, why: str) -> None:
    installed(monkeypatch, "flashinfer", version, "flashinfer-python")
    refusal = PROVIDER.unavailable()
    assert refusal is not None
    assert refusal.detail == why
    assert dataclasses.replace(PROVIDER, oldest=None).unavailable() is None
