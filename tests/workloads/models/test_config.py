from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from fuseplan.workloads.models import GPT_OSS_20B, GPT_OSS_120B, WORKLOADS, check_size, workload


def test_published_sizes() -> None:
    assert (GPT_OSS_120B.layers, GPT_OSS_120B.experts) == (36, 128)
    assert (GPT_OSS_20B.layers, GPT_OSS_20B.experts) == (24, 32)
    assert (GPT_OSS_120B.hidden, GPT_OSS_120B.padded_hidden) == (2880, 3072)
    assert GPT_OSS_120B.tensor_parallel_sizes == (1, 2, 4, 8)


@pytest.mark.parametrize("name", [name for name in WORKLOADS if "tiny" in name])
def test_twins_keep_what_matters(name: str) -> None:
    config = WORKLOADS[name].config
    assert config.padded_hidden > config.hidden
    assert {config.is_sliding(i) for i in range(config.layers)} == {True, False}
    assert set(config.tensor_parallel_sizes) >= {1, 2, 4}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 0}, "layers=0 of gpt-oss-120b is not positive; give 1 or more"),
        ({"query_heads": 60}, "query_heads=60 of gpt-oss-120b is not a multiple of kv_heads=8; give e.g. 64"),
        ({"head_dim": 63}, "head_dim=63 of gpt-oss-120b is odd, and RoPE rotates pairs; give 64"),
        ({"experts": 2}, "experts_per_token=4 of gpt-oss-120b exceeds experts=2; give at most 2"),
    ],
)
def test_sizes_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        dataclasses.replace(GPT_OSS_120B, **change)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (3, "tp=3 does not divide 64 query heads of gpt-oss-120b; use one of 1, 2, 4, 8"),
        (16, "tp=16 does not divide 8 kv heads of gpt-oss-120b; use one of 1, 2, 4, 8"),
        (0, "tp=0 is not a number of ranks; use one of 1, 2, 4, 8 for gpt-oss-120b"),
    ],
)
def test_group_sizes_that_do_not_divide(size: int, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        check_size(GPT_OSS_120B, size)


def test_workloads_by_name() -> None:
    assert {workload(name).name for name in WORKLOADS} == set(WORKLOADS)
    assert len(WORKLOADS) == 8
    assert workload("gpt-oss-20b:outer-reduce").outer_reduce
    assert workload("gpt-oss-120b").with_layers(2).config.layers == 2
    with pytest.raises(ValueError, match="'gpt-os-120b'; did you mean gpt-oss-120b"):
        workload("gpt-os-120b")
