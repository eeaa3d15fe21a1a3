"""Why what has all ops of a pattern is refused, on which line, and in which order matches come; which providers take a
match, and what is said of those that don't; in written graphs.
"""

import math
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from fuseplan.dialect import ops
from fuseplan.dialect.raising import canonicalize
from fuseplan.graph.facts import aten
from fuseplan.matching import Match, Matches, find_matches
from fuseplan.matching.candidates import matches_of, missing_ops, op_name
from fuseplan.providers import PROFILES, Offer, Provider
from fuseplan.record import Nearness, Reason, Refusal
from fuseplan.rules import Bindings, Rule, by_name
from tests.helpers import randn, written
from tests.matching.placed import RULES, Model, NormAdded, NormTanh, canonical_of, line_of, norm

PADDING = {"act_padding": RULES["act_padding"]}
H200 = PROFILES["h200"]


class NormAlone(NormAdded):
    """The same without it."""

    name = "norm_alone"

    def pattern(self, x: Any, weight: Any, other: Any, eps: Any, rounding: Any) -> Any:
        return aten.add.Tensor(aten.tanh.default(ops.rms_norm(x, weight, eps, rounding)), other)

    def replacement(self, x: Any, weight: Any, other: Any, eps: Any, rounding: Any) -> Any:
        return (ops.rms_norm_pad(x, weight, eps, rounding, 0),)


def provider(name: str, op: str = "rms_norm_pad", *, offer: Offer | None = None, **more: Any) -> Provider:
    """One that serves every vendor by one op."""
    offers = more.pop("implements", {op: offer or Offer()})
    made = {"vendors": frozenset({"nvidia", "amd", "cpu"}), "install": "", **more}
    return Provider(name=name, description="", package=None, implements=offers, **made)


SITE = {"rms_norm_default": "layers.0.norm"}


def matched(model: Model, *rules: Rule, providers: tuple[Provider, ...] = ()) -> Matches:
    return find_matches(canonical_of(model, SITE), by_name(rules), providers or (provider("a"),), H200)


def refused(model: Model, rule: Rule, **fields: Any) -> Refusal:
    """The only miss, which says this."""
    matches = matched(model, rule)
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
         "fix": "index, slice or reshape instead"},
    ),
    "an argument that depends on a result": (
        lambda x, r, w: add(y := norm(x, w), exp(y)),
        NormAdded(),
        {"reason": Reason.CYCLE, "fix": None, "detail": "an input of the fused op depends on one of its results",
         "nodes": ("rms_norm_default", "add_tensor"), "code": "add_tensor"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused_is_told(what: str) -> None:
    model, rule, fields = REFUSED[what]
    refused(model, rule, **fields)


def test_what_a_rule_yields_others_may_read() -> None:
    ((match, refusal),) = matches_of(NormAdded(), canonical_of(lambda x, r, w: (add(y := norm(x, w), r), exp(y), y)))
    assert refusal is None
    assert [node.name for node in match.consumed] == ["rms_norm_default", "add_tensor"]
    assert [node and node.name for node in match.outputs] == ["add_tensor", "rms_norm_default"]
    assert match.core.name == "rms_norm_default"


@pytest.mark.parametrize("to", ["x", "w", "other"])
@pytest.mark.parametrize("later", [False, True])
def test_the_first_in_place_op_between_two_nodes_is_named(to: str, later: bool) -> None:
    """One that writes to what is read can't be moved."""

    def model(x: Any, r: Any, w: Any) -> Any:
        other = aten.sin.default(r)
        aten.neg_.default(other)
        y = norm(x, w)
        aten.mul_.Tensor({"x": x, "w": w, "other": other}[to], 2.0)
        if later:
            aten.exp_.default(other)
        z = tanh(y)
        aten.abs_.default(other)
        return z, other

    refused(
        model, NormTanh(), reason=Reason.MUTATION, code="mul__tensor",
        detail="aten.mul_.Tensor (mul__tensor), an in-place op, stands between two nodes of the match",
        nodes=("mul__tensor", "rms_norm_default", "tanh_default"), expected="no in-place op",
        found="aten.mul_.Tensor", fix="write in place before or after all of them" if to == "other" else None,
    )  # fmt: skip


def test_in_place_ops_around_a_match_are_no_matter() -> None:
    def model(x: Any, r: Any, w: Any) -> Any:
        aten.neg_.default(r)
        z = aten.tanh.default(norm(x, w))
        aten.abs_.default(r)
        return z

    ((_, refusal),) = matches_of(NormTanh(), canonical_of(model, SITE))
    assert refusal is None


def test_a_group_of_other_processes() -> None:
    (rule,) = [each for each in RULES["allreduce_rms"] if each.op.name == "all_reduce_rms_norm"]
    ((_, refusal),) = matches_of(rule, canonical_of(lambda x, r, w: norm(ops.all_reduce(x, "g"), w)))
    assert refusal is not None
    assert refusal.reason is Reason.GROUP
    assert refusal.detail == "the process group 'g' of the all-reduce isn't known in this process"
    assert (refusal.expected, refusal.found) == ("a group of this process", "group 'g'")
    assert refusal.fix == "initialise torch.distributed and the group before the model is compiled"
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
        checked_model, Checked(variable), reason=Reason.SIZE, detail=f"it is {variable}", fix="take another",
        nodes=nodes, code=code, source="layers.0.norm", line=line_of(canonical_of(checked_model).original, code),
    )  # fmt: skip
    refused(checked_model, Checked(variable, source="elsewhere"), source="elsewhere")


def test_of_two_readers_it_is_the_first_one() -> None:
    refused(lambda x, r, w: add(tanh(norm(x, w)), x), Checked("x"), code="rms_norm_default")


# What comes of all matches.


def test_matches_come_in_the_order_of_the_graph_then_by_rule_and_provider() -> None:
    def model(x: Any, r: Any, w: Any) -> Any:
        first = aten.add.Tensor(aten.tanh.default(norm(x, w)), r)
        return ops.pad(norm(r, w), 28), first, ops.pad(norm(x, w, 1e-6), 12)

    class Twin(NormAlone):
        name = "twin"

    providers = provider("b"), provider("a")
    rules = [Twin(), NormAlone(), *RULES["act_padding"]]
    expected = [
        ("add_tensor", "norm_alone", "a"), ("add_tensor", "norm_alone", "b"), ("add_tensor", "twin", "a"),
        ("add_tensor", "twin", "b"), ("pad_default", "act_padding", "a"), ("pad_default", "act_padding", "b"),
        ("pad_default_1", "act_padding", "a"), ("pad_default_1", "act_padding", "b"),
    ]  # fmt: skip
    for given in (rules, rules[::-1]):
        for asked in (providers, providers[::-1]):
            matches = matched(model, *given, providers=asked)
            each = [(match.anchor.name, match.rule.name, match.provider) for match in matches.candidates]
            assert sorted(each) == sorted(expected)
            assert each == expected


def test_a_result_that_is_dead_is_none_of_a_matchs() -> None:
    for read, total in ((False, None), (True, "getitem_1")):

        def model(x: Any, r: Any, w: Any, read: bool = read) -> Any:
            results = ops.fused_add_rms_norm(x, r, w, 1e-5, "llama")
            return ops.pad(results[0], 28), results[1] if read else None

        matches = matched(model, *RULES["act_padding"], providers=(provider("a", "fused_add_rms_norm_pad"),))
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
    graph = fx.Graph()
    x = graph.placeholder("x")
    split = graph.call_function(aten.split.Tensor, (x, 2))
    for node, name in (
        (x, "x"), (split, "aten.split.Tensor"),
        (graph.call_function(ops.rms_norm.overload, (x, x, 1e-5, "llama")), "rms_norm"),
        (graph.call_function(operator.getitem, (split, 0)), "aten.split.Tensor"),
        (graph.call_function(operator.getitem, ((x, x), 1)), str(operator.getitem)),
        (graph.call_function(torch.relu, (x,)), str(torch.relu)),
    ):  # fmt: skip
        assert op_name(node) == name


# Which providers take a match.


def found(
    *providers: Provider, model: Model = lambda x, r, w: ops.pad(norm(x, w), 28), rules: Any = PADDING,
    device: Any = H200, **options: Any,
) -> Matches:  # fmt: skip
    return find_matches(canonical_of(model), rules, providers, device, **options)


def the_match(*providers: Provider, **options: Any) -> Match:
    """The only one, where no provider declines."""
    matches = found(*providers, **options)
    assert matches.misses == ()
    (match,) = matches.candidates
    return match


def the_refusal(*providers: Provider, **options: Any) -> Refusal:
    """Why, where no provider takes it and one says why."""
    matches = found(*providers, **options)
    assert matches.candidates == ()
    (miss,) = matches.misses
    assert miss.refusal.nearness is Nearness.REFUSED
    assert (miss.refusal.rule, miss.refusal.op) == ("act_padding", "rms_norm")
    assert miss.refusal.nodes == ("rms_norm_default",)
    return miss.refusal


def test_a_provider_that_takes_it_brings_its_cost_and_no_change() -> None:
    match = the_match(provider("a", offer=Offer(cost=2.5)))
    assert (match.provider, match.cost, match.shares, match.rounding_change) == ("a", 2.5, False, None)
    assert match.values["rounding"] == "llama"


def test_providers_of_other_ops_say_nothing_and_the_rest_come_by_name() -> None:
    others = provider("a", "fused_add_rms_norm_pad"), provider("d", "rms_norm_quant")
    matches = found(*others, provider("c"), provider("b"))
    assert [match.provider for match in matches.candidates] == ["b", "c"]
    assert matches.misses == ()
    refusal = the_refusal(*others)
    assert (refusal.reason, refusal.detail) == (Reason.PROVIDER, "no available provider implements rms_norm_pad")
    assert refusal.provider is None


def test_one_that_is_only_priced_is_offered_for_another_device_alone() -> None:
    priced = provider("a", implements={}, prices={"rms_norm_pad": Offer(cost=1.0)})
    assert the_match(priced).cost == 1.0
    assert found(priced, device=None).candidates == ()


@pytest.mark.parametrize("alone", [False, True])
def test_a_collective_kernel_in_workspaces_of_ours_shares_them(alone: bool, one_rank: str) -> None:
    rules = {"allreduce_rms": RULES["allreduce_rms"]}

    def model(x: Any, r: Any, w: Any) -> Any:
        return norm(ops.all_reduce(x, one_rank), w)

    mine = provider("a", "all_reduce_rms_norm", runs_alone=alone)
    assert the_match(mine, model=model, rules=rules).shares is alone
    assert the_match(provider("a", runs_alone=alone)).shares is False, "it is no collective"


def test_what_a_check_says_is_reported_as_it_is() -> None:
    why = Refusal(
        reason=Reason.SIZE, detail="rows of 64", expected="rows of 128", found="rows of 64", fix="widen the rows"
    )  # fmt: skip
    asked: list[Bindings] = []

    def accepts(m: Bindings) -> Refusal:
        asked.append(m)
        return why

    def most_rows(m: Bindings) -> int:
        asked.append(m)
        return 1

    refusal = the_refusal(provider("a", offer=Offer(accepts=accepts, most_rows=most_rows)), rows_of=rows(12, 12))
    assert (refusal.reason, refusal.detail, refusal.provider) == (Reason.SIZE, "rows of 64", "a")
    assert (refusal.expected, refusal.found, refusal.fix) == ("rows of 128", "rows of 64", "widen the rows")
    the_refusal(provider("a", offer=Offer(most_rows=most_rows)), rows_of=rows(12, 12))
    assert [(m.rule, m.right, tuple(m.x.shape)) for m in asked] == [("act_padding", 28, (12, 64))] * 2


def test_a_refusal_beside_a_match_is_no_more_than_declined() -> None:
    why = Refusal(reason=Reason.SIZE, detail="rows of 64")
    matches = found(provider("a", offer=Offer(accepts=lambda m: why)), provider("b"))
    assert [match.provider for match in matches.candidates] == ["b"]
    (miss,) = matches.misses
    assert (miss.refusal.nearness, miss.refusal.provider) == (Nearness.DECLINED, "a")
    assert matches.refusals == ()


# What a kernel rounds.


AS = "rounds as {}, and the graph as llama"
UNROUNDED, DIFFERS = "doesn't round the sum, as the graph does", "{}, not rounding the sum"


@pytest.mark.parametrize(
    ("roundings", "leaves_out", "differs", "taken"),
    [
        (["fp32", "llama"], None, None, "llama"), (["gpt_oss"], None, AS.format("gpt_oss"), "gpt_oss"),
        (["gpt_oss", "gemma", "fp32"], None, AS.format("fp32 or gpt_oss"), "fp32"),
        (["gemma"], None, AS.format("gemma"), None), (["another"], None, AS.format("another"), None),
        (["vllm_fp32_residual", "gemma"], None, AS.format("gemma or vllm_fp32_residual"), None),
        (None, "the sum", UNROUNDED, DIFFERS.format("llama")),
        (["llama"], "the sum", UNROUNDED, DIFFERS.format("llama")),
        (["fp32"], "the sum", f"{AS.format('fp32')}; it {UNROUNDED}", DIFFERS.format("fp32")),
    ],
)  # fmt: skip
def test_a_kernel_that_rounds_otherwise_is_refused_until_it_may(
    roundings: list[str] | None, leaves_out: str | None, differs: str | None, taken: str | None
) -> None:
    """Then the nearest by name takes its place; one of another formula never does."""
    allowed = None if roundings is None else frozenset(roundings)
    kernel = provider("a", offer=Offer(roundings=allowed, leaves_out=leaves_out, cost=3.0))
    for may in (False, True):
        if differs is None or (may and taken is not None):
            match = the_match(kernel, allow_rounding_changes=may)
            assert match.rounding_change == (None if differs is None else ("llama", taken))
            assert match.values["rounding"] == str(taken).partition(",")[0]
            assert (match.values["right"], match.cost) == (28, 3.0)
        else:
            refusal = the_refusal(kernel, allow_rounding_changes=may)
            assert (refusal.reason, refusal.detail) == (Reason.ROUNDING, f"a's rms_norm_pad {differs}")
            assert (refusal.found, refusal.provider) == ("llama", "a")
            assert refusal.fix == ("set allow_rounding_changes" if taken else None)


ATTENTION_INPUTS = {name: randn(1, 2, 4, 8, seed=seed) for seed, name in enumerate("qkv")}


@pytest.mark.parametrize(
    ("graph", "kernel", "differs"),
    [
        ("eager", "float32", "keeps scores and their softmax in float32, and the graph rounds both"),
        ("float32", "eager", "rounds as eager, and the graph as float32"),
        ("eager", "llama", "rounds as llama, and the graph as eager"),
    ],
)
def test_kernels_of_attention_that_round_otherwise(graph: str, kernel: str, differs: str) -> None:
    def attended(q: Any, k: Any, v: Any) -> Any:
        return ops.eager_attention(q, k, v, None, None, 0.5, None, graph)

    canonical = canonicalize(written(attended, ATTENTION_INPUTS))
    rules, known = {"eager_attention": RULES["eager_attention"]}, kernel in ("eager", "float32")
    kernels = [provider("a", "fused_attention", offer=Offer(roundings=frozenset({kernel})))]
    (miss,) = find_matches(canonical, rules, kernels, H200).misses
    assert miss.refusal.detail == f"a's fused_attention {differs}"
    assert miss.refusal.fix == ("set allow_rounding_changes" if known else None)
    changed = find_matches(canonical, rules, kernels, H200, allow_rounding_changes=True).candidates
    assert [match.rounding_change for match in changed] == ([(graph, kernel)] if known else [])


# How many rows a kernel takes.


def rows(planned: int, most: float) -> Callable[[Tensor], tuple[int, float]]:
    def rows_of(first: Tensor) -> tuple[int, float]:
        assert first.dim() == 2, "it is asked about the first tensor, which is x"
        return planned, most

    return rows_of


def up_to(most: Any, **more: Any) -> Provider:
    return provider("a", offer=Offer(most_rows=lambda m: most, **more))


UNLIMITED = "a takes up to 48 rows of this width, and nothing limits those of the graph"
LIMITS: dict[str, tuple[Any, Any, bool, dict[str, Any] | None]] = {
    "as many as it holds": (48, rows(48, 48), False, None),
    "one more": (
        48, rows(49, 49), False,
        {"detail": "a takes up to 48 rows of this width, and the range has up to 49", "expected": "at most 48 rows",
         "found": "up to 49 rows", "fix": "end a compile range at 48 tokens"},
    ),
    "more than planned, without a limit": (
        48, rows(40, math.inf), False,
        {"detail": UNLIMITED, "expected": "at most 48 rows", "found": "any number of rows"},
    ),
    "where larger calls run the reference": (48, rows(48, math.inf), True, None),
    "more than planned where they do": (
        48, rows(49, math.inf), True, {"detail": UNLIMITED, "found": "up to 49 rows"}
    ),
    "nobody asks for rows": (1, None, False, None),
    "any will do": (math.inf, rows(99, math.inf), False, None),
    "a limit that hangs on a dynamic width": (
        object(), rows(1, 1), False,
        {"detail": "a takes as many rows as their width lets it, and the width isn't known", "expected": None,
         "found": None, "fix": "mark the width static"},
    ),
    "the same where larger calls run the reference": (object(), rows(1, 1), True, None),
}  # fmt: skip


@pytest.mark.parametrize("what", LIMITS)
def test_how_many_rows_a_kernel_takes(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    most, rows_of, is_replaced, refused = LIMITS[what]
    asked: list[tuple[str, str]] = []

    def falls_back(op: str, name: str) -> bool:
        asked.append((op, name))
        return is_replaced

    monkeypatch.setattr("fuseplan.matching.offers.falls_back", falls_back)
    kernel = provider("a") if most == math.inf else up_to(most)
    if refused is None:
        assert the_match(kernel, rows_of=rows_of).provider == "a"
    else:
        refusal = the_refusal(kernel, rows_of=rows_of)
        assert (refusal.reason, refusal.provider) == (Reason.SIZE, "a")
        assert {name: getattr(refusal, name) for name in refused} == refused
    assert {*asked} <= {("rms_norm_pad", "a")}


# Those that say that they can't run here.


def unready(name: str, op: str = "rms_norm_pad", **more: Any) -> Provider:
    return provider(name, op, available=lambda: "its library is too old", install="pip install it", **more)


def test_who_can_not_run_here_says_so_of_what_it_implements_alone() -> None:
    matches = found(unready("b"), unready("c", "rms_norm_quant"), provider("a"), device=None)
    assert [match.provider for match in matches.candidates] == ["a"]
    (miss,) = matches.misses
    assert (miss.refusal.reason, miss.refusal.nearness) == (Reason.PROVIDER, Nearness.DECLINED)
    assert (miss.refusal.detail, miss.refusal.provider) == ("b can't run here: its library is too old", "b")
    refusal = the_refusal(unready("b"), device=None)
    assert refusal.detail == "b can't run here: its library is too old"
    assert (refusal.fix, refusal.provider) == ("pip install it", "b")


def test_who_serves_other_devices_is_not_told_of() -> None:
    """Built-in ones that aren't for this machine would be in every report."""
    elsewhere = provider("b", vendors=frozenset({"amd"}))
    assert the_match(provider("a"), elsewhere).provider == "a"
    assert the_refusal(elsewhere).detail == "no available provider implements rms_norm_pad"


def test_who_has_an_owner_that_can_tell_is_told_of() -> None:
    """It is its owner's, who asked for it: even where it isn't its check that refuses."""
    refusal = the_refusal(unready("b", vendors=frozenset({"amd"})))
    assert refusal.detail.startswith("b can't run here: serves AMD")
    assert refusal.fix is None
