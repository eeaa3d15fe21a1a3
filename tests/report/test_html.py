"""The page as a file: what is in it, what is not, and how it is written."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fuseplan.errors import ReportError
from fuseplan.record import Comparison, GraphReport, Report
from fuseplan.report import check_html, render_html, save_html
from fuseplan.report.html.drawings import Drawn
from fuseplan.report.html.page import ASSETS, SCRIPTS, STYLES
from fuseplan.report.html.view import view_of
from tests.report.synthetic import BOTH, CLASS, PAD, REDUCE, TOKENS, Synthetic

HOSTILE = "</script><img src=x onerror=\"document.title='owned'\">'\u2028&amp;{{ 7 * 7 }}"


class Page(HTMLParser):
    """Tags with their attributes, and the texts of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        (self.scripts if self.tags and self.tags[-1][0] == "script" else self.texts).append(data)


def view(comparison: Comparison) -> dict[str, Any]:
    """The data, as a reader of the file finds it."""
    (found,) = re.findall(r'<script type="application/json" id="view">(.*?)</script>', render_html(comparison))
    data: dict[str, Any] = json.loads(found)
    return data


def test_every_asset_is_in_the_page() -> None:
    listed = {*(f"{name}.js" for name in SCRIPTS), *(f"{name}.css" for name in STYLES), "report.html.jinja"}
    assert {path.name for path in ASSETS.iterdir()} == listed
    lines = {path.name: path.read_text(encoding="utf-8").count("\n") for path in ASSETS.iterdir()}
    assert [name for name, count in lines.items() if count > 400] == []


def test_it_loads_nothing_makes_no_markup_and_runs_no_text() -> None:
    text = render_html(Synthetic().comparison())
    page = Page(text)
    assert not re.search(r"https?:(?!//www\.w3\.org/2000/svg)", text)
    assert "@import" not in text
    assert {tag for tag, _ in page.tags}.isdisjoint({"img", "iframe", "object", "embed", "base", "form"})
    assert [attributes for tag, attributes in page.tags if tag == "link"] == [{"rel": "icon", "href": "data:,"}]
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on") or name == "src"]
    (policy,) = [str(a["content"]) for tag, a in page.tags if tag == "meta" and "http-equiv" in a]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    markup = ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write")
    calls = (*markup, "eval(", "Function(", "fetch(", "import(")
    assert [call for call in calls if call in page.scripts[-1]] == []


def test_names_are_data() -> None:
    plain = Page(render_html(Synthetic(obstructed=(1,)).comparison()))
    text = render_html(Synthetic(name=lambda name: name + HOSTILE, obstructed=(1,)).comparison())
    hostile = Page(text)
    assert [tag for tag, _ in hostile.tags] == [tag for tag, _ in plain.tags]
    assert f"model{HOSTILE}" in "".join(hostile.texts)
    assert "49" not in "".join(hostile.texts)
    data = json.loads(hostile.scripts[0])
    assert data["workload"] == f"model{HOSTILE}"
    assert not set(hostile.scripts[0]) & set("<>&\u2028")


def test_headline_says_what_is_saved_and_verdicts_who_starves() -> None:
    data = view(Synthetic().comparison())
    assert data["headline"].startswith("The plan saves 29.0 µs a step at 1-64 tokens: 36 % of the 80.0 µs of ")
    first, second = data["verdicts"]
    assert (first["loser"], first["state"], first["winners"]) == (PAD, "starved", [[REDUCE, 4]])
    assert (first["where"], first["lost_us"], first["behind_us"]) == ("layers.0-3.post_norm", 1.0, [8.0, 8.0, 0.0])
    assert (second["loser"], second["state"], second["lost_us"]) == (REDUCE, "some", -1.0)
    assert second["behind_us"] == [12.0, 12.0, 4.0]


def test_work_that_a_composed_rule_does_is_not_starved() -> None:
    comparison = Synthetic().comparison()
    data = view(comparison)
    states = {policy["name"]: [state for _, _, state in policy["rules"]] for policy in data["policies"]}
    assert [rule["name"] for rule in data["rules"]] == [PAD, REDUCE, BOTH]
    assert states["planned"] == ["outdone", "some", "some"]
    assert states[f"ordered({PAD}, {REDUCE})"] == ["all", "some", "unlisted"]
    assert states["off"] == ["off", "off", "off"]
    planned = comparison.reports[0]
    report = replace(planned, graphs=tuple(graph for graph in planned.graphs if graph.range == (1, 64)))
    (alone,) = view_of(replace(comparison, ranges=((1, 64),), reports=(report,), evidence=None))["policies"]
    assert alone["rules"][0] == [0, 4, "covered"]


def test_fusions_know_their_boxes_also_beyond_a_layer() -> None:
    synthetic = Synthetic(obstructed=(2,))
    data = view(synthetic.comparison())
    (graph,) = data["graphs"]
    strings = data["strings"]
    names = [[strings[member] for member in box[4]] for box in graph["boxes"]]
    fusions = [row for row in data["fusions"] if strings[row[1]] == REDUCE]
    placed = {strings[row[4]]: [names[box][0] for box in row[11]] for row in fusions}
    assert placed["mul_1"] == ["reduce_1", "post_norm_1"]
    assert placed["first_1"] == ["last_0", "norm_1"]
    segments = {segment["name"]: [names[box][0] for box in segment["boxes"]] for segment in graph["segments"]}
    assert list(segments) == ["embed", *(f"layers.{layer}" for layer in range(4)), "lm_head"]
    assert segments["layers.2"][3] == "mul_2"
    (obstructed, declined) = data["misses"]
    assert [names[mark["box"]][0] for mark in obstructed["marks"]] == ["mul_2"]
    assert [names[mark["box"]][0] for mark in declined["marks"]] == [f"post_norm_{layer}" for layer in range(4)]


def test_what_is_not_drawn_is_no_error() -> None:
    (drawing,) = Synthetic().comparison().evidence.drawings  # type: ignore[union-attr]
    drawn = Drawn(drawing)
    assert drawn.boxes_of(["nowhere", "pad_0"]) == (6,)
    assert drawn.box_near(["nowhere"], [None, "no.module"], "pad") is None
    assert drawn.box_near(["nowhere"], ["layers.1.experts"], "all_reduce") == 16


def test_every_saving_leads_to_cost_rows() -> None:
    data = view(Synthetic().comparison())
    sites = {data["strings"][row[0]] for row in data["costs"]}
    assert sites == {CLASS, "rms_norm"}
    contested = {data["strings"][row[8]] for row in data["fusions"] if data["strings"][row[6]].startswith("post")}
    assert contested == {CLASS}
    assert [point[0] for point in data["sizes"]["points"]] == list(TOKENS)


def test_constraints_show_what_they_change() -> None:
    comparison = Synthetic(forbid=BOTH).comparison()
    planned = replace(comparison.reports[1], policy="planned", order=(), forbid=(BOTH,))
    changes = view(replace(comparison, reports=(planned,)))["changes"]
    assert (changes["forbid"], changes["lost_us"]) == ([BOTH], [12.0, 12.0, 4.0])
    assert changes["rows"] == [
        {"before": f"{BOTH} triton", "after": f"{PAD} triton", "count": 8, "where": "layers.0-3.post_norm"},
        {"before": f"{REDUCE} triton", "after": f"{PAD} triton", "count": 4, "where": "layers.0-3.post_norm"},
    ]


@pytest.mark.parametrize(
    "comparison",
    [
        Synthetic().comparison(evidence=False),
        Synthetic(graphs=3).comparison(),
        Comparison(workload="w", tp=1, device="cpu", ranges=(), reports=()),
        Comparison(workload="w", tp=1, device="cpu", ranges=((1, 8),), reports=(
            Report(policy="planned", order=(), rules=("act_quant",), graphs=(GraphReport(graph="graph_0"),)),
        )),
    ],
    ids=["no evidence", "several graphs", "no reports", "nothing recognised"],
)  # fmt: skip
def test_renders_what_there_is(comparison: Comparison) -> None:
    assert view(comparison)["headline"]


def test_36_layers_stay_small() -> None:
    assert len(render_html(Synthetic(layers=36, obstructed=(3, 4)).comparison()).encode()) < 1_000_000


def test_writes_the_whole_file_also_with_lone_surrogates(tmp_path: Path) -> None:
    path, comparison = tmp_path / "page.html", Synthetic(name=lambda name: f"{name}\udce4").comparison()
    save_html(comparison, path)
    assert path.read_text(encoding="utf-8") == render_html(comparison)
    assert [each.name for each in tmp_path.iterdir()] == ["page.html"]
    assert view(comparison)["workload"] == "model\udce4"


@pytest.mark.parametrize("name", ["", "nowhere/page.html", "file/page.html"])
def test_refuses_what_cannot_be_written(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / name
    with pytest.raises(ReportError, match=r"^report '.*' can't be written: [^\n]+$"):
        check_html(path)
    with pytest.raises(ReportError, match="can't be written"):
        save_html(Synthetic().comparison(), path)
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
