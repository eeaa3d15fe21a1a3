"""Problems of small graphs that are written in dialect ops, priced on the device with round constants."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._inductor.pattern_matcher import PatternMatcherPass

from fuseplan.dialect import ops
from fuseplan.dialect.raising import canonicalize
from fuseplan.graph.canonical import CanonicalGraph
from fuseplan.graph.facts import aten
from fuseplan.matching import ExternalMatch, ExternalPass, Match, find_matches
from fuseplan.planner.alternatives import alternative_name, row_key
from fuseplan.planner.costs import CostModel, CostTable, Provenance, Row
from fuseplan.planner.pose import Problem, pose
from fuseplan.planner.prices import Prices
from fuseplan.providers import BUILT_IN_PROVIDERS, PROFILES, Provider
from fuseplan.rules import Rule, by_name
from fuseplan.rules.families import BUILT_IN_RULES
from tests.helpers import randn, written
from tests.planner.round_device import DEVICE

MODEL = CostModel(DEVICE)
PROVIDERS = [provider for provider in BUILT_IN_PROVIDERS if provider.name in ("triton", "torch")]
TORCH = PROVIDERS[:1]
X, R, W = randn(10, 100), randn(10, 100, seed=1), torch.ones(100, dtype=torch.bfloat16)


UNASKED = tuple(rule for rule in BUILT_IN_RULES if rule.opt_in is None)
"""The rules that are on wherever nobody asked."""


def norm_and_pad(x: Any, r: Any, w: Any) -> Any:
    y, total = ops.fused_add_rms_norm(x, r, w, 1e-5, "llama")
    return ops.pad(y, 28), total


def twice(x: Any, r: Any, w: Any) -> Any:
    """Two norms whose pads contend with nobody."""
    y, total = ops.fused_add_rms_norm(x, r, w, 1e-5, "llama")
    return ops.pad(y, 28), ops.pad(ops.rms_norm(total, w, 1e-5, "llama"), 28)


def pads_of(*widths: int) -> Any:
    """Pads of one norm, which exclude each other."""

    def model(x: Any, r: Any, w: Any) -> Any:
        y = ops.rms_norm(x, w, 1e-5, "llama")
        return tuple(ops.pad(y, width) for width in widths)

    return model


def pads(count: int) -> Any:
    """So many norms in a row, each with a pad that contends with nobody, in graph order also by name."""

    def model(x: Any, r: Any, w: Any) -> Any:
        values = []
        for _ in range(count):
            x = ops.rms_norm(x, w, 1e-5, "llama")
            values.append(ops.pad(x, 28))
        return tuple(values)

    return model


def contested(x: Any, r: Any, w: Any) -> Any:
    """An all-reduce, a norm and a pad: three rules want the norm."""
    return norm_and_pad(ops.all_reduce(x, "g"), r, w)


def crossing(x: Any, r: Any, w: Any) -> Any:
    """Each norm reads what the other's all-reduce yields: as fused ops they would wait for each other."""
    a, b = ops.all_reduce(aten.sin.default(x), "g"), ops.all_reduce(aten.cos.default(x), "g")
    first = ops.rms_norm(a, aten.select.int(b, 0, 0), 1e-5, "llama")
    return first, ops.rms_norm(b, aten.select.int(a, 0, 0), 1e-5, "llama"), aten.relu.default(r)


def somebodys(*nodes: fx.Node, saving_us: float | None = None, **more: Any) -> ExternalMatch:
    """A match of somebody's pass, of these nodes."""
    owner = ExternalPass(matcher=PatternMatcherPass(pass_name="somebody"), saving_us=saving_us)
    entry: Any = None
    given: dict[str, Any] = {"ordinal": 0, "emits": (), **more}
    return ExternalMatch(owner=owner, entry=entry, anchor=nodes[-1], consumed=nodes, found=entry, **given)


def matched(
    function: Any = norm_and_pad, *, dynamic: bool = False, rules: Sequence[Rule] = UNASKED,
    providers: Sequence[Provider] = PROVIDERS,
) -> tuple[CanonicalGraph, tuple[Match, ...]]:  # fmt: skip
    """The graph of a function of x, r and w, and what matches in it."""
    canonical = canonicalize(written(function, {"x": X, "r": R, "w": W}, dynamic=dynamic))
    return canonical, find_matches(canonical, by_name(rules), providers, PROFILES["h200"]).candidates


def problem_of(
    function: Any = norm_and_pad, prices: Prices | None = None, span: tuple[int, int] = (10, 10), *,
    dynamic: bool = False, rules: Sequence[Rule] = UNASKED, providers: Sequence[Provider] = PROVIDERS, **more: Any,
) -> Problem:  # fmt: skip
    canonical, found = matched(function, dynamic=dynamic, rules=rules, providers=providers)
    return pose(canonical, found, more.pop("external", ()), prices or Prices(model=MODEL), span, **more)


def by_provider(given: Problem, values: Sequence[Any]) -> dict[str, Any]:
    return {each.provider: value for each, value in zip(given.candidates, values, strict=True)}


def row(tokens: int = 8, time_ns: int = 100, spread_ns: int = 0, key: str = "k", **changes: Any) -> Row:
    given: dict[str, Any] = {
        "key": key, "tokens": tokens, "time_ns": time_ns, "spread_ns": spread_ns, "provenance": Provenance.MEASURED,
        "device": "h200", "torch": "", "triton": "", "topology": "", "date": "2026-11-22", "command": "",
    }  # fmt: skip
    return Row(**{**given, **changes})


def measured(given: Problem, rows: Mapping[str, Sequence[tuple[int, int]]], sizes: Sequence[int] = (10,)) -> CostTable:
    """A table of the one component of a graph: (time, spread) by size of alternatives, or of their candidates."""
    (component,) = given.components
    places = sorted({each.site.ordinal for i in component if (each := given.candidates[i]).site})
    signature = " & ".join(given.sites[place] for place in places)
    made = []
    for name, times in rows.items():
        chosen = [given.candidates[i] for i in component if given.candidates[i].provider in name.split()]
        key = row_key(signature, alternative_name(chosen, places))
        made += [
            row(tokens, *each, key, device="round", torch="2.13", topology="tp1", command="by hand")
            for tokens, each in zip(sizes, times, strict=True)
        ]
    return CostTable(device="round", rows=tuple(made))
