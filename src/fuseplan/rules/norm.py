"""Fusions around RMSNorm, composed and not enumerated.

prologue    (all_reduce) (residual add)
core        rms_norm
epilogue    (pad | static fp8 quant | dynamic fp8 quant)
"""

from typing import Any

import torch

from fuseplan.dialect import NORM_FAMILY, Epilogue, ops
from fuseplan.dialect.fused import DYNAMIC_FP8_QUANT, PAD, STATIC_FP8_QUANT
from fuseplan.record import Reason, Refusal
from fuseplan.rules.base import Bindings, Rule

SUPPORTED = (torch.bfloat16, torch.float16, torch.float32)


class NormRule(Rule):
    """[all_reduce ->] [+ residual ->] rms_norm [-> epilogue]  =>  one op.

    y = epilogue(rms_norm(sum_ranks(x) + residual) * weight)

    The values it yields beside the first: the unpadded y where the epilogue is a pad, and the sum that was normalised.
    """

    def __init__(
        self, name: str, flags: tuple[str, ...], *, reduce: bool, residual: bool, epilogue: Epilogue | None
    ) -> None:
        self.name, self.flags = name, flags
        self.reduce, self.residual, self.epilogue = reduce, residual, epilogue
        self.op = NORM_FAMILY[reduce, residual, epilogue.suffix if epilogue else None]
        self.core = ops.fused_add_rms_norm if residual else ops.rms_norm

    @property
    def variables(self) -> tuple[str, ...]:
        """The fused op's own arguments, by the names in its schema."""
        return tuple(argument.name for argument in self.op.overload._schema.arguments)

    def pattern(
        self,
        x: Any,
        weight: Any,
        eps: Any,
        rounding: Any,
        residual: Any = None,
        group_name: Any = None,
        **epilogue: Any,
    ) -> Any:
        """The parts, one after the other."""
        if self.reduce:
            x = ops.all_reduce(x, group_name)
        if self.residual:
            y, total = ops.fused_add_rms_norm(x, residual, weight, eps, rounding)
        else:
            y, total = ops.rms_norm(x, weight, eps, rounding), x
        values = self._finish(y, tuple(epilogue.values()))
        return (*values, total) if self.residual or self.reduce else values

    def _finish(self, y: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        if self.epilogue is None:
            return (y,)
        result = self.epilogue.op(y, *arguments)
        if self.epilogue is PAD:
            return result, y
        return (result,) if self.epilogue.results == 1 else (result[0], result[1])

    def replacement(self, **bound: Any) -> Any:
        """The fused op; the unpadded y is a slice of the padded one."""
        fused = self.op(*(bound[name] for name in self.variables))
        count = len(self.op.overload._schema.returns)
        results = tuple(fused[index] for index in range(count)) if count > 1 else (fused,)
        if self.epilogue is PAD:
            unpadded = torch.ops.aten.slice.Tensor(results[0], -1, 0, -bound["right"])
            return results[0], unpadded, *results[1:]
        return results

    def check(self, m: Bindings) -> Refusal | None:
        """Refuses what the fused op doesn't compute: mixed and unsupported dtypes."""
        if m.x.dtype not in SUPPORTED:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in SUPPORTED)
            return m.refuse(Reason.DTYPE, "x", f"x is {_name(m.x)}; supported are {names}")
        if m.weight.dtype != m.x.dtype:
            return m.refuse(
                Reason.DTYPE,
                "weight",
                f"weight is {_name(m.weight)} and x is {_name(m.x)}; the fused op takes one dtype",
            )
        return None


def _name(value: torch.Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


NORM_RULES: tuple[Rule, ...] = tuple(
    NormRule(name, flags, reduce=reduce, residual=residual, epilogue=epilogue)
    for name, flags, reduce, epilogues in (
        ("allreduce_rms", ("fuse_allreduce_rms",), True, (None,)),
        ("act_padding", ("fuse_act_padding",), False, (PAD,)),
        ("norm_quant", ("fuse_norm_quant",), False, (STATIC_FP8_QUANT, DYNAMIC_FP8_QUANT)),
        ("allreduce_rms_padding", ("fuse_allreduce_rms", "fuse_act_padding"), True, (PAD,)),
        ("allreduce_rms_quant", ("fuse_allreduce_rms", "fuse_norm_quant"), True, (STATIC_FP8_QUANT, DYNAMIC_FP8_QUANT)),
    )
    for epilogue in epilogues
    for residual in (False, True)
)
