"""Providers answer for themselves, and a kernel that is registered runs where the plan put it."""

import ast

import pytest

from fuseplan.dialect import ops
from fuseplan.providers import BUILT_IN_PROVIDERS, PROFILES, device_profile
from tests.test_architecture import source_modules

BY_NAME = {provider.name: provider for provider in BUILT_IN_PROVIDERS}


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
    assert missing.mend == "install AITER 0.1.20 or newer from its ROCm release"
    other = BY_NAME["flashinfer"].unavailable()
    assert other is not None
    assert other.detail == "serves NVIDIA GPUs, and this machine has AMD GPUs"
