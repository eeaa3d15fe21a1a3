"""`benchmarks/compare_plans.py`: what it finds between two saved files, and what it leaves out."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import compare_plans

CASE = "gpt-oss-20b-tiny tp=2 h200 1:64,65:512,513:8192"
GRAPH = ".reports.planned.graphs[0]"
Change = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What this revision says of one workload."""
    path = tmp_path_factory.mktemp("plans") / "old.json.gz"
    found = compare_plans.of_workload("gpt-oss-20b-tiny", 2, None, ["h200"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare_plans, "cases", lambda quick: found)
        compare_plans.save(path, quick=True)
    return path


def add_a_rule(graph: dict[str, Any]) -> None:
    graph["matched"]["new"] = 0
    graph["refusals"].append({"reason": "op", "detail": "no such op", "rule": "new"})


@pytest.mark.parametrize(
    ("change", "expected", "options"),
    [
        (lambda graph: None, [], []),
        (lambda graph: graph["applied"][0].update(saving_ns=1), [f"{GRAPH}.applied[0].saving_ns: "], []),
        (lambda graph: graph["plan"]["selected"].pop(), [f"{GRAPH}.plan.selected: "], []),
        (lambda graph: graph.update(saved=graph.pop("saved_ns")), [f"{GRAPH}.saved_ns: ", f"{GRAPH}.saved: "], []),
        (lambda graph: graph["applied"][0].update(anchor="mul_7", site="mul_7"), [], []),
        (add_a_rule, [f"{GRAPH}.matched.new: ", f"{GRAPH}.refusals: "], []),
        (add_a_rule, [], ["--ignore-rules", "new"]),
    ],
)
def test_what_differs_is_named(
    change: Change, expected: list[str], options: list[str], saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = saved.with_name("new.json.gz")
    with gzip.open(new, "wt") as file:
        for case, text in compare_plans.read(saved):
            found = json.loads(text)
            if case == CASE:
                change(found["reports"]["planned"]["graphs"][0])
            file.write(json.dumps({"case": case, "found": found}) + "\n")
    status = compare_plans.main(["diff", str(saved), str(new), *options])
    *lines, summary = capsys.readouterr().out.splitlines()
    assert summary == f"{status} of 3 cases differ"
    for line, start in zip(lines, expected, strict=True):
        assert line.startswith(f"{CASE}: {start}")
