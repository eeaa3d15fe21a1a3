"""What alternatives cost: a model with sourced constants, and tables of measured or modelled times."""

from fuseplan.planner.costs.cache import cached_path, cached_table
from fuseplan.planner.costs.devices import AITER_GATE_LATER, AITER_GATE_MAY_2026, HARDWARE
from fuseplan.planner.costs.hardware import Aiter, Constant, Gate, Hardware, Peers, Protocol
from fuseplan.planner.costs.model import KNOWN_PROVIDERS, CostModel, Kernel, Region, total_ns
from fuseplan.planner.costs.table import CostTable, Provenance, Row

__all__ = [
    "AITER_GATE_LATER",
    "AITER_GATE_MAY_2026",
    "HARDWARE",
    "KNOWN_PROVIDERS",
    "Aiter",
    "Constant",
    "CostModel",
    "CostTable",
    "Gate",
    "Hardware",
    "Kernel",
    "Peers",
    "Protocol",
    "Provenance",
    "Region",
    "Row",
    "cached_path",
    "cached_table",
    "total_ns",
]
