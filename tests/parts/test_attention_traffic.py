"""What attention over shared heads is priced at, beside what an H100 took."""

import json
from pathlib import Path

import pytest

from fuseplan.parts.attention.traffic import AttentionRegion, Heads, grouped, repeated
from fuseplan.planner.costs import HARDWARE, total_ns

ROOT = Path(__file__).resolve().parents[2]
ROWS = json.loads((ROOT / "benchmarks/results/decode_one_gpu_h100.json").read_text())["rows"]


def region(batch: int, keys: int, kernel: str = "cudnn", itemsize: int = 2) -> AttentionRegion:
    return AttentionRegion(
        batch=batch, q_heads=32, heads=8, queries=1, keys=keys, width=128, itemsize=itemsize, kernel=kernel
    )


def saved(device: str, form: Heads, sizes: AttentionRegion) -> int:
    hardware = HARDWARE[device]
    return total_ns(repeated(hardware, sizes)) - total_ns(grouped(hardware, sizes, form))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['model']} {row['batch']} {row['cache']}")
def test_what_a_step_saves_is_near_what_was_measured_and_not_promised_too_high(row: dict[str, list[float]]) -> None:
    measured = row["torch.compile"][0] - row["enable_gqa"][0]
    modelled = 8 * saved("h100", "shared", region(int(row["batch"]), int(row["cache"]))) / 1000  # type: ignore[call-overload]
    assert 0.3 * measured < modelled < 1.1 * measured


@pytest.mark.parametrize("device", ["h100", "h200", "b200"])
@pytest.mark.parametrize(("batch", "keys"), [(1, 1280), (8, 1280), (32, 1280), (1, 8192), (8, 8192)])
def test_shared_heads_beat_packed_ones_in_cudnn(device: str, batch: int, keys: int) -> None:
    sizes = region(batch, keys)
    assert saved(device, "shared", sizes) > max(0, saved(device, "packed", sizes))


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("batch", [1, 4])
def test_packed_heads_win_on_a_cpu(batch: int, itemsize: int) -> None:
    sizes = region(batch, 1024, "cpu", itemsize)
    assert saved("cpu", "packed", sizes) > saved("cpu", "shared", sizes) > 0


@pytest.mark.parametrize("device", HARDWARE)
def test_the_reference_saves_nothing(device: str) -> None:
    assert saved(device, "repeated", region(8, 1280)) < 0
