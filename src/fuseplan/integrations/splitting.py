"""Models of transformers split over ranks by their own plans, by hooks whose collectives `torch.compile` traces."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import nn

from fuseplan.errors import WorkloadError
from fuseplan.integrations.styles import KEEPS_COLUMNS, Split, style_of
from fuseplan.record.report import MOST_RANKS

EMBEDDING = "embed_tokens"
"""Newer transformers split it in every model that has a plan, whether the plan names it or not."""


class BasePlan(NamedTuple):
    """A configuration's plan for splitting its model, below the head.

    Attributes:
        tensors: its `tp_plan`, style by name below the base model; empty where it has none.
        experts: its `ep_plan`, where that is needed: the `tp_plan` names no module of a layer.
    """

    tensors: Mapping[str, str]
    experts: Mapping[str, str]

    @classmethod
    def of(cls, config: Any) -> "BasePlan":
        """The plan of a configuration of any version of transformers."""
        tensors = getattr(config, "base_model_tp_plan", None) or {}
        experts = getattr(config, "base_model_ep_plan", None) or {}
        return cls(tensors, {} if any("*" in key for key in tensors) else experts)

    @property
    def splits_heads(self) -> bool:
        """Whether each rank has some of the attention's heads."""
        return any("att" in key and style in KEEPS_COLUMNS for key, style in self.tensors.items())


def check_heads(config: Any, tp: int, where: str) -> None:
    """Refuses a number of ranks that a model's heads can't be split over.

    Raises:
        WorkloadError: it doesn't divide them.
    """
    if not BasePlan.of(config).splits_heads:
        return
    text = config.get_text_config()
    for name in ("num_attention_heads", "num_key_value_heads"):
        for heads in {count for each in _layers_of(text) for count in _counts(getattr(each, name, None))}:
            if heads % tp:
                allowed = ", ".join(str(size) for size in range(1, min(heads, MOST_RANKS) + 1) if heads % size == 0)
                raise WorkloadError(f"tp={tp} does not divide the {heads} {name} of {where}; use one of {allowed}")


def _layers_of(text: Any) -> Sequence[Any]:
    """The configurations of the layers, where they differ, or the one of them all."""
    layers = getattr(text, "per_layer_config", None)
    if not layers:
        return [text]
    return list(layers.values() if isinstance(layers, Mapping) else layers)


def _counts(value: Any) -> Sequence[int]:
    return [] if not value else [value] if isinstance(value, int) else [each for each in value if each]


def plan_note(config: Any) -> str | None:
    """A note on how `shard` splits a model by its own plan; None where that is its `tp_plan`.

    A model whose `tp_plan` names no module of a layer, and whose `ep_plan` says how to split its experts, such as
    GPT-OSS, is split by that, too; without an `ep_plan` only its embedding is split.
    """
    base = BasePlan.of(config)
    is_whole = not any("*" in key for key in base.tensors)
    if not base.experts:
        alone = f"{config.model_type} has a tp_plan for its embedding alone: its layers are whole on every rank"
        return alone if base.tensors and is_whole else None
    found = "has a tp_plan for its embedding alone" if base.tensors else "has no tp_plan"
    return f"{config.model_type} {found}, and is split by its ep_plan: experts alone, attention whole on every rank"


def unmatched_note(model: nn.Module) -> str | None:
    """Names the keys of a model's own plan that match nothing: those parts aren't split.

    A plan names modules that only some layers have, such as the dense MLP of a model with experts. So a key is named
    where no other key matches in its part of a layer.
    """
    plan = _own_plan(model)
    unmatched = plan.unmatched(model)
    split = {_part(key) for key in plan.styles if key not in unmatched}
    lost = sorted(key for key in unmatched if _part(key) not in split)
    if not lost:
        return None
    return f"{type(model).__name__} has no module or parameter named {', '.join(lost)}: its plan doesn't split them"


def _part(key: str) -> str:
    """`layers.*.mlp` of `layers.*.mlp.experts.down_proj`."""
    layer, star, rest = key.partition("*.")
    return layer + star + rest.partition(".")[0]


def shard(model: nn.Module, group: dist.ProcessGroup, where: str, plan: Mapping[str, str] | None = None) -> None:
    """Splits a causal language model over the ranks of a group, in place.

    Collectives are functional and come from hooks, so that `torch.compile` traces the model whole. A bias that is added
    to a sum over the ranks stays on the first rank and is zero on the others: the ranks' graphs are equal, and nothing
    stands between the all-reduce and its reader.

    Args:
        model: on the meta device, fake or real; the model's own code isn't touched.
        group: the ranks.
        where: names the workload in errors.
        plan: style by module or parameter name, `*` for layer numbers; None: the model's own, see `plan_note`.

    Raises:
        WorkloadError: there is no plan, it has an unknown style, it names nothing of the model, or a size isn't
            divisible.
    """
    found = _own_plan(model) if plan is None else _Plan(plan)
    if not found.styles:
        raise WorkloadError(
            f"{where}: {type(model).__name__} has no tp_plan; use --tp 1, or shard the model in a factory"
        )
    for style in found.styles.values():
        style_of(style, where)
    unmatched = found.unmatched(model)
    # Of the model's own plan, a part may be for other kinds of layers.
    if unmatched and (plan is not None or not found.base - unmatched):
        raise WorkloadError(
            f"{where}: the tp_plan names modules that {type(model).__name__} doesn't have: "
            f"{', '.join(sorted(unmatched))}; use --tp 1, or shard the model in a factory"
        )
    for name, module in list(model.named_modules()):
        whole = found.style_of(name)
        parts = {each: found.style_of(f"{name}.{each}") for each, _ in module.named_parameters(recurse=False)}
        if whole is not None or any(parts.values()):
            Split(module, group, where).apply(whole, parts)


@dataclass(frozen=True)
class _Plan:
    """Styles by name.

    Attributes:
        styles: by module or parameter name from the model's root, `*` for layer numbers.
        base: the names below the head.
    """

    styles: Mapping[str, str]
    base: frozenset[str] = frozenset()

    def style_of(self, name: str) -> str | None:
        return self.styles.get(name) or self.styles.get(_without_numbers(name))

    def unmatched(self, model: nn.Module) -> frozenset[str]:
        """The names that no module and no parameter has."""
        names = {name for name, _ in (*model.named_modules(), *model.named_parameters(remove_duplicate=False))}
        return frozenset(self.styles.keys() - names - set(map(_without_numbers, names)))


def _without_numbers(name: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def _own_plan(model: Any) -> _Plan:
    """The plan that transformers itself resolved, with this class's names of modules."""
    base = BasePlan.of(model.config)
    head = getattr(type(model), "_tp_plan", None) or {}
    tensors = {key: style for key, style in (getattr(model, "_tp_plan", None) or {}).items() if key not in head}
    if EMBEDDING not in base.tensors:
        tensors = {key: style for key, style in tensors.items() if key.rpartition(".")[2] != EMBEDDING}
    experts = (getattr(model, "_ep_plan", None) or {}) if base.experts else {}
    # As in transformers: parameters split by expert aren't split by tensor.
    by_expert = tuple(f"{key}." for key in experts)
    tensors = {key: style for key, style in tensors.items() if not f"{key}.".startswith(by_expert)}
    styles = {**tensors, **experts}
    # A model whose prefix names no module is its own base, and has every key with its path and without.
    paths = tuple(styles)
    styles = {key: style for key, style in styles.items() if not any(path.endswith(f".{key}") for path in paths)}
    return _Plan({**styles, **head}, frozenset(styles)) if styles else _Plan({})
