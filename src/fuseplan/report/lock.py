"""A fusion lock: the fusions of a model, and the settings to check later whether it still has them.

It pins a device profile, modelled costs and a policy, and names places by module path, so that it is the same on every
machine. It is made to be committed and read in diffs: a fusion lost in layer 7 turns `layers.0-35.norm` into
`layers.0-6,8-35.norm`. It leaves out rules that match and aren't applied: they promise nothing, and every new rule or
provider would change them.
"""

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from fuseplan.errors import LockError
from fuseplan.record import Fusion, Report, files, from_json, to_json
from fuseplan.record.parsing import parse_object
from fuseplan.record.report import MOST_LAYERS, MOST_RANKS
from fuseplan.record.text import one_line
from fuseplan.report.places import MOST_PLACES, fold, module_of, unfold

SCHEMA = 1
LARGEST_BYTES = 2**20
MOST_ENTRIES = 1000
"""The most entries of a list of settings; each is checked at every match or graph."""
MODELLED = "modelled"
ANY_SIZE = "any size"
"""The range of graphs that serve every number of tokens."""

Span = tuple[int, int] | None
"""A compile range: its first and last number of tokens; None where they aren't limited."""


class Applied(NamedTuple):
    """The kernel applied at a place."""

    rule: str
    op: str
    provider: str

    @classmethod
    def of(cls, fusion: Fusion) -> "Applied":
        """The kernel of a fusion."""
        return cls(fusion.rule, fusion.op, fusion.provider)

    @classmethod
    def parse(cls, text: str) -> "Applied":
        """The inverse of `str`.

        Raises:
            ValueError: these aren't three words.
        """
        words = text.split(" ")
        if len(words) != 3 or not all(words):
            raise ValueError(f"{text[:80]!r} isn't of the form RULE OP PROVIDER")
        return cls(*words)

    def __str__(self) -> str:
        return " ".join(self)


Placed = Counter[tuple[Applied, str | None]]
"""How often each kernel is applied at each module path; None: at places without one."""


@dataclass(frozen=True, kw_only=True)
class LockSettings:
    """The settings that a lock's fusions are valid for.

    Attributes:
        workload: its name; a configuration by its path from the lock's folder.
        device: the profile whose providers are assumed present and whose costs are modelled.
        policy: as on the command line.
        ranges: compile ranges, ascending, e.g. `1:64`; empty: one graph serves every size.
        tp: ranks of tensor parallelism, up to `MOST_RANKS`; None where the caller made the model.
        layers: another number of layers than the model's own, up to `MOST_LAYERS`.
        costs: where prices come from; nothing but the model is the same on every machine.
        providers: those that may run fused ops; empty: all.
        force: selectors of fusions to apply.
        forbid: selectors of fusions not to apply.
        allow_rounding_changes: whether kernels may round elsewhere than the graph.
        flags: of `PassConfig`, where they aren't the defaults.
        limits: of `PassConfig`, where they aren't the defaults.
    """

    workload: str
    device: str
    policy: str
    ranges: tuple[str, ...] = ()
    tp: int | None = None
    layers: int | None = None
    costs: str = MODELLED
    providers: tuple[str, ...] = ()
    force: tuple[str, ...] = ()
    forbid: tuple[str, ...] = ()
    allow_rounding_changes: bool = False
    flags: Mapping[str, bool] = field(default_factory=dict)
    limits: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.costs != MODELLED:
            raise ValueError(f"costs are {self.costs[:40]!r}, and a lock pins {MODELLED} ones")
        for name in ("tp", "layers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: allowed are integers of at least 1")
        if self.tp is not None and self.tp > MOST_RANKS:
            raise ValueError(f"tp={self.tp}: allowed are at most {MOST_RANKS} ranks")
        if self.layers is not None and self.layers > MOST_LAYERS:
            raise ValueError(f"layers={self.layers}: allowed are at most {MOST_LAYERS}")
        for name in ("ranges", "providers", "force", "forbid"):
            if len(getattr(self, name)) > MOST_ENTRIES:
                raise ValueError(f"{name} has {len(getattr(self, name))} entries; allowed are at most {MOST_ENTRIES}")
        last = 0
        for text in self.ranges:
            span = parse_span(text)
            if span is None or span[0] <= last or span[1] < span[0]:
                raise ValueError(f"ranges {', '.join(self.ranges)[:80]!r} overlap or don't ascend")
            last = span[1]

    @property
    def spans(self) -> tuple[Span, ...]:
        """The compile ranges."""
        return tuple(map(parse_span, self.ranges)) or (None,)

    def changes(self, other: "LockSettings") -> dict[str, tuple[str, str]]:
        """Differences to other settings, by name: the text here and there."""
        return {
            each.name: (setting_text(mine, each.name), setting_text(theirs, each.name))
            for each in dataclasses.fields(self)
            if (mine := getattr(self, each.name)) != (theirs := getattr(other, each.name))
        }


@dataclass(frozen=True, kw_only=True)
class FusionLock:
    """The fusions of a model.

    Attributes:
        settings: of the check.
        fusions: for each set of ranges with the same fusions, `RULE OP PROVIDER` with its folded places.
        schema: of the file.

    Raises:
        ValueError: parts of it contradict each other.
    """

    settings: LockSettings
    fusions: Mapping[str, Mapping[str, tuple[str, ...]]]
    schema: int = field(default=SCHEMA)

    def __post_init__(self) -> None:
        there, wanted = set(self.placed), set(self.settings.spans)
        for spans, what in ((there - wanted, "fusions are for"), (wanted - there, "no fusions are for")):
            if spans:
                raise ValueError(f"{what} range {span_text(min(spans, key=str))}, and the ranges are {self._ranges}")

    @property
    def _ranges(self) -> str:
        return ", ".join(map(span_text, self.settings.spans))

    @classmethod
    def of(cls, settings: LockSettings, report: Report) -> "FusionLock":
        """The fusions of a report.

        Args:
            settings: of the check.
            report: the answer.
        """
        same: dict[frozenset[tuple[Any, int]], list[Span]] = {}
        placed = {span: placed_in(report, span) for span in settings.spans}
        for span, counts in placed.items():
            same.setdefault(frozenset(counts.items()), []).append(span)
        return cls(
            settings=settings,
            fusions={", ".join(map(span_text, spans)): _folded(placed[spans[0]]) for spans in same.values()},
        )

    @cached_property
    def placed(self) -> Mapping[Span, Placed]:
        """The applied kernels by place, by range, in their order.

        Raises:
            ValueError: a range is there twice, a line can't be read, or there are too many places.
        """
        result: dict[Span, Placed] = {}
        left = MOST_PLACES
        for key, kernels in self.fusions.items():
            spans = [parse_span(text) for text in key.split(", ")]
            counts = Placed()
            for text, lines in kernels.items():
                kernel = Applied.parse(text)
                found = unfold(lines, left)
                left -= found.total() * len(spans)
                if left < 0:
                    raise ValueError(f"fusions are at more than {MOST_PLACES} places")
                counts.update({(kernel, place): count for place, count in found.items()})
            for span in spans:
                if span in result:
                    raise ValueError(f"fusions of range {span_text(span)} are there twice")
                result[span] = counts
        return dict(sorted(result.items(), key=lambda item: item[0] or (0, 0)))

    @property
    def fused(self) -> dict[str, int]:
        """Fusions by rule, over all ranges, as `Report.fused` counts them, zeros left out."""
        return self.fused_in(*self.placed)

    def fused_in(self, *spans: Span) -> dict[str, int]:
        """`fused` in some of the ranges."""
        counts: Counter[str] = Counter()
        for (kernel, _), count in (item for span in spans for item in self.placed[span].items()):
            counts[kernel.rule] += count
        return dict(sorted(counts.items()))

    def text(self) -> str:
        """The content of the file: sorted, ranges by their numbers, without unset settings."""
        given = {name: value for name, value in to_json(self.settings).items() if value not in (None, False, [], {})}
        # As text 513:8192 comes before 65:512.
        in_order = sorted(self.fusions.items(), key=lambda item: parse_span(item[0].split(", ")[0]) or (0, 0))
        fusions = {spans: _sorted(to_json(kernels)) for spans, kernels in in_order}
        content = {"fusions": fusions, "schema": self.schema, "settings": _sorted(given)}
        return json.dumps(content, indent=1) + "\n"

    def save(self, path: Path) -> None:
        """Writes the file: the whole of it or, where that fails, nothing.

        Raises:
            LockError: it can't be written.
        """
        with files.writing("lock file", path, LockError):
            files.write_whole(path, self.text())

    @classmethod
    def load(cls, path: Path) -> "FusionLock":
        """Reads a file that `save` wrote.

        Raises:
            LockError: there is none, it isn't one of this schema, or parts of it contradict each other.
        """
        with files.reading("lock file", path, LockError):
            content = files.read_bytes(path, LARGEST_BYTES)
            return from_json(cls, parse_object(content, most_bytes=LARGEST_BYTES, schema=SCHEMA))


def check_writable(path: Path) -> None:
    """Finds out early that a lock can't be written.

    Raises:
        LockError: the text says why.
    """
    with files.writing("lock file", path, LockError):
        files.check_writable(path)


def placed_in(report: Report, span: Span) -> Placed:
    """The kernels that a report applies in one range, over all of its graphs."""
    return Placed(
        (Applied.of(fusion), module_of(fusion.source))
        for graph in report.graphs
        if graph.range == span
        for fusion in graph.applied
    )


def _sorted(value: Any) -> Any:
    """Objects with their names in order, at every depth."""
    return {name: _sorted(each) for name, each in sorted(value.items())} if isinstance(value, dict) else value


def _folded(placed: Placed) -> dict[str, tuple[str, ...]]:
    counts: dict[Applied, dict[str | None, int]] = {}
    for (kernel, place), count in placed.items():
        counts.setdefault(kernel, {})[place] = count
    return {str(kernel): fold(counts[kernel]) for kernel in sorted(counts)}


def span_text(span: Span) -> str:
    """A range as it is written in a lock: `1:64`, or `8` for one size alone."""
    if span is None:
        return ANY_SIZE
    return str(span[0]) if span[0] == span[1] else f"{span[0]}:{span[1]}"


def parse_span(text: str) -> Span:
    """The inverse of `span_text`.

    Raises:
        ValueError: it isn't of that form.
    """
    if text == ANY_SIZE:
        return None
    match = re.fullmatch(r"([1-9][0-9]{0,17})(?::([1-9][0-9]{0,17}))?", text)
    if match is None:
        raise ValueError(f"range {text[:80]!r} isn't of the form FIRST:LAST, e.g. 1:64")
    return int(match[1]), int(match[2] or match[1])


def contradiction(changes: Mapping[str, tuple[str, str]], other: str) -> str:
    """The contradictions of a lock, as the end of a sentence.

    Args:
        changes: as `LockSettings.changes` yields them.
        other: the source of the other settings.
    """
    pinned, said = (
        " and ".join(f"{name}={one_line(texts[side])}" for name, texts in changes.items()) for side in (0, 1)
    )
    return f"pins {pinned}, and {other} says {said}"


def setting_text(value: object, name: str = "") -> str:
    """A setting for a person.

    Args:
        value: of the setting.
        name: of the setting; no providers are all of them.
    """
    empty = "all" if name == "providers" else "none"
    if isinstance(value, Mapping):
        return ", ".join(f"{each}={texts}" for each, texts in sorted(value.items())) or empty
    if isinstance(value, Iterable) and not isinstance(value, str):
        return ", ".join(str(each) or "''" for each in value) or empty
    return empty if value is None else str(value)
