"""What the host pays for a fused op where no CUDA graph covers a call, beside Inductor's own kernels.

A chain of layers, each a product of matrices and what is fused before it, small enough that the host is the bound; and
calls of single ops, as compiled code makes them and by torch's dispatcher.

PYTHONPATH=src:. python benchmarks/host_cost.py [--profile] [--write]
"""

import argparse
import cProfile
import datetime
import json
import pstats
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

import fuseplan
from benchmarks.graphs import figure, versions
from fuseplan.dialect import ops
from fuseplan.distributed.workspace import loopback

LAYERS, ROWS, WIDTH, PAD, REPEATS, CALLS, EPS = 64, 16, 512, 64, 15, 10, 1e-5
FP8 = torch.float8_e4m3fn
WHAT = (
    f"microseconds of the host's time a layer, [median, interquartile range] of {REPEATS} interleaved repeats of "
    f"{CALLS} calls, no CUDA graphs; {LAYERS} layers of what is fused and a product of {ROWS} x {WIDTH} by {WIDTH} x "
    f"{WIDTH}, bfloat16; kernels: that Inductor launches in place of the fused op; calls: of single ops, of as many "
    "rows and columns, until they are launched: direct as compiled code makes them, dispatcher by torch's dispatcher; "
    "all-reduces of two ranks of which one is there and sends to itself"
)
Layer = Callable[..., Tensor]


def normed(total: Tensor, weight: Tensor) -> Tensor:
    wide = total.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(total.dtype)


def quantized(total: Tensor, weight: Tensor, product: Tensor, ones: Tensor) -> Tensor:
    wide = normed(total, weight).float()
    scale = (wide.abs().amax(-1, keepdim=True) / 448).clamp(min=1e-6)
    codes = (wide / scale).clamp(-448, 448).to(FP8)
    return torch._scaled_mm(codes, product, scale_a=scale, scale_b=ones, out_dtype=total.dtype)


def padded(total: Tensor, weight: Tensor, product: Tensor) -> Tensor:
    return F.pad(normed(total, weight), (0, PAD)) @ product


def products(op: str) -> tuple[Tensor, ...]:
    """What a layer multiplies by, and its scales."""
    if op.endswith("pad"):
        return (0.05 * torch.randn(WIDTH + PAD, WIDTH, device="cuda").bfloat16(),)
    return torch.randn(WIDTH, WIDTH, device="cuda").to(FP8).t(), torch.full((1, WIDTH), 0.05, device="cuda")


LAYER: dict[str, tuple[str, Layer, int]] = {
    "fused_add_rms_norm_dynamic_fp8_quant": ("norm_quant", quantized, 1),
    "fused_add_rms_norm_pad": ("act_padding", padded, 2),
}
"""The rule, what a layer does, and in how many kernels Inductor does it, by the fused op."""


def chain(layer: Layer) -> Layer:
    """Layers behind each other, each with its own weight."""

    def run(x: Tensor, weights: Tensor, *product: Tensor) -> Tensor:
        residual = x
        for each in range(LAYERS):
            residual = x + residual
            x = layer(residual, weights[each], *product)
        return x + residual

    return run


def microseconds(run: Callable[[], Any]) -> float:
    """Of the host, a layer, until the device has ended too."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(CALLS):
        run()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e6 / (CALLS * LAYERS)


def measured(op: str, *, profile: bool) -> dict[str, Any]:
    """A row of the result."""
    rule, layer, kernels = LAYER[op]
    x = torch.randn(ROWS, WIDTH, device="cuda").bfloat16()
    arguments = (x, 0.1 * torch.randn(LAYERS, WIDTH, device="cuda").bfloat16(), *products(op))
    reports: list[fuseplan.Report] = []
    sides = {
        "torch.compile": torch.compile(chain(layer)),
        "fuseplan": fuseplan.compile(
            chain(layer), config=fuseplan.PassConfig(force=(f"{rule}:triton",)), on_report=reports.append
        ),
    }
    times: dict[str, list[float]] = {name: [] for name in sides}
    with torch.inference_mode():
        for side in sides.values():
            side(*arguments)
        for _ in range(REPEATS):
            for name, side in sides.items():
                times[name].append(microseconds(lambda side=side: side(*arguments)))  # type: ignore[misc]
        if profile:
            profiled = cProfile.Profile()
            profiled.runcall(microseconds, lambda: sides["fuseplan"](*arguments))
            pstats.Stats(profiled).sort_stats("tottime").print_stats(25)
    return {
        "op": op, "fused": sum(reports[-1].fused.values()), "kernels": kernels,
        **{name: figure(each).json() for name, each in times.items()},
    }  # fmt: skip


CALLED = ("fused_add_rms_norm_pad", "fused_add_rms_norm_dynamic_fp8_quant", "all_reduce_fused_add_rms_norm_pad")


def called(op: str) -> dict[str, Any]:
    """Microseconds of the host until a call's kernel is launched."""
    overload: Any = ops[op].implementation("triton")
    arguments = ops[op].samples[0].make(torch.device("cuda"), torch.Generator().manual_seed(0))
    named = dict(zip(ops[op].arguments, arguments, strict=True))
    rows = {name: torch.randn(ROWS, WIDTH, device="cuda").bfloat16() for name in ("x", "residual")}
    own = named | rows | {"weight": torch.ones(WIDTH, device="cuda").bfloat16()}
    if "group_name" in own:
        own["group_name"] = dist.group.WORLD.group_name  # type: ignore[union-attr]
    given = tuple(own.values())
    sides = {"direct": lambda: overload.direct("alike", *given), "dispatcher": lambda: overload(*given)}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(REPEATS + 1):
        for name, side in sides.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(20 * CALLS):
                side()
            if number:  # the first one compiles
                times[name].append((time.perf_counter() - start) * 1e6 / (20 * CALLS))
    return {"op": op, **{name: figure(each).json() for name, each in times.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", action="store_true", help="print what Python spends the time on")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/host_cost_DEVICE.json")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder to write to")
    arguments = parser.parse_args()
    rows = []
    for op in LAYER:
        rows.append(measured(op, profile=arguments.profile))
        print(json.dumps(rows[-1]), flush=True)
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    with loopback(), torch.inference_mode():
        calls = [called(op) for op in CALLED]
    print(json.dumps(calls))
    if arguments.write:
        result = {
            "what": WHAT, "command": "PYTHONPATH=src:. python benchmarks/host_cost.py --write",
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(), "versions": versions(), "rows": rows,
            "calls": calls,
        }  # fmt: skip
        device = torch.cuda.get_device_name().split()[1].lower()
        (arguments.out / f"host_cost_{device}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
