"""Values by content: data is equal wherever it is equal, and what a user's code does its `uuid()` alone can say."""

import dataclasses
import enum
import functools
import os
from collections.abc import Callable
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import fx
from torch._inductor.pattern_matcher import PatternMatcherPass

from fuseplan.caching.content import Content, Known, content_of, lacking, own_key
from fuseplan.caching.fingerprint import provider_content, rule_content
from fuseplan.config import PassConfig
from fuseplan.providers import BUILT_IN_PROVIDERS, Offer, device_profile
from fuseplan.providers.gates import accept_all
from fuseplan.rules import Rule
from fuseplan.rules.families import BUILT_IN_RULES
from tests.caching.elsewhere import elsewhere
from tests.forks import Forks


class Kind(enum.Enum):
    A, B = "a", "b"


DIFFERENT: dict[str, tuple[Any, Any]] = {
    "numbers of other types": ([1], [True]),
    "numbers and texts": ([1, None], ["1", "None"]),
    "bytes and texts": (b"a", "a"),
    "floats": (0.5, 0.25),
    "members": (Kind.A, Kind.B),
    "sets": ({"a", "b"}, {"a", "c"}),
    "mappings": ({"a": 1}, {"a": 2}),
    "sequences": ([1, [2]], [[1], 2]),
    "lists and tuples": ([1], (1,)),
    "dtypes": (torch.float16, torch.bfloat16),
    "ops": (torch.ops.aten.add.Tensor, torch.ops.aten.sub.Tensor),
    "paths": (Path("a"), Path("b")),
    "fields": (PassConfig(), PassConfig(node_budget=7)),
    "which field": (PassConfig(fuse_act_quant=False), PassConfig(eliminate_noops=False)),
    "what a function of fuseplan's is": ([accept_all], [content_of]),
    "what it is called with": (functools.partial(accept_all, 1), functools.partial(accept_all, 2)),
    "rules": (BUILT_IN_RULES[0], BUILT_IN_RULES[1]),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_is_something_else_is_something_else(name: str) -> None:
    left, right = map(content_of, DIFFERENT[name])
    assert left.digest != right.digest
    assert left.key != right.key
    assert left.is_same(content_of(DIFFERENT[name][0]))
    assert not left.is_same(right)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        ({"a", "b", "c"}, {"c", "b", "a"}),
        ([(shared := [1]), shared], [[1], [1]]),
        (PassConfig(), PassConfig()),
    ],
)
def test_what_is_the_same_is_the_same(left: Any, right: Any) -> None:
    assert content_of(left).key == content_of(right).key is not None


def test_what_a_class_of_fuseplans_was_given_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rule, "check", lambda self, m: None)
    assert rule_content(BUILT_IN_RULES[0]).key is None


def test_what_is_computed_on_demand_changes_nothing() -> None:
    rule = BUILT_IN_RULES[0]
    vars(rule).pop("traced_pattern", None)
    before = content_of(rule).key
    assert rule.traced_pattern
    assert content_of(rule).key == before


def fields(content: Content) -> tuple[str, tuple[Any, ...]]:
    return content.digest, content.users


def test_what_was_read_before_counts_as_if_it_was_not() -> None:
    loop: list[Any] = [BUILT_IN_RULES[0]]
    loop.append(loop)
    theirs = [by_environment]
    values = [*BUILT_IN_RULES, [loop, BUILT_IN_RULES[0]], loop, [theirs, theirs], theirs, [os.system, theirs]]
    for order in (values, values[::-1]):
        known: Known = {}
        assert [fields(content_of(each, known)) for each in order] == [fields(content_of(each)) for each in order]


def test_all_that_fuseplan_ships_has_a_key() -> None:
    for device in (None, device_profile("h200"), device_profile("mi355x")):
        providers = [provider_content(each, device) for each in BUILT_IN_PROVIDERS]
        contents = [*map(rule_content, BUILT_IN_RULES), *providers]
        assert [each.users for each in contents] == [()] * len(contents)
        assert len({each.key for each in contents}) == len(contents)


def by_environment(graph: fx.Graph) -> None:
    graph.scale = os.environ["SCALE"]  # type: ignore[attr-defined]


class Slotted:
    __slots__ = ("scale",)

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __call__(self, graph: fx.Graph) -> None:
        """Nothing."""

    def rescale(self, graph: fx.Graph) -> None:
        """Nothing."""


@dataclasses.dataclass(frozen=True)
class Fields:
    scale: float

    def run(self, graph: fx.Graph) -> None:
        """Nothing."""


class Numbers(dict[str, float]):
    """Looks like data, and may look up anything."""


def rule_with_another_check() -> Rule:
    """A rule of fuseplan's, changed from outside."""
    rule = Rule()
    rule.check = lambda m: None  # type: ignore[method-assign]
    return rule


def lends_its_name(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*arguments: Any) -> Any:
        return function(*arguments)

    return wrapper


def said(uuid: Any) -> Slotted:
    """An object whose `uuid` is that."""

    class Said(Slotted):
        pass

    Said.uuid = uuid  # type: ignore[attr-defined]
    return Said(1.0)


def fails(self: Any) -> str:
    raise ZeroDivisionError("division\nby zero")


def versioned(function: Callable[..., Any], uuid: Any) -> Callable[..., Any]:
    function.uuid = uuid  # type: ignore[attr-defined]
    return function


WITHOUT: dict[str, Callable[[], Any]] = {
    "function": lambda: by_environment,
    "lambda": lambda: lambda graph: None,
    "slots": lambda: Slotted(3.0),
    "data": lambda: Fields(3.0),
    "method": lambda: Fields(3.0).run,
    "partial": lambda: functools.partial(by_environment, fx.Graph()),
    "cached": lambda: functools.lru_cache(by_environment),
    "tensor": lambda: torch.ones(2),
    "namespace": lambda: SimpleNamespace(fn=by_environment),
    "mapping": lambda: Numbers(scale=3.0),
    "patterns": PatternMatcherPass,
    "within fuseplan's": lambda: Offer(accepts=by_environment),
    "rule of fuseplan's kind": rule_with_another_check,
    "method for fuseplan's": lambda: MethodType(by_environment, BUILT_IN_RULES[0]),
    "name of fuseplan's": lambda: lends_its_name(accept_all),
    "name of what has one": lambda: lends_its_name(versioned(lambda graph: None, "1")),
    "None": lambda: said(lambda self: None),
    "nothing": lambda: said(lambda self: ""),
    "error": lambda: said(fails),
    "not to be pickled": lambda: said(lambda self: lambda: None),
    "of the class": lambda: type(said(lambda self: "1")),
}


@pytest.mark.parametrize("name", WITHOUT)
def test_what_may_do_something_else_has_no_key(name: str) -> None:
    value = WITHOUT[name]()
    content = content_of([1, value])
    assert content.users
    assert content.key is None
    assert content.is_same(content_of([1, value])), "but it is itself"
    assert not content.is_same(content_of([2, value]))
    others = content_of([1, WITHOUT[name]()])
    if others.users[0] is not content.users[0]:
        assert not content.is_same(others)


@pytest.mark.parametrize(
    ("uuid", "says"),
    [
        (None, "it has no uuid()"),
        (lambda self: None, "its uuid() is None"),
        (lambda self: b"", "its uuid() is b''"),
        (fails, "its uuid() fails: ZeroDivisionError: division by zero"),
        ("1", None),
        (lambda self: ("name", 3), None),
    ],
)
def test_it_says_what_is_wrong_with_a_uuid(uuid: Any, says: str | None) -> None:
    assert lacking(said(uuid)) == says
    assert (own_key(said(uuid)) is None) == (says is not None)


WITH: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "text": (lambda: said("1"), lambda: said("2")),
    "bytes": (lambda: said(lambda self: b"1"), lambda: said(lambda self: b"2")),
    "anything": (lambda: said(lambda self: (1, "a")), lambda: said(lambda self: (1, "b"))),
    "functions": (lambda: versioned(lambda graph: None, "1"), lambda: versioned(lambda graph: None, "2")),
    "arguments": (
        lambda: functools.partial(versioned(lambda graph, scale: None, "1"), scale=1),
        lambda: functools.partial(versioned(lambda graph, scale: None, "1"), scale=2),
    ),
    "methods": (lambda: said("1").__call__, lambda: said("1").rescale),
    "checks": (
        lambda: Offer(accepts=versioned(lambda m: None, "1")),
        lambda: Offer(accepts=versioned(lambda m: None, "2")),
    ),
}


@pytest.mark.parametrize("name", WITH)
def test_what_has_a_uuid_counts_by_it(name: str) -> None:
    one, other = WITH[name]
    assert content_of(one()).key == content_of(one()).key is not None
    assert content_of(one()).key != content_of(other()).key is not None
    assert content_of(one()).is_same(content_of(one()))
    assert not content_of(one()).is_same(content_of(other()))


def test_a_uuid_is_asked_each_time() -> None:
    scale = ["1"]
    content = content_of([said(lambda self: scale[0])])
    before = content.key
    scale[0] = "2"
    assert content.key not in (before, None)


def pairs() -> list[tuple[Any, Any]]:
    return [*DIFFERENT.values(), *((one(), other()) for one, other in WITH.values())]


def test_another_process_finds_the_same(forks: Forks) -> None:
    assert elsewhere(forks)[1:] == [f"{content_of(left).key} {content_of(right).key}" for left, right in pairs()]
