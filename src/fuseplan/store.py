"""Reports by content, beside Inductor's own cache: what a warm compile cache skips is still reported."""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._inductor.runtime.cache_dir_utils import cache_dir

from fuseplan.record import Report, from_json, to_json

LARGEST_BYTES = 64 * 2**20


def graph_key(gm: fx.GraphModule, inputs: Sequence[Any], *rest: str) -> str:
    """A hash of a graph as Dynamo made it, of its inputs' metadata and of `rest`."""
    # With gradients the same graph has a backward, and fuseplan leaves it alone.
    facts = [f"gradients: {torch.is_grad_enabled()}", *(_describe(value) for value in inputs)]
    return hashlib.sha256("\0".join([*_structure(gm.graph), *facts, *rest]).encode()).hexdigest()


def _structure(graph: fx.Graph) -> Iterator[str]:
    """A graph without names, which differ where equal code is reached on different ways."""
    numbers = {node: f"%{number}" for number, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        target = "" if node.op == "placeholder" else _name(node.target)
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: numbers[source])
        yield f"{node.op} {target} {args} {kwargs}"


def _name(target: Any) -> str:
    """A function by where it is defined, since its text has an address; a method or attribute by its name."""
    qualified = getattr(target, "__qualname__", None)
    return f"{getattr(target, '__module__', '')}.{qualified}" if qualified else str(target)


def save(key: str, report: Report) -> None:
    """Stores a report; a cache that can't be written to is no reason to fail a compilation."""
    folder = _folder()
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=folder, suffix=".tmp")
        try:
            with os.fdopen(handle, "w") as file:
                json.dump(to_json(report), file)
            Path(name).replace(folder / f"{key}.json")
        except OSError:
            Path(name).unlink(missing_ok=True)


def load(key: str) -> Report | None:
    """A stored report, marked as such, or None where there is none that can be read."""
    path = _folder() / f"{key}.json"
    try:
        if path.stat().st_size > LARGEST_BYTES:
            return None
        report = from_json(Report, json.loads(path.read_text()))
    except (OSError, ValueError):
        return None
    return replace(report, graphs=tuple(replace(graph, from_cache=True) for graph in report.graphs))


def _folder() -> Path:
    return Path(cache_dir()) / "fuseplan" / "reports"


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {tuple(value.shape)} {value.stride()} {value.device} {value.requires_grad}"
    return f"{type(value).__name__} {value}"
