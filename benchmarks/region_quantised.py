"""The region all-reduce -> residual add -> RMSNorm -> fp8 quantisation between real ranks: what a quantisation costs on
top of the fused all-reduce, and what others' kernels take, in pairs.

torchrun --nproc-per-node 2 -m benchmarks.region_quantised [--write]
"""

import argparse
import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import fuseplan.providers  # noqa: F401 - registers kernels
from benchmarks.graphs import Figure, compare, leave, versions
from benchmarks.kernel_times import EPS, FP8, GROUP, LEAST, add_norm_dynamic, add_norm_grouped, dynamic, grouped
from benchmarks.region import TOKENS, FlashInfer, flashinfer_or_why, started, take_faster, unfused_reduces
from fuseplan.dialect import NORM_FAMILY

WIDTH, ROUNDING = 4096, "gpt_oss"
WHAT = (
    "microseconds a call, [median, interquartile range] of five interleaved repeats of CUDA graphs, slowest rank; "
    f"bfloat16, hidden {WIDTH}, fp8 with a float32 scale of each {GROUP} elements (group) or of each token (token); "
    "over: by which part a fused quantisation takes longer than without one; times_faster: than the fastest of others"
)
COLUMNS = {
    "plain": "fuseplan's all-reduce + add + RMSNorm, nothing quantised",
    "fused": "fuseplan's all-reduce + add + RMSNorm + quantisation, one kernel",
    "nccl": "NCCL all-reduce, then torch.compile's add + RMSNorm + quantisation",
    "one_shot": "torch.ops.symm_mem.one_shot_all_reduce with its copy, then torch.compile's",
    "flashinfer": "FlashInfer's all-reduce + add + RMSNorm, one-shot or two-shot, whichever is faster, then "
    "torch.compile's quantisation",
    "plain_then_quant": "fuseplan's all-reduce + add + RMSNorm, then torch.compile's quantisation",
    "nccl_then_fused": "NCCL all-reduce, then fuseplan's add + RMSNorm + quantisation",
}
OTHERS = ("nccl", "one_shot", "flashinfer")
FORMATS: dict[str, tuple[str, tuple[Any, ...], Callable[..., Any], Callable[..., Any]]] = {
    "group": (
        "group_fp8_quant", (GROUP, FP8, LEAST / 448, 0.0, False, 0.0, 0.0, None, "divide", "rows"),
        add_norm_grouped, grouped,
    ),
    "token": ("dynamic_fp8_quant", (FP8, 1e-6, 0.0, 0.0, None, "multiply"), add_norm_dynamic, dynamic),
}  # fmt: skip


def alternatives(
    tokens: int, group: dist.ProcessGroup, flashinfer: FlashInfer | None, how: str
) -> dict[str, Callable[[int], Any]]:
    """By column, of one format."""
    kind, arguments, together, alone = FORMATS[how]
    name, device = group.group_name, torch.device("cuda", dist.get_rank())
    x, residual = (torch.randn(tokens, WIDTH, device=device).bfloat16() for _ in range(2))
    weight = (1 + 0.1 * torch.randn(WIDTH, device=device)).bfloat16()
    for same in (residual, weight):
        dist.broadcast(same, 0)
    nccl, one_shot = unfused_reduces(x, group)
    norm = (weight, EPS, ROUNDING)
    reduce, fused = (NORM_FAMILY[True, True, each].kernel("triton") for each in (None, kind))
    normed = NORM_FAMILY[False, True, kind].kernel("triton")
    plain, quant = torch.compile(together, dynamic=False), torch.compile(alone, dynamic=False)
    found: dict[str, Callable[[int], Any]] = {
        "plain": lambda _: reduce(x, residual, *norm, name),
        "fused": lambda _: fused(x, residual, *norm, *arguments, name),
        "nccl": lambda _: plain(nccl(), residual, weight),
        "one_shot": lambda _: plain(one_shot(), residual, weight),
        "plain_then_quant": lambda _: quant(reduce(x, residual, *norm, name)[0]),
        "nccl_then_fused": lambda _: normed(nccl(), residual, *norm, *arguments),
    }
    if flashinfer is not None:
        for shots, first in (("one_shot", True), ("two_shot", False)):
            if first or tokens > group.size():
                found[f"flashinfer_{shots}"] = lambda _, first=first: quant(flashinfer(x, residual, weight, first))
    return found


def row(tokens: int, how: str, times: dict[str, Figure]) -> dict[str, Any]:
    """Figures of one size and format, with what follows from them."""
    take_faster(times, "flashinfer_{}", "flashinfer")
    fused = times["fused"].us
    return {
        "tokens": tokens, "quantised": how,
        **{name: times[name].json() for name in COLUMNS if name in times},
        "over": round(fused / times["plain"].us - 1, 4),
        "times_faster": round(min(times[name].us for name in OTHERS if name in times) / fused, 2),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="*", default=TOKENS)
    parser.add_argument("--write", action="store_true", help="write results/region_quantised_DEVICExRANKS.json")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder to write to")
    arguments = parser.parse_args()
    group, rank = started(), dist.get_rank()
    flashinfer, why = flashinfer_or_why(group, WIDTH)
    rows = list[dict[str, Any]]()
    result = {
        "what": WHAT,
        "command": f"torchrun --nproc-per-node {group.size()} -m benchmarks.region_quantised --write",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": versions(),
        "ranks": group.size(),
        "columns": COLUMNS,
        "flashinfer": why,
        "rows": rows,
    }
    name = torch.cuda.get_device_name().split()[1].lower()
    for how in FORMATS:
        for tokens in arguments.tokens:
            rows.append(row(tokens, how, compare(alternatives(tokens, group, flashinfer, how))))
            if rank == 0:
                print(json.dumps(rows[-1]), flush=True)
                if arguments.write:
                    path = arguments.out / f"region_quantised_{name}x{group.size()}.json"
                    path.write_text(json.dumps(result, indent=1) + "\n")
    leave()


if __name__ == "__main__":
    main()
