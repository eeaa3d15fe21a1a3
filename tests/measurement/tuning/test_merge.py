"""One table, several writers."""

from pathlib import Path

import pytest
from filelock import FileLock

from fuseplan.errors import ConfigError
from fuseplan.measurement.tuning import merge, merge_into, table_in
from fuseplan.planner.costs import CostTable, Provenance, Row
from tests.forks import Forks, Request

WRITER = """
import sys
from pathlib import Path
from tests.measurement.tuning.test_merge import row
from fuseplan.measurement.tuning import merge_into
for number in range(25):
    merge_into(Path(sys.argv[2]), "cpu", [row(f"{sys.argv[1]} {number}", 1), row("both", 1, int(sys.argv[1]))])
"""


def row(key: str, tokens: int = 1, time_ns: int = 5, device: str = "cpu") -> Row:
    return Row(
        key=key, tokens=tokens, time_ns=time_ns, spread_ns=1, provenance=Provenance.MEASURED, device=device,
        torch="2.13.0", triton="", topology="tp1", date="2026-11-27", command="a test",
    )  # fmt: skip


def test_rows_are_added_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "costs.json"
    merge_into(path, "cpu", [row("a", 1, 5), row("b", 1, 6)])
    merge_into(path, "cpu", [row("a", 1, 7), row("a", 2, 8)])
    expected = {("a", 1): 7, ("a", 2): 8, ("b", 1): 6}
    assert {(each.key, each.tokens): each.time_ns for each in CostTable.load(path).rows} == expected


def test_two_processes_at_once_lose_nothing(forks: Forks, tmp_path: Path) -> None:
    path, writer = tmp_path / "costs.json", tmp_path / "writer.py"
    writer.write_text(WRITER, encoding="utf-8")
    processes = [([str(number), str(path)], dict[str, str]()) for number in (1, 2)]
    outcomes = forks.outcomes(forks.start(Request(path=str(writer), processes=processes)))
    assert [each.status for each in outcomes] == [0, 0], outcomes
    rows = CostTable.load(path).rows
    assert {each.key for each in rows} == {"both", *(f"{number} {each}" for number in (1, 2) for each in range(25))}
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("{", "cost table '.*costs.json': "),
        ('{"schema": 1, "device": "h200", "rows": []}', "cost table '.*costs.json': it is of 'h200', not of 'cpu'"),
    ],
)
def test_a_broken_table_is_left_as_it_is(tmp_path: Path, content: str, text: str) -> None:
    path = tmp_path / "costs.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=text):
        merge_into(path, "cpu", [row("a")])
    assert path.read_text() == content
    assert table_in(path, "cpu", replace_broken=True).rows == ()
    merge_into(path, "cpu", [row("a")], replace_broken=True)
    assert [each.key for each in CostTable.load(path).rows] == ["a"]


def test_who_holds_the_lock_for_ever_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge, "PATIENCE_S", 0.05)
    path = tmp_path / "costs.json"
    with (
        FileLock(tmp_path / ".costs.json.lock"),
        pytest.raises(ConfigError, match=r"another process has held its lock"),
    ):
        merge_into(path, "cpu", [row("a")])
    assert not path.exists()


def test_a_folder_that_can_not_be_written_to_is_an_error_of_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cost table '.*' can't be written: ") as raised:
        merge_into(tmp_path / "file" / "costs.json", "cpu", [row("a")])
    assert "\n" not in str(raised.value)
