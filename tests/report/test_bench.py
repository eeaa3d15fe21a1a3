"""Benchmarks as JSON, for a terminal, and as a picture."""

import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from fuseplan.errors import ReportError
from fuseplan.report import bench_to_json, check_plot, save_plot
from fuseplan.report.bench import time_text
from tests.report.timed import BENCH, unclear


def test_json_has_every_figure() -> None:
    data = bench_to_json(BENCH)
    assert {name: data[name] for name in data if name != "batches"} == {
        "schema": 1, "workload": "a [model]", "tp": 2, "device": "h200", "torch": "2.11.0", "triton": "3.6.0",
        "date": "2026-11-27", "command": "as it was", "repeats": 9, "notes": ["mind"],
    }  # fmt: skip
    first, second = data["batches"]
    assert (first["batch"], first["steps"], second["batch"]) == (1, 10, 8)
    assert first["policies"][0] == {
        "policy": "planned", "step_ns": 900_000, "spread_ns": 4_000, "tokens_per_s": 1111.1, "change": -0.1,
        "noise": False, "change_interval": [-0.104, -0.096], "repeats_needed": None, "fused": {"act_padding": 4},
        "prices": ["measured"], "same_as": None,
    }  # fmt: skip
    assert second["policies"][0]["tokens_per_s"] == 8888.9
    assert [each["noise"] for each in first["policies"]] == [False, False, True, True, True]
    assert first["policies"][1]["same_as"] == "planned"
    _, open_ones = bench_to_json(unclear())["batches"]
    assert [each["repeats_needed"] for each in open_ones["policies"]] == [None, None, None, 16, 16, None, None, None]


@pytest.mark.parametrize(
    ("ns", "text"),
    [(0, "0.00 us"), (5_100, "5.10 us"), (999_960, "1000 us"), (1_362_000, "1.36 ms"), (127_400_000, "127 ms"),
     (2 * 10**9, "2.00 s")],
)  # fmt: skip
def test_times_have_three_digits(ns: int, text: str) -> None:
    assert time_text(ns) == text


@pytest.mark.parametrize("name", ["steps", "steps.png", "steps.svg", "v1.2"])
def test_a_picture_is_written_as_png_and_svg(tmp_path: Path, name: str) -> None:
    pytest.importorskip("matplotlib")
    png, svg = save_plot(BENCH, tmp_path / name)
    stem = name.removesuffix(".png").removesuffix(".svg")
    assert (png, svg) == (tmp_path / f"{stem}.png", tmp_path / f"{stem}.svg")
    assert {*tmp_path.iterdir()} == {png, svg}
    assert png.read_bytes().startswith(b"\x89PNG\r\n")
    texts = "".join(ElementTree.fromstring(svg.read_text(encoding="utf-8")).itertext())
    for expected in ("a [model]: time of a step", "batch 8", "-10.0 % (-10.4 to -9.6)", "even", "1.05 ms"):
        assert expected in texts
    assert save_plot(BENCH, tmp_path / "again")[1].read_bytes() == svg.read_bytes()


def test_what_can_not_be_drawn_or_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(ReportError, match=r"^plot '.*steps.png' can't be written: No such file or directory$"):
        check_plot(tmp_path / "nowhere" / "steps")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ReportError, match=r"^a plot needs matplotlib: pip install matplotlib$"):
        check_plot(tmp_path / "steps.png")
