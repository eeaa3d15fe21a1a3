import json
import os
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuseplan.errors import LockError
from fuseplan.report.drift import drifts
from fuseplan.report.lock import ANY_SIZE, LARGEST_BYTES, Applied, FusionLock, LockSettings, parse_span
from fuseplan.report.places import module_of
from tests.report.locked import SPANS, applied, fusion, graph, norms, refusal, report, settings

LAYERS = 36


def gpt_oss() -> FusionLock:
    """As gpt-oss-120b's: a fusion a layer, and one before all of them, the same in both ranges."""
    fusions = applied("allreduce_rms", ["layers.0.input_norm"])
    fusions += applied("allreduce_rms_padding", norms(range(LAYERS)))
    return FusionLock.of(settings("1:64", "65:512", tp=2), report(*(graph(fusions, span=span) for span in SPANS)))


def test_thirty_six_layers_are_a_few_lines() -> None:
    lock = gpt_oss()
    assert lock.text() == (
        '{\n "fusions": {\n  "1:64, 65:512": {\n'
        '   "allreduce_rms fused_allreduce_rms triton": [\n    "layers.0.input_norm"\n   ],\n'
        '   "allreduce_rms_padding fused_allreduce_rms_padding triton": [\n    "layers.0-35.norm"\n   ]\n'
        "  }\n },\n"
        ' "schema": 1,\n "settings": {\n  "costs": "modelled",\n  "device": "h200",\n  "policy": "planned",\n'
        '  "ranges": [\n   "1:64",\n   "65:512"\n  ],\n  "tp": 2,\n  "workload": "w"\n }\n}\n'
    )
    assert lock.fused == {"allreduce_rms": 2, "allreduce_rms_padding": 2 * LAYERS}
    assert lock.text() == json.dumps(json.loads(lock.text()), indent=1, sort_keys=True) + "\n"


def test_ranges_that_differ_stand_apart_and_empty_ones_are_named() -> None:
    graphs = graph(applied("act_padding", ["a"]), span=(1, 64)), graph(span=(65, 512))
    lock = FusionLock.of(settings("1:64", "65:512", "513"), report(*graphs))
    assert dict(lock.fusions) == {"1:64": {"act_padding fused_act_padding triton": ("a",)}, "65:512, 513": {}}


def test_ranges_stand_in_the_order_of_their_numbers_and_others_are_read(tmp_path: Path) -> None:
    spans = ("1:64", "65:512", "513:8192", "8193")
    graphs = [
        graph(applied("act_padding", norms(range(layers))), span=parse_span(span))
        for layers, span in enumerate(spans, start=1)
    ]
    lock = FusionLock.of(settings(*spans), report(*graphs))
    assert list(json.loads(lock.text())["fusions"]) == list(spans)
    # As they were written before.
    read = load(json.dumps(json.loads(lock.text()), indent=1, sort_keys=True).encode(), tmp_path)
    assert (read, read.text()) == (lock, lock.text())
    (lost,) = drifts(read, report(*(graph(span=each.range) for each in graphs)))
    assert [range_ for where in lost.where for range_ in where.ranges][:4] == list(spans)


def test_graphs_are_counted_together_and_lines_of_code_only_counted() -> None:
    graphs = graph(applied("act_padding", ["a", "model.py:3", None])), graph(applied("act_padding", ["a"]))
    lock = FusionLock.of(settings("1:64"), report(*graphs))
    assert lock.fusions["1:64"] == {"act_padding fused_act_padding triton": ("(no module) x2", "a x2")}
    kernel = Applied("act_padding", "fused_act_padding", "triton")
    assert lock.placed[1, 64] == Counter({(kernel, None): 2, (kernel, "a"): 2})


def test_without_ranges_one_graph_serves_every_size() -> None:
    lock = FusionLock.of(settings(), report(graph(applied("act_padding", ["a"]), span=None)))
    assert list(lock.fusions) == [ANY_SIZE]
    assert lock.fused == {"act_padding": 1}


NAMES = st.sampled_from(["act_padding", "allreduce_rms", "x"])
PLACES = st.none() | st.sampled_from([*norms(range(9)), "norm", "blocks.1-2.norm", "=", "a x2"]) | st.text(max_size=6)
PLACED = st.dictionaries(st.tuples(st.builds(Applied, NAMES, NAMES, NAMES), PLACES), st.integers(1, 3), max_size=12)
SETTINGS = st.builds(
    LockSettings,
    workload=st.text(max_size=6), device=st.text(max_size=6), policy=st.text(max_size=6),
    tp=st.none() | st.integers(1, 9), layers=st.none() | st.integers(1, 9),
    force=st.lists(st.text(max_size=3), max_size=2).map(tuple),
    allow_rounding_changes=st.booleans(), flags=st.dictionaries(st.text(max_size=3), st.booleans(), max_size=2),
    limits=st.dictionaries(st.text(max_size=3), st.integers(0, 9), max_size=2),
    ranges=st.sets(st.integers(1, 99), max_size=4).map(lambda ends: tuple(map(str, sorted(ends)))),
)  # fmt: skip


@given(SETTINGS, st.lists(PLACED, min_size=4, max_size=4))
def test_what_is_written_is_read_back(asked: LockSettings, placed: list[dict[tuple[Applied, str | None], int]]) -> None:
    graphs = []
    for span, counts in zip(asked.spans, placed, strict=False):
        fusions = [
            fusion(kernel.rule, module_of(place), op=kernel.op, provider=kernel.provider)
            for (kernel, place), count in counts.items()
            for _ in range(count)
        ]
        graphs.append(graph(fusions, span=span))
    lock = FusionLock.of(asked, report(*graphs))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fusions.lock"
        lock.save(path)
        read = FusionLock.load(path)
    assert read == lock
    assert read.text() == lock.text()
    for each in graphs:
        assert sum(read.placed[each.range].values()) == len(each.applied)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.sampled_from(["settings", "fusions"]), inner),
)


@given(JSON)
def test_whatever_is_in_the_file_is_a_lock_or_one_line(data: Any) -> None:
    text = json.dumps({**data, "schema": 1} if isinstance(data, dict) else data).encode()
    with tempfile.TemporaryDirectory() as folder, pytest.raises(LockError) as caught:
        load(text, Path(folder))
    assert "\n" not in str(caught.value)


def load(text: bytes, folder: Path) -> FusionLock:
    path = folder / "fusions.lock"
    path.write_bytes(text)
    return FusionLock.load(path)


@pytest.mark.parametrize(
    ("part", "value", "says"),
    [
        (("schema",), 2, "has schema 2; this version reads 1"),
        (("schema",), True, "has schema True; this version reads 1"),
        (("settings", "tp"), "two", r"settings\.tp: expected int, found 'two'"),
        (("settings", "tp"), 0, "tp=0: allowed are integers of at least 1"),
        (("settings", "tp"), 2**31, "tp=2147483648: allowed are at most 65536 ranks"),
        (("settings", "layers"), 10**9, "layers=1000000000: allowed are at most 10000"),
        (("settings", "force"), ["a"] * 1001, "force has 1001 entries; allowed are at most 1000"),
        (("settings", "surprise"), 1, r"settings\.surprise: expected one of the fields"),
        (("settings", "costs"), "measured", "costs are 'measured', and a lock pins modelled ones"),
        (("settings", "ranges"), ["1:64", "x"], "range 'x' isn't of the form FIRST:LAST"),
        (("settings", "ranges"), ["64:1"], "overlap or don't ascend"),
        (("settings", "ranges"), ["1:64"], "fusions are for range 65:512, and the ranges are 1:64"),
        (("settings", "ranges"), ["1:64", "65:512", "513"], "no fusions are for range 513"),
        (("fusions",), [], "fusions: expected an object"),
        (("fusions", "1:64"), {}, "fusions of range 1:64 are there twice"),
        (("fusions", "1:64, 65:512", "act_padding"), [], "isn't of the form RULE OP PROVIDER"),
        (("fusions", "1:64, 65:512", "a b c"), ["layers.0-3.x", "layers.2.x"], r"layers\.2\.x is there twice"),
        (("fusions", "1:64, 65:512", "a b c"), ["layers.0-49999.x"], "more than 100000 places"),
    ],
)
def test_contradictions_are_one_line(part: tuple[str, ...], value: Any, says: str, tmp_path: Path) -> None:
    data: Any = json.loads(gpt_oss().text())
    place = data
    for step in part[:-1]:
        place = place[step]
    place[part[-1]] = value
    with pytest.raises(LockError, match=says) as caught:
        load(json.dumps(data).encode(), tmp_path)
    assert str(tmp_path / "fusions.lock") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "isn't JSON"),
        ("<<<<<<< ours\n{}", "isn't JSON"),
        ("[1]", "it isn't a JSON object"),
        ('{"schema": 1, "fusions": {}, "fusions": {}}', "'fusions' is there twice"),
        (" " * (LARGEST_BYTES + 1), "has more than 1048576 bytes"),
    ],
)
def test_broken_files_are_one_line(text: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(LockError, match=says):
        load(text.encode(errors="surrogateescape"), tmp_path)


def test_files_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(LockError, match="can't be written: No such file or directory"):
        gpt_oss().save(tmp_path / "nowhere" / "fusions.lock")
    assert os.listdir(tmp_path) == []  # noqa: PTH208 - hidden files too


def test_settings_say_where_they_differ() -> None:
    changes = settings("1:64", tp=2).changes(settings(force=("act_padding",), tp=4))
    assert changes == {"ranges": ("1:64", "none"), "tp": ("2", "4"), "force": ("none", "act_padding")}


@pytest.mark.parametrize(
    "kernels",
    [{"a b c": ["layers.0-19999.x"]}, {f"a b c{index}": [f"norm{index}.x"] for index in range(10_000)}],
    ids=["layers", "kernels"],
)
def test_a_lock_of_very_many_places_is_compared_in_seconds(kernels: dict[str, list[str]], tmp_path: Path) -> None:
    asked = {"workload": "w", "device": "h200", "policy": "planned", "ranges": ["1:64"]}
    text = json.dumps({"schema": 1, "settings": asked, "fusions": {"1:64": kernels}}).encode()
    fusions = [*applied("act_padding", norms(range(200))), *applied("allreduce_rms", norms(range(200)))]
    start = time.process_time()
    lock = load(text, tmp_path)
    assert drifts(lock, report(graph(fusions, refusals=[refusal(None, place) for place in norms(range(200))])))
    assert time.process_time() - start < 8
