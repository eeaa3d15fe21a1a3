"""Where fuseplan hooks into vLLM.

vLLM builds a `VllmConfig` in its first process and hands it to its workers. The requested configuration of fuseplan is
written into `additional_config["fuseplan"]`, which travels with it and is a part of vLLM's own cache key. Each worker
reads it there before it loads its model.
"""

import functools
import hashlib
import importlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch

import fuseplan
from fuseplan.caching.content import content_of
from fuseplan.caching.fingerprint import config_key, plans_key, renew, renewed, source_digest
from fuseplan.config import Environment, PassConfig
from fuseplan.devices.known import profile_of
from fuseplan.errors import ConfigError
from fuseplan.integrations.vllm import support
from fuseplan.planner.costs import CostTable, cached_path
from fuseplan.planner.costs.record import record_path
from fuseplan.providers import BUILT_IN_PROVIDERS
from fuseplan.record import SavedPlans
from fuseplan.rules import enabled_rules
from fuseplan.rules.families import BUILT_IN_RULES
from fuseplan.rules.families.linear import DEFAULT_ON
from fuseplan.rules.families.scaled_linear import ScaledLinears

KEY = "fuseplan"
"""In `additional_config`: `{"fuseplan": {"policy": "planned", ...}}`, the fields of `PassConfig`."""

PASS_NAME = "vllm_pass"
"""In `compilation_config.inductor_passes`: `{"post_grad_custom_post_pass": "fuseplan.vllm_pass"}`."""

HOOK = "post_grad_custom_post_pass"
BASIS, DIGEST = "key", "digest"
"""The plugin's additions to the fields of `PassConfig`: their key, and its digest, which is renewed when the key is
given up.
"""

LINEAR_FLAGS = "fuse_merged_linear", "fuse_skinny_linear"
"""Flags of the rules for linear layers of few rows, which get a compile range of their own."""

WITH_PLAIN_LINEARS = None, "mxfp4", "gpt_oss_mxfp4"
"""vLLM's names of quantisation under which linear layers aren't quantised: MXFP4's experts alone are."""

WITH_FP8_LINEARS = "fp8", "fp8_per_tensor", "fp8_per_channel", "fbgemm_fp8"
"""vLLM's names of quantisation under which linear layers are in fp8 and inputs get a scale for each token, unless a
checkpoint says otherwise.
"""

log = logging.getLogger("vllm.fuseplan")
"""Below vLLM's own logger, so that it is formatted and filtered as vLLM's lines are."""


def vllm_pass(graph: torch.fx.Graph) -> None:
    """Asks for fuseplan by its name in `--compilation-config`. The plugin puts the real pass in its place."""
    raise ConfigError("fuseplan.vllm_pass stands for the plugin, which vLLM hasn't loaded; see VLLM_PLUGINS")


def hook_into_vllm() -> None:
    """Hooks into configuration and workers, once a process."""
    if hasattr(fuseplan, PASS_NAME):
        return
    setattr(fuseplan, PASS_NAME, vllm_pass)
    if (why := support.missing(support.HOOKS)) is not None:
        _say_once(support.nothing(why))
        return
    from vllm.config import VllmConfig
    from vllm.v1.worker.worker_base import WorkerBase

    _after(VllmConfig, "__post_init__", adopt)
    _after(WorkerBase, "__init__", _prepare)


@functools.cache
def _say_once(line: str) -> None:
    """Warns, once a process."""
    log.warning(line)


def _after(owner: type, name: str, then: Callable[[Any], None]) -> None:
    """Lets `then(self)` run after a method."""
    method = getattr(owner, name)

    @functools.wraps(method)
    def both(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = method(self, *args, **kwargs)
        then(self)
        return result

    setattr(owner, name, both)


def adopt(config: Any) -> None:
    """Records in a `VllmConfig` that fuseplan is requested, and with which configuration. If this vLLM lacks an
    interface, one line is logged, and the engine starts without fuseplan.

    Raises:
        ConfigError: that configuration can't be served.
    """
    additional = getattr(config, "additional_config", None)
    given = additional.get(KEY) if isinstance(additional, dict) else None
    environment = Environment.read()
    named = _take_name(getattr(config, "compilation_config", None))
    if not environment.enabled or not (named or given is not None or environment.vllm):
        return
    if (why := support.obstacle()) is not None:
        if isinstance(additional, dict):
            additional.pop(KEY, None)
        _say_once(support.nothing(why))
        return
    if not isinstance(additional, dict):
        raise ConfigError(
            f"additional_config is a {type(additional).__name__}; fuseplan needs a dict, to enter vLLM's cache key"
        )
    if given is not None and DIGEST in given:
        return  # vLLM derived it from one that was adopted before
    settings = _settings(given)
    chosen = pass_config(settings)
    key = _key(chosen)
    additional[KEY] = {**settings, BASIS: key, DIGEST: renewed(key, _folder())}
    _announce(config, chosen, _with_small_range(config, chosen))


def _take_name(compilation: Any) -> bool:
    """Whether the pass is requested by its name, a placeholder, which is removed."""
    passes = getattr(compilation, "inductor_passes", {})
    if passes.get(HOOK) != f"fuseplan.{PASS_NAME}":
        return False
    del passes[HOOK]
    compilation.inductor_compile_config.pop(HOOK, None)
    return True


def _settings(given: Any) -> dict[str, Any]:
    """The user's fields, without those that the plugin added.

    Raises:
        ConfigError: something else than fields and their values.
    """
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise ConfigError(f"additional_config[{KEY!r}] is {given!r}; allowed are objects with fields of PassConfig")
    return {name: value for name, value in given.items() if name not in (BASIS, DIGEST)}


def _key(config: PassConfig) -> str:
    """A key of everything that changes plans, as far as it is known before there are workers: nothing here may make a
    context on a device, or vLLM couldn't fork. Forced and forbidden selectors may name vLLM's passes, which only
    workers know.

    Raises:
        ConfigError: flags and policy contradict each other, or a file that is named is broken.
    """
    enabled_rules(replace(config, force=(), forbid=()), BUILT_IN_RULES)
    environment = Environment.read()
    table = config.cost_table or environment.cost_table
    known = {
        "source": source_digest(),
        "torch": torch.__version__,
        "device": _device_name(),
        "config": config_key(config),
        "plan": plans_key(SavedPlans.load(Path(config.plan)) if config.plan else None),
        "table": content_of(CostTable.load(Path(table))).digest if table else None,
        "measured": _measured(),
        "tune": uuid4().hex if environment.tune is not None else None,  # a warm start brings no graph to measure
        "providers": sorted((each.name, str(each.version())) for each in BUILT_IN_PROVIDERS),
    }
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def _with_small_range(config: Any, chosen: PassConfig) -> str:
    """Gives batches of few tokens a compile range of their own, where linear layers of few rows are fused by default or
    because their flags say so. In vLLM's own range, which goes up to the largest batch, their kernels can't be chosen.

    Returns:
        The addition to the log line about fuseplan.
    """
    compilation, most = config.compilation_config, DEFAULT_ON.most_tokens
    ends = compilation.compile_ranges_endpoints
    flags = [getattr(chosen, flag) for flag in _linear_flags(config.model_config)]
    is_default = None in flags and profile_of(_device_name(), "nvidia").name in DEFAULT_ON.devices
    is_wanted = is_default or True in (*flags, getattr(chosen, ScaledLinears.opt_in))
    if chosen.chosen_policy.name != "planned" or not is_wanted:
        return ""
    if not _splits(compilation) or not ends or ends[-1] <= most:
        return ""
    compilation.compile_ranges_endpoints = sorted({*ends, most})
    return f", and a compile range that ends at {most} tokens for linear layers"


def _linear_flags(model: Any) -> Sequence[str]:
    """Flags of the rules for a model's linear layers, by vLLM's name of its quantisation."""
    if model is None:
        return ()
    if model.quantization in WITH_PLAIN_LINEARS:
        return LINEAR_FLAGS
    given = getattr(model.hf_config, "quantization_config", None)
    is_ours = _quantises_rows(model.quantization, given if isinstance(given, Mapping) else {})
    return (ScaledLinears.opt_in,) if is_ours else ()


def _quantises_rows(method: str, given: Mapping[str, Any]) -> bool:
    """Whether linear layers are in fp8, with dynamic scales for each token of their inputs.

    Args:
        method: vLLM's name of the quantisation.
        given: the checkpoint's settings for it; empty where vLLM quantises the weights.
    """
    if method in WITH_FP8_LINEARS:
        return given.get("activation_scheme", "dynamic") == "dynamic" and not given.get("weight_block_size")
    if method != "compressed-tensors":
        return False
    inputs = [each.get("input_activations") or {} for each in (given.get("config_groups") or {}).values()]
    return any(
        [each.get(name) for name in ("type", "num_bits", "strategy")] == ["float", 8, "token"] for each in inputs
    )


def _device_name() -> str:
    """vLLM's name of the device, by NVML or the like."""
    from vllm.platforms import current_platform

    return str(current_platform.get_device_name()) if current_platform.is_cuda_alike() else ""


def _measured() -> list[str]:
    """The cost tables of `fuseplan tune` on this machine, of any device."""
    folders = (cached_path("").parent, record_path("").parent)
    files = [path for folder in folders for path in sorted(folder.glob("*.json"))]
    return [f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in files]


def _folder() -> Path:
    """The folder beside vLLM's compile cache."""
    from vllm import envs

    return Path(envs.VLLM_CACHE_ROOT) / "fuseplan"


def pass_config(settings: dict[str, Any]) -> PassConfig:
    """The configuration in `additional_config`.

    Raises:
        ConfigError: an unknown field or value.
    """
    known = {field.name for field in fields(PassConfig)} - {"compile_ranges"}
    for name in settings:
        if name not in known:
            allowed = ", ".join(sorted(known))
            raise ConfigError(f"additional_config[{KEY!r}] has {name!r}; allowed are {allowed}")
    return PassConfig(**settings)


def asked_for(config: Any) -> PassConfig | None:
    """The fuseplan settings of a `VllmConfig`, or None."""
    additional = config.additional_config
    if not isinstance(additional, dict) or KEY not in additional:
        return None
    return pass_config(_settings(additional[KEY]))


def _announce(config: Any, chosen: PassConfig, further: str) -> None:
    """Logs in one line how fuseplan is used, as a warning where it will have no effect."""
    compilation = config.compilation_config
    if not _compiles(compilation):
        if (model := _left_uncompiled(config)) is not None:
            log.warning(
                "fuseplan %s has no effect: this vLLM doesn't compile %s but captures breakable CUDA graphs of it, so "
                "no graph reaches fuseplan; VLLM_USE_BREAKABLE_CUDAGRAPH=0 lets it be compiled",
                fuseplan.__version__, model,
            )  # fmt: skip
            return
        why = "backend=eager" if compilation.backend == "eager" else f"mode={compilation.mode.name}"
        log.warning(
            "fuseplan %s has no effect: with %s in the compilation config (or --enforce-eager) no graph reaches it",
            fuseplan.__version__, why,
        )  # fmt: skip
        return
    level, note = (logging.INFO, "") if support.tried() else (logging.WARNING, f"; {support.untried()}")
    log.log(
        level, "fuseplan %s is the post-grad pass of %s: policy %s, compilation mode %s%s%s",
        fuseplan.__version__, support.versions(), chosen.chosen_policy, compilation.mode.name, further, note,
    )  # fmt: skip


def _left_uncompiled(config: Any) -> str | None:
    """The part that vLLM leaves uncompiled by default, or None: the architecture, where it is on the list of vLLM 0.29
    and newer; or the model, where something else has chosen breakable CUDA graphs, as VLLM_BATCH_INVARIANT does for
    some.
    """
    from vllm import envs

    listed = getattr(
        importlib.import_module("vllm.config.vllm"), "default_breakable_cudagraph_architectures", frozenset
    )
    model = config.model_config
    if model is None or model.enforce_eager or not getattr(envs, "VLLM_USE_BREAKABLE_CUDAGRAPH", False):
        return None
    return ", ".join(sorted({*model.architectures} & listed())) or "the model"


def _prepare(worker: Any) -> None:
    """Installs the pass in a worker, before it loads its model."""
    config = worker.vllm_config
    chosen = asked_for(config)
    if chosen is None or not Environment.read().enabled or not _compiles(config.compilation_config):
        return
    if (why := support.missing(support.WORKER)) is not None:
        _say_once(support.nothing(why))
        return
    from fuseplan.integrations.vllm.backend import offer_pass_manager
    from fuseplan.integrations.vllm.passes import manager_for
    from fuseplan.integrations.vllm.reports import Journal
    from fuseplan.integrations.vllm.tuning import Tuning

    journal = Journal.of(config)

    def give_up() -> None:
        renew(config.additional_config[KEY][BASIS], _folder())

    def settle() -> None:
        journal.settle(chosen, give_up)

    if _splits(config.compilation_config):
        table = Environment.read().tune
        journal.tuning = Tuning(table) if table is not None else None
        offer_pass_manager(journal, settle)
    elif config.compilation_config.backend == "inductor":
        options = config.compilation_config.inductor_compile_config
        previous = options.get(HOOK)
        options[HOOK] = manager_for(chosen, None, journal.add, previous=[previous] if previous is not None else [])
    warm_up = worker.compile_or_warm_up_model

    @functools.wraps(warm_up)
    def warm_up_and_report(*args: Any, **kwargs: Any) -> Any:
        result = warm_up(*args, **kwargs)
        if not journal.is_lasting:
            give_up()
        settle()
        journal.close()
        if journal.tuning is not None:
            journal.tuning.run(chosen)
        return result

    worker.compile_or_warm_up_model = warm_up_and_report


def _compiles(compilation: Any) -> bool:
    """Whether graphs go to Inductor."""
    from vllm.config import CompilationMode

    return bool(compilation.mode != CompilationMode.NONE and compilation.backend != "eager")


def _splits(compilation: Any) -> bool:
    """Whether vLLM's own backend compiles, with its own pass manager and its own cache."""
    from vllm.config import CompilationMode

    return bool(compilation.mode == CompilationMode.VLLM_COMPILE)
