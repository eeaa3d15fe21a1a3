"""The record as a page: one self-contained file that works from disk."""

from fuseplan.report.html.page import check_html, render_html, save_html

__all__ = ["check_html", "render_html", "save_html"]
