"""Kernels that take only so many rows, in graphs of one size, of a range, and of any size."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import fresh_cache

import fuseplan
from fuseplan.compilation.manager import DEFAULT_SPAN
from fuseplan.dialect import falls_back, implement, ops
from fuseplan.providers import BUILT_IN_PROVIDERS, Offer, Provider, provider_of
from fuseplan.record import Report

WIDTH = 8
SIZES = {"few": 48, "many": DEFAULT_SPAN.end}
CALLS: list[int] = []


def kernel_up_to(most: int) -> Any:
    def kernel(x: Tensor, weight: Tensor, eps: float, rounding: str, right: int) -> Tensor:
        rows = x.shape[:-1].numel()
        if rows > most:
            raise RuntimeError(f"{rows} rows, and {most} are the most")
        CALLS.append(rows)
        y: Tensor = ops.rms_norm_pad.reference(x, weight, eps, rounding, right)
        return y

    return kernel


def up_to(most: int) -> Callable[[Any], int]:
    return lambda m: most


def bare(name: str, most: int) -> Provider:
    """A provider whose kernel goes wrong beyond its limit."""
    implement(ops.rms_norm_pad, name, kernel_up_to(most))
    offers = {"rms_norm_pad": Offer(cost=0.0, most_rows=up_to(most))}
    cpu = frozenset({"cpu"})
    return Provider(name=name, description="", vendors=cpu, package=None, install="", implements=offers)


BARE = {name: bare(f"bare_{name}", most) for name, most in SIZES.items()}
GUARDED = {
    name: provider_of(f"guarded_{name}", {ops.rms_norm_pad: kernel_up_to(most)}, cost=0.0, most_rows=up_to(most))
    for name, most in SIZES.items()
}
WEIGHT = torch.ones(WIDTH, dtype=torch.bfloat16)


def model(x: Tensor, weight: Tensor) -> Tensor:
    y = torch.nn.functional.rms_norm(x, x.shape[-1:], weight, 1e-5)
    return torch.nn.functional.pad(y, (0, 8))


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """A graph in Inductor's cache brings the ranges of sizes that it was compiled for."""
    CALLS.clear()
    torch._dynamo.reset()
    with fresh_cache():
        yield
    torch._dynamo.reset()


def run(provider: Provider, sizes: list[int], *, most: int | None = None, **options: Any) -> Report:
    reports: list[Report] = []
    compiled = fuseplan.compile(
        model, providers=[provider], on_report=reports.append, dynamic=None if most else True,
        config=fuseplan.PassConfig(**options),
    )  # fmt: skip
    for rows in sizes:
        x = torch.randn(rows, WIDTH).bfloat16()
        if most is not None:
            torch._dynamo.mark_dynamic(x, 0, min=2, max=most)
        with torch.inference_mode():
            assert torch.equal(compiled(x, WEIGHT), model(x, WEIGHT))
    return reports[0]


def test_a_kernel_that_falls_back_serves_a_graph_of_any_size() -> None:
    report = run(GUARDED["many"], [64, SIZES["many"], SIZES["many"] + 1])
    assert report.fused["act_padding"] == 1
    assert report.graphs[0].range is None
    assert max(CALLS) == SIZES["many"]


def test_one_that_does_not_is_no_candidate_there() -> None:
    report = run(BARE["many"], [64, SIZES["many"] + 1])
    assert report.fused["act_padding"] == 0
    (miss,) = [each for each in report.near_misses if each.provider == "bare_many"]
    assert miss.detail == "bare_many takes up to 8192 rows of this width, and nothing limits those of the graph"
    assert (miss.found, miss.fix) == ("any number of rows", "end a compile range at 8192 tokens")


def test_a_graph_is_not_planned_for_a_kernel_that_serves_few_of_its_sizes() -> None:
    report = run(GUARDED["few"], [SIZES["few"], SIZES["few"] + 1])
    assert report.fused["act_padding"] == 0
    assert CALLS == []


@pytest.mark.parametrize(("last", "fused"), [(48, 1), (49, 0)])
@pytest.mark.parametrize("is_marked", [True, False])
def test_sizes_that_end_before_the_limit_are_served_without_it(last: int, fused: int, is_marked: bool) -> None:
    how: dict[str, Any] = {"compile_ranges": [fuseplan.CompileRange(start=1, end=last)]}
    report = run(BARE["few"], [5, last], **({"most": last} if is_marked else how))
    assert report.fused["act_padding"] == fused
    assert max(CALLS, default=0) == last * fused


def test_a_graph_of_one_size_knows_its_rows() -> None:
    reports = []
    for rows in (48, 49):
        x = torch.randn(rows, WIDTH).bfloat16()
        reports.append(fuseplan.explain(model, x, WEIGHT, device="cpu", providers=[BARE["few"]]))
    assert [report.fused["act_padding"] for report in reports] == [1, 0]


def test_built_in_kernels_with_a_limit_fall_back() -> None:
    limited = [
        (op, provider.name)
        for provider in BUILT_IN_PROVIDERS
        for op, offer in provider.implements.items()
        if offer.most_rows is not None
    ]
    assert {name for _, name in limited} == {"aiter", "flashinfer", "triton"}
    # Triton's kernel of linear layers is for few rows alone: a graph that may have more is left as it is.
    assert all(falls_back(op, name) == (name != "triton") for op, name in limited)
