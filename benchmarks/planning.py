"""How long planning takes, beside Inductor's own matcher with the same rules on the same graph in one process.

    PYTHONPATH=src python benchmarks/planning.py [--against REVISION] [--write]

Sequential: one `PatternMatcherPass` a rule, made with `register_replacement` from the rule's own pattern and
replacement, applied one after another to a copy of the canonical graph, which is given to it for nothing. fuseplan: the
graph as Inductor hands it over, raised, matched, priced, planned and rewritten. Against: another revision, beside this
one by the same rules and by all of its own; see `against.py`.
"""

import gc
import statistics
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any

import torch
from against import compared, spread
from committed import main
from torch import fx
from torch._guards import detect_fake_mode
from torch._inductor.pattern_matcher import PatternMatcherPass, fwd_only, register_replacement
from torch._inductor.virtualized import V

from fuseplan.compilation.manager import PostGradPassManager
from fuseplan.config import CompileRange, Environment, PassConfig
from fuseplan.dialect.raising import canonicalize
from fuseplan.explanation.capture import capture
from fuseplan.graph.surgery import copy_graph
from fuseplan.matching import Match
from fuseplan.planner import Solver
from fuseplan.planner.program import IntegerProgram
from fuseplan.providers import PROFILES
from fuseplan.rewriting import apply
from fuseplan.workloads import catalog

RULES = ("allreduce_rms_padding", "allreduce_rms", "act_padding")
RANGE = CompileRange(start=1, end=64)
REPEATS = 5


def copied(graph: fx.Graph) -> fx.Graph:
    copy, _ = copy_graph(graph)
    fx.GraphModule(graph.owning_module or {}, copy)
    return copy


def timed(function: Callable[[], Any]) -> float:
    """Milliseconds."""
    gc.collect()
    start = time.perf_counter()
    function()
    return (time.perf_counter() - start) * 1e3


def manager_for(device: str = "h200") -> PostGradPassManager:
    return PostGradPassManager(
        PassConfig(), compile_range=RANGE, device=PROFILES[device], environment=Environment(enabled=True)
    )


def pipeline(graph: fx.Graph) -> dict[str, float]:
    """Every stage of a plan of a graph, by a manager that has seen no graph before, in milliseconds."""
    manager, copy = manager_for(), copied(graph)
    gc.collect()
    start = time.perf_counter()
    analysis = manager.analyze(copy)
    analyzed = time.perf_counter()
    decision = manager.decide(analysis, manager.config.chosen_policy, "graph_0")
    planned = time.perf_counter()
    # The plan is for another device than this one; the reference stands in for its kernels, which changes nothing here.
    chosen = [analysis.problem.candidates[index].match for index in decision.selected]
    matches = [replace(match, provider="torch") for match in chosen if isinstance(match, Match)]
    apply(analysis.canonical, sorted(matches, key=lambda match: match.anchor))
    done = time.perf_counter()
    stages = {name: ns / 1e6 for name, ns in analysis.stages_ns.items()}
    return {
        **stages,
        "choosing": (planned - analyzed) * 1e3,
        "solving": decision.plan_ns / 1e6,
        "planned": (planned - start) * 1e3,
        "rewriting": (done - planned) * 1e3,
        "total": (done - start) * 1e3,
        "fused": len(decision.selected),
    }


def inductor_passes(graph: fx.Graph) -> list[PatternMatcherPass]:
    """A `PatternMatcherPass` a rule, with a pattern for each combination of constants that there is in the graph, since
    Inductor's patterns hold them.
    """
    candidates = manager_for().analyze(graph).matches.candidates
    passes = []
    for name in RULES:
        matcher, seen = PatternMatcherPass(pass_name=name), set()
        for match in (match for match in candidates if match.rule.name == name):
            constants = {key: value for key, value in match.values.items() if not isinstance(value, fx.Node)}
            if (match.rule.op.name, *sorted(constants.items())) not in seen:
                seen.add((match.rule.op.name, *sorted(constants.items())))
                _register(match, constants, matcher)
        passes.append(matcher)
    return passes


def _register(match: Match, constants: dict[str, Any], matcher: PatternMatcherPass) -> None:
    rule = match.rule
    tensors = [name for name in rule.variables if name not in constants]

    def search(*values: Any) -> Any:
        return rule.pattern(**dict(zip(tensors, values, strict=True)), **constants)

    def substitute(*values: Any) -> Any:
        return rule.replacement(**dict(zip(tensors, values, strict=True)), **constants)

    shapes = {"weight": (2880,)}
    examples = [torch.empty(shapes.get(name, (5, 2880)), dtype=torch.bfloat16) for name in tensors]
    register_replacement(with_names(search, tensors), with_names(substitute, tensors), examples, fwd_only, matcher)


def with_names(function: Callable[..., Any], names: list[str]) -> Callable[..., Any]:
    """Inductor's matcher reads the parameters of a pattern by name."""
    scope: dict[str, Any] = {"function": function}
    exec(f"def named({', '.join(names)}): return function({', '.join(names)})", scope)
    named: Callable[..., Any] = scope["named"]
    return named


def sequential(graph: fx.Graph, passes: list[PatternMatcherPass]) -> tuple[float, list[int]]:
    """Applies the passes one after another to a copy of the canonical graph: (milliseconds, matches of each)."""
    canonical = copied(canonicalize(graph).graph)
    mode = detect_fake_mode([node.meta["val"] for node in canonical.nodes if "val" in node.meta])
    counts: list[int] = []
    with V.set_fake_mode(mode):
        spent = timed(lambda: counts.extend(each.apply(canonical) for each in passes))
    return spent, counts


def stacked(graph: fx.Graph, times: int) -> fx.Graph:
    """A graph of so many times the layers: copies of a graph, the final norm of each in the place of the embedding of
    the next one.
    """
    big = fx.Graph(owning_module=graph.owning_module)
    shared: dict[fx.Node, fx.Node] = {}
    hidden: fx.Node | None = None
    embedding = next(iter(graph.find_nodes(op="call_function", target=torch.ops.aten.embedding.default)))
    last = max(graph.find_nodes(op="call_function", target=torch.ops.aten.rsqrt.default))
    while not any(user.op == "output" or "mm" in str(user.target) for user in last.users):
        last = next(iter(last.users))
    output: Any = None
    for _ in range(times):
        mapping = dict(shared)
        for node in graph.nodes:
            if node.op in ("placeholder", "get_attr"):
                if node not in mapping:
                    shared[node] = mapping[node] = big.node_copy(node, lambda n: shared[n])
            elif node is embedding and hidden is not None:
                mapping[node] = hidden
            elif node.op == "output":
                output = fx.map_arg(node.args[0], lambda n: mapping[n])  # noqa: B023
            else:
                mapping[node] = big.node_copy(node, lambda n: mapping[n])  # noqa: B023
        hidden = mapping[last]
    result = big.output(output)
    result.meta = dict(graph.output_node().meta)
    fx.GraphModule(graph.owning_module or {}, big)
    return big


def tangles() -> dict[str, IntegerProgram]:
    """2,000 candidates in one component, as overlapping regions make them, and without any structure."""
    count, random = 2000, Random(0)
    places = [random.randrange(1000) for _ in range(count)]
    regions = [{(place + random.randrange(8)) % 1000 for _ in range(3)} for place in places]
    overlaps = {(i, j) for j in range(count) for i in range(j) if regions[i] & regions[j]}
    pairs: set[tuple[int, int]] = set()
    while len(pairs) < 4 * count:
        i, j = sorted(random.sample(range(count), 2))
        pairs.add((i, j))
    savings = tuple(random.randint(1, 20_000) for _ in range(count))
    names = tuple(f"c{index:04}" for index in range(count))
    return {
        name: IntegerProgram(names=names, savings_ns=savings, conflicts=frozenset(conflicts))
        for name, conflicts in (("overlapping regions", overlaps), ("random pairs", pairs))
    }


def contest(graph: fx.Graph) -> dict[str, Any]:
    """fuseplan beside sequential passes, interleaved."""
    start = time.perf_counter()
    passes = inductor_passes(graph)
    registering = (time.perf_counter() - start) * 1e3
    ours: list[dict[str, float]] = []
    theirs: list[float] = []
    counts: list[int] = []
    pipeline(graph)
    for _ in range(REPEATS):
        ours.append(pipeline(graph))
        spent, counts = sequential(graph, passes)
        theirs.append(spent)
    stages = {name: spread([each[name] for each in ours]) for name in ours[0] if name != "fused"}
    total = statistics.median(each["total"] for each in ours)
    return {
        "nodes": len(graph.nodes),
        "fuseplan_ms": stages,
        "fuseplan_fused": int(ours[0]["fused"]),
        "sequential_ms": spread(theirs),
        "sequential_fused": dict(zip(RULES, counts, strict=True)),
        "sequential_registering_ms": round(registering, 1),
        "ratio": round(statistics.median(theirs) / total, 2),
    }


def scaling(graph: fx.Graph) -> list[dict[str, float]]:
    rows = []
    for times in (1, 10, 100):
        big = stacked(graph, times) if times > 1 else graph
        runs = [pipeline(big)["planned"] for _ in range(3 if times < 100 else 2)]
        tracemalloc.start()
        manager = manager_for()
        analysis = manager.analyze(big)
        manager.decide(analysis, manager.config.chosen_policy, "graph_0")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        nodes = len(big.nodes)
        rows.append(
            {
                "layers": 36 * times,
                "nodes": nodes,
                "planned_ms": round(min(runs), 1),
                "us_per_node": round(min(runs) * 1e3 / nodes, 2),
                "peak_bytes_per_node": round(peak / nodes),
            }
        )
        del manager, analysis, big
    return rows


def tangled() -> list[dict[str, Any]]:
    rows = []
    for name, program in tangles().items():
        start = time.perf_counter()
        solution = Solver().solve(program)
        row = {
            "component": name,
            "candidates": 2000,
            "conflicts": len(program.conflicts),
            "gap": round(solution.gap, 4),
        }
        rows.append({**row, "nodes": solution.nodes, "s": round(time.perf_counter() - start, 2)})
    return rows


def figures(against: str | None) -> dict[str, Any]:
    revisions = {} if against is None else {"against": compared(against)}
    with catalog.build("gpt-oss-120b", tp=2) as built:
        (gm,) = capture(built.model, built.inputs, {}, dynamic=True).graphs
        contests, scales = contest(gm.graph), scaling(gm.graph)
    return {"contest": contests, "scaling": scales, "tangled": tangled(), **revisions}


if __name__ == "__main__":
    main(
        "planning",
        "How long planning takes, beside Inductor's own matcher.",
        "planning gpt-oss-120b at TP=2, one range, modelled costs of h200; milliseconds",
        figures,
        {"against": "a revision, or a folder with a checkout of one, that plans beside this one"},
    )
