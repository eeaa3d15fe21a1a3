"""Tensors that arguments of kernels are made as."""

from typing import Any

import torch

from fuseplan.verification.specs import TensorSpec


def spec(
    *shape: int, dtype: torch.dtype = torch.float32, stride: tuple[int, ...] | None = None, off: int = 0,
    device: str = "cpu", **more: Any,
) -> TensorSpec:  # fmt: skip
    """Without gaps, unless its strides are given, and so many bytes behind a border."""
    strides = torch.empty(shape, device="meta").stride() if stride is None else stride
    return TensorSpec(
        dtype=dtype, shape=shape, stride=strides, misalignment=off, device=torch.device(device), **more
    )  # fmt: skip
