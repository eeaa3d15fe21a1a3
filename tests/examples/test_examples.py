"""The examples are short, and each is on a page: there it runs as its readers run it."""

import re
from pathlib import Path

import pytest
import transformers
from torch.torch_version import TorchVersion

from docs.blocks import PAGES, ROOT, blocks_of
from tests.docs.commands import commands_of

EXAMPLES = sorted(path.relative_to(ROOT) for path in (ROOT / "examples").glob("*.py"))
# Newer transformers split the embedding too; its all-reduce goes into the first norm.
SPLITS_EMBEDDING = TorchVersion(transformers.__version__) >= "5.23"
FUSED = {
    "examples/generate.py": {"norm_quant": 2},
    "examples/tensor_parallel.py": {"allreduce_rms": 2 + SPLITS_EMBEDDING},
}
"""What fires in the prompt and in decoding, by the example as a command names it: in their one layer."""


def check(example: str, output: str) -> None:
    """What an example prints says that fused and stock generate the same, and what should fire does."""
    printed = dict(re.findall(r"^(\w+):? +(.*)$", output, re.MULTILINE))
    assert len(set(re.findall(r"\d+", printed["stock"]))) > 1, "a constant sequence would show nothing"
    assert printed["fused"] == printed["stock"]
    assert printed["prompt"] == printed["decoding"] == str(FUSED[example])


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_short(path: Path) -> None:
    assert len((ROOT / path).read_text(encoding="utf-8").splitlines()) < 40


def test_a_page_runs_each_and_what_it_prints_is_checked() -> None:
    scripts = (block.body for page in PAGES for block in blocks_of(page) if block.language == "sh")
    ran = {argument for script in scripts for command in commands_of(script) for argument in command.arguments}
    names = [path.as_posix() for path in EXAMPLES]
    assert ran.issuperset(names)
    assert sorted(FUSED) == names
