"""Plans of real workloads: certified, never worse than anything simpler, and independent of every order."""

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from random import Random
from typing import Any

import pytest
from torch import fx

from fuseplan.compilation.analysis import Analysis
from fuseplan.compilation.manager import PostGradPassManager
from fuseplan.config import CompileRange, PassConfig, Policy
from fuseplan.dialect.raising import canonicalize
from fuseplan.errors import ConfigError, PlanError
from fuseplan.planner.alternatives import UNFUSED, alternative_name, row_key
from fuseplan.planner.baselines import greedy, heaviest, largest
from fuseplan.planner.decide import decide_in_order, plan_record, replay
from fuseplan.planner.pose import Problem
from fuseplan.planner.program import Solution
from fuseplan.planner.solver import Solver
from fuseplan.providers import BUILT_IN_PROVIDERS, PROFILES
from fuseplan.record import GraphReport, Reason, SavedPlans, diff
from fuseplan.rules import Rule
from fuseplan.rules.families import BUILT_IN_RULES, ComposedRule, find_sites
from tests.helpers import needs_rounded_residual
from tests.planner.test_candidates import together
from tests.workload_graphs import workload_graph

PLANNED = Policy(name="planned")
LAYERS = 2
RANGES = (CompileRange(start=1, end=64), CompileRange(start=65, end=512), CompileRange(start=513, end=8192))


@pytest.fixture(scope="module")
def gpt_oss() -> Iterator[fx.Graph]:
    with workload_graph("gpt-oss-120b", 2, LAYERS) as graph:
        yield graph


def manager(config: PassConfig | None = None, span: CompileRange = RANGES[0], **options: Any) -> PostGradPassManager:
    options.setdefault("device", PROFILES["h200"])
    return PostGradPassManager(config or PassConfig(), compile_range=span, **options)


def report_of(planner: PostGradPassManager, graph: fx.Graph) -> GraphReport:
    analysis = planner.analyze(graph)
    return planner.report("graph_0", analysis, planner.decide(analysis, planner.config.chosen_policy, "graph_0"))


def fused(planner: PostGradPassManager, graph: fx.Graph) -> dict[str, int]:
    return report_of(planner, graph).count(planner.rules)


def check_never_worse(analysis: Analysis) -> None:
    """At its prices alone a plan is never worse than any order; what isn't sure to gain is left out after that."""
    given = analysis.problem
    certain = replace(given, program=replace(given.program, unsure=frozenset()), unsure=frozenset())
    solution = check_certified(certain)
    assert check_certified(given).objective_ns <= solution.objective_ns
    rules = sorted({candidate.rule for candidate in given.candidates})
    for order in permutations(rules):
        assert decide_in_order(certain, order).saving_ns <= solution.objective_ns, order


def check_certified(given: Problem) -> Solution:
    """No simple heuristic does better."""
    solution = Solver().solve(given.program, given.find_cycles)
    assert solution.gap == 0.0
    assert solution.objective_ns >= 0
    sizes = [len(candidate.match.consumed) for candidate in given.candidates]
    for preference in (heaviest, largest(sizes)):
        assert greedy(given.program, preference, given.find_cycles).objective_ns <= solution.objective_ns
    return solution


SERVED = [
    pytest.param(name, tp, marks=[pytest.mark.nightly] * (tp not in by_day))
    for name, by_day in {
        "gpt-oss-120b": (2,), "gpt-oss-20b": (1,), "llama-3.1-8b": (4,), "gpt-oss-120b:outer-reduce": (2,)
    }.items()
    for tp in (1, 2, 4, 8)
]  # fmt: skip


DEVICES = ("h100", "h200", "b200", "mi300x", "mi355x", "cpu", "rtx4090")
"""A device of each kind; the others differ from these by ratios."""


@pytest.mark.parametrize(("workload", "tp"), SERVED)
def test_plans_are_certified_and_never_worse(workload: str, tp: int) -> None:
    with workload_graph(workload, tp, LAYERS) as graph:
        for device in map(PROFILES.__getitem__, DEVICES):
            for span in RANGES:
                check_never_worse(manager(span=span, device=device).analyze(graph))


TINY = [
    pytest.param(name, tp, marks=[pytest.mark.nightly] * ((name, tp) != ("gpt-oss-120b-tiny", 2)))
    for name in ("gpt-oss-120b-tiny", "gpt-oss-20b-tiny", "llama-3.1-8b-tiny", "gpt-oss-120b-tiny:outer-reduce")
    for tp in (1, 2, 4)
]


@pytest.mark.parametrize(("name", "tp"), TINY)
def test_tiny_twins_are_certified_and_never_worse(name: str, tp: int) -> None:
    with workload_graph(name, tp) as graph:
        check_never_worse(manager().analyze(graph))


def test_order_means_nothing(gpt_oss: fx.Graph) -> None:
    plans = set()
    for seed in range(4):
        random, rules, providers = Random(seed), list(BUILT_IN_RULES), list(BUILT_IN_PROVIDERS)
        random.shuffle(rules)
        random.shuffle(providers)
        planner = manager(rules=rules, providers=providers)
        analysis = planner.analyze(gpt_oss)
        decision = planner.decide(analysis, PLANNED, "graph_0")
        record = plan_record(analysis.problem, decision, "graph_0", (1, 64), "h200")
        plans.add(json.dumps(repr(record)))
    assert len(plans) == 1


def test_every_loser_knows_its_margin(gpt_oss: fx.Graph) -> None:
    """What is lost by forcing a candidate is what the record says, and at `flips_at` the two are even."""
    planner = manager()
    analysis = planner.analyze(gpt_oss)
    given = analysis.problem
    decision = planner.decide(analysis, PLANNED, "graph_0")
    assert decision.lost
    for lost in decision.lost:
        forced = replace(given.program, forced=frozenset({lost.candidate}))
        best = Solver().solve(forced, given.find_cycles).objective_ns
        assert lost.lost_ns == decision.saving_ns - best
        cost = given.priced.costs[lost.candidate]
        assert cost is not None
        if lost.flips_at_ns is not None:
            savings = list(given.program.savings_ns)
            savings[lost.candidate] += cost - lost.flips_at_ns
            flipped = replace(forced, savings_ns=tuple(savings))
            assert Solver().solve(flipped, given.find_cycles).objective_ns == decision.saving_ns
            savings[lost.candidate] += 1
            cheaper = replace(given.program, savings_ns=tuple(savings))
            assert lost.candidate in Solver().solve(cheaper, given.find_cycles).selected


def test_forcing_and_forbidding_by_rule_and_by_place(gpt_oss: fx.Graph) -> None:
    sites = LAYERS
    plain = fused(manager(), gpt_oss)
    assert plain["allreduce_rms_padding"] == sites
    assert fused(manager(PassConfig(forbid=["allreduce_rms_padding"])), gpt_oss)["allreduce_rms_padding"] == 0
    assert fused(manager(PassConfig(force=["act_padding"])), gpt_oss)["act_padding"] == sites
    one = fused(manager(PassConfig(force=["act_padding@*layers.1.*"])), gpt_oss)
    assert (one["act_padding"], one["allreduce_rms_padding"]) == (sites // LAYERS, sites - sites // LAYERS)
    candidates = manager().analyze(gpt_oss).problem.candidates
    ordinals = sorted({c.site.ordinal for c in candidates if c.rule == "allreduce_rms_padding" and c.site})
    by_ordinal = manager(PassConfig(forbid=[f"allreduce_rms_padding#{ordinals[0]}"]))
    assert fused(by_ordinal, gpt_oss)["allreduce_rms_padding"] == sites - 1
    provider = manager(PassConfig(force=["act_padding:torch"]))
    analysis = provider.analyze(gpt_oss)
    chosen = [analysis.problem.candidates[i] for i in provider.decide(analysis, PLANNED, "graph_0").selected]
    assert [each.provider for each in chosen if each.rule == "act_padding"] == ["torch"] * sites


@pytest.mark.parametrize(
    ("config", "error", "says"),
    [
        ({"force": ["act_padding"], "forbid": ["act_padding"]}, ConfigError, "'act_padding' is forced and forbidden"),
        ({"force": ["act_padding"], "forbid": ["allreduce_rms", "act_padding@*.1.*"]}, PlanError,
         ("force 'act_padding' and forbid 'act_padding@*.1.*' contradict each other at layers.1.post_attention_norm: "
          "every fusion forced there is forbidden; drop one of them")),
        ({"force": ["act_padding", "allreduce_rms"]}, PlanError,
         ("force 'act_padding' and force 'allreduce_rms' contradict each other at layers.0-1.post_attention_norm: "
          "they want the same op there, which can be in one fusion only")),
        ({"force": ["act_pading"]}, ConfigError, "did you mean 'act_padding'"),
        ({"force": "act_padding"}, ConfigError, "sequences of texts"),
        ({"force": ["act_padding"], "policy": "off"}, ConfigError, "force needs policy planned"),
        ({"node_budget": 0}, ConfigError, "integers of at least 1"),
        ({"costs": "measurd"}, ConfigError, "did you mean 'measured'"),
        ({"costs": "measured"}, ConfigError, "needs a cost table"),
    ],
)  # fmt: skip
def test_requests_that_contradict_themselves_end_in_one_line(
    gpt_oss: fx.Graph, config: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error) as raised:
        fused(manager(PassConfig(**config)), gpt_oss)
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("request_", [{"force": ["norm_quant"]}, {"forbid": ["act_padding@nowhere.*"]}])
def test_requests_that_select_nothing_are_a_warning(gpt_oss: fx.Graph, request_: dict[str, Any]) -> None:
    """A model can have several graphs, and what is asked for need not be in all of them."""
    planner = manager(PassConfig(**request_))
    report = report_of(planner, gpt_oss)
    (refusal,) = [each for each in report.refusals if each.reason is Reason.NO_EFFECT]
    assert "selects no match in this graph" in refusal.detail
    assert fused(planner, gpt_oss) == fused(manager(), gpt_oss)


def test_a_plan_is_saved_replayed_and_compared(gpt_oss: fx.Graph, tmp_path: Path) -> None:
    planner = manager(PassConfig(forbid=["allreduce_rms_padding@*layers.0.*"]))
    analysis = planner.analyze(gpt_oss)
    decision = planner.decide(analysis, PLANNED, "graph_0")
    plan = plan_record(analysis.problem, decision, "graph_0", (1, 64), "h200")
    saved = SavedPlans(workload="gpt-oss-120b", tp=2, plans=(plan,))
    path = tmp_path / "plan.json"
    saved.save(path)
    assert SavedPlans.load(path) == saved
    again = manager(PassConfig(plan=path))
    fresh = again.analyze(gpt_oss)
    assert again.decide(fresh, PLANNED, "graph_0").selected == decision.selected
    assert diff(saved, SavedPlans.load(path)) == []

    other = manager()
    analysis = other.analyze(gpt_oss)
    best = plan_record(analysis.problem, other.decide(analysis, PLANNED, "graph_0"), "graph_0", (1, 64), "h200")
    assert best.digest != plan.digest
    changes = diff(saved, replace(saved, plans=(best,)))
    assert any("allreduce_rms_padding" in change and "->" in change for change in changes)
    assert any("saves" in change for change in changes)


def test_a_replay_that_does_not_fit_names_the_first_difference(gpt_oss: fx.Graph, tmp_path: Path) -> None:
    planner = manager()
    analysis = planner.analyze(gpt_oss)
    given = analysis.problem
    plan = plan_record(given, planner.decide(analysis, PLANNED, "graph_0"), "graph_0", (1, 64), "h200")
    first = plan.selected[0]
    with workload_graph("gpt-oss-20b", 1, LAYERS) as whole:
        another = planner.analyze(whole).problem
    for problem, changed, says in (
        (given, {"sites": plan.sites[:-1]}, f"there were {len(plan.sites) - 1} sites and are {len(plan.sites)}"),
        (another, {}, r"site 0 was all_reduce\[2\] .* and is rms_n"),
        (given, {"selected": (replace(first, name=first.name.replace("triton", "nobody")),)},
         r"nobody.*matches nothing here"),
        (given, {"selected": (replace(first, signature="something_else()"),)}, r"was something_else\(\) and is"),
    ):  # fmt: skip
        with pytest.raises(PlanError, match=says):
            replay(problem, replace(plan, **changed))
    saved = SavedPlans(workload="w", tp=2, plans=(plan,))
    with pytest.raises(PlanError, match="none for graph_1 at 1:64 tokens; there are: graph_0 1:64"):
        saved.find("graph_1", (1, 64))
    path = tmp_path / "plan.json"
    saved.save(path)
    data = json.loads(path.read_text())
    data["plans"][0]["selected"][0]["name"] += "x"
    for content, says in (
        (json.dumps(data), "was changed after it was saved"), ("{", "isn't JSON"), ('{"schema": 9}', "schema 9"),
        ("[]", "isn't a JSON object"),
    ):  # fmt: skip
        path.write_text(content)
        with pytest.raises(PlanError, match=says):
            SavedPlans.load(path)
    with pytest.raises(PlanError, match="can't be read"):
        SavedPlans.load(tmp_path / "absent.json")


def cost_rows(analysis: Analysis, prices: dict[str, int]) -> list[dict[str, Any]]:
    """Rows for every site of a graph: `prices` by rule, a slow 90 us for all other alternatives."""
    rows = {}
    for candidate in analysis.problem.candidates:
        site = candidate.site
        assert site is not None
        signature = analysis.problem.sites[site.ordinal]
        name = alternative_name([candidate], [site.ordinal])
        wanted = prices.get(candidate.rule, 90_000) if candidate.provider == "triton" else 90_000
        for tokens in (1, 64):
            for key, time_ns in ((row_key(signature, name), wanted), (row_key(signature, UNFUSED), 20_000)):
                rows[key, tokens] = {
                    "key": key, "tokens": tokens, "time_ns": time_ns, "spread_ns": 0, "provenance": "measured",
                    "device": "h200", "torch": "", "triton": "", "topology": "tp2", "date": "2026-11-22", "command": "",
                }  # fmt: skip
    return list(rows.values())


def with_table(tmp_path: Path, rows: list[dict[str, Any]]) -> Path:
    path = tmp_path / "costs.json"
    path.write_text(json.dumps({"schema": 1, "device": "h200", "rows": rows}))
    return path


@pytest.mark.parametrize("winner", ["act_padding", "allreduce_rms", "allreduce_rms_padding"])
def test_the_plan_follows_a_cost_table(
    gpt_oss: fx.Graph, tmp_path: Path, winner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = cost_rows(manager().analyze(gpt_oss), {winner: 5_000})
    monkeypatch.setenv("FUSEPLAN_COSTS", str(with_table(tmp_path, rows)))
    counts = fused(manager(), gpt_oss)
    assert counts[winner] >= LAYERS
    assert sum(counts.values()) == counts[winner]


def test_prices_tables_plans_and_requests_change_the_cache_key(gpt_oss: fx.Graph, tmp_path: Path) -> None:
    rows = cost_rows(manager().analyze(gpt_oss), {"act_padding": 5_000})
    path = with_table(tmp_path, rows)
    configs: list[dict[str, Any]] = [
        {}, {"cost_table": path}, {"cost_table": path, "costs": "measured"}, {"costs": "modelled"},
        {"force": ["act_padding"]}, {"forbid": ["act_padding"]}, {"node_budget": 7}, {"allow_rounding_changes": True},
    ]  # fmt: skip
    keys = {manager(PassConfig(**config)).uuid() for config in configs}
    keys.add(manager(device=PROFILES["b200"]).uuid())
    keys.add(manager(rules=[coupled("act_padding")]).uuid())
    keys.add(manager(rules=[coupled("act_padding", together=True)]).uuid())
    assert len(keys) == len(configs) + 3
    before = manager(PassConfig(cost_table=path)).uuid()
    rows[0]["time_ns"] += 1
    with_table(tmp_path, rows)
    assert manager(PassConfig(cost_table=path)).uuid() != before


@needs_rounded_residual
def test_rounding_changes_are_refused_unless_allowed(gpt_oss: fx.Graph) -> None:
    aiter = [provider for provider in BUILT_IN_PROVIDERS if provider.name == "aiter"]
    span = CompileRange(start=32, end=32)
    strict = manager(span=span, device=PROFILES["mi355x"], providers=aiter)
    reasons = {refusal.reason.value for refusal in strict.analyze(gpt_oss).matches.refusals}
    assert reasons == {"rounding", "provider"} or reasons == {"rounding"}
    lenient = manager(PassConfig(allow_rounding_changes=True), span=span, device=PROFILES["mi355x"], providers=aiter)
    analysis = lenient.analyze(gpt_oss)
    savings = {
        order: decide_in_order(analysis.problem, order).saving_ns
        for order in (("act_padding", "allreduce_rms"), ("allreduce_rms", "act_padding"))
    }
    assert savings["act_padding", "allreduce_rms"] > savings["allreduce_rms", "act_padding"] > 0
    decision = lenient.decide(analysis, PLANNED, "graph_0")
    report = lenient.report("graph_0", analysis, decision)
    allowed = {("vllm", "fp32"), ("llama", "gpt_oss")}
    assert {fusion.rounding_change for fusion in report.applied} <= allowed


def test_sites_do_not_change_with_rules_that_are_off(gpt_oss: fx.Graph) -> None:
    canonical = canonicalize(gpt_oss)
    every = manager().analyze(gpt_oss).problem.sites
    few = manager(PassConfig(fuse_act_padding=False)).analyze(gpt_oss).problem.sites
    assert every == few
    assert len(every) == len(canonical.calls(*{site.core.target for site in find_sites(canonical)}))


def coupled(name: str, **attributes: Any) -> Rule:
    """A rule of the built-in ones that asks for more."""
    rules = together(name, **attributes)
    return next(rule for rule in rules if isinstance(rule, ComposedRule) and rule.member.residual)


def test_a_rule_whose_matches_go_together(gpt_oss: fx.Graph) -> None:
    """With one place forbidden, a rule that is applied everywhere or nowhere is applied nowhere."""
    alone = manager(PassConfig(forbid=["act_padding@*layers.1.*"]), rules=[coupled("act_padding")])
    assert fused(alone, gpt_oss)["act_padding"] == LAYERS - 1
    together = manager(PassConfig(forbid=["act_padding@*layers.1.*"]), rules=[coupled("act_padding", together=True)])
    assert fused(together, gpt_oss)["act_padding"] == 0
    assert fused(manager(rules=[coupled("act_padding", together=True)]), gpt_oss)["act_padding"] == LAYERS


def test_a_rule_that_requires_what_it_conflicts_with_is_never_applied(gpt_oss: fx.Graph) -> None:
    """Each reads the residual that the one before yields, so every pad needs its neighbours' all-reduce fusions."""
    others = [rule for rule in BUILT_IN_RULES if rule.name == "allreduce_rms"]
    needy = coupled("act_padding", requires=("allreduce_rms",))
    planner = manager(rules=[needy, *others])
    analysis = planner.analyze(gpt_oss)
    problem_of = analysis.problem
    assert problem_of.program.requires
    chosen = set(planner.decide(analysis, PLANNED, "graph_0").selected)
    assert all(j in chosen for i, j in problem_of.program.requires if i in chosen)
    contradiction = manager(rules=[coupled("act_padding", requires=("act_padding",)), *others])
    assert fused(contradiction, gpt_oss)["allreduce_rms"] == LAYERS + 1


def test_a_flag_whose_fusions_cost_more_than_they_save_is_a_warning(gpt_oss: fx.Graph) -> None:
    torch_alone = [provider for provider in BUILT_IN_PROVIDERS if provider.name == "torch"]
    for flag, warned in ((None, False), (True, True)):
        planner = manager(PassConfig(fuse_act_padding=flag), providers=torch_alone)
        report = report_of(planner, gpt_oss)
        assert not report.applied
        details = [each.detail for each in report.refusals if each.reason is Reason.NO_EFFECT]
        assert bool(details) is warned
        assert all("fuse_act_padding=True has no effect: it costs at least" in detail for detail in details)
        assert all(not loss.blocked_by and (loss.lost_ns or 0) > 0 for loss in report.lost)
