"""Benchmarks as JSON, for a terminal, and as a picture."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console

from fuseplan.errors import ReportError
from fuseplan.record.bench import BatchTimes, Bench, PolicyTime
from fuseplan.record.paired import Paired
from fuseplan.report import bench_to_json, check_plot, render_bench, save_plot
from fuseplan.report.bench import time_text

ORDERED = "ordered(act_padding, allreduce_rms)"


def beside(difference_ns: int, half_ns: int) -> Paired:
    return Paired(
        difference_ns=difference_ns, low_ns=difference_ns - half_ns, high_ns=difference_ns + half_ns, repeats=9
    )


def batch(size: int, planned_ns: int = 900_000) -> BatchTimes:
    planned: dict[str, Any] = {"step_ns": planned_ns, "spread_ns": 4_000, "fused": {"act_padding": 4},
                               "beside_plain": beside(planned_ns - 1_000_000, 4_000)}  # fmt: skip
    rows = (
        PolicyTime(policy="planned", prices=("measured",), **planned),
        PolicyTime(policy="ordered(act_padding)", same_as="planned", **planned),
        PolicyTime(policy=ORDERED, step_ns=1_004_000, spread_ns=5_000, fused={"act_padding": 3, "allreduce_rms": 1},
                   beside_plain=beside(4_000, 5_000)),
        PolicyTime(policy="off", step_ns=1_050_000, spread_ns=2_000, beside_plain=beside(50_000, 60_000)),
        PolicyTime(policy="torch.compile", step_ns=1_000_000, spread_ns=3_000),
    )  # fmt: skip
    return BatchTimes(batch=size, steps=10, policies=rows)


BENCH = Bench(
    workload="a [model]", tp=2, device="h200", torch="2.11.0", triton="3.6.0", date="2026-11-27", command="as it was",
    repeats=9, batches=(batch(1), batch(8)), notes=("mind",),
)  # fmt: skip


def test_json_has_every_figure() -> None:
    data = bench_to_json(BENCH)
    assert {name: data[name] for name in data if name != "batches"} == {
        "schema": 1, "workload": "a [model]", "tp": 2, "device": "h200", "torch": "2.11.0", "triton": "3.6.0",
        "date": "2026-11-27", "command": "as it was", "repeats": 9,
        "notes": ["mind"],
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
    assert [each["repeats_needed"] for each in first["policies"]] == [None] * 5
    assert first["policies"][1]["same_as"] == "planned"


def test_a_person_sees_what_is_faster_and_what_is_noise() -> None:
    console = Console(width=140, record=True, file=None, highlight=False, markup=False, force_terminal=False)
    with console.capture() as captured:
        console.print(render_bench(BENCH))
    lines = captured.get().splitlines()
    assert lines[0].rstrip() == "a [model]  TP=2, h200, torch 2.11.0, 9 interleaved repeats"
    rows = [" ".join(line.split()) for line in lines[2:8]]
    assert rows == [
        "batch 1 a step spread tokens/s to torch.compile fused",
        "planned 900 us 4.00 us 1,111 -10.0 % (-10.4 to -9.6) act_padding 4",
        "ordered(act_padding) 900 us 4.00 us 1,111 -10.0 % (-10.4 to -9.6) as planned",
        f"{ORDERED} 1.00 ms 5.00 us 996 even (-0.1 to +0.9) act_padding 3, allreduce_rms 1",
        "off 1.05 ms 2.00 us 952 same code (-1.0 to +11.0) -",
        "torch.compile 1.00 ms 3.00 us 1,000",
    ]
    assert not any(line.startswith("unclear") for line in lines)
    assert lines[-1].rstrip() == "note mind".replace(" ", "  ")


def test_an_unclear_difference_says_how_many_repeats_would_settle_it() -> None:
    fused = replace(batch(8).policies[3], policy="ordered(act_quant)", fused={"act_quant": 1})
    times = replace(batch(8), policies=(*batch(8).policies[:3], fused, batch(8).policies[4]))
    console = Console(width=120)
    with console.capture() as captured:
        console.print(render_bench(replace(BENCH, batches=(times,))))
    lines = [" ".join(line.split()) for line in captured.get().splitlines()]
    assert "ordered(act_quant) 1.05 ms 2.00 us 7,619 unclear (-1.0 to +11.0) act_quant 1" in lines
    assert "unclear ordered(act_quant) at batch 8: about 16 repeats would settle it" in lines
    (told,) = bench_to_json(replace(BENCH, batches=(times,)))["batches"]
    assert [each["repeats_needed"] for each in told["policies"]] == [None, None, None, 16, None]


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
    assert png.read_bytes().startswith(b"\x89PNG\r\n")
    texts = "".join(ElementTree.fromstring(svg.read_text(encoding="utf-8")).itertext())
    for expected in ("a [model]: time of a step", "batch 8", "planned", "-10.0 % (-10.4 to -9.6)", "even", "1.05 ms",
                     "torch.compile"):  # fmt: skip
        assert expected in texts
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted({png.name, svg.name})


def test_equal_figures_are_equal_files(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    first, second = (save_plot(BENCH, tmp_path / name) for name in "ab")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    with pytest.raises(ReportError, match=r"^plot '.*steps.png' can't be written: No such file or directory$"):
        check_plot(tmp_path / "nowhere" / "steps")


def test_without_matplotlib_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ReportError, match=r"^a plot needs matplotlib: pip install matplotlib$"):
        check_plot(tmp_path / "steps.png")
