"""Where ranks on unlike devices look for what they are sent: the arithmetic of the all-reduce kernel, without a device.

`Schedule` says how many programs a rank runs, and the kernel's addresses follow from that number.
"""

import importlib.util
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fuseplan.distributed.workspace import CAPACITY_BYTES, ONE_SHOT_RANKS, SHOT_BYTES, UNIT_WORDS

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton", allow_module_level=True)

from fuseplan.providers.triton.all_reduce_norm import Schedule
from fuseplan.providers.triton.epilogues.none import EPILOGUE as ROWS_AS_THEY_ARE

WIDTH, ITEM = 2880, 2
H100_SXM, H100_PCIE, SLICE = 132, 114, 26


def schedule_of(rows: int, ranks: int, processors: int) -> tuple[Schedule, Any]:
    one_shot = ranks <= ONE_SHOT_RANKS
    shot = (CAPACITY_BYTES if one_shot else max(SHOT_BYTES, CAPACITY_BYTES // ranks)) // ITEM
    workspace = SimpleNamespace(
        ranks=ranks, processors=processors, one_shot=one_shot, loopback=False,
        shot_words=shot // UNIT_WORDS * UNIT_WORDS,
        sums_words=0 if one_shot else CAPACITY_BYTES // ITEM // UNIT_WORDS * UNIT_WORDS,
    )  # fmt: skip
    x = torch.empty(rows, WIDTH, dtype=torch.bfloat16, device="meta")
    return Schedule.of(x, ROWS_AS_THEY_ARE(), workspace), workspace  # type: ignore[arg-type]


def two_shot_rows(schedule: Schedule, rows: int, ranks: int) -> Iterator[tuple[int, tuple[int, int]]]:
    """(row, where it is sent), tile by tile, as the kernel computes it: the rank that owns it and sums it, and a place
    in the part of its memory that is this rank's.
    """
    programs, height = min(rows, schedule.programs), schedule.tile.rows
    shares = -(-programs // ranks)
    for step in range(-(-rows // (height * programs))):
        for program in range(programs):
            for inner in range(height):
                row = (step * programs + program) * height + inner
                if row < rows:
                    packed = (step * shares + program // ranks) * height + inner
                    yield row, ((step + program) % ranks, packed)


LARGE = [(rows, ranks) for ranks in (4, 8) for rows in (128, 131, 512, 1000, 2048)]


@pytest.mark.parametrize(("rows", "ranks"), LARGE)
@pytest.mark.parametrize("processors", [H100_SXM, H100_PCIE, SLICE])
def test_every_row_has_one_place_that_fits(rows: int, ranks: int, processors: int) -> None:
    schedule, workspace = schedule_of(rows, ranks, processors)
    assert schedule.two_shot
    rows = min(rows, schedule.most_rows(WIDTH, workspace))
    places = dict(two_shot_rows(schedule, rows, ranks))
    assert sorted(places) == list(range(rows))
    assert len(set(places.values())) == rows
    shot_words, sums_words = schedule.words(WIDTH, rows, workspace)
    assert (1 + max(place for _, place in places.values())) * WIDTH <= shot_words <= workspace.shot_words
    assert rows * WIDTH <= sums_words <= workspace.sums_words


@pytest.mark.parametrize("rows", [1, 64, 300])
def test_one_shot_is_summed_where_the_row_is(rows: int) -> None:
    """A row's place is its number there, whatever the grid."""
    for processors in (H100_SXM, H100_PCIE, SLICE):
        schedule, workspace = schedule_of(rows, 2, processors)
        assert not schedule.two_shot
        assert schedule.words(WIDTH, rows, workspace) == (rows * WIDTH, 0)
