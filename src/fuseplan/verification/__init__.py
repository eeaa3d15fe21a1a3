"""Fused ops against the unfused ones they stand for: poisoned memory, a float64 oracle, every compile range."""

from fuseplan.verification.together import verify_together
from fuseplan.verification.verifier import Verifier

__all__ = ["Verifier", "verify_together"]
