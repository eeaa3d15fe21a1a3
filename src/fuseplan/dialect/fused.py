"""The fused ops, composed and not enumerated: prologue x core x epilogue.

    [all_reduce_] [fused_add_] rms_norm [_pad | _static_fp8_quant | _dynamic_fp8_quant]
                              silu_and_mul [_static_fp8_quant | _dynamic_fp8_quant]

A member's arguments and results follow from its parts:

    (x, [residual], weight, eps, rounding, [the epilogue's own], [group_name]) -> (y or the epilogue's, [residual_out])

The last result is the sum that was normalised, rounded: x + residual, or the reduced x where there is no residual. A
member with neither prologue yields no such result, since it would be x itself.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fuseplan.dialect import activation, collective, layout, norm, quant
from fuseplan.dialect.registry import DialectOp, Sample, define


@dataclass(frozen=True, kw_only=True)
class Epilogue:
    """What is done to the result of a core before it is stored.

    Attributes:
        suffix: of the fused op's name.
        op: the dialect op that does it alone.
        parameters: the op's arguments after the first, as they stand in a schema.
        results: how many tensors it yields.
        sample: values for `parameters` on a device.
    """

    suffix: str
    op: DialectOp
    parameters: tuple[str, ...]
    results: int
    sample: Callable[[torch.device], tuple[Any, ...]]


PAD = Epilogue(suffix="pad", op=layout.pad, parameters=("int right",), results=1, sample=lambda device: (192,))
STATIC_FP8_QUANT = Epilogue(
    suffix="static_fp8_quant",
    op=quant.static_scaled_fp8_quant,
    parameters=("Tensor scale", "ScalarType dtype", "str quant_rounding"),
    results=1,
    sample=quant.static_sample_arguments,
)
DYNAMIC_FP8_QUANT = Epilogue(
    suffix="dynamic_fp8_quant",
    op=quant.dynamic_per_token_scaled_fp8_quant,
    parameters=("ScalarType dtype", "float min_scale", "str quant_rounding"),
    results=2,
    sample=quant.dynamic_sample_arguments,
)


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _results(values: tuple[Any, ...]) -> Any:
    return values if len(values) > 1 else values[0]


def _schema(parameters: list[str], results: int) -> str:
    outputs = "Tensor" if results == 1 else f"({', '.join(['Tensor'] * results)})"
    return f"({', '.join(parameters)}) -> {outputs}"


@dataclass(frozen=True, kw_only=True)
class NormParts:
    """The parts of a member of the RMSNorm family."""

    reduce: bool = False
    residual: bool = False
    epilogue: Epilogue | None = None

    @property
    def core(self) -> DialectOp:
        """The unfused op that normalises."""
        return norm.fused_add_rms_norm if self.residual else norm.rms_norm

    @property
    def name(self) -> str:
        """The fused op's name."""
        suffix = f"_{self.epilogue.suffix}" if self.epilogue else ""
        return f"{'all_reduce_' if self.reduce else ''}{self.core.name}{suffix}"

    def compose(self) -> DialectOp:
        """Defines the fused op: its reference and fake are those of its parts, one after the other."""
        epilogue = self.epilogue
        parameters = [
            "Tensor x",
            *(["Tensor residual"] if self.residual else []),
            "Tensor weight",
            "float eps",
            "str rounding",
        ]
        norm_arguments = len(parameters)
        parameters += epilogue.parameters if epilogue else ()
        parameters += ["str group_name"] if self.reduce else []
        yields_sum = self.residual or self.reduce

        def run(all_reduce: Any, core: Any, finish: Any, arguments: tuple[Any, ...]) -> Any:
            x, *rest = arguments[:norm_arguments]
            last = len(arguments) - self.reduce
            if self.reduce:
                x = all_reduce(x, arguments[-1])
            y, total = core(x, *rest) if self.residual else (core(x, *rest), x)
            if finish is not None:
                y = finish(y, *arguments[norm_arguments:last])
            return _results((*_as_tuple(y), *((total,) if yields_sum else ())))

        def reference(*arguments: Any) -> Any:
            finish = epilogue.op.reference if epilogue else None
            return run(collective.all_reduce_reference, self.core.reference, finish, arguments)

        def fake(*arguments: Any) -> Any:
            finish = epilogue.op.fake if epilogue else None
            return run(collective.all_reduce_fake, self.core.fake, finish, arguments)

        parts = ["all_reduce"] * self.reduce + [self.core.name] + ([epilogue.op.name] if epilogue else [])
        reference.__doc__ = f"{' -> '.join(parts)}, each as its own reference computes it."
        return define(
            self.name,
            _schema(parameters, (epilogue.results if epilogue else 1) + yields_sum),
            reference=reference,
            fake=fake,
            samples=[self._sample(sample) for sample in self.core.samples],
            error_factor=self.core.error_factor,
            fused=True,
            collective=self.reduce,
            draws={**self.core.draws, **(epilogue.op.draws if epilogue else {})},
        )

    def _sample(self, core: Sample) -> Sample:
        def make(device: torch.device, generator: torch.Generator) -> tuple[Any, ...]:
            extra = self.epilogue.sample(device) if self.epilogue else ()
            group = (collective.world_group_name(),) if self.reduce else ()
            return *core.make(device, generator), *extra, *group

        return Sample(name=core.name, make=make)


def _compose_activation(epilogue: Epilogue) -> DialectOp:
    core = activation.silu_and_mul

    def reference(gate: Tensor, up: Tensor, rounding: str, *arguments: Any) -> Any:
        return epilogue.op.reference(core.reference(gate, up, rounding), *arguments)

    def fake(gate: Tensor, up: Tensor, rounding: str, *arguments: Any) -> Any:
        return epilogue.op.fake(core.fake(gate, up, rounding), *arguments)

    def sample(inner: Sample) -> Sample:
        return Sample(
            name=inner.name, make=lambda device, generator: (*inner.make(device, generator), *epilogue.sample(device))
        )

    reference.__doc__ = f"{core.name} -> {epilogue.op.name}, each as its own reference computes it."
    return define(
        f"{core.name}_{epilogue.suffix}",
        _schema(["Tensor gate", "Tensor up", "str rounding", *epilogue.parameters], epilogue.results),
        reference=reference,
        fake=fake,
        samples=[sample(inner) for inner in core.samples],
        error_factor=core.error_factor,
        fused=True,
        draws={**core.draws, **epilogue.op.draws},
    )


NORM_FAMILY = {
    (parts.reduce, parts.residual, parts.epilogue.suffix if parts.epilogue else None): parts.compose()
    for parts in (
        NormParts(reduce=reduce, residual=residual, epilogue=epilogue)
        for reduce in (False, True)
        for residual in (False, True)
        for epilogue in (None, PAD, STATIC_FP8_QUANT, DYNAMIC_FP8_QUANT)
        if reduce or epilogue
    )
}
"""Fused norms by (reduce, residual, the epilogue's suffix)."""

ACTIVATION_FAMILY = {
    epilogue.suffix: _compose_activation(epilogue) for epilogue in (STATIC_FP8_QUANT, DYNAMIC_FP8_QUANT)
}
"""Fused activations by the epilogue's suffix."""
