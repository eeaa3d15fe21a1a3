"""What is said of the places of one small graph at which rules don't match."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fuseplan.compilation.manager import PostGradPassManager
from fuseplan.config import PassConfig
from fuseplan.providers import PROFILES
from fuseplan.record import NearMiss, Nearness, Report
from tests.helpers import HIDDEN, post_grad, randn

W = torch.linspace(0.5, 1.5, HIDDEN).bfloat16()
X, R = randn(6, HIDDEN), randn(6, HIDDEN, seed=1)


def near_misses(function: Callable[..., Any], *inputs: Tensor, rule: str = "", **options: Any) -> list[NearMiss]:
    """The rows of one rule, or all, for the graph of a function on an H200; what providers decline aside."""
    manager = PostGradPassManager(PassConfig(**options), device=PROFILES["h200"])
    analysis = manager.analyze(post_grad(function, *inputs))
    report = manager.report("graph_0", analysis, manager.decide(analysis, manager.config.chosen_policy, "graph_0"))
    rows = Report(policy="planned", order=(), rules=manager.names, graphs=(report,)).near_misses
    return [row for row in rows if row.rule in (rule, None) or not rule if row.nearness is not Nearness.DECLINED]
