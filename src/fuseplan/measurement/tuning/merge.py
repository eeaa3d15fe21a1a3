"""Merging rows into a cost table that others may be writing to as well."""

from collections.abc import Iterable
from pathlib import Path

from filelock import FileLock, Timeout

from fuseplan.errors import ConfigError
from fuseplan.planner.costs import CostTable, Row
from fuseplan.record.files import writing

PATIENCE_S = 60.0
"""Seconds to wait for other writers: reading and writing a table takes a few milliseconds."""


def merge_into(path: Path, device: str, rows: Iterable[Row], *, replace_broken: bool = False) -> CostTable:
    """Reads the table in a file, puts `rows` in, each in the place of the row of its key and tokens, and writes it.

    Concurrent processes take turns, by a lock on a file beside it, and none loses another one's rows.

    Args:
        path: of the file, which need not be there.
        device: the table's device.
        rows: of that device.
        replace_broken: whether a broken file is replaced.

    Returns:
        The written table.

    Raises:
        ConfigError: the table there is broken or of another device, and is left as it is; the file can't be written;
            or another process has held the lock all the time.
    """
    target = path.resolve()
    with writing("cost table", path, ConfigError):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(target.with_name(f".{target.name}.lock"), timeout=PATIENCE_S):
                table = table_in(path, device, replace_broken=replace_broken).updated(rows)
                table.save(path)
                return table
        except Timeout:
            raise ConfigError(
                f"cost table {str(path)!r}: another process has held its lock for {PATIENCE_S:g} s; try again, or name "
                "another file"
            ) from None


def table_in(path: Path, device: str, *, replace_broken: bool = False) -> CostTable:
    """The table in a file, an empty one where there is no such file.

    Raises:
        ConfigError: it is broken or of another device.
    """
    try:
        return CostTable.load(path, device=device)
    except ConfigError as error:
        if replace_broken or isinstance(error.__cause__, FileNotFoundError):
            return CostTable(device=device)
        raise
