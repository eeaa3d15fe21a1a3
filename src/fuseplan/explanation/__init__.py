"""Explaining fusions without generating code: tracing, and comparing policies on graphs."""
