"""The building blocks of fusions, a file or a folder each: the op, its spellings in graphs, and its traffic for prices.

Every module here that has a `PART` is a part; to add a part, add its file. `canonicalize` raises a graph by all parts.
"""

import importlib
import pkgutil
from collections.abc import Iterator

from torch import fx

from fuseplan.graph.ops import DialectOp, ops
from fuseplan.rules.parts.base import OPAQUE, Core, Epilogue, Part, Prologue, Reported, RowEpilogue, Stage, reducer_of


def _found() -> Iterator[Part]:
    for module in sorted(pkgutil.iter_modules(__path__), key=lambda each: each.name):
        part = getattr(importlib.import_module(f"{__name__}.{module.name}"), "PART", None)
        if part is not None:
            yield part


PARTS: tuple[Part, ...] = tuple(_found())
"""All of them, in order of their files' names."""

ops.add(*(op for part in PARTS for op in part.ops))

_BY_OP = {op: part for part in PARTS for op in part.ops}


def part_of(op: DialectOp | None) -> Part | None:
    """The part that an op of the dialect belongs to; None of fused ops, and of None."""
    return _BY_OP.get(op) if op is not None else None


def part_at(node: object) -> Part | None:
    """The part that a node calls."""
    return part_of(ops.of(node.target)) if isinstance(node, fx.Node) else None
