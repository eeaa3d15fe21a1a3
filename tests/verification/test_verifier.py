"""What is asked of each candidate, how often, and what becomes of findings; by checks that say what they are told."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fuseplan.dialect import ops
from fuseplan.graph.canonical import CanonicalGraph
from fuseplan.graph.facts import aten
from fuseplan.matching import Match
from fuseplan.record import Pending, Verification
from fuseplan.rules import Rule
from fuseplan.verification import outcomes, region, verifier
from fuseplan.verification.check import CheckResult
from fuseplan.verification.deadline import AttemptError
from fuseplan.verification.region import MatchedRegion
from fuseplan.verification.specs import Case
from fuseplan.verification.together import shared_seed
from fuseplan.verification.verifier import Verifier, _Question
from tests.helpers import HIDDEN, written
from tests.verification.fused_norm import WEIGHT, AddNormRelu, add_norm_relu, provider, right

X = torch.zeros(5, HIDDEN, dtype=torch.bfloat16)
SPAN = 1, 64
SIZES = (1, 5, 7, 33, 64)
RULE = AddNormRelu()


def two_layers(x: Any, residual: Any, weight: Any) -> Any:
    found = []
    for _ in range(2):
        both = ops.fused_add_rms_norm(x, residual, weight, 1e-6, "llama")
        x, residual = aten.relu.default(both[0]), both[1]
        found.append(x)
    return *found, residual


def graph_of(function: Callable[..., Any] = two_layers, *, dynamic: bool = True) -> CanonicalGraph:
    return CanonicalGraph.copy_of(written(function, {"x": X, "residual": X, "weight": WEIGHT}, dynamic=dynamic))


def match_at(canonical: CanonicalGraph, layer: int, name: str, **more: Any) -> Match:
    relu = canonical.calls(aten.relu.default)[layer]
    norm = relu.args[0].args[0]
    total = next(user for user in norm.users if user.args[1] == 1)
    values = dict(zip(("x", "residual", "weight", "eps", "rounding"), norm.args, strict=True))
    consumed = tuple(sorted((norm, *norm.users, relu)))
    return Match(
        rule=RULE, provider=name, values=values, consumed=consumed, outputs=(relu, total), core=norm, **more
    )  # fmt: skip


def candidate(match: Match, signature: str = "s") -> Any:
    return SimpleNamespace(match=match, signature=signature)


class Checks:
    """Stands for `check`: what it finds at each number of tokens, and how it was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.found: dict[int, Any] = {}
        self.asked: list[tuple[int, dict[str, Any]]] = []
        monkeypatch.setattr(verifier, "check", self.check)

    def check(self, rule: Rule, name: str, case: Case, **how: Any) -> CheckResult:
        self.asked.append((case.tokens, {"rule": rule, "provider": name, **how}))
        found = self.found.get(case.tokens, CheckResult(wrong=None, worst=0.25))
        if isinstance(found, Exception):
            raise found
        return found  # type: ignore[no-any-return]

    @property
    def tokens(self) -> list[int]:
        return [tokens for tokens, _ in self.asked]


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> Checks:
    return Checks(monkeypatch)


def verified(
    canonical: CanonicalGraph, matches: Sequence[Match], *, own: Any, mode: str = "always", **more: Any
) -> list[Any]:
    verifying = Verifier(mode=mode, providers=own, **{"deadline_s": 60.0, **more})
    return verifying.verify([candidate(each) for each in matches], canonical, SPAN)


def alone(one: Any, **more: Any) -> Any:
    """What becomes of one match."""
    canonical = graph_of()
    (outcome,) = verified(canonical, [match_at(canonical, 0, one.name)], own=[one], **more)
    return outcome


@pytest.fixture
def one() -> Any:
    return provider(right)


def test_the_largest_error_of_all_sizes_is_told(checks: Checks, one: Any) -> None:
    for shares, worst in (
        ({1: 0.25, 5: 0.75, 7: 0.5, 33: 0.0, 64: 0.5}, 0.75), (dict.fromkeys(SIZES, 0.0), 0.0),
        ({33: None, 64: 0.5}, 0.5), ({64: None}, None),
    ):  # fmt: skip
        checks.found = {tokens: CheckResult(wrong=None, worst=share) for tokens, share in shares.items()}
        outcome = alone(one)
        assert replace(outcome, time_ns=0) == Verification(
            rule="add_norm_relu", op="add_norm_relu", provider=one.name, signature="s", tokens=SIZES, worst=worst
        )
        assert 0 < outcome.time_ns < 60 * 10**9


@pytest.mark.parametrize("rank", [None, 0, 1])
def test_the_first_size_that_is_wrong_ends_it_but_in_lock_step(checks: Checks, one: Any, rank: int | None) -> None:
    checks.found = {7: CheckResult(wrong="bad", worst=3.0), 64: CheckResult(wrong="worse", worst=5.0)}
    outcome, wanted = alone(one, rank=rank), SIZES[:3] if rank is None else SIZES
    assert (outcome.tokens, tuple(checks.tokens)) == (wanted, wanted)
    assert (outcome.passed, outcome.detail, outcome.transient) == (False, "at 7 tokens: bad", False)
    assert outcome.worst == (3.0 if rank is None else 5.0)
    assert all(how["rank"] is None for _, how in checks.asked)
    checks.found = {5: ZeroDivisionError("by zero")}
    outcome = alone(one, rank=0)
    assert (outcome.passed, outcome.transient, outcome.tokens, outcome.worst) == (False, True, SIZES, 0.25)
    assert outcome.detail == "at 5 tokens: the kernel raises ZeroDivisionError: by zero"


def test_how_the_graph_was_read_is_checked_once_and_rounding_as_the_graph_has_it(checks: Checks, one: Any) -> None:
    canonical = graph_of()
    match = match_at(canonical, 0, one.name, rounding_change=("llama", "fp32"))
    verified(canonical, [match], own=[one])
    assert [how["unfused"] for _, how in checks.asked] == [{"rounding": "llama"}] * len(SIZES)
    assert [how["region"] is None for _, how in checks.asked] == [True, True, False, True, True]
    assert len({how["seed"] for _, how in checks.asked}) == 1
    assert {(how["rule"], how["provider"], how["free"]) for _, how in checks.asked} == {(RULE, one.name, frozenset())}
    relu, total = match.outputs
    for more, free in (({"copied": (total,)}, {1}), ({"copied": (relu,), "loose": (total,)}, {0, 1})):
        verified(canonical, [match_at(canonical, 0, one.name, **more)], own=[one])
        assert (checks.asked[-1][1]["free"], checks.asked[-1][1]["unfused"]) == (free, {})


def test_layers_that_are_alike_are_run_once(checks: Checks, one: Any) -> None:
    canonical = graph_of()
    matches = [match_at(canonical, layer, one.name) for layer in (0, 1, 0)]
    first, second, third = verified(canonical, matches, own=[one])
    assert checks.tokens == [*SIZES]
    assert first is second is third
    checks.asked.clear()
    other = provider(right)
    matches = [match_at(canonical, 0, each.name) for each in (one, other, one)]
    found = verified(canonical, matches, own=[one, other])
    assert [each.provider for each in found] == [one.name, other.name, one.name]
    assert len(checks.tokens) == 2 * len(SIZES)


@pytest.mark.parametrize(
    ("mode", "known", "transient", "kept"),
    [("first-use", True, False, True), ("always", True, False, True), ("first-use", False, False, False),
     ("first-use", True, True, False)],
)  # fmt: skip
def test_outcomes_are_kept_where_the_kernel_is_known(
    checks: Checks, cold: Path, mode: str, known: bool, transient: bool, kept: bool, one: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    checks.found = {5: ZeroDivisionError("x")} if transient else {}
    kind = outcomes.kind_of(RULE, one, None)
    monkeypatch.setattr(outcomes, "kind_of", lambda *_: replace(kind, is_known=known))
    first = alone(one, mode=mode)
    assert len(list(cold.glob("*.json"))) == kept
    count = len(checks.asked)
    second = alone(one, mode=mode)
    assert (first.from_cache, first.time_ns > 0) == (False, True)
    if kept and mode == "first-use":
        assert second == replace(first, from_cache=True, time_ns=0)
        assert len(checks.asked) == count
    else:
        assert not second.from_cache
        assert len(checks.asked) == 2 * count


def test_nothing_is_verified_where_it_is_off_or_there_is_nothing(checks: Checks, one: Any) -> None:
    canonical = graph_of()
    matches = [match_at(canonical, layer, one.name) for layer in (0, 1)]
    assert verified(canonical, matches, own=[one], mode="off") == [None, None]
    assert verified(canonical, [], own=[one]) == []
    for mode, asked in (("off", [object()]), ("always", [])):
        verifying = Verifier(mode=mode, providers=[one], deadline_s=1.0)
        assert verifying.verify_chained(asked, canonical.graph, SPAN) == []  # type: ignore[arg-type]
    assert not checks.asked


def met(*, group: Any = "g", runs_reference: bool = False, shares: bool = False, collective: bool = True) -> Any:
    op = SimpleNamespace(collective=collective, name="op")
    return SimpleNamespace(
        rule=SimpleNamespace(op=op, name="rule"), provider="p", values={} if group is None else {"group_name": group},
        runs_reference=runs_reference, shares=shares,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("match", "rank", "meets"),
    [
        (met(), None, True), (met(), 0, True), (met(collective=False), None, False), (met(group=None), None, False),
        (met(group="one"), None, False), (met(group="unknown"), None, True), (met(runs_reference=True), None, False),
        (met(shares=True), None, False), (met(shares=True), 0, True),
    ],
)  # fmt: skip
def test_a_kernel_meets_others_where_it_waits_for_them(
    match: Any, rank: int | None, meets: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verifier, "group_size", {"g": 2, "one": 1}.get)
    assert Verifier(mode="always", providers=[], deadline_s=1.0, rank=rank)._meets(match) is meets


def question(match: Any, count: int = 3, **more: Any) -> _Question:
    cases = [Case(tokens=tokens, arguments={}) for tokens in range(1, count + 1)]
    given = {"unfused": {"u": 1}, "region": None, "free": frozenset({1}), "meets": True, "is_stored": False}
    return _Question(match=match, signature="s", cases=cases, key="k", **{**given, **more})


LEFT = Verification(rule="rule", op="op", provider="p", signature="s")


def test_how_it_was_read_is_checked_before_it_is_left_to_all(checks: Checks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verifier, "process_group", lambda name: name)
    monkeypatch.setattr(torch.distributed, "get_backend", lambda group: "gloo")
    pending: Any = object()
    kept: list[Any] = []

    def keep(*given: Any) -> Pending:
        kept.append(given)
        if len(kept) > 1:
            raise TypeError("no JSON")
        return pending  # type: ignore[no-any-return]

    monkeypatch.setattr(verifier, "pending_of", keep)
    verifying = Verifier(mode="always", providers=[], deadline_s=9.0, settles=True)
    asked = question(met(), region="region")
    assert verifying._run(asked) is pending
    ((tokens, how),) = checks.asked
    assert (tokens, how["provider"], how["rank"], how["region"], how["free"], how["unfused"]) == (
        3, "torch", None, "region", {1}, {"u": 1},
    )  # fmt: skip
    assert how["seed"] == outcomes.seed_of("k")
    assert kept == [(asked.match, "s", asked.cases, {"u": 1})]
    outcome = verifying._run(asked)
    detail = "its arguments can't be kept until the first run: no JSON"
    assert outcome == replace(LEFT, passed=False, detail=detail)
    checks.found = {3: CheckResult(wrong="bad", worst=2.0)}
    outcome = verifying._run(asked)
    assert outcome == replace(LEFT, tokens=(3,), passed=False, detail="at 3 tokens: bad")
    checks.found = {3: MemoryError("full")}
    outcome = verifying._run(asked)
    assert isinstance(outcome, Verification)
    assert (outcome.passed, outcome.transient, outcome.tokens) == (False, True, (3,))
    assert len(kept) == 2


def test_ranks_that_meet_draw_by_a_seed_that_all_have(checks: Checks) -> None:
    verifying = Verifier(mode="always", providers=[], deadline_s=9.0, rank=1)
    verifying._run(question(met()))
    seeds = [how["seed"] for _, how in checks.asked]
    assert seeds == [shared_seed("s", tokens) for tokens in (1, 2, 3)]
    assert {how["rank"] for _, how in checks.asked} == {1}
    checks.asked.clear()
    verifying._run(question(met(collective=False), meets=False))
    assert {(how["seed"], how["rank"]) for _, how in checks.asked} == {(outcomes.seed_of("k"), None)}


def test_kernels_are_compiled_ahead_on_gpus_and_their_faults_left_to_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, cpu = torch.device("cuda", 0), torch.device("cpu")
    ahead: list[tuple[str, list[int]]] = []

    def compiling(name: str) -> Any:
        def compile_ahead(calls: Sequence[Any]) -> None:
            ahead.append((name, [call.args[2].tokens for call in calls]))
            raise AttemptError("slow")

        return SimpleNamespace(name=name, compile_ahead=compile_ahead)

    def asked(name: str, device: torch.device, *sizes: int, meets: bool = False) -> Any:
        cases = [SimpleNamespace(device=device, tokens=tokens) for tokens in sizes]
        return SimpleNamespace(match=SimpleNamespace(provider=name, rule=None), cases=cases, meets=meets)

    monkeypatch.setattr(verifier, "attempt", lambda seconds, function, device: function())
    providers = [compiling("p"), compiling("q"), SimpleNamespace(name="none", compile_ahead=None)]
    verifying = Verifier(mode="always", providers=providers, deadline_s=1.0)
    verifying._compile_ahead([
        asked("p", cuda, 1, 2), asked("q", cuda, 5), asked("p", cpu, 3), asked("p", cuda, 6, meets=True),
        asked("none", cuda, 7), asked("p", cuda, 4),
    ])  # fmt: skip
    assert ahead == [("p", [1, 2, 4]), ("q", [5])]


def region_of(canonical: CanonicalGraph, match: Any) -> MatchedRegion:
    found = MatchedRegion.of(canonical, match)
    assert found is not None
    return found


def test_a_region_is_what_computes_the_results() -> None:
    canonical = graph_of(dynamic=False)
    match = match_at(canonical, 1, "p")
    found = region_of(canonical, match)
    original = {each: canonical.origin[each] for each in canonical.graph.nodes}
    assert found.names == {original[match.values[name]]: name for name in ("x", "residual", "weight")}
    assert found.nodes == tuple(sorted(original[each] for each in match.consumed))
    inputs = {"x": torch.randn(5, HIDDEN).bfloat16(), "residual": torch.randn(5, HIDDEN).bfloat16(), "weight": WEIGHT}
    expected = add_norm_relu.reference(*inputs.values(), 1e-6, "llama")
    for outputs in (match.outputs, (match.outputs[0], None)):
        for value, node, wanted in zip(
            region_of(canonical, match.but(outputs=outputs)).evaluate(inputs, {}), outputs, expected, strict=True
        ):
            assert value is None if node is None else torch.equal(value, wanted)  # type: ignore[arg-type]
    assert MatchedRegion.of(canonical, match.but(outputs=(None, None))) is None, "dead results have none"


def test_where_there_is_no_region() -> None:
    canonical = graph_of(dynamic=False)
    match = match_at(canonical, 1, "p")
    x, weight = match.values["x"], match.values["weight"]
    moved = canonical.insert_before(match.consumed[0], aten.abs.default, (x,), x.meta["val"])
    assert MatchedRegion.of(canonical, match.but(values={**match.values, "x": moved})) is None
    # A constant of fuseplan's own stands for nothing of the graph.
    ones = canonical.constant(1.0, (HIDDEN,), like=weight.meta["val"])
    found = region_of(canonical, match.but(values={**match.values, "other": ones}))
    assert "other" not in found.names.values()
    # The weight is no input then, and no node computes it.
    assert (
        MatchedRegion.of(canonical, match.but(values={k: v for k, v in match.values.items() if k != "weight"})) is None
    )
    # Results that are the inputs have no nodes between.
    assert MatchedRegion.of(canonical, match.but(outputs=(x, None), values={"x": x})) is None


@pytest.mark.parametrize(("count", "is_there"), [(128, True), (129, False)])
def test_a_region_has_at_most_128_nodes(count: int, is_there: bool) -> None:
    graph = torch.fx.Graph()
    x = last = graph.placeholder("x")
    for _ in range(count):
        last = graph.call_function(aten.relu.default, (last,))
    graph.output((last,))
    canonical = CanonicalGraph.copy_of(graph)
    copies = {original: copy for copy, original in canonical.origin.items()}
    match: Any = SimpleNamespace(values={"x": copies[x]}, outputs=(copies[last],))
    assert (MatchedRegion.of(canonical, match) is not None) is is_there


def test_no_rank_runs_a_collective_of_an_engine_or_a_higher_order_op_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    canonical = graph_of(dynamic=False)
    match = match_at(canonical, 0, "p")
    relu = aten.relu.default
    (first, _) = canonical.original.find_nodes(op="call_function", target=relu)
    args, wrapper = first.args, torch.ops.higher_order.auto_functionalized
    for target, own, collectives, evaluated, is_there in (
        (relu, (), {"aten::relu"}, set(), False), (relu, (), set(), set(), True),
        (torch.ops.higher_order.cond, (), set(), set(), False), (wrapper, (relu,), set(), {"aten::relu"}, True),
        (wrapper, (relu,), set(), {"aten::tanh"}, False), (wrapper, (aten.tanh.default,), set(), {"aten::relu"}, False),
    ):  # fmt: skip
        first.target, first.args = target, (*own, *args)
        monkeypatch.setattr(region, "ENGINE_COLLECTIVES", frozenset(collectives))
        monkeypatch.setattr(region, "EVALUATED", frozenset(evaluated))
        assert (MatchedRegion.of(canonical, match) is not None) is is_there


def test_a_result_may_be_a_reshape_in_the_graph() -> None:
    def function(x: Any, residual: Any, weight: Any) -> Any:
        y = aten.relu.default(x)
        return aten.view.default(y, [-1]), aten.sin.default(y), aten.view.default(y, [HIDDEN, -1])

    canonical = graph_of(function, dynamic=False)
    (relu,) = canonical.calls(aten.relu.default)
    views = canonical.calls(aten.view.default)
    match: Any = SimpleNamespace(values={"x": relu.args[0]}, outputs=(relu,))
    assert region_of(canonical, match).outputs == (canonical.origin.pop(relu),)
    found = region_of(canonical, match)
    assert found.outputs == (canonical.origin.pop(views[0]),)
    (value,) = found.evaluate({"x": torch.ones_like(X)}, {})
    assert value is not None
    assert torch.equal(value, torch.ones_like(X)), "in the shape of the result"
    del canonical.origin[views[1]]
    assert MatchedRegion.of(canonical, match) is None, "a sine is no reshape"


def test_what_a_match_sees_through_views_is_turned_back() -> None:
    """Of a variable that is a view of what the graph reads, which the graph itself may read as it is."""

    def function(x: Any, residual: Any, weight: Any) -> Any:
        return aten.mul.Tensor(aten.relu.default(x), 2.0)

    canonical = graph_of(function, dynamic=False)
    (relu,), (result,) = canonical.calls(aten.relu.default), canonical.calls(aten.mul.Tensor)
    x = relu.args[0]
    cube = torch.arange(5 * HIDDEN).reshape(1, HIDDEN, 5).to(torch.bfloat16)
    shaped = canonical.insert_before(relu, aten.reshape.default, (x, [5, 1, HIDDEN]), X.reshape(5, 1, HIDDEN))
    turned = canonical.insert_before(relu, aten.permute.default, (shaped, [1, 2, 0]), cube)
    match: Any = SimpleNamespace(values={"y": turned, "eps": 1.0}, outputs=(result,))
    found = region_of(canonical, match)
    assert found.names == {canonical.origin[x]: "y"}
    assert found.views == {"y": (turned, shaped)}
    (value,) = found.evaluate({"y": cube, "eps": 1.0}, {})
    assert value is not None
    assert torch.equal(value, cube.permute(2, 0, 1).reshape(5, HIDDEN) * 2)
    match.values = {"y": relu}
    found = region_of(canonical, match)
    assert (found.views, [str(node.target) for node in found.nodes]) == ({"y": ()}, ["aten.mul.Tensor"])
    del canonical.origin[x]
    match.values = {"y": turned}
    assert MatchedRegion.of(canonical, match) is None
