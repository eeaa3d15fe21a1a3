"""fuseplan's Triton kernels: which there are, and that they compute what the references do.

Here they run by Triton's interpreter, in a process of its own; tests/gpu has them on a GPU.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fuseplan.dialect import ops, registered_kernel
from fuseplan.providers import BUILT_IN_PROVIDERS
from fuseplan.providers.triton import ACCEPTS

ROOT = Path(__file__).parents[2]
TRITON = next(each for each in BUILT_IN_PROVIDERS if each.name == "triton")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


def test_what_it_runs_has_a_kernel_and_the_rest_is_only_priced() -> None:
    assert set(TRITON.implements) == set(ACCEPTS) == {"qk_norm_rope"}
    assert all(registered_kernel(name, "triton") is not None for name in TRITON.implements)
    assert not set(TRITON.implements) & set(TRITON.prices)
    assert set(TRITON.implements) | set(TRITON.prices) == {op.name for op in ops.values() if op.fused}
    assert not any(registered_kernel(name, "triton") for name in TRITON.prices)


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.providers.run_interpreted"], check=False, capture_output=True, text=True,
        cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@needs_triton
def test_every_sample_gives_the_references_bits(interpreted: dict[str, Any]) -> None:
    differences = interpreted["differences"]
    assert set(differences) == {sample.name for sample in ops.qk_norm_rope.samples}
    for name, difference in differences.items():
        # In float32 sums of squares are added up in another order.
        assert difference <= (2e-6 if "float32" in name else 0), name


@needs_triton
def test_it_holds_where_the_rule_does(interpreted: dict[str, Any]) -> None:
    assert interpreted["cases"] == len(ops.qk_norm_rope.samples) + 12
    assert interpreted["refused"] == []


@needs_triton
def test_sizes_that_no_tile_divides_and_any_strides(interpreted: dict[str, Any]) -> None:
    assert len(interpreted["odd"]) == 4
    assert all(interpreted["odd"].values()), interpreted["odd"]


@needs_triton
def test_what_it_declines(interpreted: dict[str, Any]) -> None:
    assert interpreted["declined"] == "the kernel takes up to 2 dimensions before the heads; q has 3"
