"""Drawn graphs as the page takes them: boxes with titles, and segments: layers, and the parts before and after them."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fuseplan.record import Box, Drawing
from fuseplan.report.html.tables import Table

_LAYER = re.compile(r"(?:.*?\.)?\d+(?=\.|$)")
_HEAVY = ("attention", "mm", "bmm", "conv", "embedding", "linear", "einsum", "index")
"""Parts of names of ops that say most about a box, before those that move or cast."""


@dataclass(frozen=True)
class Drawn:
    """A drawing, with look-ups of its boxes."""

    drawing: Drawing

    @cached_property
    def _by_node(self) -> Mapping[str, int]:
        return {name: index for index, box in enumerate(self.drawing.boxes) for name in (box.name, *box.members)}

    @cached_property
    def _by_source(self) -> Mapping[str, list[int]]:
        places: dict[str, list[int]] = {}
        for index, box in enumerate(self.drawing.boxes):
            if box.source:
                places.setdefault(box.source, []).append(index)
        return places

    def boxes_of(self, nodes: Iterable[str]) -> tuple[int, ...]:
        """The boxes that nodes lie in, ascending; nodes that aren't drawn are left out."""
        return tuple(sorted({found for name in nodes if (found := self._by_node.get(name)) is not None}))

    def box_near(self, nodes: Iterable[str], sources: Iterable[str | None], op: str | None) -> int | None:
        """The box of a record: that of its first drawn node, or else one of its module, with its op where there
        is one.
        """
        for name in nodes:
            if name in self._by_node:
                return self._by_node[name]
        for source in sources:
            places = self._by_source.get(source or "", ())
            for index in places:
                if self.drawing.boxes[index].op == op:
                    return index
            if places:
                return places[0]
        return None


def drawing_json(drawn: Drawn, strings: Table) -> dict[str, Any]:
    """A drawing: every box as a row, and the segments that they lie in."""
    boxes, segments = drawn.drawing.boxes, _segments(drawn.drawing.boxes)
    prefix = {index: str(segment["key"] or "") for segment in segments for index in segment["boxes"]}
    return {
        "name": drawn.drawing.graph,
        "segments": segments,
        "boxes": [_box(box, prefix[index], strings) for index, box in enumerate(boxes)],
    }


def _box(box: Box, layer: str, strings: Table) -> list[Any]:
    """[op, title, subtitle, [op, count, ...], members, inputs, source, line, value]; texts by index, -1 for none."""
    calls = sorted(box.ops.items(), key=lambda call: (_weight(call[0]), -call[1], call[0]))
    short = [f"{_short(name)} ×{count}" if count > 1 else _short(name) for name, count in calls]
    module = (box.source or "").removeprefix(layer).removeprefix(".")
    main = short[0] if short else box.name
    alone = box.op or (main if sum(box.ops.values()) == 1 else None)
    title, subtitle = (alone, module or main) if alone else (module or main, ", ".join(short[:3]))

    def text(value: str | None) -> int:
        return -1 if value is None else strings.add(value)

    return [
        text(box.op), text(title), text(subtitle), [part for name, count in calls for part in (text(name), count)],
        [text(name) for name in box.members], list(box.inputs), text(box.source), text(box.line), text(box.value),
    ]  # fmt: skip


def _weight(name: str) -> int:
    """0 for the ops that name a box best, 1 for other ops of torch, 2 for moves and casts."""
    space, short = name.partition(".")[0], _short(name)
    if space not in ("aten", "prims") and "<" not in name and "wait" not in short:
        return 0
    if any(part in short for part in _HEAVY):
        return 0
    moves = ("view", "reshape", "permute", "expand", "slice", "squeeze", "split", "cat", "full", "convert", "getitem")
    return 2 if any(part in short for part in moves) or "wait" in short else 1


def _short(name: str) -> str:
    """`aten.mm.default` -> `mm`, `<built-in function getitem>` -> `getitem`."""
    if name.startswith("<"):
        return name.strip("<>").rpartition(" ")[2]
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else name


def _segments(boxes: tuple[Box, ...]) -> list[dict[str, Any]]:
    """Layers in order of first use. A box outside layers goes with the box before it; those before the first layer and
    after the last are segments of their own.
    """
    keys = [found[0] if box.source and (found := _LAYER.match(box.source)) else None for box in boxes]
    last = max((index for index, key in enumerate(keys) if key is not None), default=-1)
    rows: dict[tuple[str | None, bool], dict[str, Any]] = {}
    current: tuple[str | None, bool] = (None, False)
    for index, key in enumerate(keys):
        if key is not None:
            current = (key, False)
        elif index > last:
            current = (None, last >= 0)
        row = rows.setdefault(current, {"key": current[0], "number": _number(current[0]), "boxes": []})
        row["boxes"].append(index)
    for (key, _), row in rows.items():
        row["name"] = key or (_names([boxes[index] for index in row["boxes"]]) if last >= 0 else "all of it")
    return list(rows.values())


def _number(key: str | None) -> int | None:
    return int(key.rpartition(".")[2]) if key else None


def _names(boxes: list[Box]) -> str:
    sources = dict.fromkeys(box.source.split(".")[0] for box in boxes if box.source)
    return ", ".join(list(sources)[:3]) or boxes[0].name
