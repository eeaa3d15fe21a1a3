"""What everything speaks of: pure data, JSON in and out, no torch."""

from fuseplan.record.plan import Plan, Rejected, SavedPlans, Selected, diff
from fuseplan.record.refusal import Reason, Refusal
from fuseplan.record.report import Comparison, ConflictClass, Fusion, GraphReport, Loss, NearMiss, Report, SizePrice
from fuseplan.record.serialization import from_json, to_json

__all__ = [
    "Comparison",
    "ConflictClass",
    "Fusion",
    "GraphReport",
    "Loss",
    "NearMiss",
    "Plan",
    "Reason",
    "Refusal",
    "Rejected",
    "Report",
    "SavedPlans",
    "Selected",
    "SizePrice",
    "diff",
    "from_json",
    "to_json",
]
