"""The region all-reduce -> residual add -> RMSNorm -> pad (or fp8 quantisation) between real ranks, every alternative.

torchrun --nproc-per-node 2 benchmarks/region.py [--write]
"""

import argparse
import datetime
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory
import torch.nn.functional as F
from torch import Tensor

import fuseplan.providers  # noqa: F401 - registers kernels
from benchmarks.graphs import Figure, compare, leave, versions
from fuseplan.dialect import NORM_FAMILY

WIDTH, PADDED, EPS = 2880, 3072, 1e-5
TOKENS = (1, 8, 32, 64, 128, 256, 512, 1024, 2048, 4096)
WHAT = (
    "microseconds a call, [median, interquartile range] of five interleaved repeats of CUDA graphs, slowest rank; "
    "bfloat16, hidden 2880 padded to 3072, GPT-OSS's rounding, 1 / (scale) static fp8"
)
COLUMNS = {
    "unfused": "NCCL all-reduce, then torch.compile's add + RMSNorm + pad",
    "unfused_one_shot": "torch.ops.symm_mem.one_shot_all_reduce with its copy, then torch.compile's",
    "pad_nccl": "the pad fusion alone: NCCL all-reduce, then fuseplan's add + RMSNorm + pad",
    "pad_one_shot": "the same after torch.ops.symm_mem.one_shot_all_reduce with its copy",
    "reduce_then_pad": "the all-reduce fusion alone: fuseplan's all-reduce + add + RMSNorm, then torch.compile's pad",
    "reduce_then_eager_pad": "the same, then torch.nn.functional.pad",
    "flashinfer_then_pad": "FlashInfer's op, one-shot or two-shot, whichever is faster, then torch.compile's pad",
    "flashinfer_then_eager_pad": "the same, then torch.nn.functional.pad",
    "all": "fuseplan's all-reduce + add + RMSNorm + pad, one kernel",
    "reduce": "fuseplan's all-reduce + add + RMSNorm, no pad",
    "flashinfer_one_shot": "FlashInfer's op alone, no pad",
    "flashinfer_two_shot": "likewise",
    "quant": "fuseplan's all-reduce + add + RMSNorm + static fp8 quantisation",
    "flashinfer_quant_one_shot": "FlashInfer's op of the same",
    "flashinfer_quant_two_shot": "likewise",
}
SINGLE = ("pad_nccl", "reduce_then_pad", "flashinfer_then_pad")
"""Alternatives that one fusion at a time gives: what a registration order chooses among."""


@torch.compile(dynamic=False)
def add_norm_pad(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = (x.float() + residual.float()).to(x.dtype)
    wide = total.float()
    y = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS) * weight.float()
    return F.pad(y.to(x.dtype), (0, PADDED - WIDTH)), total


@torch.compile(dynamic=False)
def pad(y: Tensor) -> Tensor:
    return F.pad(y, (0, PADDED - WIDTH))


class FlashInfer:
    """FlashInfer's fused all-reduces, where the package is installed."""

    def __init__(self, group: dist.ProcessGroup, width: int = WIDTH) -> None:
        from flashinfer import comm

        self.comm = comm
        self.workspace = comm.create_allreduce_fusion_workspace(
            backend="trtllm", world_size=group.size(), rank=dist.get_rank(), max_token_num=max(TOKENS),
            hidden_dim=width, dtype=torch.bfloat16, group=group,
        )  # fmt: skip

    def __call__(
        self, x: Tensor, residual: Tensor, weight: Tensor, one_shot: bool, scale: Tensor | None = None
    ) -> Tensor:
        """y, or its fp8 codes; the sum is written too."""
        y = torch.empty_like(x, dtype=torch.float8_e4m3fn if scale is not None else x.dtype)
        patterns = self.comm.AllReduceFusionPattern
        how: dict[str, Any] = {"pattern": patterns.kARResidualRMSNorm, "norm_out": y}
        if scale is not None:
            how = {"pattern": patterns.kARResidualRMSNormFP8Quant, "quant_out": y, "scale_factor": scale}
        self.comm.allreduce_fusion(
            input=x, workspace=self.workspace, launch_with_pdl=True, residual_in=residual,
            residual_out=torch.empty_like(x), rms_gamma=weight, rms_eps=EPS, use_oneshot=one_shot, fp32_acc=True, **how,
        )  # fmt: skip
        return y


def flashinfer_or_why(group: dist.ProcessGroup, width: int = WIDTH) -> tuple[FlashInfer | None, str]:
    """(FlashInfer's, "installed"), or (None, what hinders it), which is shown beside the figures."""
    try:
        return FlashInfer(group, width), "installed"
    except Exception as error:  # noqa: BLE001 - whatever hinders it
        return None, f"{type(error).__name__}: {error}"


def started() -> dist.ProcessGroup:
    """All ranks, each on its GPU."""
    device = torch.device("cuda", int(os.environ["RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    torch._dynamo.config.recompile_limit = 128
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def unfused_reduces(x: Tensor, group: dist.ProcessGroup) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """All-reduces of x by NCCL and by torch's one-shot op, this one with its copy."""
    reduced, name = x.clone(), group.group_name
    shared = symmetric_memory.empty(*x.shape, device=torch.device("cuda", dist.get_rank()), dtype=x.dtype)
    symmetric_memory.rendezvous(shared, name)

    def nccl() -> Tensor:
        # In place, as Inductor does it; the mean costs what the sum does, and stays finite however often it is taken.
        dist.all_reduce(reduced, op=dist.ReduceOp.AVG)
        return reduced

    def one_shot() -> Tensor:
        shared.copy_(x)
        return torch.ops.symm_mem.one_shot_all_reduce(shared, "sum", name)  # type: ignore[no-any-return]

    return nccl, one_shot


def take_faster(times: dict[str, Figure], name: str, into: str) -> None:
    """Keeps of FlashInfer's one-shot and two-shot figures the better one, where there are any, under another name.

    Args:
        times: changed in place.
        name: of both, with braces for the shots.
        into: the name that stays.
    """
    both = [times.pop(name.format(shots), None) for shots in ("one_shot", "two_shot")]
    known = [each for each in both if each is not None]
    if known:
        times[into] = min(known, key=lambda each: each.us)


def alternatives(
    tokens: int, group: dist.ProcessGroup, flashinfer: FlashInfer | None
) -> dict[str, Callable[[int], Any]]:
    """By column."""
    name = group.group_name
    x = torch.randn(tokens, WIDTH, device="cuda", dtype=torch.bfloat16)
    residual = torch.randn(tokens, WIDTH, device="cuda", dtype=torch.bfloat16)
    weight = (1 + 0.1 * torch.randn(WIDTH, device="cuda")).bfloat16()
    for same in (residual, weight):
        dist.broadcast(same, 0)
    scale = torch.tensor([0.02], device="cuda")
    nccl, one_shot = unfused_reduces(x, group)
    norm = (weight, EPS, "gpt_oss")
    reduce, both = NORM_FAMILY[True, True, None].kernel("triton"), NORM_FAMILY[True, True, "pad"].kernel("triton")
    quant = NORM_FAMILY[True, True, "static_fp8_quant"].kernel("triton")
    padded = NORM_FAMILY[False, True, "pad"].kernel("triton")
    right = PADDED - WIDTH
    found: dict[str, Callable[[int], Any]] = {
        "unfused": lambda _: add_norm_pad(nccl(), residual, weight),
        "unfused_one_shot": lambda _: add_norm_pad(one_shot(), residual, weight),
        "pad_nccl": lambda _: padded(nccl(), residual, *norm, right),
        "pad_one_shot": lambda _: padded(one_shot(), residual, *norm, right),
        "reduce_then_pad": lambda _: pad(reduce(x, residual, *norm, name)[0]),
        "reduce_then_eager_pad": lambda _: F.pad(reduce(x, residual, *norm, name)[0], (0, right)),
        "all": lambda _: both(x, residual, *norm, right, name),
        "reduce": lambda _: reduce(x, residual, *norm, name),
        "quant": lambda _: quant(x, residual, *norm, scale, torch.float8_e4m3fn, "multiply", name),
    }
    if flashinfer is not None:
        for shots, first in (("one_shot", True), ("two_shot", False)):
            if not first and tokens <= group.size():
                continue
            found[f"flashinfer_{shots}"] = lambda _, first=first: flashinfer(x, residual, weight, first)
            found[f"flashinfer_{shots}_then_pad"] = lambda _, first=first: pad(flashinfer(x, residual, weight, first))
            found[f"flashinfer_{shots}_then_eager_pad"] = lambda _, first=first: F.pad(
                flashinfer(x, residual, weight, first), (0, right)
            )
            found[f"flashinfer_quant_{shots}"] = lambda _, first=first: flashinfer(x, residual, weight, first, scale)
    return found


def links() -> dict[str, float]:
    """GB/s of copies between neighbouring ranks, both ways at once, and of copies within a GPU, read and written."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    size, device = 2**28, torch.device("cuda", rank)
    shared = symmetric_memory.empty(size, device=device, dtype=torch.uint8)
    handle = symmetric_memory.rendezvous(shared, dist.group.WORLD.group_name)  # type: ignore[union-attr]
    theirs = handle.get_buffer((rank + 1) % ranks, (size,), torch.uint8)
    mine, other = (torch.empty(size, device=device, dtype=torch.uint8) for _ in range(2))
    times = compare({"link": lambda _: theirs.copy_(mine), "memory": lambda _: other.copy_(mine)})
    return {"link_GB_s": size / times["link"].us / 1e3, "memory_GB_s": 2 * size / times["memory"].us / 1e3}


def row(tokens: int, times: dict[str, Figure], bandwidth: dict[str, float], ranks: int) -> dict[str, Any]:
    """Figures of one size, with what follows from them."""
    for name in ("then_pad", "then_eager_pad"):
        take_faster(times, f"flashinfer_{{}}_{name}", f"flashinfer_{name}")
    message = tokens * WIDTH * 2
    share = (ranks - 1) if ranks == 2 else 2 * (ranks - 1) / ranks
    link = share * message / bandwidth["link_GB_s"] / 1e3
    # Reads of x and of the residual, what others send written and read, the sum and the padded norm written.
    memory = (5 * message + message * PADDED / WIDTH) / bandwidth["memory_GB_s"] / 1e3
    best = {name: times[name].us for name in SINGLE if name in times}
    fused = times["all"].us
    alone = [times[name].us for name in ("flashinfer_one_shot", "flashinfer_two_shot") if name in times]
    return {
        "tokens": tokens,
        **{name: times[name].json() for name in COLUMNS if name in times},
        "best_single": min(best, key=lambda name: best[name]),
        "speedup_over_best_single": round(min(best.values()) / fused, 2),
        "speedup_over_peers_single": round(
            min(us for name, us in best.items() if name != "reduce_then_pad") / fused, 2
        ),
        "speedup_over_unfused": round(times["unfused"].us / fused, 2),
        "speedup_over_flashinfer_alone": round(min(alone) / fused, 2) if alone else None,
        "link_limit_us": round(link, 2),
        "memory_limit_us": round(memory, 2),
        "share_of_limit": round(fused / max(link, memory), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/region_DEVICExRANKS.json")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder to write to")
    arguments = parser.parse_args()
    group, rank = started(), dist.get_rank()
    flashinfer, why = flashinfer_or_why(group)
    bandwidth = links()
    rows = []
    for tokens in TOKENS:
        times = compare(alternatives(tokens, group, flashinfer))
        rows.append(row(tokens, times, bandwidth, group.size()))
        if rank == 0:
            print(json.dumps(rows[-1]), flush=True)
    name = torch.cuda.get_device_name().split()[1].lower()
    result = {
        "what": WHAT,
        "command": f"torchrun --nproc-per-node {group.size()} benchmarks/region.py --write",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": versions(),
        "ranks": group.size(),
        "columns": COLUMNS,
        "flashinfer": why,
        **{key: round(value) for key, value in bandwidth.items()},
        "rows": rows,
    }
    if rank == 0 and arguments.write:
        path = arguments.out / f"region_{name}x{group.size()}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
    leave()


if __name__ == "__main__":
    main()
