"""A copy of a post-grad graph in which ops are raised into the dialect, and what reading spellings of ops takes.

What is raised, and how, is a matter of `fuseplan.rules.parts`.
"""

from fuseplan.graph.canonical.view import CanonicalGraph, is_dialect

__all__ = ["CanonicalGraph", "is_dialect"]
