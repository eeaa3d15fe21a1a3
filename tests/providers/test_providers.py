"""Providers answer for themselves, and a kernel that is registered runs where the plan put it."""

import ast
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import fresh_cache
from torch.nn import functional as F

import fuseplan
from fuseplan.compilation.manager import PostGradPassManager
from fuseplan.dialect import implement, ops
from fuseplan.providers import BUILT_IN_PROVIDERS, PROFILES, Offer, Provider, device_profile
from fuseplan.record import Reason, Refusal, Report
from tests.helpers import HIDDEN, llama, post_grad, randn
from tests.test_architecture import source_modules

BY_NAME = {provider.name: provider for provider in BUILT_IN_PROVIDERS}
W = torch.linspace(0.5, 1.5, HIDDEN).bfloat16()
CALLS: list[tuple[int, ...]] = []


def counted(x: Tensor, weight: Tensor, eps: float, rounding: str, right: int) -> Any:
    CALLS.append(tuple(x.shape))
    return ops.rms_norm_pad.reference(x, weight, eps, rounding, right)


implement(ops.rms_norm_pad, "counted", counted)


def narrow_only(m: Any) -> Refusal | None:
    wide = m.x.shape[-1] > 128
    return m.refuse(Reason.PROVIDER, "x", "counted takes at most 128 columns") if wide else None


COUNTED = Provider(
    name="counted", description="counts its calls", vendors=frozenset({"nvidia", "amd", "cpu"}), package=None,
    install="",
    implements={"rms_norm_pad": Offer(accepts=narrow_only)},
)  # fmt: skip


def padded(x: Tensor, weight: Tensor) -> Tensor:
    return F.pad(llama(x, None, weight)[0], (0, 8))


def test_a_registered_kernel_runs_where_the_plan_puts_it() -> None:
    reports: list[Report] = []
    config = fuseplan.PassConfig(policy="ordered(act_padding)", verify="off")
    manager = PostGradPassManager(config, providers=[COUNTED], on_report=reports.append)
    with torch.inference_mode(), fresh_cache():
        torch._dynamo.reset()
        options: dict[str, Any] = {"post_grad_custom_post_pass": manager}
        actual = torch.compile(padded, options=options)(randn(5, HIDDEN), W)
    assert CALLS == [(5, HIDDEN)]
    assert reports[0].graphs[0].applied[0].provider == "counted"
    torch.testing.assert_close(actual, padded(randn(5, HIDDEN), W), rtol=2**-7, atol=2**-7)


def test_arguments_that_no_provider_accepts_are_a_refusal() -> None:
    manager = PostGradPassManager(fuseplan.PassConfig(policy="ordered(act_padding)"), providers=[COUNTED])
    graph = post_grad(padded, randn(5, 256), torch.ones(256, dtype=torch.bfloat16))
    (refusal,) = manager.analyze(graph).matches.refusals
    assert (refusal.reason, refusal.detail) == (Reason.PROVIDER, "counted takes at most 128 columns")


def test_a_rule_that_no_provider_implements_is_a_refusal() -> None:
    nothing = dataclasses.replace(COUNTED, implements={})
    reports: list[Report] = []
    config = fuseplan.PassConfig(policy="ordered(act_padding)", fuse_act_padding=True)
    manager = PostGradPassManager(config, providers=[nothing], on_report=reports.append)
    graph = post_grad(padded, randn(5, HIDDEN), W)
    (refusal,) = manager.analyze(graph).matches.refusals
    assert refusal.detail == "no available provider implements rms_norm_pad"
    manager(graph)
    (warning,) = reports[0].warnings
    assert warning.detail == f"fuse_act_padding=True has no effect: {refusal.detail}"


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


def test_what_a_provider_only_prices_it_does_not_run() -> None:
    flashinfer = dataclasses.replace(BY_NAME["flashinfer"], prices={"rms_norm_pad": Offer()})
    assert flashinfer.runs("all_reduce_fused_add_rms_norm")
    assert not flashinfer.runs("rms_norm_pad")


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
    assert missing.mend == "install AITER 0.1.20 or newer from its ROCm release"
    other = BY_NAME["flashinfer"].unavailable()
    assert other is not None
    assert other.detail == "serves NVIDIA GPUs, and this machine has AMD GPUs"
