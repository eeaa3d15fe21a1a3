"""Renderers of the record."""

from fuseplan.report.contract import comparison_to_json, report_to_json
from fuseplan.report.html import check_html, render_html, save_html
from fuseplan.report.terminal import render_comparison, render_report

__all__ = [
    "check_html",
    "comparison_to_json",
    "render_comparison",
    "render_html",
    "render_report",
    "report_to_json",
    "save_html",
]
