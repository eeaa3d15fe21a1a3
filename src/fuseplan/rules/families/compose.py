"""Fused ops and rules of a core with its neighbours, composed and not enumerated: prologue x core x epilogue.

A member's arguments and results follow from its parts:

    (the core's, with a residual where one is added, [the epilogue's own], [the prologue's own])
        -> (y or the epilogue's, [y where it is kept], [the sum])

The last result is the input of a core with a residual or a prologue: x + residual, rounded, or without a residual the
reduced x. A member with neither has no such result, since it would be x itself.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fuseplan.graph.facts import item
from fuseplan.graph.ops import DialectOp, Sample, define
from fuseplan.rules.base import Rule
from fuseplan.rules.parts import Core, Prologue, RowEpilogue

SUPPORTED = (torch.bfloat16, torch.float16, torch.float32)
"""Dtypes of activations that fused norms take."""


def _results(values: tuple[Any, ...]) -> Any:
    return values if len(values) > 1 else values[0]


def fused_as(op: DialectOp, name: str, *, samples: Sequence[Sample] = (), writes: Sequence[str] = ()) -> DialectOp:
    """A fused op that computes the same as a single op.

    Args:
        op: the op, with its reference, fake and tolerance.
        name: the name of the fused op.
        samples: samples of the fused op, where they differ from the op's own.
        writes: the arguments that its kernels write to.
    """
    return define(
        name,
        op.schema,
        reference=op.reference,
        fake=op.fake,
        samples=samples or op.samples,
        error_factor=op.error_factor,
        fused=True,
        draws=op.draws,
        writes=writes,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Member:
    """One combination of parts.

    Attributes:
        core: the core.
        prologue: the op on its input; None: no op.
        residual: whether a residual is added before it.
        epilogue: the op on its result; None: no op.
        keeps: whether the core's own result is yielded beside the epilogue's, for its other readers; None: it can be
            recovered from the epilogue's result, or no member covers such places.
    """

    core: Core
    prologue: Prologue | None = None
    residual: bool = False
    epilogue: RowEpilogue | None = None
    keeps: bool | None = None

    def __post_init__(self) -> None:
        assert self.epilogue is None or self.core.name in self.epilogue.cores, self
        assert self.keeps is None or (self.epilogue is not None and self.epilogue.core_of is None), self

    @property
    def op(self) -> DialectOp:
        """The unfused op of the core."""
        op = self.core.residual_op if self.residual else self.core.op
        assert op is not None
        return op

    @property
    def parts(self) -> list[DialectOp]:
        """The ops that it is composed of, in order."""
        ends = (self.prologue, self.epilogue)
        before, after = ([part.op] if part is not None else [] for part in ends)
        return [*before, self.op, *after]

    @property
    def name(self) -> str:
        """The fused op's name: the names of its parts, or for a core alone its op's name without `fused_`."""
        if self.prologue is None and self.epilogue is None:
            return self.op.name.removeprefix("fused_")
        names = (
            self.prologue.name if self.prologue else "",
            self.op.name,
            self.epilogue.suffix if self.epilogue else "",
            f"and_{self.core.result}" if self.keeps else "",
        )
        return "_".join(name for name in names if name)

    @property
    def yields_sum(self) -> bool:
        """Whether it also yields the input of the core."""
        return self.residual or self.prologue is not None

    def compute(
        self, before: Any, core: Any, after: Any, arguments: Sequence[Any], *, keeps_core: bool = False
    ) -> tuple[Any, ...]:
        """The parts, one after the other.

        Args:
            before: computes the prologue.
            core: computes the core.
            after: computes the epilogue.
            arguments: arguments of the fused op, in its order.
            keeps_core: whether to yield the core's own result even where the epilogue's result contains it.

        Returns:
            All results.
        """
        count = len(self.op.parameters)
        last = len(arguments) - (len(self.prologue.parameters) if self.prologue else 0)
        x, *rest = arguments[:count]
        if self.prologue is not None:
            x = before(x, *arguments[last:])
        found = core(x, *rest)
        y, total = (found[0], found[1]) if self.residual else (found, x)
        values: tuple[Any, ...] = (y,)
        if self.epilogue is not None:
            result, several = after(y, *arguments[count:last]), range(self.epilogue.results)
            values = (result,) if len(several) == 1 else tuple(result[index] for index in several)
            values += (y,) if self.keeps or (keeps_core and self.epilogue.core_of is not None) else ()
        return (*values, total) if self.yields_sum else values

    def define(self) -> DialectOp:
        """Defines the fused op: its reference and fake run those of its parts, one after the other."""
        prologue, epilogue = self.prologue, self.epilogue
        parameters = [*self.op.parameters, *(epilogue.parameters if epilogue else ())]
        parameters += prologue.parameters if prologue else ()
        count = (epilogue.results if epilogue else 1) + bool(self.keeps) + self.yields_sum
        outputs = f"({', '.join(['Tensor'] * count)})"

        def run(kind: str, arguments: Sequence[Any]) -> Any:
            before, core, after = (
                getattr(part.op, kind) if part is not None else None for part in (prologue, self, epilogue)
            )
            return _results(self.compute(before, core, after, arguments))

        def reference(*arguments: Any) -> Any:
            return run("reference", arguments)

        def fake(*arguments: Any) -> Any:
            return run("fake", arguments)

        reference.__doc__ = f"{' -> '.join(op.name for op in self.parts)}, each as its own reference computes it."
        return define(
            self.name,
            f"({', '.join(parameters)}) -> {'Tensor' if count == 1 else outputs}",
            reference=reference,
            fake=fake,
            samples=[
                self._sample(each) for each in self.op.samples if each.width % (epilogue.unit if epilogue else 1) == 0
            ],
            error_factor=self.op.error_factor,
            fused=True,
            collective=any(op.collective for op in self.parts),
            draws={name: draw for op in self.parts for name, draw in op.draws.items()},
            packed=epilogue.op.packed if epilogue else (),
        )

    def _sample(self, core: Sample) -> Sample:
        def make(device: torch.device, generator: torch.Generator) -> tuple[Any, ...]:
            own = self.epilogue.sample(device) if self.epilogue else ()
            shared = self.prologue.sample() if self.prologue else ()
            return *core.make(device, generator), *own, *shared

        return Sample(name=core.name, make=make)


class ComposedRule(Rule):
    """[prologue ->] [+ residual ->] core [-> epilogue]  =>  one op.

    Further values after the first: the core's own result, where the op keeps it or the epilogue's first result contains
    it, and the sum that the core reads.
    """

    def __init__(self, name: str, flags: tuple[str, ...], member: Member, op: DialectOp) -> None:
        self.name, self.flags, self.member = name, flags, member
        self.op, self.core = op, member.op

    def takes(self, core: fx.Node, consumed: Collection[fx.Node]) -> bool:
        """Of two members, the one that keeps the core's result takes the cores that have other readers."""
        if self.member.keeps is None:
            return True
        result = item(core, 0) if self.member.residual else core
        assert result is not None, core.format_node()
        return self.member.keeps == any(user not in consumed for user in result.users)

    def pattern(self, **bound: Any) -> Any:
        """The parts, one after the other."""
        prologue, epilogue = self.member.prologue, self.member.epilogue
        before, after = (part.op if part is not None else None for part in (prologue, epilogue))
        arguments = [bound[name] for name in self.variables]
        return self.member.compute(before, self.core, after, arguments, keeps_core=True)

    def replacement(self, **bound: Any) -> Any:
        """The fused op, and the core's result recovered from the epilogue's."""
        results = super().replacement(**bound)
        epilogue = self.member.epilogue
        if epilogue is None or epilogue.core_of is None:
            return results
        own = epilogue.results
        return *results[:own], epilogue.core_of(results[0], bound), *results[own:]
