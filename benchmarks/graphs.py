"""What benchmarks on GPUs share: alternatives captured in CUDA graphs and replayed in turns, on one rank or on all."""

import os
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.distributed as dist

REPEATS = 5
REPEAT_US = 1500.0
"""How long a repeat replays its graph, about."""
MOST_CALLS = 50


@dataclass(frozen=True, kw_only=True)
class Figure:
    """The time of one call in microseconds: the median of the repeats and their interquartile range, of the slowest
    rank.
    """

    us: float
    iqr_us: float

    def json(self) -> list[float]:
        """[median, interquartile range]"""
        return [round(self.us, 2), round(self.iqr_us, 2)]


class Captured:
    """One alternative in a graph of several calls, each on the next of several sets of arguments.

    Args:
        call: runs it on the set of that number; what it returns is kept, as a model would.
        sets: of arguments.
        calls: in the graph.
    """

    def __init__(self, call: Callable[[int], Any], sets: int, calls: int) -> None:
        for number in range(max(2, sets)):
            call(number % sets)
        torch.cuda.synchronize()
        _meet()
        self.calls, self.graph = calls, torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for number in range(calls):
                call(number % sets)
        self.replay(2)

    def replay(self, times: int) -> float:
        """Microseconds a call."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        _meet()
        start.record()
        for _ in range(times):
            self.graph.replay()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end) * 1e3 / times / self.calls)


def compare(
    alternatives: Mapping[str, Callable[[int], Any]], *, sets: int = 1, repeats: int = REPEATS
) -> dict[str, Figure]:
    """Times alternatives side by side: all are captured, then they take turns.

    Args:
        alternatives: by name; each takes the number of a set of arguments.
        sets: of arguments, between which calls in a graph alternate, so that caches don't serve them.
        repeats: turns.
    """
    captured: dict[str, Captured] = {}
    times: dict[str, int] = {}
    for name, call in alternatives.items():
        first = Captured(call, sets, max(4, sets))
        us = slowest([first.replay(2)])[0]
        calls = max(sets, min(MOST_CALLS, round(REPEAT_US / us)))
        captured[name] = Captured(call, sets, calls)
        times[name] = max(1, round(REPEAT_US / us / calls))
    samples: dict[str, list[float]] = {name: [] for name in captured}
    for _ in range(repeats):
        for name, graph in captured.items():
            samples[name].append(graph.replay(times[name]))
    return {name: figure(slowest(each)) for name, each in samples.items()}


def figure(samples: Sequence[float]) -> Figure:
    """Of repeats, in microseconds."""
    quartiles = statistics.quantiles(samples, n=4, method="inclusive")
    return Figure(us=statistics.median(samples), iqr_us=quartiles[2] - quartiles[0])


def versions() -> dict[str, str]:
    """Of all that times depend on."""
    import triton

    found = {"torch": torch.__version__, "triton": triton.__version__, "device": torch.cuda.get_device_name()}
    for name in ("flashinfer", "liger_kernel", "quack", "transformers", *({"vllm"} & sys.modules.keys())):
        try:
            module = __import__(name)
        except ImportError:
            continue
        from importlib.metadata import PackageNotFoundError, version

        try:
            found[name] = version(
                {"flashinfer": "flashinfer-python", "quack": "quack-kernels"}.get(name, name.replace("_", "-"))
            )
        except PackageNotFoundError:
            found[name] = getattr(module, "__version__", "unknown")
    found["NCCL_NVLS_ENABLE"] = os.environ.get("NCCL_NVLS_ENABLE", "unset")
    return found


def leave() -> NoReturn:
    """Ends a rank once all are here. Graphs hold NCCL's work, which a process group that is taken down waits for."""
    dist.barrier()
    if dist.get_backend() == "nccl":
        torch.cuda.synchronize()
    sys.stdout.flush()
    os._exit(0)


def _meet() -> None:
    if dist.is_initialized():
        dist.barrier()
        torch.cuda.synchronize()


def slowest(samples: Sequence[float]) -> list[float]:
    """Each sample as the slowest rank took it."""
    if not dist.is_initialized():
        return list(samples)
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    times = torch.tensor(samples, device=device, dtype=torch.float64)
    dist.all_reduce(times, op=dist.ReduceOp.MAX)
    return [float(each) for each in times]
