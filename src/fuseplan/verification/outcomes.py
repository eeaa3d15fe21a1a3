"""Outcomes by content, beside Inductor's own cache: what was checked once with this kernel on this hardware."""

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch._inductor.runtime.cache_dir_utils import cache_dir

from fuseplan.fingerprint import fingerprint, provider_key, rule_key
from fuseplan.providers import DeviceProfile, Provider
from fuseplan.record import Verification, from_json, to_json
from fuseplan.record.files import read_bytes, remove_abandoned, write_whole
from fuseplan.record.parsing import parse_json
from fuseplan.rules import Rule
from fuseplan.verification.region import Region
from fuseplan.verification.specs import Case, TensorSpec

LARGEST_BYTES = 2**16


def outcome_key(
    rule: Rule,
    provider: Provider,
    device: DeviceProfile | None,
    cases: Sequence[Case],
    unfused: Mapping[str, Any],
    region: Region | None,
) -> str:
    """A hash of all that an outcome depends on: both sides of the rule, the kernel, arguments, versions, hardware."""
    devices = {spec.device for case in cases for spec in case.arguments.values() if isinstance(spec, TensorSpec)}
    return fingerprint(
        rule=rule_key(rule),
        provider=provider_key(provider, device),
        error_factor=rule.op.error_factor,
        cases=[[case.tokens, _texts(case)] for case in cases],
        unfused=dict(unfused),
        region=region.text(cases[-1].symbols) if region else None,
        hardware=sorted(_hardware(each) for each in devices),
    )


def _texts(case: Case) -> list[list[str]]:
    """Process groups differ in name, not in what is computed."""
    return [[name, str(value)] for name, value in case.arguments.items() if name != "group_name"]


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name} {properties.major}.{properties.minor} {properties.total_memory}"
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def load(key: str) -> Verification | None:
    """A stored outcome, or None where there is none that can be read."""
    try:
        content = read_bytes(_path(key), LARGEST_BYTES)
        return from_json(Verification, parse_json(content, most_bytes=LARGEST_BYTES))
    except (OSError, ValueError):
        return None


def save(key: str, outcome: Verification) -> None:
    """Stores an outcome; a cache that can't be written to is no reason to fail a compilation."""
    path = _path(key)
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(path.parent)
        write_whole(path, json.dumps(to_json(outcome)))


def _path(key: str) -> Path:
    return Path(cache_dir()) / "fuseplan" / "verified" / f"{key}.json"


def seed_of(key: str) -> int:
    """The same on every rank and in every process."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:6], "big")
