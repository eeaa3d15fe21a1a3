import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fuseplan.record.files import ABANDONED_S, check_writable, read_bytes, remove_abandoned, write_whole


def test_writes_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for text in ("one\n", "two ü\n"):
        write_whole(path, text)
        assert path.read_bytes() == text.encode()
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
    (tmp_path / "other").write_text("")  # who may read it, may read the file
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize("step", ["open", "write", "flush", "fsync", "close", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt("interrupted")], ids=repr)
def test_failure_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, error: BaseException
) -> None:
    """Root may write anywhere, and a test can't fill a disk: each call of the system fails once, or is interrupted."""
    path = tmp_path / "file"
    path.write_text("old")
    opened = Path.open

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    def broken(self: Path, *args: Any, **kwargs: Any) -> Any:
        return _Broken(opened(self, *args, **kwargs), step, fail)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", fail if step == "open" else broken)
        if step in ("fsync", "replace"):
            patch.setattr({"fsync": os, "replace": Path}[step], step, fail)
        with pytest.raises(type(error), match=error.args[-1]):
            write_whole(path, "new")
    assert path.read_text() == "old"
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
    write_whole(path, "new")
    assert path.read_text() == "new"


class _Broken:
    """A file of which one method fails."""

    def __init__(self, file: Any, step: str, fail: Any) -> None:
        self.file, self.step, self.fail = file, step, fail

    def __enter__(self) -> "_Broken":
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()
        if self.step == "close":
            self.fail()

    def __getattr__(self, name: str) -> Any:
        return self.fail if name == self.step else getattr(self.file, name)


def test_a_process_that_is_killed_while_it_writes_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_whole(path, "0" * 1000)
    code = (
        "import sys, itertools, pathlib\n"
        "from fuseplan.record.files import write_whole\n"
        "path = pathlib.Path(sys.argv[1])\n"
        "for number in itertools.count(1):\n"
        "    write_whole(path, str(number % 10) * 3_000_000)\n"
        "    print(number, flush=True)\n"
    )
    for wait in (0.0, 0.004, 0.011):
        process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert len(set(path.read_text())) == 1
        assert path.stat().st_size == 3_000_000


def test_what_killed_processes_left_goes_when_it_is_old(tmp_path: Path) -> None:
    young, mine = ".file.4567abcd.tmp", "file.tmp"
    for name in (".file.0123abcd.tmp", young, ".other.0123abcd.tmp", mine):
        age_s = 1 if name == young else 2 * ABANDONED_S
        (tmp_path / name).write_text("half")
        os.utime(tmp_path / name, (time.time() - age_s, time.time() - age_s))
    write_whole(tmp_path / "file", "text")
    assert {each.name for each in tmp_path.iterdir()} == {"file", young, ".other.0123abcd.tmp", mine}
    remove_abandoned(tmp_path)
    assert {each.name for each in tmp_path.iterdir()} == {"file", young, mine}
    remove_abandoned(tmp_path / "nowhere")


def test_links_stay_links(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_whole(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "new"


def test_refuses_what_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "file" / "below", tmp_path / "nowhere" / "file"):
        with pytest.raises(OSError, match=r"."):
            check_writable(path)
        with pytest.raises(OSError, match=r"."):
            write_whole(path, "text")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file", "pipe"]
    check_writable(tmp_path / "new")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_refuses_folders_of_others(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError):
        check_writable(tmp_path / "file")


def test_reads_files_alone_and_never_waits(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"text")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "circle").symlink_to("circle")
    os.mkfifo(tmp_path / "pipe")
    before = len(os.listdir("/dev/fd"))  # noqa: PTH208 - names, not paths
    assert read_bytes(tmp_path / "file", 4) == read_bytes(tmp_path / "link", 4) == b"text"
    with pytest.raises(ValueError, match="it has more than 3 bytes"):
        read_bytes(tmp_path / "file", 3)
    for path, says in (
        (tmp_path, "Is a directory"),
        (tmp_path / "pipe", "It is a pipe, socket or device, not a file"),
        (Path("/dev/zero"), "It is a pipe, socket or device, not a file"),
        (tmp_path / "circle", "Too many levels of symbolic links"),
        (tmp_path / "nowhere", "No such file or directory"),
    ):
        with pytest.raises(OSError, match=says):
            read_bytes(path, 4)
    assert len(os.listdir("/dev/fd")) == before  # noqa: PTH208


def test_writes_to_no_circle_and_no_path_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "circle").symlink_to("circle")
    for path, says in ((tmp_path / "circle", "Too many levels"), (tmp_path / "a\0b", "Invalid argument")):
        for write in (check_writable, lambda path: write_whole(path, "")):
            with pytest.raises(OSError, match=says):
                write(path)
    assert (tmp_path / "circle").is_symlink()
