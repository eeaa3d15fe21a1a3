"""Hugging Face models from a `config.json` alone: random or fake weights, split by the model's own plan."""

import contextlib
import json
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fuseplan.errors import WorkloadError
from fuseplan.integrations.splitting import check_heads, shard
from fuseplan.record.files import read_bytes, reading
from fuseplan.record.parsing import parse_json
from fuseplan.record.report import MOST_LAYERS
from fuseplan.record.text import one_line

LARGEST_BYTES = 16 * 2**20
"""The largest config.json that is read; the largest ones list the labels of their classifiers."""

BUILT_IN_ATTENTION = ("eager", "sdpa")
"""Others may be fetched from the network, and run."""

MOST_COUNTED = 2**20
"""The most of anything that a configuration counts: transformers makes lists of that length."""

_LAYERS = re.compile(r"layers?$|blocks?$|depths?$|first_k_dense_replace")
_SIZES = re.compile(
    r"(?<!kernel_)size|dim|vocab|head|position|length|len$|window(?!_k)|theta|base|factor|token|_ids?$|seed|max"
)
"""Names of integers that no list is made from; their size isn't limited."""


def load_config(path: Path) -> Any:
    """The transformers configuration in a `config.json`, or in a folder that has one.

    Raises:
        WorkloadError: the file is missing, isn't a JSON object, names no architecture or an unknown one, or
            transformers is not installed.
    """
    path = path / "config.json" if path.is_dir() else path
    with reading("Hugging Face configuration", path, WorkloadError):
        # Configurations of transformers have infinite limits, e.g. of Mamba's time steps.
        data = parse_json(read_bytes(path, LARGEST_BYTES), most_bytes=LARGEST_BYTES, finite=False)
    if not isinstance(data, dict) or not isinstance(data.get("model_type"), str):
        raise WorkloadError(f'{path} has no "model_type"; a Hugging Face config.json names its architecture there')
    return config_from_dict(data, str(path))


def config_from_dict(data: Mapping[str, Any], where: str) -> Any:
    """A transformers configuration from its fields: of the language model alone where the model has other parts.

    Raises:
        WorkloadError: see `load_config`.
    """
    try:
        from transformers import CONFIG_MAPPING
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    except ImportError as error:
        raise WorkloadError(f"{where}: Hugging Face workloads need transformers; pip install transformers") from error
    fields = _without_code(data)
    for name, value in _numbers(fields):
        _check_count(name, value, where)
    model_type = fields.pop("model_type")
    unknown = WorkloadError(f"{where}: transformers knows no causal language model of type {model_type[:80]!r}")
    if model_type not in CONFIG_MAPPING:
        raise unknown
    try:
        config = _read(CONFIG_MAPPING[model_type], fields)
        text = config.get_text_config()
    except Exception as error:
        raise WorkloadError(f"{where}: transformers can't read it: {one_line(error)}") from error
    for each in (text, config):
        # A `text_config` that the model's own configuration doesn't know stays as in the file.
        if getattr(each, "model_type", None) in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            return each
    raise unknown


def _without_code(data: Any) -> Any:
    """A configuration, or a part of one, without the fields that name code to fetch and run."""
    if not isinstance(data, Mapping):
        return data
    return {
        name: _without_code(value)
        for name, value in data.items()
        if name != "auto_map" and ("attn_implementation" not in name or value in BUILT_IN_ATTENTION)
    }


def _read(kind: Any, fields: Mapping[str, Any]) -> Any:
    """The configuration that transformers reads from a file: it knows its own extensions of JSON."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(fields), encoding="utf-8")
        return kind.from_json_file(path)


def _numbers(data: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """(name, number) of every number in a configuration; those in a list have the list's name."""
    if isinstance(data, Mapping):
        for key, value in data.items():
            yield from _numbers(value, key)
    elif isinstance(data, (list, tuple)):
        for value in data:
            yield from _numbers(value, name)
    elif isinstance(data, (int, float)):
        yield name, data


def _check_count(name: str, value: float, where: str) -> None:
    """Refuses counts that would keep transformers busy before it could refuse them.

    Raises:
        WorkloadError: there are more layers than `MOST_LAYERS`, or more than `MOST_COUNTED` of something else.
    """
    if _SIZES.search(name):
        return
    if _LAYERS.search(name) and value > MOST_LAYERS:
        raise WorkloadError(f"{where} has {value} layers; allowed are at most {MOST_LAYERS} ({one_line(name)})")
    if isinstance(value, int) and value > MOST_COUNTED:
        raise WorkloadError(f"{where}: {one_line(name)} is {value}; allowed are at most {MOST_COUNTED}")


def with_layers(config: Any, layers: int | None, where: str) -> Any:
    """A configuration cut or grown to another number of layers, whose kinds repeat in their order; in place.

    Args:
        config: a transformers configuration.
        layers: how many; None: the configuration's own.
        where: names the workload in errors.

    Raises:
        WorkloadError: there are more than `MOST_LAYERS`.
    """
    text = config.get_text_config()
    if layers is not None:
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None):
            with contextlib.suppress(AttributeError):  # some compute their kinds, and can't be set
                text.layer_types = [text.layer_types[index % len(text.layer_types)] for index in range(layers)]
    found = getattr(text, "num_hidden_layers", None)
    if isinstance(found, int) and found > MOST_LAYERS:
        raise WorkloadError(f"{where} has {found} layers; allowed are at most {MOST_LAYERS}")
    return config


def build(config: Any, group: dist.ProcessGroup | None, where: str, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """A causal language model with random weights for inference; fake under a FakeTensorMode.

    Args:
        config: a transformers configuration.
        group: the ranks to split over by the model's own plan; None for a whole model.
        where: names the workload in errors.
        dtype: of the weights.

    Raises:
        WorkloadError: the model can't be built, or can't be split over that many ranks.
    """
    from transformers import AutoModelForCausalLM

    if group is not None:
        check_heads(config, group.size(), where)
    try:
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    except Exception as error:
        raise WorkloadError(f"{where}: transformers can't build it: {one_line(error)}") from error
    if group is not None:
        shard(model, group, where)
    return model.requires_grad_(False).eval()


def is_language_model(model: object) -> bool:
    """Whether `build` made it, rather than a user's code that builds a generating model."""
    if "transformers" not in sys.modules:
        return False
    from transformers import GenerationMixin

    return isinstance(model, GenerationMixin)


def decoding_step(model: Any, batch: int, context: int) -> dict[str, Any]:
    """Arguments of a step that decodes one token for each sequence on a static cache that already exists.

    Args:
        model: a causal language model.
        batch: sequences.
        context: positions of the cache, the last of which is decoded.
    """
    from transformers import StaticCache

    device = next(model.parameters()).device
    ids = torch.zeros(batch, 1, dtype=torch.long, device=device)
    cache = StaticCache(config=model.config, max_cache_len=context)
    last = torch.full_like(ids, context - 1)
    arguments = {"input_ids": ids, "position_ids": last, "past_key_values": cache, "use_cache": True}
    with torch.no_grad():
        model(**arguments)  # the cache makes its tensors at its first use
    return arguments
