"""The key of a graph's report tells apart what Inductor compiles anew."""

from typing import Any

import torch
from torch import Tensor, fx

from fuseplan.caching.store import graph_key


class Quantised(Tensor):
    """A weight as torchao has it, which looks like the one that it stands for."""

    codes: Tensor
    bound: float

    def __new__(cls, codes: Tensor, bound: float) -> "Quantised":
        own: Any = Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)
        own.codes, own.bound = codes, bound
        return own  # type: ignore[no-any-return]

    def __tensor_flatten__(self) -> tuple[list[str], dict[str, float]]:
        return ["codes"], {"bound": self.bound}

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise NotImplementedError


class Other(Quantised):
    """One of another type, which is made of the same."""


def key_of(weight: Tensor) -> str | None:
    return graph_key(fx.symbolic_trace(lambda x, w: x @ w), [torch.ones(2, 4), weight], "manager", {})


def test_tensors_of_subclasses_count_by_type_and_by_what_they_are_made_of() -> None:
    wide, narrow = torch.ones(4, 4), torch.ones(4, 4, dtype=torch.int8)
    weights = [wide, Quantised(wide, 1.0), Quantised(narrow, 1.0), Quantised(narrow, 2.0), Other(narrow, 1.0)]
    assert len({key_of(weight) for weight in weights}) == len(weights)
    assert key_of(Quantised(narrow, 1.0)) == key_of(Quantised(narrow.clone(), 1.0))
