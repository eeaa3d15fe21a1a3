"""Hugging Face models from a `config.json` alone: random or fake weights, split by the model's own `tp_plan`."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import _functional_collectives as collectives

from fuseplan.errors import WorkloadError
from fuseplan.record.files import read_bytes, reading
from fuseplan.record.parsing import parse_json
from fuseplan.record.report import MOST_LAYERS, MOST_RANKS
from fuseplan.record.text import one_line

LARGEST_BYTES = 16 * 2**20
"""Of a config.json; the largest list the labels of their classifiers."""

BUILT_IN_ATTENTION = ("eager", "sdpa")
"""Others may be fetched from the network, and run."""


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
    """A transformers configuration from its fields.

    Raises:
        WorkloadError: see `load_config`.
    """
    try:
        from transformers import CONFIG_MAPPING
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    except ImportError as error:
        raise WorkloadError(
            f"{where}: Hugging Face workloads need transformers; pip install fuseplan[transformers]"
        ) from error
    fields = _without_code(data)
    model_type = fields.pop("model_type")
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or model_type not in CONFIG_MAPPING:
        raise WorkloadError(f"{where}: transformers knows no causal language model of type {model_type[:80]!r}")
    try:
        return CONFIG_MAPPING[model_type](**fields)
    except Exception as error:
        raise WorkloadError(f"{where}: transformers can't read it: {one_line(error)}") from error


def _without_code(data: Any) -> Any:
    """A configuration, or a part of one, without what names code to fetch and run."""
    if not isinstance(data, Mapping):
        return data
    return {
        name: _without_code(value)
        for name, value in data.items()
        if name != "auto_map" and ("attn_implementation" not in name or value in BUILT_IN_ATTENTION)
    }


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
            text.layer_types = [text.layer_types[index % len(text.layer_types)] for index in range(layers)]
    found = getattr(text, "num_hidden_layers", None)
    if isinstance(found, int) and found > MOST_LAYERS:
        raise WorkloadError(f"{where} has {found} layers; allowed are at most {MOST_LAYERS}")
    return config


def build(config: Any, group: dist.ProcessGroup | None, where: str, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """A causal language model with random weights for inference; fake under a FakeTensorMode.

    Args:
        config: a transformers configuration.
        group: the ranks to split over by the model's `tp_plan`; None for a whole model.
        where: names the workload in errors.
        dtype: of the weights.

    Raises:
        WorkloadError: the model can't be built, or can't be split over that many ranks.
    """
    from transformers import AutoModelForCausalLM

    if group is not None:
        _check_heads(config, group.size(), where)
    try:
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    except Exception as error:
        raise WorkloadError(f"{where}: transformers can't build it: {one_line(error)}") from error
    if group is not None:
        shard(model, group, where)
    return model.requires_grad_(False).eval()


def _check_heads(config: Any, tp: int, where: str) -> None:
    text = config.get_text_config()
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(text, name, None)
        if heads and heads % tp:
            allowed = ", ".join(str(size) for size in range(1, min(heads, MOST_RANKS) + 1) if heads % size == 0)
            raise WorkloadError(f"tp={tp} does not divide the {heads} {name} of {where}; use one of {allowed}")


def shard(model: nn.Module, group: dist.ProcessGroup, where: str, plan: Mapping[str, str] | None = None) -> None:
    """Splits a causal language model over the ranks of a group, in place.

    Collectives are functional and come from hooks, so that `torch.compile` traces the model whole. A bias that is added
    to a sum over the ranks stays on the first rank and is zero on the others: the ranks' graphs are equal, and nothing
    stands between the all-reduce and what follows it.

    Args:
        model: on the meta device, fake or real; the model's own code isn't touched.
        group: the ranks.
        where: names the workload in errors.
        plan: style by module or parameter name, `*` for layer numbers; None: the model's own `tp_plan`.

    Raises:
        WorkloadError: there is no plan, it has an unknown style, or a size isn't divisible.
    """
    plan = _tp_plan(model) if plan is None else plan
    if not plan:
        raise WorkloadError(
            f"{where}: {type(model).__name__} has no tp_plan; use --tp 1, or shard the model in a factory"
        )
    patterns = {re.compile(re.escape(key).replace(r"\*", r"\d+")): style for key, style in plan.items()}
    for name, module in model.named_modules():
        for parameter, _ in list(module.named_parameters(recurse=False)):
            for pattern, style in patterns.items():
                if pattern.fullmatch(f"{name}.{parameter}"):
                    _style(style, where).narrow(module, parameter, group, where)
        for pattern, style in patterns.items():
            if pattern.fullmatch(name):
                _style(style, where).apply(module, group, where)


def _tp_plan(model: Any) -> dict[str, str]:
    base = {f"{model.base_model_prefix}.{key}": style for key, style in (model.config.base_model_tp_plan or {}).items()}
    head = getattr(type(model), "_tp_plan", None)
    return {**base, **(head or {})} if base else {}


class _Style:
    """How one entry of a `tp_plan` splits a module, named as transformers names it.

    Args:
        dim: the dimension of a weight that is split, from the end; None: nothing is.
        packed: the dimension holds two halves (gate and up), each of which is split.
        splits_input: the input is whole and the module takes its slice of the last dimension.
        output: what happens to the result: kept, summed over the ranks, or gathered along the last dimension.
    """

    def __init__(self, dim: int | None, output: str, *, packed: bool = False, splits_input: bool = False) -> None:
        self.dim, self.output, self.packed, self.splits_input = dim, output, packed, splits_input

    def apply(self, module: nn.Module, group: dist.ProcessGroup, where: str) -> None:
        """Splits the module's own parameters and completes its result."""
        for name, parameter in list(module.named_parameters(recurse=False)) if self.dim is not None else []:
            if name == "bias" and self.output == "sum":
                kept = parameter.detach() if group.rank() == 0 else torch.zeros_like(parameter)
                module.bias = nn.Parameter(kept, requires_grad=False)
            else:
                self.narrow(module, name, group, where)
        module.register_forward_pre_hook(_take_slice(group)) if self.splits_input else None
        if self.output != "keep":
            module.register_forward_hook(_sum(group) if self.output == "sum" else _gather(group))

    def narrow(self, module: nn.Module, name: str, group: dist.ProcessGroup, where: str) -> None:
        """Keeps this rank's part of one parameter."""
        assert self.dim is not None
        parameter = getattr(module, name)
        dim = parameter.dim() - 1 if name == "bias" else parameter.dim() + self.dim
        halves = parameter.chunk(2, dim) if self.packed else (parameter,)
        if halves[0].shape[dim] % group.size():
            raise WorkloadError(
                f"tp={group.size()} does not divide dimension {dim} of {name}, {tuple(parameter.shape)}, in {where}"
            )
        mine = [half.chunk(group.size(), dim)[group.rank()] for half in halves]
        setattr(module, name, nn.Parameter(torch.cat(mine, dim), requires_grad=False))


_STYLES = {
    "colwise": _Style(-2, "keep"),
    "colwise_rep": _Style(-2, "gather"),
    "colwise_gather_output": _Style(-2, "gather"),
    "packed_colwise": _Style(-2, "keep", packed=True),
    "rowwise": _Style(-1, "sum"),
    "rowwise_split_input": _Style(-1, "sum", splits_input=True),
    "moe_tp_experts": _Style(None, "sum"),
    "replicated_with_grad_allreduce": _Style(None, "keep"),
}


def _style(name: str, where: str) -> _Style:
    if name not in _STYLES:
        raise WorkloadError(
            f"{where}: the model's tp_plan has the style {name!r}; supported are {', '.join(sorted(_STYLES))}"
        )
    return _STYLES[name]


def _sum(group: dist.ProcessGroup) -> Callable[..., Tensor]:
    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        total: Tensor = collectives.all_reduce(output, "sum", group)
        return total

    return hook


def _gather(group: dist.ProcessGroup) -> Callable[..., Tensor]:
    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        # The op itself: its wrapper is deprecated under one name and not there yet under the other.
        ops = torch.ops._c10d_functional
        gathered = ops.wait_tensor(ops.all_gather_into_tensor(output.contiguous(), group.size(), group.group_name))
        return torch.cat(gathered.chunk(group.size()), -1)

    return hook


def _take_slice(group: dist.ProcessGroup) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0].chunk(group.size(), -1)[group.rank()], *args[1:])

    return hook
