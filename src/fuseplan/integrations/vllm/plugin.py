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
from pathlib import Path
from typing import Any

import torch

import fuseplan
from fuseplan.config import Environment, PassConfig
from fuseplan.errors import ConfigError
from fuseplan.fingerprint import renew, renewed
from fuseplan.integrations.vllm import support

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
    """Notes in a `VllmConfig` that fuseplan is asked for, and under which configuration. What this vLLM doesn't have is
    told in one line, and the engine starts without fuseplan.

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
    settings = _settings(given)
    digest = _digest(pass_config(settings))
    if given is None or given.get(DIGEST) != digest:
        additional[KEY] = {**settings, DIGEST: digest}
        _announce(config, pass_config(settings))


def _take_name(compilation: Any) -> bool:
    """Whether the pass is asked for by its name, which stands for the pass and isn't one: it is taken out."""
    passes = getattr(compilation, "inductor_passes", {})
    if passes.get(HOOK) != f"fuseplan.{PASS_NAME}":
        return False
    del passes[HOOK]
    compilation.inductor_compile_config.pop(HOOK, None)
    return True


def _settings(given: Any) -> dict[str, Any]:
    """What the user gave, without what the plugin added.

    Raises:
        ConfigError: something else than fields and their values.
    """
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise ConfigError(f"additional_config[{KEY!r}] is {given!r}; allowed are objects with fields of PassConfig")
    return {name: value for name, value in given.items() if name != DIGEST}


def _digest(config: PassConfig) -> str:
    """Of whatever changes plans. What is forced and forbidden may name vLLM's passes, which only workers know."""
    return renewed(_key(config), _folder())


def _key(config: PassConfig) -> str:
    from fuseplan.integrations.vllm.passes import manager_for

    manager = manager_for(replace(config, force=(), forbid=()), None, lambda report: None)
    return hashlib.sha256(repr((manager.uuid(), config.force, config.forbid)).encode()).hexdigest()


def _folder() -> Path:
    """Beside vLLM's compile cache."""
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
    """What a `VllmConfig` asks of fuseplan, or None."""
    additional = config.additional_config
    if not isinstance(additional, dict) or KEY not in additional:
        return None
    return pass_config(_settings(additional[KEY]))


def _announce(config: Any, chosen: PassConfig) -> None:
    """Says in one line what was done, and loudly where nothing will come of it."""
    compilation = config.compilation_config
    if not _compiles(compilation):
        why = "backend=eager" if compilation.backend == "eager" else f"mode={compilation.mode.name}"
        log.warning(
            "fuseplan %s has no effect: with %s in the compilation config (or --enforce-eager) no graph reaches it",
            fuseplan.__version__, why,
        )  # fmt: skip
        return
    level, note = (logging.INFO, "") if support.tried() else (logging.WARNING, f"; {support.untried()}")
    log.log(
        level, "fuseplan %s is the post-grad pass of %s: policy %s, compilation mode %s%s",
        fuseplan.__version__, support.versions(), chosen.chosen_policy, compilation.mode.name, note,
    )  # fmt: skip


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

    journal = Journal.of(config)
    if _splits(config.compilation_config):
        offer_pass_manager(journal)
    elif config.compilation_config.backend == "inductor":
        options = config.compilation_config.inductor_compile_config
        previous = options.get(HOOK)
        options[HOOK] = manager_for(chosen, None, journal.add, previous=[previous] if previous is not None else [])
    warm_up = worker.compile_or_warm_up_model

    @functools.wraps(warm_up)
    def warm_up_and_report(*args: Any, **kwargs: Any) -> Any:
        result = warm_up(*args, **kwargs)
        if not journal.is_lasting:
            renew(_key(chosen), _folder())
        journal.close()
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
