"""A device's constants, measured on this machine: launches and copies, as in the cost model."""

import datetime
from collections.abc import Sequence

import torch
from torch import Tensor

from fuseplan.errors import ConfigError
from fuseplan.measurement.tuning.clock import Call, Times, interleaved, subject_of
from fuseplan.measurement.tuning.lock_step import Ranks
from fuseplan.planner.costs import DeviceRecord, Measured
from fuseplan.providers import local_profile

MOST_COPY_BYTES = 2**30
"""The size of a copy through memory; a smaller device takes an eighth of its free memory."""

CACHED_SHARE = 8
"""A copy through the cache reads and writes this part of it."""


def measure_device(*, repeats: int = 9, command: str = "fuseplan tune --device-only") -> DeviceRecord:
    """Measures the current GPU alone, within CUDA graphs: a kernel with next to no work, and kernels that copy through
    cache and memory.

    Args:
        repeats: of each time.
        command: for the record.

    Raises:
        ConfigError: torch sees no GPU, or one without room for the copies.
    """
    if not torch.cuda.is_available():
        raise ConfigError("--device-only measures a GPU, and torch sees none on this machine: run it where one is")
    device = torch.device("cuda", torch.cuda.current_device())
    properties = torch.cuda.get_device_properties(device)
    calls: dict[str, tuple[Call, Tensor, int]] = {}
    free, _ = torch.cuda.mem_get_info(device)
    cache = int(properties.L2_cache_size)
    large, small = min(MOST_COPY_BYTES, free // 8), cache // CACHED_SHARE
    if large <= 2 * cache:
        raise ConfigError(
            f"{free / 2**20:.0f} MiB of the GPU's memory are free, and copies need more: stop other processes"
        )
    for name, nbytes in (("launch", 4), ("cache_bandwidth", small), ("memory_bandwidth", large)):
        if nbytes >= 4:
            calls[name] = _negate, torch.zeros(2, nbytes // 4, device=device), nbytes
    subjects = {name: subject_of(call, [list(rows.unbind())], device) for name, (call, rows, _) in calls.items()}
    try:
        for subject in subjects.values():
            subject.warm_up()
        times = interleaved(subjects, repeats, Ranks(), device)
    finally:
        for subject in subjects.values():
            subject.close()
    return record_of(
        {name: Times.of(each) for name, each in times.items()}, {name: nbytes for name, (*_, nbytes) in calls.items()},
        reported=properties.name, command=command,
    )  # fmt: skip


def record_of(times: dict[str, Times], nbytes: dict[str, int], *, reported: str, command: str) -> DeviceRecord:
    """Constants from times: the launch itself, and bandwidths from the time of copies beyond a launch.

    Args:
        times: of a tiny copy, and of copies through cache and memory, by the constants' names.
        nbytes: the bytes that each of them reads; it writes as many.
        reported: torch's name of the device.
        command: for the record.

    Raises:
        ConfigError: copies took no longer than launches.
    """
    launch = times["launch"]
    constants = [Measured(name="launch", value=launch.median_ns, unit="ns", spread=launch.spread_ns)]
    for name in sorted(times.keys() - {"launch"}):
        moved = times[name].median_ns - launch.median_ns
        if moved <= 0:
            raise ConfigError(f"a copy of {nbytes[name]} bytes took no longer than a launch: other work disturbs it")
        rate = 2 * nbytes[name] / moved
        constants.append(Measured(name=name, value=rate, unit="GB/s", spread=rate * times[name].spread_ns / moved))
    return DeviceRecord(
        device=local_profile().name, reported=reported, torch=torch.__version__, command=command,
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        constants=tuple(sorted(constants, key=lambda each: each.name)),
    )  # fmt: skip


def _negate(arguments: Sequence[Tensor]) -> None:
    """A kernel that reads and writes; a plain copy would be the copy engine's."""
    target, source = arguments
    torch.neg(source, out=target)
