"""Two ranks under torchrun with gloo: what fires, and that fused and unfused runs agree."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.real_models.run_tensor_parallel import PAD_FIRST, REDUCE_FIRST, STEPS

SCRIPT = Path(__file__).with_name("run_tensor_parallel.py")
BF16_ULP = 2**-8

pytestmark = pytest.mark.distributed


def torchrun(what: str, folder: Path) -> list[dict[str, Any]]:
    """What each of two ranks saw."""
    results = folder / "results.json"
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(SCRIPT), what, str(results)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join([str(SCRIPT.parents[2]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    ranks: list[dict[str, Any]] = json.loads(results.read_text())
    assert len(ranks) == 2
    return ranks


def test_llama_with_its_own_tp_plan(tmp_path: Path) -> None:
    for rank in torchrun("llama", tmp_path):
        layers = rank["layers"]
        (applied,) = rank["applied"]
        assert applied.count("all_reduce_fused_add_rms_norm") == 2 * layers
        # Newer transformers split the embedding too; its all-reduce goes into the first norm, which has no residual.
        assert applied.count("all_reduce_rms_norm") == rank["splits_embedding"]
        assert len(applied) == 2 * layers + rank["splits_embedding"]
        assert sum(count for op, count in rank["recognized"][0].items() if "rms_norm" in op) == 2 * layers + 1
        # Every partial sum is rounded to bf16 before and after the reduction; a whole model rounds once. Two a layer.
        assert rank["whole_difference"] <= 2 * 2 * layers * BF16_ULP * rank["scale"]
        assert rank["plain_difference"] <= 2 * layers * BF16_ULP * rank["scale"]


def test_gpt_oss_under_both_orders(tmp_path: Path) -> None:
    for rank in torchrun("gpt_oss", tmp_path):
        for name, result in rank.items():
            layers = result["layers"]
            sites = (2 if name.endswith(":outer-reduce") else 1) * layers + 1
            expected = {
                REDUCE_FIRST: {"allreduce_rms": sites, "act_padding": 0},
                PAD_FIRST: {"allreduce_rms": sites - layers, "act_padding": layers},
            }
            for policy, row in result["policies"].items():
                assert row["fused"], policy
                assert all(fused == expected[policy] for fused in row["fused"]), row["fused"]
                assert len(row["tokens"]) == STEPS
                assert row["tokens"] == result["tokens"]
                assert row["difference"] <= 2 * layers * BF16_ULP * result["scale"]
