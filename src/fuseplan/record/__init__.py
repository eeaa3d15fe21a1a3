"""The records that all rooms share: pure data, JSON in and out, no torch."""

from fuseplan.record.counterfactual import Change, Difference, changes, differences
from fuseplan.record.evidence import (
    Box,
    CostRow,
    DeviceConstant,
    Drawing,
    Evidence,
    KernelTime,
    PolicyAt,
    SizePoint,
)
from fuseplan.record.fusion import ConflictClass, Fusion, Loss, SizePrice
from fuseplan.record.graph_break import GraphBreak
from fuseplan.record.near_miss import NearMiss
from fuseplan.record.plan import Plan, Rejected, SavedPlans, Selected, diff
from fuseplan.record.refusal import Nearness, Reason, Refusal
from fuseplan.record.report import Comparison, GraphReport, Report
from fuseplan.record.serialization import from_json, to_json
from fuseplan.record.unsure import Unsure
from fuseplan.record.verification import Argument, Pending, PendingCase, Verification

__all__ = [
    "Argument",
    "Box",
    "Change",
    "Comparison",
    "ConflictClass",
    "CostRow",
    "DeviceConstant",
    "Difference",
    "Drawing",
    "Evidence",
    "Fusion",
    "GraphBreak",
    "GraphReport",
    "KernelTime",
    "Loss",
    "NearMiss",
    "Nearness",
    "Pending",
    "PendingCase",
    "Plan",
    "PolicyAt",
    "Reason",
    "Refusal",
    "Rejected",
    "Report",
    "SavedPlans",
    "Selected",
    "SizePoint",
    "SizePrice",
    "Unsure",
    "Verification",
    "changes",
    "diff",
    "differences",
    "from_json",
    "to_json",
]
