"""Outcomes by content, beside Inductor's own cache: a kernel is checked once on each kind of hardware."""

import hashlib
import platform
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._inductor.runtime.cache_dir_utils import cache_dir

from fuseplan.caching.fingerprint import fingerprint, provider_content, rule_content
from fuseplan.providers import DeviceProfile, Provider
from fuseplan.record import Verification
from fuseplan.record.stored import load_stored, store
from fuseplan.rules import Rule
from fuseplan.verification.region import MatchedRegion
from fuseplan.verification.specs import Case, TensorSpec

LARGEST_BYTES = 2**16


@dataclass(frozen=True)
class Kind:
    """The dependencies of all outcomes of a rule by a provider: both sides, the kernel, and its tolerance.

    Attributes:
        ingredients: ingredients of a key.
        is_known: whether a key is possible. A user's functions without a `uuid()` are checked anew each time.
    """

    ingredients: list[Any]
    is_known: bool


def kind_of(rule: Rule, provider: Provider, device: DeviceProfile | None) -> Kind:
    """The kind of a rule by a provider."""
    contents = rule_content(rule), provider_content(provider, device)
    keys = [each.key for each in contents]
    return Kind([*(each.digest for each in contents), *keys, rule.op.error_factor], None not in keys)


def outcome_key(
    kind: Kind, cases: Sequence[Case], unfused: Mapping[str, Any], region: MatchedRegion | None, free: Collection[int]
) -> str:
    """A hash of everything that an outcome depends on: the kind, arguments, the graph, the layouts that it reads,
    versions, hardware.
    """
    devices = {spec.device for case in cases for spec in case.arguments.values() if isinstance(spec, TensorSpec)}
    return fingerprint(
        kind=kind.ingredients,
        cases=[[case.tokens, _texts(case)] for case in cases],
        unfused=dict(unfused),
        region=region.text(cases[-1].symbols) if region else None,
        free=sorted(free),
        hardware=sorted(hardware_text(each) for each in devices),
    )


def _texts(case: Case) -> list[list[str]]:
    """The arguments without group names: these differ, with the same results."""
    return [[name, str(value)] for name, value in case.arguments.items() if name != "group_name"]


def hardware_text(device: torch.device) -> str:
    """The text of a device in keys: devices with the same text run kernels alike."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name} {properties.major}.{properties.minor} {properties.total_memory}"
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def load(key: str) -> Verification | None:
    """A stored outcome, or None if there is none or it can't be read."""
    return load_stored(Verification, _path(key), LARGEST_BYTES)


def save(key: str, outcome: Verification) -> None:
    """Stores an outcome; a read-only cache must not fail a compilation."""
    with suppress(OSError):
        store(_path(key), outcome)


def _path(key: str) -> Path:
    return Path(cache_dir()) / "fuseplan" / "verified" / f"{key}.json"


def seed_of(key: str) -> int:
    """A seed that is the same on every rank and in every process."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:6], "big")
