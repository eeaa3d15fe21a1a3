"""Problems of small graphs that are written in dialect ops, priced on the device with round constants."""

from collections.abc import Sequence
from typing import Any

import torch

from fuseplan.canonical import canonicalize
from fuseplan.dialect import ops
from fuseplan.matching import find_matches
from fuseplan.planner.costs import CostModel
from fuseplan.planner.pose import Posed, pose
from fuseplan.planner.pricing import Prices
from fuseplan.providers import BUILT_IN_PROVIDERS, PROFILES, Provider
from fuseplan.rules import BUILT_IN_RULES, Rule, by_name
from tests.helpers import randn, written
from tests.planner.round_device import DEVICE

MODEL = CostModel(DEVICE)
PROVIDERS = [provider for provider in BUILT_IN_PROVIDERS if provider.name in ("triton", "torch")]
TORCH = PROVIDERS[:1]
X, R, W = randn(10, 100), randn(10, 100, seed=1), torch.ones(100, dtype=torch.bfloat16)


def norm_and_pad(x: Any, r: Any, w: Any) -> Any:
    y, total = ops.fused_add_rms_norm(x, r, w, 1e-5, "llama")
    return ops.pad(y, 28), total


def twice(x: Any, r: Any, w: Any) -> Any:
    """Two norms whose pads contend with nobody."""
    y, total = ops.fused_add_rms_norm(x, r, w, 1e-5, "llama")
    return ops.pad(y, 28), ops.pad(ops.rms_norm(total, w, 1e-5, "llama"), 28)


def posed(
    function: Any = norm_and_pad,
    prices: Prices | None = None,
    span: tuple[int, int] = (10, 10),
    *,
    dynamic: bool = False,
    rules: Sequence[Rule] = BUILT_IN_RULES,
    providers: Sequence[Provider] = PROVIDERS,
    **more: Any,
) -> Posed:
    canonical = canonicalize(written(function, {"x": X, "r": R, "w": W}, dynamic=dynamic))
    found = find_matches(canonical, by_name(rules), providers, PROFILES["h200"]).candidates
    return pose(canonical, found, more.pop("external", ()), prices or Prices(model=MODEL), span, **more)


def by_provider(given: Posed, values: Sequence[Any]) -> dict[str, Any]:
    return {each.provider: value for each, value in zip(given.candidates, values, strict=True)}
