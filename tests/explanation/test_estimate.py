"""What a whole step takes, estimated: by hand where that is possible, and near what was measured."""

import json

import pytest
import torch
from torch import Tensor, nn

import fuseplan
from docs.blocks import ROOT
from fuseplan.devices import HARDWARE, PROFILES
from fuseplan.explanation.comparison import compare
from fuseplan.record import Report
from fuseplan.workloads import catalog

H200 = HARDWARE["h200"]


def report_on(model: nn.Module, *inputs: Tensor) -> Report:
    return fuseplan.explain(model, *inputs, device="h200")


def test_a_product_waits_for_its_weight_or_its_operations() -> None:
    for rows, width in ((64, 1024), (8192, 4096)):  # fewer rows are contended for
        x = torch.empty(rows, width, dtype=torch.bfloat16)
        (graph,) = report_on(nn.Linear(width, width, bias=False).bfloat16(), x).graphs
        moved = 2 * (width * width + 2 * rows * width) / H200.memory_bandwidth.value
        operations = rows * width * width / H200.attention.narrow_product_rate.value
        assert graph.step_ns == pytest.approx(H200.launch.value + max(moved, operations), abs=2)


def test_rows_that_two_inputs_have_by_sizes_of_their_own_grow_together() -> None:
    """Their product was asked for the flops of matrices whose numbers differ."""

    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.Parameter(torch.randn(3, 64, 32))

        def forward(self, ids: Tensor, x: Tensor) -> Tensor:
            return torch.bmm(x.reshape(-1, 1, 64), self.experts[ids.reshape(-1)])

    ids, x = torch.zeros(3, 5, dtype=torch.int64), torch.randn(3, 5, 64)
    for each in (ids, x):
        torch._dynamo.mark_dynamic(each, 0)
        torch._dynamo.mark_dynamic(each, 1)
    (graph,) = report_on(Routed(), ids, x).graphs
    assert graph.step_ns is not None


@torch.library.custom_op("estimated::opaque", mutates_args=())
def opaque(x: Tensor) -> Tensor:
    return x.clone()


opaque.register_fake(torch.empty_like)


def test_a_step_with_an_op_that_nobody_has_a_formula_of_is_not_known() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = opaque(x @ x)
            return result

    (graph,) = report_on(Model(), torch.randn(8, 8)).graphs
    assert graph.step_ns is None


def test_a_decode_step_is_estimated_near_what_was_measured() -> None:
    """The estimate leaves out what the host adds and what kernels miss of the limits: it is below, not by far."""
    found = json.loads((ROOT / "benchmarks/results/decode_one_gpu_h200.json").read_text(encoding="utf-8"))
    measured = next(r for r in found["rows"] if (r["model"], r["batch"]) == ("llama-3.1-8b", 1))["torch.compile"][0]
    one, two = (estimated_step(layers) for layers in (1, 2))
    assert two > one
    step = one + (found["layers"] - 1) * (two - one)  # all are alike
    assert 0.6 < step / 1000 / measured < 1.2


def estimated_step(layers: int) -> int:
    """In ns, of one sequence."""
    with catalog.build("llama-3.1-8b", layers=layers) as built:
        ranges = [fuseplan.CompileRange(start=1, end=1)]
        compared = compare(
            built.model, built.inputs, workload="llama", tp=1, ranges=ranges, device=PROFILES["h200"],
            policies=[fuseplan.Policy(name="planned")],
        )  # fmt: skip
    (graph,) = compared.reports[0].graphs
    assert graph.step_ns is not None
    return graph.step_ns
