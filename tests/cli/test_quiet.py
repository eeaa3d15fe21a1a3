"""Commands say nothing that nobody asked for. Also run on the newest of everything: `make test-unpinned`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.nightly

CONFIG = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64,
}  # fmt: skip


def stderr_of(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "fuseplan", *arguments], capture_output=True, text=True, check=True, timeout=300
    )
    assert done.stdout
    return done.stderr


@pytest.mark.parametrize("command", [["rules"], ["providers"], ["devices"]])
def test_lists(command: list[str]) -> None:
    assert stderr_of(*command) == ""


@pytest.mark.parametrize("device", ["h200", "cpu"])
def test_a_traced_workload(device: str) -> None:
    arguments = ["--tp", "2", "--layers", "1", "--range", "1:64", "--device", device]
    assert stderr_of("explain", "gpt-oss-120b-tiny", *arguments) == ""


def test_a_traced_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert stderr_of("explain", str(tmp_path), "--tp", "2", "--range", "1:64") == ""
