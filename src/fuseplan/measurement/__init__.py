"""What runs on a device to be timed: alternatives of fusions, and whole models."""

from fuseplan.measurement.costs import tune

__all__ = ["tune"]
