"""Details of a wrong replacement for the maintainer of its pass: the calls on both sides, the place in the source, and
the attributes that it drops.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from fuseplan.graph.facts import dtype_text, tensor_of
from fuseplan.matching import ExternalMatch
from fuseplan.verification.sides import TORCHS, Side
from fuseplan.verification.specs import concrete

PLAIN = (bool, int, float, str, torch.dtype)


def told(match: ExternalMatch, before: Side, after: Side, symbols: Mapping[Any, int]) -> str:
    """All details in one clause."""
    parts = [f"{_listed(after, symbols)} replaces {_listed(before, symbols)}"]
    dropped = vanished(before, after)
    if dropped:
        parts.append(f"it drops {', '.join(dropped)}")
    pattern = getattr(match.entry, "pattern_name", None)
    named = f"pattern {pattern}, " if pattern else ""
    if match.written_at is not None or pattern:
        parts.append(f"{named}replacement {match.written_at or 'unknown'}")
    return "; ".join(parts)


def vanished(before: Side, after: Side) -> list[str]:
    """Plain arguments of non-torch ops that no op of the replacement gets under the same name, as `name=value of op`:
    first those that differ from the op's default and switch something on; without numbers that it gets under another
    name.
    """
    carried = [item for op, given, _ in after.calls for item in {**_defaults(op), **given}.items()]
    numbers = {(type(value), value) for _, value in carried if type(value) in (int, float, str)}
    found: list[tuple[tuple[bool, ...], str]] = []
    for op, arguments, _ in before.calls:
        if op.namespace in TORCHS:
            continue
        defaults = _defaults(op)
        for name, value in arguments.items():
            if not isinstance(value, PLAIN) or name.startswith("_") or (type(value), value) in numbers:
                continue
            given = [other for key, other in carried if key == name]
            if any(type(other) is type(value) and other == value for other in given):
                continue
            instead = f" (there it is {given[0]})" if given else ""
            usual = name in defaults and defaults[name] == value, not value, not isinstance(value, bool)
            found.append((usual, f"{name}={value} of {_short(op)}{instead}"))
    return [text for _, text in sorted(found, key=lambda each: each[0])]


def _defaults(op: OpOverload) -> dict[str, Any]:
    return {each.name: each.default_value for each in op._schema.arguments if each.has_default_value()}


def _listed(side: Side, symbols: Mapping[Any, int]) -> str:
    """The calls of a side: torch's ops by name, each once, others with their arguments."""
    texts = [_short(op) if op.namespace in TORCHS else _call(op, given, symbols) for op, given, _ in side.calls]
    return ", ".join(dict.fromkeys(texts)) or "nothing"


def _short(op: OpOverload) -> str:
    return str(op).removesuffix(".default")


def _call(op: OpOverload, arguments: Mapping[str, Any], symbols: Mapping[Any, int]) -> str:
    """`made_up.quantize(x: bfloat16[7, 64], group_size=128, scale_ue8m0=True)`."""
    parts = [_argument(name, value, symbols) for name, value in arguments.items() if not name.startswith("_")]
    return f"{_short(op)}({', '.join(parts)})"


def _argument(name: str, value: Any, symbols: Mapping[Any, int]) -> str:
    tensor = tensor_of(value)
    if tensor is None:
        return f"{name}={fx.map_arg(value, lambda node: node.name)}"
    return f"{name}: {dtype_text(tensor.dtype)}{[concrete(size, symbols) for size in tensor.shape]}"
