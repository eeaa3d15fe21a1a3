from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuseplan.report.places import MOST_PLACES, fold, module_of, places, unfold

COMPONENTS = st.sampled_from(
    ["layers", "0", "7", "11", "007", "norm", "norm1", "a-1", "1-2", "3,4", "=x", "norm x2", "", "-", "("]
)
PATHS = st.lists(COMPONENTS, max_size=4).map(".".join) | st.text(alphabet="ab.019-,= x()", max_size=12) | st.text()


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        ([], ""),
        (["norm"], "norm"),
        ([f"layers.{layer}.norm" for layer in range(36)], "layers.0-35.norm"),
        (["layers.0.a", "layers.2.a", "layers.3.a", "layers.1.b"], "layers.0,2-3.a, layers.1.b"),
        (["layers.1.experts.3", None], "layers.1.experts.3"),
        (["h100.layers.0.norm1", "h100.layers.1.norm1"], "h100.layers.0-1.norm1"),
        (["norm", "norm1", "norm2"], "norm, norm1-2"),
        (["layers.00.a", "layers.01.a"], "layers.00.a, layers.01.a"),
        (["model.py:3", "model.py:4"], "model.py:3-4"),
    ],
)
def test_places_fold_layers(sources: list[str | None], expected: str) -> None:
    assert places(sources) == expected


@pytest.mark.parametrize(
    ("counts", "lines"),
    [
        ({}, ()),
        ({"norm": 1, "norm1": 1, "norm2": 1}, ("norm", "norm1-2")),
        ({f"layers.{layer}.norm": 1 for layer in range(36) if layer != 7}, ("layers.0-6,8-35.norm",)),
        ({"layers.0.norm": 2, "layers.1.norm": 2, "layers.2.norm": 1}, ("layers.2.norm", "layers.0-1.norm x2")),
        ({None: 3, "norm": 1}, ("(no module) x3", "norm")),
        ({"block-1-2": 1, "=": 1, "norm x2": 3}, ("== x1", "=block-1-2 x1", "=norm x2 x3")),
        ({"a.0--3": 1, "b.0-": 1, "c x0": 1, "d-1": 1}, ("=a.0--3 x1", "=b.0- x1", "=c x0 x1", "d-1")),
    ],
)
def test_lines_are_few_and_sorted(counts: dict[str | None, int], lines: tuple[str, ...]) -> None:
    assert fold(counts) == lines
    assert unfold(lines) == Counter(counts)


@given(st.dictionaries(st.none() | PATHS, st.integers(min_value=1, max_value=99), max_size=12))
def test_what_is_folded_can_be_read_back(counts: dict[str | None, int]) -> None:
    lines = fold(counts)
    assert unfold(lines) == Counter(counts)
    assert fold(dict(reversed(counts.items()))) == lines


def test_one_layer_less_changes_one_line() -> None:
    names = [f"layers.{layer}.{name}" for layer in range(36) for name in "abc"]
    before, after = ({*fold(dict.fromkeys(each, 1))} for each in (names, [n for n in names if n != "layers.7.b"]))
    assert len(before - after) == 1


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (["layers.1-1.a"], "don't ascend"),
        (["layers.0-3,2.a"], "don't ascend"),
        (["layers.0,1.a"], "aren't in as few runs as can be"),
        (["layers.0-3.norm x0"], "'layers.0-3.norm x0' isn't a line of places such as"),
        (["layers.0-3.norm x2 x2"], "isn't a line of places such as"),
        (["layers.0--3.norm"], "isn't a line of places such as"),
        (["layers.,3.norm"], "isn't a line of places such as"),
        (["=norm"], "'=norm' isn't a line of places such as"),
        (["layers.0-3-5.a"], "isn't a run of numbers"),
        (["layers.00-3.a"], "isn't a run of numbers"),
        (["layers.0-1.experts.0-3"], "two lists of numbers"),
        (["layers.0-6.a", "layers.3.a"], r"layers\.3\.a is there twice"),
        (["(no module)", "(no module) x2"], r"\(no module\) is there twice"),
        ([f"layers.0-{MOST_PLACES}.a"], "more than 100000 places"),
        (["a x60000", "b x60000"], "more than 100000 places"),
    ],
)
def test_lines_that_contradict_themselves_are_refused(lines: list[str], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        unfold(lines)


def test_lines_of_code_are_no_modules() -> None:
    assert module_of("layers.0.norm") == "layers.0.norm"
    assert module_of("model.py:12") is None
    assert module_of(None) is None
