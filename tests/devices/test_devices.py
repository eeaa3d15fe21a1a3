"""Which device is here: by torch's whole name and its multiprocessors, never by likeness."""

import ast
import dataclasses
from types import SimpleNamespace

import pytest
import torch

from fuseplan.config import Environment, PassConfig
from fuseplan.devices import Constant, Vendor, profile_of
from fuseplan.errors import ConfigError
from fuseplan.planner.costs import HARDWARE
from fuseplan.planner.sources import prices_of
from fuseplan.providers import BUILT_IN_PROVIDERS, PROFILES, device_profile, local_profile
from tests.test_architecture import source_modules

DEFAULTS = {"integrations/pytest_plugin.py", "cli/check.py", "devices/known.py"}
SPELLED, MEASURED = {"cli/spelling.py"}, {"rules/families/linear.py"}
WHOLE = {
    "NVIDIA A100-SXM4-80GB": ("a100", 108),
    "NVIDIA A100-SXM4-40GB": ("a100-40gb", 108),
    "A100-SXM4-40GB": ("a100-40gb", 108),
    "NVIDIA A100 80GB PCIe": ("a100-pcie", 108),
    "NVIDIA A100-PCIE-40GB": ("a100-pcie-40gb", 108),
    "NVIDIA L40S": ("l40s", 142),
    "NVIDIA GeForce RTX 4090": ("rtx4090", 128),
    "NVIDIA H20": ("h20-96gb", 78),
    "NVIDIA H100 80GB HBM3": ("h100", 132),
    "NVIDIA H100 PCIe": ("h100-pcie", 114),
    "NVIDIA H100 NVL": ("h100-nvl", 132),
    "NVIDIA H200": ("h200", 132),
    "NVIDIA GH200 480GB": ("gh200", 132),
    "NVIDIA GH200 144G HBM3e": ("gh200-144gb", 132),
    "NVIDIA B200": ("b200", 148),
    "NVIDIA B300 SXM6 AC": ("b300", 148),
    "AMD Instinct MI300X": ("mi300x", 304),
    "AMD Instinct MI325X": ("mi325x", 304),
    "AMD Instinct MI355X": ("mi355x", 256),
}


def vendor_of(reported: str) -> Vendor:
    return "amd" if reported.startswith("AMD") else "nvidia"


@pytest.mark.parametrize("reported", WHOLE)
def test_a_whole_device_is_its_profile(reported: str) -> None:
    name, processors = WHOLE[reported]
    assert profile_of(reported, vendor_of(reported), processors) is PROFILES[name]
    assert profile_of(reported, vendor_of(reported)) is PROFILES[name]


def test_a_device_is_one_record_and_every_gpu_is_among_the_names() -> None:
    assert {name for name, _ in WHOLE.values()} == PROFILES.keys() - {"cpu"} == HARDWARE.keys() - {"cpu"}
    for name, profile in PROFILES.items():
        assert profile.hardware is not None
        assert (profile.name, profile.hardware.name, profile.hardware.vendor) == (name, name, profile.vendor)


def test_a_device_of_ones_own_is_priced_by_its_record() -> None:
    hardware = dataclasses.replace(HARDWARE["h200"], name="mine", launch=Constant(3000, "ns", "measured by me"))
    profile = dataclasses.replace(PROFILES["h200"], name="mine", reported=(), hardware=hardware)
    assert prices_of(PassConfig(), Environment(), profile).model.hardware is hardware


def test_no_other_module_knows_a_device() -> None:
    """A new one is a record in its vendor's file, and nothing else names it, but defaults of commands, names that are
    distinguished from typos before torch is there, and rules that are on by default where their kernels were measured.
    """
    assert {
        module.path
        for module in source_modules()
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Constant) and node.value in PROFILES.keys() - {"cpu"}
    } == {"devices/amd.py", "devices/nvidia.py", "devices/unknown.py", *SPELLED, *MEASURED, *DEFAULTS}


@pytest.mark.parametrize(
    ("reported", "processors", "name"),
    [
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 16, "nvidia-h100-80gb-hbm3-mig-1g.10gb"),
        ("NVIDIA H200 NVL", 132, "nvidia-h200-nvl"),
        ("NVIDIA GeForce RTX 4090 D", 114, "nvidia-geforce-rtx-4090-d"),
        ("NVIDIA L4", 58, "nvidia-l4"),
        ("NVIDIA RTX A6000", 84, "nvidia-rtx-a6000"),
        ("Tesla V100-SXM2-32GB", 80, "nvidia-tesla-v100-sxm2-32gb"),
        ("AMD Instinct MI250X", 110, "amd-instinct-mi250x"),
        # A partition has the name of the whole, and fewer units.
        ("AMD Instinct MI300X", 38, "amd-instinct-mi300x-38"),
        ("NVIDIA H100 80GB HBM3", 16, "nvidia-h100-80gb-hbm3-16"),
        ("../../etc", 1, "nvidia-etc"),
        ("", 1, "nvidia-gpu"),
    ],
)
def test_any_other_device_has_its_own_name(reported: str, processors: int, name: str) -> None:
    profile = profile_of(reported, vendor_of(reported), processors)
    assert profile.name == name
    assert profile.name not in PROFILES
    assert profile.description.endswith("which has no profile")
    served = {each.name for each in BUILT_IN_PROVIDERS if each.unavailable(profile) is None}
    everywhere = {"sdpa", "sdpa_packed", "torch", "triton"}
    assert served == everywhere | {"aiter" if profile.vendor == "amd" else "flashinfer"}


def here(monkeypatch: pytest.MonkeyPatch, name: str, **properties: int) -> None:
    """Makes torch report a GPU."""
    found = SimpleNamespace(name=name, **properties)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *arguments: found)


def test_the_local_device_can_be_named_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="unknown device 'nvidia-rtx-a6000'"):
        device_profile("nvidia-rtx-a6000")
    here(monkeypatch, "NVIDIA RTX A6000", multi_processor_count=84)
    assert local_profile().name == "nvidia-rtx-a6000"
    assert device_profile("nvidia-rtx-a6000") == local_profile()
    assert device_profile("h100") is PROFILES["h100"]
