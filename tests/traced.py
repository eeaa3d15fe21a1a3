"""A model that is traced once, and explained as often as a test asks: tracing is nearly all of `explain`'s time."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any
from unittest import mock

import fuseplan
from fuseplan import frontend
from fuseplan.explanation.capture import Capture, capture


class Traced:
    """The graphs of `model(*inputs, **model_arguments)`.

    Args:
        model: a module or function.
        *inputs: its positional arguments.
        dynamic: whether it is explained for compile ranges.
        **model_arguments: its keyword arguments.
    """

    def __init__(self, model: Callable[..., Any], *inputs: Any, dynamic: bool = False, **model_arguments: Any) -> None:
        self._model, self._dynamic = model, dynamic
        self.capture = capture(model, inputs, model_arguments, dynamic=dynamic)

    def explain(self, **how: Any) -> fuseplan.Report:
        """`fuseplan.explain` of it, with its other arguments."""
        with mock.patch.object(frontend, "capture", self._look_up):
            return fuseplan.explain(self._model, **how)

    def _look_up(
        self, model: Callable[..., Any], inputs: Sequence[Any], kwargs: Mapping[str, Any], *, dynamic: bool
    ) -> Capture:
        assert (model, len(inputs), len(kwargs), dynamic) == (self._model, 0, 0, self._dynamic)
        return self.capture
