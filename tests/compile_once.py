"""A process that compiles one small model with generated code, runs it and says what was fused: `python -m
tests.compile_once [spawn]`. It prints `compiling` before, and one JSON object after.
"""

import json
import multiprocessing
import sys

import torch
from torch import Tensor
from torch.nn import functional as F

import fuseplan
from fuseplan.record import Report


def padded(x: Tensor, weight: Tensor) -> Tensor:
    return F.pad(F.rms_norm(x, x.shape[-1:], weight), (0, 8))


def compile_once() -> None:
    reports: list[Report] = []
    config = fuseplan.PassConfig(policy="ordered(act_padding)")
    compiled = fuseplan.compile(padded, config=config, on_report=reports.append)
    x, weight = torch.randn(4, 64), torch.rand(64)
    with torch.inference_mode():
        difference = float((compiled(x, weight) - padded(x, weight)).abs().max())
    graphs = [graph for report in reports for graph in report.graphs]
    fused, from_cache = sum(report.fused["act_padding"] for report in reports), [each.from_cache for each in graphs]
    print(json.dumps({"difference": difference, "fused": fused, "from_cache": from_cache}), flush=True)


if __name__ == "__main__":
    print("compiling", flush=True)
    compile_once()
    if "spawn" in sys.argv:
        child = multiprocessing.get_context("spawn").Process(target=compile_once)
        child.start()
        child.join()
        sys.exit(child.exitcode)
