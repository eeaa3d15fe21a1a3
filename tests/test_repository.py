"""What is true of the files themselves: no developer's paths in them, and a README that can be followed."""

import re
import subprocess
from pathlib import Path

import pytest

from docs.blocks import ROOT, blocks_of

# An absolute path into somebody's machine; not the middle of a URL, of a relative path or of ~/.
MACHINE_PATH = re.compile(r"(?<![\w.~/*-])/(?:home|root|work|Users)/[\w.-]")


def repository_files() -> list[Path]:
    """Files that are committed or about to be: tracked, and untracked ones that are not ignored."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return [path for name in names if name and (path := ROOT / name).is_file()]


def test_no_paths_of_a_developer_machine() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in repository_files()
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1)
        if MACHINE_PATH.search(line)
    ]
    assert found == []


def test_machine_paths_are_recognised() -> None:
    for folder in ("home", "root", "work", "Users"):
        assert MACHINE_PATH.search(f'open("/{folder}/someone/model.py")')
        assert MACHINE_PATH.search(f"/{folder}/.cache")
        assert not MACHINE_PATH.search(f"https://example.org/{folder}/page")
        assert not MACHINE_PATH.search(f"docs/{folder}/page.md")


def test_readme_opens_with_installing_demo_and_test() -> None:
    scripts = [block.body for block in blocks_of(ROOT / "README.md") if block.language == "sh"]
    commands = [line.split("#")[0].strip() for line in scripts[0].splitlines()]
    assert commands == ["pip install .", "make demo", "make test"]


def test_ci_runs_every_target_and_closes_with_the_tests() -> None:
    lines = (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()
    targets = [line.split()[1] for line in lines if line.startswith("make ")]
    assert targets == ["lint", "docs", "test-vllm", "test-transformers", "test-torchao", "test-compressed", "test"]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert [each for each in targets if f"\n{each}: " not in makefile] == []
