"""What everything speaks of: pure data, JSON in and out, no torch."""

from fuseplan.record.refusal import Reason, Refusal
from fuseplan.record.report import Comparison, ConflictClass, Fusion, GraphReport, Loss, NearMiss, Report
from fuseplan.record.serialization import from_json, to_json

__all__ = [
    "Comparison",
    "ConflictClass",
    "Fusion",
    "GraphReport",
    "Loss",
    "NearMiss",
    "Reason",
    "Refusal",
    "Report",
    "from_json",
    "to_json",
]
