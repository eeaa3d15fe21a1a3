"""What fuseplan's Triton kernels take, what they say they take, and how their work is split."""

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fuseplan.dialect import ops
from fuseplan.providers.triton import ACCEPTS, PROVIDER
from fuseplan.providers.triton.checks import MOST_LINEAR_ROWS
from fuseplan.providers.triton.epilogues import epilogue_of
from fuseplan.record import Reason, Refusal
from fuseplan.rules import Bindings

NARROW, HALF, WIDE, CODES = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


def empty(*shape: int, dtype: torch.dtype = NARROW) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


ATTENTION = {
    "q": empty(2, 8, 1, 128), "k": empty(2, 2, 40, 128), "v": empty(2, 2, 40, 128), "mask": empty(2, 1, 1, 40),
    "scale": 0.1, "is_causal": False, "kernel": "cudnn",
}  # fmt: skip
LINEAR = {"x": empty(1, 64), "weight0": empty(32, 64), "bias0": None}
SCALED_LINEAR = {
    "x": empty(1, 64, dtype=CODES), "x_scale": empty(1, 1, dtype=WIDE), "weight0": empty(32, 64, dtype=CODES),
    "weight_scale0": empty(1, 32, dtype=WIDE), "bias0": None, "use_fast_accum": True,
}  # fmt: skip


def cached(tokens: int = 1, width: int = 128, *, first: bool = False, **changed: Any) -> dict[str, Any]:
    """Of cached attention; `first`: tokens lie before heads."""
    return {
        "q": empty(2, tokens, 8, width) if first else empty(2, 8, tokens, width), "v": empty(2, 2, tokens, width),
        "positions": empty(tokens, dtype=torch.int64), "is_causal": False, "kernel": "cudnn", **changed,
    }  # fmt: skip


def check_refusal(refusal: Refusal | None, reason: Reason | None, says: str = "") -> None:
    assert (refusal.reason if refusal else None) is reason
    assert says in (refusal.detail if refusal else "")


def attention(**changed: Any) -> dict[str, Any]:
    return {**ATTENTION, **changed}


def linear(**changed: Any) -> dict[str, Any]:
    return {**LINEAR, **changed}


def scaled(**changed: Any) -> dict[str, Any]:
    return {**SCALED_LINEAR, **changed}


NARROW_ONLY, IN_ROWS = "takes bfloat16 and float16; {} is float32", "reads rows of weights; those of {} lie apart"
EVERY_CACHED = (ops.rope_cached_attention.name, ops.qk_norm_rope_cached_attention.name)


@pytest.mark.parametrize(
    ("op", "given", "reason", "says"),
    [
        *(
            ("grouped_attention", attention(**given), reason, says)
            for given, reason, says in (
                ({}, None, ""),
                ({"mask": None, "kernel": "cpu"}, None, ""),
                ({"q": empty(2, 8, 16, 256, dtype=HALF), "v": empty(2, 2, 40, 80, dtype=HALF), "kernel": "efficient"},
                 None, ""),
                ({"v": empty(2, 2, 40, 80)}, Reason.SIZE, "heads of q have 128 elements, of v 80"),
                ({"q": empty(2, 8, 1, 128, dtype=WIDE)}, Reason.DTYPE, NARROW_ONLY.format("q")),
                ({"q": empty(2, 8, 17, 128)}, Reason.SIZE, "up to 16 query tokens; q has 17"),
                ({"q": empty(2, 8, 1, 257)}, Reason.SIZE, "those of q have 257, of v 128"),
                ({"v": empty(2, 2, 40, 512)}, Reason.SIZE, "those of q have 128, of v 512"),
                ({"is_causal": True}, Reason.ATTRIBUTE, "is_causal=False"),
                ({"kernel": "overrideable"}, Reason.PROVIDER, "a device outside of torch"),
            )
        ),
        *(
            (op, cached(first=first, **given), reason, says)
            for op in EVERY_CACHED
            for first in (True, False)
            for given, reason, says in (
                ({}, None, ""),
                ({"width": 256, "kernel": "cpu"}, None, ""),
                ({"tokens": 2}, Reason.SIZE, "the kernel takes one query token; q has 2"),
                ({"width": 264}, Reason.SIZE, "heads of up to 256 elements; those of q have 264"),
                ({"is_causal": True}, Reason.ATTRIBUTE, "is_causal=False"),
                ({"q": torch.empty(2, 8, 1, 128)}, Reason.DTYPE, NARROW_ONLY.format("q")),
                ({"v": torch.empty(2, 2, 1, 64)}, Reason.SIZE, "heads of q have 128 elements, of v 64"),
            )
        ),
        ("skinny_linear", LINEAR, None, ""),
        ("skinny_linear", linear(x=empty(1, 64, dtype=WIDE)), Reason.DTYPE, NARROW_ONLY.format("x")),
        ("skinny_linear", linear(weight0=empty(64, 32).T), Reason.LAYOUT, IN_ROWS.format("weight0")),
        ("skinny_scaled_linear", SCALED_LINEAR, None, ""),
        ("skinny_scaled_linear", scaled(x=empty(1, 64, dtype=WIDE)), Reason.DTYPE, "takes float8_e4m3fn; x is float32"),
        ("skinny_scaled_linear", scaled(weight0=empty(64, 32, dtype=CODES).T), Reason.LAYOUT,
         IN_ROWS.format("weight0")),
        ("skinny_scaled_linear", scaled(weight_scale0=empty(1, 32, 4, dtype=WIDE)[..., 0]), Reason.LAYOUT,
         IN_ROWS.format("weight_scale0")),
        ("skinny_scaled_linear", scaled(x=empty(1, 72, dtype=CODES)), Reason.SIZE,
         "multiples of 16, as tensor cores do"),
        ("qk_norm_rope", {"q": empty(2, 2, 2, 3, 8)}, Reason.SIZE, "up to 2 dimensions before the heads; q has 3"),
    ],
)  # fmt: skip
def test_what_kernels_take(op: str, given: dict[str, Any], reason: Reason | None, says: str) -> None:
    check_refusal(ACCEPTS[ops[op].name](Bindings(op, given)), reason, says)


@pytest.mark.parametrize("softcap", [None, 50.0, 1e4, 1e6])
def test_caps_that_float32_cannot_tell_scores_apart_under_are_refused(softcap: float | None) -> None:
    bindings = Bindings("eager_attention", {**ATTENTION, "softcap": softcap})
    check_refusal(ACCEPTS[ops.fused_attention.name](bindings), Reason.ATTRIBUTE if softcap == 1e6 else None)


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
    refusal = ACCEPTS["skinny_scaled_linear"](Bindings("skinny_scaled_linear", SCALED_LINEAR | {"x": OnGPU()}))
    check_refusal(refusal, Reason.PROVIDER if says else None, says or "")
    assert says is None or "NVIDIA's GPUs of compute capability 9.0 and newer" in str(refusal)


@pytest.mark.parametrize(
    ("size", "width", "detail", "layout"),
    [
        (64, 2880, None, "packed"),
        (64, 128, "at least 3 groups where scales are packed, not groups of 64 in rows of 128", "packed"),
        (64, 2880, None, "rows"),
        (128, 7168, None, "rows"),
        (128, 2880, "a hidden size that is a multiple of 128, not groups of 128 in rows of 2880", "rows"),
        (96, 2880, "a group size that is a power of two, not groups of 96 in rows of 2880", "rows"),
        (0, 2880, "a group size that is a power of two, not groups of 0 in rows of 2880", "rows"),
    ],
)
def test_what_groups_are_declined(size: int, width: int, detail: str | None, layout: str) -> None:
    given = Bindings("any", {"group_size": size, "layout": layout})
    refusal = epilogue_of("group_fp8_quant").refuse(torch.empty(2, width), given)
    check_refusal(refusal, Reason.SIZE if detail else None, detail or "")
    assert detail is None or str(refusal.detail if refusal else "").startswith("fuseplan's Triton kernels take")


ROWS = f"up to {MOST_LINEAR_ROWS} rows"


@pytest.mark.parametrize(
    ("op", "limits"),
    [
        (ops.rope_cached_attention, ("bfloat16 or float16", "one query token", "heads of up to 256 elements")),
        (ops.skinny_linear, ("bfloat16 or float16", ROWS)),
        (
            ops.skinny_scaled_linear,
            (
                "float8_e4m3fn", ROWS, "widths that are multiples of 16",
                "NVIDIA's GPUs of compute capability 9.0 and newer",
            ),
        ),
    ],
    ids=["cached attention", "linear", "scaled linear"],
)  # fmt: skip
def test_it_says_what_it_takes(op: Any, limits: tuple[str, ...]) -> None:
    assert PROVIDER.implements[op.name].limits() == limits


@pytest.mark.parametrize(("op", "given"), [(ops.skinny_linear, LINEAR), (ops.skinny_scaled_linear, SCALED_LINEAR)])
def test_linear_layers_are_of_few_rows(op: Any, given: dict[str, Any]) -> None:
    most_rows: Callable[[Bindings], int] | None = PROVIDER.implements[op.name].most_rows
    assert most_rows is not None
    assert most_rows(Bindings(op.name, given)) == MOST_LINEAR_ROWS


# How attention splits its keys.

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
