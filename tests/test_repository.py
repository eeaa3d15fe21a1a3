"""What is true of the files themselves: no developer's paths in them, and a README that can be followed."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# An absolute path into somebody's machine; not the middle of a URL, of a relative path or of ~/.
MACHINE_PATH = re.compile(r"(?<![\w.~/*-])/(?:home|root|work|Users)/[\w.-]")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def repository_files() -> list[Path]:
    """Files that are committed or about to be: tracked, and untracked ones that are not ignored."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return [path for name in names if name and (path := ROOT / name).is_file()]


def text_of(path: Path) -> str:
    """The text of a file, empty for a binary one."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""


def readme_blocks(*languages: str) -> list[str]:
    return [
        body
        for language, body in FENCE.findall((ROOT / "README.md").read_text(encoding="utf-8"))
        if language in languages
    ]


def test_no_paths_of_a_developer_machine() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in repository_files()
        for number, line in enumerate(text_of(path).splitlines(), start=1)
        if MACHINE_PATH.search(line)
    ]
    assert found == []


@pytest.mark.parametrize("folder", ["home", "root", "work", "Users"])
def test_machine_paths_are_recognised(folder: str) -> None:
    assert MACHINE_PATH.search(f'open("/{folder}/someone/model.py")')
    assert MACHINE_PATH.search(f"/{folder}/.cache")
    assert not MACHINE_PATH.search(f"https://example.org/{folder}/page")
    assert not MACHINE_PATH.search(f"docs/{folder}/page.md")


def test_readme_opens_with_demo_and_test() -> None:
    commands = [line.split("#")[0].strip() for block in readme_blocks("sh") for line in block.splitlines()]
    assert [command for command in commands if command][:2] == ["make demo", "make test"]


def test_readme_python_compiles() -> None:
    blocks = readme_blocks("python")
    assert blocks
    for number, block in enumerate(blocks, start=1):
        compile(block, f"README.md, python block {number}", "exec")


def test_readme_python_runs() -> None:
    """Every block runs as it is written, in a process of its own."""
    for block in readme_blocks("python"):
        done = subprocess.run([sys.executable, "-c", block], check=False, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
