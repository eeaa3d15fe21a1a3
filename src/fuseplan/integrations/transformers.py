"""Hugging Face models from a `config.json` alone: random or fake weights, split by the model's own plan."""

import contextlib
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

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
    """A transformers configuration from its fields: of the language model alone where there is more to the model.

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
    unknown = WorkloadError(f"{where}: transformers knows no causal language model of type {model_type[:80]!r}")
    if model_type not in CONFIG_MAPPING:
        raise unknown
    try:
        config = CONFIG_MAPPING[model_type](**fields)
        text = config.get_text_config()
    except Exception as error:
        raise WorkloadError(f"{where}: transformers can't read it: {one_line(error)}") from error
    for each in (text, config):
        # A `text_config` that the model's own configuration doesn't know of stays what the file has.
        if getattr(each, "model_type", None) in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            return each
    raise unknown


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
            with contextlib.suppress(AttributeError):  # some work their kinds out, and can't be told
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

    if group is not None and _base_plan(config).splits_attention:
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
        plan: style by module or parameter name, `*` for layer numbers; None: the model's own, see `plan_note`.

    Raises:
        WorkloadError: there is no plan, it has an unknown style, or a size isn't divisible.
    """
    plan = _own_plan(model) if plan is None else plan
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


def is_language_model(model: object) -> bool:
    """Whether `build` made it, or somebody else a model that generates."""
    if "transformers" not in sys.modules:
        return False
    from transformers import GenerationMixin

    return isinstance(model, GenerationMixin)


def decoding_step(model: Any, batch: int, context: int) -> dict[str, Any]:
    """Arguments of a step that decodes one token for each sequence on a static cache, which is there already.

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


class _BasePlan(NamedTuple):
    """How a configuration says to split its model, below the head.

    Attributes:
        styles: by name below the base model; empty where it doesn't say.
        splits_attention: whether it is the `tp_plan`, and not the `ep_plan` that a model without one may have.
    """

    styles: Mapping[str, str]
    splits_attention: bool


def _base_plan(config: Any) -> _BasePlan:
    tensors = getattr(config, "base_model_tp_plan", None) or {}
    experts = getattr(config, "base_model_ep_plan", None) or {}
    return _BasePlan(tensors or experts, bool(tensors) or not experts)


def _own_plan(model: Any) -> dict[str, str]:
    base = {f"{model.base_model_prefix}.{key}": style for key, style in _base_plan(model.config).styles.items()}
    head = getattr(type(model), "_tp_plan", None)
    return {**base, **(head or {})} if base else {}


def plan_note(config: Any) -> str | None:
    """What a reader has to know of how `shard` splits a model by its own plan: None where that is its `tp_plan`.

    A model without a `tp_plan` whose `ep_plan` says how to split its experts, such as GPT-OSS, is split by that.
    """
    if _base_plan(config).splits_attention:
        return None
    return (
        f"{config.model_type} has no tp_plan, and is split by its ep_plan: experts alone, attention whole on every rank"
    )


class _Style:
    """How one entry of a `tp_plan` splits a module, named as transformers names it.

    Args:
        dim: the dimension of a weight that is split; None: nothing is.
        packed: the dimension holds two halves (gate and up), each of which is split.
        splits_input: the input is whole and the module takes its slice of the last dimension.
        routes: the module holds this rank's part of the experts, and takes their numbers among all.
        output: what happens to the result: kept, summed over the ranks, or gathered along the last dimension.
    """

    def __init__(
        self,
        dim: int | None,
        output: str,
        *,
        packed: bool = False,
        splits_input: bool = False,
        routes: bool = False,
    ) -> None:
        self.dim, self.output = dim, output
        self.packed, self.splits_input, self.routes = packed, splits_input, routes

    def apply(self, module: nn.Module, group: dist.ProcessGroup, where: str) -> None:
        """Splits the module's own parameters and completes its result."""
        for name, parameter in list(module.named_parameters(recurse=False)) if self.dim is not None else []:
            if name == "bias" and self.output == "sum":
                kept = parameter.detach() if group.rank() == 0 else torch.zeros_like(parameter)
                module.bias = nn.Parameter(kept, requires_grad=False)
            else:
                self.narrow(module, name, group, where)
        module.register_forward_pre_hook(_take_slice(group)) if self.splits_input else None
        module.register_forward_pre_hook(_route(module, group)) if self.routes else None
        if self.output != "keep":
            module.register_forward_hook(_sum(group) if self.output == "sum" else _gather(group))

    def narrow(self, module: nn.Module, name: str, group: dist.ProcessGroup, where: str) -> None:
        """Keeps this rank's part of one parameter."""
        assert self.dim is not None
        parameter = getattr(module, name)
        dim = parameter.dim() - 1 if name == "bias" else self.dim % parameter.dim()
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
    "grouped_gemm": _Style(0, "keep"),
    "ep_dispatch_experts": _Style(None, "sum", routes=True),
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


SKIPS_ABSENT_EXPERTS = "_is_expert_parallel"
"""What transformers itself sets on experts that it splits; models without it never read it."""


def _route(module: Any, group: dist.ProcessGroup) -> Callable[..., Any]:
    """Numbers experts as a rank does that has a part of them: those of the others are one past its last, weighing
    nothing. Experts of transformers leave such rows out once they are told that there are any.
    """
    count = module.num_experts // group.size()
    module.num_experts = count
    setattr(module, SKIPS_ABSENT_EXPERTS, True)

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden, index, weights = args
        elsewhere = index // count != group.rank()
        return hidden, torch.where(elsewhere, count, index % count), weights.masked_fill(elsewhere, 0)

    return hook
