"""Records beside a compile cache, a file each; an unreadable one counts as absent."""

import json
from pathlib import Path
from typing import TypeVar

from fuseplan.record.files import read_bytes, remove_abandoned, write_whole
from fuseplan.record.parsing import parse_json
from fuseplan.record.serialization import from_json, to_json

T = TypeVar("T")


def load_stored(kind: type[T], path: Path, most_bytes: int) -> T | None:
    """The record in a file, or None where there is none that can be read."""
    try:
        return from_json(kind, parse_json(read_bytes(path, most_bytes), most_bytes=most_bytes))
    except (OSError, ValueError):
        return None


def store(path: Path, record: object) -> None:
    """Writes a record to a file, in a folder that need not be there yet.

    Raises:
        OSError: it can't be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(path.parent)
    write_whole(path, json.dumps(to_json(record)))
