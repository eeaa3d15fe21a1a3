"""fuseplan's Triton kernels on one GPU, beside torch.compile's own code and beside a copy of as many bytes.

PYTHONPATH=src:. python benchmarks/kernel_times.py [--only OP ...] [--write]
"""

import argparse
import datetime
import functools
import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fuseplan.providers  # noqa: F401 - registers kernels
from benchmarks import vllm_kernels
from benchmarks.graphs import compare, versions
from fuseplan.dialect import ops, registered_kernel

WIDTH, PADDED, GROUPED, INTERMEDIATE, EPS = 2880, 3072, 4096, 14336, 1e-5
Q_HEADS, K_HEADS, HEAD_DIM = 32, 8, 128
ROWS = (1, 8, 32, 128, 512, 2048, 8192, 32768)
CACHE_BYTES = 200 * 2**20
"""What the sets of arguments have together, at least: several times the L2 of any GPU."""
MOST_SETS = 24
WHAT = (
    "microseconds a call, [median, interquartile range] of five interleaved repeats of CUDA graphs that rotate among "
    "sets of arguments larger than the L2; bfloat16, hidden 2880 padded to 3072, or 4096 with groups of 128, "
    "intermediate 14336, gate and up the halves of rows, 32 + 8 heads of 128; vllm: its own kernel of the same, which "
    "writes the sum over the residual"
)
FP8, GROUP, LEAST = torch.float8_e4m3fn, 128, 1e-10


def add_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = (x.float() + residual.float()).to(x.dtype)
    wide = total.float()
    y = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS) * weight.float()
    return y.to(x.dtype), total


def add_norm_pad(x: Tensor, residual: Tensor, weight: Tensor) -> Any:
    y, total = add_norm(x, residual, weight)
    return F.pad(y, (0, PADDED - WIDTH)), total


def static(y: Tensor, scale: Tensor) -> Tensor:
    return (y.float() * scale.reciprocal()).clamp(-448, 448).to(FP8)


def dynamic(y: Tensor) -> tuple[Tensor, Tensor]:
    wide = y.float()
    scale = (wide.abs().amax(-1, keepdim=True) / 448).clamp(min=1e-6)
    return (wide * scale.reciprocal()).clamp(-448, 448).to(FP8), scale


def grouped(y: Tensor) -> tuple[Tensor, Tensor]:
    wide = y.float().unflatten(-1, (-1, GROUP))
    scale = wide.abs().amax(-1, keepdim=True).clamp(min=LEAST) / 448
    return (wide / scale).clamp(-448, 448).to(FP8).flatten(-2), scale.squeeze(-1)


def norm_grouped(x: Tensor, weight: Tensor) -> Any:
    wide = x.float()
    return grouped((wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS) * weight.float()).to(x.dtype))


def add_norm_grouped(x: Tensor, residual: Tensor, weight: Tensor) -> Any:
    y, total = add_norm(x, residual, weight)
    return *grouped(y), total


def add_norm_static(x: Tensor, residual: Tensor, weight: Tensor, scale: Tensor) -> Any:
    y, total = add_norm(x, residual, weight)
    return static(y, scale), total


def add_norm_dynamic(x: Tensor, residual: Tensor, weight: Tensor) -> Any:
    y, total = add_norm(x, residual, weight)
    return *dynamic(y), total


def activated(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def rotated(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    found = []
    for x, weight in ((q, q_weight), (k, k_weight)):
        wide = x.float()
        normed = weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
        first, second = normed.chunk(2, dim=-1)
        found.append(normed * cos + torch.cat((-second, first), dim=-1) * sin)
    return tuple(found)


class Op:
    """One fused op: how its arguments are made, what runs it, and how many bytes it has to move for a row."""

    def __init__(
        self, name: str, make: Callable[[int], tuple[Tensor, ...]], fused: Callable[..., Any],
        plain: Callable[..., Any], row_bytes: int,
    ) -> None:  # fmt: skip
        self.name, self.make, self.fused, self.row_bytes = name, make, fused, row_bytes
        self.plain = torch.compile(plain, dynamic=False)


def activations(rows: int, width: int, count: int) -> list[Tensor]:
    return [torch.randn(rows, width, device="cuda").bfloat16() for _ in range(count)]


def halves(rows: int) -> tuple[Tensor, ...]:
    """gate and up, of one product."""
    return activations(rows, 2 * INTERMEDIATE, 1)[0].chunk(2, dim=-1)


def norm_arguments(rows: int, width: int = WIDTH, count: int = 2) -> tuple[Tensor, ...]:
    return (*activations(rows, width, count), (1 + 0.1 * torch.randn(width, device="cuda")).bfloat16())


def heads(rows: int) -> tuple[Tensor, ...]:
    q, k = (torch.randn(rows, each, HEAD_DIM, device="cuda").bfloat16() for each in (Q_HEADS, K_HEADS))
    weights = [(1 + 0.1 * torch.randn(HEAD_DIM, device="cuda")).bfloat16() for _ in range(2)]
    turn = torch.rand(rows, 1, HEAD_DIM, device="cuda") * 6
    return q, k, *weights, turn.cos().bfloat16(), turn.sin().bfloat16()


def table() -> list[Op]:
    """All ops."""
    scale = torch.tensor([0.02], device="cuda")
    kernel = {name: run for name in ops if (run := registered_kernel(name, "triton"))}
    norm, rounding = (EPS, "gpt_oss"), "llama"
    shape = (Q_HEADS + K_HEADS) * HEAD_DIM
    by_rows = (FP8, 1e-6, 0.0, 0.0, None, "multiply")
    by_groups = (GROUP, FP8, LEAST / 448, 0.0, False, 0.0, 0.0, None, "divide", "rows")
    return [
        Op("add + RMSNorm + pad", norm_arguments,
           lambda x, r, w: kernel["fused_add_rms_norm_pad"](x, r, w, *norm, PADDED - WIDTH), add_norm_pad,
           2 * (3 * WIDTH + PADDED)),
        Op("add + RMSNorm + static fp8", norm_arguments,
           lambda x, r, w: kernel["fused_add_rms_norm_static_fp8_quant"](x, r, w, *norm, scale, FP8, "multiply"),
           lambda x, r, w: add_norm_static(x, r, w, scale), 7 * WIDTH),
        Op("add + RMSNorm + dynamic fp8", norm_arguments,
           lambda x, r, w: kernel["fused_add_rms_norm_dynamic_fp8_quant"](x, r, w, *norm, *by_rows),
           add_norm_dynamic, 7 * WIDTH + 4),
        Op("SiLU-mul + static fp8", halves,
           lambda gate, up: kernel["silu_and_mul_static_fp8_quant"](gate, up, rounding, scale, FP8, "multiply"),
           lambda gate, up: static(activated(gate, up), scale), 5 * INTERMEDIATE),
        Op("SiLU-mul + dynamic fp8", halves,
           lambda gate, up: kernel["silu_and_mul_dynamic_fp8_quant"](gate, up, rounding, *by_rows),
           lambda gate, up: dynamic(activated(gate, up)), 5 * INTERMEDIATE + 4),
        Op("RMSNorm + group fp8", lambda rows: norm_arguments(rows, GROUPED, 1),
           lambda x, w: kernel["rms_norm_group_fp8_quant"](x, w, *norm, *by_groups), norm_grouped,
           3 * GROUPED + 4 * GROUPED // GROUP),
        Op("add + RMSNorm + group fp8", lambda rows: norm_arguments(rows, GROUPED),
           lambda x, r, w: kernel["fused_add_rms_norm_group_fp8_quant"](x, r, w, *norm, *by_groups), add_norm_grouped,
           7 * GROUPED + 4 * GROUPED // GROUP),
        Op("SiLU-mul + group fp8", halves,
           lambda gate, up: kernel["silu_and_mul_group_fp8_quant"](gate, up, rounding, *by_groups),
           lambda gate, up: grouped(activated(gate, up)), 5 * INTERMEDIATE + 4 * INTERMEDIATE // GROUP),
        Op("QK norm + RoPE", heads,
           lambda *args: kernel["qk_norm_rope"](*args, 1e-6, "llama", "products"), rotated,
           4 * shape + 4 * HEAD_DIM),
    ]  # fmt: skip


def others() -> dict[str, dict[str, Callable[..., Any]]]:
    """Other libraries' kernels by op, of those that are installed: of Liger Kernel and quack add + RMSNorm with
    torch.compile's pad, and vLLM's.
    """
    pad = torch.compile(lambda y: F.pad(y, (0, PADDED - WIDTH)), dynamic=False)
    found: dict[str, Callable[..., Any]] = {}
    try:
        from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction
    except ImportError:
        pass
    else:

        def liger(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            y, total = LigerFusedAddRMSNormFunction.apply(x, residual, weight, EPS, 0.0, "gemma", False)
            return pad(y), total

        found["liger_then_pad"] = liger
    try:
        from quack.rmsnorm import rmsnorm_fwd
    except ImportError:
        pass
    else:

        def quack(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            y, total, _ = rmsnorm_fwd(x, weight, residual=residual, eps=EPS)
            return pad(y), total

        found["quack_then_pad"] = quack
    theirs = {op: {"vllm": kernel} for op, kernel in vllm_kernels.kernels(EPS, GROUP, FP8).items()}
    return {"add + RMSNorm + pad": found, **theirs}


def row(op: Op, rows: int, beside: Mapping[str, Callable[..., Any]]) -> dict[str, Any]:
    """Figures of one op at one size."""
    traffic = rows * op.row_bytes
    sets = max(1, min(MOST_SETS, -(-CACHE_BYTES // traffic)))
    arguments = [op.make(rows) for _ in range(sets)]
    copies = [torch.empty(2, max(2, traffic // 4), device="cuda", dtype=torch.bfloat16).normal_() for _ in range(sets)]
    alternatives: dict[str, Callable[[int], Any]] = {
        "fused": lambda number: op.fused(*arguments[number]),
        "torch.compile": lambda number: op.plain(*arguments[number]),
        "copy": lambda number: copies[number][0].copy_(copies[number][1]),
    }
    for name, other in beside.items():
        alternatives[name] = functools.partial(lambda other, number: other(*arguments[number]), other)
    with torch.no_grad():
        times = compare(alternatives, sets=sets)
    fused = times["fused"].us
    return {
        "op": op.name, "rows": rows, "MiB": round(traffic / 2**20, 2),
        **{name: each.json() for name, each in times.items()},
        "speedup_over_torch_compile": round(times["torch.compile"].us / fused, 2),
        "share_of_copy_bandwidth": round(times["copy"].us / fused, 3),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/kernels_DEVICE.json")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder to write to")
    parser.add_argument("--only", metavar="OP", nargs="+", help="measure these ops alone, and replace their rows")
    arguments = parser.parse_args()
    torch._dynamo.config.recompile_limit = 64
    beside, measured = others(), {op.name: op for op in table()}
    if unknown := [name for name in arguments.only or () if name not in measured]:
        parser.error(f"--only {unknown[0]!r}: allowed are {', '.join(measured)}")
    path = arguments.out / f"kernels_{torch.cuda.get_device_name().split()[1].lower()}.json"
    if arguments.only and arguments.write and not path.exists():
        parser.error(f"--only replaces rows of {path}, which isn't there: measure all ops first")
    only = f" --only {shlex.join(arguments.only)}" if arguments.only else ""
    run = {
        "command": f"PYTHONPATH=src:. python benchmarks/kernel_times.py --write{only}",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": versions(),
    }
    result = json.loads(path.read_text()) if arguments.only and arguments.write else {**run, "rows": []}
    for name in arguments.only or measured:
        rows = []
        for size in ROWS:
            rows.append(row(measured[name], size, beside.get(name, {})))
            print(json.dumps(rows[-1]), flush=True)
        result = with_rows(result, name, rows, run if arguments.only else None)
        if arguments.write:
            path.write_text(json.dumps(result, indent=1) + "\n")


def with_rows(
    result: Mapping[str, Any], name: str, rows: Sequence[Mapping[str, Any]], again: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Results with an op's rows where its former ones were, or behind all.

    Args:
        result: what there was.
        name: the op's.
        rows: of it.
        again: by what it was measured again; None: all of the results are of this run.
    """
    before, own = result["rows"], iter(rows)
    merged = [next(own, each) if each["op"] == name else each for each in before] + [*own]
    repeated = {"measured_again": {**result.get("measured_again", {}), name: again}} if again else {}
    return {"what": WHAT, **{key: each for key, each in result.items() if key != "what"}, **repeated, "rows": merged}


if __name__ == "__main__":
    main()
