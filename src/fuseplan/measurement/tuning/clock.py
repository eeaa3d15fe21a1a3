"""Timing several calls in turns, each repeat long enough for the clock, alone or in lock step."""

import gc
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fuseplan.measurement.tuning.lock_step import Ranks

LEAST_REPEATS = 5
"""With fewer, a median and its quartiles say little."""

REPEAT_NS = 2_000_000
"""The least duration of a repeat: thousands of times the resolution of a GPU's events or the CPU's clock."""

MOST_CALLS = 1024
"""The most calls in one repeat: this many calls of even the shortest kernel last long enough."""

BUSY = 0.5
"""As a share of the processors: a load above it means that the machine has other work."""

WARM_UPS = 3
CPU_CACHE_BYTES = 32 * 2**20
"""The size of the last cache of a core's complex or socket, an order of magnitude: Python can't query it."""


@dataclass(frozen=True, kw_only=True)
class Times:
    """The times of repeats of one call.

    Attributes:
        median_ns: of one call.
        spread_ns: the interquartile range.
    """

    median_ns: int
    spread_ns: int

    @classmethod
    def of(cls, repeats: Sequence[int]) -> "Times":
        """The summary of at least two repeats, in ns."""
        first, median, third = statistics.quantiles(repeats, n=4, method="inclusive")
        return cls(median_ns=round(median), spread_ns=round(third - first))


Call = Callable[[Sequence[Tensor]], Any]


class Subject:
    """One call, run on sets of arguments in turns; on the CPU without further means.

    Args:
        call: the call to time.
        sets: its arguments.
    """

    def __init__(self, call: Call, sets: Sequence[Sequence[Tensor]]) -> None:
        self.call, self.sets, self.count = call, sets, 1

    def warm_up(self) -> None:
        """Compiles kernels, makes workspaces, fills caches of code."""
        for turn in range(WARM_UPS):
            self.call(self.sets[turn % len(self.sets)])

    def settle(self, count: int) -> None:
        """Fixes the number of calls in a repeat."""
        self.count = count

    def time_ns(self) -> int:
        """The time of one repeat."""
        call, turns = self.call, [self.sets[turn % len(self.sets)] for turn in range(self.count)]
        start = time.perf_counter_ns()
        for arguments in turns:
            call(arguments)
        return time.perf_counter_ns() - start

    def close(self) -> None:
        """Releases its resources."""


class GraphedSubject(Subject):
    """A subject on a GPU: all calls of a repeat are one CUDA graph, so that launches cost the same as in a model."""

    _graph: torch.cuda.CUDAGraph | None = None

    def warm_up(self) -> None:
        """As for `Subject`, on a stream of its own, as capturing requires; a call that can't be captured raises
        here.
        """
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            super().warm_up()
        torch.cuda.current_stream().wait_stream(stream)
        self.settle(1)

    def settle(self, count: int) -> None:
        """As for `Subject`; captures the calls."""
        self.close()
        super().settle(count)
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        # Another thread, such as NCCL's watchdog, may query the driver meanwhile.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            for turn in range(count):
                self.call(self.sets[turn % len(self.sets)])
        self._graph.replay()
        torch.cuda.synchronize()

    def time_ns(self) -> int:
        """As for `Subject`: by the device's own clock."""
        assert self._graph is not None
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        self._graph.replay()
        end.record()
        end.synchronize()
        lasted: int = round(start.elapsed_time(end) * 1_000_000)
        return lasted

    def close(self) -> None:
        """As for `Subject`: a communicator can't be destroyed while its graphs exist."""
        if self._graph is not None:
            torch.cuda.synchronize()
            self._graph.reset()
            self._graph = None


def subject_of(call: Call, sets: Sequence[Sequence[Tensor]], device: torch.device) -> Subject:
    """The subject that times a call on a device."""
    return GraphedSubject(call, sets) if device.type == "cuda" else Subject(call, sets)


def interleaved(
    subjects: Mapping[str, Subject],
    repeats: int,
    ranks: Ranks,
    device: torch.device,
    *,
    count: int | None = None,
    least_ns: int = REPEAT_NS,
) -> dict[str, list[int]]:
    """The time of one call of each, in ns, by repeat: the slowest rank's.

    Every repeat times each of them once, and begins with another one, so that a disturbance affects all of them.

    Args:
        subjects: warmed up; their number of calls is settled here, the same on all ranks.
        repeats: at least `LEAST_REPEATS`.
        ranks: all of them measure the same.
        device: the device to time on.
        count: calls in a repeat; None: as many as last `least_ns`.
        least_ns: the least duration of a repeat.

    Raises:
        RanksError: a rank failed, or didn't come in time.
    """
    names = list(subjects)
    for subject in subjects.values():
        if count is None:
            _settle(subject, ranks, device, least_ns)
        else:
            subject.settle(count)
    times: dict[str, list[int]] = {name: [] for name in names}
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        for repeat in range(repeats):
            for place in range(len(names)):
                name = names[(place + repeat) % len(names)]
                ranks.align(device)
                times[name].append(subjects[name].time_ns())
    finally:
        if was_enabled:
            gc.enable()
    everywhere = ranks.exchange(times)
    return {
        name: [
            round(max(of_repeat) / subjects[name].count)
            for of_repeat in zip(*(t[name] for t in everywhere), strict=True)
        ]
        for name in names
    }


def _settle(subject: Subject, ranks: Ranks, device: torch.device, least_ns: int) -> None:
    """Finds how many calls last long enough on the slowest rank; a single one in a graph says little of many."""
    count = 1
    while True:
        subject.settle(count)
        ranks.align(device)
        lasted = max(1, *ranks.exchange(subject.time_ns()))
        if lasted >= least_ns or count >= MOST_CALLS:
            return
        count = math.ceil(1.2 * count * least_ns / lasted)
        count = min(MOST_CALLS, math.ceil(count / len(subject.sets)) * len(subject.sets) if count > 1 else 2)


def busy() -> list[str]:
    """A note that other work runs on this machine, if it does; call it before anything is compiled."""
    load, processors = os.getloadavg()[0], os.cpu_count() or 1
    if load <= BUSY * processors + 0.5:
        return []
    return [f"this machine is busy (load {load:.1f} on {processors} processors): other work changes the times"]


def cache_bytes(device: torch.device) -> int:
    """The size of a device's last cache."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    return CPU_CACHE_BYTES
