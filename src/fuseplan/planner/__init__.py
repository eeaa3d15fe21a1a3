"""Choosing among candidates."""

from fuseplan.planner.ordered import Choice, choose_in_order

__all__ = ["Choice", "choose_in_order"]
