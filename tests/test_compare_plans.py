"""`benchmarks/compare_plans.py`: what it finds between two saved files, and what it leaves out."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import compare_plans

CASE = "gpt-oss-20b-tiny tp=2 h200 1:64,65:512,513:8192"
Change = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What this revision says of one workload."""
    path = tmp_path_factory.mktemp("plans") / "old.json.gz"
    found = compare_plans.of_workload("gpt-oss-20b-tiny", 2, None, ["h200"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare_plans, "cases", lambda quick: found)
        compare_plans.save(path, quick=True)
    return path


def changed(saved: Path, change: Change) -> Path:
    """The same file with other reports of `CASE`."""
    path = saved.with_name("new.json.gz")
    with gzip.open(path, "wt") as file:
        for case, text in compare_plans.read(saved):
            found = json.loads(text)
            if case == CASE:
                change(found)
            file.write(json.dumps({"case": case, "found": found}) + "\n")
    return path


def lines_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[str]:
    """What `diff` prints. Its exit status is 1 where anything differs."""
    status = compare_plans.main(["diff", *map(str, arguments)])
    *lines, summary = capsys.readouterr().out.splitlines()
    assert summary == f"{status} of 3 cases differ"
    return lines


def first_graph(found: dict[str, Any]) -> Any:
    return found["reports"]["planned"]["graphs"][0]


def pay_less(found: dict[str, Any]) -> None:
    first_graph(found)["applied"][0]["saving_ns"] += 1


def fuse_less(found: dict[str, Any]) -> None:
    del first_graph(found)["plan"]["selected"][-1]


def rename_a_field(found: dict[str, Any]) -> None:
    first_graph(found)["saved"] = first_graph(found).pop("saved_ns")


def rename_nodes(found: dict[str, Any]) -> None:
    fusion = first_graph(found)["applied"][0]
    fusion |= {"anchor": "mul_7", "site": "mul_7", "consumed": ["x" for _ in fusion["consumed"]]}


def add_a_rule(found: dict[str, Any]) -> None:
    for report in found["reports"].values():
        report["rules"].append("new")
        report["graphs"][0]["matched"]["new"] = 0
        report["graphs"][0]["refusals"].append({"reason": "op", "detail": "no such op", "rule": "new"})


def test_a_file_is_equal_to_itself(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lines_of(capsys, saved, saved) == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (pay_less, [".reports.planned.graphs[0].applied[0].saving_ns: "]),
        (fuse_less, [".reports.planned.graphs[0].plan.selected: "]),
        (rename_a_field, [".reports.planned.graphs[0].saved_ns: ", ".reports.planned.graphs[0].saved: "]),
        (rename_nodes, []),
    ],
)
def test_a_change_is_named(
    change: Change, expected: list[str], saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = lines_of(capsys, saved, changed(saved, change))
    assert len(lines) == len(expected)
    for line, start in zip(lines, expected, strict=True):
        assert line.startswith(f"{CASE}: {start}")


def test_a_rule_that_one_revision_has_not_got_is_ignored_by_name(
    saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = changed(saved, add_a_rule)
    assert lines_of(capsys, saved, new)
    assert lines_of(capsys, saved, new, "--ignore-rules", "new") == []
