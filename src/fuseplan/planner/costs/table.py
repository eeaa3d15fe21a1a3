"""Cost tables: times of alternatives, with where each came from, as JSON that can be committed and shared."""

import bisect
import datetime
import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any

from fuseplan.errors import ConfigError
from fuseplan.record import from_json, to_json
from fuseplan.record.files import read_bytes, reading, write_whole, writing
from fuseplan.record.parsing import parse_object

SCHEMA = 1
LARGEST_BYTES = 16 * 2**20
LARGEST_NS = 3_600_000_000_000
"""An hour: no region of a graph takes longer, so more is a mistake of units."""


class Provenance(StrEnum):
    """How a time is known.

    `declared` times come from the owner: `cost=` of a provider or `saving_us` of a pass. `assumed` ones are neither
    declared nor measured: the fusion is taken to save launches.
    """

    MEASURED = "measured"
    MODELLED = "modelled"
    DECLARED = "declared"
    ASSUMED = "assumed"


@dataclass(frozen=True, kw_only=True)
class Row:
    """The time of one alternative at one size.

    Attributes:
        key: the component class and the alternative.
        tokens: rows of the activations.
        time_ns: the median.
        spread_ns: the interquartile range, 0 where modelled.
        provenance: whether it was measured or modelled.
        device: the profile's name.
        torch: torch's version, empty where it doesn't matter.
        triton: triton's version, or empty.
        topology: ranks and links, e.g. `tp2 nvlink`.
        date: ISO 8601.
        command: the one that was run.
    """

    key: str
    tokens: int
    time_ns: int
    spread_ns: int
    provenance: Provenance
    device: str
    torch: str
    triton: str
    topology: str
    date: str
    command: str

    @property
    def component(self) -> str:
        """The component class of its key."""
        return self.key.partition(": ")[0]

    def __post_init__(self) -> None:
        where = f"row {self.key[:80]!r} at {self.tokens} tokens"
        _require(bool(self.key), "a row has no key")
        _require(self.tokens >= 1, f"{where}: tokens must be at least 1")
        kinds = (Provenance.MEASURED, Provenance.MODELLED)
        _require(self.provenance in kinds, f"{where}: a table has {' and '.join(kinds)} times, not {self.provenance}")
        for name, value in (("time_ns", self.time_ns), ("spread_ns", self.spread_ns)):
            _require(0 <= value <= LARGEST_NS, f"{where}: {name} must be between 0 and {LARGEST_NS}, not {value}")
        try:
            datetime.date.fromisoformat(self.date)
        except ValueError:
            raise ConfigError(f"{where}: date {self.date[:40]!r} isn't an ISO 8601 date") from None


MEDIAN_OF_FIVE = 1.2533 / (1.349 * 5**0.5)
"""The standard deviation of the median of five repeats, the fewest that there are, beside their interquartile range."""
BENT, STEPPED = 0.2, 0.06
"""How far times between two sizes are off the line: as a share of the difference of both ends, in the middle between
them, and as a share of the time, since kernels change with the size. Fitted on 561 rows of `benchmarks/results`
(regions, kernels and tables of H100 and H200) between two others; see `benchmarks/leave_one_out.py`.
"""


@dataclass(frozen=True, kw_only=True)
class CostTable:
    """Times of alternatives on one device, one a key and size; the order of rows means nothing.

    Raises:
        ConfigError: two rows share key and tokens, or one is of another device.
    """

    device: str
    rows: tuple[Row, ...] = field(default=())

    def __post_init__(self) -> None:
        seen: set[tuple[str, int]] = set()
        for row in self.rows:
            where = f"row {row.key[:80]!r} at {row.tokens} tokens"
            _require(row.device == self.device, f"{where} is of {row.device[:40]!r}, the table of {self.device[:40]!r}")
            _require((row.key, row.tokens) not in seen, f"{where} occurs twice")
            seen.add((row.key, row.tokens))

    @cached_property
    def _by_key(self) -> dict[tuple[str, int], Row]:
        return {(row.key, row.tokens): row for row in self.rows}

    def lookup(self, key: str, tokens: int) -> Row | None:
        """The row of an alternative at a size, None where there is none."""
        return self._by_key.get((key, tokens))

    def interpolate(self, key: str, tokens: int) -> tuple[int, int] | None:
        """(time, spread) in ns of an alternative at a size: its row, or on the line between its neighbours' rows, with
        the larger spread of the two; None outside the measured sizes.
        """
        rows = self.neighbours(key, tokens)
        if len(rows) < 2:
            return (rows[0].time_ns, rows[0].spread_ns) if rows else None
        left, right = rows
        share = (tokens - left.tokens) / (right.tokens - left.tokens)
        time_ns = round(left.time_ns + share * (right.time_ns - left.time_ns))
        return time_ns, max(left.spread_ns, right.spread_ns)

    def deviation(self, key: str, tokens: int) -> float:
        """The standard deviation of `interpolate`, in ns: that of a median of repeats, and between two rows the error
        of the line, too.
        """
        rows = self.neighbours(key, tokens)
        noise = MEDIAN_OF_FIVE * max(row.spread_ns for row in rows)
        if len(rows) < 2:
            return noise
        left, right = rows
        share = (tokens - left.tokens) / (right.tokens - left.tokens)
        bend = BENT * 4 * share * (1 - share) * abs(right.time_ns - left.time_ns)
        step = STEPPED * (left.time_ns + share * (right.time_ns - left.time_ns))
        return math.hypot(noise, bend, step)

    def neighbours(self, key: str, tokens: int) -> tuple[Row, ...]:
        """The rows that `interpolate` reads: one of that size, or one on either side."""
        rows = self._curves.get(key, ())
        at = bisect.bisect_left(rows, tokens, key=lambda row: row.tokens)
        if at < len(rows) and rows[at].tokens == tokens:
            return (rows[at],)
        return tuple(rows[at - 1 : at + 1]) if 0 < at < len(rows) else ()

    @cached_property
    def _curves(self) -> dict[str, list[Row]]:
        curves: dict[str, list[Row]] = {}
        for row in sorted(self.rows, key=lambda row: (row.key, row.tokens)):
            curves.setdefault(row.key, []).append(row)
        return curves

    def updated(self, rows: Iterable[Row]) -> "CostTable":
        """The same table with `rows` added, each replacing a row with the same key and tokens."""
        merged = {**self._by_key, **{(row.key, row.tokens): row for row in rows}}
        return CostTable(device=self.device, rows=tuple(merged[name] for name in sorted(merged)))

    def before(self, other: "CostTable") -> "CostTable":
        """The same table with the rows of `other` for components that it lacks: times compared with each other are from
        one machine.
        """
        known = {row.component for row in self.rows}
        return self.updated(row for row in other.rows if row.component not in known)

    @cached_property
    def digest(self) -> str:
        """sha256 of the content, whatever the order of rows or the layout of the file."""
        return hashlib.sha256(json.dumps(self._content(), sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def _content(self) -> dict[str, Any]:
        rows = sorted(self.rows, key=lambda row: (row.key, row.tokens))
        return {"schema": SCHEMA, "device": self.device, "rows": [to_json(row) for row in rows]}

    def save(self, path: Path) -> None:
        """Writes the table as JSON: the whole of it or, where that fails, nothing.

        Raises:
            ConfigError: the file can't be written.
        """
        with writing("cost table", path, ConfigError):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps(self._content(), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path, *, device: str | None = None) -> "CostTable":
        """Reads a table.

        Args:
            path: of the JSON file.
            device: the only device whose table will do; None takes any.

        Raises:
            ConfigError: there is no such file, or it isn't a sound table of this schema and of that device.
        """
        with reading("cost table", path, ConfigError):
            return cls._decode(read_bytes(path, LARGEST_BYTES), device)

    @classmethod
    def parse(cls, content: bytes, *, name: str = "", device: str | None = None) -> "CostTable":
        """Reads a table from the bytes of its file.

        Args:
            content: JSON in UTF-8.
            name: of the file, for errors.
            device: as for `load`.

        Raises:
            ConfigError: it isn't a sound table of this schema and of that device; the text is one line.
        """
        with reading("cost table", name, ConfigError):
            return cls._decode(content, device)

    @classmethod
    def _decode(cls, content: bytes, device: str | None) -> "CostTable":
        data = parse_object(content, most_bytes=LARGEST_BYTES, schema=SCHEMA)
        del data["schema"]
        _require("rows" in data, "it has no rows")
        table = from_json(cls, data)
        _require(device in (None, table.device), f"it is of {table.device[:40]!r}, not of {device!r}")
        return table


def _require(condition: bool, text: str) -> None:
    if not condition:
        raise ConfigError(text)
