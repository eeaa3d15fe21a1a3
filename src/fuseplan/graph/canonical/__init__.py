"""A copy of a post-grad graph in which ops are raised into the dialect, and helpers for reading spellings of ops.

`fuseplan.rules.parts` decides which ops are raised, and how.
"""

from fuseplan.graph.canonical.view import CanonicalGraph, is_dialect

__all__ = ["CanonicalGraph", "is_dialect"]
