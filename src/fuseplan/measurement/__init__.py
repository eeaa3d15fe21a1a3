"""Timing on a device: alternatives of fusions, and whole models."""

from fuseplan.measurement.costs import tune

__all__ = ["tune"]
