"""Values for references and samples."""

import torch
from torch import Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, so that a reference run in float64 is exact; float32 for all else."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def random_tensor(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> Tensor:
    """Standard normal values, drawn on the CPU so that one seed gives the same values on every device."""
    return torch.randn(shape, generator=generator).to(device=device, dtype=dtype)
