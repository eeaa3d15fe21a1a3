"""Reading files that others wrote, within bounds, and writing files: the whole of one, or nothing."""

import contextlib
import errno
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fuseplan.record.text import one_line

ABANDONED_S = 3600
"""Seconds after which a temporary file was left by a killed process: writing one takes a few."""


def read_bytes(path: Path, most_bytes: int) -> bytes:
    """The content of a file.

    Raises:
        OSError: it can't be read, or is a folder, a pipe or a device, which may have no end or make its reader wait.
        ValueError: it has more than `most_bytes`.
    """
    # Opening a pipe would wait for its writer.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise _error(errno.EISDIR, path)
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "It is a pipe, socket or device, not a file", str(path))
        with open(descriptor, "rb", closefd=False) as file:
            content = file.read(most_bytes + 1)
    finally:
        os.close(descriptor)
    if len(content) > most_bytes:
        raise ValueError(f"it has more than {most_bytes} bytes")
    return content


def exists(path: str) -> bool:
    """Whether there is something at a path, if it can be one."""
    try:
        return Path(path).exists()
    except OSError:  # too long for a file
        return False


@contextmanager
def reading(what: str, path: Path | str, error: type[Exception]) -> Iterator[None]:
    """Turns a ValueError about a file's content, or an OSError about the file, into an `error` of one line that names
    the file.

    Raises:
        Exception: of that type; its cause is the OSError, if it was one.
    """
    where = f"{what} {str(path)!r}"
    try:
        yield
    except OSError as reason:
        raise error(f"{where} can't be read: {one_line(reason.strerror or reason)}") from reason
    except ValueError as reason:
        raise error(f"{where}: {one_line(reason)}") from None


def check_writable(path: Path) -> None:
    """Finds out early, without writing anything, that `write_whole` would fail.

    Raises:
        OSError: its folder isn't there or can't be written to, or it isn't a file.
    """
    target = _target(path)
    if target.is_dir():
        raise _error(errno.EISDIR, path)
    if target.exists() and not target.is_file():
        raise _error(errno.EINVAL, path)
    if not target.parent.is_dir():
        raise _error(errno.ENOTDIR if target.parent.exists() else errno.ENOENT, target.parent)
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise _error(errno.EACCES, target.parent)


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes bytes, or a text in UTF-8. A reader of `path` meanwhile, or after a crash, finds the old file or the new.

    A link stays one: its target is replaced.

    Raises:
        OSError: it can't be written; `path` is as it was.
    """
    check_writable(path)
    target = _target(path)
    remove_abandoned(target.parent, target.name)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def remove_abandoned(folder: Path, name: str | None = None) -> None:
    """Removes temporary files that killed processes have left in a folder.

    Args:
        folder: where they wrote.
        name: of the file that they were writing; None: any.
    """
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            found = _TEMPORARY.fullmatch(path.name)
            is_meant = found is not None and name in (None, found[1])
            if is_meant and time.time() - path.stat().st_mtime > ABANDONED_S:
                path.unlink(missing_ok=True)


_TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{8}\.tmp")
"""A file that is being written, as `write_whole` names it."""


def _target(path: Path) -> Path:
    """The target of a path, through links.

    Raises:
        OSError: it leads in a circle, or no file can have that path.
    """
    try:
        target = path.resolve()
        leads_on = target.is_symlink()
    except RuntimeError:  # of Python before 3.13
        leads_on = True
    except ValueError:
        raise _error(errno.EINVAL, path) from None
    if leads_on:
        raise _error(errno.ELOOP, path)
    return target


@contextmanager
def writing(what: str, path: Path, error: type[Exception]) -> Iterator[None]:
    """Turns an OSError from writing `path` into an `error` that says what couldn't be written, and why.

    Raises:
        Exception: of that type.
    """
    try:
        yield
    except OSError as reason:
        raise error(f"{what} {str(path)!r} can't be written: {one_line(reason.strerror or reason)}") from reason


def _error(number: int, path: Path) -> OSError:
    return OSError(number, os.strerror(number), str(path))
