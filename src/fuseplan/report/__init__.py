"""Renderers of the record."""

from fuseplan.report.contract import comparison_to_json
from fuseplan.report.terminal import render_comparison

__all__ = ["comparison_to_json", "render_comparison"]
