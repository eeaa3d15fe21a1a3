"""What it costs to say where rules nearly match, beside matching itself, on the same graphs in one process.

    PYTHONPATH=src python benchmarks/near_misses.py [--write]

The last workloads are the worst there are: an op stands behind every all-reduce, or every rule is switched off, so that
each place of the graph gets a refusal.
"""

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from committed import main
from torch import fx, nn

from fuseplan.dialect.raising import canonicalize
from fuseplan.explanation.capture import capture
from fuseplan.matching import find_disabled, find_matches, find_near_misses
from fuseplan.providers import BUILT_IN_PROVIDERS, PROFILES
from fuseplan.rules import by_name
from fuseplan.rules.families import BUILT_IN_RULES
from fuseplan.workloads import catalog

REPEATS = 21
DEVICE = PROFILES["h200"]
EVERYTHING = by_name(BUILT_IN_RULES)
WORKLOADS = ("gpt-oss-120b", "gpt-oss-120b:outer-reduce", "llama-3.1-8b")
WORST = "gpt-oss-120b:outer-reduce"


def obstruct(model: nn.Module) -> None:
    """Puts an op behind every module that ends in an all-reduce."""
    for module in list(model.modules()):
        if type(module).__name__ == "AllReduced":
            module.register_forward_hook(lambda module, args, output: output.sin())


def measure(graph: fx.Graph, *, disabled: bool) -> dict[str, Any]:
    """Both, one after the other, `REPEATS` times, in milliseconds. Each time the graph is raised anew: layouts that
    matching works out stay with the raised graph.
    """
    times: dict[str, list[float]] = {"matching": [], "near_misses": []}
    flags = {name: members[0].flags[0] for name, members in EVERYTHING.items()}
    refusals = 0
    gc.collect()
    gc.disable()
    for _ in range(REPEATS):
        canonical = canonicalize(graph)
        start = time.perf_counter()
        matches = find_matches(canonical, EVERYTHING, BUILT_IN_PROVIDERS, DEVICE)
        matched = time.perf_counter()
        found = find_disabled(matches, flags) if disabled else find_near_misses(canonical, EVERYTHING, matches)
        done = time.perf_counter()
        times["matching"].append((matched - start) * 1e3)
        times["near_misses"].append((done - matched) * 1e3)
        refusals = len(found)
    gc.enable()
    rows = {name: spread(values) for name, values in times.items()}
    ratio = rows["near_misses"]["median"] / rows["matching"]["median"]
    nodes = len(graph.nodes)
    return {"nodes": nodes, "matches": len(matches.candidates), "refusals": refusals, **rows, "ratio": round(ratio, 2)}


def measured(name: str, *, plant: Callable[[nn.Module], None] | None = None, disabled: bool = False) -> dict[str, Any]:
    """A workload by name. Its process group has to be known while its graph is matched."""
    with catalog.build(name, tp=2) as built:
        assert isinstance(built.model, nn.Module)
        if plant is not None:
            plant(built.model)
        (gm,) = capture(built.model, built.inputs, {}, dynamic=True).graphs
        return measure(gm.graph, disabled=disabled)


def spread(values: Sequence[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": round(middle, 2), "iqr": round(high - low, 2)}


def figures() -> dict[str, Any]:
    rows = {name: measured(name) for name in WORKLOADS}
    rows[f"{WORST}, an op behind every all-reduce"] = measured(WORST, plant=obstruct)
    rows[f"{WORST}, every flag off"] = measured(WORST, disabled=True)
    return {"workloads": rows}


if __name__ == "__main__":
    main(
        "near_misses",
        "What near misses cost, beside matching.",
        "near misses beside matching, one range, TP=2, providers of h200; milliseconds",
        figures,
    )
