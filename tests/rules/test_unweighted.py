"""Norms without a weight fuse as others do, bit for bit, with ones that are made once for all of them."""

import torch
from torch import Tensor
from torch.nn import functional as F

import fuseplan
from fuseplan.compilation.manager import PostGradPassManager
from fuseplan.dialect.raising import canonicalize
from fuseplan.planner.costs import HARDWARE, CostModel
from fuseplan.record import Report
from fuseplan.rules.families import find_sites
from tests.helpers import HIDDEN, all_reduce, post_grad, quantize, randn

SCALE = torch.tensor([0.02])
EVERYTHING = fuseplan.PassConfig(policy="ordered(allreduce_rms, act_padding, norm_quant)")


def unweighted(x: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.pow(wide.pow(2).mean(-1, keepdim=True) + 1e-6, -0.5)).type_as(x)


def test_with_an_all_reduce_a_pad_and_codes(one_rank: str) -> None:
    def model(x: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        return unweighted(all_reduce(x, one_rank)), F.pad(unweighted(x.exp()), (0, 8)), quantize(unweighted(-x), scale)

    reports: list[Report] = []
    with torch.inference_mode():
        torch._dynamo.reset()
        found = fuseplan.compile(model, config=EVERYTHING, on_report=reports.append)(randn(5, HIDDEN), SCALE)
    for left, right in zip(found, model(randn(5, HIDDEN), SCALE), strict=True):
        assert left.dtype is right.dtype
        assert torch.equal(left.view(torch.uint8), right.view(torch.uint8))
    (report,) = reports
    assert report.fused == {**dict.fromkeys(report.fused, 0), "allreduce_rms": 1, "act_padding": 1, "norm_quant": 1}
    # What the graph computes there was held against the op with this weight, not with a random one.
    assert [outcome.passed for graph in report.graphs for outcome in graph.verified] == [True] * 3


def test_the_ones_are_made_once_and_only_where_something_is_fused() -> None:
    def model(x: Tensor) -> tuple[Tensor, ...]:
        return F.pad(unweighted(x), (0, 8)), F.pad(unweighted(x.relu()), (0, 8)), unweighted(x.sigmoid())

    for policy, made in (("ordered(act_padding)", 1), ("off", 0)):
        graph = post_grad(model, randn(5, HIDDEN))
        PostGradPassManager(fuseplan.PassConfig(policy=policy))(graph)
        assert len(graph.find_nodes(op="call_function", target=torch.ops.aten.full.default)) == made
        graph.lint()


def test_making_them_is_part_of_the_price() -> None:
    def sites(weight: bool) -> tuple[str, int]:
        def model(x: Tensor, w: Tensor) -> Tensor:
            return F.pad(F.rms_norm(x, (HIDDEN,), w if weight else None, 1e-6), (0, 8))

        (site,) = find_sites(canonicalize(post_grad(model, randn(5, HIDDEN), randn(HIDDEN))))
        shape = site.shape(5)
        kernels = shape.fused(CostModel(HARDWARE["h100"]), "triton", reduce=False, tail=shape.tails[0])
        return shape.signature, sum(kernel.ns for kernel in kernels)

    (weighted, less), (unweighted_, more) = sites(True), sites(False)
    assert more - less == round(HARDWARE["h100"].launch.value)
    assert unweighted_ == f"{weighted} unweighted"
