"""Constants of a device that were measured on this machine (`fuseplan tune --device-only`), beside Inductor's cache."""

import datetime
import json
import logging
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch._logging._internal import warning_once

from fuseplan.devices.hardware import Constant, Hardware
from fuseplan.errors import ConfigError
from fuseplan.record import from_json, to_json
from fuseplan.record.files import read_bytes, reading, write_whole, writing
from fuseplan.record.parsing import parse_object

log = logging.getLogger("fuseplan")
SCHEMA = 1
LARGEST_BYTES = 2**16
MEASURABLE = {"launch": "ns", "cache_bandwidth": "GB/s", "memory_bandwidth": "GB/s"}
"""The constants that a record has, with their units."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One constant.

    Attributes:
        name: of `MEASURABLE`.
        value: the median of several repeats.
        unit: `ns` or `GB/s`.
        spread: the interquartile range, in the same unit.
    """

    name: str
    value: float
    unit: str
    spread: float

    def __post_init__(self) -> None:
        if MEASURABLE.get(self.name) != self.unit:
            raise ConfigError(f"constant {self.name[:40]!r} in {self.unit[:40]!r} is none that is measured")
        if not (0 < self.value < math.inf and 0 <= self.spread < math.inf):
            raise ConfigError(f"{self.name} is {self.value} with a spread of {self.spread}, which can't be")


@dataclass(frozen=True, kw_only=True)
class DeviceRecord:
    """Measurements of one device.

    Attributes:
        device: the profile's name.
        reported: torch's name of it.
        torch: torch's version.
        date: ISO 8601.
        command: the one that was run.
        constants: in order of name.
    """

    device: str
    reported: str
    torch: str
    date: str
    command: str
    constants: tuple[Measured, ...]

    def __post_init__(self) -> None:
        try:
            datetime.date.fromisoformat(self.date)
        except ValueError:
            raise ConfigError(f"date {self.date[:40]!r} isn't an ISO 8601 date") from None

    def applied(self, hardware: Hardware) -> Hardware:
        """The constants of the device, replaced by measured ones where there are any."""
        source = f"measured on {self.reported} by {self.command}, torch {self.torch}, {self.date}"
        measured: dict[str, Any] = {
            each.name: Constant(round(each.value, 1), each.unit, source) for each in self.constants
        }
        return replace(hardware, **measured)

    def save(self, path: Path) -> None:
        """Writes it as JSON: the whole of it or, where that fails, nothing.

        Raises:
            ConfigError: the file can't be written.
        """
        with writing("device record", path, ConfigError):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps({"schema": SCHEMA, **to_json(self)}, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path, device: str) -> "DeviceRecord":
        """Reads one.

        Raises:
            ConfigError: there is none, or it isn't a sound record of that device.
        """
        with reading("device record", path, ConfigError):
            data: dict[str, Any] = parse_object(
                read_bytes(path, LARGEST_BYTES), most_bytes=LARGEST_BYTES, schema=SCHEMA
            )
            del data["schema"]
            record = from_json(cls, data)
            if record.device != device:
                raise ConfigError(f"it is of {record.device[:40]!r}, not of {device!r}")
            return record


def record_path(device: str) -> Path:
    """Where the record of a device is, if there is one."""
    return Path(cache_dir()) / "fuseplan" / "devices" / f"{device}.json"


def cached_record(device: str) -> DeviceRecord | None:
    """The record of a device. None where it is missing, or broken, which is logged."""
    path = record_path(device)
    try:
        return DeviceRecord.load(path, device)
    except ConfigError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            warning_once(log, "the device's measurements are ignored: %s; delete them and tune again", error)
        return None
