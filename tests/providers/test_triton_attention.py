"""fuseplan's split-KV attention: it computes what the reference does, and reads no tile that is masked as a whole.

Here it runs by Triton's interpreter, in a process of its own; tests/gpu has it on a GPU.
"""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from fuseplan.dialect import ops
from fuseplan.providers.triton import ACCEPTS
from fuseplan.record import Reason
from fuseplan.rules import Bindings
from tests.forks import Forks
from tests.providers.processes import printed_by

ROOT = Path(__file__).parents[2]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


@pytest.fixture(scope="module")
def interpreted(interpreting_forks: Forks) -> dict[str, Any]:
    found: dict[str, Any] = printed_by(interpreting_forks, "run_attention_interpreted")
    return found


@needs_triton
@pytest.mark.parametrize(
    ("what", "cases"), [("sizes", 22), ("masks", 16), ("strides", 5), ("spelled", 27), ("spelled masks", 28)]
)
def test_it_is_close_to_float64(interpreted: dict[str, Any], what: str, cases: int) -> None:
    """Of values around 1, in units in the last place: one rounding of weights, and one of the result."""
    assert len(interpreted[what]) == cases
    for name, off in interpreted[what].items():
        assert off <= (4 if "float32" in name else 1), name


@needs_triton
def test_any_number_of_parts_gives_the_same_but_for_rounding(interpreted: dict[str, Any]) -> None:
    assert max(interpreted["splits"].values()) <= 1


@needs_triton
def test_tiles_that_are_masked_as_a_whole_are_not_read(interpreted: dict[str, Any]) -> None:
    assert len(interpreted["skipped"]) == 12
    assert all(interpreted["skipped"].values()), interpreted["skipped"]


@needs_triton
def test_a_query_that_sees_nothing_gets_zeros(interpreted: dict[str, Any]) -> None:
    assert interpreted["fully masked"] == [0.0] * 4


@needs_triton
def test_sinks_of_minus_infinity_are_none(interpreted: dict[str, Any]) -> None:
    assert interpreted["no sinks"] == [True, True]


@needs_triton
def test_results_lie_in_memory_as_those_of_torchs_kernels(interpreted: dict[str, Any]) -> None:
    assert interpreted["layouts"] == dict.fromkeys(("cudnn", "flash", "efficient", "cpu"), True)


@needs_triton
def test_one_compilation_serves_a_growing_cache(interpreted: dict[str, Any]) -> None:
    assert interpreted["variants"] == 1


@needs_triton
def test_the_rule_holds_by_it(interpreted: dict[str, Any]) -> None:
    """Two samples of its op, one of them once more, and in float16."""
    assert interpreted["cases"]["grouped_attention"] == 4


H100, RTX_4090, MI300X = 232_448, 101_376, 65_536
"""Bytes of shared memory of a program."""


@needs_triton
@pytest.mark.parametrize(
    ("keys", "key_bytes", "places", "expected"),
    [
        (1280, 256, 8, (20, 64, 4)),
        (1280, 256, 64, (4, 64, 4)),
        (1280, 256, 256, (1, 128, 4)),
        (8192, 256, 8, (33, 64, 4)),
        (10**6, 512, 1, (64, 32, 4)),
        (1280, 128, 1000, (1, 128, 4)),
        (1, 256, 8, (1, 128, 4)),
        (0, 256, 8, (1, 128, 4)),
    ],
)
def test_keys_are_split_among_two_programs_for_each_multiprocessor(
    keys: int, key_bytes: int, places: int, expected: tuple[int, ...]
) -> None:
    from fuseplan.providers.triton.split import Split

    split = Split.of(keys, key_bytes, places, processors=132)
    assert (split.count, split.block, split.warps) == expected


@needs_triton
@pytest.mark.parametrize(
    ("shared", "key_bytes", "places", "rows", "expected"),
    [
        (H100, 256, 8, 16, (64, 3)),
        (H100, 512, 1000, 64, (64, 2)),
        (RTX_4090, 256, 8, 16, (64, 3)),
        (RTX_4090, 512, 1000, 16, (64, 2)),
        (MI300X, 256, 8, 16, (64, 2)),
        (MI300X, 512, 8, 64, (16, 1)),
        (1024, 512, 8, 64, (16, 1)),
    ],
)
def test_tiles_fit_shared_memory(
    shared: int, key_bytes: int, places: int, rows: int, expected: tuple[int, ...]
) -> None:
    from fuseplan.providers.triton.split import Split

    split = Split.of(8192, key_bytes, places, processors=132).fitting(shared, rows, key_bytes, 2)
    assert (split.block, split.stages) == expected


def bound(**values: Any) -> Bindings:
    def empty(*shape: Any, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    given = {
        "q": empty(2, 8, 1, 128), "k": empty(2, 2, 40, 128), "v": empty(2, 2, 40, 128), "mask": empty(2, 1, 1, 40),
        "scale": 0.1, "is_causal": False, "kernel": "cudnn",
    }  # fmt: skip
    changed = {name: empty(*value[1:], dtype=value[0]) if isinstance(value, tuple) else value
               for name, value in values.items()}  # fmt: skip
    return Bindings("grouped_attention", {**given, **changed})


@pytest.mark.parametrize("softcap", [None, 50.0, 1e4, 1e6])
def test_caps_that_float32_cannot_tell_scores_apart_under_are_refused(softcap: float | None) -> None:
    refusal = ACCEPTS[ops.fused_attention.name](bound(softcap=softcap))
    assert (refusal.reason if refusal else None) is (Reason.ATTRIBUTE if softcap == 1e6 else None)


@pytest.mark.parametrize(
    ("values", "reason", "says"),
    [
        ({}, None, ""),
        ({"mask": None, "kernel": "cpu"}, None, ""),
        ({"q": (torch.float16, 2, 8, 16, 256), "v": (torch.float16, 2, 2, 40, 80), "kernel": "efficient"}, None, ""),
        ({"v": (torch.bfloat16, 2, 2, 40, 80)}, Reason.SIZE, "heads of q have 128 elements, of v 80"),
        ({"q": (torch.float32, 2, 8, 1, 128)}, Reason.DTYPE, "takes bfloat16 and float16; q is float32"),
        ({"q": (torch.bfloat16, 2, 8, 17, 128)}, Reason.SIZE, "up to 16 query tokens; q has 17"),
        ({"q": (torch.bfloat16, 2, 8, 1, 257)}, Reason.SIZE, "those of q have 257, of v 128"),
        ({"v": (torch.bfloat16, 2, 2, 40, 512)}, Reason.SIZE, "those of q have 128, of v 512"),
        ({"is_causal": True}, Reason.ATTRIBUTE, "is_causal=False"),
        ({"kernel": "overrideable"}, Reason.PROVIDER, "a device outside of torch"),
    ],
)  # fmt: skip
def test_what_it_takes(values: dict[str, Any], reason: Reason | None, says: str) -> None:
    refusal = ACCEPTS[ops.grouped_attention.name](bound(**values))
    assert (refusal.reason if refusal else None) is reason
    assert says in (refusal.detail if refusal else "")
