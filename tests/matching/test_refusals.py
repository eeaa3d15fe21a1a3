"""Why what has all ops of a pattern is refused, on which line, and in which order matches come, in written graphs."""

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._higher_order_ops.auto_functionalize import auto_functionalized

from fuseplan.dialect import ops
from fuseplan.dialect.raising import canonicalize
from fuseplan.graph.canonical import CanonicalGraph
from fuseplan.graph.facts import aten
from fuseplan.matching import Matches, find_matches
from fuseplan.matching.candidates import matches_of, missing_ops, op_name
from fuseplan.providers import PROFILES, Offer, Provider
from fuseplan.record import Nearness, Reason, Refusal
from fuseplan.rules import Bindings, Rule, by_name
from fuseplan.rules.families import BUILT_IN_RULES
from tests.helpers import llama, quickly_canonical, randn, written
from tests.matching.placed import NormAdded, NormTanh, line_of, placed

RULES = by_name(BUILT_IN_RULES)
INPUTS = {"x": randn(12, 64), "r": randn(12, 64, seed=1), "w": torch.ones(64, dtype=torch.bfloat16)}
Model = Callable[[Any, Any, Any], Any]


class NormAlone(NormAdded):
    """The same without it."""

    name = "norm_alone"

    def pattern(self, x: Any, weight: Any, other: Any, eps: Any, rounding: Any) -> Any:
        return aten.add.Tensor(aten.tanh.default(ops.rms_norm(x, weight, eps, rounding)), other)

    def replacement(self, x: Any, weight: Any, other: Any, eps: Any, rounding: Any) -> Any:
        return (ops.rms_norm_pad(x, weight, eps, rounding, 0),)


def norm(x: Any, w: Any, eps: float = 1e-5) -> Any:
    return ops.rms_norm(x, w, eps, "llama")


def provider(*names: str, name: str = "a", **offer: Any) -> Provider:
    made = Offer(**offer)
    return Provider(
        name=name, description="", vendors=frozenset({"nvidia"}), package=None, install="",
        implements=dict.fromkeys(names or ("rms_norm_pad",), made),
    )  # fmt: skip


def canonical_of(model: Model) -> CanonicalGraph:
    return canonicalize(placed(written(model, INPUTS), {"rms_norm_default": "layers.0.norm"}))


def found(model: Model, *rules: Rule, providers: tuple[Provider, ...] = (), **options: Any) -> Matches:
    return find_matches(canonical_of(model), by_name(rules), providers or (provider(),), PROFILES["h200"], **options)


def refused(model: Model, rule: Rule, **fields: Any) -> Refusal:
    """The only miss, which says this."""
    matches = found(model, rule)
    assert matches.candidates == ()
    (miss,) = matches.misses
    assert miss.rule is rule
    assert matches.refusals == (miss.refusal,)
    refusal = miss.refusal
    assert (refusal.rule, refusal.op, refusal.site) == (rule.name, "rms_norm", "layers.0.norm")
    assert (refusal.nearness, refusal.provider) == (Nearness.REFUSED, None)
    assert {name: getattr(refusal, name) for name in fields} == fields
    return refusal


tanh, add, exp = aten.tanh.default, aten.add.Tensor, aten.exp.default

REFUSED: dict[str, tuple[Model, Rule, dict[str, Any]]] = {
    "a value that another op reads": (
        lambda x, r, w: (tanh(y := norm(x, w)), exp(y)),
        NormTanh(),
        {"reason": Reason.USERS, "detail": "rms_norm (rms_norm_default) is also read by aten.exp.default "
         "(exp_default), and rms_norm_pad doesn't yield it", "nodes": ("exp_default", "rms_norm_default"),
         "expected": "no other reader of rms_norm", "found": "aten.exp.default", "code": "exp_default",
         "source": "model.py:5", "line": "model.py:5"},
    ),
    "a value that is returned, itself": (
        lambda x, r, w: (tanh(y := norm(x, w)), y),
        NormTanh(),
        {"detail": "rms_norm (rms_norm_default) is returned from the graph, too, and rms_norm_pad doesn't yield it",
         "nodes": ("output", "rms_norm_default"), "found": "output", "code": "rms_norm_default",
         "source": "layers.0.norm"},
    ),
    "the first reader of the first value": (
        lambda x, r, w: (
            add(z := tanh(y := norm(x, w)), r), aten.sin.default(z), exp(y), aten.cos.default(y)
        ),
        NormAlone(),
        {"nodes": ("exp_default", "rms_norm_default")},
    ),
    "a value inside that is an argument, too": (
        lambda x, r, w: add(z := tanh(norm(x, w)), z),
        NormAlone(),
        {"reason": Reason.USERS, "found": "rms_norm", "expected": "no other reader of aten.tanh.default",
         "detail": "aten.tanh.default (tanh_default) is the other of rms_norm_pad, too", "nodes": ("tanh_default",),
         "code": "tanh_default"},
    ),
    "a reader by strides": (
        lambda x, r, w: (add(y := norm(x, w), r), aten.as_strided.default(y, [3], [64], 1)),
        NormAdded(),
        {"reason": Reason.LAYOUT, "detail": "aten.as_strided.default (as_strided_default) reads the memory of rms_norm "
         "(rms_norm_default) by its strides", "nodes": ("as_strided_default", "rms_norm_default"),
         "code": "as_strided_default", "expected": "readers by shape", "found": "aten.as_strided.default",
         "mend": "index, slice or reshape instead"},
    ),
    "an argument that depends on a result": (
        lambda x, r, w: add(y := norm(x, w), exp(y)),
        NormAdded(),
        {"reason": Reason.CYCLE, "mend": None, "detail": "an input of the fused op depends on one of its results",
         "nodes": ("rms_norm_default", "add_tensor"), "code": "add_tensor"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused_is_told(what: str) -> None:
    model, rule, fields = REFUSED[what]
    refused(model, rule, **fields)


def test_what_a_rule_yields_others_may_read() -> None:
    canonical = canonical_of(lambda x, r, w: (add(y := norm(x, w), r), exp(y), y))
    ((match, refusal),) = matches_of(NormAdded(), canonical)
    assert refusal is None
    assert [node.name for node in match.consumed] == ["rms_norm_default", "add_tensor"]
    assert [node and node.name for node in match.outputs] == ["add_tensor", "rms_norm_default"]
    assert match.core.name == "rms_norm_default"


def written_between(*, to: str, before: bool = False, later: bool = False) -> Model:
    """In-place ops before a norm, between it and a tanh, and behind both."""

    def model(x: Any, r: Any, w: Any) -> Any:
        other = aten.sin.default(r)
        if before:
            aten.neg_.default(other)
        y = norm(x, w)
        aten.mul_.Tensor({"x": x, "w": w, "other": other, "y": y}[to], 2.0)
        if later:
            aten.exp_.default(other)
        z = aten.tanh.default(y)
        aten.abs_.default(other)
        return z, other

    return model


@pytest.mark.parametrize("more", [{}, {"before": True}, {"later": True}, {"before": True, "later": True}])
def test_the_first_in_place_op_between_two_nodes_is_named(more: dict[str, bool]) -> None:
    refused(
        written_between(to="other", **more), NormTanh(), reason=Reason.MUTATION, code="mul__tensor",
        detail="aten.mul_.Tensor (mul__tensor), an in-place op, stands between two nodes of the match",
        nodes=("mul__tensor", "rms_norm_default", "tanh_default"), expected="no in-place op",
        found="aten.mul_.Tensor", mend="write in place before or after all of them",
    )  # fmt: skip


@pytest.mark.parametrize("to", ["x", "w"])
@pytest.mark.parametrize("later", [False, True])
def test_one_that_writes_to_what_is_read_can_not_be_moved(to: str, later: bool) -> None:
    refused(written_between(to=to, later=later), NormTanh(), mend=None)


def test_in_place_ops_around_a_match_are_no_matter() -> None:
    def model(x: Any, r: Any, w: Any) -> Any:
        aten.neg_.default(r)
        z = aten.tanh.default(norm(x, w))
        aten.abs_.default(r)
        return z

    ((_, refusal),) = matches_of(NormTanh(), canonical_of(model))
    assert refusal is None


@pytest.mark.parametrize("known", [False, True])
def test_a_group_of_other_processes(known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if known:
        monkeypatch.setattr("fuseplan.matching.candidates.group_size", {"g": 4}.get)
    (rule,) = [each for each in RULES["allreduce_rms"] if each.op.name == "all_reduce_rms_norm"]
    canonical = canonical_of(lambda x, r, w: norm(ops.all_reduce(x, "g"), w))
    ((match, refusal),) = matches_of(rule, canonical)
    assert match.values["group_name"] == "g"
    if known:
        assert refusal is None
    else:
        assert refusal is not None
        assert refusal.reason is Reason.GROUP
        assert refusal.detail == "the process group 'g' of the all-reduce isn't known in this process"
        assert (refusal.expected, refusal.found) == ("a group of this process", "group 'g'")
        assert refusal.mend == "initialise torch.distributed and the group before the model is compiled"
        assert (refusal.nodes, refusal.code) == (("rms_norm_default",), "rms_norm_default")


# What a rule's own check says.


class Checked(NormAlone):
    """Refuses because of one of its variables."""

    name = "checked"

    def __init__(self, variable: str, source: str | None = None) -> None:
        self.variable, self.source = variable, source

    def check(self, m: Bindings) -> Refusal | None:
        refusal = m.refuse(Reason.SIZE, self.variable, f"it is {self.variable}", "take another")
        return Refusal(**{**vars(refusal), "source": self.source})


def checked_model(x: Any, r: Any, w: Any) -> Any:
    """A pad that is raised has another name there."""
    wide = aten.constant_pad_nd.default(aten.sin.default(r), [0, 0])
    return aten.add.Tensor(aten.tanh.default(norm(x, w)), aten.cos.default(wide))


@pytest.mark.parametrize(
    ("variable", "nodes", "code"),
    [
        ("x", ("x",), "rms_norm_default"), ("weight", ("w",), "rms_norm_default"),
        ("other", ("cos_default",), "add_tensor"), ("eps", (), "rms_norm_default"),
    ],
)  # fmt: skip
def test_what_a_check_refuses_is_told_on_the_line_that_reads_it(
    variable: str, nodes: tuple[str, ...], code: str
) -> None:  # fmt: skip
    refused(
        checked_model, Checked(variable), reason=Reason.SIZE, detail=f"it is {variable}", mend="take another",
        nodes=nodes, code=code, source="layers.0.norm", line=line_of(canonical_of(checked_model).original, code),
    )  # fmt: skip
    refused(checked_model, Checked(variable, source="elsewhere"), source="elsewhere")


def test_of_two_readers_it_is_the_first_one() -> None:
    refused(lambda x, r, w: add(tanh(norm(x, w)), x), Checked("x"), code="rms_norm_default")


def test_names_are_those_of_the_users_graph() -> None:
    """There the other norm ends in a product."""

    def model(x: Tensor, r: Tensor, w: Tensor) -> Tensor:
        return torch.tanh(llama(x, None, w)[0]) + llama(r, None, w)[0]

    canonical = quickly_canonical(model, *INPUTS.values())
    ((match, refusal),) = matches_of(Checked("other"), canonical)
    assert match.values["other"].target is ops.rms_norm.overload
    assert refusal is not None
    assert refusal.nodes == (canonical.origin[match.values["other"]].name,)
    assert refusal.nodes[0].startswith("mul")


# What comes of all matches.


def test_matches_come_in_the_order_of_the_graph_then_by_rule_and_provider() -> None:
    def model(x: Any, r: Any, w: Any) -> Any:
        first = aten.add.Tensor(aten.tanh.default(norm(x, w)), r)
        return ops.pad(norm(r, w), 28), first, ops.pad(norm(x, w, 1e-6), 12)

    class Twin(NormAlone):
        name = "twin"

    providers = provider(name="b"), provider(name="a")
    rules = [Twin(), NormAlone(), *RULES["act_padding"]]
    expected = [
        ("add_tensor", "norm_alone", "a"), ("add_tensor", "norm_alone", "b"), ("add_tensor", "twin", "a"),
        ("add_tensor", "twin", "b"), ("pad_default", "act_padding", "a"), ("pad_default", "act_padding", "b"),
        ("pad_default_1", "act_padding", "a"), ("pad_default_1", "act_padding", "b"),
    ]  # fmt: skip
    for given in (rules, rules[::-1]):
        for asked in (providers, providers[::-1]):
            matches = found(model, *given, providers=asked)
            each = [(match.anchor.name, match.rule.name, match.provider) for match in matches.candidates]
            assert sorted(each) == sorted(expected)
            assert each == expected


def test_one_refusal_does_not_keep_others_from_being_looked_at() -> None:
    def model(x: Any, r: Any, w: Any) -> Any:
        y = norm(x, w)
        return aten.tanh.default(y), y, aten.tanh.default(norm(r, w))

    matches = found(model, NormTanh())
    assert [match.anchor.name for match in matches.candidates] == ["tanh_default_1"]
    (miss,) = matches.misses
    assert (miss.anchor.name, [node.name for node in miss.consumed]) == (
        "tanh_default", ["rms_norm_default", "tanh_default"],
    )  # fmt: skip
    assert miss.refusal.reason is Reason.USERS


def test_what_is_for_another_rule_is_not_even_refused() -> None:
    class Picky(NormTanh):
        name = "picky"

        def takes(self, core: fx.Node, consumed: Any) -> bool:
            assert core in consumed
            return core.name != "rms_norm_default"

    def model(x: Any, r: Any, w: Any) -> Any:
        return aten.tanh.default(norm(x, w)), aten.tanh.default(norm(r, w))

    matches = found(model, Picky())
    assert [match.anchor.name for match in matches.candidates] == ["tanh_default_1"]
    assert matches.misses == ()


def test_a_result_that_is_dead_is_none_of_a_matchs() -> None:
    for read, total in ((False, None), (True, "getitem_1")):

        def model(x: Any, r: Any, w: Any, read: bool = read) -> Any:
            results = ops.fused_add_rms_norm(x, r, w, 1e-5, "llama")
            return ops.pad(results[0], 28), results[1] if read else None

        matches = found(model, *RULES["act_padding"], providers=(provider("fused_add_rms_norm_pad"),))
        (match,) = matches.candidates
        assert [node and node.name for node in match.outputs] == ["pad_default", "getitem", total]
        assert len(match.consumed) == 3 + read


# What isn't there at all.


def test_ops_that_every_member_of_a_rule_misses() -> None:
    canonical = canonical_of(lambda x, r, w: aten.tanh.default(norm(x, w)))
    padding, reducing = RULES["act_padding"], RULES["allreduce_rms_padding"]
    assert missing_ops(canonical, [NormTanh()]) == []
    assert missing_ops(canonical, padding) == ["pad"], "the fewest of a member: the other one lacks its norm, too"
    assert missing_ops(canonical, reducing) == ["all_reduce", "pad"]
    assert missing_ops(canonical, [*reducing, NormTanh()]) == []
    assert missing_ops(canonical, [NormAlone()]) == ["aten.add.Tensor"]


def test_what_a_node_calls() -> None:
    with torch.library._scoped_library("named", "DEF") as library:
        library.define("bump_(Tensor(a!) x) -> ()")
        graph = fx.Graph()
        x = graph.placeholder("x")
        bumped = graph.call_function(auto_functionalized, (torch.ops.named.bump_.default,), {"x": x})
        called = {
            "rms_norm": graph.call_function(ops.rms_norm.overload, (x, x, 1e-5, "llama")),
            "aten.tanh.default": graph.call_function(aten.tanh.default, (x,)),
            "named.bump_.default": bumped,
        }
        split = graph.call_function(aten.split.Tensor, (x, 2))
        assert op_name(graph.call_function(operator.getitem, (split, 0))) == "aten.split.Tensor"
        assert op_name(graph.call_function(operator.getitem, (bumped, 1))) == "named.bump_.default"
        assert op_name(graph.call_function(operator.getitem, ((x, x), 1))) == str(operator.getitem)
        assert op_name(graph.call_function(torch.relu, (x,))) == str(torch.relu)
        assert op_name(x) == "x"
        for name, node in called.items():
            assert op_name(node) == name
