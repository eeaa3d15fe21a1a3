"""Post-grad graphs of a model as a custom pass would receive them, without generating any code."""

import contextlib
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import fx
from torch._dynamo import config as dynamo_config
from torch._dynamo.output_graph import GraphCompileReason
from torch._dynamo.utils import counters, graph_break_reasons
from torch._functorch import config as functorch_config
from torch._guards import detect_fake_mode
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import _recursive_post_grad_passes, compile_fx
from torch._inductor.fx_passes.post_grad import view_to_reshape
from torch._inductor.virtualized import V

from fuseplan.cpython import uncollected, with_room
from fuseplan.errors import WorkloadError
from fuseplan.graph.facts import tensor_of
from fuseplan.graph.surgery import copy_graph
from fuseplan.record import GraphBreak
from fuseplan.record.text import one_line


@dataclass(frozen=True, kw_only=True)
class Capture:
    """The result of tracing.

    Attributes:
        graphs: post-grad graphs, in the order in which they were compiled: more than one where the graph breaks, and a
            graph that others call before these.
        breaks: graph breaks, in the order in which they were met.
        time_ns: how long it took.
    """

    graphs: tuple[fx.GraphModule, ...]
    breaks: tuple[GraphBreak, ...] = ()
    time_ns: int = 0


STAGES = (
    "tracing, 1 of 3 (Dynamo):",
    "tracing, 2 of 3 (AOTAutograd):",
    "tracing, 3 of 3 (Inductor's passes):",
)
"""The stages that a watcher is called with; repeated where the graph breaks."""


@dataclass
class _Recorder:
    """A backend that copies each graph where Inductor hands it to custom passes, and then interprets it."""

    watch: Callable[[str], None] = lambda stage: None
    graphs: list[fx.GraphModule] = field(default_factory=list)
    _copies: dict[fx.GraphModule, fx.GraphModule] = field(default_factory=dict)

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        self.watch(STAGES[1])
        return cast(Callable[..., Any], compile_fx(gm, inputs, inner_compile=self._inner))  # type: ignore[arg-type]

    def _inner(self, gm: fx.GraphModule, example_inputs: Sequence[Any], **options: Any) -> Callable[..., Any]:
        # Passes after the hook make collectives in-place, so the graph is copied inside the hook.
        self.watch(STAGES[2])
        is_inference = bool(options.get("is_inference", False))
        view_to_reshape(gm)
        mode = detect_fake_mode(example_inputs)
        hook = inductor_config.patch(post_grad_custom_post_pass=self._copy)
        with hook, V.set_fake_mode(mode) if mode is not None else contextlib.nullcontext():
            _recursive_post_grad_passes(gm, is_inference=is_inference)
        return fx.Interpreter(gm).run

    def _copy(self, graph: fx.Graph) -> None:
        owner = graph.owning_module
        copied = fx.GraphModule(owner if owner is not None else {}, copy_graph(graph)[0])
        for name, inner in list(copied.named_children()):
            setattr(copied, name, self._copies.get(inner, inner))  # type: ignore[call-overload]
        if owner is not None:
            self._copies[owner] = copied
        self.graphs.append(copied)


def capture(
    model: Callable[..., Any],
    inputs: Sequence[Any],
    kwargs: dict[str, Any],
    *,
    dynamic: bool,
    watch: Callable[[str], None] = lambda stage: None,
) -> Capture:
    """Traces `model(*inputs, **kwargs)` through Dynamo, AOTAutograd and Inductor's post-grad passes.

    The model is run once, on fake tensors where its inputs are fake. Threads that trace take turns; none may compile or
    run compiled code meanwhile, since Dynamo's caches are dropped, and torch has no guard against that.

    Args:
        model: a module or function.
        inputs: its positional arguments.
        kwargs: its keyword arguments.
        dynamic: treat the leading dimensions of tensor arguments as unknown. (`torch.compile(dynamic=True)` would treat
            epsilons as unknown too.)
        watch: called with each stage, one of `STAGES`, as it begins.

    Raises:
        WorkloadError: nothing could be traced, and the text has torch's reason; or the model is on the meta device.
    """
    with _TURN:
        return _capture(model, inputs, kwargs, dynamic, watch)


_TURN = threading.RLock()


def _capture(
    model: Callable[..., Any],
    inputs: Sequence[Any],
    kwargs: dict[str, Any],
    dynamic: bool,
    watch: Callable[[str], None],
) -> Capture:
    start = time.perf_counter_ns()
    recorder = _Recorder(watch)
    watch(STAGES[0])
    torch._dynamo.reset()
    before, met = dict(counters["graph_break"]), len(graph_break_reasons)
    mode = detect_fake_mode(_tensors(inputs))
    marked = _tensors([*inputs, *kwargs.values()]) if dynamic else []
    failure: Exception | SystemExit | None = None
    with (
        no_caches(), torch.no_grad(), uncollected(), dynamo_config.patch(run_gc_after_compile=False), _without_advice(),
        _unknown_leading_dimensions(marked), mode or contextlib.nullcontext(),
    ):  # fmt: skip
        try:
            compiled = torch.compile(model, backend=recorder)  # which refuses a model of torch.jit
            with_room(lambda: compiled(*inputs, **kwargs))
        except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever the user's model raises ends in one clear line
            failure = error
    counted = [text for text, count in counters["graph_break"].items() if count > before.get(text, 0)]
    breaks = _breaks(graph_break_reasons[met:], counted)
    torch._dynamo.reset()
    if failure is not None or not recorder.graphs:
        why = one_line(_message(failure)) if failure else "; ".join(map(str, breaks)) or "it runs no tensor op"
        raise WorkloadError(f"the model could not be traced: {why}") from failure
    if any(map(_is_meta, recorder.graphs)):
        raise WorkloadError(
            "the model is on the meta device, for which Inductor computes nothing: its graphs are empty. Build it, and "
            "its inputs, on cpu under torch._subclasses.FakeTensorMode(), which allocates nothing either"
        )
    return Capture(
        graphs=tuple(recorder.graphs),
        breaks=breaks,
        time_ns=time.perf_counter_ns() - start,
    )


def _is_meta(gm: fx.GraphModule) -> bool:
    return any(
        (value := tensor_of(node)) is not None and value.is_meta for node in gm.graph.find_nodes(op="placeholder")
    )


@contextlib.contextmanager
def _without_advice() -> Iterator[None]:
    """Suppresses Dynamo's warning that a cached function could make results wrong; here there are none."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`-wrapped function")
        yield


@contextlib.contextmanager
def no_caches() -> Iterator[None]:
    """Disables caches: the graphs have to be made now."""
    with (
        functorch_config.patch(enable_autograd_cache=False, enable_remote_autograd_cache=False),
        inductor_config.patch(fx_graph_cache=False, fx_graph_remote_cache=False),
    ):
        yield


def _tensors(inputs: Sequence[Any]) -> list[torch.Tensor]:
    return [value for value in inputs if isinstance(value, torch.Tensor)]


@contextlib.contextmanager
def _unknown_leading_dimensions(values: Sequence[torch.Tensor]) -> Iterator[None]:
    """Marks the leading dimensions as dynamic. Dynamo's marks are on the user's own tensors, so they are
    removed again.
    """
    before = [{name: copy(value.__dict__[name]) for name in _MARKS if name in value.__dict__} for value in values]
    for value in values:
        _mark_leading_dimensions(value)
    try:
        yield
    finally:
        for value, marks in zip(values, before, strict=True):
            for name in _MARKS:
                value.__dict__.pop(name, None)
            value.__dict__.update(marks)


_MARKS = ("_dynamo_weak_dynamic_indices", "_has_dynamo_dim_marking")


def _mark_leading_dimensions(value: torch.Tensor) -> None:
    leading = value.dim() - value.dtype.is_floating_point
    for dim in range(leading):
        if value.shape[dim] > 1:
            torch._dynamo.maybe_mark_dynamic(value, dim)


def _message(failure: Exception | SystemExit) -> str:
    if isinstance(failure, SystemExit):
        return f"it calls sys.exit({failure.code!r})"
    return str(failure) or type(failure).__name__


def _breaks(reasons: Sequence[GraphCompileReason], counted: Iterable[str]) -> tuple[GraphBreak, ...]:
    """Breaks with their lines, and those that Dynamo only counted, before any op of a graph."""
    found = []
    for each in reasons:
        frames = [frame for frame in each.user_stack if not frame.filename.startswith(_TORCH)] or each.user_stack
        line = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else None
        code = (frames[-1].line or None) if frames else None
        found.append(GraphBreak(reason=_break_reason(each.reason), line=line, code=code))
    known = {each.reason for each in found}
    found += [GraphBreak(reason=text) for text in map(_break_reason, counted) if text not in known]
    return tuple(dict.fromkeys(found))


_TORCH = str(Path(torch.__file__).parent)


def _break_reason(text: str) -> str:
    return next((plain for start, plain in _DYNAMO_SAYS.items() if text.startswith(start)), _first_line(text))


_DYNAMO_SAYS = {
    "generic_jump": "a branch on the value of a tensor",
    "step_unsupported": "a call in which the graph breaks",
}
"""Texts for kinds of breaks; others have the text of their source."""


def _first_line(text: str) -> str:
    return one_line(next(iter(text.strip().splitlines()), ""))
