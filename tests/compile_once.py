"""A process that compiles one small model with generated code, runs it and says what was fused: `python -m
tests.compile_once [WIDTH]`. It prints `compiling` before, and one JSON object after.
"""

import json
import multiprocessing
import sys
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import fuseplan
from fuseplan.record import Report


def padded(x: Tensor, weight: Tensor) -> Tensor:
    return F.pad(F.rms_norm(x, x.shape[-1:], weight), (0, 8))


def compile_once(width: int) -> dict[str, Any]:
    reports: list[Report] = []
    config = fuseplan.PassConfig(policy="ordered(act_padding)")
    compiled = fuseplan.compile(padded, config=config, on_report=reports.append)
    x, weight = torch.randn(4, width), torch.rand(width)
    with torch.inference_mode():
        difference = float((compiled(x, weight) - padded(x, weight)).abs().max())
    graphs = [graph for report in reports for graph in report.graphs]
    return {
        "difference": difference,
        "fused": sum(report.fused["act_padding"] for report in reports),
        "from_cache": [graph.from_cache for graph in graphs],
    }


def _in_child(width: int) -> None:
    print(json.dumps(compile_once(width)), flush=True)


if __name__ == "__main__":
    asked = int(sys.argv[1]) if len(sys.argv) > 1 else 64
    print("compiling", flush=True)
    print(json.dumps(compile_once(asked)), flush=True)
    if "spawn" in sys.argv:
        child = multiprocessing.get_context("spawn").Process(target=_in_child, args=(asked,))
        child.start()
        child.join()
        sys.exit(child.exitcode)
