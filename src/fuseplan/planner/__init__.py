"""Choosing among candidates: a problem posed, priced, solved exactly, and recorded."""

from fuseplan.planner.contradiction import ContradictionError
from fuseplan.planner.decide import (
    Decision,
    Lost,
    decide_in_order,
    decide_off,
    decide_planned,
    fusion_record,
    limit,
    not_sure,
    plan_record,
    replay,
)
from fuseplan.planner.ineffective import ineffective_requests
from fuseplan.planner.pose import Problem, check_selector, pose
from fuseplan.planner.prices import Prices
from fuseplan.planner.solver import DEFAULT_NODE_BUDGET, Solver
from fuseplan.planner.sources import prices_of
from fuseplan.planner.undecided import undecided

__all__ = [
    "DEFAULT_NODE_BUDGET",
    "ContradictionError",
    "Decision",
    "Lost",
    "Prices",
    "Problem",
    "Solver",
    "check_selector",
    "decide_in_order",
    "decide_off",
    "decide_planned",
    "fusion_record",
    "ineffective_requests",
    "limit",
    "not_sure",
    "plan_record",
    "pose",
    "prices_of",
    "replay",
    "undecided",
]
