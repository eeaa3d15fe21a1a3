"""What the examples print says that they are right. `tests/docs` runs them, on the pages that tell readers to."""

import re

import transformers
from torch.torch_version import TorchVersion

# Newer transformers split the embedding too; its all-reduce goes into the first norm.
SPLITS_EMBEDDING = TorchVersion(transformers.__version__) >= "5.23"
FUSED = {
    "examples/generate.py": {"norm_quant": 2},
    "examples/tensor_parallel.py": {"allreduce_rms": 2 + SPLITS_EMBEDDING},
}
"""What fires in the prompt and in decoding, by the example as a command names it: in their one layer."""


def check(example: str, output: str) -> None:
    """Fused and stock generate the same, and what should fire does."""
    printed = dict(re.findall(r"^(\w+):? +(.*)$", output, re.MULTILINE))
    assert len(set(re.findall(r"\d+", printed["stock"]))) > 1, "a constant sequence would show nothing"
    assert printed["fused"] == printed["stock"]
    assert printed["prompt"] == printed["decoding"] == str(FUSED[example])
