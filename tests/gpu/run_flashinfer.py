"""One rank: `run_flashinfer.py RANK RANKS FOLDER` runs FlashInfer's all-reduce fusion in every way that fuseplan does,
and writes what it saw to FOLDER/RANK.json. PORT is the store's.
"""

import itertools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import fuseplan
from fuseplan.dialect import DialectOp, ops
from fuseplan.distributed.shared import SHARED
from fuseplan.errors import CollectiveError
from fuseplan.providers import flashinfer
from fuseplan.verification.compare import compare
from fuseplan.verification.memory import Poisoned
from tests.helpers import all_reduce, gpt_oss
from tests.ranks import leave

RANK, RANKS, FOLDER = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
QUANT: dict[str, tuple[Any, ...]] = {
    "all_reduce_fused_add_rms_norm": (),
    "all_reduce_fused_add_rms_norm_static_fp8_quant": (0.02, torch.float8_e4m3fn, "multiply"),
    "all_reduce_fused_add_rms_norm_dynamic_fp8_quant": (
        torch.float8_e4m3fn,
        flashinfer.MIN_SCALE,
        0.0,
        0.0,
        None,
        "divide",
    ),
}
SHAPES = ((1, 2880), (7, 2880), (33, 4096), (128, 5120), (8191, 2880), (64, 7168), (2, 3, 8192), (1024, 2880))
FUSED = ops.all_reduce_fused_add_rms_norm


def group() -> str:
    assert dist.group.WORLD is not None
    return dist.group.WORLD.group_name


def arguments(op: DialectOp, shape: tuple[int, ...], dtype: torch.dtype, rounding: str, seed: int) -> list[Any]:
    """The residual and the weight are equal on all ranks, what is reduced is not."""
    own = torch.Generator("cuda").manual_seed(1000 * seed + RANK)
    common = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(shape, device="cuda", generator=own).to(dtype)
    residual = 3 * torch.randn(shape, device="cuda", generator=common).to(dtype)
    weight = (1 + 0.1 * torch.randn(shape[-1], device="cuda", generator=common)).to(dtype)
    quant = [torch.tensor([each], device="cuda") if each == 0.02 else each for each in QUANT[op.name]]
    return [x, residual, weight, 1e-5, rounding, *quant, group()]


def exact(op: DialectOp, given: list[Any]) -> tuple[Tensor, ...]:
    """In float64, with the communication library's own all-reduce."""
    wide = [each.double() if isinstance(each, Tensor) else each for each in given]
    result: tuple[Tensor, ...] = op.reference(*wide)
    return result


def share(op: DialectOp, given: list[Any], results: tuple[Tensor, ...]) -> float:
    """The worst error as a share of what is allowed."""
    pairs = zip(results, op.reference(*given), exact(op, given), strict=True)
    return max(compare(got, wanted, true, op.error_factor).share for got, wanted, true in pairs)


def run(op: DialectOp, given: list[Any]) -> tuple[Tensor, ...]:
    with Poisoned():
        results: tuple[Tensor, ...] = op.kernel("flashinfer")(*given)
    return results


def values() -> dict[str, Any]:
    """Every op, convention, dtype and shape: the largest share of what is allowed, and whether bits repeat."""
    worst, same = dict[str, float](), True
    cases = itertools.product(QUANT, ("gpt_oss", "gemma"), (torch.bfloat16, torch.float16), SHAPES)
    for seed, (name, rounding, dtype, shape) in enumerate(cases):
        op = ops[name]
        given = arguments(op, shape, dtype, rounding, seed)
        results = run(op, given)
        worst[f"{name} {rounding} {dtype} {shape}"] = share(op, given, results)
        for _ in range(3):
            again = run(op, given)
            same &= all(
                torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(results, again, strict=True)
            )
    return {"worst": worst, "repeats": same}


def mixed_sizes() -> float:
    """Small calls after large ones in one workspace, in an order that is no order."""
    worst = 0.0
    for seed, rows in enumerate((512, 1, 300, 2, 512, 7, 33, 1, 511, 64, 5) * 4):
        given = arguments(FUSED, (rows, 2880), torch.bfloat16, "gpt_oss", seed)
        worst = max(worst, share(FUSED, given, run(FUSED, given)))
    return worst


def odd_values() -> dict[str, bool]:
    """-0.0, by which the one-shot kernel marks what hasn't come yet, and NaN."""
    given = arguments(FUSED, (4, 2880), torch.bfloat16, "gpt_oss", 0)
    given[0][0] = -0.0
    given[0][1, 5] = float("nan") if RANK == 0 else 1.0
    y, total = run(FUSED, given)
    return {
        "negative zero": torch.equal(total[0], given[1][0]),
        "nan": bool(y[1].isnan().all()) and not bool(y[[0, 2, 3]].isnan().any()),
    }


def graphs() -> dict[str, Any]:
    """Captured once, replayed with other inputs, with eager calls of other sizes between."""
    given = arguments(FUSED, (48, 2880), torch.bfloat16, "gpt_oss", 0)
    run(FUSED, given)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    kernel = FUSED.kernel("flashinfer")
    with torch.cuda.graph(graph):
        results = kernel(*given)
    worst = 0.0
    for seed in range(1, 20):
        fresh = arguments(FUSED, (48, 2880), torch.bfloat16, "gpt_oss", seed)
        for static, value in zip(given[:3], fresh[:3], strict=True):
            static.copy_(value)
        graph.replay()
        worst = max(worst, share(FUSED, given, results))
        between = arguments(FUSED, (seed, 2880), torch.bfloat16, "gpt_oss", seed)
        worst = max(worst, share(FUSED, between, run(FUSED, between)))
    return {"worst": worst}


def refused(function: Callable[[], Any]) -> str | None:
    try:
        function()
    except CollectiveError as error:
        return str(error)
    return None


def errors() -> dict[str, str | None]:
    """No workspace during a capture, and one row more than fits."""

    def capture() -> None:
        given = arguments(FUSED, (2, 640), torch.bfloat16, "gpt_oss", 0)
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            FUSED.kernel("flashinfer")(*given)

    most = (flashinfer.COUNTED_BYTES - 1) // (65536 * 2 * RANKS)
    return {
        "capture": refused(capture),
        "at capacity": refused(lambda: run(FUSED, arguments(FUSED, (most, 65536), torch.bfloat16, "gpt_oss", 0))),
        "beyond": refused(lambda: run(FUSED, arguments(FUSED, (most + 1, 65536), torch.bfloat16, "gpt_oss", 0))),
    }


def first_run() -> dict[str, Any]:
    """Under `fuseplan.compile`, before the first run of which all ranks verify the kernel together."""
    given = arguments(FUSED, (48, 2880), torch.bfloat16, "gpt_oss", 0)[:3]

    def model(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return gpt_oss(all_reduce(x, group()), residual, weight)

    reports: list[fuseplan.Report] = []
    config = fuseplan.PassConfig(force=("allreduce_rms:flashinfer",), agreement_timeout_s=120)
    compiled = fuseplan.compile(model, config=config, on_report=reports.append, mode="reduce-overhead")
    worst = 0.0
    for seed in range(4):
        fresh = arguments(FUSED, (48, 2880), torch.bfloat16, "gpt_oss", seed)
        for static, value in zip(given, fresh, strict=False):
            static.copy_(value)
        worst = max(worst, share(FUSED, fresh, tuple(each.clone() for each in compiled(*given))))
    return {
        "fused": reports[-1].fused.get("allreduce_rms", 0),
        "pending": [len(graph.pending) for report in reports for graph in report.graphs],
        "verified": [
            [each.provider, each.passed, each.ranks, each.detail]
            for graph in reports[-1].graphs for each in graph.verified
        ],
        "worst": worst,
    }  # fmt: skip


def main() -> None:
    torch.cuda.set_device(RANK)
    dist.init_process_group(
        "nccl", init_method=f"tcp://127.0.0.1:{os.environ['PORT']}", rank=RANK, world_size=RANKS,
        device_id=torch.device("cuda", RANK),
    )  # fmt: skip
    with torch.inference_mode():
        seen = {
            "values": values(), "mixed sizes": mixed_sizes(), "odd values": odd_values(), "graphs": graphs(),
            "errors": errors(), "first run": first_run(),
        }  # fmt: skip
    torch.cuda.synchronize()
    (FOLDER / f"{RANK}.json").write_text(json.dumps(seen))
    SHARED.release(flashinfer._WORKSPACES)
    leave()


if __name__ == "__main__":
    main()
