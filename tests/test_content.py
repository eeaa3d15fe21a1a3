"""Values by content: equal wherever they are equal, and different wherever they do something else."""

import dataclasses
import enum
import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fuseplan.content import MOST_DEPTH, MOST_VALUES, content_of

LIMIT = 3
SIZES = {2880: 3072}


def closing_over(limit: object) -> Callable[[object], bool]:
    return lambda x: x == limit


def by_default(limit: object) -> Callable[..., bool]:
    def check(x: object, limit: object = limit) -> bool:
        return x == limit

    return check


def by_keyword(limit: object) -> Callable[..., bool]:
    def check(x: object, *, limit: object = limit) -> bool:
        return x == limit

    return check


def by_name() -> int:
    return LIMIT + SIZES[2880]


def by_function() -> int:
    return by_name() + 1


def inner() -> Callable[[], int]:
    return lambda: LIMIT


class Kind(enum.Enum):
    A, B = "a", "b"


@dataclasses.dataclass(frozen=True)
class Fields:
    x: object
    y: object = None


class Plain:
    limit = 1

    def __init__(self, x: object) -> None:
        self.x = x

    def check(self, value: object) -> bool:
        return value == self.x


class Cached(Plain):
    @functools.cached_property
    def derived(self) -> list[object]:
        return [self.x]


def from_text(text: str) -> Any:
    """What is typed into a prompt: there is no file to read it from."""
    names: dict[str, Any] = {}
    exec(text, names)
    return names["f"]


# One text, two functions.
first, second = (lambda x: x + 1), (lambda x: x + 2)  # fmt: skip

DIFFERENT: dict[str, tuple[Any, Any]] = {
    "closures": (closing_over(1), closing_over(2)),
    "closures of one text": (closing_over(1), closing_over("1")),
    "numbers of other types": (closing_over(1), closing_over(True)),
    "closures over functions": (closing_over(closing_over(1)), closing_over(closing_over(2))),
    "defaults": (by_default(1), by_default(2)),
    "keywords": (by_keyword(1), by_keyword(2)),
    "lambdas on one line": (first, second),
    "no source": (from_text("f = lambda x: x + 1"), from_text("f = lambda x: x - 1")),
    "constants inside": (from_text("def f():\n return [lambda: 1]"), from_text("def f():\n return [lambda: 2]")),
    "attributes": (from_text("f = lambda x: x.a"), from_text("f = lambda x: x.b")),
    "partials": (functools.partial(by_default(1), 1), functools.partial(by_default(1), 2)),
    "methods": (Plain(1).check, Plain(2).check),
    "instances": (Plain(1), Plain(2)),
    "classes": (type("C", (Plain,), {"limit": 2}), type("C", (Plain,), {"limit": 3})),
    "methods of classes": (type("C", (), {"f": first}), type("C", (), {"f": second})),
    "class methods": (type("C", (), {"f": classmethod(first)}), type("C", (), {"f": classmethod(second)})),
    "properties": (type("C", (), {"f": property(first)}), type("C", (), {"f": property(second)})),
    "fields": (Fields(1), Fields(2)),
    "which field": (Fields(1, None), Fields(None, 1)),
    "members": (Kind.A, Kind.B),
    "sets": ({"a", "b"}, {"a", "c"}),
    "mappings": ({"a": 1}, {"a": 2}),
    "sequences": ([1, [2]], [[1], 2]),
    "lists and tuples": ([1], (1,)),
    "dtypes": (torch.float16, torch.bfloat16),
    "tensors": (torch.zeros(2), torch.zeros(3)),
    "ops": (torch.ops.aten.add.Tensor, torch.ops.aten.sub.Tensor),
    "cached functions": (functools.lru_cache(first), functools.lru_cache(second)),
    "kernels of other packages": (SimpleNamespace(fn=first), SimpleNamespace(fn=second)),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_does_something_else_is_something_else(name: str) -> None:
    left, right = DIFFERENT[name]
    assert content_of(left) != content_of(right)
    assert content_of(left) == content_of(left)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (closing_over(1), closing_over(1)),
        (closing_over([1]), closing_over([1])),
        (from_text("f = lambda x: x + 1"), from_text("\n\n# elsewhere\nf = lambda x: x + 1")),
        (Plain([1]), Plain([1])),
        (Plain(1).check, Plain(1).check),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        ({"a", "b", "c"}, {"c", "b", "a"}),
        ([(shared := [1]), shared], [[1], [1]]),
        (torch.zeros(2), torch.ones(2)),
        (object(), object()),
        (nn.Linear(2, 2), nn.Linear(2, 2)),
    ],
)
def test_what_does_the_same_is_the_same(left: Any, right: Any) -> None:
    assert content_of(left) == content_of(right)


def test_what_a_function_names_in_its_module_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    functions = (by_name, by_function, inner)
    before = [content_of(function) for function in functions]
    monkeypatch.setattr(sys.modules[__name__], "LIMIT", 4)
    after = [content_of(function) for function in functions]
    assert not set(before) & set(after)
    monkeypatch.setitem(SIZES, 2880, 4096)
    assert content_of(by_function) not in (*before, *after)
    assert content_of(inner) == after[-1]


def test_what_is_computed_on_demand_changes_nothing() -> None:
    value = Cached(1)
    before = content_of(value)
    assert value.derived == [1]
    assert content_of(value) == before == content_of(Cached(1))


def test_cycles_and_large_values_end() -> None:
    cycle: list[Any] = []
    cycle.append(cycle)
    deep: Any = []
    for _ in range(10 * MOST_DEPTH):
        deep = [deep]
    recursive = closing_over(None)
    assert recursive.__closure__ is not None
    recursive.__closure__[0].cell_contents = recursive
    values: list[Any] = [cycle, deep, [[] for _ in range(2 * MOST_VALUES)], recursive, nn.Sequential(nn.Linear(2, 2))]
    for value in values:
        assert content_of(value) == content_of(value)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner) | st.frozensets(st.text()),
    max_leaves=8,
)


@given(VALUES, VALUES)
def test_data_is_the_same_where_it_is_equal(left: Any, right: Any) -> None:
    assert (content_of(left) == content_of(right)) == (repr(left) == repr(right) or _ordered(left) == _ordered(right))


def _ordered(value: Any) -> Any:
    """As text, without the order of mappings and sets."""
    if isinstance(value, dict):
        return ["dict", sorted((repr(key), _ordered(item)) for key, item in value.items())]
    if isinstance(value, frozenset):
        return ["set", sorted(value)]
    return [_ordered(item) for item in value] if isinstance(value, list) else repr(value)


def test_another_process_finds_the_same() -> None:
    """With other addresses, and other hashes of texts."""
    code = (
        "from tests.test_content import DIFFERENT, by_function\n"
        "from fuseplan.content import content_of\n"
        "for name, (left, right) in DIFFERENT.items():\n"
        "    print(content_of(left), content_of(right))\n"
        "print(content_of(by_function))\n"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    root = Path(__file__).parents[1]
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    here = [f"{content_of(left)} {content_of(right)}" for left, right in DIFFERENT.values()]
    assert run.stdout.splitlines() == [*here, content_of(by_function)]
