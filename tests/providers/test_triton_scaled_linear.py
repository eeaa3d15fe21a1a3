"""fuseplan's kernels for linear layers in fp8 with scales of rows compute what the reference does.

Here they run by Triton's interpreter, in a process of its own; tests/gpu has them on a GPU.
"""

import importlib.util
from typing import Any

import pytest
import torch

from fuseplan.dialect import ops
from fuseplan.providers.triton import ACCEPTS, PROVIDER
from fuseplan.providers.triton.checks import MOST_LINEAR_ROWS
from fuseplan.record import Reason
from fuseplan.rules import Bindings
from fuseplan.rules.parts.scaled_linear import CODES
from tests.forks import Forks
from tests.providers.processes import printed_by

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


@pytest.fixture(scope="module")
def interpreted(interpreting_forks: Forks) -> dict[str, Any]:
    found: dict[str, Any] = printed_by(interpreting_forks, "run_scaled_linear_interpreted")
    return found


@needs_triton
@pytest.mark.parametrize(("what", "cases"), [("sizes", 22), ("layouts", 5)])
def test_they_are_as_close_to_float64_as_the_reference(interpreted: dict[str, Any], what: str, cases: int) -> None:
    assert len(interpreted[what]) == cases
    for name, (own, reference) in interpreted[what].items():
        assert own <= 1.01 * reference + 0.01, name


@needs_triton
def test_nan_stays_in_its_row(interpreted: dict[str, Any]) -> None:
    assert all(interpreted["special values"])


@needs_triton
def test_programs_share_a_width_where_processors_have_no_tile_and_take_the_shared_memory_there_is(
    interpreted: dict[str, Any],
) -> None:
    assert interpreted["shared"] == [[2, 6, 147456], [1, 6, 147456], [1, 4, 98304], [1, 2, 49152]]


@needs_triton
def test_they_are_compiled_for_few_numbers_of_rows(interpreted: dict[str, Any]) -> None:
    """Up to 16, and up to 32."""
    assert interpreted["variants"] == 2


@needs_triton
def test_the_rules_hold(interpreted: dict[str, Any]) -> None:
    assert interpreted["cases"] == [12, 13, 13]
    assert {line.split(":")[0] for line in interpreted["refused"]} == {
        f"[triton] {what}" for what in ("bfloat16", "float16", "float32", "transposed")
    }


def bound(**changed: Any) -> Bindings:
    given = {
        "x": torch.empty(1, 64, dtype=CODES, device="meta"), "x_scale": torch.empty(1, 1, device="meta"),
        "weight0": torch.empty(32, 64, dtype=CODES, device="meta"),
        "weight_scale0": torch.empty(1, 32, device="meta"), "bias0": None, "use_fast_accum": True,
    }  # fmt: skip
    return Bindings("skinny_scaled_linear", {**given, **changed})


@pytest.mark.parametrize(
    ("changed", "reason", "says"),
    [
        ({"x": torch.empty(1, 64, device="meta")}, Reason.DTYPE, "takes float8_e4m3fn; x is float32"),
        (
            {"weight0": torch.empty(64, 32, dtype=CODES, device="meta").T}, Reason.LAYOUT,
            "reads rows of weights; those of weight0 lie apart",
        ),
        (
            {"weight_scale0": torch.empty(1, 32, 4, device="meta")[..., 0]}, Reason.LAYOUT,
            "reads rows of weights; those of weight_scale0 lie apart",
        ),
        ({"x": torch.empty(1, 72, dtype=CODES, device="meta")}, Reason.SIZE, "multiples of 16, as tensor cores do"),
    ],
)  # fmt: skip
def test_what_they_refuse(changed: dict[str, Any], reason: Reason, says: str) -> None:
    refusal = ACCEPTS["skinny_scaled_linear"](bound(**changed))
    assert refusal is not None
    assert refusal.reason is reason
    assert says in refusal.detail


class OnGPU:
    """Codes on a GPU that isn't there."""

    dtype, shape, device = CODES, (1, 64), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("capability", "hip", "says"),
    [((8, 9), None, "this one has 8.9"), ((9, 4), "7.0", "one of AMD's"), ((9, 0), None, None), ((10, 0), None, None)],
)
def test_gpus_that_multiply_otherwise_are_named(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], hip: str | None, says: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    refusal = ACCEPTS["skinny_scaled_linear"](bound(x=OnGPU()))
    if says is None:
        assert refusal is None
    else:
        assert refusal is not None
        assert refusal.reason is Reason.PROVIDER
        assert says in refusal.detail
        assert "NVIDIA's GPUs of compute capability 9.0 and newer" in refusal.detail


def test_what_they_take() -> None:
    assert ACCEPTS["skinny_scaled_linear"](bound()) is None
    offer = PROVIDER.implements[ops.skinny_scaled_linear.name]
    assert offer.limits() == (
        "float8_e4m3fn", f"up to {MOST_LINEAR_ROWS} rows", "widths that are multiples of 16",
        "NVIDIA's GPUs of compute capability 9.0 and newer",
    )  # fmt: skip
    assert offer.most_rows is not None
    assert offer.most_rows(bound()) == MOST_LINEAR_ROWS
