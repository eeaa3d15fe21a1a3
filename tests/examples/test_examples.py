"""The examples run as their readers run them, in under 40 lines each."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from torch.torch_version import TorchVersion

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
LAYERS = 2
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def run(*arguments: str) -> dict[str, str]:
    """What an example prints, by the word before."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join([str(EXAMPLES.parent / "src"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, *arguments]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, timeout=400)
    # gloo's threads now and then outlive their process group, and the interpreter then aborts after its last line.
    assert done.returncode == 0 or "terminate called without an active exception" in done.stderr, done.stderr[-4000:]
    return dict(re.findall(r"^(\w+):? +(.*)$", done.stdout, re.MULTILINE))


def check(printed: dict[str, str], fused: dict[str, int]) -> None:
    assert len(set(re.findall(r"\d+", printed["stock"]))) > 1, "a constant sequence would show nothing"
    assert printed["fused"] == printed["stock"]
    assert printed["prompt"] == printed["decoding"] == str(fused)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_examples_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < 40


def test_generate() -> None:
    check(run(str(EXAMPLES / "generate.py")), {"norm_quant": 2 * LAYERS})


@pytest.mark.distributed
def test_tensor_parallel() -> None:
    # Newer transformers split the embedding too; its all-reduce goes into the first norm.
    splits_embedding = TorchVersion(transformers.__version__) >= "5.23"
    printed = run(*TORCHRUN, str(EXAMPLES / "tensor_parallel.py"))
    check(printed, {"allreduce_rms": 2 * LAYERS + splits_embedding})
