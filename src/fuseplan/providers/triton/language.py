"""Triton, or a stand-in where it isn't installed: plans for other machines import the files with kernels to run the
kernels' checks.
"""

from typing import Any

__all__ = ["cuda_capability_geq", "tl", "triton"]


class _Absent:
    """Has every attribute and takes every call, so that decorators and annotations go through."""

    def __getattr__(self, name: str) -> "_Absent":
        return self

    def __call__(self, *arguments: Any, **options: Any) -> "_Absent":
        return self


try:
    import triton
    import triton.language as tl
    from triton.language.target_info import cuda_capability_geq
except ImportError:
    triton = tl = cuda_capability_geq = _Absent()
