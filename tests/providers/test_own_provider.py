"""A provider of one's own says what a built-in one does: where it rounds, where it runs, and what it takes."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

import fuseplan
from fuseplan.dialect import Rounding, ops
from fuseplan.errors import ConfigError
from fuseplan.planner.costs import BUILT_IN_TIMINGS, HARDWARE, CostModel, Region
from fuseplan.planner.sources import prices_of
from fuseplan.providers import (
    BUILT_IN_PROVIDERS,
    ONE_KERNEL,
    PROFILES,
    KernelCost,
    Offer,
    Provider,
    Timing,
    provider_of,
)
from fuseplan.record import Report
from tests.helpers import HIDDEN, all_reduce, llama, randn
from tests.planner.parts import NORM
from tests.providers.stand_ins import ranks

BY_NAME = {each.name: each for each in BUILT_IN_PROVIDERS}
KERNELS = {
    op: op.reference
    for op in (ops.fused_add_rms_norm_pad, ops.all_reduce_fused_add_rms_norm, ops.all_reduce_fused_add_rms_norm_pad)
}
W = torch.ones(HIDDEN, dtype=torch.bfloat16)
_count = itertools.count()


def mine(**options: Any) -> Provider:
    return provider_of(f"own_{next(_count)}", KERNELS, **options)


@pytest.fixture(name="group")
def a_group(request: pytest.FixtureRequest) -> Iterator[str]:
    with ranks(getattr(request, "param", 2)):
        assert dist.group.WORLD is not None
        yield dist.group.WORLD.group_name


def layers(group: str) -> Any:
    """All-reduce, residual add and norm, twice, the second with a pad."""

    def model(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        y, total = llama(all_reduce(x, group), residual, weight)
        y, total = llama(all_reduce(y, group), total, weight)
        return F.pad(y, (0, 64)), total

    return model


def explain(model: Any, provider: Provider, device: str | None = "h200", **config: Any) -> Report:
    return fuseplan.explain(
        model, randn(16, HIDDEN), randn(16, HIDDEN, seed=1), W, config=fuseplan.PassConfig(**config), device=device,
        providers=[provider],
    )  # fmt: skip


@pytest.mark.parametrize("device", ["h200", "l40s", "mi355x"])
@pytest.mark.parametrize("group", [2, 8], indirect=True)
def test_one_kernel_is_priced_as_fuseplans_own_are(device: str, group: str) -> None:
    """The exchange between ranks included."""
    own = mine(cost=ONE_KERNEL)
    saved = {}
    for other in (own.name, "triton"):
        report = explain(layers(group), own, device, force=[f"allreduce_rms:{other}"])
        (graph,) = report.graphs
        saved[other] = [each.saving_ns for each in graph.applied if each.provider == other]
        assert saved[other]
    assert saved[own.name] == saved["triton"]


def test_its_price_is_its_owners_word(group: str) -> None:
    own = mine(cost=ONE_KERNEL)
    (graph,) = explain(layers(group), own, force=[f"allreduce_rms:{own.name}"]).graphs
    assert {each.provenance for each in graph.applied if each.provider == own.name} == {"declared"}


def test_an_exchange_may_be_a_librarys() -> None:
    own = mine(cost=Timing(exchange="flashinfer"))
    region = Region(core=NORM, tokens=64, width=4096, reduce=True, residual=True, ranks=4)
    prices = prices_of(fuseplan.PassConfig(), fuseplan.config.Environment(), PROFILES["h200"], [own])
    assert prices.model.fused(region, own.name) == prices.model.fused(region, "flashinfer")
    assert prices.model.fused(region, own.name) != prices.model.fused(region, "triton")
    assert prices.model.fused(region, "somebody") == prices.model.fused(region, "triton")


def test_an_exchange_that_no_device_has_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown exchange 'flashinfr'; did you mean 'flashinfer'"):
        Timing(exchange="flashinfr")


def test_heads_that_no_kernel_reads_so_are_refused() -> None:
    with pytest.raises(ConfigError, match="unknown heads 'shred'; did you mean 'shared'"):
        Timing(heads="shred")  # type: ignore[arg-type]


@pytest.mark.parametrize("times", [0.5, float("nan")])
def test_no_kernel_is_faster_than_memory(times: float) -> None:
    with pytest.raises(ConfigError, match=r"times=(0\.5|nan): a kernel takes at least as long as memory does"):
        Timing(times=times)


def test_of_an_op_that_the_model_has_no_site_for_it_is_a_kernel() -> None:
    offer = mine(cost=ONE_KERNEL).implements[ops.fused_add_rms_norm_pad.name]
    assert offer.cost == KernelCost()


def test_every_built_in_provider_says_how_it_is_priced() -> None:
    assert BUILT_IN_TIMINGS.keys() == BY_NAME.keys()
    for hardware in HARDWARE.values():
        for timing in BUILT_IN_TIMINGS.values():
            hardware.exchange(timing.exchange)
    assert CostModel(HARDWARE["h200"]).timing("torch").eager


def test_where_it_rounds_is_in_its_offers() -> None:
    offers = mine(roundings={Rounding.GPT_OSS}).implements.values()
    assert {offer.roundings for offer in offers} == {frozenset({"gpt_oss"})}


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"gptoss"}, "unknown rounding 'gptoss'; did you mean 'gpt_oss'"),
        ("gpt_oss", r"roundings='gpt_oss': give a set of conventions, \{'gpt_oss'\}"),
    ],
)
def test_conventions_that_nobody_has_are_refused(given: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        mine(roundings=given)


def test_a_provider_that_can_not_run_here_says_why() -> None:
    own = mine(cost=ONE_KERNEL, available=lambda: "libmine.so was built for another CUDA")
    refused = own.unavailable()
    assert refused is not None
    assert refused.detail == "libmine.so was built for another CUDA"
    # Another device's software is taken as present.
    assert own.unavailable(PROFILES["h200"]) is None
    assert mine(available=lambda: None).unavailable() is None


@pytest.mark.parametrize(
    ("available", "text"),
    [
        (lambda: 1 / 0, "can't tell whether own_[0-9]+ is available: ZeroDivisionError"),
        (lambda: True, r"available\(\) of own_[0-9]+ returns True: allowed are None and a line"),
    ],
)
def test_an_answer_that_is_none_is_an_error_of_one_line(available: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=text) as caught:
        mine(available=available).unavailable()
    assert "\n" not in str(caught.value)


def test_an_offer_has_no_timing() -> None:
    with pytest.raises(ConfigError, match="allowed are a KernelCost"):
        Offer(cost=ONE_KERNEL)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"vendors": "nvidia"}, "give a set of nvidia"),
        ({"vendors": ["nvidai"]}, "nvidai"),
        ({"vendors": ()}, "give a set of"),
        ({"accepts": None}, "accepts=None: give a function"),
        ({"most_rows": 5}, "most_rows=5: give a function, or None"),
        ({"available": True}, "available=True: give a function, or None"),
        ({"roundings": 5}, "roundings=5: give a set of conventions"),
        ({"roundings": ()}, "give a set of conventions"),
    ],
)
def test_other_arguments_are_refused_in_one_line(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        mine(**options)
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("name", "kernels"), [("a b", KERNELS), ("own", None), ("own", {"rms_norm": None})])
def test_names_and_kernels_are_looked_at_first(name: str, kernels: Any) -> None:
    with pytest.raises(ConfigError, match=r"name is one word|give a dict of kernels"):
        provider_of(name, kernels)
