"""fuseplan's attention that writes its token into the caches first: it computes what the reference does, whatever the
mask hides, and writes nothing else.

Here it runs by Triton's interpreter, in a process of its own; tests/gpu has it on a GPU.
"""

import importlib.util
from typing import Any

import pytest
import torch

from fuseplan.dialect import ops
from fuseplan.providers.triton import ACCEPTS
from fuseplan.record import Reason
from fuseplan.rules import Bindings
from tests.forks import Forks
from tests.providers.processes import printed_by

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


@pytest.fixture(scope="module")
def interpreted(interpreting_forks: Forks) -> dict[str, Any]:
    found: dict[str, Any] = printed_by(interpreting_forks, "run_cached_attention_interpreted")
    return found


def test_it_is_close_to_float64_and_caches_are_the_references(interpreted: dict[str, Any]) -> None:
    """Of values around 1, in units in the last place: one rounding of weights, and one of the result."""
    assert len(interpreted["steps"]) == 71
    for name, off in interpreted["steps"].items():
        assert off <= (4 if "float32" in name else 1), name


def test_what_a_cache_held_at_the_position_is_read_by_nobody(interpreted: dict[str, Any]) -> None:
    assert interpreted["stale"] == [True] * 8


def test_nothing_is_written_where_the_caches_end(interpreted: dict[str, Any]) -> None:
    assert len(interpreted["out of bounds"]) == 4
    assert all(interpreted["out of bounds"].values()), interpreted["out of bounds"]


def test_any_layout_gives_the_same(interpreted: dict[str, Any]) -> None:
    assert len(interpreted["strides"]) == 11
    assert all(interpreted["strides"].values()), interpreted["strides"]


def test_results_lie_in_memory_as_those_of_torchs_kernels(interpreted: dict[str, Any]) -> None:
    assert interpreted["layouts"] == [True] * 4


def test_one_compilation_serves_all_positions_and_lengths(interpreted: dict[str, Any]) -> None:
    assert interpreted["variants"] == 1


def test_the_rules_hold_by_it(interpreted: dict[str, Any]) -> None:
    """Three samples of each op, one of them once more, and in float16."""
    assert interpreted["cases"] == [5, 5, 5, 5]


def bound(tokens: int = 1, width: int = 128, *, first: bool = False, **values: Any) -> Bindings:
    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    given = {
        "q": empty(2, tokens, 8, width) if first else empty(2, 8, tokens, width), "v": empty(2, 2, tokens, width),
        "positions": empty(tokens, dtype=torch.int64), "is_causal": False, "kernel": "cudnn",
    }  # fmt: skip
    return Bindings("cached_attention", {**given, **values})


@pytest.mark.parametrize("name", [ops.rope_cached_attention.name, ops.qk_norm_rope_cached_attention.name])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    ("tokens", "width", "values", "reason", "says"),
    [
        (1, 128, {}, None, ""),
        (1, 256, {"kernel": "cpu"}, None, ""),
        (2, 128, {}, Reason.SIZE, "the kernel takes one query token; q has 2"),
        (1, 264, {}, Reason.SIZE, "heads of up to 256 elements; those of q have 264"),
        (1, 128, {"is_causal": True}, Reason.ATTRIBUTE, "is_causal=False"),
        (1, 128, {"q": torch.empty(2, 8, 1, 128)}, Reason.DTYPE, "takes bfloat16 and float16; q is float32"),
        (1, 128, {"v": torch.empty(2, 2, 1, 64)}, Reason.SIZE, "heads of q have 128 elements, of v 64"),
    ],
)
def test_what_it_takes(
    name: str, first: bool, tokens: int, width: int, values: dict[str, Any], reason: Reason | None, says: str
) -> None:
    refusal = ACCEPTS[name](bound(tokens, width, first=first, **values))
    assert (refusal.reason if refusal else None) is reason
    assert says in (refusal.detail if refusal else "")


def test_it_says_what_it_takes() -> None:
    assert ACCEPTS[ops.rope_cached_attention.name].limits() == (  # type: ignore[attr-defined]
        "bfloat16 or float16", "one query token", "heads of up to 256 elements"
    )  # fmt: skip
