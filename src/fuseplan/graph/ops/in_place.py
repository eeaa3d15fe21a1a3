"""An op of the dialect as a kernel that writes to some of its arguments: its schema, its reference and its fake."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from fuseplan.errors import RuleError


def parameters_of(schema: str) -> list[str]:
    """The arguments as in a schema: `Tensor x`, `float eps`."""
    return schema[1 : schema.index(")")].split(", ")


def in_place_schema(name: str, schema: str, writes: Sequence[str]) -> str:
    """The schema of a kernel that writes to some arguments, and yields the other results.

    Raises:
        RuleError: they are no tensors among the arguments, or there is no result beside the written ones.
    """
    parameters, returns = parameters_of(schema), schema.split(" -> ")[1].strip("()").split(", ")
    unknown = [each for each in writes if f"Tensor {each}" not in parameters]
    if unknown:
        raise RuleError(f"fuseplan::{name}{schema} can't write to {', '.join(unknown)}: no such tensor")
    if len(returns) <= len(writes):
        raise RuleError(
            f"fuseplan::{name}{schema} yields {len(returns)} and writes {len(writes)}: it must yield one more, the "
            "written tensors last"
        )
    for index, each in enumerate(writes):
        parameters[parameters.index(f"Tensor {each}")] = f"Tensor(a{index}!) {each}"
    kept = ", ".join(returns[: -len(writes)])
    return f"({', '.join(parameters)}) -> {kept if len(returns) - len(writes) == 1 else f'({kept})'}"


def in_place(reference: Callable[..., Any], schema: str, writes: Sequence[str]) -> Callable[..., Any]:
    """The reference as a kernel, which writes."""
    names = [each.split()[1] for each in parameters_of(schema)]
    places = [names.index(each) for each in writes]

    @functools.wraps(reference)
    def run(*arguments: Any) -> Any:
        results = reference(*arguments)
        for place, written in zip(places, results[-len(places) :], strict=True):
            arguments[place].copy_(written)
        return _unwrapped(results[: -len(places)])

    return run


def without_last(function: Callable[..., Any], count: int) -> Callable[..., Any]:
    """A function without its last results."""

    @functools.wraps(function)
    def run(*arguments: Any) -> Any:
        return _unwrapped(function(*arguments)[:-count])

    return run


def _unwrapped(results: tuple[Any, ...]) -> Any:
    return results if len(results) > 1 else results[0]
