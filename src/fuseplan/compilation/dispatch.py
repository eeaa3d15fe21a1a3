"""One compiled graph for each compile range, chosen by a call's number of tokens."""

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from fuseplan.config import CompileRange

T = TypeVar("T", bound=Callable[..., Any])
Compile = Callable[[Callable[..., Any]], Callable[..., Any]]
WRAPPER = "_torchdynamo_wrapper_id"


def tokens_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int | None:
    """A call's number of tokens: the product of the leading dimensions of its first tensor.

    Token ids are integers, [B, S] or [tokens], and all their dimensions are leading; of activations [..., hidden] the
    last is not. None where no argument is a tensor.
    """
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return math.prod(value.shape[:-1] if value.dtype.is_floating_point else value.shape)
    return None


class Dispatch:
    """Compiles a function once for each compile range, and routes each call by its number of tokens.

    In the module that `torch.compile` returns it replaces Dynamo's context: copies of the module, also unpickled ones,
    ask it to compile their own forward.

    Args:
        branches: the compiler for each range.
        otherwise: the compiler for calls outside all ranges.
        warn: called with a warning about those.
    """

    def __init__(
        self, branches: Mapping[CompileRange, Compile], otherwise: Compile, warn: Callable[[str], None]
    ) -> None:
        self._branches, self._otherwise, self._warn = dict(branches), otherwise, warn

    def compile(self, model: T) -> T:
        """The compiled model: torch's own `OptimizedModule` of a module, a function of anything else."""
        compiled = self._otherwise(model)
        if compiled is model:  # torch.compile is switched off
            return model
        if not isinstance(compiled, torch._dynamo.OptimizedModule):
            return cast(T, self(model))
        compiled.dynamo_ctx = self  # type: ignore[assignment]
        compiled._initialize()
        return cast(T, compiled)

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function that calls the branch whose range holds its number of tokens."""
        otherwise = self._otherwise(function)
        if not self._branches or otherwise is function:
            return otherwise
        branches = {compile_range: branch(function) for compile_range, branch in self._branches.items()}

        @functools.wraps(otherwise)
        def dispatched(*args: Any, **kwargs: Any) -> Any:
            tokens = tokens_of(args, kwargs)
            for compile_range, branch in branches.items():
                if tokens is not None and tokens in compile_range:
                    return branch(*args, **kwargs)
            found = "no tensor argument" if tokens is None else f"{tokens} tokens"
            ranges = ", ".join(map(str, branches))
            self._warn(f"a call with {found} lies in none of the compile ranges {ranges}: it runs without fusions")
            return otherwise(*args, **kwargs)

        # It has the wrapped function's marks. This makes Dynamo accept them.
        vars(dispatched).update({WRAPPER: id(dispatched), "__wrapped__": inspect.unwrap(otherwise)})
        return dispatched

    def __deepcopy__(self, memo: dict[int, Any]) -> "Dispatch":
        """Itself: copies of a model share compiled code, and report to the user's callback."""
        return self
