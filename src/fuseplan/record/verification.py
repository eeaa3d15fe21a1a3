"""What came of checking a fusion against the unfused ops."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Verification:
    """One fused op by one provider, on arguments of one kind, against what it stands for.

    Attributes:
        rule: the fusion.
        op: the fused op.
        provider: whose kernel was run.
        signature: the op with dtypes, static sizes and attributes.
        tokens: the sizes that it was run at; empty where it couldn't be run here.
        passed: False: the fusion is not applied.
        detail: what went wrong, with its numbers, or what was left out; None where all is well.
        worst: the largest error as a share of what is allowed, at most 1.0 where it passed; None where nothing could be
            compared.
        from_cache: whether the outcome is that of an earlier run with the same rule, kernel, versions and device.
        time_ns: how long it took, 0 where the outcome is from the cache.
    """

    rule: str
    op: str
    provider: str
    signature: str
    tokens: tuple[int, ...] = ()
    passed: bool = True
    detail: str | None = None
    worst: float | None = None
    from_cache: bool = False
    time_ns: int = 0
