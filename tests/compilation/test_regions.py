"""What is fuseplan's own doing doesn't use up Dynamo's limit of recompilations."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import config as dynamo_config
from torch._dynamo.utils import counters
from torch.nn import functional as F

import fuseplan

pytestmark = pytest.mark.usefixtures("by_code_at_night")

WIDTH = 32
LIMIT = 2
PAD = "ordered(act_padding)"


class Layer(nn.Module):
    """A layer with a norm that is padded."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH, eps=1e-6)
        self.down = nn.Linear(WIDTH + 16, WIDTH, bias=False)
        self.times = 1

    def forward(self, x: Tensor) -> Any:
        return x + self.down(F.pad(self.norm(x), (0, 16))) * self.times


@pytest.fixture(autouse=True)
def few() -> Iterator[None]:
    """A limit that a test reaches soon."""
    torch._dynamo.reset()
    counters.clear()
    with torch.inference_mode(), dynamo_config.patch(recompile_limit=LIMIT, accumulated_recompile_limit=LIMIT + 1):
        yield


def compiled_and_seen() -> tuple[int, int]:
    """How many frames Dynamo compiled, and how many it looked at."""
    return counters["frames"]["ok"], counters["frames"]["total"]


class Reader:
    """Somebody who wants reports."""

    def __init__(self) -> None:
        self.reports: list[fuseplan.Report] = []

    def read(self, report: fuseplan.Report) -> None:
        self.reports.append(report)

    def read_as(self, index: int, report: fuseplan.Report) -> None:
        self.reports.append(report)


ALIKE: dict[str, Callable[[Reader], Any]] = {
    "method of a list": lambda reader: reader.reports.append,
    "bound method": lambda reader: reader.read,
    "lambda": lambda reader: lambda report: reader.read_as(0, report),
    "partial": lambda reader: functools.partial(reader.read_as, 1),
    "lambda with a default": lambda reader: lambda report, to=reader: to.read(report),
}


@pytest.mark.parametrize("ranges", [(), (fuseplan.CompileRange(start=1, end=8),)], ids=["whole", "ranged"])
@pytest.mark.parametrize("name", ALIKE)
def test_equal_layers_share_one_compilation_whatever_reads_their_reports(name: str, ranges: Any) -> None:
    reader, config = Reader(), fuseplan.PassConfig(policy=PAD, compile_ranges=ranges)
    x = torch.randn(4, WIDTH)
    for _ in range(LIMIT + 2):
        x = fuseplan.compile(Layer(), config=config, on_report=ALIKE[name](reader))(x)
    assert compiled_and_seen() == (1, 1)
    assert [report.fused["act_padding"] for report in reader.reports] == [1]


def test_layers_that_report_to_different_readers_are_all_compiled() -> None:
    """Callables are told apart by what they are bound to."""
    first, second = Reader(), Reader()
    callbacks = [*(make(reader) for reader in (first, second) for make in ALIKE.values())]
    callbacks.append(functools.partial(first.read_as, 2))
    x = torch.randn(4, WIDTH)
    for callback in callbacks:
        x = fuseplan.compile(Layer(), config=fuseplan.PassConfig(policy=PAD), on_report=callback)(x)
    assert [len(reader.reports) for reader in (first, second)] == [len(ALIKE) + 1, len(ALIKE)]
    assert compiled_and_seen() == (len(callbacks), len(callbacks))


def test_every_range_is_compiled() -> None:
    sizes = [2 * index + 1 for index in range(LIMIT + 8)]
    reader = Reader()
    ranges = [fuseplan.CompileRange(start=size, end=size) for size in sizes]
    config = fuseplan.PassConfig(policy=PAD, compile_ranges=ranges)
    model = fuseplan.compile(Layer(), config=config, on_report=reader.read)
    for size in (*sizes, *sizes):
        model(torch.randn(size, WIDTH))
    assert [report.graphs[0].range for report in reader.reports] == [(size, size) for size in sizes]
    assert {report.fused["act_padding"] for report in reader.reports} == {1}
    with pytest.warns(fuseplan.FuseplanWarning, match="lies in none of the compile ranges"):
        model(torch.randn(2, WIDTH))
    assert compiled_and_seen() == (len(sizes) + 1, len(sizes) + 1)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_users_own_recompilations_end_at_the_limit_as_they_do_without_fuseplan() -> None:
    found = []
    for ours in (False, True):
        torch._dynamo.reset()
        counters.clear()
        layer = Layer()
        ranges = (fuseplan.CompileRange(start=1, end=8), fuseplan.CompileRange(start=9, end=16))
        config = fuseplan.PassConfig(policy=PAD, compile_ranges=ranges)
        with dynamo_config.patch(accumulated_recompile_limit=64):
            model = fuseplan.compile(layer, config=config) if ours else torch.compile(layer, backend="eager")
            for layer.times in range(LIMIT + 4):
                torch.testing.assert_close(model(torch.ones(4, WIDTH)), layer(torch.ones(4, WIDTH)))
        found.append(counters["frames"]["ok"])
    assert found == [LIMIT, LIMIT]
