"""Which providers take a match, and what is said of those that don't, on written graphs."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fuseplan.dialect import ops
from fuseplan.dialect.raising import canonicalize
from fuseplan.matching import Match, Matches, find_matches
from fuseplan.providers import PROFILES, Offer, Provider
from fuseplan.record import Nearness, Reason, Refusal
from fuseplan.rules import Bindings, by_name
from fuseplan.rules.families import BUILT_IN_RULES
from tests.helpers import randn, written

RULES = by_name(BUILT_IN_RULES)
PADDING = {"act_padding": RULES["act_padding"]}
X, R, W = randn(10, 64), randn(10, 64, seed=1), torch.ones(64, dtype=torch.bfloat16)
H200 = PROFILES["h200"]


def provider(name: str, op: str = "rms_norm_pad", *, offer: Offer | None = None, **more: Any) -> Provider:
    """One that serves every vendor by one op."""
    offers = more.pop("implements", {op: offer or Offer()})
    made = {"vendors": frozenset({"nvidia", "amd", "cpu"}), "install": "", **more}
    return Provider(name=name, description="", package=None, implements=offers, **made)


def norm_and_pad(rounding: str) -> Callable[..., Any]:
    return lambda x, r, w: ops.pad(ops.rms_norm(x, w, 1e-5, rounding), 28)


def found(
    *providers: Provider, model: Callable[..., Any] | None = None, rules: Any = PADDING, dynamic: bool = False,
    device: Any = H200, **options: Any,
) -> Matches:  # fmt: skip
    graph = written(model or norm_and_pad("llama"), {"x": X, "r": R, "w": W}, dynamic=dynamic)
    return find_matches(canonicalize(graph), rules, providers, device, **options)


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
        return ops.rms_norm(ops.all_reduce(x, one_rank), w, 1e-5, "llama")

    mine = provider("a", "all_reduce_rms_norm", runs_alone=alone)
    assert the_match(mine, model=model, rules=rules).shares is alone
    assert the_match(provider("a", runs_alone=alone)).shares is False, "it is no collective"


def test_what_a_check_says_is_reported_as_it_is() -> None:
    why = Refusal(
        reason=Reason.SIZE, detail="rows of 64", expected="rows of 128", found="rows of 64", mend="widen the rows"
    )  # fmt: skip
    asked: list[Bindings] = []

    def accepts(m: Bindings) -> Refusal:
        asked.append(m)
        return why

    refusal = the_refusal(provider("a", offer=Offer(accepts=accepts, most_rows=lambda m: 1)), rows_of=rows(10, 10))
    assert (refusal.reason, refusal.detail, refusal.provider) == (Reason.SIZE, "rows of 64", "a")
    assert (refusal.expected, refusal.found, refusal.mend) == ("rows of 128", "rows of 64", "widen the rows")
    assert (asked[0].rule, asked[0].right, tuple(asked[0].x.shape)) == ("act_padding", 28, (10, 64))


def test_a_refusal_beside_a_match_is_no_more_than_declined() -> None:
    why = Refusal(reason=Reason.SIZE, detail="rows of 64")
    matches = found(provider("a", offer=Offer(accepts=lambda m: why)), provider("b"))
    assert [match.provider for match in matches.candidates] == ["b"]
    (miss,) = matches.misses
    assert (miss.refusal.nearness, miss.refusal.provider) == (Nearness.DECLINED, "a")
    assert matches.refusals == ()


# What a kernel rounds.


@pytest.mark.parametrize("allowed", [False, True])
def test_a_kernel_of_the_graphs_own_convention_among_others_takes_it(allowed: bool) -> None:
    kernel = provider("a", offer=Offer(roundings=frozenset({"fp32", "llama"})))
    match = the_match(kernel, allow_rounding_changes=allowed)
    assert (match.rounding_change, match.values["rounding"]) == (None, "llama")


@pytest.mark.parametrize(
    ("roundings", "computed", "may_help"),
    [
        (("gpt_oss",), "gpt_oss", True), (("gpt_oss", "fp32"), "fp32 or gpt_oss", True),
        (("gemma", "gpt_oss"), "gpt_oss", True), (("gemma",), "gemma", False),
        (("vllm_fp32_residual", "gemma"), "gemma or vllm_fp32_residual", False), (("another",), "another", False),
    ],
)  # fmt: skip
def test_a_kernel_that_rounds_otherwise_is_refused(roundings: tuple[str, ...], computed: str, may_help: bool) -> None:
    kernel = provider("a", offer=Offer(roundings=frozenset(roundings)))
    for allowed in (False,) if may_help else (False, True):
        refusal = the_refusal(kernel, allow_rounding_changes=allowed)
        assert refusal.reason is Reason.ROUNDING
        assert refusal.detail == f"a's rms_norm_pad rounds as {computed}, and the graph as llama"
        assert (refusal.expected, refusal.found, refusal.provider) == (computed, "llama", "a")
        assert refusal.mend == ("set allow_rounding_changes" if may_help else None)


@pytest.mark.parametrize(
    ("roundings", "taken"), [(("gpt_oss",), "gpt_oss"), (("gpt_oss", "gemma", "fp32"), "fp32")]
)  # fmt: skip
def test_where_it_may_the_nearest_by_name_takes_its_place(roundings: tuple[str, ...], taken: str) -> None:
    match = the_match(provider("a", offer=Offer(roundings=frozenset(roundings))), allow_rounding_changes=True)
    assert match.rounding_change == ("llama", taken)
    assert match.values["rounding"] == taken
    assert match.values["right"] == 28


@pytest.mark.parametrize("roundings", [None, frozenset({"llama"})])
def test_what_a_kernel_does_not_round_is_refused_until_it_may(roundings: frozenset[str] | None) -> None:
    unrounded = provider("a", offer=Offer(roundings=roundings, leaves_out="the sum", cost=3.0))
    refusal = the_refusal(unrounded)
    assert refusal.reason is Reason.ROUNDING
    assert refusal.detail == "a's rms_norm_pad doesn't round the sum, as the graph does"
    assert (refusal.expected, refusal.found, refusal.mend) == ("llama", "llama", "set allow_rounding_changes")
    match = the_match(unrounded, allow_rounding_changes=True)
    assert match.rounding_change == ("llama", "llama, not rounding the sum")
    assert (match.values["rounding"], match.cost) == ("llama", 3.0)


def test_both_differences_are_told() -> None:
    both = provider("a", offer=Offer(roundings=frozenset({"fp32"}), leaves_out="the sum"))
    refusal = the_refusal(both)
    assert refusal.detail == (
        "a's rms_norm_pad rounds as fp32, and the graph as llama; it doesn't round the sum, as the graph does"
    )
    match = the_match(both, allow_rounding_changes=True)
    assert match.rounding_change == ("llama", "fp32, not rounding the sum")
    assert match.values["rounding"] == "fp32"


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
    assert miss.refusal.mend == ("set allow_rounding_changes" if known else None)
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
         "found": "up to 49 rows", "mend": "end a compile range at 48 tokens"},
    ),
    "more than planned, without a limit": (
        48, rows(40, math.inf), False,
        {"detail": UNLIMITED, "expected": "at most 48 rows", "found": "any number of rows"},
    ),
    "more than planned": (48, rows(40, 50), False, {"found": "up to 50 rows"}),
    "where larger calls run the reference": (48, rows(48, math.inf), True, None),
    "more than planned where they do": (
        48, rows(49, math.inf), True, {"detail": UNLIMITED, "found": "up to 49 rows"}
    ),
    "within a limit where they do": (
        48, rows(49, 60), True, {"detail": "a takes up to 48 rows of this width, and the range has up to 49"}
    ),
    "nobody asks for rows": (1, None, False, None),
    "any will do": (math.inf, rows(99, math.inf), False, None),
    "a limit that hangs on a dynamic width": (
        object(), rows(1, 1), False,
        {"detail": "a takes as many rows as their width lets it, and the width isn't known", "expected": None,
         "found": None, "mend": "mark the width static"},
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


def test_the_limit_is_asked_with_the_arguments_of_the_match() -> None:
    asked: list[Bindings] = []

    def most_rows(m: Bindings) -> int:
        asked.append(m)
        return 48

    the_match(provider("a", offer=Offer(most_rows=most_rows)), rows_of=rows(1, 1))
    assert {(m.rule, m.right, tuple(m.x.shape)) for m in asked} == {("act_padding", 28, (10, 64))}


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
    assert (refusal.mend, refusal.provider) == ("pip install it", "b")


def test_who_serves_other_devices_is_not_told_of() -> None:
    """Built-in ones that aren't for this machine would be in every report."""
    elsewhere = provider("b", vendors=frozenset({"amd"}))
    assert the_match(provider("a"), elsewhere).provider == "a"
    assert the_refusal(elsewhere).detail == "no available provider implements rms_norm_pad"


def test_who_has_an_owner_that_can_tell_is_told_of() -> None:
    """It is its owner's, who asked for it: even where it isn't its check that refuses."""
    refusal = the_refusal(unready("b", vendors=frozenset({"amd"})))
    assert refusal.detail.startswith("b can't run here: serves AMD")
    assert refusal.mend is None
