"""Ops of inference engines, by their names and schemas, where the engines aren't installed."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch


def _nothing(*arguments: Any) -> None:
    pass


@contextlib.contextmanager
def defined(
    schemas: Mapping[str, str],
    fakes: Mapping[str, Callable[..., Any]],
    computed: Mapping[str, Callable[..., Any]] | None = None,
) -> Iterator[None]:
    """Defines the ops that aren't there.

    Args:
        schemas: by name, e.g. `vllm::all_reduce`.
        fakes: what they do with fake tensors; the others write nothing.
        computed: what they do on the CPU; the others do the same as with fake tensors.
    """
    with contextlib.ExitStack() as stack:
        for name, schema in schemas.items():
            space, op = name.split("::")
            if not hasattr(getattr(torch.ops, space), op):
                library = torch.library.Library(space, "FRAGMENT")
                stack.callback(library._destroy)
                library.define(f"{op}{schema}")
                library.impl(op, fakes.get(name, _nothing), "Meta")
                library.impl(op, (computed or fakes).get(name, _nothing), "CPU")
        yield
