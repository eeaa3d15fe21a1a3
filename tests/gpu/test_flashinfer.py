"""FlashInfer's kernels on GPUs. Skipped where there are none, or no FlashInfer.

The first run builds the library's CUDA sources, which takes minutes.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fuseplan.dialect import ops
from fuseplan.providers import BUILT_IN_PROVIDERS, flashinfer
from fuseplan.verification.memory import Poisoned

PROVIDER = next(each for each in BUILT_IN_PROVIDERS if each.name == "flashinfer")
SCRIPT = Path(__file__).with_name("run_flashinfer.py")
FN = torch.float8_e4m3fn

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(PROVIDER.unavailable() is not None, reason=f"needs FlashInfer {flashinfer.OLDEST}"),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 2880), (7, 4096), (2, 33, 5120), (8191, 2880), (3, 257), (0, 64)])
def test_norms_with_quantisation(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(shape, device="cuda", generator=generator).to(dtype)
    residual = 3 * torch.randn(shape, device="cuda", generator=generator).to(dtype)
    weight = (1 + 0.1 * torch.randn(shape[-1], device="cuda", generator=generator)).to(dtype)
    scale = torch.tensor([0.02], device="cuda")
    before = x.clone(), residual.clone()
    with Poisoned():
        alone = ops.rms_norm_static_fp8_quant.kernel("flashinfer")(x, weight, 1e-5, "gpt_oss", scale, FN, "multiply")
        added, total = ops.fused_add_rms_norm_static_fp8_quant.kernel("flashinfer")(
            x, residual, weight, 1e-5, "fp32", scale, FN, "multiply"
        )
    assert torch.equal(x, before[0])
    assert torch.equal(residual, before[1])
    assert torch.equal(total, (x.float() + residual.float()).to(dtype))
    for got, wide in ((alone, x.double()), (added, x.double() + residual.double())):
        codes = (normed_exactly(wide, weight) / scale.double()).clamp(-448, 448).float().to(FN)
        assert int((ordinal(got) - ordinal(codes)).abs().max() if got.numel() else 0) <= 1


def normed_exactly(total: Tensor, weight: Tensor) -> Tensor:
    return total * torch.rsqrt(total.square().mean(-1, keepdim=True) + 1e-5) * weight.double()


def ordinal(codes: Tensor) -> Tensor:
    """fp8 codes as integers in the order of their values."""
    bits = codes.view(torch.uint8).int()
    return torch.where(bits >= 0x80, -(bits & 0x7F), bits & 0x7F)


Ranks = list[dict[str, Any]]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    count = next((each for each in (8, 4, 2) if each <= torch.cuda.device_count()), 0)
    if not count:
        pytest.skip("needs two GPUs")
    folder = tmp_path_factory.mktemp("flashinfer")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = os.pathsep.join([str(SCRIPT.parents[2]), *sys.path])
    environment = {**os.environ, "PORT": str(port), "PYTHONPATH": path}
    running = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(rank), str(count), str(folder)], env=environment,
            stderr=subprocess.PIPE, text=True,
        )
        for rank in range(count)
    ]  # fmt: skip
    try:
        errors = [process.communicate(timeout=500)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0] * count, "\n".join(errors)[-6000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(count)]


def test_the_all_reduce_fusion_holds(ranks: Ranks) -> None:
    for rank in ranks:
        worst = rank["values"]["worst"]
        assert len(worst) == 3 * 2 * 2 * 8
        assert {case: share for case, share in worst.items() if not share <= 1} == {}


def test_it_gives_the_same_bits_every_time(ranks: Ranks) -> None:
    assert all(rank["values"]["repeats"] for rank in ranks)


def test_sizes_share_a_workspace(ranks: Ranks) -> None:
    assert all(rank["mixed sizes"] <= 1 for rank in ranks)


def test_negative_zero_and_nan(ranks: Ranks) -> None:
    assert all(rank["odd values"] == {"negative zero": True, "nan": True} for rank in ranks)


def test_graphs_replay_with_other_inputs(ranks: Ranks) -> None:
    assert all(rank["graphs"]["worst"] <= 1 for rank in ranks)


def test_what_can_not_be_run_is_an_error(ranks: Ranks) -> None:
    for rank in ranks:
        assert "none can be made while a graph is captured" in rank["errors"]["capture"]
        assert rank["errors"]["at capacity"] is None
        assert "takes up to" in rank["errors"]["beyond"]


def test_all_ranks_verify_it_before_the_first_run(ranks: Ranks) -> None:
    for rank in ranks:
        first = rank["first run"]
        assert first["worst"] <= 1
        assert first["fused"] == 1
        assert first["pending"] == [1, 0]
        assert first["verified"] == [["flashinfer", True, len(ranks), None]]
