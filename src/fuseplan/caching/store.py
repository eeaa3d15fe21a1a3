"""Reports by content, beside Inductor's own cache: they are still delivered when a warm compile cache skips the
pass.
"""

import contextlib
import functools
import hashlib
import inspect
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._inductor import config as inductor_config
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch._logging._internal import warning_once

from fuseplan.caching.content import content_of
from fuseplan.caching.fingerprint import tell_cold
from fuseplan.errors import FuseplanWarning
from fuseplan.record import Reason, Report, stored

OURS = tuple(f"{folder}{os.sep}" for folder in (Path(torch.__file__).parent, Path(__file__).parents[1]))
HELPERS = (contextlib.__file__, functools.__file__, "<")
"""Files that no warning points at: torch's and fuseplan's own, Python's helpers and generated code."""

LARGEST_BYTES = 64 * 2**20

log = logging.getLogger("fuseplan")


def graph_key(gm: fx.GraphModule, inputs: Sequence[Any], manager: str | None, options: Mapping[str, Any]) -> str | None:
    """A hash of a graph as Dynamo made it, of its inputs' metadata, and of everything that affects the pass manager's
    report on it. None: that includes a user's function without a `uuid()`.

    Args:
        gm: the graph.
        inputs: its inputs.
        manager: the key of the pass manager.
        options: Inductor's, without the pass manager.
    """
    earlier = [getattr(inductor_config, name, None) for name in EARLIER_PASSES]
    settings = content_of([inductor_config.save_config_portable(), earlier, options])
    if manager is None or (key := settings.key) is None:
        tell_cold(settings.users)
        return None
    facts = [
        # With gradients the same graph has a backward, and fuseplan leaves it alone.
        f"gradients: {torch.is_grad_enabled()} {torch.is_inference_mode_enabled()}",
        *(f"{device}: {torch.get_autocast_dtype(device)}" for device in _DEVICES if torch.is_autocast_enabled(device)),
        *(_describe(value) for value in inputs),
        key,
        manager,
    ]
    return hashlib.sha256("\0".join([*_structure(gm), *facts]).encode("utf-8", "surrogatepass")).hexdigest()


_DEVICES = ("cpu", "cuda")
EARLIER_PASSES = (
    "pre_grad_custom_pass", "joint_custom_pre_pass", "joint_custom_post_pass", "post_grad_custom_pre_pass"
)  # fmt: skip
"""Hooks of Inductor's whose passes see the graph before the pass manager. Inductor keeps them out of its settings."""


def _structure(gm: fx.GraphModule) -> Iterator[str]:
    """A graph without names, which differ where equal code is reached in different ways."""
    numbers = {node: f"%{number}" for number, node in enumerate(gm.graph.nodes)}
    for node in gm.graph.nodes:
        target = "" if node.op == "placeholder" else _name(node.target)
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: numbers[source])
        yield f"{node.op} {target} {args} {kwargs}"
        if node.op in ("get_attr", "call_module"):
            owned: Any = gm
            for step in str(node.target).split("."):
                owned = getattr(owned, step)
            yield from _structure(owned) if isinstance(owned, fx.GraphModule) else [_describe(owned)]


def _name(target: Any) -> str:
    """A function by where it is defined, since its text has an address; a method or attribute by its name."""
    qualified = getattr(target, "__qualname__", None)
    return f"{getattr(target, '__module__', '')}.{qualified}" if qualified else str(target)


def save(key: str, report: Report) -> None:
    """Stores a report; a cache that can't be written to is no reason to fail a compilation."""
    try:
        stored.store(_path(key), report)
    except OSError as error:
        why = error.strerror or error
        warning_once(log, "reports can't be stored, so that warm compile caches will come without them: %s", why)


def load(key: str) -> Report | None:
    """A stored report, marked as such, or None where there is none that can be read."""
    return load_file(_path(key))


def load_file(path: Path) -> Report | None:
    """The report in a file, marked as one of a warm cache, or None where there is none that can be read."""
    report = stored.load_stored(Report, path, LARGEST_BYTES)
    if report is None:
        return None
    return replace(report, graphs=tuple(replace(graph, from_cache=True) for graph in report.graphs))


def _path(key: str) -> Path:
    return _folder() / f"{key}.json"


def _folder() -> Path:
    return Path(cache_dir()) / "fuseplan" / "reports"


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        own = f"{value.dtype} {tuple(value.shape)} {value.stride()} {value.device} {value.requires_grad}"
        return f"{own}{_inside(value)}"
    return f"{type(value).__name__} {value}"


def _inside(value: torch.Tensor) -> str:
    """The inner tensors and context of a tensor subclass, such as a quantised weight, which distinguish it from others
    of its shape.
    """
    if not hasattr(value, "__tensor_flatten__"):
        return ""
    names, context = value.__tensor_flatten__()
    parts = [f"{name}: {_describe(getattr(value, name))}" for name in names]
    return f" {type(value).__module__}.{type(value).__qualname__} {_ADDRESS.sub('', repr(context))} {parts}"


_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def _callers_level() -> int:
    """The `stacklevel` by which a warning of the caller points at the user's line, or else at the caller's own."""
    here = inspect.currentframe()
    assert here is not None and here.f_back is not None, "CPython has frames"
    frame, level = here.f_back, 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith((*OURS, *HELPERS)):
        frame, level = frame.f_back, level + 1
    return level


class Warner:
    """Hands reports on, and shows each of their warnings once."""

    def __init__(self, on_report: Callable[[Report], None] | None) -> None:
        self.on_report = on_report
        self._shown: set[str] = set()

    def __call__(self, report: Report) -> None:
        """Delivers one report."""
        refusals = [refusal for graph in report.graphs for refusal in graph.refusals]
        for refusal in (*report.warnings, *(r for r in refusals if r.reason is Reason.TRAINING)):
            self.warn(refusal.detail + (f"; {refusal.fix}" if refusal.fix else ""))
        if self.on_report is not None:
            self.on_report(report)

    def warn(self, text: str) -> None:
        """Shows `text`, unless it was shown before."""
        if text not in self._shown:
            self._shown.add(text)
            warnings.warn(text, FuseplanWarning, stacklevel=_callers_level())
