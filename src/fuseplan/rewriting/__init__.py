"""Applying a choice to the original graph."""

from fuseplan.rewriting.apply import apply

__all__ = ["apply"]
