"""Plans of real workloads: certified, never worse than anything simpler, and independent of every order."""

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
from torch import fx

from fuseplan.compilation.analysis import Analysis
from fuseplan.compilation.manager import PostGradPassManager
from fuseplan.config import CompileRange, PassConfig, Policy
from fuseplan.dialect.raising import canonicalize
from fuseplan.errors import PlanError
from fuseplan.planner.alternatives import UNFUSED, alternative_name, row_key
from fuseplan.planner.baselines import greedy, heaviest, largest
from fuseplan.planner.decide import decide_in_order, plan_record, replay
from fuseplan.planner.pose import Problem
from fuseplan.planner.program import Solution
from fuseplan.planner.solver import Solver
from fuseplan.providers import PROFILES
from fuseplan.record import GraphReport, SavedPlans, diff
from fuseplan.rules.families import find_sites
from tests.planner.posing import row
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
                rows[key, tokens] = {**vars(row(tokens, time_ns, key=key)), "topology": "tp2"}
    return list(rows.values())


def test_sites_do_not_change_with_rules_that_are_off(gpt_oss: fx.Graph) -> None:
    canonical = canonicalize(gpt_oss)
    every = manager().analyze(gpt_oss).problem.sites
    few = manager(PassConfig(fuse_act_padding=False)).analyze(gpt_oss).problem.sites
    assert every == few
    assert len(every) == len(canonical.calls(*{site.core.target for site in find_sites(canonical)}))
