"""One compiled graph for each compile range, chosen by a call's number of tokens."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from fuseplan.config import CompileRange

T = TypeVar("T", bound=Callable[..., Any])


def tokens_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int | None:
    """A call's number of tokens: the product of the leading dimensions of its first tensor.

    Token ids are integers, [B, S] or [tokens], and all their dimensions are leading; of activations [..., hidden] the
    last is not. None where no argument is a tensor.
    """
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return math.prod(value.shape[:-1] if value.dtype.is_floating_point else value.shape)
    return None


def dispatch_by_tokens(
    model: T,
    branches: Mapping[CompileRange, Callable[..., Any]],
    plain: Callable[..., Any],
    warn: Callable[[str], None],
) -> T:
    """A module or function that calls the branch whose range holds its number of tokens.

    Args:
        model: what was compiled; a module's attributes stay reachable through the result.
        branches: a compiled model for each range.
        plain: takes the calls that lie in no range.
        warn: is told of those.
    """
    ranges = ", ".join(map(str, branches))

    def choose(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Callable[..., Any]:
        tokens = tokens_of(args, kwargs)
        for compile_range, branch in branches.items():
            if tokens is not None and tokens in compile_range:
                return branch
        found = "no tensor argument" if tokens is None else f"{tokens} tokens"
        warn(f"a call with {found} lies in none of the compile ranges {ranges}: it runs without fusions")
        return plain

    if isinstance(model, torch.nn.Module):
        return cast(T, RangedModule(model, choose))

    @functools.wraps(model)
    def dispatched(*args: Any, **kwargs: Any) -> Any:
        return choose(args, kwargs)(*args, **kwargs)

    return cast(T, dispatched)


class RangedModule(torch.nn.Module):
    """A module whose calls go to the graph of their compile range; like `torch.compile`'s it keeps the original as
    `_orig_mod`.
    """

    _orig_mod: torch.nn.Module

    def __init__(
        self, module: torch.nn.Module, choose: Callable[[Sequence[Any], Mapping[str, Any]], Callable[..., Any]]
    ) -> None:
        super().__init__()
        self._orig_mod = module
        self._choose = choose
        self.training = module.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the compiled module of the range that holds this call's number of tokens."""
        return self._choose(args, kwargs)(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("_orig_mod"), name)
