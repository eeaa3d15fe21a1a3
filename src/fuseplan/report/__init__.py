"""Renderers of the record, and locks, which reports are compared with."""

from fuseplan.report.bench import bench_to_json, render_bench
from fuseplan.report.contract import comparison_to_json, report_to_json
from fuseplan.report.html import check_html, render_html, save_html
from fuseplan.report.lock import FusionLock, LockSettings
from fuseplan.report.plot import check_plot, save_plot
from fuseplan.report.terminal import render_comparison, render_report
from fuseplan.report.verdict import Verdict, render_verdict, verdict_to_json

__all__ = [
    "FusionLock",
    "LockSettings",
    "Verdict",
    "bench_to_json",
    "check_html",
    "check_plot",
    "comparison_to_json",
    "render_bench",
    "render_comparison",
    "render_html",
    "render_report",
    "render_verdict",
    "report_to_json",
    "save_html",
    "save_plot",
    "verdict_to_json",
]
