"""Fusions around SiLU-and-mul."""

from typing import Any

from fuseplan.dialect import ACTIVATION_FAMILY, DYNAMIC_FP8_QUANT, STATIC_FP8_QUANT, Epilogue, ops
from fuseplan.rules.base import Rule


class SiluAndMulQuant(Rule):
    """silu_and_mul -> fp8 quant  =>  one op.   q = quant(silu(gate) * up)."""

    name, flags, core = "act_quant", ("fuse_act_quant",), ops.silu_and_mul

    def __init__(self, epilogue: Epilogue) -> None:
        self.epilogue = epilogue
        self.op = ACTIVATION_FAMILY[epilogue.suffix]

    @property
    def variables(self) -> tuple[str, ...]:
        """The fused op's own arguments, by the names in its schema."""
        return tuple(argument.name for argument in self.op.overload._schema.arguments)

    def pattern(self, gate: Any, up: Any, rounding: Any, **epilogue: Any) -> Any:
        """The activation, quantised."""
        return self._results(self.epilogue.op(ops.silu_and_mul(gate, up, rounding), *epilogue.values()))

    def replacement(self, **bound: Any) -> Any:
        """The fused op."""
        return self._results(self.op(*(bound[name] for name in self.variables)))

    def _results(self, value: Any) -> tuple[Any, ...]:
        return (value,) if self.epilogue.results == 1 else (value[0], value[1])


ACTIVATION_RULES: tuple[Rule, ...] = tuple(
    SiluAndMulQuant(epilogue) for epilogue in (STATIC_FP8_QUANT, DYNAMIC_FP8_QUANT)
)
