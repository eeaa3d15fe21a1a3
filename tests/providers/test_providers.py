"""Providers answer for themselves, and own ones say what built-in ones do: where they round and run, what they take."""

import ast
import itertools
from collections.abc import Callable, Iterator
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
    device_profile,
    provider_of,
)
from fuseplan.record import Report
from tests.helpers import HIDDEN, all_reduce, llama, randn
from tests.planner.parts import NORM
from tests.providers.stand_ins import ranks
from tests.test_architecture import source_modules

BY_NAME = {each.name: each for each in BUILT_IN_PROVIDERS}
KERNELS = {
    op: op.reference
    for op in (ops.fused_add_rms_norm_pad, ops.all_reduce_fused_add_rms_norm, ops.all_reduce_fused_add_rms_norm_pad)
}
W = torch.ones(HIDDEN, dtype=torch.bfloat16)
_count = itertools.count()


def test_torch_implements_every_fused_op_on_every_device() -> None:
    assert set(BY_NAME["torch"].implements) == {op.name for op in ops.values() if op.fused}
    for profile in PROFILES.values():
        assert BY_NAME["torch"].unavailable(profile) is None


@pytest.mark.parametrize(
    ("device", "available"),
    [
        ("h200", {"flashinfer", "sdpa", "sdpa_packed", "torch", "triton"}),
        ("b200", {"flashinfer", "sdpa", "sdpa_packed", "torch", "triton"}),
        ("mi355x", {"aiter", "sdpa", "sdpa_packed", "torch", "triton"}),
        ("cpu", {"sdpa", "sdpa_packed", "torch"}),
    ],
)
def test_a_profile_takes_its_software_as_present(device: str, available: set[str]) -> None:
    profile = device_profile(device)
    assert {name for name, provider in BY_NAME.items() if provider.unavailable(profile) is None} == available


def test_no_stage_names_a_provider() -> None:
    """What is so of one stands in its record."""
    stages = {"analysis", "explanation", "manager", "matching", "planner", "rewriting", "verification"}
    versions = "planner/evidence.py"  # of torch and Triton, in a cost table's rows
    assert [
        f"{module.path}:{node.lineno}: {node.value}"
        for module in source_modules()
        if module.part in stages and module.path != versions
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Constant) and node.value in BY_NAME
    ] == []


def test_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fuseplan.providers.provider.local_vendor", lambda: "amd")
    missing = BY_NAME["aiter"].unavailable()
    assert missing is not None
    assert missing.detail == "the package aiter is not installed"
    assert missing.fix == "install AITER 0.1.20 or newer from its ROCm release"
    other = BY_NAME["flashinfer"].unavailable()
    assert other is not None
    assert other.detail == "serves NVIDIA GPUs, and this machine has AMD GPUs"


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
        if other == own.name:  # its price is its owner's word
            assert {each.provenance for each in graph.applied if each.provider == other} == {"declared"}
    assert saved[own.name] == saved["triton"]


def test_an_exchange_may_be_a_librarys() -> None:
    own = mine(cost=Timing(exchange="flashinfer"))
    region = Region(core=NORM, tokens=64, width=4096, reduce=True, residual=True, ranks=4)
    prices = prices_of(fuseplan.PassConfig(), fuseplan.config.Environment(), PROFILES["h200"], [own])
    assert prices.model.fused(region, own.name) == prices.model.fused(region, "flashinfer")
    assert prices.model.fused(region, own.name) != prices.model.fused(region, "triton")
    assert prices.model.fused(region, "somebody") == prices.model.fused(region, "triton")


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


def test_a_provider_that_can_not_run_here_says_why() -> None:
    own = mine(cost=ONE_KERNEL, available=lambda: "libmine.so was built for another CUDA")
    refused = own.unavailable()
    assert refused is not None
    assert refused.detail == "libmine.so was built for another CUDA"
    # Another device's software is taken as present.
    assert own.unavailable(PROFILES["h200"]) is None
    assert mine(available=lambda: None).unavailable() is None


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"vendors": "nvidia"}, "give a set of nvidia"),
        ({"vendors": ["nvidai"]}, "nvidai"),
        ({"vendors": ()}, "give a set of"),
        ({"accepts": None}, "accepts=None: give a function"),
        ({"most_rows": 5}, "most_rows=5: give a function, or None"),
        ({"available": True}, "available=True: give a function, or None"),
        ({"available": lambda: 1 / 0}, r"can't tell whether own_[0-9]+ is available: ZeroDivisionError"),
        ({"available": lambda: True}, r"available\(\) of own_[0-9]+ returns True: allowed are None and a line"),
        ({"roundings": 5}, "roundings=5: give a set of conventions"),
        ({"roundings": ()}, "give a set of conventions"),
        ({"roundings": {"gptoss"}}, "unknown rounding 'gptoss'; did you mean 'gpt_oss'"),
        ({"roundings": "gpt_oss"}, r"roundings='gpt_oss': give a set of conventions, \{'gpt_oss'\}"),
    ],
)
def test_other_arguments_are_refused_in_one_line(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as refused:
        mine(**options).unavailable()
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Timing(exchange="flashinfr"), "unknown exchange 'flashinfr'; did you mean 'flashinfer'"),
        (lambda: Timing(heads="shred"), "unknown heads 'shred'; did you mean 'shared'"),  # type: ignore[arg-type]
        (lambda: Timing(times=0.5), r"times=0\.5: a kernel takes at least as long as memory does"),
        (lambda: Timing(times=float("nan")), "times=nan: a kernel takes at least as long as memory does"),
        (lambda: Offer(cost=ONE_KERNEL), "allowed are a KernelCost"),  # type: ignore[arg-type]
        (lambda: provider_of("a b", KERNELS), "name is one word"),
        (lambda: provider_of("own", None), "give a dict of kernels"),  # type: ignore[arg-type]
        (lambda: provider_of("own", {"rms_norm": None}), "give a dict of kernels"),  # type: ignore[dict-item]
    ],
)
def test_what_no_kernel_can_have_is_refused(make: Callable[[], object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make()
