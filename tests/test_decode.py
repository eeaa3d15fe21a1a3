"""`benchmarks/decode.py` on two ranks with gloo: a row has fuseplan with grouped attention and without."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.decode import APART, FUSED, PLAIN

ROOT = Path(__file__).parents[1]


@pytest.mark.nightly
@pytest.mark.distributed
def test_a_row_says_what_grouped_attention_gives_on_top(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "tests.run_decode", "--device", "cpu", "--layers", "1", "--batch", "2", "--write"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, "--out", str(tmp_path)], check=False, capture_output=True, text=True, env=environment, timeout=400
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (row,) = json.loads((tmp_path / "decode_cpux2.json").read_text())["rows"]
    assert row["applied"] == ["grouped_attention:sdpa_packed"]
    assert (row["fused"]["grouped_attention"], sum(row["fused_apart"].values())) == (1, 0)
    for times in (row, row["without_guards"]):
        assert min(times[name][0] for name in (PLAIN, FUSED, APART)) > 0
        gave = times["grouped_attention"]["gave_us"]
        assert gave == pytest.approx(times[APART][0] - times[FUSED][0], abs=0.03)
    assert row["logits_relative_difference"] < 0.02
