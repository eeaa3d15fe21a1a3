"""Calls of fused ops in the code that Inductor writes, bypassing torch's dispatcher.

`torch.ops.fuseplan.rms_norm_pad.triton(x, ...)` becomes `torch.ops.fuseplan.rms_norm_pad.triton.direct(key, x, ...)`.
The key has the properties of the arguments that determine a launch: shapes, strides, dtypes, devices and plain values
as in the graph, and the values of their symbols. Equal layers share a key.
"""

import hashlib
from collections.abc import Callable, Iterable
from typing import Any

import sympy
from torch._inductor import ir
from torch._inductor.virtualized import V
from torch.utils._pytree import tree_leaves


class DirectKernel(ir.FallbackKernel):
    """A call of an op's `direct`; of the op itself where Inductor writes C++, which can't make such calls."""

    def get_kernel_name(self) -> str:
        """The function that the code calls."""
        name: str = super().get_kernel_name()
        return name if _writes_cpp() else f"{name}.direct"

    def codegen_args(self) -> list[str]:
        """The arguments of the call."""
        args: list[str] = super().codegen_args()
        return args if _writes_cpp() else [key_of(self), *args]


def _writes_cpp() -> bool:
    """Whether the code of the graph that is being lowered is C++."""
    return bool(getattr(V.graph, "cpp_wrapper", False))


def key_of(kernel: ir.FallbackKernel) -> str:
    """The key of a call, as Python code."""
    inputs: list[Any] = list(kernel.inputs)
    shapes = [(tuple(each.get_size()), tuple(each.get_stride())) for each in inputs]
    kinds = [(each.get_dtype(), each.get_device()) for each in inputs]
    others = kernel.unflatten_args(["tensor"] * len(inputs), kernel.constant_args)
    digest = hashlib.sha256(repr((shapes, kinds, others)).encode()).hexdigest()[:16]
    return ", ".join([f"({digest!r}", *_symbols(tree_leaves((shapes, others)))]) + ",)"


def _symbols(values: Iterable[Any]) -> list[str]:
    """The symbols of values, in a fixed order."""
    expressions = (getattr(getattr(value, "node", value), "expr", value) for value in values)
    return sorted(
        {str(symbol) for each in expressions if isinstance(each, sympy.Basic) for symbol in each.free_symbols}
    )


def lower(target: Any) -> Callable[..., Any]:
    """The lowering of an op for Inductor.

    Args:
        target: the overload.
    """

    def handler(*args: Any, **kwargs: Any) -> Any:
        results: Any = DirectKernel.create(target, *args, **kwargs)
        if isinstance(results, ir.IRNode):
            return ir.TensorBox.create(results)
        return tuple(map(ir.TensorBox.create, results))

    return handler
