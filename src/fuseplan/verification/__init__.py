"""Checks fused ops against the unfused ops they replace: poisoned memory, a float64 oracle, every compile range."""

from fuseplan.verification.together import verify_together
from fuseplan.verification.verifier import Verifier

__all__ = ["Verifier", "verify_together"]
