"""The cost model decides the contests that were measured, and broken cost tables are refused in one line."""

import datetime
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuseplan.errors import ConfigError
from fuseplan.planner.costs import HARDWARE, CostModel, CostTable, Provenance, Region, Row
from fuseplan.providers import PROFILES
from tests.planner.parts import NORM, Padding

ROOT = Path(__file__).parents[2]
DATA = json.loads((ROOT / "benchmarks/data/h200x2-ar-add-rms-pad.json").read_text())


def site(tokens: int, ranks: int = 2) -> Region:
    return Region(
        core=NORM, tokens=tokens, width=2880, reduce=True, residual=True, tail=Padding(padded=3072), ranks=ranks
    )


def alternatives(device: str, provider: str, tokens: int, pad: str = "inductor") -> dict[str, int]:
    model, whole = CostModel(HARDWARE[device], pad=pad), site(tokens)  # type: ignore[arg-type]
    return {
        "unfused": model.unfused_ns(whole),
        "act_padding": model.alternative_ns(whole, whole.without_reduce(), provider),
        "allreduce_rms": model.alternative_ns(whole, whole.without_tail(), provider),
        "allreduce_rms_padding": model.alternative_ns(whole, whole, provider),
    }


def test_there_is_a_model_of_every_device_and_every_constant_has_a_source() -> None:
    assert set(HARDWARE) == set(PROFILES)
    for name, hardware in HARDWARE.items():
        constants = dict(hardware.constants())
        assert {"launch", "memory_bandwidth", "cache"} <= set(constants), name
        for constant in constants.values():
            assert constant.source.strip()
            assert constant.value >= 0
            assert constant.unit in ("ns", "GB/s", "GFLOP/s", "bytes")


@pytest.mark.parametrize("tokens", [16, 32, 64])
def test_pad_first_wins_on_mi355x_with_aiter(tokens: int) -> None:
    times = alternatives("mi355x", "aiter", tokens)
    assert times["act_padding"] < times["allreduce_rms"] < times["unfused"]


@pytest.mark.parametrize(
    ("tokens", "winner"),
    [(t, "allreduce_rms") for t in (128, 256, 512, 1024, 2048)] + [(4096, "act_padding")],
)
def test_the_order_flips_on_h200_as_measured(tokens: int, winner: str) -> None:
    times = alternatives("h200", "triton", tokens, pad="eager")
    assert min(("act_padding", "allreduce_rms"), key=times.__getitem__) == winner
    measured = [
        row for run in DATA["runs"] for row in run["rows"] if row["tokens"] == tokens and {"B", "C"} <= set(row)
    ]
    assert measured
    for row in measured:
        assert (row["B"] < row["C"]) == (winner == "allreduce_rms")


@pytest.mark.parametrize("run", [1, 2, 3])
def test_errors_stay_near_the_scatter_of_single_runs(run: int) -> None:
    rows = next(each["rows"] for each in DATA["runs"] if each["run"] == run)
    names = {"U": "unfused", "C": "act_padding", "B": "allreduce_rms", "D": "allreduce_rms_padding"}
    ratios = [
        alternatives("h200", "triton", row["tokens"], pad="eager")[name] / 1e3 / row[column]
        for row in rows
        for column, name in names.items()
        if column in row
    ]
    assert all(0.8 < ratio < 1.2 for ratio in ratios)


def test_the_measured_data_is_the_data_that_was_fitted() -> None:
    result = json.loads((ROOT / "benchmarks/results/cost_model_h200.json").read_text())
    fitted = {name: each["value"] for name, each in result["constants"].items()}
    committed = {name: constant.value for name, constant in HARDWARE["h200"].constants()}
    for name, value in fitted.items():
        assert committed[name] == pytest.approx(value, rel=2e-3), name


@settings(max_examples=200)
@given(
    st.sampled_from(sorted(HARDWARE)),
    st.integers(1, 8192),
    st.sampled_from([2, 4, 8]),
    st.sampled_from(["torch", "triton", "flashinfer", "aiter", "somebody"]),
)
def test_prices_are_positive_integers_and_grow_with_tokens(device: str, tokens: int, ranks: int, provider: str) -> None:
    model = CostModel(HARDWARE[device])
    for region in (site(tokens, ranks), site(tokens, ranks).without_reduce(), site(tokens, ranks).without_tail()):
        for price in (model.unfused_ns(region), model.fused_ns(region, provider)):
            assert isinstance(price, int)
            assert price > 0
        assert model.unfused_ns(replace(region, tokens=2 * tokens)) >= model.unfused_ns(region)


def row(**changes: Any) -> dict[str, Any]:
    plain = {
        "key": "site: unfused",
        "tokens": 8,
        "time_ns": 12_000,
        "spread_ns": 100,
        "provenance": "measured",
        "device": "h200",
        "torch": "2.11.0",
        "triton": "3.6.0",
        "topology": "tp2 nvlink",
        "date": "2026-11-22",
        "command": "fuseplan tune",
    }
    return {**plain, **changes}


def table(*rows: dict[str, Any], **changes: Any) -> bytes:
    return json.dumps({"schema": 1, "device": "h200", "rows": list(rows), **changes}).encode()


MISSING = {name: value for name, value in row().items() if name != "time_ns"}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (table(row(time_ns=-1)), "time_ns must be between 0"),
        (table(MISSING), "time_ns"),
        (table(row(time_ns="fast")), "expected int, found 'fast'"),
        (table(row(time_ns=1.5)), "expected int, found '1.5'"),
        (table(row(time_ns=True)), "expected int"),
        (table(row(time_ns=10**14)), "time_ns must be between 0"),
        (table(row(), row()), "occurs twice"),
        (table(row(device="h100")), "is of 'h100', the table of 'h200'"),
        (table(row(date="yesterday")), "ISO 8601"),
        (table(row(surprise=1)), "surprise"),
        (table(row(provenance="guessed")), "measured"),
        (table(row(), schema=2), "it has schema 2; this version reads 1"),
        (table(row(), schema=None), "it has schema None"),
        (json.dumps({"schema": 1, "device": "h200"}).encode(), "no rows"),
        (b"[]", "isn't a JSON object"),
        (b"{", "isn't JSON"),
        (b"\xff", "isn't UTF-8"),
        (b'{"schema": 1, "schema": 1}', "is there twice in one object"),
    ],
)
def test_a_broken_table_is_refused_in_one_line(content: bytes, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        CostTable.parse(content, name="costs.json", device="h200")
    assert says in str(error.value)
    assert str(error.value).startswith("cost table 'costs.json': ")
    assert "\n" not in str(error.value)


def test_a_table_of_another_device_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    path.write_bytes(table(row()))
    assert CostTable.load(path, device="h200").lookup("site: unfused", 8) is not None
    with pytest.raises(ConfigError, match="it is of 'h200', not of 'mi355x'"):
        CostTable.load(path, device="mi355x")


def test_saving_and_loading_give_the_same_table(tmp_path: Path) -> None:
    rows = tuple(
        Row(
            key="site: unfused", tokens=tokens, time_ns=1000 * tokens, spread_ns=10, provenance=Provenance.MEASURED,
            device="h200", torch="2.11.0", triton="", topology="tp1", date=datetime.date(2026, 11, 22).isoformat(),
            command="",
        )
        for tokens in (64, 8)
    )  # fmt: skip
    saved = CostTable(device="h200", rows=rows)
    saved.save(tmp_path / "deep" / "costs.json")
    loaded = CostTable.load(tmp_path / "deep" / "costs.json")
    assert loaded.digest == saved.digest == CostTable(device="h200", rows=rows[::-1]).digest
    assert [each.name for each in (tmp_path / "deep").iterdir()] == ["costs.json"]
    assert loaded.interpolate("site: unfused", 8) == (8000, 10)
    assert loaded.interpolate("site: unfused", 36) == (36_000, 10)
    assert loaded.interpolate("site: unfused", 4) is None
    assert loaded.interpolate("site: unfused", 65) is None


def test_a_table_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="can't be written"):
        CostTable(device="h200").save(tmp_path / "file" / "costs.json")
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
