"""Where fuseplan hooks into vLLM.

vLLM builds a `VllmConfig` in its first process and hands it to its workers. What fuseplan is asked for is written into
`additional_config["fuseplan"]`, which travels with it and is a part of vLLM's own cache key. Each worker reads it there
before it loads its model.
"""

import functools
import hashlib
import logging
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch

import fuseplan
from fuseplan.config import Environment, PassConfig
from fuseplan.errors import ConfigError

KEY = "fuseplan"
"""In `additional_config`: `{"fuseplan": {"policy": "planned", ...}}`, the fields of `PassConfig`."""

PASS_NAME = "vllm_pass"
"""In `compilation_config.inductor_passes`: `{"post_grad_custom_post_pass": "fuseplan.vllm_pass"}`."""

HOOK = "post_grad_custom_post_pass"
DIGEST = "digest"

log = logging.getLogger("vllm.fuseplan")
"""Below vLLM's own logger, so that it is formatted and filtered as vLLM's lines are."""


def vllm_pass(graph: torch.fx.Graph) -> None:
    """Asks for fuseplan by its name in `--compilation-config`. The plugin puts the real pass in its place."""
    raise ConfigError("fuseplan.vllm_pass stands for the plugin, which vLLM hasn't loaded; see VLLM_PLUGINS")


def hook_into_vllm() -> None:
    """Hooks into configuration and workers, once a process."""
    from vllm.config import VllmConfig
    from vllm.v1.worker.worker_base import WorkerBase

    if hasattr(fuseplan, PASS_NAME):
        return
    setattr(fuseplan, PASS_NAME, vllm_pass)
    _after(VllmConfig, "__post_init__", adopt)
    _after(WorkerBase, "__init__", _prepare)


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
    """Notes in a `VllmConfig` that fuseplan is asked for, and under which configuration.

    Raises:
        ConfigError: that configuration can't be served.
    """
    compilation = config.compilation_config
    named = compilation.inductor_passes.get(HOOK) == f"fuseplan.{PASS_NAME}"
    additional = config.additional_config
    given = additional.get(KEY) if isinstance(additional, dict) else None
    environment = Environment.read()
    if named:
        del compilation.inductor_passes[HOOK]
        compilation.inductor_compile_config.pop(HOOK, None)
    if not environment.enabled or not (named or given is not None or environment.vllm):
        return
    if not isinstance(additional, dict):
        raise ConfigError(
            f"additional_config is a {type(additional).__name__}; fuseplan needs a dict, to enter vLLM's cache key"
        )
    settings = _settings(given or {})
    digest = _digest(pass_config(settings))
    if given is None or given.get(DIGEST) != digest:
        additional[KEY] = {**settings, DIGEST: digest}
        _announce(config, pass_config(settings))


def _settings(given: dict[str, Any]) -> dict[str, Any]:
    """What the user gave, without what the plugin added."""
    return {name: value for name, value in given.items() if name != DIGEST}


def _digest(config: PassConfig) -> str:
    """Of whatever changes plans. What is forced and forbidden may name vLLM's passes, which only workers know."""
    from fuseplan.integrations.vllm.passes import manager_for

    manager = manager_for(replace(config, force=(), forbid=()), None, lambda report: None)
    return hashlib.sha256(repr((manager.uuid(), config.force, config.forbid)).encode()).hexdigest()


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
    """What a `VllmConfig` asks of fuseplan, or None."""
    additional = config.additional_config
    if not isinstance(additional, dict) or KEY not in additional:
        return None
    return pass_config(_settings(additional[KEY]))


def _announce(config: Any, chosen: PassConfig) -> None:
    """Says in one line what was done, and loudly where nothing will come of it."""
    import vllm
    from vllm.config import CompilationMode

    mode = config.compilation_config.mode
    if mode == CompilationMode.NONE or config.compilation_config.backend == "eager":
        why = f"mode={mode.name}" if mode == CompilationMode.NONE else "backend=eager"
        log.warning(
            "fuseplan %s has no effect: with %s in the compilation config (or --enforce-eager) no graph reaches it",
            fuseplan.__version__, why,
        )  # fmt: skip
        return
    log.info(
        "fuseplan %s is vLLM's post-grad pass: policy %s, vLLM %s, torch %s, compilation mode %s",
        fuseplan.__version__, chosen.chosen_policy, vllm.__version__, torch.__version__, mode.name,
    )  # fmt: skip


def _prepare(worker: Any) -> None:
    """Installs the pass in a worker, before it loads its model."""
    config = worker.vllm_config
    chosen = asked_for(config)
    if chosen is None or not Environment.read().enabled:
        return
    from vllm.platforms import current_platform

    from fuseplan.integrations.vllm.passes import manager_for
    from fuseplan.integrations.vllm.reports import Journal

    journal = Journal.of(config)
    platform = type(current_platform)
    platform.get_pass_manager_cls = classmethod(
        lambda cls: "fuseplan.integrations.vllm.pass_manager.FuseplanPassManager"
    )
    if config.compilation_config.backend == "inductor" and not _splits(config):
        options = config.compilation_config.inductor_compile_config
        previous = options.get(HOOK)
        options[HOOK] = manager_for(chosen, None, journal.add, previous=[previous] if previous is not None else [])
    warm_up = worker.compile_or_warm_up_model

    @functools.wraps(warm_up)
    def warm_up_and_report(*args: Any, **kwargs: Any) -> Any:
        result = warm_up(*args, **kwargs)
        journal.close()
        return result

    worker.compile_or_warm_up_model = warm_up_and_report


def _splits(config: Any) -> bool:
    """Whether vLLM's own backend compiles, with its own pass manager and its own cache."""
    from vllm.config import CompilationMode

    return bool(config.compilation_config.mode == CompilationMode.VLLM_COMPILE)
