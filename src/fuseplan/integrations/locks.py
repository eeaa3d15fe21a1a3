"""A configuration as the settings of a lock, and back. Fields that a lock can't pin are refused by name."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from fuseplan.config import FUSION_FLAGS, CompileRange, Environment, PassConfig
from fuseplan.errors import ConfigError, LockError
from fuseplan.report.lock import MODELLED, LockSettings, span_text

FLAGS = (*FUSION_FLAGS, "eliminate_noops")
LIMITS = ("max_fusions", "node_budget")


def pinned(config: PassConfig) -> PassConfig:
    """The configuration with modelled costs, which are the same on every machine.

    Raises:
        ConfigError: it asks for other costs, or `FUSEPLAN=0` switches every fusion off.
    """
    if not Environment.read().enabled:
        raise ConfigError("FUSEPLAN=0 switches every fusion off, so there is nothing to check; unset FUSEPLAN")
    if config.cost_table is not None:
        raise ConfigError(f"cost_table={str(config.cost_table)!r}: locks use the cost model's prices; leave it out")
    if config.costs not in ("auto", MODELLED):
        raise ConfigError(f"costs={config.costs!r}: locks use the cost model's prices; leave it out")
    return dataclasses.replace(config, costs=MODELLED)


def settings_of(config: PassConfig, *, workload: str, device: str) -> LockSettings:
    """The lock settings of a configuration, without the order of fields that have none.

    Raises:
        ConfigError: it asks for something that a lock can't pin.
    """
    config = pinned(config)
    if config.plan is not None:
        raise ConfigError(f"plan={str(config.plan)!r}: a lock makes its own plan; leave it out")
    defaults = PassConfig()

    def changed(names: Sequence[str]) -> dict[str, int]:
        values = {name: getattr(config, name) for name in names}
        return {name: value for name, value in values.items() if value != getattr(defaults, name)}

    return LockSettings(
        workload=workload,
        device=device,
        policy=str(config.chosen_policy),
        ranges=tuple(span_text((each.start, each.end)) for each in config.compile_ranges),
        force=tuple(sorted(set(config.force))),
        forbid=tuple(sorted(set(config.forbid))),
        allow_rounding_changes=config.allow_rounding_changes,
        flags={name: bool(value) for name, value in changed(FLAGS).items()},
        limits=changed(LIMITS),
    )


def config_of(settings: LockSettings) -> PassConfig:
    """The configuration with a lock's settings.

    Raises:
        LockError: the lock asks for something that doesn't exist.
    """
    for kind, names in (("flags", FLAGS), ("limits", LIMITS)):
        for name in getattr(settings, kind):
            if name not in names:
                raise LockError(f"settings.{kind}: unknown name {name[:80]!r}; allowed: {', '.join(names)}")
    further: dict[str, Any] = {**settings.flags, **settings.limits}
    return PassConfig(
        policy=settings.policy,
        compile_ranges=tuple(CompileRange(start=span[0], end=span[1]) for span in settings.spans if span),
        force=settings.force,
        forbid=settings.forbid,
        costs=settings.costs,
        allow_rounding_changes=settings.allow_rounding_changes,
        **further,
    )
