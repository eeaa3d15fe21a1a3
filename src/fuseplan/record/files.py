"""Writing files: the whole of one, or nothing."""

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_writable(path: Path) -> None:
    """Finds out early, without writing anything, that `write_whole` would fail.

    Raises:
        OSError: its folder isn't there or can't be written to, or it is something else than a file.
    """
    folder = path.resolve().parent
    if path.is_dir():
        raise _error(errno.EISDIR, path)
    if path.exists() and not path.is_file():
        raise _error(errno.EINVAL, path)
    if not folder.is_dir():
        raise _error(errno.ENOTDIR if folder.exists() else errno.ENOENT, folder)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise _error(errno.EACCES, folder)


def write_whole(path: Path, text: str) -> None:
    """Writes a text in UTF-8. Who reads `path` meanwhile, or after a crash, finds the old file or the new one.

    A link stays one: what it points to is replaced.

    Raises:
        OSError: it can't be written; `path` is as it was.
    """
    check_writable(path)
    target = path.resolve()
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("x", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def writing(what: str, path: Path, error: type[Exception]) -> Iterator[None]:
    """Makes an OSError of what is written to `path` an `error` that says what couldn't be written, and why.

    Raises:
        Exception: of that type.
    """
    try:
        yield
    except OSError as reason:
        raise error(f"{what} {str(path)!r} can't be written: {reason.strerror or reason}") from reason


def _error(number: int, path: Path) -> OSError:
    return OSError(number, os.strerror(number), str(path))
