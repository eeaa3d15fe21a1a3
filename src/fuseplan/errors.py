"""The error tree, and the one warning. Every error that a user can cause is a `FuseplanError` whose text is one clear
line: what was given, what is allowed, and what to do.
"""


class FuseplanError(Exception):
    """Base class of every error that fuseplan raises on purpose."""


class FuseplanWarning(UserWarning):
    """A setting without effect, or work left undone. Each is shown once for a compiled model."""


class ConfigError(FuseplanError, ValueError):
    """A flag, policy, range, cost table or environment variable that is unknown, malformed or contradictory."""


class WorkloadError(FuseplanError, ValueError):
    """A workload that can't be built or traced: unknown name, broken `config.json`, heads that don't divide."""


class RuleError(FuseplanError, ValueError):
    """A rule that contradicts itself, e.g. a pattern and a replacement that yield different outputs."""


class PlanError(FuseplanError, ValueError):
    """A plan that can't be made, or that doesn't fit: contradictory force and forbid, a replay on another graph."""


class ReportError(FuseplanError, ValueError):
    """A report that can't be written."""


class CompatibilityError(FuseplanError, RuntimeError):
    """A torch that fuseplan can't work with: too old, or with a private interface that moved."""


class UnsupportedError(FuseplanError, RuntimeError):
    """A request that is refused by name, e.g. collectives under AOTInductor."""


class CollectiveError(FuseplanError, RuntimeError):
    """A collective kernel that can't be run, or that gave up waiting for a rank."""


class VerificationError(FuseplanError, AssertionError):
    """A rule or a kernel that `fuseplan.testing` found wrong; the text has a line for each failed check."""


class LockError(FuseplanError, ValueError):
    """A fusion lock that isn't there, is broken, or has other settings than requested."""


class RanksError(FuseplanError, RuntimeError):
    """Another rank failed, or didn't come in time.

    Attributes:
        reported: whether another rank has reported it already.
    """

    def __init__(self, text: str, *, reported: bool = False) -> None:
        super().__init__(text)
        self.reported = reported
