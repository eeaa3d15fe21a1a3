"""The workloads that `WORKLOAD` on the command line can name: built-in models, Hugging Face configurations, and the
user's factories.
"""

import contextlib
import importlib
import inspect
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fuseplan.config import CompileRange, unknown
from fuseplan.errors import WorkloadError
from fuseplan.integrations import splitting
from fuseplan.integrations import transformers as huggingface
from fuseplan.record.files import exists
from fuseplan.record.report import MOST_LAYERS, MOST_RANKS
from fuseplan.record.text import one_line
from fuseplan.workloads import models

DEFAULT_RANGES = (
    CompileRange(start=1, end=64),
    CompileRange(start=65, end=512),
    CompileRange(start=513, end=8192),
)
"""Decoding, mixed batches, prefill."""

HUGGING_FACE: Mapping[str, Mapping[str, Any]] = {
    "llama-3.1-8b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "llama-3.1-8b-tiny": {
        "model_type": "llama",
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 1024,
        "rms_norm_eps": 1e-5,
    },
}
"""The shape of meta-llama/Llama-3.1-8B, from its published configuration, and a small twin."""


DECODED = 1024
"""Positions of a static cache that a decoding step attends to."""


@dataclass(frozen=True, kw_only=True)
class BuiltWorkload:
    """A model ready to be traced.

    Attributes:
        name: as the user wrote it.
        model: a module or function.
        inputs: its arguments.
        build_ns: how long it took to build.
        notes: caveats about figures on it, one line each.
    """

    name: str
    model: Callable[..., Any]
    inputs: Sequence[Any]
    build_ns: int
    notes: Sequence[str] = ()

    def step(self, batch: int | None, context: int = DECODED) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments of a step: for a language model, decoding one token for each sequence on a
        static cache; for a factory's model its own inputs, with the first one's leading dimension resized to the batch.

        Args:
            batch: sequences; None: as many as the inputs have.
            context: positions of the cache, the last of which is decoded.
        """
        if isinstance(self.model, models.GptOss):
            return _gpt_oss_step(self.model, batch or 1, context), {}
        if huggingface.is_language_model(self.model):
            return (), huggingface.decoding_step(self.model, batch or 1, context)
        return _resized(self.inputs, batch), {}


def _gpt_oss_step(model: models.GptOss, batch: int, context: int) -> tuple[Any, ...]:
    ids = torch.arange(batch, device=model.frequencies.device)[:, None] % model.config.vocab
    return ids, torch.full_like(ids[:1], context - 1), models.KVCache.empty(model, batch, context)


def _resized(inputs: Sequence[Any], batch: int | None) -> tuple[Any, ...]:
    """Inputs with another leading dimension; rows repeat where it is larger."""
    tensors = [value for value in inputs if isinstance(value, torch.Tensor) and value.dim()]
    if batch is None or not tensors:
        return tuple(inputs)
    rows = tensors[0].shape[0]

    def resized(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not value.dim() or value.shape[0] != rows:
            return value
        return value[torch.arange(batch, device=value.device) % rows]

    return tuple(map(resized, inputs))


def layers_of(model: Any) -> int:
    """The length of a model's outermost list of modules; 0 where it has none."""
    modules = model.modules() if isinstance(model, torch.nn.Module) else ()
    return next((len(each) for each in modules if isinstance(each, torch.nn.ModuleList)), 0)


def names() -> list[str]:
    """The built-in workloads."""
    return sorted([*models.WORKLOADS, *HUGGING_FACE])


@contextlib.contextmanager
def build(name: str, *, tp: int = 1, layers: int | None = None, weights: bool = False) -> Iterator[BuiltWorkload]:
    """Builds a workload without network and, unless it will run, without weights, inside a stand-in for a process group
    of `tp` ranks.

    Args:
        name: a built-in name, the path of a Hugging Face `config.json`, or `package.module:factory`, where `factory(tp)
            -> (module, inputs)`. Naming a factory imports and runs its module.
        tp: ranks of tensor parallelism, up to `MOST_RANKS`; collectives are traced, never run.
        layers: another number of layers than the model's own, up to `MOST_LAYERS`; not for factories.
        weights: make random weights on the default device, for models that run and aren't only traced.

    Raises:
        WorkloadError: there is no such workload, it can't be built, or `tp` doesn't divide it.
    """
    if tp < 1:
        raise WorkloadError(f"tp={tp}: give a number of ranks of at least 1")
    if tp > MOST_RANKS:
        raise WorkloadError(f"tp={tp}: give a number of ranks of at most {MOST_RANKS}")
    if layers is not None and layers < 1:
        raise WorkloadError(f"layers={layers}: give a number of layers of at least 1")
    if layers is not None and layers > MOST_LAYERS:
        raise WorkloadError(f"layers={layers}: give a number of layers of at most {MOST_LAYERS}")
    start = time.perf_counter_ns()
    model: Any
    inputs: Sequence[Any]
    notes: tuple[str, ...] = ()
    mode = contextlib.nullcontext if weights else _fake_mode
    with _stand_in_group(tp) as group:
        if name in models.WORKLOADS:
            model, inputs = _build_gpt_oss(name, tp, group, layers, mode)
        elif (config := _hugging_face_config(name)) is not None:
            model, inputs = _build_hugging_face(config, name, group, layers, mode)
            if group is not None:
                found = (splitting.plan_note(config), splitting.unmatched_note(model))
                notes = tuple(note for note in found if note)
        elif ":" in name:
            if layers is not None:
                raise WorkloadError(f"layers={layers}: {name} is a factory, which decides on its layers itself")
            model, inputs = _call_factory(name, tp)
        else:
            error = unknown("workload", name, names())
            raise WorkloadError(f"{error}, the path of a Hugging Face config.json, or package.module:factory")
        build_ns = time.perf_counter_ns() - start
        yield BuiltWorkload(name=name, model=model, inputs=inputs, build_ns=build_ns, notes=notes)


def path_of(name: str) -> Path | None:
    """The Hugging Face configuration if a workload's name is its path; None for other names."""
    is_built_in = name in models.WORKLOADS or name in HUGGING_FACE
    is_path = not is_built_in and (name.endswith(".json") or "/" in name or (name != "" and exists(name)))
    return Path(name) if is_path else None


@contextlib.contextmanager
def _stand_in_group(tp: int) -> Iterator[dist.ProcessGroup | None]:
    """The default process group where one is initialised, else a fake one; None for a single rank."""
    if tp == 1:
        yield None
        return
    if dist.is_initialized():
        group = dist.group.WORLD
        assert group is not None
        if group.size() != tp:
            raise WorkloadError(
                f"tp={tp}, but this process belongs to a group of {group.size()} ranks; use --tp {group.size()}"
            )
        yield group
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=tp, store=FakeStore())
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


Mode = Callable[[], contextlib.AbstractContextManager[Any]]
"""The context in which a model is built: with fake weights or with real ones."""


def _fake_mode() -> FakeTensorMode:
    return FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)


def _build_gpt_oss(
    name: str, tp: int, group: dist.ProcessGroup | None, layers: int | None, mode: Mode
) -> tuple[torch.nn.Module, Sequence[Any]]:
    workload = models.workload(name)
    workload = workload if layers is None else workload.with_layers(layers)
    try:
        workload.check_size(tp)
        with mode():
            return workload.build(group), workload.example_inputs()
    except ValueError as error:
        raise WorkloadError(str(error)) from error


def _hugging_face_config(name: str) -> Any:
    """The transformers configuration if a workload's name stands for one; None for other names."""
    if name in HUGGING_FACE:
        return huggingface.config_from_dict(HUGGING_FACE[name], name)
    path = path_of(name)
    return None if path is None else huggingface.load_config(path)


def _build_hugging_face(
    config: Any, name: str, group: dist.ProcessGroup | None, layers: int | None, mode: Mode
) -> tuple[torch.nn.Module, Sequence[Any]]:
    try:
        config = huggingface.with_layers(config, layers, name)
        config.use_cache = False
        with mode():
            model = huggingface.build(config, group, name)
            return model, (torch.randint(config.get_text_config().vocab_size, (1, 16)),)
    except WorkloadError:
        raise
    except Exception as error:  # a configuration may have anything in the place of a size
        raise WorkloadError(f"{name}: it can't be built: {one_line(error)}") from error


def import_module(name: str) -> ModuleType:
    """A user's module, as Python imports it, also from the current directory."""
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    return importlib.import_module(name)


def _call_factory(name: str, tp: int) -> tuple[Callable[..., Any], Sequence[Any]]:
    module_name, _, attribute = name.partition(":")
    try:
        module = import_module(module_name)
        factory = getattr(module, attribute, None)
        made = factory(tp) if factory is not None else None
    except (Exception, SystemExit) as error:
        # A script without a main guard ends the program when it is imported: with 0, as if all were well.
        what = (
            f"it calls sys.exit({error.code!r})"
            if isinstance(error, SystemExit)
            else f"{type(error).__name__}: {error}"
        )
        raise WorkloadError(f"{name}: the factory failed: {one_line(what)}") from error
    if factory is None:
        own = [
            each
            for each, value in vars(module).items()
            if inspect.isfunction(value) and value.__module__ == module_name
        ]
        why = str(unknown("factory", attribute, own)) if own else f"{module_name} has no {attribute!r}"
        raise WorkloadError(f"{name}: {why}")
    if not (isinstance(made, tuple) and len(made) == 2 and callable(made[0]) and isinstance(made[1], (tuple, list))):
        raise WorkloadError(f"{name}: factory(tp) must return (module, inputs), found {type(made).__name__}")
    return made[0], tuple(made[1])
