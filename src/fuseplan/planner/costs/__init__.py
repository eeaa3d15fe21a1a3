"""Costs of alternatives: a model with sourced constants, and tables of measured or modelled times."""

from fuseplan.devices import HARDWARE, Aiter, Constant, Hardware, OneStageLimits, Peers, Protocol
from fuseplan.devices.amd import AITER_GATE_LATER, AITER_GATE_MAY_2026
from fuseplan.planner.costs.cache import SHIPPED, cached_path, cached_table, shipped_table
from fuseplan.planner.costs.estimate import EXACT, ROW, Estimate, Exposure, combined, ends
from fuseplan.planner.costs.hardware_of import assumptions, hardware_of
from fuseplan.planner.costs.model import BUILT_IN_TIMINGS, REDUCED, CostModel
from fuseplan.planner.costs.record import DeviceRecord, Measured, record_path
from fuseplan.planner.costs.table import CostTable, Provenance, Row
from fuseplan.rules.parts.traffic import Kernel, Region, total_ns

__all__ = [
    "AITER_GATE_LATER",
    "AITER_GATE_MAY_2026",
    "BUILT_IN_TIMINGS",
    "EXACT",
    "HARDWARE",
    "REDUCED",
    "ROW",
    "SHIPPED",
    "Aiter",
    "Constant",
    "CostModel",
    "CostTable",
    "DeviceRecord",
    "Estimate",
    "Exposure",
    "Hardware",
    "Kernel",
    "Measured",
    "OneStageLimits",
    "Peers",
    "Protocol",
    "Provenance",
    "Region",
    "Row",
    "assumptions",
    "cached_path",
    "cached_table",
    "combined",
    "ends",
    "hardware_of",
    "record_path",
    "shipped_table",
    "total_ns",
]
