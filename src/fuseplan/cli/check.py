"""`fuseplan check`: whether a workload still has the fusions that a lock names."""

import dataclasses
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from fuseplan.cli.console import Debug, Json, one_line_errors, say, show
from fuseplan.cli.request import (
    AllowRoundingChanges,
    Forbid,
    Force,
    Layers,
    ProviderNames,
    Ranges,
    Workload,
    check_selectors,
    compared,
    find_policies,
    find_providers,
    find_ranges,
    import_torch,
)
from fuseplan.cli.spelling import check_spelling

DEFAULT_DEVICE = "h200"
CONFIG = "config.json"


def check(
    workload: Workload,
    lock: Annotated[Path, typer.Option(metavar="FILE", help="The lock file, made to be committed.")],
    update: Annotated[bool, typer.Option("--update", help="Write the lock, and report what changed.")] = False,
    tp: Annotated[
        int | None,
        typer.Option(metavar="N", help="Ranks of tensor parallelism, up to 65536. Default: the lock's, or 1."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(metavar="NAME", help=f"A device profile. Default: the lock's, or {DEFAULT_DEVICE}.")
    ] = None,
    ranges: Ranges = None,
    policy: Annotated[
        str | None,
        typer.Option(metavar="POLICY", help="planned, off or ordered(RULE, ...). Default: the lock's, or planned."),
    ] = None,
    layers: Layers = None,
    force: Force = None,
    forbid: Forbid = None,
    provider: ProviderNames = None,
    allow_rounding_changes: AllowRoundingChanges = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Fail with exit status 1 where the fusions of WORKLOAD differ from those of a lock file. Settings come from the
    lock; options that contradict it need --update.
    """
    with one_line_errors(debug):
        check_spelling(
            workload, device=device, policies=[policy] if policy else None, providers=provider,
            selectors=[*(force or ()), *(forbid or ())], ranges=ranges,
        )  # fmt: skip
        import_torch()
        from fuseplan.config import PassConfig
        from fuseplan.integrations.locks import pinned
        from fuseplan.report import render_verdict, verdict_to_json

        pinned(PassConfig())
        check_selectors([*(force or ()), *(forbid or ())])
        asked: dict[str, Any] = {
            "tp": tp,
            "layers": layers,
            "device": device,
            "policy": str(find_policies([policy])[0]) if policy is not None else None,
            "ranges": tuple(map(_text, find_ranges(ranges))) if ranges else None,
            "force": _unordered(force),
            "forbid": _unordered(forbid),
            "providers": _unordered(provider),
            "allow_rounding_changes": allow_rounding_changes or None,
        }
        given = {name: value for name, value in asked.items() if value is not None}
        verdict = _check(workload, lock, given, update=update)
        if not as_json:
            for warning in verdict.warnings:
                say(f"warning: {'; '.join(filter(None, (warning.detail, warning.fix)))}")
        show(verdict_to_json(verdict) if as_json else render_verdict(verdict), as_json)
        if not verdict.passed:
            raise typer.Exit(1)


def _check(workload: str, path: Path, given: dict[str, Any], *, update: bool) -> Any:
    """The verdict on a lock.

    Args:
        workload: as the user named it.
        path: of the lock.
        given: settings from the command line.
        update: whether to write the lock.

    Raises:
        FuseplanError: the lock is missing or broken, is of another workload or contradicts `given`; or the settings
            can't be served.
    """
    from fuseplan.report.drift import drifts
    from fuseplan.report.lock import FusionLock, check_writable
    from fuseplan.report.text import warnings_of
    from fuseplan.report.verdict import Verdict

    name = _name_in_lock(workload, path)
    before = _read(path, update)
    settings, resettled = _settle(before, name, given, path, update)
    if update:
        check_writable(path)
    comparison = _ask(workload, settings, None if resettled or before is None else path)
    report = comparison.reports[0]
    after = FusionLock.of(settings, report)
    is_comparable = before is not None and before.settings.ranges == settings.ranges
    written = update and (before is None or before.text() != after.text())
    if written:
        after.save(path)
    return Verdict(
        path=str(path),
        lock=after if update or before is None else before,
        found=after,
        drifts=drifts(before, report) if before is not None and is_comparable else (),
        resettled=resettled,
        breaks=comparison.breaks,
        warnings=warnings_of(report),
        written=written,
        fix="where that is meant, the same command with --update pins it",
    )


def _read(path: Path, update: bool) -> Any:
    """The lock, None where it is to be written and isn't there yet."""
    from fuseplan.errors import LockError
    from fuseplan.report.lock import FusionLock

    try:
        return FusionLock.load(path)
    except LockError as error:
        if not isinstance(error.__cause__, OSError):
            raise LockError(f"{error}; fix it, or delete it and write it anew with --update") from None
        if isinstance(error.__cause__, IsADirectoryError):
            raise LockError(f"{error}; name a file, e.g. {str(path / 'fusions.lock')!r}") from None
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
        if update:
            return None
        raise LockError(f"there is no lock file {str(path)!r}; the same command with --update writes it") from None


def _settle(before: Any, name: str, given: dict[str, Any], path: Path, update: bool) -> tuple[Any, Any]:
    """The settings, and those that differ from the lock's.

    Raises:
        LockError: the command line contradicts the lock.
        ConfigError: it contradicts itself.
    """
    from fuseplan.errors import ConfigError, LockError
    from fuseplan.report.lock import LockSettings, contradiction

    try:
        if before is None:
            ranges = tuple(map(_text, find_ranges(None)))
            defaults = LockSettings(workload=name, device=DEFAULT_DEVICE, policy="planned", ranges=ranges, tp=1)
            return dataclasses.replace(defaults, **given), {}
        if not _is_of(before.settings.workload, name):
            pinned = before.settings.workload
            raise LockError(f"lock file {str(path)!r} is of workload {pinned[:80]!r}, not {name!r}; name another file")
        settings = dataclasses.replace(before.settings, **given)
    except LockError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from None
    changes = before.settings.changes(settings)
    if changes and not update:
        difference = contradiction(changes, "the command line")
        raise LockError(f"lock file {str(path)!r} {difference}; leave it out, or pin it with --update")
    return settings, changes


def _ask(workload: str, settings: Any, source: Path | None) -> Any:
    """The report of the settings' policy.

    Args:
        workload: as the user named it.
        settings: of the check.
        source: the lock, if all settings are from it; None where the user gave some.
    """
    from fuseplan.errors import ConfigError, LockError, PlanError
    from fuseplan.integrations.locks import config_of
    from fuseplan.providers import device_profile
    from fuseplan.record.text import one_line

    try:
        config, policies = config_of(settings), find_policies([settings.policy])
        device, providers = device_profile(settings.device), find_providers(settings.providers)
        return compared(
            workload, tp=settings.tp or 1, layers=settings.layers, ranges=config.compile_ranges,
            device=device, policies=policies, config=config, providers=providers,
        )  # fmt: skip
    except (ConfigError, LockError, PlanError) as error:
        raise (LockError(f"lock file {str(source)!r}: {one_line(error)}") if source else error) from None


def _name_in_lock(workload: str, lock: Path) -> str:
    """The name of a workload in a lock: a configuration by its path from the lock, so that both can move together. A
    folder means the configuration in it.
    """
    from fuseplan.workloads.catalog import path_of

    path = path_of(workload)
    if path is None:
        return workload
    file = path / CONFIG if path.is_dir() else path
    # The reader of the files reports links in a circle.
    return Path(os.path.relpath(os.path.realpath(file), Path(os.path.realpath(lock)).parent)).as_posix()


def _is_of(locked: str, name: str) -> bool:
    """Whether a lock is of a workload; older ones name the folder of a configuration."""
    path = Path(name)
    return locked == name or (path.name == CONFIG and locked == path.parent.as_posix())


def _text(compile_range: Any) -> str:
    from fuseplan.report.lock import span_text

    return span_text((compile_range.start, compile_range.end))


def _unordered(texts: list[str] | None) -> tuple[str, ...] | None:
    return tuple(sorted(set(texts))) if texts else None
