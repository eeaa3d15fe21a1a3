"""Constants of devices that nobody has measured for fuseplan, and of those that somebody has here."""

import json
import logging
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.contest import Contest
from fuseplan.compilation.analysis import assumed_constants
from fuseplan.config import Environment, PassConfig
from fuseplan.errors import ConfigError
from fuseplan.measurement.tuning import Times
from fuseplan.measurement.tuning.device import record_of
from fuseplan.planner.costs import (
    HARDWARE,
    DeviceRecord,
    Measured,
    Region,
    assumptions,
    hardware_of,
    record_path,
)
from fuseplan.planner.costs.record import cached_record
from fuseplan.planner.prices import Prices
from fuseplan.planner.sources import prices_of
from fuseplan.providers import PROFILES, local_profile
from tests.devices.test_devices import here
from tests.planner.parts import NORM

A6000 = {"multi_processor_count": 84, "L2_cache_size": 6_291_456, "memory_clock_rate": 8_001_000,
         "memory_bus_width": 384}  # fmt: skip
NOWHERE = Environment()


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize(
    ("device", "paper"),
    [("a100", 2039), ("a100-40gb", 1555), ("a100-pcie", 1935), ("l40s", 864), ("rtx4090", 1008), ("h100-pcie", 2000),
     ("h100-nvl", 3900), ("h20-96gb", 4000), ("gh200", 4000), ("gh200-144gb", 4900), ("b300", 8000), ("mi325x", 6000)],
)  # fmt: skip
def test_memory_is_the_datasheets_times_what_a_copy_moves(device: str, paper: float) -> None:
    constants = dict(HARDWARE[device].constants())
    assert constants["memory_bandwidth"].value == pytest.approx(paper * 3002 / 3350, abs=0.1)
    assert "atasheet" in constants["memory_bandwidth"].source
    assert all("not measured" in c.source or "NCCL" in c.source for c in constants.values()), constants
    assert assumptions(HARDWARE[device]) == []


def test_links_are_those_that_the_card_has() -> None:
    names = ("l40s", "rtx4090", "a100-pcie", "h100-pcie", "h100-nvl")
    constants = [dict(HARDWARE[name].constants()) for name in names]
    assert [each["library.NCCL ring Simple.bandwidth"].value for each in constants] == [24, 24, 24, 48, 48]
    assert HARDWARE["rtx4090"].triton is None
    assert HARDWARE["rtx4090"].flashinfer is None
    assert HARDWARE["l40s"].triton is not None
    region = Region(core=NORM, tokens=64, width=4096, reduce=True, ranks=2)
    assert Contest(HARDWARE["l40s"]).unfused_ns(region) > Contest(HARDWARE["a100"]).unfused_ns(region)


def test_an_unknown_gpu_is_priced_by_what_torch_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    here(monkeypatch, "NVIDIA RTX A6000", **A6000)
    prices = prices_of(PassConfig(), NOWHERE, None)
    hardware = prices.model.hardware
    assert hardware.name == "nvidia-rtx-a6000" == local_profile().name
    assert hardware.memory_bandwidth.value == pytest.approx(768.1 * 3002 / 3350, abs=0.1)
    assert "384 bits at 8001 MHz, 768 GB/s on paper" in hardware.memory_bandwidth.source
    assert hardware.cache.value == pytest.approx(33.4e6 * 6_291_456 / 50e6, rel=1e-3)
    assert {"launch", "generated_norm", "library.NCCL ring LL.latency", "triton.signal"} <= set(assumptions(hardware))
    assert not {"memory_bandwidth", "cache", "cache_bandwidth"} & set(assumptions(hardware))
    (refusal,) = assumed_constants(hardware)
    for text in ("nvidia-rtx-a6000 has no profile", "launch, generated_norm and its links are assumed"):
        assert text in refusal.detail
    assert "fuseplan tune --device-only" in str(refusal.fix)


def test_of_a_gpu_that_says_nothing_all_is_assumed(monkeypatch: pytest.MonkeyPatch) -> None:
    here(monkeypatch, "AMD Instinct MI210")
    hardware = prices_of(PassConfig(), NOWHERE, None).model.hardware
    assert hardware.name.endswith("mi210")
    assert assumptions(hardware) == [name for name, _ in hardware.constants()]


def test_switches_add_where_torch_and_nccl_let_them(monkeypatch: pytest.MonkeyPatch) -> None:
    here(monkeypatch, "NVIDIA H200", multi_processor_count=132)

    def found(*, has: bool, **environment: bool) -> Prices:
        monkeypatch.setattr(sys.modules["fuseplan.planner.costs.hardware_of"], "_has_multicast", lambda: has)
        return prices_of(PassConfig(), Environment(**environment), None)  # type: ignore[arg-type]

    assert found(has=True).model.hardware == HARDWARE["h200"]
    without = found(has=False)
    assert without.model.hardware == found(has=True, multicast=False).model.hardware
    assert without.key != found(has=True).key
    # A device that is named is priced alike everywhere.
    assert prices_of(PassConfig(), NOWHERE, PROFILES["h200"]).model.hardware == HARDWARE["h200"]
    for value, may_add in (("0", False), ("2", True)):
        monkeypatch.setenv("NCCL_NVLS_ENABLE", value)
        assert Environment.read().multicast is may_add


def record(device: str, **changes: Any) -> DeviceRecord:
    constants = (Measured(name="launch", value=2100.0, unit="ns", spread=40.0),
                 Measured(name="memory_bandwidth", value=650.0, unit="GB/s", spread=3.0))  # fmt: skip
    given: dict[str, Any] = {"constants": constants, "reported": "NVIDIA RTX A6000", "torch": "2.13.0",
                             "date": "2026-11-28", "command": "fuseplan tune --device-only"}  # fmt: skip
    return DeviceRecord(device=device, **{**given, **changes})


def test_what_was_measured_here_takes_the_place_of_what_is_assumed(monkeypatch: pytest.MonkeyPatch) -> None:
    here(monkeypatch, "NVIDIA RTX A6000", **A6000)
    before = prices_of(PassConfig(), NOWHERE, None)
    record("nvidia-rtx-a6000").save(record_path("nvidia-rtx-a6000"))
    after = prices_of(PassConfig(), NOWHERE, None)
    hardware = after.model.hardware
    assert (hardware.launch.value, hardware.memory_bandwidth.value) == (2100, 650)
    source = "measured on NVIDIA RTX A6000 by fuseplan tune --device-only, torch 2.13.0, 2026-11-28"
    assert hardware.launch.source == source
    assert "launch" not in assumptions(hardware)
    assert before.key != after.key
    # A device that is named is priced alike everywhere.
    record("h100").save(record_path("h100"))
    assert prices_of(PassConfig(), NOWHERE, PROFILES["h100"]).model.hardware == HARDWARE["h100"]
    assert hardware_of(PROFILES["h100"], here=True).launch.value == 2100


@pytest.mark.parametrize(
    "broken",
    [
        "{",
        {"device": "h100"},
        {"constants": [{"name": "launch", "value": -1.0, "unit": "ns", "spread": 0.0}]},
        {"constants": [{"name": "name", "value": 1.0, "unit": "ns", "spread": 0.0}]},
        {"date": "yesterday"},
        {"more": 1},
    ],
)
def test_a_broken_record_is_ignored_with_a_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, broken: Any
) -> None:
    here(monkeypatch, "NVIDIA RTX A6000", **A6000)
    path = record_path("nvidia-rtx-a6000")
    record("nvidia-rtx-a6000").save(path)
    path.write_text(broken if isinstance(broken, str) else json.dumps({**json.loads(path.read_text()), **broken}))
    with caplog.at_level(logging.WARNING, "fuseplan"):
        assert cached_record("h100") is None  # none is there, of which there's nothing to say
        hardware = prices_of(PassConfig(), NOWHERE, None).model.hardware
    (line,) = caplog.messages
    assert re.match(f"the device's measurements are ignored: device record .*{path.name}", line)
    assert hardware.launch.value == HARDWARE["h200"].launch.value
    with pytest.raises(ConfigError):
        DeviceRecord.load(path, "nvidia-rtx-a6000")


def test_constants_of_what_copies_take() -> None:
    times = {name: Times(median_ns=ns, spread_ns=100) for name, ns in (("launch", 2_000), ("memory_bandwidth", 12_000))}
    made = record_of(times, {"launch": 4, "memory_bandwidth": 10_000}, reported="x", command="y")
    launch, memory = made.constants
    assert (launch.name, launch.value, launch.spread) == ("launch", 2000, 100)
    assert (memory.value, memory.spread, memory.unit) == (2.0, 0.02, "GB/s")
    slow = {**times, "launch": Times(median_ns=12_000, spread_ns=1)}
    with pytest.raises(ConfigError, match="a copy of 10000 bytes took no longer than a launch"):
        record_of(slow, {"launch": 4, "memory_bandwidth": 10_000}, reported="x", command="y")
