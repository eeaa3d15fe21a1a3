"""Cost tables: what a row may hold, how times between rows are read, and what a file may be."""

import dataclasses
import json
import math
from pathlib import Path
from statistics import NormalDist
from typing import Any

import pytest

from benchmarks.ship_costs import merged
from fuseplan.config import Environment, PassConfig
from fuseplan.errors import ConfigError
from fuseplan.planner import sources
from fuseplan.planner.costs import SHIPPED, CostTable, Provenance, shipped_table, table
from fuseplan.planner.sources import prices_of
from fuseplan.providers import PROFILES, local_profile
from tests.planner.posing import row

HOUR_NS = 60 * 60 * 10**9


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"key": ""}, "a row has no key"),
        ({"tokens": 0}, "row 'k' at 0 tokens: tokens must be at least 1"),
        ({"time_ns": -1}, "time_ns must be between 0 and 3600000000000, not -1"),
        ({"time_ns": HOUR_NS + 1}, "time_ns must be between 0"),
        ({"spread_ns": -1}, "spread_ns must be between 0"),
        ({"spread_ns": HOUR_NS + 1}, "spread_ns must be between 0"),
        ({"date": "2026-02-30"}, "date '2026-02-30' isn't an ISO 8601 date"),
    ],
)
def test_rows_that_may_not_be(changes: dict[str, Any], says: str) -> None:
    row(tokens=1, time_ns=0, spread_ns=HOUR_NS, date="2026-02-28")
    row(time_ns=HOUR_NS)
    with pytest.raises(ConfigError, match=says):
        row(**changes)


CURVE = CostTable(
    device="h200", rows=(row(20, 3000, 9), row(10, 1000, 5), row(40, 2000, 2), row(10, 7, 1, key="other"))
)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [(9, None), (10, (1000, 5)), (13, (1600, 9)), (20, (3000, 9)), (30, (2500, 9)), (35, (2250, 9)), (40, (2000, 2)),
     (41, None)],
)  # fmt: skip
def test_times_between_two_rows_are_on_a_line(tokens: int, expected: tuple[int, int] | None) -> None:
    assert CURVE.interpolate("k", tokens) == expected


def test_what_a_time_was_read_from() -> None:
    found = {tokens: [each.tokens for each in CURVE.neighbours("k", tokens)] for tokens in (5, 10, 11, 40, 50)}
    assert found == {5: [], 10: [10], 11: [10, 20], 40: [40], 50: []}
    assert CURVE.neighbours("other", 9) == CURVE.neighbours("absent", 10) == ()
    assert CURVE.interpolate("absent", 10) is None
    assert CURVE.interpolate("other", 10) == (7, 1)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (20, 0),
        (25, math.hypot(0.2 * 1000 * 3 / 4, 0.06 * 2750)),
    ],
)
def test_between_rows_a_time_is_less_certain(tokens: int, expected: float) -> None:
    normal = NormalDist()
    quartiles, median = normal.inv_cdf(0.75) - normal.inv_cdf(0.25), math.sqrt(math.pi / 2 / 5)
    assert CURVE.deviation("k", tokens) == pytest.approx(math.hypot(expected, 9 * median / quartiles), rel=1e-3)


def test_rows_are_added_or_take_the_place_of_older_ones() -> None:
    newer = CURVE.updated([row(10, 1), row(80, 5)])
    assert [(each.key, each.tokens, each.time_ns) for each in newer.rows] == [
        ("k", 10, 1), ("k", 20, 3000), ("k", 40, 2000), ("k", 80, 5), ("other", 10, 7),
    ]  # fmt: skip
    assert newer.lookup("k", 80) == row(80, 5)
    assert CURVE.lookup("k", 80) is None


def test_the_digest_is_of_the_content() -> None:
    assert CURVE.digest == CostTable(device="h200", rows=CURVE.rows[::-1]).digest
    assert CURVE.digest != CostTable(device="h200", rows=(row(20, 3001, 9), *CURVE.rows[1:])).digest
    assert CostTable(device="h200").digest != CostTable(device="h100").digest


def test_a_table_is_a_table_of_one_device_and_one_row_a_size() -> None:
    with pytest.raises(ConfigError, match="row 'k' at 8 tokens is of 'h200', the table of 'h100'"):
        CostTable(device="h100", rows=(row(),))
    with pytest.raises(ConfigError, match="row 'k' at 8 tokens occurs twice"):
        CostTable(device="h200", rows=(row(), row(time_ns=5)))


def test_a_file_may_be_as_large_as_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "costs.json"
    CURVE.save(path)
    content = path.read_bytes()
    monkeypatch.setattr(table, "LARGEST_BYTES", len(content))
    assert CostTable.load(path).digest == CURVE.digest
    assert CostTable.parse(content).digest == CURVE.digest
    path.write_bytes(content + b" ")
    with pytest.raises(ConfigError, match=f"it has more than {len(content)} bytes"):
        CostTable.load(path)
    with pytest.raises(ConfigError, match="it has more than"):
        CostTable.parse(content + b" ")


def test_files_are_laid_out_for_people_and_diffs(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "costs.json"
    CostTable(device="h200", rows=(row(),)).save(path)
    assert path.read_text().startswith('{\n "schema": 1,\n "device": "h200",\n "rows": [\n  {\n   "key": "k",')
    assert path.read_text().endswith("}\n")
    CostTable(device="h200").save(path)  # the folder is there
    assert [each.name for each in path.parent.iterdir()] == ["costs.json"]


def content(**changes: Any) -> bytes:
    return json.dumps({"schema": 1, "device": "h200", "rows": [], **changes}).encode()


FIRST = "CostTable.rows[0]"


def of_row(**changes: Any) -> bytes:
    """A table of one row, of which a value is None that is left out."""
    given = {name: value for name, value in {**vars(row()), **changes}.items() if value is not None}
    return content(rows=[given])


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (content(schema=True), "it has schema True; this version reads 1"),
        (b'{"device": "h200", "rows": []}', "it has schema None"),
        (b'{"schema": 1, "device": "h200"}', "it has no rows"),
        (b"[]", "it isn't a JSON object"),
        (b"{", "it isn't JSON"),
        (of_row(time_ns=-1), "row 'k' at 8 tokens: time_ns must be between 0"),
        (of_row(time_ns=None), f"{FIRST}: expected a field 'time_ns'"),
        (of_row(time_ns="fast"), f"{FIRST}.time_ns: expected int, found 'fast'"),
        (of_row(surprise=1), f"{FIRST}.surprise: expected one of the fields"),
        (of_row(provenance="guessed"), f"{FIRST}.provenance: expected one of ['measured', 'modelled'"),
    ],
)
def test_files_that_are_no_table(given: bytes, says: str) -> None:
    with pytest.raises(ConfigError) as raised:
        CostTable.parse(given, name="costs.json", device="h200")
    assert str(raised.value).startswith(f"cost table 'costs.json': {says}")
    assert "\n" not in str(raised.value)


NOWHERE = Environment()
H200 = PROFILES["h200"]


def test_prices_come_from_the_model_of_the_device_and_the_table_that_is_named(tmp_path: Path) -> None:
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    CURVE.save(first)
    CostTable(device="h200", rows=(row(),)).save(second)
    plain = prices_of(PassConfig(), NOWHERE, H200)
    assert (plain.model.name, plain.table, plain.source) == ("h200", shipped_table("h200"), "auto")
    assert prices_of(PassConfig(), NOWHERE, PROFILES["b200"]).table is None
    found = (prices_of(config, Environment(cost_table=second), H200).table
             for config in (PassConfig(cost_table=first), PassConfig()))  # fmt: skip
    assert [len(each.rows) for each in found if each] == [4, 1]
    assert prices_of(PassConfig(), NOWHERE, None).model.name == local_profile().name


def test_a_table_is_needed_and_read_as_the_configuration_asks(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    with pytest.raises(ConfigError, match="costs='measured' needs a cost table: run fuseplan tune"):
        prices_of(PassConfig(costs="measured"), NOWHERE, H200)
    path.write_text("{")
    modelled = prices_of(PassConfig(costs="modelled", cost_table=path), NOWHERE, H200)
    assert (modelled.table, modelled.source) == (None, "modelled")
    with pytest.raises(ConfigError, match="isn't JSON"):
        prices_of(PassConfig(costs="measured", cost_table=path), NOWHERE, H200)
    CURVE.save(path)
    measured = prices_of(PassConfig(costs="measured", cost_table=path), NOWHERE, H200)
    assert measured.table is not None
    assert (measured.source, measured.table.digest) == ("measured", CURVE.digest)
    with pytest.raises(ConfigError, match="it is of 'h200', not of 'h100'"):
        prices_of(PassConfig(cost_table=path), NOWHERE, PROFILES["h100"])


@pytest.mark.parametrize("path", sorted(SHIPPED.iterdir()), ids=lambda path: path.stem)
def test_the_package_has_measured_rows_of_devices_that_it_knows(path: Path) -> None:
    assert path.stem in PROFILES
    table = shipped_table(path.stem)
    assert table is not None
    assert {each.provenance for each in table.rows} == {Provenance.MEASURED}
    for each in table.rows:
        assert each.torch
        assert each.triton
        assert each.spread_ns > 0
        assert "fuseplan tune" in each.command
    keys = {each.key for each in table.rows}
    # An alternative alone says nothing.
    assert {f"{key.rpartition(': ')[0]}: unfused" for key in keys} <= keys


def test_what_was_measured_here_stands_before_what_the_package_has(monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = shipped_table("h100")
    assert shipped is not None
    component = shipped.rows[0].component
    ours = dataclasses.replace(shipped.rows[0], tokens=5, time_ns=7)
    monkeypatch.setattr(sources, "local_profile", lambda: PROFILES["h100"])
    monkeypatch.setattr(sources, "cached_table", lambda device: CostTable(device=device, rows=(ours,)))
    table = prices_of(PassConfig(), NOWHERE, None).table
    assert table is not None
    # Alternatives that are held against each other were measured on one machine.
    assert [each for each in table.rows if each.component == component] == [ours]
    others = [each for each in shipped.rows if each.component != component]
    assert [each for each in table.rows if each.component != component] == others != []
    assert prices_of(PassConfig(costs="measured"), NOWHERE, None).table == CostTable(device="h100", rows=(ours,))
    assert prices_of(PassConfig(costs="modelled"), NOWHERE, None).table is None


def test_tables_are_merged_into_those_that_are_shipped(tmp_path: Path) -> None:
    given, folder = tmp_path / "given.json", tmp_path / "shipped"
    folder.mkdir()
    CostTable(device="h200", rows=(row(8, 100, date="2026-11-20"), row(16, 300))).save(given)
    assert merged(given, folder) == f"h200.json: 2 rows, 2 from {given}"
    # A row that is older than the one there stays out, a later one takes its place.
    CostTable(device="h200", rows=(row(8, 90, date="2026-11-19"), row(16, 290, date="2026-11-23"))).save(given)
    assert merged(given, folder) == f"h200.json: 2 rows, 1 from {given}"
    times = {each.tokens: each.time_ns for each in CostTable.load(folder / "h200.json").rows}
    assert times == {8: 100, 16: 290}
    CostTable(device="h200", rows=(row(provenance=Provenance.MODELLED),)).save(given)
    with pytest.raises(ConfigError, match="'k' isn't measured; ship measured rows alone"):
        merged(given, folder)
