"""Problems of small graphs that are written in dialect ops, priced on the device with round constants."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fuseplan.dialect import ops
from fuseplan.dialect.raising import canonicalize
from fuseplan.matching import find_matches
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


def problem_of(
    function: Any = norm_and_pad,
    prices: Prices | None = None,
    span: tuple[int, int] = (10, 10),
    *,
    dynamic: bool = False,
    rules: Sequence[Rule] = UNASKED,
    providers: Sequence[Provider] = PROVIDERS,
    **more: Any,
) -> Problem:
    canonical = canonicalize(written(function, {"x": X, "r": R, "w": W}, dynamic=dynamic))
    found = find_matches(canonical, by_name(rules), providers, PROFILES["h200"]).candidates
    return pose(canonical, found, more.pop("external", ()), prices or Prices(model=MODEL), span, **more)


def by_provider(given: Problem, values: Sequence[Any]) -> dict[str, Any]:
    return {each.provider: value for each, value in zip(given.candidates, values, strict=True)}


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
            Row(
                key=key, tokens=tokens, time_ns=time, spread_ns=spread, provenance=Provenance.MEASURED, device="round",
                torch="2.13", triton="", topology="tp1", date="2026-11-22", command="by hand",
            )
            for tokens, (time, spread) in zip(sizes, times, strict=True)
        ]  # fmt: skip
    return CostTable(device="round", rows=tuple(made))
