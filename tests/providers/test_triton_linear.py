"""fuseplan's kernel for linear layers of few rows computes what the reference does.

Here it runs by Triton's interpreter, in a process of its own; tests/gpu has it on a GPU.
"""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from fuseplan.dialect import ops
from fuseplan.providers.triton import ACCEPTS, PROVIDER
from fuseplan.providers.triton.checks import MOST_LINEAR_ROWS
from fuseplan.record import Reason
from fuseplan.rules import Bindings
from tests.forks import Forks
from tests.providers.processes import printed_by

ROOT = Path(__file__).parents[2]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


@pytest.fixture(scope="module")
def interpreted(interpreting_forks: Forks) -> dict[str, Any]:
    found: dict[str, Any] = printed_by(interpreting_forks, "run_linear_interpreted")
    return found


@needs_triton
@pytest.mark.parametrize(("what", "cases"), [("sizes", 21), ("layouts", 6)])
def test_it_is_as_close_to_float64_as_torch(interpreted: dict[str, Any], what: str, cases: int) -> None:
    assert len(interpreted[what]) == cases
    for name, (own, torchs) in interpreted[what].items():
        assert own <= 1.01 * torchs + 0.01, name


@needs_triton
def test_with_a_norm_behind_it_is_as_close_too_however_many_programs_share_the_width(
    interpreted: dict[str, Any],
) -> None:
    assert [found[0] for found in interpreted["normed"].values()] == [
        each for each in (1, 2, 2, 3, 4, 1) for _ in range(6)
    ]
    for name, (_, own, torchs) in interpreted["normed"].items():
        assert own <= 1.25 * torchs + 0.01, name


@needs_triton
def test_gate_and_up_one_after_the_other_are_the_same(interpreted: dict[str, Any]) -> None:
    assert interpreted["on AMD"] == [True] * 6


@needs_triton
def test_infinities_and_nan_stay_in_their_rows(interpreted: dict[str, Any]) -> None:
    assert all(interpreted["special values"])


@needs_triton
def test_it_takes_no_more_shared_memory_than_there_is(interpreted: dict[str, Any]) -> None:
    assert max(interpreted["fitting"]) <= 65536


@needs_triton
def test_it_is_compiled_for_few_numbers_of_rows(interpreted: dict[str, Any]) -> None:
    """Up to 16, and up to 32."""
    assert interpreted["variants"] == 2


@needs_triton
def test_the_rules_hold(interpreted: dict[str, Any]) -> None:
    assert interpreted["cases"] == [*[13] * 6, 18]
    assert {line.split(":")[0] for line in interpreted["refused"]} == {"[triton] float32", "[triton] transposed"}


def bound(**changed: Any) -> Bindings:
    given = {
        "x": torch.empty(1, 64, dtype=torch.bfloat16, device="meta"),
        "weight0": torch.empty(32, 64, dtype=torch.bfloat16, device="meta"), "bias0": None,
    }  # fmt: skip
    return Bindings("skinny_linear", {**given, **changed})


@pytest.mark.parametrize(
    ("changed", "reason", "says"),
    [
        ({"x": torch.empty(1, 64, device="meta")}, Reason.DTYPE, "takes bfloat16 and float16; x is float32"),
        (
            {"weight0": torch.empty(64, 32, dtype=torch.bfloat16, device="meta").T}, Reason.LAYOUT,
            "reads rows of weights; those of weight0 lie apart",
        ),
    ],
)  # fmt: skip
def test_what_it_refuses(changed: dict[str, Any], reason: Reason, says: str) -> None:
    refusal = ACCEPTS["skinny_linear"](bound(**changed))
    assert refusal is not None
    assert refusal.reason is reason
    assert says in refusal.detail


def test_what_it_takes() -> None:
    assert ACCEPTS["skinny_linear"](bound()) is None
    offer = PROVIDER.implements[ops.skinny_linear.name]
    assert offer.limits() == ("bfloat16 or float16", f"up to {MOST_LINEAR_ROWS} rows")
    assert offer.most_rows is not None
    assert offer.most_rows(bound()) == MOST_LINEAR_ROWS
