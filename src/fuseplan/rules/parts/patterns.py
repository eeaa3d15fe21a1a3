"""Patterns of aten calls, to match conversions that libraries spell in many integer ops."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from fuseplan.graph.facts import aten, convert_element_type, fill_of, is_call
from fuseplan.rules.parts.fp8 import number_of, reordered

Pattern = Any
"""A name, which binds to one value throughout; a number, or `float` for any number; or an op, or the target dtype of a
cast, followed by patterns of its arguments. Views that keep the order of elements may appear anywhere.
"""
Found = dict[str, fx.Node]
"""Values by their names."""
U8, I32, F32 = torch.uint8, torch.int32, torch.float32


def bits_of(value: Pattern) -> Pattern:
    """The bits of a float32 value, as an integer."""
    return (aten.view.dtype, value, I32)


def fits(value: object, pattern: Pattern, found: Found) -> bool:
    """Whether a value matches a pattern, given the names bound so far; binds further names."""
    if isinstance(pattern, str):
        return isinstance(value, fx.Node) and found.setdefault(pattern, value) is value
    if pattern is float:
        return number_of(value) is not None
    if isinstance(pattern, list):
        return isinstance(value, (list, tuple)) and len(value) == 1 and fits(value[0], pattern[0], found)
    if not isinstance(pattern, tuple):
        return value is pattern or _is_number(value, pattern)
    target, *arguments = pattern
    if isinstance(target, torch.dtype):
        is_cast = is_call(value, convert_element_type) and value.args[1] is target
        return is_cast and isinstance(value, fx.Node) and fits(value.args[0], arguments[0], found)
    value = value if is_call(value, target) else reordered(value)
    if not is_call(value, target) or len(value.args) != len(arguments) or value.kwargs:
        return False
    return all(fits(each, wanted, found) for each, wanted in zip(value.args, arguments, strict=True))


def all_fit(value: object, pattern: Pattern, named: Mapping[str, Pattern]) -> Found | None:
    """The bindings of a match: the value fits the pattern, and each named value fits the pattern of its name.

    Args:
        value: the value to match.
        pattern: its pattern.
        named: patterns by name, ordered so that each name is bound before its pattern is matched.
    """
    found: Found = {}
    is_found = fits(value, pattern, found) and all(
        name in found and fits(found[name], each, found) for name, each in named.items()
    )
    return found if is_found else None


def _is_number(value: object, wanted: object) -> bool:
    if is_call(value, aten.scalar_tensor.default):
        value = value.args[0]
    number = fill_of(value) if isinstance(value, fx.Node) else value
    if isinstance(wanted, float) and math.isnan(wanted):
        return isinstance(number, float) and math.isnan(number)
    return isinstance(number, (int, float)) and isinstance(wanted, (int, float)) and number == wanted
