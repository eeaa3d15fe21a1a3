"""Graph breaks of Dynamo: ops on both sides of one are never fused."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class GraphBreak:
    """One graph break.

    Attributes:
        reason: Dynamo's, one line.
        line: `file.py:12` of the user's model, if known.
        code: the text of that line, if known.
    """

    reason: str
    line: str | None = None
    code: str | None = None

    def __str__(self) -> str:
        at = ": ".join(part for part in (self.line, self.code) if part)
        return f"{self.reason} ({at})" if at else self.reason
