"""Results of verifying fusions against the unfused ops, and those that all ranks of a group still have to verify."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Verification:
    """One fused op by one provider, on arguments of one kind, against the unfused ops.

    Attributes:
        rule: the fusion, or somebody's pass.
        op: the fused op.
        provider: ran the kernel; `external` for somebody's pass.
        signature: the op with dtypes, static sizes and attributes.
        tokens: the sizes that it was run at; empty where it couldn't be run here.
        passed: False: the fusion is not applied.
        detail: the failure, with its numbers, or the sizes left out; None where all is well.
        worst: the largest error as a share of the allowed one, at most 1.0 where it passed; None where nothing could be
            compared.
        from_cache: whether the outcome is that of an earlier run with the same rule, kernel, versions and device.
        time_ns: how long it took, 0 where the outcome is from the cache.
        ranks: how many ran it together.
        transient: whether it failed for a reason that may be gone next time, i.e. for anything but wrong results: short
            memory, a deadline, an error. Such an outcome only holds for this run.
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
    ranks: int = 1
    transient: bool = False

    @property
    def unverified(self) -> bool:
        """Whether it is applied unverified: `detail` says why it couldn't be run, or not at all sizes."""
        return self.passed and self.detail is not None

    @property
    def failure(self) -> str:
        """The predicate for a kernel that didn't pass, to follow its name."""
        return f"failed verification {self.detail}" if self.tokens else f"can't be verified: {self.detail}"


@dataclass(frozen=True, kw_only=True)
class Argument:
    """One argument of a fused op: the layout of a tensor, a dtype, or a plain value.

    Attributes:
        name: the variable of the rule.
        value: a plain value, as JSON; None for the others.
        dtype: of a tensor, or the argument itself, without torch's prefix.
        shape: of a tensor, in elements; None for the others.
        stride: of a tensor, in elements.
        misalignment: bytes from a multiple of the widest load to a tensor's first element.
        device: where a tensor lies.
        same_as: an earlier argument that is the very same tensor, if any.
        fill: the value of all elements of a constant tensor; None: they are drawn.
    """

    name: str
    value: str | None = None
    dtype: str | None = None
    shape: tuple[int, ...] | None = None
    stride: tuple[int, ...] = ()
    misalignment: int = 0
    device: str | None = None
    same_as: str | None = None
    fill: float | None = None


@dataclass(frozen=True, kw_only=True)
class PendingCase:
    """All arguments at one size.

    Attributes:
        tokens: the size.
        arguments: of the rule.
    """

    tokens: int
    arguments: tuple[Argument, ...]


@dataclass(frozen=True, kw_only=True)
class Pending:
    """One fused op by a provider whose kernel is collective: all ranks verify it together, before the first run of the
    graph that it is in. It is self-contained, since a warm compile cache brings no graph.

    Attributes:
        rule: the fusion.
        op: the fused op.
        ops: the rule's ops on one line, which distinguish it from others of its name.
        provider: runs the kernel.
        signature: the op with dtypes, static sizes and attributes.
        group: the name of the process group.
        cases: the arguments that it is run on, the smallest size first.
        unfused: the graph's arguments instead of those, where a kernel rounds elsewhere.
    """

    rule: str
    op: str
    ops: str
    provider: str
    signature: str
    group: str
    cases: tuple[PendingCase, ...]
    unfused: tuple[Argument, ...] = ()

    @property
    def common(self) -> list[Any]:
        """The fields that have to be equal on all ranks; names of groups and devices may differ."""
        sizes = [[case.tokens, *(argument.shape for argument in case.arguments)] for case in self.cases]
        return [self.rule, self.op, self.ops, self.provider, self.signature, sizes]
